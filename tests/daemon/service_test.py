# SPDX-License-Identifier: Apache-2.0
"""What the service manager is told, on a socket of the test's own; and the units themselves."""
from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.support.commands import systemd_units
from tests.support.fakes import FakeLane
from tests.support.paths import ROOT
from tests.support.whole import run, tool_environment, zramfs
from zramfs.daemon import service
from zramfs.daemon.service import Notifier
from zramfs.device.device import Device
from zramfs.host import log
from zramfs.host.paths import escape
from zramfs.model.config import DeviceConfig
from zramfs.model.stats import EMPTY, Latency
from zramfs.tree.state import status_line

UNITS = ("zramfs@", "zramfs-swap@")


@pytest.fixture
def manager(tmp_path: Path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


def address(manager: socket.socket) -> str:
    return manager.getsockname()


def received(manager: socket.socket) -> list[str]:
    manager.setblocking(False)
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return found


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, None),
    ({"NOTIFY_SOCKET": "vsock:2:1"}, None),
    ({"NOTIFY_SOCKET": "/run/n"}, ("/run/n", None)),
    ({"NOTIFY_SOCKET": "@abstract"}, ("\0abstract", None)),
    ({"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "3000000"}, ("/run/n", 3.0)),
    ({"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "PID"}, ("/run/n", 3.0)),
    ({"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, ("/run/n", None)),
    ({"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "0"}, ("/run/n", None)),
    ({"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "many"}, ("/run/n", None)),
])
def test_what_the_environment_says(environment, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("PID", str(os.getpid())))
    got = Notifier.from_environment()
    assert (got and (got.address, got.watchdog)) == expected
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()


def test_an_abstract_socket(tmp_path: Path) -> None:
    name = f"zramfs-{tmp_path.name}-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        Notifier(f"@{name}").send("READY=1", "STATUS=x")
        assert sock.recv(100) == b"READY=1\nSTATUS=x"


def test_a_manager_that_is_gone_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier(str(tmp_path / "nobody"))
    for _ in range(3):
        notifier.send("READY=1")
    assert [record.getMessage() for record in caplog.records] == [
        "the service manager cannot be told (READY=1): [Errno 2] No such file or directory"]


def device(size: int = 1 << 20) -> Device:
    return Device(DeviceConfig(directory=Path("/mnt/z0"), rundir=Path("/run/z0"), size=size), FakeLane())


class Passing:
    """Time that passes while no thread is on its way: threads are real, whatever the clock says. hanging: set
    once one of them is not to be waited for. A test names the clock as well: pytest-trio sees no other."""

    def __init__(self, clock: MockClock) -> None:
        self._clock = clock
        self._under_way = 0
        self.hanging = threading.Event()

    def counted(self, run: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
        async def run_counted(*arguments: object, **more: object) -> object:
            self._under_way += 1
            try:
                return await run(*arguments, **more)
            finally:
                self._under_way -= 1

        return run_counted

    async def seconds(self, count: int) -> None:
        for each in range(count + 1):
            await trio.testing.wait_all_tasks_blocked()
            while self._under_way and not self.hanging.is_set():
                time.sleep(0.001)
                await trio.testing.wait_all_tasks_blocked()
            if each < count:
                self._clock.jump(1)


@pytest.fixture
def passing(mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> Passing:
    made = Passing(mock_clock)
    monkeypatch.setattr(trio.to_thread, "run_sync", made.counted(trio.to_thread.run_sync))
    monkeypatch.setattr(service, "run_in_thread", made.counted(service.run_in_thread))
    return made


async def test_the_watchdog_is_fed_only_while_the_lane_answers(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock, passing: Passing
) -> None:
    """statvfs stands for the lane; it hangs in the way a FUSE server does that has stopped."""
    answers, hanging = threading.Event(), passing.hanging
    answers.set()

    def statvfs(path: object) -> None:
        assert path == Path("/run/z0/disk")
        if not answers.is_set():
            hanging.set()
        answers.wait()

    monkeypatch.setattr(service.os, "statvfs", statvfs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Notifier(address(manager), watchdog=40.0).watch, device(), Path("/run/z0/disk"))
        await passing.seconds(35)
        assert received(manager).count("WATCHDOG=1") == 4
        answers.clear()
        await passing.seconds(100)
        assert hanging.is_set()
        assert "WATCHDOG=1" not in received(manager)
        hanging.clear()
        answers.set()
        for _ in range(1000):  # the thread that hung has yet to say that it hangs no more
            await passing.seconds(15)
            if answered := received(manager).count("WATCHDOG=1"):
                break
            time.sleep(0.01)
        assert answered
        nursery.cancel_scope.cancel()


async def test_a_probe_that_fails_is_one_missed_sign_of_life(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock, passing: Passing,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """systemd ends a service that stops sending, and with it the data of a lane that is well."""
    failing = [OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread"),
    MemoryError()]

    def statvfs(path: object) -> None:
        if failing:
            raise failing.pop()

    monkeypatch.setattr(service.os, "statvfs", statvfs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Notifier(address(manager), watchdog=40.0).watch, device(), Path("/run/z0/disk"))
        await passing.seconds(75)
        nursery.cancel_scope.cancel()
    # At 0, 10 and 20 s it fails; from 30 to 70 s it is answered.
    assert received(manager).count("WATCHDOG=1") == 5
    assert sum("cannot be asked" in record.message for record in caplog.records) == 1


def one_more(latency: Latency) -> Latency:
    return Latency((latency.counts[0] + 1, *latency.counts[1:]), latency.ns)


async def test_requests_of_users_are_signs_of_life(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock, passing: Passing
) -> None:
    """The path of the disk may be hidden by another mount; what the lane answers counts."""
    def statvfs(path: object) -> None:
        raise OSError(errno.ENOENT, "gone")

    monkeypatch.setattr(service.os, "statvfs", statvfs)
    busy = device()
    lane = busy._lane

    async def serve_requests() -> None:
        while True:
            await trio.sleep(7)
            latency = lane.counters.latency
            lane.counters = replace(lane.counters, latency=(one_more(latency[0]), *latency[1:]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_requests)
        nursery.start_soon(Notifier(address(manager), watchdog=40.0).watch, busy, Path("/run/z0/disk"))
        await passing.seconds(95)
        nursery.cancel_scope.cancel()
    assert received(manager).count("WATCHDOG=1") == 9


async def test_a_lane_that_has_ended_is_no_failure_of_the_task(
    manager: socket.socket, tmp_path: Path, mock_clock: MockClock, passing: Passing
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Notifier(address(manager), watchdog=4.0).watch, device(), tmp_path / "gone")
        await passing.seconds(100)
        nursery.cancel_scope.cancel()
    assert "WATCHDOG=1" not in received(manager)


async def test_the_status_is_told_when_it_changes(
    manager: socket.socket, mock_clock: MockClock, passing: Passing
) -> None:
    watched = device(0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Notifier(address(manager)).watch, watched, Path("/run/z0/disk"))
        await passing.seconds(20)
        assert received(manager) == ["STATUS=not set up: it has no size yet"]
        await watched.command("disksize=4G")
        await passing.seconds(20)
        assert received(manager) == ["STATUS=0B of 4G stored in 0B"]
        nursery.cancel_scope.cancel()


def test_the_status_line() -> None:
    store = replace(EMPTY, orig_data_size=3 << 30, mem_used_total=1 << 30, failed_writes=7, failed_reads=1)
    stats = replace(device().stats(), disksize=4 << 30, mem_limit=2 << 30, store=store)
    assert status_line(stats) == "3G of 4G stored in 1G of 2G, ratio 3.00; 7 writes failed; 1 reads failed"
    assert status_line(replace(stats, alive=False)) == "the lane has ended; disk does not answer any more"


def test_the_journal_gets_priorities_and_no_time() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(log.JournalFormatter())
    try:
        raise OSError(5, "cause")
    except OSError:
        for level in (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG):
            handler.handle(logging.LogRecord("n", level, "", 0, "said", None, None))
        handler.handle(logging.LogRecord("n", logging.ERROR, "", 0, "said", None, sys.exc_info()))
    lines = out.getvalue().splitlines()
    assert lines[:6] == ["<2>n: said", "<3>n: said", "<4>n: said", "<6>n: said", "<7>n: said", "<3>n: said"]
    assert all(line.startswith("<3>") for line in lines[5:]) and lines[-1] == "<3>OSError: [Errno 5] cause"


def test_the_journal_is_known_by_its_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "stream", "w") as stream:
        seen = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{seen.st_dev}:{seen.st_ino}")
        assert log._is_journal(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{seen.st_dev}:{seen.st_ino + 1}")
        assert not log._is_journal(stream.fileno())


# ---- the units -------------------------------------------------------------------------------------
@pytest.mark.requires("systemd-analyze")
def test_systemd_accepts_the_units_with_what_the_generator_adds(tmp_path: Path) -> None:
    """Everything of tests/configuration/cases at once. A complaint of any kind fails."""
    units = systemd_units(tmp_path / "units")
    names = [f"{name}z.service" for name in UNITS]
    for number, case in enumerate(sorted((ROOT / "tests/configuration/cases").iterdir())):
        top, target = tmp_path / str(number), tmp_path / f"made{number}"
        shutil.copytree(case, top, symlinks=True)
        for path in top.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() else 0o644)
        target.mkdir()
        run(sys.executable, "-m", "zramfs.cli", "systemd-generator", target, target, target,
            env={**os.environ, "ZRAMFS_ROOT": str(top)})
        for made in target.glob("*.service.d"):
            shutil.copytree(made, units / made.name, dirs_exist_ok=True)
            names.append(made.name.removesuffix(".d"))
    done = run("systemd-analyze", "verify", "--man=no", "--generators=no", *(units / name for name in names),
               env={**tool_environment(), "SYSTEMD_UNIT_PATH": f"{units}:"}, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(names) > 20


@pytest.mark.requires("systemd-analyze")
@pytest.mark.parametrize("name", UNITS)
def test_the_units_are_as_closed_as_they_can_be(name: str, tmp_path: Path) -> None:
    """4.2 and 4.4 of 10 with systemd 252, of which 2.4 would take the mounts from everybody else."""
    units = systemd_units(tmp_path / "units")
    done = run("systemd-analyze", "security", "--offline=yes", "--no-pager", units / f"{name}.service",
               env={**tool_environment(), "SYSTEMD_UNIT_PATH": f"{units}:"})
    score = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert score and float(score[1]) < 5, done.stdout


def test_nothing_in_the_units_gives_the_daemon_mounts_of_its_own() -> None:
    """systemd.exec(5): each of these makes a mount namespace, in which the file system would stay."""
    hiding = {
        "ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateMounts", "ProtectProc",
        "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups",
        "ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "TemporaryFileSystem", "BindPaths",
        "MountFlags", "ProcSubset", "RootDirectory", "RootImage", "DynamicUser", "PrivateNetwork",
        "PrivateIPC", "PrivateUsers",
    }
    for name in UNITS:
        text = (ROOT / f"systemd/{name}.service").read_text()
        assert not hiding & {line.partition("=")[0] for line in text.splitlines()}


@pytest.mark.requires("systemd-escape")
@pytest.mark.parametrize(
    "path", ["/mnt/fast", "/", "/mnt/my disk", "/.żupan-ci3pły", "/a//b/", '/mnt/50%/"q"\\x20'])
def test_mount_units_are_named_as_systemd_names_them(path: str) -> None:
    expected = run("systemd-escape", "--path", "--suffix=mount", path).stdout.strip()
    assert f"{escape(Path(os.path.normpath(path)))}.mount" == expected


def test_a_generator_that_cannot_write_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc/zramfs").mkdir(parents=True)
    (tmp_path / "etc/zramfs/z.conf").write_text("")
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    done = zramfs("systemd-generator", "/proc/nothing", check=False)
    assert done.returncode == 1
    assert done.stderr == "zramfs: /proc/nothing: No such file or directory\n"
