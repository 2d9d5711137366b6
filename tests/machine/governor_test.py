# SPDX-License-Identifier: Apache-2.0
"""RAM disks that are filled past what their pool may take: the file system stays whole."""
from __future__ import annotations

import contextlib
import errno
import os
import pwd
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.capabilities import require
from tests.support.commands import kill_daemon, rows, state_of
from tests.support.governed import (
    Full,
    compressible,
    fill_many,
    fill_one,
    forget_pages,
    ram_disk,
    sync_file_system,
)
from tests.support.whole import MIB, can_claim, opened, run, unmount, wait_until, zramfs
from zramfs.host import bdi, loops
from zramfs.lifecycle import rundir

pytestmark = [pytest.mark.requires("root", "fuse", "loop"), pytest.mark.timeout(240)]
# xfs takes no less than 300 MiB.
SIZES = {"ext4": 256 * MIB, "xfs": 320 * MIB, "btrfs": 256 * MIB}
LIMIT = 40 * MIB
RESERVE = 12 * MIB
each_fs = pytest.mark.parametrize("fstype", SIZES)


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def disk(tmp_path: Path, fstype: str) -> Iterator[Full]:
    """With 200 small files that must stay."""
    require(fstype)
    with ram_disk(tmp_path / "disk", fstype, SIZES[fstype], LIMIT) as disk:
        disk.keep(200, 5000)
        yield disk


def expect_space_back(disk: Full, *paths: Path) -> None:
    """What is deleted can be written again, in a moment."""
    for path in paths:
        path.unlink()
    path = disk.point / "again"

    def again() -> bool:
        """xfs and btrfs discard with their next commit, which the governor asks for."""
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            return fill_one(path, MIB, most=20 * MIB) == 20 * MIB
        return False

    wait_until(again, "20 MiB can be written again", 20)
    disk.expect_whole()


@each_fs
def test_incompressible_data_ends_with_enospc_and_its_space_comes_back(disk: Full) -> None:
    written = fill_one(disk.point / "big", MIB)
    assert written > 0.8 * LIMIT
    disk.expect_whole()
    assert disk.used() < LIMIT + RESERVE // 2
    expect_space_back(disk, disk.point / "big")


@each_fs
def test_many_small_files_end_with_enospc(disk: Full) -> None:
    """The record of the first report: buffered writers saw no error, and the file system broke."""
    count = fill_many(disk.point / "new", 20_000)
    assert count * 20_000 > 0.7 * LIMIT
    disk.expect_whole()
    expect_space_back(disk, *(disk.point / "new").iterdir())


@each_fs
def test_one_write_of_more_than_there_is_room_for_is_cut_short(disk: Full) -> None:
    data = os.urandom(100 * MIB)
    with opened(disk.point / "huge", os.O_WRONLY | os.O_CREAT) as fd:
        try:
            written = os.write(fd, data)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            written = os.fstat(fd).st_size
        os.fsync(fd)
    assert 0 < written < LIMIT + RESERVE
    disk.expect_whole()
    assert (disk.point / "huge").read_bytes() == data[:written]


@each_fs
def test_free_space_follows_the_present_ratio(disk: Full) -> None:
    """Data of a quarter its size fills the pool, not the bound that was set before anybody knew it."""
    assert disk.available() < 1.5 * LIMIT
    block = compressible(MIB, 4)
    path = disk.point / "quarter"

    def is_full() -> bool:
        """On btrfs a fast writer is ahead of the bound, and gets the rest a moment later."""
        fill_one(path, MIB, block)
        return disk.used() > 0.9 * LIMIT

    wait_until(is_full, "the pool is full", 10 if disk.fstype == "btrfs" else 0.1)
    assert path.stat().st_size > 2.5 * LIMIT
    disk.expect_whole()


@each_fs
def test_incompressible_data_after_compressible_ends_with_enospc(disk: Full) -> None:
    fill_one(disk.point / "eighth", MIB, compressible(MIB, 8), 60 * MIB)
    sync_file_system(disk.point)
    fill_one(disk.point / "random", MIB)
    disk.expect_whole()
    assert disk.governor()["freezes"] == "0"


