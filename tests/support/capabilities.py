# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, found out by trying, each once.

A capability is a word: one of PROBES, or the name of a command. `missing(word)` answers "" or the
sentence that goes into the reason of a skip. .ci/allowed-skips lists the sentences CI puts up with.
"""
from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

MEMCG_V1 = Path("/sys/fs/cgroup/memory")
MEMCG_V2 = Path("/sys/fs/cgroup")

_PACKAGE = {
    "fusermount3": "fuse3", "fio": "fio", "mkfs.ext4": "e2fsprogs", "e2fsck": "e2fsprogs",
    "mkfs.xfs": "xfsprogs", "xfs_repair": "xfsprogs", "mkfs.btrfs": "btrfs-progs",
    "btrfs": "btrfs-progs", "qemu-img": "qemu-utils", "qemu-io": "qemu-utils", "setfattr": "attr",
    "setfacl": "acl", "systemd-analyze": "systemd", "systemd-escape": "systemd", "systemctl": "systemd",
    "fuse2fs": "fuse2fs", "mandoc": "mandoc", "groff": "groff-base", "zsh": "zsh",
    "fish": "fish", "dh": "debhelper", "man": "man-db", "promtool": "prometheus",
    "prometheus-node-exporter": "prometheus-node-exporter",
}


def _command(name: str) -> str:
    if shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
        return ""
    package = f" (Debian package {_PACKAGE[name]})" if name in _PACKAGE else ""
    return f"the command {name} is not installed{package}"


def _first(*answers: str) -> str:
    return next((answer for answer in answers if answer), "")


def _root() -> str:
    return "" if os.geteuid() == 0 else "not root"


def _openable(path: str) -> str:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{path} cannot be opened: {error.strerror}"
    return ""


def _fuse() -> str:
    return _first(_openable("/dev/fuse"), _command("fusermount3"))


def _loop() -> str:
    if reason := _first(_root(), _command("losetup"), _openable("/dev/loop-control")):
        return reason
    free = subprocess.run(["losetup", "--find"], capture_output=True, text=True, timeout=60)
    return "" if free.returncode == 0 else f"no free loop device: {free.stderr.strip()}"


def _zram() -> str:
    if reason := _root():
        return reason
    if not Path("/sys/class/zram-control/hot_add").exists():
        return "the kernel has no zram (no /sys/class/zram-control/hot_add)"
    return ""


def _swap() -> str:
    commands = (_command(name) for name in ("mkswap", "swapon", "swapoff"))
    if reason := _first(_root(), *commands):
        return reason
    return "" if Path("/proc/swaps").exists() else "the kernel has no swap (no /proc/swaps)"


def memcg_parent() -> tuple[Path, str] | None:
    """(directory in which memory groups can be made, name of the file that holds the limit)."""
    for parent, limit in ((MEMCG_V1, "memory.limit_in_bytes"), (MEMCG_V2, "memory.max")):
        trial = parent / f"zramfs-probe-{os.getpid()}"
        try:
            trial.mkdir()
        except OSError:
            continue
        try:
            if (trial / limit).exists() and os.access(trial / limit, os.W_OK):
                return parent, limit
        finally:
            trial.rmdir()
    return None


def _memcg() -> str:
    return _root() or ("" if memcg_parent() else "no memory cgroup can be made under /sys/fs/cgroup")


def _sys_resource() -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16) >> 24 & 1:
            return ""
    return "the capability CAP_SYS_RESOURCE is not granted"


def _file_system(name: str, *commands: str) -> str:
    if reason := _first(_root(), *(_command(command) for command in commands)):
        return reason
    if f"\t{name}\n" not in Path("/proc/filesystems").read_text():
        subprocess.run(["modprobe", name], capture_output=True, timeout=60, check=False)
    known = f"\t{name}\n" in Path("/proc/filesystems").read_text()
    return "" if known else f"the kernel has no file system {name}"


def _overlay() -> str:
    if reason := _root():
        return reason
    known = "\toverlay\n" in Path("/proc/filesystems").read_text()
    return "" if known else "the kernel has no file system overlay (modprobe overlay)"


def _direct_io() -> str:
    """Of the directory for temporary files: tmpfs of older kernels has none."""
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
        except OSError as error:
            return f"{tempfile.gettempdir()} has no direct I/O: {error.strerror}"
    return ""


def _unsanitized() -> str:
    """.ci/check-skips counts on such a test to run in the other of scripts/test's runs."""
    maps = Path("/proc/self/maps").read_text()
    if "libasan" in maps or "libtsan" in maps:
        return "a sanitizer has the heap, mlock(2) and most of the address space to itself"
    return ""


def _systemd_container() -> str:
    if reason := _first(_root(), *(_command(name) for name in ("unshare", "nsenter", "systemctl"))):
        return reason
    trial = subprocess.run(
        ["unshare", "--pid", "--mount", "--uts", "--ipc", "--cgroup", "--fork",
         "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()], capture_output=True, text=True, timeout=60,
    )
    return "" if trial.returncode == 0 else f"no namespaces for a systemd of its own: {trial.stderr.strip()}"


PROBES = {
    "root": _root,
    "fuse": _fuse,
    "loop": _loop,
    "zram": _zram,
    "swap": _swap,
    "memcg": _memcg,
    "sys_resource": _sys_resource,
    "overlay": _overlay,
    "direct_io": _direct_io,
    "unsanitized": _unsanitized,
    "systemd_container": _systemd_container,
    "ext4": lambda: _file_system("ext4", "mkfs.ext4", "e2fsck"),
    "xfs": lambda: _file_system("xfs", "mkfs.xfs", "xfs_repair"),
    "btrfs": lambda: _file_system("btrfs", "mkfs.btrfs", "btrfs"),
}


@functools.cache
def missing(word: str) -> str:
    """"" if the machine has it, else a sentence that says what is lacking."""
    return PROBES[word]() if word in PROBES else _command(word)


def require(*words: str) -> None:
    """Skips the running test unless the machine has all of these."""
    for word in words:
        if reason := missing(word):
            pytest.skip(reason)
