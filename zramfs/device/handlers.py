# SPDX-License-Identifier: Apache-2.0
"""What a device does for each command of commands.py, but `reset`, which Device.command() runs itself.

A short command runs to its end before the next one begins. A long command only judges its argument here;
the work that it returns runs as a job.
"""
from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from .jobs import JobWork

if TYPE_CHECKING:
    from .device import Device
    from .long_work import LongWork

SHORT: dict[str, Callable[[Device, Any], Awaitable[None]]] = {
    "disksize": lambda device, size: device.set_disksize(size),
    "resize": lambda device, wanted: device.resize(*wanted),
    "comp_algorithm": lambda device, text: device.set_algorithm(text),
    "algorithm_params": lambda device, text: device.set_parameters(text),
    "recomp_algorithm": lambda device, text: device.set_secondary(text),
    "access_times": lambda device, on: device.set_access_times(on),
    "backing_dev": lambda device, path: device.set_backing_dev(path),
    "writeback_limit": lambda device, blocks: device.set_writeback(limit=blocks),
    "writeback_limit_enable": lambda device, on: device.set_writeback(limit_enable=on),
    "writeback_batch_size": lambda device, blocks: device.set_writeback(batch_size=blocks),
    "compressed_writeback": lambda device, on: device.set_compressed_writeback(on),
    "keep": lambda device, path: device.kept_image.set_path(path),
    "policy": lambda device, chosen: device.set_policy(*chosen),
    "density": lambda device, wanted: device.density.change(wanted),
    "mem_limit": lambda device, limit: device.set_mem_limit(limit),
    "keep_free": lambda device, size: device.host_memory.set_keep_free(size),
    "mem_used_max": lambda device, _: device.reset_mem_used_max(),
    "proactiveness": lambda device, value: device.set_proactiveness(value),
    "govern": lambda device, wanted: device.governor.set_to(wanted),
    "balloon": lambda device, size: device.set_balloon(size),
}

# Those of which a store takes one at a time. The others take turns.
ALONE = frozenset({"recompress", "units", "share", "dictionary", "writeback", "save", "estimate"})

LONG: dict[str, Callable[[LongWork, Any], JobWork]] = {
    "compact": lambda work, what: work.compact(what),
    "recompress": lambda work, text: work.recompress(text),
    "units": lambda work, text: work.make_units(text),
    "share": lambda work, text: work.share(text),
    "dictionary": lambda work, text: work.learn(text),
    "estimate": lambda work, sample: work.estimate(sample),
    "idle": lambda work, age: work.mark_idle(age),
    "writeback": lambda work, text: work.write_back(text),
    "save": lambda work, wanted: work.save(wanted),
}
