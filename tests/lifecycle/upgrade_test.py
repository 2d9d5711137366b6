# SPDX-License-Identifier: Apache-2.0
"""zramfs upgrade: another version under a device that is in use, or none at all."""
from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.child import kill_wholly, stopped
from tests.support.commands import failure, nothing_left
from tests.support.commands import kill_daemon as kill_device
from tests.support.governed import end_file_system
from tests.support.killer import found, kill_daemon, state
from tests.support.versions import Version, finish
from tests.support.whole import (
    MIB,
    PAGE,
    ZRAMFS,
    copy_real_files,
    device,
    drop_caches,
    manifest,
    opened,
    run,
    stop,
    wait_until,
    zramfs,
)
from zramfs import __version__
from zramfs.daemon.layouts import LAYOUTS
from zramfs.host.process import process_start
from zramfs.keeper.client import PROGRAM
from zramfs.lifecycle.rundir import State

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(300)]

# In the process that is to take over: it waits until the file is there.
GATE = """
def succeed() -> NoReturn:
    import time
    while not Path({gate!r}).exists():
        time.sleep(0.01)
    _succeed()


def _succeed() -> NoReturn:"""


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def other(tmp_path: Path) -> Version:
    return Version.copy(tmp_path / "other")


class Load:
    """Reads and writes of one page after another, each compared with what was written; until end()."""

    def __init__(self, disk: Path, size: int) -> None:
        self._fd = os.open(os.path.realpath(disk), os.O_RDWR)
        self._model = bytearray(size)
        self._over = threading.Event()
        self.count = 0
        self.failure = ""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        rng = random.Random(17)
        try:
            while not self._over.is_set():
                at = rng.randrange(len(self._model) // PAGE) * PAGE
                if rng.random() < 0.5:
                    data = rng.randbytes(PAGE // 2) + bytes(PAGE // 2)
                    assert os.pwrite(self._fd, data, at) == PAGE
                    self._model[at:at + PAGE] = data
                else:
                    assert os.pread(self._fd, PAGE, at) == self._model[at:at + PAGE], f"bytes at {at}"
                self.count += 1
        except (OSError, AssertionError) as error:
            self.failure = repr(error)

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        try:
            assert not self.failure
            assert os.pread(self._fd, len(self._model), 0) == self._model
        finally:
            os.close(self._fd)


@contextlib.contextmanager
def load(disk: Path, size: int) -> Iterator[Load]:
    running = Load(disk, size)
    try:
        yield running
    finally:
        running.end()


def keeper_of(now: State) -> str:
    """The program that it runs."""
    return os.readlink(f"/proc/{now.keeper_pid}/exe")


def processes(now: State) -> tuple[int, int, int]:
    return now.pid, now.keeper_pid, now.standby_pid


def log_of(directory: Path) -> str:
    return found(directory).log.read_text()


def expect_upgraded(directory: Path, before: State, version: Version) -> State:
    """The keeper is the same process with another program, and the daemon is another process."""
    now = state(directory)
    assert (before.release, now.release) == (__version__, version.release)
    assert now.pid not in (before.pid, before.keeper_pid) and now.keeper_pid == before.keeper_pid
    assert keeper_of(now) == str(version.keeper)
    maps = Path(f"/proc/{now.pid}/cmdline").read_text()
    assert str(version.place) in maps, "it runs the files of the other version"
    return now


def expect_as_before(directory: Path, before: State) -> None:
    now = state(directory)
    assert (now.pid, now.keeper_pid, now.release) == (before.pid, before.keeper_pid, __version__)
    assert keeper_of(now) == str(PROGRAM)


@pytest.mark.parametrize("options", [(), ("--standby",)], ids=["alone", "standby"])
def test_who_reads_and_writes_notices_a_pause_and_nothing_else(
    tmp_path: Path, base: Path, other: Version, options: tuple[str, ...]
) -> None:
    directory = tmp_path / "z"
    with device(directory, 32 * MIB, "--algo", "zstd:3", *options) as z:
        z.write("control", "mem_limit=24M")
        before = state(directory)
        with load(z.disk, 8 * MIB) as running:
            wait_until(lambda: running.count > 100, "some requests")
            done = other.run("upgrade", directory)
            count = running.count
            wait_until(lambda: running.count > count + 100 or running.failure, "requests after it")
        assert (done.returncode, done.stderr) == (0, "")
        now = expect_upgraded(directory, before, other)
        said = f"{directory}: {__version__} (pid {before.pid}) -> {other.release} (pid {now.pid}), paused for"
        assert re.fullmatch(re.escape(said) + r" \d+ ms\n", done.stdout)
        assert (z.mm_stat()["mem_limit"], "[zstd]" in z.read("zram/comp_algorithm")) == (24 * MIB, True)
        assert z.io_stat() == dict.fromkeys(z.io_stat(), 0)
        # From here on it is a device of the other version, whatever happens to its processes.
        assert bool(options) == bool(state(directory).standby_pid) or options
        kill_daemon(directory)
        assert state(directory).release == other.release
        os.kill(state(directory).keeper_pid, signal.SIGKILL)
        wait_until(lambda: state(directory).keeper_pid not in (0, before.keeper_pid), "another keeper", 30)
        assert keeper_of(state(directory)) == str(other.keeper)
        # And back, to the one that is installed.
        zramfs("upgrade", directory)
        assert (state(directory).release, keeper_of(state(directory))) == (__version__, str(PROGRAM))
        with opened(z.disk) as fd:
            assert len(os.pread(fd, 8 * MIB, 0)) == 8 * MIB
    nothing_left(directory, base)


@pytest.mark.requires("root", "loop", "ext4")
def test_a_ram_disk_keeps_its_files_and_its_file_system(tmp_path: Path, base: Path, other: Version) -> None:
    point = tmp_path / "fast"
    zramfs("ramdisk", point, "--size", "64M")
    try:
        before = state(point)
        expected = copy_real_files(point / "copy", 8 * MIB)
        with open(point / "open", "w+") as file:
            file.write("before")
            file.flush()
            assert other.run("upgrade", "--all").returncode == 0
            os.fsync(file.fileno())
            file.write(" and after")
            file.flush()
            expect_upgraded(point, before, other)
            drop_caches(point)
            assert (point / "open").read_text() == "before and after"
        assert manifest(point / "copy") == expected
        assert state(point).loop == before.loop
        end_file_system(point, "ext4", before.loop)
        run("e2fsck", "-fn", before.loop)
        run("mount", before.loop, point)
    finally:
        stop(point)
    nothing_left(point, base)


def test_a_device_of_another_version_is_told_of(tmp_path: Path, other: Version) -> None:
    directory = tmp_path / "z"
    with device(directory, MIB):
        assert zramfs("status", directory, "-o", "VERSION", "--noheadings").stdout == f"{__version__}\n"
        done = other.run("status", directory, "-o", "VERSION", "--noheadings")
        assert (done.returncode, done.stdout) == (0, f"{__version__}\n")
        told = f"is served by zramfs {__version__}, and 9.9.9 is installed; `zramfs upgrade {directory}`"
        assert told in done.stderr
        told = f"9.9.9 is installed, and serves not all: {directory} by {__version__}"
        assert told in " ".join(other.run("doctor").stdout.split())
        assert other.run("upgrade", "--all").returncode == 0
        assert other.run("status", directory).stderr == ""


def test_a_version_that_reads_another_layout_refuses_and_touches_nothing(
    tmp_path: Path, other: Version
) -> None:
    names = ["memory", "store", "page", "settings", "papers", "messages"]
    assert names == list(LAYOUTS)
    last = "_NAMES = {"
    with device(tmp_path / "z", MIB, "--standby") as z:
        wait_until(lambda: state(z.directory).standby_pid != 0, "a standby", 30)
        before = state(z.directory)
        for name in names:
            other.change("zramfs/daemon/layouts.py", last, f"READABLE[{name!r}] = {{77}}\n_NAMES = {{")
            last = f"READABLE[{name!r}] = {{77}}\n_NAMES = {{"
            done = other.run("upgrade", z.directory)
            assert (done.returncode, done.stdout) == (1, "")
            told = f"9.9.9 can't take over from {__version__} (pid {before.pid}), which goes on: "
            assert told in done.stderr
            assert "expected a layout that this version reads (77), got " in done.stderr
            expect_as_before(z.directory, before)
            assert processes(state(z.directory)) == processes(before)
        assert "upgrade" not in log_of(z.directory)


def test_a_daemon_without_layouts_is_left_as_it_is(tmp_path: Path) -> None:
    with device(tmp_path / "z", MIB) as z:
        before = found(z.directory).update(layouts={})
        assert "can't be replaced while it serves" in failure("upgrade", z.directory)
        expect_as_before(z.directory, before)


def test_the_process_that_is_to_take_over_looks_at_the_layouts_itself(tmp_path: Path, other: Version) -> None:
    """state.json may be wrong. What it finds then is in the papers."""
    other.change("zramfs/daemon/layouts.py", "_NAMES = {", 'READABLE["memory"] = {77}\n_NAMES = {')
    with device(tmp_path / "z", MIB) as z, opened(z.disk) as fd:
        os.pwrite(fd, b"kept", 0)
        before = found(z.directory).update(layouts={**state(z.directory).layouts, "memory": 77})
        done = other.run("upgrade", z.directory)
        assert done.returncode == 1 and "has ended before it was ready" in done.stderr
        expect_as_before(z.directory, before)
        assert "expected a layout that this version reads (77)" in log_of(z.directory)
        kill_daemon(z.directory)
        assert os.pread(fd, 4, 0) == b"kept" and state(z.directory).release == __version__


def test_a_version_that_cannot_be_loaded_is_not_tried(tmp_path: Path, other: Version) -> None:
    other.change("zramfs/daemon/daemon.py", "import contextlib\n", "import no_such_module\n")
    with device(tmp_path / "z", MIB) as z:
        before = state(z.directory)
        done = other.run("upgrade", z.directory)
        assert (done.returncode, done.stdout) == (1, "")
        assert "does not start: ModuleNotFoundError: No module named 'no_such_module'" in done.stderr
        expect_as_before(z.directory, before)
        assert "upgrade" not in log_of(z.directory)


def test_a_version_whose_keeper_does_not_run_is_not_tried(tmp_path: Path, other: Version) -> None:
    other.keeper.write_text("#!/bin/sh\nexit 1\n")
    with device(tmp_path / "z", MIB) as z:
        before = state(z.directory)
        assert "does not start" in other.run("upgrade", z.directory).stderr
        expect_as_before(z.directory, before)


@pytest.mark.parametrize("options", [(), ("--standby",)], ids=["alone", "standby"])
def test_a_version_that_cannot_stand_by_leaves_the_old_one_serving(
    tmp_path: Path, other: Version, options: tuple[str, ...]
) -> None:
    other.change("zramfs/lifecycle/serve.py", "def succeed() -> NoReturn:",
                 "def succeed() -> NoReturn:\n    sys.exit(9)\n\n\ndef _succeed() -> NoReturn:")
    with device(tmp_path / "z", 16 * MIB, *options) as z, load(z.disk, 4 * MIB) as running:
        before = state(z.directory)
        done = other.run("upgrade", z.directory)
        assert (done.returncode, done.stdout) == (1, "")
        assert "has ended before it was ready" in done.stderr
        expect_as_before(z.directory, before)
        count = running.count
        wait_until(lambda: running.count > count + 100 or running.failure, "requests after it")
        # All is as before: also what happens when the daemon dies.
        if options:
            wait_until(lambda: state(z.directory).standby_pid != 0, "a standby of the old version", 30)
        kill_daemon(z.directory)
        assert state(z.directory).release == __version__


def serves_next(pid: str) -> bool:
    """Whether the process is one that is to take over. Not so a fork of the keeper, which is told what to run
    by the same words and tries its fence on a child."""
    try:
        program, *arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return not program.endswith(PROGRAM.name.encode()) and any(b"succeed()" in each for each in arguments)
    except (FileNotFoundError, ProcessLookupError):
        return False


class Gated:
    """An upgrade to a version whose next daemon waits before it is ready, which is where it stands then."""

    def __init__(self, version: Version, directory: Path, gate: Path) -> None:
        self.gate = gate
        version.change(
            "zramfs/lifecycle/serve.py", "\ndef succeed() -> NoReturn:", GATE.format(gate=str(gate)))
        before = state(directory)
        self.command = version.start("upgrade", directory)
        try:
            wait_until(lambda: keeper_of(before) == str(version.keeper), "another keeper", 60)
            wait_until(lambda: self.waiting(before), "a standby", 60)
        except BaseException:
            self.end()
            raise

    @staticmethod
    def waiting(before: State) -> list[int]:
        """Children of the keeper beside the daemon that are to serve: at its start it has another one for a
        moment, by which it tries its fence."""
        children = Path(f"/proc/{before.keeper_pid}/task/{before.keeper_pid}/children").read_text().split()
        return [int(each) for each in children if int(each) != before.pid and serves_next(each)]

    def end(self) -> subprocess.CompletedProcess[str]:
        self.gate.touch()
        return finish(self.command)


def test_a_daemon_killed_before_its_successor_is_ready_has_one_all_the_same(
    tmp_path: Path, other: Version
) -> None:
    with device(tmp_path / "z", 16 * MIB) as z, load(z.disk, 4 * MIB):
        before = state(z.directory)
        gated = Gated(other, z.directory, tmp_path / "gate")
        os.kill(before.pid, signal.SIGKILL)
        done = gated.end()
        assert done.returncode == 1 and "has died before it was replaced: try again" in done.stderr
        wait_until(lambda: state(z.directory).release == other.release, "the other version", 30)
        assert other.run("upgrade", z.directory).returncode == 0
        assert keeper_of(state(z.directory)) == str(other.keeper)


def test_a_keeper_killed_before_the_successor_is_ready_leaves_the_old_version(
    tmp_path: Path, other: Version
) -> None:
    with device(tmp_path / "z", 16 * MIB) as z, load(z.disk, 4 * MIB):
        before = state(z.directory)
        gated = Gated(other, z.directory, tmp_path / "gate")
        waiting = gated.waiting(before)
        os.kill(before.keeper_pid, signal.SIGKILL)
        done = gated.end()
        assert done.returncode == 1 and "the keeper has died meanwhile" in done.stderr
        wait_until(lambda: state(z.directory).keeper_pid not in (0, before.keeper_pid), "another keeper", 30)
        expect_as_before(z.directory, state(z.directory))
        assert state(z.directory).pid == before.pid
        wait_until(lambda: not any(map(process_start, waiting)), "the end of what nobody needs", 30)
        kill_daemon(z.directory)
        assert state(z.directory).release == __version__


def test_a_successor_killed_before_it_is_ready_leaves_the_old_version(tmp_path: Path, other: Version) -> None:
    with device(tmp_path / "z", 16 * MIB) as z, load(z.disk, 4 * MIB):
        before = state(z.directory)
        gated = Gated(other, z.directory, tmp_path / "gate")
        for pid in gated.waiting(before):
            os.kill(pid, signal.SIGKILL)
        done = gated.end()
        assert done.returncode == 1 and "has ended before it was ready" in done.stderr
        expect_as_before(z.directory, before)


def test_a_daemon_killed_before_its_keeper_has_read_the_order_is_followed_by_the_old_version(
    tmp_path: Path, other: Version
) -> None:
    with device(tmp_path / "z", 16 * MIB) as z, load(z.disk, 4 * MIB):
        before = state(z.directory)
        with stopped(before.keeper_pid, 90):
            command = other.start("upgrade", z.directory)
            try:
                wait_until(lambda: "an upgrade is ordered" in log_of(z.directory), "the order", 60)
                kill_wholly(before.pid)
            except BaseException:
                command.kill()
                raise
        done = finish(command)
        assert done.returncode == 1 and "has died before it was replaced" in done.stderr
        old = (before.pid, before.keeper_pid)
        wait_until(lambda: state(z.directory).pid not in old, "another daemon", 30)
        now = state(z.directory)
        assert (now.release, keeper_of(now)) == (__version__, str(PROGRAM))


def test_a_command_that_is_killed_leaves_an_upgrade_that_goes_on(tmp_path: Path, other: Version) -> None:
    with device(tmp_path / "z", 16 * MIB) as z, load(z.disk, 4 * MIB):
        before = state(z.directory)
        gated = Gated(other, z.directory, tmp_path / "gate")
        gated.command.kill()
        gated.end()
        wait_until(lambda: state(z.directory).release == other.release, "the other version", 60)
        expect_upgraded(z.directory, before, other)


def test_two_upgrades_at_once_come_one_after_the_other(tmp_path: Path, other: Version) -> None:
    with device(tmp_path / "z", 16 * MIB) as z, load(z.disk, 4 * MIB):
        before = state(z.directory)
        commands = [other.start("upgrade", z.directory) for _ in range(2)]
        done = [finish(each) for each in commands]
        assert [(each.returncode, each.stderr) for each in done] == [(0, ""), (0, "")]
        said = sorted((each.stdout for each in done), key=lambda text: __version__ not in text)
        pids = [re.findall(r"\(pid (\d+)\)", text) for text in said]
        assert [int(pid) for pid in pids[0] + pids[1]] == [
            before.pid, int(pids[0][1]), int(pids[0][1]), state(z.directory).pid]


def test_a_device_that_is_dead_starts_or_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    directory = tmp_path / "z"
    assert "no zramfs device of yours" in failure("upgrade", directory)
    assert "expected the directories of devices, or --all" in failure("upgrade", code=2)
    assert zramfs("upgrade", "--all").stderr == "zramfs: note: no device is there\n"
    with device(directory, MIB):
        found(directory).update(phase="starting")
        assert "it is just being started" in failure("upgrade", directory)
        found(directory).update(phase="ready")
        kill_device(state(directory))
        assert "its daemon is dead, and its data with it" in failure("upgrade", directory)
        assert zramfs("upgrade", "--all").stderr == "zramfs: note: no device is there\n"


def test_one_device_that_is_not_upgraded_keeps_no_other_from_it(tmp_path: Path, other: Version) -> None:
    with device(tmp_path / "a", MIB) as a, device(tmp_path / "b", MIB) as b:
        before = found(a.directory).update(layouts={})
        done = other.run("upgrade", a.directory, b.directory)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stdout.count("\n") == 1
        expect_as_before(a.directory, before)
        assert state(b.directory).release == other.release


def test_an_order_that_is_none_changes_nothing(tmp_path: Path) -> None:
    send = ("import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
            "s.connect(sys.argv[1]); s.send(sys.argv[2].encode()); print(s.recv(4096).decode())")
    with device(tmp_path / "z", MIB) as z:
        before = state(z.directory)
        for text in ("x", "[]", "{}", '{"program": 1, "command": []}',
                     '{"program": "/a", "command": ["\\u0000"]}'):
            done = run(sys.executable, "-c", send, "orders", text, cwd=found(z.directory).path)
            assert stat.S_IMODE((found(z.directory).path / "orders").stat().st_mode) == 0o600
            assert "expected an order with a program and a command" in done.stdout
        text = '{"program": "/nowhere/keeper", "command": ["/bin/true"]}'
        done = run(sys.executable, "-c", send, "orders", text, cwd=found(z.directory).path)
        assert "/nowhere/keeper cannot be run: No such file or directory" in done.stdout
        expect_as_before(z.directory, before)


def test_the_command_runs_as_a_program_too(tmp_path: Path) -> None:
    with device(tmp_path / "z", MIB) as z:
        before = state(z.directory)
        done = subprocess.run([*ZRAMFS, "upgrade", z.directory], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert state(z.directory).pid != before.pid and state(z.directory).release == __version__
