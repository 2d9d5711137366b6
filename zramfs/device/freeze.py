# SPDX-License-Identifier: Apache-2.0
"""The file systems on a device, frozen for a moment by child processes (host/freezer.py)."""
from __future__ import annotations

import errno
import logging
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio

from zramfs.errors import ZramfsError
from zramfs.host import freezer, loops
from zramfs.host.mounts import Mount, mounts

log = logging.getLogger(__name__)

# A freeze writes out what waits in the page cache, through this device; a child starts in 0.05 s.
TIMEOUT = 60.0
_PARTITION = re.compile(r"(?<=[0-9])p[0-9]+$")


def mounted_on(disk: Path) -> list[Mount]:
    """One mount of each file system on a loop device on `disk`, or on a partition of one."""
    devices = loops.find(disk)
    found = {each.source: each for each in reversed(mounts())
             if _PARTITION.sub("", each.source) in devices}
    return list(found.values())


class ThawedError(ZramfsError):
    """A file system may have gone on before the end of frozen()."""


@asynccontextmanager
async def frozen(places: list[Mount]) -> AsyncIterator[None]:
    """All of them are frozen inside, by us or already by others. Raises ZramfsError when one cannot be, and
    ThawedError at the end when one may have been thawed before: this process stood still for seconds, or the
    freeze of another one took as long."""
    async with AsyncExitStack() as stack:
        for place in places:
            await stack.enter_async_context(_frozen(place))
        yield


@asynccontextmanager
async def _frozen(place: Mount) -> AsyncIterator[None]:
    child = await _start(place)
    try:
        await _expect_frozen(child, place)
        yield
    finally:
        with trio.CancelScope(shield=True):
            await _thaw(child, place)
    if child.returncode == freezer.LATE:
        raise ThawedError(
            errno.ETIMEDOUT, f"{place.mountpoint} was frozen for {freezer.LONGEST:g} s and thawed before all "
            "was done for which it was frozen: try again when the machine is less busy")


async def _start(place: Mount, *more: str) -> trio.Process:
    command = [sys.executable, "-m", freezer.__name__, str(place.mountpoint), place.source, *more]
    try:
        return await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True)
    except OSError as error:
        raise ZramfsError(
            error.errno or errno.EIO, f"{place.mountpoint} cannot be frozen: `{' '.join(command)}` could not "
            f"be started: {error.strerror}") from None


async def _expect_frozen(child: trio.Process, place: Mount) -> None:
    assert child.stdout is not None and child.stderr is not None
    with trio.move_on_after(TIMEOUT) as limit:
        answer = await child.stdout.receive_some(100)
    if limit.cancelled_caught:
        raise ZramfsError(
            errno.ETIMEDOUT, f"{place.mountpoint} could not be frozen within {TIMEOUT:g} s: somebody is "
            "writing there all the time, or waits")
    if answer == b"busy\n":
        log.info("%s is frozen by somebody else already", place.mountpoint)
    elif answer != b"frozen\n":
        with trio.move_on_after(1):
            answer = await child.stderr.receive_some(1000)
        reason = answer.decode(errors="replace").strip() or "its freezer has ended"
        raise ZramfsError(errno.EIO, f"cannot be frozen: {reason}")


async def _thaw(child: trio.Process, place: Mount) -> None:
    """Has the child thaw, and does it by another one if that was killed."""
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    await child.stdin.aclose()
    with trio.move_on_after(TIMEOUT):
        await child.wait()
    await child.stdout.aclose()
    await child.stderr.aclose()
    if child.returncode is not None and child.returncode < 0:
        log.warning("the freezer of %s was killed; the file system is thawed by another", place.mountpoint)
        other = await _start(place, "thaw")
        await other.wait()
        for stream in (other.stdin, other.stdout, other.stderr):
            await stream.aclose()
