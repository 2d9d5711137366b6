# SPDX-License-Identifier: Apache-2.0
"""Devices that are made in a memory cgroup with a limit: they leave it, or stop growing before it.

A RAM disk in such a group can hang the machine, so a process outside of the group cuts its FUSE connections
after a while. Groups of version 1 only: that is what a machine with both has here, and those of version 2 are
files in tests/host/memcg_test.py and tests/allocator/headroom_test.py.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import capabilities, leftovers
from tests.support.apart import apart
from tests.support.commands import rows, state_of
from tests.support.users import NOBODY, fuse_for_everybody, zramfs_as_nobody
from tests.support.whole import MIB, ZRAMFS, Device, device, opened, run, stop, wait_until
from zramfs.lifecycle import rundir

pytestmark = [
    pytest.mark.requires("root", "fuse", "memcg", "unshare"), pytest.mark.timeout(240),
    pytest.mark.skipif(not (capabilities.MEMCG_V1 / "memory.limit_in_bytes").exists(),
                       reason="there is no memory cgroup of version 1 (/sys/fs/cgroup/memory)"),
]

LIMIT = 100 * MIB
# Seconds. What is to be done takes 2 to 10 on an idle machine.
CUT_AFTER = 90
_WATCHDOG = """
import os, subprocess, sys, time
owner, where, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
subprocess.run(["mount", "-t", "fusectl", "zramfs_test", "/sys/fs/fuse/connections"], check=True)
print("there", flush=True)
time.sleep(seconds)
for line in open(f"/proc/{owner}/mountinfo"):
    words = line.split()
    if words[4].startswith(where) and "fuse.zramfs" in line:
        with open(f"/sys/fs/fuse/connections/{words[2].split(':')[1]}/abort", "w") as file:
            file.write("1")
