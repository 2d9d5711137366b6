# SPDX-License-Identifier: Apache-2.0
"""The log of a device: tells when I/O begins to fail and when it is over, in two lines however long it
lasts, and keeps the file from growing without end."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from zramfs.device.device import Device
from zramfs.model.device_stats import DeviceStats
from zramfs.model.stats import EMPTY

log = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds between two looks
CALM = 10  # looks without a change until it counts as over

# What each counter counts and what to do about it.
STORE_COUNTERS = {
    "failed_writes": "pages were refused for lack of memory; raise mem_limit, or delete and trim files",
    "failed_reads": "pages could not be read back",
    "corrupt": "places of the pool held no object where one was expected; this is a bug, please report it",
}
BALLAST_COUNTERS = {
    "released": "pieces of 2 MiB of the ballast went to the kernel, which had stopped for want of memory; a "
    "larger vm.min_free_kbytes (`zramfs swap --min-free`) makes that rare",
}
LANE_COUNTERS = {
    "protocol_errors": "requests of the kernel were malformed or unknown",
    "refused_sizes": "truncations asked for more than the size of the device, which never changes; write an "
    "image that fits on it",
    "busy_truncations": "truncations would have discarded what others have open, and were refused; unmount, "
    "swapoff or losetup -d what uses `disk`, or write without truncating (dd: conv=notrunc)",
    "reply_errors": "answers were refused by the kernel",
}


@dataclass
class Episode:
    before: int
    last: int
    calm: int = 0


class ErrorWatch:
    """Call look() at regular times; it answers the lines for the log."""

    def __init__(self, stats: DeviceStats) -> None:
        self._known = {name: value for name, value, _ in _counters(stats)}
        self._episodes: dict[str, Episode] = {}

    def look(self, stats: DeviceStats) -> list[str]:
        lines = []
        for name, value, meaning in _counters(stats):
            known, episode = self._known[name], self._episodes.get(name)
            self._known[name] = value
            if value < known:  # reset
                self._episodes.pop(name, None)
            elif value > known and episode is None:
                self._episodes[name] = Episode(before=known, last=value)
                lines.append(f"{name} went from {known} to {value}: {meaning}")
            elif episode is not None:
                episode.calm = 0 if value > episode.last else episode.calm + 1
                episode.last = value
                if episode.calm == CALM:
                    del self._episodes[name]
                    lines.append(f"{name} rises no more: {value - episode.before} in all, {value} now")
        return lines


def _counters(stats: DeviceStats) -> Iterator[tuple[str, int, str]]:
    for source, names in ((stats.store or EMPTY, STORE_COUNTERS), (stats.lane, LANE_COUNTERS),
                          (stats.ballast, BALLAST_COUNTERS)):
        for name, meaning in names.items():
            yield name, getattr(source, name), meaning


async def watch_errors(device: Device) -> None:
    watch = ErrorWatch(device.stats())
    while True:
        await trio.sleep(INTERVAL)
        stats = device.stats()
        for line in watch.look(stats):
            log.warning("%s: %s", stats.name, line)


