# SPDX-License-Identifier: Apache-2.0
"""A swap area on a loop device on `disk`, and the way back."""
from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zramfs.errors import ZramfsError
from zramfs.host import memcg, programs, swaps, system_calls
from zramfs.host.programs import run
from zramfs.text.sizes import format_size

if TYPE_CHECKING:
    import subprocess

    from zramfs.model.config import Algorithm

log = logging.getLogger(__name__)

# As systemd's zram-generator: above any swap on a disk, which gets -2 and less by itself.
DEFAULT_PRIORITY = 100
MAX_PRIORITY = 32767  # what swapon(8) takes
DISCARDS = ("both", "once", "pages", "none")
MEMINFO = Path("/proc/meminfo")
# mkswap refuses fewer than 10 pages.
MIN_SIZE = 40960
# From level 10 on liblz4 allocates 64 KiB for each page.
MAX_LZ4HC = 9
# What swapoff(8) ends with for ENOMEM, and how often it is tried then. Under load the kernel (mm/swapfile.c,
# unuse_pte_range, up to 6.18 at least) also says ENOMEM of a page that a program has just read for itself:
# 1 of 60 swapoffs below two busy programs, and never the next one.
_NO_MEMORY = 2
_OFF_TRIES = 5
# Times what is in swap: of memory that is available so often, other programs cannot take too much meanwhile.
_AMPLE = 4


@dataclass(frozen=True)
class Swap:
    """What to make of the device.

    priority  0 to MAX_PRIORITY: areas of a higher one are filled first
    discard   "once" (the whole area at swapon), "pages" (freed clusters of 2 MiB), "both", "none"
    min_free  bytes that vm.min_free_kbytes is raised to; None = what the machine needs
    force     go on without what safety.py calls needed
    """

    priority: int = DEFAULT_PRIORITY
    discard: str = "both"
    min_free: int | None = None
    force: bool = False


def trouble_with(algorithm: Algorithm) -> str | None:
    """Why swap must not be compressed with it; None if it may."""
    if algorithm.name != "lz4hc" or (algorithm.level or 0) <= MAX_LZ4HC:
        return None
    return (f"lz4hc above level {MAX_LZ4HC} takes memory for every page, which swap must not wait for: "
            f"choose level {MAX_LZ4HC} or zstd")


def expect_able() -> None:
    """Raises ZramfsError unless this process may set up loop devices and swap, and has the programs."""
    if os.geteuid() != 0:
        raise ZramfsError(errno.EPERM, "swap needs root, for its loop device and for swapon (try sudo)")
    programs.expect(
        {"losetup": "mount", "mkswap": "util-linux", "swapon": "mount", "swapoff": "mount"}, "swap")
    if not os.path.exists("/proc/swaps"):
        raise ZramfsError(errno.ENOSYS, "this kernel has no swap (there is no /proc/swaps)")


def make(device: str) -> None:
    """Raises ZramfsError with what mkswap said."""
    _expect(["mkswap", "--label", "zramfs", device])


def on(device: str, wanted: Swap) -> None:
    """Raises ZramfsError with what swapon said."""
    discard = {"none": [], "both": ["--discard"]}.get(wanted.discard, [f"--discard={wanted.discard}"])
    _expect(["swapon", "--priority", str(wanted.priority), *discard, device])


def off(device: str) -> None:
    """Brings every page back and ends the area; without effect when it is none. Takes as long as it takes.

    Raises ZramfsError; then the area goes on. When memory runs out on the way, the kernel ends swapoff
    before any other process. So it is a process of its own, and this one makes the call only where no process
    can be started, and memory takes what is in swap several times over.
    """
    if device not in swaps.swaps():
        return
    for _ in range(_OFF_TRIES):
        try:
            done = run(["swapoff", device])
        except OSError as error:
            if error.errno not in system_calls.NO_PROCESS:
                raise
            return _off_without_process(device, error)
        if done.returncode != _NO_MEMORY:
            break
        log.info("swapoff %s: no memory for a page", device)
    _expect_done(done)


def _off_without_process(device: str, reason: OSError) -> None:
    """Raises OSError, which is worth another try."""
    used = next((area.used for area in swaps.swap_areas() if area.path == device), 0)
    if used * _AMPLE > _mem_available():
        raise OSError(
            reason.errno, f"swapoff {device} could not be started: {reason.strerror}, and memory is too "
            "short to do without it")
    log.info("swapoff could not be started (%s); the daemon ends %s itself", reason.strerror, device)
    system_calls.end_swap(device)


def expect_room(device: str) -> None:
    """Raises ZramfsError(ENOMEM) if memory would not take what is in the swap area on `device`."""
    areas = swaps.swap_areas()
    area = next((each for each in areas if each.path == device), None)
    if area is None or area.used == 0:
        return
    elsewhere = sum(each.size - each.used for each in areas if each is not area)
    available = _mem_available()
    advice = "stop some programs, add other swap, or take --force, which may end programs for want of memory"
    if area.used > available + elsewhere:
        raise ZramfsError(
            errno.ENOMEM,
            f"{format_size(area.used)} are in swap on {device}, and only {format_size(available)} of memory "
            f"are available and {format_size(elsewhere)} of other swap free, so nothing was changed; "
            f"{advice}",
        )
    for group in memcg.short_groups(elsewhere):
        raise ZramfsError(
            errno.ENOMEM,
            f"the memory cgroup {group.path} has {format_size(group.swap)} in swap and room for only "
            f"{format_size(group.room)} below its limit, so nothing was changed; raise the limit, {advice}",
        )


def _mem_available() -> int:
    for line in MEMINFO.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _expect(command: list[str]) -> None:
    _expect_done(run(command))


def _expect_done(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise ZramfsError(errno.EIO, f"`{' '.join(done.args)}` failed: {said}")
