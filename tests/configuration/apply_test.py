# SPDX-License-Identifier: Apache-2.0
"""Configured devices: up, down, and as a service with a manager of the test's own."""
from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.child import Child, stopped
from tests.support.commands import failure, kill_daemon, nothing_left, rows, state_of
from tests.support.governed import sync_file_system
from tests.support.paths import ROOT
from tests.support.whole import MIB, ZRAMFS, opened, wait_until, zramfs
from zramfs.host import mounts, swaps
from zramfs.lifecycle import rundir

pytestmark = [pytest.mark.requires("root", "fuse", "loop", "ext4"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ZRAMFS_ROOT, with nothing configured; whatever is up at the end is taken down."""
    (tmp_path / "etc/zramfs/conf.d").mkdir(parents=True)
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    yield tmp_path
    for each in rundir.rundirs():
        zramfs("stop", each.name)


def configure(top: Path, name: str, *lines: str) -> None:
    (top / f"etc/zramfs/{name}.conf").write_text("".join(f"{line}\n" for line in lines))


def base(top: Path) -> Path:
    return top / "run"


def test_all_devices_up_and_down(top: Path) -> None:
    configure(top, "fast", f"mount-point = {top}/mnt/deep/fast", "zram-size = 64", "mode = 1777",
              "group = 12", "options = discard,noatime", "compression-algorithm = zstd(level=7)",
              "zram-resident-limit = 32", "proactiveness = 33")
    configure(top, "plain", f"directory = {top}/plain", "zram-size = 16", "threads = 1", "mode = 0660",
              "owner = 34", "allow-other = yes")
    done = zramfs("up")
    assert done.stdout == ""
    assert done.stderr == (f"zramfs: fast is up on {top}/mnt/deep/fast\nzramfs: plain is up on {top}/plain\n")

    fast = top / "mnt/deep/fast"
    seen = fast.stat()
    assert (mounts.mount_at(fast).fstype, stat.S_IMODE(seen.st_mode), seen.st_gid) == ("ext4", 0o1777, 12)
    table = Path("/proc/mounts").read_text(errors="surrogateescape")
    [line] = [line for line in table.splitlines() if f" {fast} " in line]
    assert {"discard", "noatime"} <= set(line.split()[3].split(","))
    assert "zstd, level 7" in zramfs("control", "fast").stdout
    tree = Path(state_of(fast).directory)
    assert (tree / "memory/proactiveness").read_text() == "33\n"
    assert int((tree / "zram/mm_stat").read_text().split()[3]) == 32 * MIB

    disk = (top / "plain/disk").stat()
    assert (stat.S_IMODE(disk.st_mode), disk.st_uid, disk.st_size) == (0o660, 34, 16 * MIB)
    assert [row["name"] for row in rows("-o", "NAME,STREAMS")] == ["fast", "plain"]
    assert [row["streams"] for row in rows("plain", "-o", "STREAMS")] == [1]

    assert zramfs("up").stderr == "zramfs: note: fast is up already\nzramfs: note: plain is up already\n"
    assert zramfs("up", "plain").stderr == "zramfs: note: plain is up already\n"
    assert zramfs("down").stderr == "zramfs: plain is down\nzramfs: fast is down\n"
    nothing_left(fast, base(top))
    nothing_left(top / "plain", base(top))
    assert zramfs("down").stderr == ""
    assert zramfs("down", "fast").stderr == "zramfs: note: fast is down already\n"


def test_one_that_fails_keeps_no_other_from_coming_up(top: Path) -> None:
    configure(top, "a-bad", "zram-size = 4G")
    configure(top, "b-full", f"mount-point = {top}/file/below", "zram-size = 16")
    configure(top, "c-good", f"directory = {top}/good", "zram-size = 16", "threds = 3")
    configure(top, "d-absent", f"directory = {top}/absent", "host-memory-limit = 1")
    (top / "file").write_text("")
    done = zramfs("up", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"{top}/etc/zramfs/a-bad.conf:1: zram-size: expected at most 268435456 MiB, got 4000000000; sizes "
        "are in MiB (4096 is 4 GiB)",
        "zramfs: a-bad: its configuration is wrong (above), so it is left down",
        f"zramfs: note: d-absent is left out: the machine has {ram()} MiB of RAM, more than "
        "host-memory-limit = 1",
        f"zramfs: b-full: {top}/file is not there and cannot be made: Not a directory",
        f"{top}/etc/zramfs/c-good.conf:3: warning: threds: unknown key, left out; did you mean threads?",
        f"zramfs: c-good is up on {top}/good",
    ]
    assert zramfs("down").stderr == "zramfs: c-good is down\n"


def ram() -> int:
    return int(Path("/proc/meminfo").read_text().split()[1]) // 1024


def test_names_that_nobody_configured(top: Path) -> None:
    configure(top, "there", f"directory = {top}/there")
    expected = "zramfs: no device is configured under the name nobody; configured: there\n"
    for command in ("up", "down", "check-config"):
        assert failure(command, "nobody") == expected
    assert "--foreground takes the NAME of one device" in failure("up", "--foreground", code=2)


def test_policies_are_at_work_from_the_start(top: Path) -> None:
    backing = top / "backing"
    backing.touch(mode=0o600)
    os.truncate(backing, 32 * MIB)
    configure(top, "z", f"directory = {top}/z", "zram-size = 16", "compression-algorithm = lz4 zstd(level=9)",
              "policy = recompress idle=1", f"writeback-device = {backing}",
              "policy = writeback idle=2h limit=1G")
    zramfs("up")
    with opened(top / "z/disk") as fd:
        os.pwrite(fd, b"".join(b"line %d of the text\n" % number for number in range(50_000)), 0)
    shown = (top / "z/control").read_text()
    assert "recompress idle=1s: " in shown and "; writeback idle=2h limit=1G: " in shown
    assert f"{backing}: 0 of {32 * MIB // 4096} blocks in use" in shown

    def won() -> int:
        lines = (top / "z/memory/policies").read_text().splitlines()
        [line] = [line for line in lines if line.startswith("recompress_pages_won ")]
        return int(line.split()[1])

    wait_until(lambda: won() > 100, "pages are recompressed")
    assert zramfs("down").stderr == "zramfs: z is down\n"


@pytest.mark.requires("swap")
def test_swap_up_and_down(top: Path) -> None:
    """Of priority 0: below every other, so that nobody's pages go there."""
    configure(top, "s", "zram-size = 64", "swap-priority = 0", "compression-algorithm = zstd",
              "options = discard=once", "reserve = 4")
    assert zramfs("up").stderr.splitlines()[-1] == "zramfs: s is up"
    [area] = [area for area in swaps.swap_areas() if area.path == rundir.find("s").read().loop]
    assert (area.size, area.priority) == (64 * MIB - 4096, 0)
    assert rows("s", "-o", "NAME,ALGORITHM,MOUNTPOINT") == [
        {"name": "s", "algorithm": "zstd", "mountpoint": "[SWAP]"}]
    assert zramfs("up").stderr == "zramfs: note: s is up already\n"
    assert zramfs("down").stderr.splitlines()[-1] == "zramfs: s is down"
    assert area.path not in swaps.swaps()
    nothing_left(top / "run", base(top))


@pytest.mark.requires("swap")
def test_swap_whose_priority_the_kernel_chooses(top: Path) -> None:
    configure(top, "s", "zram-size = 64", "swap-priority = -1", "reserve = 4")
    zramfs("up")
    [area] = [area for area in swaps.swap_areas() if area.path == rundir.find("s").read().loop]
    assert area.priority < 0, "below any that was given one"
    zramfs("down")
    assert area.path not in swaps.swaps()


def test_in_use_stays_up(top: Path) -> None:
    configure(top, "fast", f"mount-point = {top}/fast", "zram-size = 64")
    zramfs("up")
    (top / "fast/file").write_text("kept")
    with opened(top / "fast/file"):
        done = zramfs("down", check=False)
        assert done.returncode == 1
        assert f"zramfs: fast: {top}/fast is in use, so nothing was changed:\n" in done.stderr
        assert f"has {top}/fast/file open" in done.stderr
        assert (top / "fast/file").read_text() == "kept"
    assert zramfs("down").stderr == "zramfs: fast is down\n"


def test_a_configuration_that_was_changed_or_taken_away_meanwhile(top: Path) -> None:
    configure(top, "z", f"directory = {top}/old", "zram-size = 16")
    zramfs("up")
    configure(top, "z", f"directory = {top}/new", "zram-size = 16")
    assert failure("up") == (
        f"zramfs: z: it is up as a device on {top}/old, and configured as a device on {top}/new: "
        "`zramfs down z` first\n"
    )
    configure(top, "z", "zram-size = 16")
    assert f"it is up as a device on {top}/old, and configured as swap: `" in failure("up")
    (top / "etc/zramfs/z.conf").unlink()
    assert zramfs("down", "z").stderr == "zramfs: z is down\n"
    nothing_left(top / "old", base(top))


def test_after_the_daemon_was_killed(top: Path) -> None:
    configure(top, "fast", f"mount-point = {top}/fast", "zram-size = 64")
    for command in ("down", "up"):
        zramfs("up")
        kill_daemon(state_of(top / "fast"))
        said = zramfs(command).stderr.splitlines()
        assert f"cleaned up {top}/fast: its daemon (pid " in said[0]
    assert (top / "fast/lost+found").is_dir()
    zramfs("down")
    nothing_left(top / "fast", base(top))


def test_a_file_is_checked_wherever_it_stands(top: Path) -> None:
    file = top / "mine.conf"
    file.write_text("directory = /mnt/mine\nzram-size = 64\nthreads = none\n")
    done = zramfs("check-config", file, check=False)
    assert (done.returncode, done.stdout) == (1, f"mine  ({file})\n    wrong, so it would not be set up\n")
    assert done.stderr == f"{file}:3: threads: expected a whole number from 1 to 64, got 'none'\n"
    file.write_text("directory = /mnt/mine\nzram-size = 64\n")
    assert zramfs("check-config", file).stdout.splitlines()[1:] == [
        "    a plain device: /mnt/mine/disk", "    size 64M", "    compressed with lz4",
        "    2 threads, proactiveness 20, density off"]


# ---- as a service ----------------------------------------------------------------------------------
class Manager:
    """The part of systemd that starts a unit of Type=notify: what it was told, in order."""

    def __init__(self, place: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.address = place / "notify"
        self.socket.bind(str(self.address))
        self.told: list[str] = []

    def wait_for(self, line: str, seconds: float = 60) -> None:
        """Until a line that begins with this has come since the last wait."""
        end = time.monotonic() + seconds
        while True:
            self.socket.settimeout(max(0.01, end - time.monotonic()))
            try:
                lines = self.socket.recv(4096).decode().split("\n")
            except TimeoutError:
                pytest.fail(f"not told within {seconds:g} s: {line}; told: {self.told}")
            self.told += lines
            if any(each.startswith(line) for each in lines):
                return


@contextlib.contextmanager
def service(top: Path, name: str, watchdog: float = 0) -> Iterator[tuple[Child, Manager]]:
    """The ExecStart of zramfs@.service."""
    unit = (ROOT / "systemd/zramfs@.service").read_text()
    assert "\nExecStart=/usr/bin/zramfs up --foreground %i\n" in unit
    manager = Manager(top)
    log = top / "log"
    log.touch()
    seen = log.stat()
    environment = {**os.environ, "NOTIFY_SOCKET": str(manager.address),
                   "JOURNAL_STREAM": f"{seen.st_dev}:{seen.st_ino}"}
    if watchdog:
        environment["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
    child = Child([*ZRAMFS, "up", "--foreground", name], log, env=environment)
    with manager.socket:
        try:
            yield child, manager
        finally:
            child.end()


def test_a_service_from_start_to_stop(top: Path) -> None:
    configure(top, "fast", f"mount-point = {top}/fast", "zram-size = 64", "zram-resident-limit = 48")
    with service(top, "fast", watchdog=1) as (child, manager):
        manager.wait_for("READY=1")
        assert mounts.mount_at(top / "fast").fstype == "ext4"
        assert [line for line in manager.told if not line.startswith("FD")] == ["READY=1"]
        manager.wait_for("STATUS=")
        assert " of 64M stored in " in manager.told[-1] and " of 48M" in manager.told[-1]
        manager.wait_for("WATCHDOG=1")
        (top / "fast/data").write_bytes(os.urandom(4 * MIB))
        sync_file_system(top / "fast")
        manager.wait_for("STATUS=4.")
        child.process.terminate()
        manager.wait_for("STOPPING=1")
        assert manager.told[-1] == "STATUS=ending: SIGTERM"
        assert child.wait() == 0
    nothing_left(top / "fast", base(top))
    for line in (top / "log").read_text().splitlines():
        # Its own words for a terminal have no priority, and neither has the time.
        assert line.startswith(("<6>zramfs.", "zramfs: ")), line


def test_a_service_that_is_stopped_by_down(top: Path) -> None:
    """The unit's ExecStop, then its ExecStopPost."""
    configure(top, "z", f"directory = {top}/z", "zram-size = 16")
    with service(top, "z") as (child, manager):
        manager.wait_for("READY=1")
        assert "WATCHDOG=1" not in manager.told
        assert zramfs("down", "z").stderr == "zramfs: z is down\n"
        assert child.wait() == 0
        assert zramfs("down", "z").stderr == "zramfs: note: z is down already\n"
    nothing_left(top / "z", base(top))


def test_a_service_gives_no_sign_of_life_while_it_is_stopped(top: Path) -> None:
    configure(top, "z", f"directory = {top}/z", "zram-size = 16")
    with service(top, "z", watchdog=0.4) as (child, manager):
        manager.wait_for("WATCHDOG=1")
        with stopped(state_of(top / "z").pid):
            manager.socket.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                while True:
                    manager.socket.recv(4096)
            manager.socket.settimeout(1)
            with pytest.raises(TimeoutError):
                manager.socket.recv(4096)
        manager.wait_for("WATCHDOG=1")


@pytest.mark.parametrize(("lines", "reason"), [
    (("zram-size = x",), "z: its configuration is wrong (above), so it is left down"),
    (("host-memory-limit = 1", "directory = {top}/z"), "z: it is left out: the machine has {ram} MiB of RAM"),
    (("mount-point = {top}/z", "options = nonsense", "zram-size = 64"), "z: `mount -t ext4 -o nonsense"),
])
def test_a_service_that_cannot_start_says_why_and_leaves_nothing(
    top: Path, lines: tuple[str, ...], reason: str
) -> None:
    configure(top, "z", *(line.format(top=top) for line in lines))
    with service(top, "z") as (child, manager):
        assert child.wait() == 1
        manager.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            manager.told.append(manager.socket.recv(4096).decode())
    assert "READY=1" not in manager.told
    assert f"zramfs: {reason.format(ram=ram())}" in (top / "log").read_text()
    if base(top).exists():
        nothing_left(top / "z", base(top))


def test_a_service_for_what_is_up_already_fails_and_changes_nothing(top: Path) -> None:
    configure(top, "z", f"directory = {top}/z", "zram-size = 16")
    zramfs("up")
    with service(top, "z") as (child, _):
        assert child.wait() == 1
    assert f"z: it is up already, served by pid {state_of(top / 'z').pid}" in (top / "log").read_text()
    assert (top / "z/disk").stat().st_size == 16 * MIB
