# SPDX-License-Identifier: Apache-2.0
"""What a device does for each command of commands.py, but `reset`, which Device.command() runs itself."""
from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .device import Device

HANDLERS: dict[str, Callable[[Device, Any], Awaitable[None]]] = {
    "compact": lambda device, what: device.compact(what),
    "disksize": lambda device, size: device.set_disksize(size),
    "comp_algorithm": lambda device, text: device.set_algorithm(text),
    "algorithm_params": lambda device, text: device.set_parameters(text),
    "recomp_algorithm": lambda device, text: device.set_secondary(text),
    "recompress": lambda device, text: device.recompress(text),
    "idle": lambda device, age: device.mark_idle(age),
    "access_times": lambda device, on: device.set_access_times(on),
    "backing_dev": lambda device, path: device.set_backing_dev(path),
    "writeback": lambda device, text: device.write_back(text),
    "writeback_limit": lambda device, blocks: device.set_writeback(limit=blocks),
    "writeback_limit_enable": lambda device, on: device.set_writeback(limit_enable=on),
    "writeback_batch_size": lambda device, blocks: device.set_writeback(batch_size=blocks),
    "compressed_writeback": lambda device, on: device.set_compressed_writeback(on),
    "policy": lambda device, chosen: device.set_policy(*chosen),
    "mem_limit": lambda device, limit: device.set_mem_limit(limit),
    "keep_free": lambda device, size: device.host_memory.set_keep_free(size),
    "mem_used_max": lambda device, _: device.reset_mem_used_max(),
    "proactiveness": lambda device, value: device.set_proactiveness(value),
    "balloon": lambda device, size: device.set_balloon(size),
}