"""


class Group:
    """One with a limit that no swap on this machine makes larger."""

    def __init__(self, limit: int | None) -> None:
        self.path = capabilities.MEMCG_V1 / leftovers.owner_name()
        self.path.mkdir()
        if limit is not None:
            self.limit(limit)

    def limit(self, nbytes: int) -> None:
        """The limit with swap is never below the one without, so one of them goes first."""
        names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
        if nbytes > int((self.path / names[0]).read_text()):
            names.reverse()
        for name in names:
            if (self.path / name).exists():
                (self.path / name).write_text(str(nbytes))

    def words(self, *words: object) -> list[str]:
        """A command in the group, which is entered before it begins."""
        return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(self.path), *map(str, words)]

    @property
    def kills(self) -> int:
        lines = (self.path / "memory.oom_control").read_text().splitlines()
        return int(dict(map(str.split, lines))["oom_kill"])

    @property
    def pids(self) -> list[int]:
        return [int(word) for word in (self.path / "cgroup.procs").read_text().split()]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group(LIMIT)
    try:
        yield made
    finally:
        _remove(made)


def _remove(group: Group) -> None:
    def gone() -> bool:
        with contextlib.suppress(OSError):
            group.path.rmdir()
        return not group.path.exists()
    wait_until(gone, f"{group.path} is empty", 30)


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    words = apart(sys.executable, "-c", _WATCHDOG, os.getpid(), tempfile.gettempdir(), CUT_AFTER)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "there\n"
            yield
            assert process.poll() is None, "the connections were cut, because something took too long"
        finally:
            process.kill()


def write_random(words: list[str]) -> subprocess.CompletedProcess[str]:
    return run(*words, check=False, timeout=CUT_AFTER + 20)


@pytest.mark.requires("loop", "mkfs.ext4")
def test_a_ram_disk_leaves_a_group_with_a_limit(base: Path, group: Group) -> None:
    """The writer, and so the dirty pages, are in the group; the server must not be."""
    place = base / "m"
    made = run(*group.words(*ZRAMFS, "ramdisk", place, "--size", "1G"), env=dict(os.environ))
    try:
        pid = state_of(place).pid
        assert f"{group.path} has a limit of 100M, so the server has left it" in made.stderr
        assert pid not in group.pids
        done = write_random(group.words("dd", "if=/dev/urandom", f"of={place}/f", "bs=1M", "count=200",
                                        "conv=fsync"))
        assert done.returncode == 0, done.stderr
        assert group.kills == 0 and state_of(place).alive()
        if not capabilities.missing("sys_resource"):
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "-1000\n"
        assert _locked(pid) > 0
    finally:
        stop(place)


def test_a_plain_device_leaves_a_group_with_a_limit(base: Path, group: Group) -> None:
    place = base / "d"
    made = run(*group.words(*ZRAMFS, "create", place, "--size", "1G"), env=dict(os.environ))
    try:
        assert "the server has left it" in made.stderr
        done = write_random(["dd", "if=/dev/urandom", f"of={place}/disk", "bs=1M", "count=200",
                             "conv=notrunc"])
        assert done.returncode == 0, done.stderr
        assert group.kills == 0
        assert Device(place).mm_stat()["mem_used_total"] > 2 * LIMIT - 10 * MIB
    finally:
        stop(place)


# ---- the host ------------------------------------------------------------------------------------------

def test_a_device_does_not_grow_while_the_host_has_less_than_is_to_be_kept_free(base: Path) -> None:
    """More than the machine has is kept free, so nothing has to be short."""
    with device(base / "d", 64 * MIB, "--keep-free", "100%") as made:
        data = os.urandom(4096)
        with opened(made.disk) as fd:
            with pytest.raises(OSError, match="No space") as caught:
                os.pwrite(fd, data, 0)
            assert caught.value.errno == errno.ENOSPC
            os.pwrite(fd, bytes(4096), 4096)
            assert made.mm_stat()["mem_limit"] == 0
            [row] = rows(made.directory, "-b", "-o", "MEM-ROOM")
            assert row == {"mem-room": 0}
            said = "no memory for new data: less than"
            wait_until(lambda: said in state_log(made.directory), "it is in the log")
            made.write("control", "keep_free=0")
            os.pwrite(fd, data, 0)
            assert os.pread(fd, 4096, 0) == data


def test_the_memory_of_a_device_is_locked_where_that_is_asked_for(base: Path) -> None:
    for words, is_locked in (((), False), (("--lock",), True)):
        with device(base / "d", 64 * MIB, *words) as made:
            with opened(made.disk) as fd:
                os.pwrite(fd, os.urandom(8 * MIB), 0)
            assert (_locked_data(state_of(made.directory).pid) >= 8 * MIB) == is_locked


def _locked_data(pid: int) -> int:
    """Bytes of the memory file that are locked."""
    total, is_data = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            is_data = words[1][3] == "s"
        elif words[0] == "Locked:" and is_data:
            total += int(words[1]) << 10
    return total


# ---- where the group can't be left -----------------------------------------------------------------------

class Inside:
    """A device in the group, and what runs where it can be seen. said: what its start said."""

    def __init__(self, place: Path, group: Group, zramfs: list[str], more: dict[str, str]) -> None:
        self.place = place
        self._group = group
        self.zramfs = zramfs
        self._environment = {**os.environ, **more}
        self.said = ""
        self._is_made = False

    def call(self, *words: object) -> str:
        return run(*self._group.words(*self.zramfs, *words), env=self._environment, cwd="/").stdout

    def make(self, *words: object) -> None:
        self.said = run(*self._group.words(*self.zramfs, *words), env=self._environment, cwd="/").stderr
        self._is_made = True

    def end(self) -> None:
        if self._is_made:
            self.call("stop", self.place)

    def python(self, code: str, *words: object) -> str:
        """Outside of the group, so that what the device takes is all that is in it."""
        return run(*self.zramfs[:-2], "-c", code, *words, env=self._environment, cwd="/",
                   timeout=CUT_AFTER + 20).stdout

    def fill(self, file: Path, most: int, first: int = 0) -> int:
        """Writes random MiB until one is refused for want of space: how many there were."""
        count, error = self.python(_FILL, file, first, most).split()
        assert error in ("0", str(errno.ENOSPC)), error
        return int(count)


_FILL = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
first, most = int(sys.argv[2]), int(sys.argv[3])
data = b""
for n in range(most):
    try:
        data = os.urandom(1 << 20)
        done = os.pwrite(fd, data, first + n << 20)
        if done < len(data):
            os.pwrite(fd, data[done:], (first + n << 20) + done)
        os.fsync(fd)
    except OSError as error:
        print(n, error.errno)
        break
else:
    print(most, 0)
"""


@contextlib.contextmanager
def of_a_user(group: Group) -> Iterator[Inside]:
    """An ordinary user, who may neither leave the group nor have any of the other settings."""
    top = Path(tempfile.mkdtemp(prefix="user-"))
    top.chmod(0o755)
    for name in ("d", "run"):
        (top / name).mkdir(mode=0o700)
        os.chown(top / name, NOBODY, NOBODY)
    for parent in top.parents:
        if leftovers.owner_of(str(parent)):
            parent.chmod(0o755)
    with fuse_for_everybody(top) as prefix:
        inside = Inside(top / "d", group, zramfs_as_nobody(prefix), {"ZRAMFS_RUN_DIR": str(top / "run")})
        try:
            yield inside
        finally:
            inside.end()
    shutil.rmtree(top)