@each_fs
def test_deleting_and_writing_at_once_does_not_outrun_the_governor(disk: Full) -> None:
    for _ in range(3):
        fill_one(disk.point / "big", MIB)
        (disk.point / "big").unlink(missing_ok=True)  # the next one may come before the commit
    disk.expect_whole()


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_overwriting_by_what_does_not_compress_waits_for_room_and_loses_nothing(disk: Full) -> None:
    """The file system has given these blocks out long ago, so it is frozen, until the limit is raised."""
    path, pieces = disk.point / "old database", 60
    fill_one(path, MIB, compressible(MIB, 8), pieces * MIB)
    sync_file_system(disk.point)
    data = [os.urandom(MIB) for _ in range(pieces)]

    with opened(path, os.O_WRONLY) as fd:
        def overwrite() -> None:
            for number, piece in enumerate(data):
                os.pwrite(fd, piece, number * MIB)

        writer = threading.Thread(target=overwrite, daemon=True)
        writer.start()
        wait_until(lambda: disk.state() == "frozen", "the file system is frozen", 30)
        assert writer.is_alive()
        [row] = rows(disk.point, "-o", "STATE", code=1)
        assert row["state"] == "frozen"
        assert "; it is frozen, and writers wait: raise mem_limit" in disk.device.read("control")
        assert 'zramfs_governor_state{device="' in disk.device.read("metrics")
        disk.device.write("control", f"mem_limit={3 * LIMIT}")
        writer.join(60)
        assert not writer.is_alive()
        os.fsync(fd)
    wait_until(lambda: disk.state() == "on", "it goes on")
    disk.expect_whole()
    assert path.read_bytes() == b"".join(data)
    said = (Path(state_of(disk.point).disk).parent / "log").read_text()
    assert f"{disk.point} is frozen: " in said
    assert f"{disk.point} goes on: there is room" in said


def test_overwriting_on_btrfs_is_enospc_since_it_needs_new_blocks(tmp_path: Path) -> None:
    require("btrfs")
    with ram_disk(tmp_path / "disk", "btrfs", SIZES["btrfs"], LIMIT) as disk:
        disk.keep(200, 5000)
        path = disk.point / "old database"
        fill_one(path, MIB, compressible(MIB, 8), 60 * MIB)
        sync_file_system(disk.point)
        with opened(path, os.O_WRONLY) as fd:
            def overwrite() -> None:
                for number in range(60):
                    try:
                        os.pwrite(fd, os.urandom(MIB), number * MIB)
                    except OSError as error:
                        assert error.errno == errno.ENOSPC, error
                        return

            writer = threading.Thread(target=overwrite, daemon=True)
            writer.start()
            writer.join(20)
            if writer.is_alive():  # it was faster than that, and is frozen
                disk.device.write("control", f"mem_limit={3 * LIMIT}")
                writer.join(60)
            assert not writer.is_alive()
        disk.expect_whole()


@each_fs
def test_a_limit_lowered_under_load_is_enospc_for_new_data_and_no_more(disk: Full) -> None:
    stop, full = threading.Event(), threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            try:
                (disk.point / f"load{number % 700}").write_bytes(os.urandom(50_000))
                number += 1
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                full.set()
                time.sleep(0.01)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        wait_until(lambda: disk.used() > 25 * MIB, "25 MiB are stored", 30)
        disk.device.write("control", f"mem_limit={15 * MIB}")
        used = disk.used()  # what was written until then, however long this thread had to wait
        assert full.wait(60)
        time.sleep(0.5)
    finally:
        stop.set()
        writer.join(60)
    assert disk.used() < used + RESERVE
    disk.expect_whole()
    assert disk.governor()["freezes"] == "0"


