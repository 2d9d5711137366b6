# SPDX-License-Identifier: Apache-2.0
"""All numbers of a device at one moment."""
from __future__ import annotations

from typing import TYPE_CHECKING

from zramfs.model.device_stats import DeviceStats, since
from zramfs.model.stats import BallastStats

if TYPE_CHECKING:
    from .device import Device


def statistics_of(device: Device) -> DeviceStats:
    store, lane = device._store, device._lane
    return DeviceStats(
        name=device._config.name,
        directory=device._config.directory,
        disksize=store.disksize if store else 0,
        algo=device._primary.name,
        level=store.level if store else device._primary.level,
        mem_limit=device._mem_limit,
        store=store.stats() if store else None,
        lane=since(lane.stats(), device._lane_before),
        threads=device._config.threads,
        open_count=lane.open_count,
        alive=lane.alive,
        last_error=device._last_error,
        algorithms=tuple(each.algorithm if each else device.dictionaries.algorithm_at(priority)
                         for priority, each in enumerate(device._algorithms)),
        access_times=device._access_times,
        recompression=device._post.recompression,
        unit_making=device._post.units,
        back_upkeep=device._post.back_upkeep,
        sharing=device._post.sharing,
        dictionaries=device.dictionaries.stats(),
        backing_dev=device.backing_store.settings,
        backing=device.backing_store.stats(),
        writeback=device.backing_store.done,
        policies=device.policies.stats(),
        density=device.density.stats(),
        ballast=device._ballast.stats if device._ballast else BallastStats(),
        proactiveness=device.compactor.proactiveness,
        headroom=device.host_memory.headroom.stats(), room=device.host_memory.room(),
        wipe=device._config.wipe,
        tasks=tuple(device.task_stats.values()),
        governor=device.governor.stats, survival=device.survival,
        save=device.saver.stats, restored=device._restored, estimate=device._post.estimator.last,
    )
