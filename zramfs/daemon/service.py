# SPDX-License-Identifier: Apache-2.0
"""Tells a service manager readiness, status and signs of life, as sd_notify(3) has them.

The protocol is one datagram of NAME=value lines. The Python packages for it have stood still since
2017 (sdnotify) or need the headers of libsystemd, and none knows how to ask the lane.
"""
from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import trio

from zramfs.device.device import Device
from zramfs.host.work_thread import run_in_thread
from zramfs.tree.state import status_line

log = logging.getLogger(__name__)

SEND_TIMEOUT = 5.0  # seconds; the manager's queue is full only when it is stuck itself
STATUS_INTERVAL = 5.0  # seconds between two looks whether the status text has changed
# Questions to the lane within the manager's limit: one may be late by half of it without harm.
PROBES = 4


STORE_PREFIX = "zramfs-"  # of the names of descriptors in the manager's store


def stored_descriptors() -> dict[str, int]:
    """What the manager has kept for this process (sd_listen_fds(3)), by the names that Notifier.store() gave.
    Takes the variables away."""
    pid, count, names = (os.environ.pop(f"LISTEN_{each}", "") for each in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    fds = range(3, 3 + int(count))  # SD_LISTEN_FDS_START
    for fd in fds:
        os.set_inheritable(fd, False)
    return {name.removeprefix(STORE_PREFIX): fd for name, fd in zip(names.split(":"), fds, strict=False)
            if name.startswith(STORE_PREFIX)}


class _Probe:
    """One question at a time: the thread that waits for a lane that hangs stays."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._is_waiting = False
        self._failed = False

    async def ask(self, seconds: float) -> bool:
        """True if the lane answers in time."""
        if self._is_waiting:
            return False
        try:
            with trio.fail_after(seconds):
                await trio.to_thread.run_sync(self._ask, abandon_on_cancel=True)
        except trio.TooSlowError:
            return False
        except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: there is no thread
            if not self._failed:
                log.warning("%s cannot be asked whether it is alive: %s", self._disk, error)
            self._failed = True
            return False
        self._failed = False
        return True

    def _ask(self) -> None:
        self._is_waiting = True
        try:
            os.statvfs(self._disk)
        finally:
            self._is_waiting = False


def _served(device: Device) -> int:
    """Requests of users that the lane has answered. A `reset` sets it back, which is a change as well."""
    return sum(latency.count for latency in device.stats().lane.latency)


class Notifier:
    """watchdog: seconds within which the manager wants a sign of life, None = it does not."""

    def __init__(self, address: str, watchdog: float | None = None) -> None:
        self.address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog = watchdog
        self._failed = False

    @classmethod
    def from_environment(cls) -> Notifier | None:
        """None when nobody wants to be told. Takes the variables away: programs that this process
        starts are not the service."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        limit, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        if not address.startswith(("/", "@")):
            return None
        ours = limit.isdecimal() and int(limit) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(limit) / 1e6 if ours else None)

    def send(self, *lines: str, fds: Sequence[int] = ()) -> None:
        """Blocks for SEND_TIMEOUT at most. A failure is logged once: without its manager a service
        still has work to do."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(SEND_TIMEOUT)
                sock.connect(self.address)
                socket.send_fds(sock, ["\n".join(lines).encode()], fds)
        except OSError as error:
            if not self._failed:
                log.warning("the service manager cannot be told (%s): %s", lines[0], error)
            self._failed = True

    def store(self, found: dict[str, int]) -> None:
        """Has the manager keep these descriptors (FileDescriptorStoreMax= of the unit), each in place of the
        last one of its name, for a process that begins when all of the service were killed."""
        for name, fd in found.items():
            # Without FDPOLL=0 it would drop what poll() takes for broken.
            self.send("FDSTOREREMOVE=1", f"FDNAME={STORE_PREFIX}{name}")
            self.send("FDSTORE=1", "FDPOLL=0", f"FDNAME={STORE_PREFIX}{name}", fds=[fd])

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.send("FDSTOREREMOVE=1", f"FDNAME={STORE_PREFIX}{name}")

    async def tell(self, *lines: str) -> None:
        await run_in_thread(partial(self.send, *lines))

    async def watch(self, device: Device, disk: Path) -> None:
        """Tells the state, and that the lane is alive, until it is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_status, device)
            if self.watchdog is not None:
                nursery.start_soon(self._watch_lane, device, disk, self.watchdog / PROBES)

    async def _watch_lane(self, device: Device, disk: Path, interval: float) -> None:
        """A sign of life for each interval in which the lane has answered something, and none while it does
        not.

        Requests of its users are answers. While there are none it is asked itself: statfs is answered by a
        thread of the lane and by no cache, and opens nothing that `reset` would find open. A question that
        fails, for want of a thread or because the path is hidden, is a missed sign, and the next may succeed.
        """
        probe, known = _Probe(disk), _served(device)
        while True:
            served = _served(device)
            if served != known or await probe.ask(interval):
                await self.tell("WATCHDOG=1")
            known = served
            await trio.sleep(interval)

    async def _tell_status(self, device: Device) -> None:
        told = ""
        while True:
            if (line := status_line(device.stats())) != told:
                told = line
                await self.tell(f"STATUS={line}")
            await trio.sleep(STATUS_INTERVAL)


