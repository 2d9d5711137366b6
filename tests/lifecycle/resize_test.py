# SPDX-License-Identifier: Apache-2.0
"""`zramfs resize`: devices and file systems in use become larger and smaller, and every step that fails
leaves layers that fit each other."""
from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.capabilities import require
from tests.support.child import has_ended
from tests.support.commands import child, failure, kill_daemon, rows, state_of
from tests.support.governed import end_file_system, sync_file_system
from tests.support.scale import scaled
from tests.support.whole import (
    KIB,
    MIB,
    ZRAMFS,
    Device,
    device,
    loop,
    opened,
    run,
    tool_environment,
    wait_until,
    zramfs,
)
from zramfs.errors import ZramfsError
from zramfs.host import loops, process
from zramfs.host.machine import Machine
from zramfs.lifecycle import file_system_size, ramdisk, resize, rundir

pytestmark = [pytest.mark.requires("root", "fuse", "loop"), pytest.mark.timeout(240)]
LIVE_EXT4 = Machine().capable("CAP_SYS_RESOURCE")
FSCK = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n"), "btrfs": ("btrfs", "check", "--readonly")}


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@contextmanager
def ram_disk(point: Path, fs: str, size: str, *options: str) -> Iterator[Path]:
    require(fs)
    zramfs("ramdisk", point, "--size", size, "--fs", fs, *options)
    try:
        yield point
    finally:
        if rundir.find(str(point)):
            zramfs("stop", point)


def how(fs: str) -> list[str]:
    """What growth needs beside the size, where the machine lacks a right."""
    return ["--unmount"] if fs == "ext4" and not LIVE_EXT4 else []


def sizes(point: Path) -> tuple[int, int, int]:
    """Of the device, its loop device, and the file system, in bytes."""
    state = state_of(point)
    seen = os.statvfs(point)
    return resize.device_size(state), loops.size(state.loop), seen.f_blocks * seen.f_frsize


def expect_sizes(point: Path, size: int) -> None:
    """All layers have it, and all that speaks of it says so."""
    of_device, of_loop, of_fs = sizes(point)
    assert (of_device, of_loop) == (size, size)
    assert 0.75 * size < of_fs <= size
    assert os.stat(state_of(point).disk).st_size == size
    assert state_of(point).size == size
    assert json.loads((rundir.find(str(point)).path / "state.json").read_text())["size"] == size
    assert rows(point, "--bytes", "--output", "DISKSIZE") == [{"disksize": size}]


# A MiB of data for each MiB of a large file, or its first part where tests/support/scale.py wants a part.
# The file has its blocks all the same.
LARGE = os.urandom(scaled(MIB, 32 * KIB))


def write_large(path: Path, mib: int) -> None:
    with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
        os.posix_fallocate(fd, 0, mib * MIB)
        for number in range(mib):
            os.pwrite(fd, number.to_bytes(8) + LARGE[8:], number * MIB)


