# SPDX-License-Identifier: Apache-2.0
"""mount -t fuse.zramfs, /etc/fstab, and umount: through the machine's own mount and mount.fuse3."""
from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import kill_daemon, state_of
from tests.support.paths import python_path
from tests.support.whole import MIB, ZRAMFS, Device, opened, run, unmount, wait_until, zramfs
from zramfs.host import mounts
from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import State

pytestmark = [pytest.mark.requires("root", "fuse", "mount.fuse3"), pytest.mark.timeout(240)]

# Where sh looks for `zramfs` when mount.fuse3 runs it: mount(8) takes PATH out of the environment.
PLACES = [Path(path) for path in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin")]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def program(tmp_path: Path) -> Iterator[None]:
    """`zramfs` of this checkout where mount.fuse3 finds it."""
    link = PLACES[0] / "zramfs"
    if link.is_symlink() and "zramfs_test" in os.readlink(link) and not link.exists():
        link.unlink()  # of a run that was killed
    if os.path.lexists(link):
        pytest.skip(f"{link} is there already, and mount.fuse3 would run that")
    script = tmp_path / "zramfs"
    path = python_path()
    command = f"PYTHONPATH={shlex.quote(path)} exec {shlex.join(ZRAMFS)}"
    script.write_text(f'#!/bin/sh\n{command} "$@"\n')
    script.chmod(0o755)
    link.symlink_to(script)
    try:
        yield
    finally:
        link.unlink()


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "mount point"
    directory.mkdir()
    try:
        yield directory
    finally:
        if rundir.find(str(directory)):
            zramfs("stop", directory)


def mount(name: str, point: Path, options: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("mount", "-t", "fuse.zramfs", *(["-o", options] if options else []), name, point, check=check)


def expect_end(state: State, base: Path) -> None:
    wait_until(lambda: not state.alive(), "the daemon has ended", 30)
    assert os.listdir(base) == []
    assert not [m for m in mounts.mounts() if m.mountpoint.is_relative_to(base.parent)]


def test_mount_gives_a_ready_device_and_umount_leaves_nothing(point: Path, base: Path) -> None:
    options = (
        "size=10M,algo=zstd:7,mem_limit=5M,threads=1,noauto,nofail,nosuid,x-systemd.automount,_netdev,noatime"
    )
    done = mount("z0", point, options)
    assert (done.stdout, done.stderr) == ("", "")
    device = Device(point)
    assert device.disk.stat().st_size == 10 * MIB
    assert device.mm_stat()["mem_limit"] == 5 * MIB
    assert "[zstd]" in device.read("zram/comp_algorithm")
    state = state_of(point)
    assert (state.threads, state.made) == (1, [])
    with opened(device.disk) as fd:
        os.pwrite(fd, b"data" * 1024, 0)
    run("umount", point)
    expect_end(state, base)
    assert point.exists()


def test_mount_without_a_size_is_set_up_later(point: Path, base: Path) -> None:
    mount("z0", point)
    assert Device(point).read("zram/initstate") == "0\n"
    state = state_of(point)
    zramfs("stop", point)
    expect_end(state, base)


@pytest.fixture
def fstab(point: Path, tmp_path: Path) -> Path:
    file = tmp_path / "fstab"
    escaped = str(point).replace(" ", "\\040")
    file.write_text(f"z0 {escaped} fuse.zramfs size=4M,algo=lz4,x-gvfs-hide 0 0\n")
    return file


def test_fstab(point: Path, base: Path, fstab: Path) -> None:
    run("mount", "--fstab", fstab, point)
    state = state_of(point)
    assert Device(point).disk.stat().st_size == 4 * MIB
    assert mounts.mount_at(point).fstype == "fuse.zramfs"
    run("umount", point)
    # At once, while the daemon may still be on its way out.
    run("mount", "--fstab", fstab, point)
    assert not state.alive()
    state = state_of(point)
    run("umount", point)
    expect_end(state, base)


def test_mount_all_leaves_alone_what_is_mounted(point: Path, base: Path, fstab: Path) -> None:
    """mount -a takes a line for mounted when source and directory are those of a mount."""
    run("mount", "--fstab", fstab, "--all")
    state = state_of(point)
    run("mount", "--fstab", fstab, "--all")
    assert state_of(point) == state
    assert mounts.mount_at(point).source == "z0"
    run("umount", point)
    expect_end(state, base)


def test_umount_says_busy_while_the_tree_is_used(point: Path, base: Path) -> None:
    mount("z0", point, "size=1M")
    state = state_of(point)
    with opened(point / "zram/mm_stat", os.O_RDONLY):
        done = run("umount", point, check=False)
        assert done.returncode != 0
        assert "busy" in done.stderr
        assert Device(point).read("zram/initstate") == "1\n"
    run("umount", point)
    expect_end(state, base)


@pytest.mark.parametrize("name", ["create", "stop", "status", "z 0", "z;0", "it's"])
def test_any_word_may_be_the_source(point: Path, base: Path, name: str) -> None:
    mount(name, point, "size=1M")
    state = state_of(point)
    assert mounts.mount_at(point).source == name
    assert Device(point).read("zram/initstate") == "1\n"
    run("umount", point)
    expect_end(state, base)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("size=1Q", "the mount option size=1Q: '1Q' has the unknown unit 'Q': expected bytes"),
        ("size", "the mount option size needs a value; expected some of size=SIZE, algo=NAME[:LEVEL]"),
        ("size=1M,algo=rar", "the mount option algo=rar: "),
        ("size=1M,threads=many", "the mount option threads=many: 'many' is not a number of threads"),
        ("size=1M,sise=2M", "unknown mount option 'sise=2M': expected some of size=SIZE, algo=NAME[:LEVEL]"),
        ("size=1M,ro", "the mount option ro makes no sense here: a device begins empty"),
    ],
)
def test_bad_options_fail_the_mount_and_say_why(point: Path, base: Path, options: str, reason: str) -> None:
    done = mount("z0", point, options, check=False)
    assert done.returncode == 2
    assert reason in " ".join(done.stderr.split())
    assert mounts.mount_at(point) is None
    assert not base.exists()


