# SPDX-License-Identifier: Apache-2.0
"""A daemon that runs out of memory, descriptors or processes: it goes on, it says so, and it can be ended."""
from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import is_attached
from tests.support.served import ServedDevice, served_device
from tests.support.whole import ZRAMFS, run, wait_until, zramfs
from zramfs.host import swaps
from zramfs.lifecycle import rundir

pytestmark = [pytest.mark.requires("fuse", "unsanitized"), pytest.mark.timeout(240)]

MIB = 1 << 20
DATA = b"data" * (64 * 1024)
# Opens and reads what is made by Python, in small pieces, so that the daemon has much to remember.
CLIENT = """
import os, select, sys
while not select.select([0], [], [], 0)[0]:
    try:
        for name in ("control", "zram/mm_stat", "memory/pageblocks"):
            fds = [os.open(f"{sys.argv[1]}/{name}", os.O_RDONLY) for _ in range(30)]
            for fd in fds:
                os.read(fd, 100)
            for fd in fds:
                os.close(fd)
        with open(f"{sys.argv[1]}/control", "w") as control:
            control.write("mem_limit=1G")
        with open(f"{sys.argv[1]}/zram/compact", "w") as compact:
            compact.write("1")  # in a thread, so that requests overlap
        os.listdir(f"{sys.argv[1]}/zram")
    except OSError:
        pass
"""


@contextlib.contextmanager
def clients(directory: Path) -> Iterator[list[subprocess.Popen]]:
    """They go on until their stdin ends."""
    command = [sys.executable, "-S", "-c", CLIENT, directory]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(8)]
    try:
        yield running
    finally:
        for each in running:
            each.stdin.close()
            each.kill()
        for each in running:
            each.wait(60)


