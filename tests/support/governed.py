# SPDX-License-Identifier: Apache-2.0
"""RAM disks that are filled to their limit: what is written, and what must be whole after it."""
from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.commands import state_of
from tests.support.whole import Device, can_claim, run, wait_until, zramfs

_libc = ctypes.CDLL(None, use_errno=True)
FSCK = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n"), "btrfs": ("btrfs", "check")}
# Of the kernel, about a device or its file system, when a write failed.
ALARMS = ("error", "Error", "fail", "lost", "orrupt", "readonly", "shutdown", "critical", "warning")


def sync_file_system(path: Path) -> None:
    """syncfs(2): of this file system alone. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if _libc.syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(fd)


@dataclass
class Full:
    """A RAM disk, and files on it that must not change."""

    point: Path
    fstype: str
    loop: str
    device: Device
    since: float  # time stamp of the kernel's log when it was made
    old: dict[Path, bytes] = field(default_factory=dict)

    def governor(self) -> dict[str, str]:
        rows = (line.split(None, 1) for line in self.device.read("memory/governor").splitlines())
        return {row[0]: row[1].strip() if len(row) > 1 else "" for row in rows}

    def state(self) -> str:
        return self.governor()["state"]

    def used(self) -> int:
        return self.device.mm_stat()["mem_used_total"]

    def available(self) -> int:
        seen = os.statvfs(self.point)
        return seen.f_bavail * seen.f_frsize

    def keep(self, count: int, size: int) -> None:
        """Writes files that must stay, and has them on the device."""
        (self.point / "old").mkdir(exist_ok=True)
        for number in range(count):
            path = self.point / f"old/{number}"
            data = os.urandom(size)
            path.write_bytes(data)
            self.old[path] = hashlib.sha256(data).digest()
        sync_file_system(self.point)

    def expect_whole(self) -> None:
        """Mounted for writing, nothing in the kernel's log, no write refused, the old files as they were."""
        sync_file_system(self.point)
        forget_pages()
        table = Path("/proc/self/mounts").read_text(errors="replace")
        line = next(each for each in table.splitlines() if f" {self.point} " in each)
        assert line.split()[3].split(",")[0] == "rw", line
        assert self.alarms() == []
        assert self.device.io_stat()["failed_writes"] == 0
        for path, digest in self.old.items():
            assert hashlib.sha256(path.read_bytes()).digest() == digest, path

    def alarms(self) -> list[str]:
        own = re.compile(rf"\b{Path(self.loop).name}\b")
        lines = [line for stamp, line in kernel_log() if stamp > self.since]
        return [line for line in lines if own.search(line) and any(alarm in line for alarm in ALARMS)]


def kernel_log() -> list[tuple[float, str]]:
    lines = run("dmesg").stdout.splitlines()
    return [(float(found[1]), line) for line in lines if (found := re.match(r"\[\s*([0-9.]+)\]", line))]


def forget_pages() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


@contextlib.contextmanager
def ram_disk(point: Path, fstype: str, size: int, limit: int, *options: str) -> Iterator[Full]:
    """Ends with umount, the file system's own check, and `zramfs stop`. What hangs on the way is freed by an
    abort of the connection after 50 s."""
    zramfs("ramdisk", point, "--size", size, "--mem-limit", limit, "--fs", fstype, *options)
    state = state_of(point)
    since = max((stamp for stamp, _ in kernel_log()), default=0.0)
    disk = Full(point, fstype, state.loop, Device(Path(state.directory)), since)
    minor = os.minor(os.stat(state.disk).st_dev)
    try:
        yield disk
        check(disk)
    finally:
        watchdog = threading.Timer(50, abort, [minor])
        watchdog.start()
        try:
            zramfs("stop", point, timeout=60)
        finally:
            watchdog.cancel()


def check(disk: Full) -> None:
    """The file system's own check, of what is on the device once it is unmounted."""
    end_file_system(disk.point, disk.fstype, disk.loop)
    done = run(*FSCK[disk.fstype], disk.loop, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def end_file_system(point: Path, fstype: str, loop: str) -> None:
    """Unmounts it, and waits for its end. A warden looks at the mount when it takes the file system (umount:
    EBUSY), and holds that for a moment after the unmount (fsck: EBUSY, or a log that is not yet written)."""
    wait_until(lambda: run("umount", point, check=False).returncode == 0, f"{point} is unmounted", 40)
    mount = Path(f"/proc/fs/{fstype}/{Path(loop).name}")
    wait_until(lambda: not mount.exists() and can_claim(loop), "the file system has ended", 40)


def abort(minor: int) -> None:
    with contextlib.suppress(OSError):
        Path(f"/sys/fs/fuse/connections/{minor}/abort").write_text("1")


def fill_one(path: Path, piece: int, block: bytes | None = None, most: int = 1 << 40) -> int:
    """Bytes that were written in pieces until ENOSPC; of random data unless block says what. A new file needs
    a block too: 0 if there was none for it."""
    written = 0
    try:
        with open(path, "ab", buffering=0) as file:
            while written < most:
                written += file.write(block or os.urandom(piece))
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    return written


def fill_many(directory: Path, size: int, most: int = 1 << 40) -> int:
    """The number of files that were written until ENOSPC."""
    directory.mkdir(exist_ok=True)
    for number in range(most):
        try:
            (directory / str(number)).write_bytes(os.urandom(size))
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            return number
    return most


def compressible(size: int, ratio: int = 4) -> bytes:
    """Of which a `ratio`th part is random, in each page."""
    part = 4096 // ratio
    return b"".join(os.urandom(part) + bytes(4096 - part) for _ in range(size // 4096))
