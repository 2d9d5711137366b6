# SPDX-License-Identifier: Apache-2.0
"""RAM disks: the way up, the way down, and the way back from every step that fails."""
from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.capabilities import require
from tests.support.commands import failure, is_attached, kill_daemon, nothing_left, state_of
from tests.support.governed import sync_file_system
from tests.support.whole import (
    MIB,
    ZRAMFS,
    Device,
    drop_caches,
    loop,
    opened,
    run,
    unmount,
    wait_until,
    zramfs,
)
from zramfs.errors import ZramfsError
from zramfs.host import mounts, programs
from zramfs.lifecycle import ramdisk, rundir

pytestmark = [pytest.mark.requires("root", "fuse", "loop", "ext4"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A RAM disk of 64 MiB with ext4, taken down if the test has not done that."""
    point = tmp_path / "disk"
    zramfs("ramdisk", point, "--size", "64M")
    try:
        yield point
    finally:
        if rundir.find(str(point)):
            zramfs("stop", point)


def gone(point: Path, base: Path) -> None:
    """As nothing_left, and the directory that ramdisk made is gone too."""
    assert not point.exists()
    nothing_left(point, base)


def daemon_of(point: Path) -> Device:
    return Device(Path(state_of(point).directory))


@pytest.mark.parametrize(("fs", "size"), [("ext4", 64), ("xfs", 300), ("btrfs", 128)])
def test_a_file_system_from_one_command(tmp_path: Path, base: Path, fs: str, size: int) -> None:
    require(fs)
    point = tmp_path / "disk with blank"
    done = zramfs("ramdisk", point, "--size", f"{size}M", "--fs", fs, "--algo", "zstd")
    assert (done.stdout, done.stderr) == ("", "")
    try:
        state = state_of(point)
        mount = mounts.mount_at(point)
        assert (mount.fstype, mount.source) == (fs, state.loop)
        assert (state.kind, state.phase, state.fs) == ("ramdisk", "ready", fs)
        options = run("findmnt", "-no", "OPTIONS", point).stdout.strip().split(",")
        assert any(option.startswith("discard") for option in options)
        queue = Path(f"/sys/block/{Path(state.loop).name}")
        assert (queue / "queue/logical_block_size").read_text() == "4096\n"
        assert (queue / "loop/dio").read_text() == "1\n"
        (point / "file").write_text("text " * 100_000)
        drop_caches(point)
        assert (point / "file").read_text() == "text " * 100_000
        shown = json.loads(zramfs("status", point, "--json", "-o", "MOUNTPOINT,ALGORITHM,STATE").stdout)
        assert shown == {"zramfs": [{"mountpoint": str(point), "algorithm": "zstd", "state": "ready"}]}
    finally:
        done = zramfs("stop", point)
    assert (done.stdout, done.stderr) == ("", "")
    gone(point, base)


@pytest.mark.parametrize(("fs", "size"), [("ext4", 64), ("xfs", 300), ("btrfs", 128)])
def test_a_label_options_a_mode_and_words_for_mkfs(tmp_path: Path, base: Path, fs: str, size: int) -> None:
    require(fs)
    point = tmp_path / "disk"
    words = {"ext4": "-N 64", "xfs": "-i 'maxpct=7'", "btrfs": "--nodesize 4096"}[fs]
    done = zramfs("ramdisk", point, "--size", f"{size}M", "--fs", fs, "--label", "my disk", "--name", "fast",
                  "--mode", "1777", "--options", "noatime", "--mkfs-options", words)
    assert done.stderr == ("zramfs: warning: without the option discard the memory of deleted files is not "
                           "given back\n")
    try:
        assert point.stat().st_mode & 0o7777 == 0o1777
        state = state_of(point)
        assert (state.name, state.options) == ("fast", "noatime")
        options, label = run("findmnt", "-nro", "OPTIONS,LABEL", point).stdout.split()
        assert "noatime" in options.split(",") and label == "my\\x20disk"
        if fs == "ext4":
            assert os.statvfs(point).f_files == 64
    finally:
        zramfs("stop", "fast")
    gone(point, base)


@pytest.mark.parametrize(("words", "reason"), [
    (["--label", "x" * 17], "expected a label of 1 to 16 bytes"),
    (["--label", "a/b"], "expected a label of 1 to 16 bytes"),
    (["--fs", "xfs", "--size", "300M", "--label", "x" * 13], "expected a label of 1 to 12 bytes"),
    (["--mode", "888"], "expected an octal mode such as 1777"),
    (["--mkfs-options", "'"], "does not split into words: no closing quotation"),
    (["--options", "a b"], "expected options with commas and without blanks"),
])
def test_what_a_file_system_cannot_have_is_refused_first(
    tmp_path: Path, base: Path, words: list[str], reason: str
) -> None:
    said = failure("ramdisk", tmp_path / "disk", "--size", "64M", *words, code=2)
    assert reason in " ".join(said.split())
    assert not base.exists()


def test_words_that_mkfs_refuses_leave_nothing(tmp_path: Path, base: Path) -> None:
    said = failure("ramdisk", tmp_path / "disk", "--size", "64M", "--mkfs-options", "-O nonsense")
    assert "`mkfs.ext4 " in said and "-O nonsense /dev/loop" in said
    gone(tmp_path / "disk", base)


def test_a_new_ext4_takes_next_to_no_memory(disk: Path) -> None:
    """mkfs neither discards nor zeroes a device that reads as zeros, and writes no journal."""
    assert daemon_of(disk).mm_stat()["orig_data_size"] < MIB
    features = run("dumpe2fs", "-h", state_of(disk).loop).stdout
    assert "has_journal" not in features
    assert "Reserved block count:     0\n" in features


def test_a_deleted_file_gives_its_memory_back(disk: Path) -> None:
    device = daemon_of(disk)
    (disk / "noise").write_bytes(os.urandom(16 * MIB))
    sync_file_system(disk)
    before = device.mm_stat()["mem_used_total"]
    assert before > 16 * MIB
    (disk / "noise").unlink()
    sync_file_system(disk)
    wait_until(lambda: device.mm_stat()["orig_data_size"] < 2 * MIB, "the discards have arrived")
    assert device.mm_stat()["mem_used_total"] < before / 4


def test_stop_names_who_uses_the_file_system_and_changes_nothing(
    disk: Path, tmp_path: Path, base: Path
) -> None:
    (disk / "file").write_text("kept")
    with opened(disk / "file"):
        pass
    code = "import sys; f = open(sys.argv[1]); print('there', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, disk / "file"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            process.stdout.readline()
            done = zramfs("stop", disk, check=False)
            assert done.returncode == 1
            assert f"{disk} is in use, so nothing was changed:\n" in done.stderr
            assert f" (pid {process.pid}) has {disk}/file open\n" in done.stderr
            assert len(done.stderr.splitlines()) == 2
            assert (disk / "file").read_text() == "kept"
        finally:
            process.kill()
    (disk / "below").mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", disk / "below")
    other = tmp_path / "other"
    other.mkdir()
    run("mount", "--bind", disk, other)
    try:
        said = zramfs("stop", disk, check=False).stderr
        assert f"  {disk}/below (tmpfs) is mounted below it\n" in said
        assert f"  {state_of(disk).loop} is mounted on {other}\n" in said
    finally:
        run("umount", disk / "below")
        run("umount", other)
    zramfs("stop", disk)
    gone(disk, base)


def test_stop_by_name_and_after_somebody_unmounted_it(disk: Path, base: Path) -> None:
    name = state_of(disk).name
    unmount(disk)
    assert daemon_of(disk).read("zram/initstate") == "1\n"
    refused = zramfs("ramdisk", disk, "--size", "64M", check=False)
    assert f"a zramfs device is there on {disk} " in refused.stderr
    zramfs("stop", name)
    gone(disk, base)


def test_a_second_ram_disk_is_refused(disk: Path) -> None:
    for command in ("ramdisk", "create"):
        done = zramfs(command, disk, "--size", "64M", check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"a zramfs device is there on {disk} " in done.stderr
    assert ramdisk.mounted(state_of(disk).loop, disk)


def test_a_mkfs_that_fails_undoes_everything_and_is_quoted(tmp_path: Path, base: Path) -> None:
    """mkfs.ext4 is a script that fails, which stands first in PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mkfs.ext4").write_text("#!/bin/sh\necho 'no file system today' >&2\nexit 1\n")
    (tmp_path / "bin/mkfs.ext4").chmod(0o755)
    point = tmp_path / "disk"
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = run(*ZRAMFS, "ramdisk", point, "--size", "16M", check=False, env={**os.environ, "PATH": path})
    assert done.returncode == 1
    assert "zramfs: `mkfs.ext4 -q -F" in done.stderr and "` failed: no file system today" in done.stderr
    gone(point, base)


def test_a_size_that_is_too_small_for_the_file_system_is_refused(tmp_path: Path, base: Path) -> None:
    point = tmp_path / "disk"
    for fs, size, least in (("xfs", "299M", "300M"), ("btrfs", "44M", "45M"), ("ext4", "100K", "200K")):
        said = failure("ramdisk", point, "--size", size, "--fs", fs, code=2)
        assert f"{fs} needs at least {least}" in said and f"got --size {size}" in said, said
    assert not point.exists()


@pytest.mark.parametrize("fs", sorted(ramdisk.MKFS))
def test_the_least_size_of_each_file_system_is_enough(fs: str, tmp_path: Path) -> None:
    require(fs)
    with open(tmp_path / "image", "wb") as image:
        image.truncate(ramdisk.MIN_SIZE[fs])
    ramdisk.make_file_system(fs, str(tmp_path / "image"))


def test_a_mount_that_fails_undoes_everything_and_is_quoted(tmp_path: Path, base: Path) -> None:
    """mount is a script that fails, which stands first in PATH."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mount").write_text("#!/bin/sh\necho 'no mount today' >&2\nexit 32\n")
    (tmp_path / "bin/mount").chmod(0o755)
    point = tmp_path / "disk"
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = run(*ZRAMFS, "ramdisk", point, "--size", "16M", check=False, env={**os.environ, "PATH": path})
    assert done.returncode == 1
    assert "` failed: no mount today" in done.stderr
    gone(point, base)


@pytest.mark.parametrize("trap", ["ln -s {0}/victim {0}/his/disk", "mv {0}/victim {0}/his/disk"])
def test_nobody_is_given_another_directory_by_a_rename_after_the_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    """Whose parent directory it is may put another directory in the place of the file system."""
    (tmp_path / "victim").mkdir(mode=0o700)
    (tmp_path / "his/disk").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    script = f'{shutil.which("mount")} "$@" && mv {{0}}/his {{0}}/moved && mkdir {{0}}/his && {trap}'
    (tmp_path / "bin/mount").write_text(f"#!/bin/sh\n{script.format(tmp_path)}\n")
    (tmp_path / "bin/mount").chmod(0o755)
    (tmp_path / "image").touch()
    os.truncate(tmp_path / "image", 16 * MIB)
    wanted = ramdisk.FileSystem("ext4", tmp_path / "his/disk", mode=0o777, owner=65534)
    with loop(tmp_path / "image") as device:
        ramdisk.make_file_system("ext4", device)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
            with pytest.raises(ZramfsError, match="something else is there now, so it was taken away again"):
                ramdisk.mount(wanted, device)
        assert ramdisk.places(device) == []
    seen = (tmp_path / "his/disk").stat()
    assert (stat.S_IMODE(seen.st_mode), seen.st_uid) == (0o700, 0)


@pytest.mark.parametrize("program", ["losetup", "mount", "mkfs.ext4"])
def test_a_missing_program_is_named_before_anything_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    for other in {"losetup", "mount", "mkfs.ext4"} - {program}:
        (tmp_path / other).symlink_to("/bin/true")
    monkeypatch.setattr(programs, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    sentence = f"a RAM disk with ext4 needs {program}, which is in none of {tmp_path}"
    with pytest.raises(ZramfsError, match=sentence):
        ramdisk.expect_able("ext4")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_ramdisk_leaves_nothing(tmp_path: Path, base: Path, how: signal.Signals) -> None:
    """mkfs takes for ever, and the signal comes in the middle of it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/mkfs.ext4").write_text(f"#!/bin/sh\ntouch {tmp_path}/there\nexec sleep 600\n")
    (tmp_path / "bin/mkfs.ext4").chmod(0o755)
    point = tmp_path / "disk"
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    with subprocess.Popen(
        [*ZRAMFS, "ramdisk", point, "--size", "16M"], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until((tmp_path / "there").exists, "mkfs runs", 30)
            time.sleep(0.1)
            process.send_signal(how)
            assert process.wait(60) == 128 + how
            assert process.stderr.read() == "zramfs: interrupted\n"
        finally:
            process.kill()
    gone(point, base)


def test_the_end_of_the_daemon_takes_the_file_system_down(disk: Path, base: Path) -> None:
    """As at shutdown: SIGTERM to everybody."""
    state = state_of(disk)
    (disk / "file").write_text("dirty")
    os.kill(state.pid, signal.SIGTERM)
    wait_until(lambda: not state.alive(), "the daemon has ended", 30)
    gone(disk, base)


def test_the_end_of_the_daemon_under_users_leaves_nothing_either(disk: Path, base: Path) -> None:
    state = state_of(disk)
    (disk / "file").write_text("text")
    with opened(disk / "file") as fd:
        os.kill(state.pid, signal.SIGTERM)
        wait_until(lambda: not state.alive(), "the daemon has ended", 60)
        assert not ramdisk.mounted(state.loop, disk)
        with pytest.raises(OSError, match="Input/output error"):
            for block in range(100):
                os.pwrite(fd, b"x" * 4096, block * 4096)
            os.fsync(fd)
    wait_until(lambda: not is_attached(state), "the loop device has let go")
    gone(disk, base)


def test_stop_cleans_up_after_a_daemon_that_died(disk: Path, base: Path) -> None:
    state = state_of(disk)
    (disk / "file").write_text("lost")
    sync_file_system(disk)
    kill_daemon(state)
    assert zramfs("status", disk, check=False).returncode == 1
    said = zramfs("stop", disk).stderr
    assert f"cleaned up {disk}: its daemon (pid {state.pid}, since " in said
    gone(disk, base)


@pytest.mark.timeout(300)
def test_eight_at_once_and_more_than_there_are_loop_nodes(tmp_path: Path, base: Path) -> None:
    """losetup's find-and-claim races, and loop devices beyond the eight a kernel starts with."""
    points = [tmp_path / f"disk{i}" for i in range(10)]
    starting = [
        subprocess.Popen([*ZRAMFS, "ramdisk", point, "--size", "16M"], stderr=subprocess.PIPE, text=True)
        for point in points
    ]
    try:
        for process in starting:
            _, said = process.communicate(timeout=200)
            assert process.returncode == 0, said
        devices = {state_of(point).loop for point in points}
        assert len(devices) == len(points)
        for point in points:
            (point / "file").write_text(point.name)
        for point in points:
            assert (point / "file").read_text() == point.name
    finally:
        for point in points:
            if rundir.find(str(point)):
                zramfs("stop", point)
    for point in points:
        gone(point, base)