@each_fs
def test_what_waits_in_the_page_cache_is_bounded_and_the_bound_ends_with_the_mount(disk: Full) -> None:
    assert abs(bdi.waiting(disk.loop) - RESERVE // 4) < MIB
    number = Path(f"/sys/block/{Path(disk.loop).name}/dev").read_text().strip()
    strict = Path(f"/sys/class/bdi/{number}/strict_limit")
    assert strict.read_text() == "1\n"
    unmount(disk.point)
    wait_until(lambda: can_claim(disk.loop), "the file system has ended", 40)
    wait_until(lambda: strict.read_text() == "0\n", "the bound is gone")
    assert bdi.waiting(disk.loop) > 100 * MIB
    run("mount", disk.loop, disk.point)
    disk.device.write("control", "govern=on")
    assert disk.state() == "on"


def test_without_a_limit_nothing_is_withheld_or_bounded(tmp_path: Path) -> None:
    require("ext4")
    with ram_disk(tmp_path / "disk", "ext4", 64 * MIB, 0) as disk:
        assert disk.state() == "on"
        assert bdi.waiting(disk.loop) > 100 * MIB
        assert disk.available() > 55 * MIB
        disk.device.write("control", f"mem_limit={20 * MIB}")
        wait_until(lambda: disk.available() < 25 * MIB, "the limit is kept to")
        disk.device.write("control", "mem_limit=0")
        wait_until(lambda: disk.available() > 55 * MIB, "all of it is free")


@pytest.mark.parametrize("fstype", ["ext4", "btrfs"])
def test_a_warden_that_is_killed_is_replaced(disk: Full) -> None:
    daemon = state_of(disk.point).pid
    [warden] = children(daemon)
    os.kill(warden, signal.SIGKILL)
    wait_until(lambda: children(daemon) not in ([], [warden]) and disk.state() == "on", "another governs", 20)
    fill_one(disk.point / "big", MIB)
    disk.expect_whole()
    disk.device.write("control", "govern=off")
    wait_until(lambda: not children(daemon) and disk.state() == "off", "it is let go")
    time.sleep(0.5)
    assert disk.state() == "off"

    def is_given_back() -> bool:
        sync_file_system(disk.point)  # btrfs counts it with its next commit, which is 30 s away
        return disk.available() > 3 * LIMIT

    wait_until(is_given_back, "all is the users' again", 40)
    disk.device.write("control", "govern=on")
    wait_until(lambda: disk.available() < LIMIT, "it is governed again", 40)


@pytest.mark.parametrize("fstype", ["ext4"])
def test_what_a_killed_warden_left_frozen_is_thawed(disk: Full) -> None:
    path = disk.point / "old database"
    fill_one(path, MIB, compressible(MIB, 8), 60 * MIB)
    sync_file_system(disk.point)
    with opened(path, os.O_WRONLY) as fd:
        writer = threading.Thread(
            target=lambda: [os.pwrite(fd, os.urandom(MIB), n * MIB) for n in range(60)], daemon=True)
        writer.start()
        wait_until(lambda: disk.state() == "frozen", "the file system is frozen", 30)
        disk.device.write("control", f"mem_limit={3 * LIMIT}")
        daemon = state_of(disk.point).pid
        for warden in children(daemon):
            os.kill(warden, signal.SIGKILL)
        writer.join(60)
        assert not writer.is_alive()
    wait_until(lambda: disk.state() == "on", "another governs", 20)
    disk.expect_whole()


def with_a_file(tmp_path: Path, fstype: str) -> Path:
    """The mount point of a RAM disk that the test takes down."""
    require(fstype)
    point = tmp_path / "disk"
    zramfs("ramdisk", point, "--size", SIZES[fstype], "--mem-limit", LIMIT, "--fs", fstype)
    (point / "file").write_bytes(os.urandom(MIB))
    return point


@pytest.mark.parametrize("frozen", [False, True])
@each_fs
def test_a_daemon_that_is_killed_leaves_no_warden_and_nothing_that_hangs(
    tmp_path: Path, fstype: str, frozen: bool
) -> None:
    point = with_a_file(tmp_path, fstype)
    state = state_of(point)
    [warden] = children(state.pid)
    if frozen:
        run("fsfreeze", "--freeze", point)
    kill_daemon(state)
    zramfs("stop", point)
    wait_until(lambda: not Path(f"/proc/{warden}").exists(), "the warden has ended", 20)
    assert not rundir.find(str(point))
    assert not loops.stands_on(state.loop, Path(state.disk), state.attached)


@each_fs
def test_a_file_system_that_somebody_froze_does_not_hold_the_end_up(tmp_path: Path, fstype: str) -> None:
    """On xfs and btrfs nothing that was withheld can be given back before the thaw."""
    point = with_a_file(tmp_path, fstype)
    state = state_of(point)
    run("fsfreeze", "--freeze", point)
    os.kill(state.pid, signal.SIGTERM)
    wait_until(lambda: not state.alive(), "the daemon has ended", 15)
    assert not rundir.find(str(point))
    assert not loops.stands_on(state.loop, Path(state.disk), state.attached)


@each_fs
def test_stop_does_not_wait_for_what_somebody_froze(tmp_path: Path, fstype: str) -> None:
    point = with_a_file(tmp_path, fstype)
    run("fsfreeze", "--freeze", point)
    begin = time.monotonic()
    zramfs("stop", point)
    assert time.monotonic() - begin < 28, "a warden is waited for for 30"


def test_everybody_may_fill_the_example_configurations_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[build] of docs/zramfs.conf.example, in small: mode 1777 and a limit."""
    require("ext4")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:-1]:
        if parent.stat().st_uid == 0 and parent.is_relative_to(os.environ["TMPDIR"]):
            parent.chmod(0o755)
    (tmp_path / "etc/zramfs").mkdir(parents=True)
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    point = tmp_path / "build"
    (tmp_path / "etc/zramfs/build.conf").write_text(
        f"mount-point = {point}\nzram-size = 256\nzram-resident-limit = 40\n"
        "options = discard,noatime,nosuid\nmode = 1777\n")
    zramfs("up")
    try:
        (point / "root's").write_text("kept")
        nobody = pwd.getpwnam("nobody")
        filling = 'n=0; while head -c 30000 /dev/urandom > "$0/$n"; do n=$((n + 1)); done'
        done = subprocess.run(
            ["sh", "-c", filling, str(point)], user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[],
            capture_output=True, text=True, timeout=180)
        assert "No space left on device" in done.stderr
        sync_file_system(point)
        forget_pages()
        assert (point / "root's").read_text() == "kept"
        for path in point.iterdir():
            if path.name.isdecimal():
                path.unlink()
        (point / "more").write_bytes(os.urandom(10 * MIB))
        sync_file_system(point)
    finally:
        zramfs("down")


def children(pid: int) -> list[int]:
    found = []
    for each in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            found += [int(word) for word in each.read_text().split()]
    return found