@contextlib.contextmanager
def of_root_in_a_container(base: Path, group: Group) -> Iterator[Inside]:
    """Root, for whom the cgroups are mounted read-only."""
    code = f"mount -o remount,bind,ro {capabilities.MEMCG_V1} && echo there && exec cat"
    with subprocess.Popen(apart("sh", "-c", code), stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "there\n"
            prefix = ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt"]
            inside = Inside(base / "m", group, [*prefix, *ZRAMFS], {})
            try:
                yield inside
            finally:
                inside.end()
        finally:
            holder.kill()


@pytest.mark.requires("setpriv", "nsenter")
def test_a_device_of_a_user_stops_growing_before_the_limit_of_its_group(group: Group) -> None:
    """Nobody is killed, also not by commands in the same group."""
    with of_a_user(group) as inside:
        inside.make("create", inside.place, "--size", "1G")
        assert f"the memory cgroup {group.path} has a limit of 100M" in inside.said
        assert "the device stops growing before the limit" in inside.said
        disk = inside.place / "disk"
        written = inside.fill(disk, 200)
        assert 10 < written < 68, "a margin of 32 MiB stays"
        assert group.kills == 0
        control = inside.call("control", inside.place)
        assert "bounded by a memory cgroup" in control and "times there was none" in control
        [row] = json.loads(inside.call("status", "-b", "--json", "-o", "MEM-ROOM,MEM-LIMIT"))["zramfs"]
        assert row["mem-room"] < 2 * MIB and row["mem-limit"] == 0
        punched = inside.python(
            "import ctypes, os, sys\n"
            "fd = os.open(sys.argv[1], os.O_RDWR)\n"
            "print(ctypes.CDLL(None).fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(8 << 20)))", disk)
        assert punched == "0\n"
        assert inside.fill(disk, 6) == 6, "what was discarded can be written again"
        assert group.kills == 0


@pytest.mark.requires("setpriv", "nsenter")
def test_a_limit_that_comes_later_stops_a_device_in_time(group: Group) -> None:
    group.limit(4096 * MIB)
    with of_a_user(group) as inside:
        inside.make("create", inside.place, "--size", "1G")
        disk = inside.place / "disk"
        assert inside.fill(disk, 20) == 20
        group.limit(LIMIT)
        assert inside.fill(disk, 200, 20) < 64
        assert group.kills == 0


def test_a_server_that_may_leaves_a_group_that_gets_a_limit_later(base: Path, group: Group) -> None:
    group.limit(1 << 62)
    place = base / "d"
    run(*group.words(*ZRAMFS, "create", place, "--size", "1G"), env=dict(os.environ))
    try:
        pid = state_of(place).pid
        assert pid in group.pids
        group.limit(LIMIT)
        wait_until(lambda: pid not in group.pids, "the server has left", 20)
        assert "the server has left it" in state_log(place)
    finally:
        stop(place)


def state_log(place: Path) -> str:
    found = rundir.find(str(place))
    assert found is not None
    return found.log.read_text()


@pytest.mark.requires("loop", "mkfs.ext4", "nsenter")
def test_a_ram_disk_that_can_not_leave_its_group_stops_growing_before_the_limit(
    base: Path, group: Group
) -> None:
    """Its file system is full in time, so the pool refuses nothing, and the server is not killed."""
    with of_root_in_a_container(base, group) as inside:
        inside.make("ramdisk", inside.place, "--size", "1G")
        assert "can't be written" in inside.said
        pid = state_of(inside.place).pid
        assert pid in group.pids
        code = (
            "import os, sys\n"
            "fd = os.open(sys.argv[1] + '/f', os.O_RDWR | os.O_CREAT)\n"
            "try:\n"
            "    for n in range(200):\n"
            "        os.write(fd, os.urandom(1 << 20))\n"
            "    os.fsync(fd)\n"
            "except OSError as error:\n"
            "    print(error.errno)\n")
        assert inside.python(code, inside.place) == f"{errno.ENOSPC}\n"
        assert group.kills == 0 and state_of(inside.place).alive()
        assert "no memory for new data" not in state_log(inside.place)


def _locked(pid: int) -> int:
    """Bytes of a process that are locked."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) << 10
    return 0