def is_large(path: Path, mib: int) -> bool:
    """Read from the device again."""
    with opened(path, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(fd).st_size == mib * MIB and all(
            os.pread(fd, len(LARGE), number * MIB) == number.to_bytes(8) + LARGE[8:] for number in range(mib))


# ---- under load -------------------------------------------------------------------------------------

FIO = ("fio", "--name=load", "--rw=randwrite", "--bs=4k-64k", "--verify=crc32c", "--verify_fatal=1",
       "--verify_state_save=0", "--size=24M", "--buffer_compress_percentage=40", "--refill_buffers",
       "--minimal", "--eta=never")


@contextmanager
def load(point: Path) -> Iterator[None]:
    """fio writes and verifies meanwhile, again and again; a wrong byte ends it with an error."""
    require("fio")
    over = threading.Event()
    ended: list[subprocess.CompletedProcess[str]] = []

    def work() -> None:
        while not over.is_set() and not (ended and ended[-1].returncode):
            ended.append(subprocess.run(
                [*FIO, f"--filename={point}/load"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, env=tool_environment(), timeout=100, check=False))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(100)
    assert ended and not thread.is_alive()
    assert all(each.returncode == 0 for each in ended), ended[-1]


@pytest.mark.parametrize(("fs", "size"), [("ext4", 128), ("xfs", 300), ("btrfs", 256)])
def test_a_file_system_grows_while_fio_writes_and_verifies(tmp_path: Path, fs: str, size: int) -> None:
    if how(fs):
        require("sys_resource")  # else the kernel does not let a mounted ext4 grow
    with ram_disk(tmp_path / "disk", fs, f"{size}M") as point:
        with load(point):
            for more in (size + 202, 1024, 4096):
                zramfs("resize", point, f"{more}M")
                expect_sizes(point, more * MIB)
        # Data reaches into the new part.
        write_large(point / "large", size + 100)
        sync_file_system(point)
        assert is_large(point / "large", size + 100)
        assert Device(Path(state_of(point).directory)).io_stat()["failed_writes"] == 0
        block = state_of(point).loop
        ramdisk.let_go(Path(state_of(point).directory))
        end_file_system(point, fs, block)
        run(*FSCK[fs], block, timeout=60)
        run("mount", block, point)


def test_btrfs_grows_and_shrinks_while_fio_writes_and_verifies(tmp_path: Path) -> None:
    with ram_disk(tmp_path / "disk", "btrfs", "512M") as point, load(point):
        for size in (1024, 400):
            zramfs("resize", point, f"{size}M")
            expect_sizes(point, size * MIB)


@pytest.mark.parametrize("smaller", [64, 96])
def test_ext4_becomes_smaller_with_unmount_and_keeps_its_files(tmp_path: Path, smaller: int) -> None:
    with ram_disk(tmp_path / "disk", "ext4", "64M") as point:
        os.chmod(point, 0o751)
        (point / "file").write_text("text " * 100_000)
        zramfs("resize", point, "256M", *how("ext4"))
        expect_sizes(point, 256 * MIB)
        filler = os.urandom(40 * MIB)
        (point / "filler").write_bytes(filler)
        assert "--unmount" in failure("resize", point, f"{smaller}M")
        expect_sizes(point, 256 * MIB)
        zramfs("resize", point, f"{smaller}M", "--unmount")
        expect_sizes(point, smaller * MIB)
        assert (point / "file").read_text() == "text " * 100_000
        assert (point / "filler").read_bytes() == filler
        assert os.stat(point).st_mode & 0o777 == 0o751
        governor = Path(state_of(point).directory) / "memory/governor"
        wait_until(lambda: governor.read_text().startswith("state on\n"), "the governor", 30)
        assert "discard" in run("findmnt", "-no", "OPTIONS", point).stdout


def test_a_file_system_in_use_is_not_unmounted_for_it(tmp_path: Path) -> None:
    with ram_disk(tmp_path / "disk", "ext4", "64M") as point:
        (point / "file").write_text("open")
        with child("f = open(sys.argv[1])", point / "file") as pid:
            said = failure("resize", point, "32M", "--unmount")
            assert str(pid) in said and "nothing was changed" in said
        expect_sizes(point, 64 * MIB)
        assert (point / "file").read_text() == "open"


def test_xfs_never_becomes_smaller(tmp_path: Path) -> None:
    with ram_disk(tmp_path / "disk", "xfs", "400M") as point:
        for option in ([], ["--unmount"]):
            assert "xfs cannot be made smaller" in failure("resize", point, "300M", *option)
        expect_sizes(point, 400 * MIB)


def test_btrfs_is_not_asked_for_less_than_it_can_be(tmp_path: Path) -> None:
    with ram_disk(tmp_path / "disk", "btrfs", "300M") as point:
        assert "btrfs takes at least 256M" in failure("resize", point, "254M")
        expect_sizes(point, 300 * MIB)


@pytest.mark.parametrize(("fs", "option"), [("ext4", ["--unmount"]), ("btrfs", [])])
def test_data_that_does_not_fit_stays_and_so_does_every_size(
    tmp_path: Path, fs: str, option: list[str],
) -> None:
    with ram_disk(tmp_path / "disk", fs, "512M") as point:
        write_large(point / "large", 300)
        sync_file_system(point)
        said = failure("resize", point, "260M", *option)
        assert "failed: " in said
        expect_sizes(point, 512 * MIB)
        assert is_large(point / "large", 300)
        # It is all still there to be resized.
        zramfs("resize", point, "640M", *how(fs))
        expect_sizes(point, 640 * MIB)


# ---- what manages the memory --------------------------------------------------------------------------

@pytest.mark.parametrize(("fs", "size"), [("xfs", 320), ("btrfs", 256)])
def test_a_file_system_that_grew_is_still_kept_within_the_limit(tmp_path: Path, fs: str, size: int) -> None:
    """The limit stays, so that the new blocks are no room for data that does not compress."""
    with ram_disk(tmp_path / "disk", fs, f"{size}M", "--mem-limit", "40M") as point:
        zramfs("resize", point, "1G")
        expect_sizes(point, 1024 * MIB)
        written = 0
        with opened(point / "big", os.O_WRONLY | os.O_CREAT) as fd, pytest.raises(OSError) as full:
            while True:
                written += os.write(fd, os.urandom(MIB))
        assert full.value.errno == errno.ENOSPC and 25 * MIB < written < 70 * MIB
        sync_file_system(point)
        assert Device(Path(state_of(point).directory)).io_stat()["failed_writes"] == 0


def test_btrfs_gets_back_what_is_withheld_of_it_to_become_smaller(tmp_path: Path) -> None:
    """Of 1 GiB most blocks are withheld, by files that would have to move to where there is no room."""
    with ram_disk(tmp_path / "disk", "btrfs", "1G", "--mem-limit", "64M") as point:
        (point / "file").write_bytes(os.urandom(20 * MIB))
        sync_file_system(point)
        zramfs("resize", point, "320M")
        expect_sizes(point, 320 * MIB)
        wait_until(lambda: os.statvfs(point).f_bavail * 4096 < 120 * MIB, "what was lent is withheld again")


# ---- plain devices ------------------------------------------------------------------------------------

def test_a_plain_device_grows_under_the_loop_device_of_its_user(tmp_path: Path) -> None:
    with device(tmp_path / "z", 64 * MIB) as z, loop(z.disk) as block:
        said = zramfs("resize", tmp_path / "z", "128M").stderr
        assert f"note: {block} grows with its device" in said
        assert (loops.size(block), os.stat(z.disk).st_size) == (128 * MIB, 128 * MIB)
        assert f"{block} stands on" in failure("resize", tmp_path / "z", "32M")
        assert os.stat(z.disk).st_size == 128 * MIB


def test_a_plain_device_keeps_data_behind_the_new_end_unless_it_may_go(tmp_path: Path) -> None:
    with device(tmp_path / "z", 64 * MIB) as z:
        with opened(z.disk, os.O_WRONLY) as fd:
            os.pwrite(fd, b"front", 0)
            os.pwrite(fd, b"behind", 40 * MIB)
        assert "pages are stored behind 33554432 bytes" in failure("resize", tmp_path / "z", "32M")
        assert z.read("zram/disksize") == f"{64 * MIB}\n"
        zramfs("resize", tmp_path / "z", "32M", "--discard")
        assert os.stat(z.disk).st_size == 32 * MIB
        with opened(z.disk, os.O_RDWR) as fd:
            assert os.pread(fd, 5, 0) == b"front"
            assert os.pread(fd, 5, 40 * MIB) == b""
            with pytest.raises(OSError):
                os.pwrite(fd, b"x", 40 * MIB)


def test_an_open_and_mapped_disk_grows(tmp_path: Path) -> None:
    """Programs that have it open see the new size, and a mapping made after it reaches into the new part."""
    import mmap

    with device(tmp_path / "z", 4 * MIB) as z, opened(z.disk, os.O_RDWR) as fd:
        with mmap.mmap(fd, 4 * MIB) as old:
            old[:5] = b"first"
            zramfs("resize", tmp_path / "z", "16M")
            assert os.fstat(fd).st_size == 16 * MIB and os.lseek(fd, 0, os.SEEK_END) == 16 * MIB
            with mmap.mmap(fd, 16 * MIB) as new:
                new[16 * MIB - 4:] = b"last"
                new.flush()
                assert old[:5] == new[:5] == b"first"
        assert os.pread(fd, 4, 16 * MIB - 4) == b"last"


def test_no_size_beyond_the_room_and_none_for_swap_or_a_dead_device(tmp_path: Path) -> None:
    with device(tmp_path / "z", 4 * MIB):
        assert "expected a size of 1 to" in failure("resize", tmp_path / "z", "1P")
        assert "0 is too small" in failure("resize", tmp_path / "z", "0", code=2).replace("'", "")
    zramfs("create", tmp_path / "y", "--size", "4M")
    kill_daemon(state_of(tmp_path / "y"))
    assert "zramfs stop" in failure("resize", tmp_path / "y", "8M")
    zramfs("stop", tmp_path / "y")
    assert "no zramfs device" in failure("resize", tmp_path / "nothing", "8M")


def test_what_is_configured_is_named_where_it_says_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    (tmp_path / "etc/zramfs").mkdir(parents=True)
    (tmp_path / "etc/zramfs/plain.conf").write_text(f"directory = {tmp_path}/plain\nzram-size = 16\n")
    zramfs("up", "plain")
    try:
        said = zramfs("resize", "plain", "32M").stderr
        assert "plain has 32M\n" in said and "makes plain with 16M again" in said
        assert "note: " not in zramfs("resize", "plain", "16M").stderr
        zramfs("resize", "plain", "64M")
    finally:
        zramfs("down", "plain")
    zramfs("up", "plain")
    assert resize.device_size(state_of(tmp_path / "plain")) == 16 * MIB
    zramfs("down", "plain")


# ---- steps that fail ------------------------------------------------------------------------------------

def fail(*_: object, **__: object) -> None:
    raise ZramfsError(errno.EIO, "this step fails")


@pytest.mark.parametrize(("fs", "larger"), [("ext4", True), ("ext4", False), ("btrfs", False)])
@pytest.mark.parametrize("step", ["file system", "device", "loop"])
def test_each_step_that_fails_leaves_layers_that_fit_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fs: str, larger: bool, step: str,
) -> None:
    with ram_disk(tmp_path / "disk", fs, "400M") as point:
        (point / "file").write_text("kept")
        found = rundir.find(str(point))
        wanted = (512 if larger else 300) * MIB
        send = resize._send

        def refuse_the_first(state: rundir.State, line: str) -> None:
            if line.startswith(f"resize={wanted}"):
                fail()
            send(state, line)

        with monkeypatch.context() as patch:
            if step == "device":
                patch.setattr(resize, "_send", refuse_the_first)
            elif step == "loop":
                follow = loops.follow_size
                patch.setattr(loops, "follow_size", lambda device, disk, size, **more: (
                    fail() if size == wanted else follow(device, disk, size, **more)))
            else:
                for name in ("grow_mounted", "shrink_mounted", "resize_unmounted"):
                    patch.setattr(file_system_size, name, fail)
            with pytest.raises(ZramfsError, match="this step fails"):
                resize.resize_device(found, wanted, lambda _: None, unmount=True)
        of_device, of_loop, of_fs = sizes(point)
        assert of_fs <= of_loop <= of_device
        if step != "file system" or not larger:
            assert of_device == of_loop == 400 * MIB, "nothing was changed"
        else:
            assert of_device == of_loop == state_of(point).size == wanted
        assert (point / "file").read_text() == "kept"
        # The same command succeeds when the cause is gone.
        assert resize.resize_device(found, wanted, lambda _: None, unmount=True) == wanted
        expect_sizes(point, wanted)
        assert (point / "file").read_text() == "kept"


# In place of e2fsck: has the device for itself, says so, and begins when it may, if its parent still lives.
GATED_CHECK = """#!{python} -S
import os, sys, time
parent, device = os.getppid(), os.open(sys.argv[-1], os.O_RDWR | os.O_EXCL)
open({there!r}, "w").close()
while not os.path.exists({go!r}):
    time.sleep(0.01)
os.close(device)
if os.getppid() == parent:
    os.execv({real!r}, sys.argv)
"""


@pytest.mark.parametrize("victim", ["command", "worker"])
def test_a_kill_of_either_process_leaves_the_file_system_mounted(tmp_path: Path, victim: str) -> None:
    with ram_disk(tmp_path / "disk", "ext4", "400M") as point:
        (point / "file").write_text("kept")
        loop = state_of(point).loop
        there, go, program = tmp_path / "there", tmp_path / "go", tmp_path / "bin/e2fsck"
        program.parent.mkdir()
        program.write_text(GATED_CHECK.format(
            python=sys.executable, there=str(there), go=str(go), real=shutil.which("e2fsck")))
        program.chmod(0o755)
        command = subprocess.Popen(
            [*ZRAMFS, "resize", point, "300M", "--unmount"], stderr=subprocess.PIPE,
            env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"})
        wait_until(lambda: there.exists() or command.poll() is not None, "it is unmounted, and checked", 30)
        assert ramdisk.places(loop) == []
        [worker] = process.children_of(command.pid)
        os.kill(command.pid if victim == "command" else worker, signal.SIGKILL)
        wait_until(lambda: has_ended(command.pid if victim == "command" else worker), "its end", 30)
        go.touch()
        wait_until(lambda: not os.path.exists(f"/proc/{worker}"), "the end of the work", 60)
        said = command.communicate(timeout=60)[1].decode()
        wait_until(lambda: ramdisk.places(loop) == [point], "it is mounted again", 60)
        assert (point / "file").read_text() == "kept"
        assert victim == "command" or "was killed" in said
        governor = Path(state_of(point).directory) / "memory/governor"
        wait_until(lambda: governor.read_text().startswith("state on\n"), "the governor", 30)
        zramfs("resize", point, "300M", "--unmount")
        expect_sizes(point, 300 * MIB)


def test_a_second_resize_waits_for_nobody(tmp_path: Path) -> None:
    with device(tmp_path / "z", 4 * MIB):
        with rundir.find(str(tmp_path / "z")).changing():
            said = failure("resize", tmp_path / "z", "8M")
            assert "another `zramfs resize` or `zramfs upgrade` is at work" in said
        zramfs("resize", tmp_path / "z", "8M")


def test_a_file_system_that_is_not_mounted_changes_nothing(tmp_path: Path) -> None:
    with ram_disk(tmp_path / "disk", "ext4", "64M") as point:
        state = state_of(point)
        ramdisk.let_go(Path(state.directory))
        run("umount", point)
        assert "nothing was changed" in failure("resize", point, "128M", *how("ext4"))
        assert resize.device_size(state) == loops.size(state.loop) == 64 * MIB
        run("mount", state.loop, point)