def test_a_start_that_fails_fails_the_mount_and_says_why(point: Path, base: Path) -> None:
    done = mount("z0", point, "size=9223372036854775807", check=False)
    assert done.returncode == 1
    assert "9223372036854775807" in done.stderr
    assert mounts.mount_at(point) is None
    assert os.listdir(base) == []


@pytest.mark.requires("loop", "ext4")
def test_a_ram_disk_in_fstab_is_mounted_with_its_rights_and_again_with_its_data(
    point: Path, base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "fstab"
    escaped = str(point).replace(" ", "\\040")
    file.write_text(f"fast {escaped} fuse.zramfs "
                    "size=64M,fs=ext4,uid=12345,gid=12346,mode=1770,label=quick,mem_limit=32M,noatime 0 0\n")
    run("mount", "--fstab", file, point)
    state = state_of(point)
    mount = mounts.mount_at(point)
    assert (mount.fstype, mount.source, state.kind) == ("ext4", state.loop, "ramdisk")
    seen = point.stat()
    assert (seen.st_uid, seen.st_gid, seen.st_mode & 0o7777) == (12345, 12346, 0o1770)
    shown = run("findmnt", "-no", "OPTIONS,LABEL", point).stdout.split()
    assert {"noatime", "discard"} <= set(shown[0].split(",")) and shown[1] == "quick"
    run("mount", "--fstab", file, "--all")
    assert len([m for m in mounts.mounts() if m.mountpoint == point]) == 1
    (point / "file").write_text("kept")
    unmount(point)
    assert not (point / "file").exists() and state.alive()
    done = run("mount", "--fstab", file, point)
    assert "is mounted on" in done.stderr and "again with its data" in done.stderr
    assert (point / "file").read_text() == "kept"
    assert state_of(point).pid == state.pid
    zramfs("stop", point)
    expect_end(state, base)


@pytest.mark.requires("loop", "ext4")
def test_a_ram_disk_is_no_device_to_be_mounted_again_as_another(point: Path, base: Path) -> None:
    mount("z0", point, "size=1M")
    done = mount("z0", point, "size=64M,fs=ext4", check=False)
    assert done.returncode == 1 and "it is no RAM disk that could be mounted again" in done.stderr
    state = state_of(point)
    run("umount", point)
    expect_end(state, base)


@pytest.mark.parametrize(("options", "reason"), [
    ("fs=ext4", "a RAM disk cannot do without a size"),
    ("size=64M,fs=ntfs", "the mount option fs=ntfs: expected one of btrfs, ext4, xfs"),
    ("size=64M,fs=ext4,label=12345678901234567", "expected a label of 1 to 16 bytes"),
    ("size=1M,fs=xfs", "xfs needs at least 300M (ext4 200K), got size=1M"),
    ("size=64M,fs=ext4,allow_other", "allow_other means nothing for a RAM disk"),
    ("size=64M,fs=ext4,mode=9", "the mount option mode=9: expected an octal mode"),
    ("size=64M,label=x", "the mount option label is for a RAM disk: add fs=ext4"),
    ("size=64M,uid=nobody-of-this-name", "expected a user of this machine or a number"),
])
def test_bad_options_of_a_ram_disk_make_nothing(
    point: Path, base: Path, options: str, reason: str
) -> None:
    done = mount("z0", point, options, check=False)
    assert done.returncode == 2 and reason in " ".join(done.stderr.split())
    assert not base.exists() and mounts.mount_at(point) is None


def test_a_device_of_fstab_has_an_owner_and_a_mode(point: Path, base: Path) -> None:
    mount("z0", point, "size=1M,mode=0640,uid=12345,gid=12346")
    state = state_of(point)
    seen = Path(state.disk).stat()
    assert (seen.st_uid, seen.st_gid, seen.st_mode & 0o777) == (12345, 12346, 0o640)
    run("umount", point)
    expect_end(state, base)


def test_mounting_twice_is_refused(point: Path, base: Path) -> None:
    mount("z0", point, "size=1M")
    state = state_of(point)
    done = mount("z1", point, "size=1M", check=False)
    assert done.returncode == 1
    assert f"a zramfs device is there on {point} (daemon pid {state.pid}, since " in done.stderr
    assert state_of(point) == state
    run("umount", point)
    expect_end(state, base)


def test_a_mount_over_a_dead_device_cleans_up(point: Path, base: Path) -> None:
    mount("z0", point, "size=1M")
    state = state_of(point)
    kill_daemon(state)
    run("umount", point)
    done = mount("z0", point, "size=1M")
    assert f"cleaned up {point}: its daemon (pid {state.pid}, since " in done.stderr
    state = state_of(point)
    run("umount", point)
    expect_end(state, base)


def test_the_helper_called_by_hand_takes_the_words_that_mount_keeps(point: Path, base: Path) -> None:
    zramfs("z0", point, "-o", "defaults,size=1M,noauto,user,nofail,_netdev,x-initrd.mount,comment=mine")
    state = state_of(point)
    assert mounts.mount_at(point).source == "z0"
    start = time.monotonic()
    zramfs("stop", point)
    assert time.monotonic() - start < 60
    expect_end(state, base)