def address_space(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmSize:")[2].split()[0]) * 1024


def limit_address_space(pid: int, room: int | None) -> None:
    most = resource.RLIM_INFINITY if room is None else address_space(pid) + room
    resource.prlimit(pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def test_the_tree_answers_again_when_there_is_memory_again(tmp_path: Path) -> None:
    with served_device(tmp_path / "dev", size=64 * MIB) as child:
        child.disk.write_bytes(DATA)
        limit_address_space(child.pid, 0)
        with clients(child.directory) as running:
            wait_until(lambda: "failed to allocate" in child.log, "the daemon is short of memory", 20)
            limit_address_space(child.pid, None)
            for each in running:
                each.stdin.close()
            wait_until(lambda: all(each.poll() is not None for each in running), "each is answered", 40)
        assert child.read("zram/initstate") == "1\n"
        with open(child.disk, "rb") as disk:
            assert disk.read(len(DATA)) == DATA
        assert child.stop() == 0, child.log
        assert child.mounts() == []


def test_a_daemon_without_memory_ends_on_a_signal(tmp_path: Path) -> None:
    with served_device(tmp_path / "dev", size=64 * MIB) as child:
        limit_address_space(child.pid, 0)
        with clients(child.directory):
            wait_until(lambda: "failed to allocate" in child.log, "the daemon is short of memory", 20)
            child.process.terminate()
            child.wait(60)
        assert child.mounts() == [] and "ending: SIGTERM" in child.log


# As soon as the file is there. Without a tree nobody finds the disk by its link in there.
BREAK_LOOP = """
import os, threading, time, trio
token = trio.from_thread.run_sync(trio.lowlevel.current_trio_token)
def broken():
    raise MemoryError
def wait():
    while not os.path.exists({file!r}):
        time.sleep(0.01)
    token.run_sync_soon(broken)
threading.Thread(target=wait, daemon=True).start()
"""


def test_a_loop_that_breaks_is_started_again_with_the_data(tmp_path: Path) -> None:
    """trio ends its loop with TrioInternalError where it finds no memory for itself."""
    ready = BREAK_LOOP.format(file=str(tmp_path / "break"))
    with served_device(tmp_path / "dev", size=64 * MIB, ready=ready) as child:
        child.disk.write_bytes(DATA)
        (tmp_path / "break").touch()
        wait_until(lambda: "the tree is mounted again" in child.log, "the tree is there again", 20)
        assert "the daemon's loop broke (TrioInternalError) and is started again" in child.log
        with open(child.disk, "rb") as disk:
            assert disk.read(len(DATA)) == DATA
        child.write("control", "mem_limit=32M")
        child.write("zram/compact", "1")
        assert child.read("zram/mm_stat").split()[3] == str(32 * MIB)
        child.process.send_signal(signal.SIGTERM)
        assert child.wait() == 0, child.log
        assert child.mounts() == []


LOSE_REQUEST = """
from zramfs.tree.tree import Tree
sound = Tree.getattr
async def broken(self, inode, ctx):
    Tree.getattr = sound
    raise MemoryError
Tree.getattr = broken
"""


def test_whoever_waits_for_a_lost_request_is_answered(tmp_path: Path) -> None:
    """A request that pyfuse3 has read and dropped: its caller would not even die of SIGKILL."""
    with served_device(tmp_path / "dev", size=MIB, ready=LOSE_REQUEST) as child:
        code = "import os, sys; os.stat(sys.argv[1])"
        done = run(sys.executable, "-S", "-c", code, child.directory / "control", check=False, timeout=60)
        assert done.returncode == 1 and "ConnectionAbortedError" in done.stderr
        wait_until(lambda: "the tree is mounted again" in child.log, "the tree is there again", 20)
        assert child.read("zram/initstate") == "1\n"
        assert child.stop() == 0, child.log


def descriptors(pid: int) -> set[int]:
    return {int(name) for name in os.listdir(f"/proc/{pid}/fd")}


def test_a_compactor_without_a_descriptor_is_started_again(tmp_path: Path) -> None:
    """It needs one of its own for each store, and there is none."""
    with served_device(tmp_path / "dev", ready=WITHOUT_COMPACTOR_DESCRIPTOR) as child:
        child.write("control", "disksize=64M")
        wait_until(lambda: failures(child, "compactor") > 1, "the compactor has failed twice", 20)
        child.disk.write_bytes(DATA)
        assert child.log.count("the task compactor failed") == 1
        [row] = [line for line in child.read("control").splitlines() if line.startswith("tasks ")]
        assert "compactor failed" in row and "[Errno 24] Too many open files" in row
        child.write("control", "access_times=on")  # gives the descriptors back, see above
        failed = failures(child, "compactor")
        child.write("control", "balloon=4M")
        wait_until(lambda: f"size {4 * MIB}\n" in child.read("memory/balloon"), "the compactor works", 20)
        assert failures(child, "compactor") <= failed + 1
        assert child.stop() == 0, child.log


# Every descriptor that the compactor's duplicate could have is taken, from the moment when the store is made
# until access times are switched on.
WITHOUT_COMPACTOR_DESCRIPTOR = """
import errno, os
from zramfs.device.device import Device
real, refused = os.dup, [True]
def dup(fd):
    if refused:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return real(fd)
os.dup = dup
async def switch(self, on, before=Device.set_access_times):
    refused.clear()
    await before(self, on)
Device.set_access_times = switch
"""


def failures(child: ServedDevice, task: str) -> float:
    [line] = [line for line in child.read("metrics").splitlines()
              if line.startswith("zramfs_task_failures_total{") and f'task="{task}"' in line]
    return float(line.split()[-1])


@pytest.fixture
def no_more_processes() -> Iterator[Path]:
    """A pids cgroup; whoever is moved there can start nothing once it is full."""
    parent = Path("/sys/fs/cgroup/pids")
    if not (parent / "cgroup.procs").exists():
        parent = Path("/sys/fs/cgroup")
    group = parent / f"zramfs-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no pids cgroup can be made: {error}")
    try:
        if not (group / "pids.max").exists():
            pytest.skip("the cgroups here do not limit processes")
        yield group
    finally:
        (group / "pids.max").write_text("max")
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (parent / "cgroup.procs").write_text(pid)

        def gone() -> bool:
            with contextlib.suppress(OSError):
                group.rmdir()
            return not group.exists()

        wait_until(gone, "the group is empty")


@pytest.mark.requires("root", "loop", "swap")
@pytest.mark.parametrize("how", ["signal", "tree unmounted"])
def test_swap_is_taken_down_by_a_daemon_that_can_start_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_more_processes: Path, how: str
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    zramfs("swap", "noproc", "--size", "64M", "--priority", "0")
    state = rundir.find("noproc").read()
    try:
        (no_more_processes / "cgroup.procs").write_text(str(state.pid))
        (no_more_processes / "pids.max").write_text("1")
        if how == "signal":
            os.kill(state.pid, signal.SIGTERM)
        else:
            run("umount", state.directory)
        wait_until(lambda: not state.alive(), "the daemon has ended", 40)
        assert not [area for area in swaps.swap_areas() if area.path == state.loop]
        assert not is_attached(state)
        assert not (tmp_path / "run/noproc").exists()
    finally:
        if rundir.find("noproc"):
            (no_more_processes / "pids.max").write_text("max")
            run(*ZRAMFS, "stop", "noproc", check=False)
