# SPDX-License-Identifier: Apache-2.0
"""A whole device through its command line, and the machine's tools on it.

Everything is a context manager that takes down what it made, also when the test fails in between.
"""
from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import child, zygote
from zramfs.host import loops
from zramfs.lifecycle import rundir

PAGE = 4096
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# Not the script of an installation: whatever `zramfs` this interpreter imports is what is tested.
ZRAMFS = (sys.executable, "-m", "zramfs.cli")

MM_STAT = (
    "orig_data_size", "compr_data_size", "mem_used_total", "mem_limit", "mem_used_max", "same_pages",
    "pages_compacted", "huge_pages", "huge_pages_since",
)


def tool_environment() -> dict[str, str]:
    """For programs that are not ours: without the sanitizers that scripts/test loads into ours."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


# A command of ours says so after three seconds: on a busy machine of any end.
_WAITS = re.compile(r"^zramfs: waiting up to .*\n", re.MULTILINE)


def run(
    *words: object, timeout: float = 60, check: bool = True, **more: object
) -> subprocess.CompletedProcess[str]:
    """Runs a command; a failure fails the test with everything the command said. stderr is without what ours
    says when it has to wait for a busy machine."""
    command = [str(word) for word in words]
    more.setdefault("env", tool_environment())
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=timeout,
        stdin=subprocess.DEVNULL, **more,
    )
    if check and done.returncode:
        pytest.fail(f"`{shlex.join(command)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    done.stderr = _WAITS.sub("", done.stderr)
    return done


def zramfs(*words: object, timeout: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command of ours, with input from /dev/null: a fork of the zygote where conftest.py lets it be one."""
    forking = zygote.zygote()
    if forking is None:
        return run(*ZRAMFS, *words, timeout=timeout, check=check, env=dict(os.environ))
    done = forking.run([str(word) for word in words], timeout)
    if check and done.returncode:
        pytest.fail(f"`{shlex.join(done.args)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    done.stderr = _WAITS.sub("", done.stderr)
    return done


@dataclass(frozen=True)
class Device:
    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "disk"

    def read(self, attribute: str) -> str:
        return (self.directory / attribute).read_text()

    def write(self, attribute: str, text: str) -> None:
        """As `echo TEXT > attribute` does: one write with a newline, errors from the write itself."""
        fd = os.open(self.directory / attribute, os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(fd, f"{text}\n".encode())
        finally:
            os.close(fd)

    def mm_stat(self) -> dict[str, int]:
        return dict(zip(MM_STAT, map(int, self.read("zram/mm_stat").split()), strict=True))

    def io_stat(self) -> dict[str, int]:
        names = ("failed_reads", "failed_writes", "invalid_io", "notify_free")
        return dict(zip(names, map(int, self.read("zram/io_stat").split()), strict=True))


@contextlib.contextmanager
def device(directory: Path, size: int | None, *options: object) -> Iterator[Device]:
    """A device in `directory`, made by `zramfs create` and ended by `zramfs stop`; without a size it
    is not set up."""
    zramfs("create", directory, *(() if size is None else ("--size", size)), *options)
    try:
        yield Device(directory)
    finally:
        stop(directory)


def stop(directory: Path) -> None:
    """`zramfs stop`. When it takes too long, the test fails with the stacks of the daemon."""
    try:
        zramfs("stop", directory)
    except subprocess.TimeoutExpired as error:
        found = rundir.find(str(directory))
        state = found.read() if found else None
        if state is None:
            raise
        pytest.fail(f"{error}; the daemon's stacks:\n{child.stacks(state.pid, found.log)}")


@contextlib.contextmanager
def loop(file: Path, *options: str) -> Iterator[str]:
    """A loop device on `file`: /dev/loopN."""
    name = run("losetup", "--find", "--show", "--direct-io=on", *options, file).stdout.strip()
    try:
        yield name
    finally:
        below, attached = Path(os.path.realpath(file)), loops.sequence(name)
        run("losetup", "--detach", name)
        # It lets go at its last close, and then somebody else may take it at once.
        wait_until(lambda: not loops.stands_on(name, below, attached), f"{name} detached")


@contextlib.contextmanager
def mounted(source: str, point: Path, *options: str) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    run("mount", *options, source, point)
    try:
        yield point
    finally:
        unmount(point)
        if source.startswith("/dev/"):
            # A mount namespace that somebody made meanwhile holds the file system until it ends.
            wait_until(lambda: can_claim(source), f"the file system of {source} has ended", 40)


def unmount(point: Path) -> None:
    """Of a file system that the test itself has let go of; who only looks at every mount (a warden, a df) is
    gone in a moment."""
    wait_until(lambda: run("umount", point, check=False).returncode == 0, f"{point} is unmounted", 40)


def can_claim(device: str) -> bool:
    """Whether nothing is mounted from a block device."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def opened(path: Path | str, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


_libc = ctypes.CDLL(None, use_errno=True)
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(2), which os has only without modes."""
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        error = ctypes.get_errno()
        raise OSError(error, f"{os.strerror(error)}: punch a hole of {length} bytes at {offset}")


def wait_until(condition, what: str, seconds: float = 10) -> None:
    """Polls until `condition` is true, fails the test when it is not in time. `seconds` are for an idle
    machine. One on which twenty programs want the processors, and which stands still for ten seconds now and
    then, has a minute at least."""
    end = time.monotonic() + max(seconds, 60)
    while not condition():
        # The last look comes after the end: whoever was late may be this process.
        if time.monotonic() > end and not condition():
            pytest.fail(f"not within {max(seconds, 60):g} s: {what}")
        time.sleep(0.005)


def drop_caches(point: Path) -> None:
    """Of the whole machine, once the file system on `point` has written what it had to."""
    with opened(point, os.O_RDONLY) as fd:
        if _libc.syncfs(fd):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


# ---- real files ------------------------------------------------------------------------------------
_SOURCES = (
    "/usr/include", "/usr/share/doc", "/usr/share/perl", "/usr/lib/x86_64-linux-gnu", "/usr/bin",
    "/usr/share",
)


def copy_real_files(target: Path, limit: int) -> dict[str, str]:
    """Copies files, directories and symbolic links of this machine into `target` until `limit` bytes
    are reached, and answers their manifest(), taken from the originals."""
    expected: dict[str, str] = {}
    total = 0
    for source in map(Path, _SOURCES):
        for here, directories, files in os.walk(source):
            directories.sort()
            base = target / Path(here).relative_to("/")
            base.mkdir(parents=True, exist_ok=True)
            for name in sorted(files):
                original = Path(here) / name
                found = original.lstat()
                if not (stat.S_ISLNK(found.st_mode) or stat.S_ISREG(found.st_mode)):
                    continue
                total += found.st_size
                if total > limit:
                    return expected
                shutil.copy2(original, base / name, follow_symlinks=False)
                expected[str((base / name).relative_to(target))] = _fingerprint(original)
    if total < limit // 2:
        pytest.fail(f"only {total} bytes of real files found below {', '.join(_SOURCES)}; wanted {limit}")
    return expected


def manifest(root: Path) -> dict[str, str]:
    """Relative path -> fingerprint, of every regular file and symbolic link below `root`."""
    return {
        str(path.relative_to(root)): _fingerprint(path)
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def _fingerprint(path: Path) -> str:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def fill_with_zeros(path: Path, block: int = KIB) -> int:
    """Appends blocks of zeros until there is no space left; answers their number."""
    zeros = bytes(block)
    blocks = 0
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:
        while True:
            try:
                if os.write(fd, zeros) != block:
                    return blocks
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return blocks
            blocks += 1
