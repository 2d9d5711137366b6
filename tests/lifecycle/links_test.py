# SPDX-License-Identifier: Apache-2.0
"""Root makes devices where another user has put links."""
from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from tests.support.commands import failure, nothing_left
from tests.support.whole import MIB, device, loop, run, zramfs
from zramfs.errors import ZramfsError
from zramfs.host import mounts
from zramfs.lifecycle import ramdisk

NOBODY = 65534
pytestmark = [pytest.mark.requires("root", "fuse", "loop", "ext4"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def his(tmp_path: Path) -> Path:
    place = tmp_path / "his"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    return place


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """As /etc/cron.d: root's, with a file."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/file").write_text("text")
    return tmp_path / "victim"


def untouched(victim: Path) -> None:
    assert os.listdir(victim) == ["file"]
    assert mounts.mount_at(victim) is None
    assert victim.stat().st_uid == 0


@pytest.mark.parametrize("link", ["disk", "way/disk"])
def test_up_mounts_nothing_behind_a_users_link(
    tmp_path: Path, base: Path, his: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    """A user's RAM disk by configuration, and the user's link to a directory of root's."""
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    (tmp_path / "etc/zramfs").mkdir(parents=True)
    (tmp_path / "etc/zramfs/r.conf").write_text(
        f"zram-size = 16\nmount-point = {his}/{link}\nfs-type = ext4\nowner = {NOBODY}\nmode = 0777\n")
    target = victim if link == "disk" else victim.parent
    if link == "way/disk":
        (tmp_path / "disk").mkdir()
    (his / link.split("/")[0]).symlink_to(target)
    said = failure("up", "r")
    assert f"leads through the link {his}/{link.split('/')[0]}, which root does not follow" in said
    untouched(victim)
    assert not base.exists() or os.listdir(base) == []


@pytest.mark.parametrize("command", ["create", "ramdisk"])
def test_create_and_ramdisk_refuse_it_too(base: Path, his: Path, victim: Path, command: str) -> None:
    (his / "disk").symlink_to(victim)
    assert "which root does not follow" in failure(command, his / "disk", "--size", "16M")
    untouched(victim)


def test_a_ram_disk_in_a_users_directory_without_links_is_the_users(base: Path, his: Path) -> None:
    zramfs("ramdisk", his / "disk", "--size", "16M")
    zramfs("stop", his / "disk")
    nothing_left(his / "disk", base)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_link_that_comes_in_the_middle_is_not_followed(
    tmp_path: Path, his: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The user is as fast as can be: between the look at the path and mount(2), or between that and chown."""
    (his / "disk").mkdir()
    (tmp_path / "bin").mkdir()
    attack = f"mv {his} {tmp_path}/moved && mkdir {his} && ln -s {victim} {his}/disk"
    real = f'{shutil.which("mount")} "$@"'
    first, then = (attack, real) if moment == "before" else (real, attack)
    (tmp_path / "bin/mount").write_text(f"#!/bin/sh\n{first} && {then}\n")
    (tmp_path / "bin/mount").chmod(0o755)
    (tmp_path / "image").touch()
    os.truncate(tmp_path / "image", 16 * MIB)
    wanted = ramdisk.FileSystem("ext4", his / "disk", mode=0o777, owner=NOBODY)
    with loop(tmp_path / "image") as name:
        ramdisk.make_file_system("ext4", name)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
            with pytest.raises(ZramfsError, match="something else is there now, so it was taken away again"):
                ramdisk.mount(wanted, name)
        assert ramdisk.places(name) == []
    untouched(victim)
    assert stat.S_IMODE(victim.stat().st_mode) != 0o777


def test_a_backing_store_or_a_dictionary_behind_a_users_link_is_not_opened(
    tmp_path: Path, base: Path, his: Path
) -> None:
    secret = tmp_path / "image"
    secret.touch()
    os.truncate(secret, 4 * MIB)
    (his / "store").symlink_to(secret)
    said = failure("create", tmp_path / "d", "--size", "1M", "--writeback", his / "store")
    assert "which root does not follow" in said
    (his / "dict").symlink_to("/etc/passwd")
    said = failure("create", tmp_path / "d", "--size", "1M", "--algo", f"zstd:dict={his}/dict")
    assert "which root does not follow" in said
    with device(tmp_path / "d", None) as made, pytest.raises(OSError, match="symbolic links"):
        made.write("zram/backing_dev", f"{his}/store")
    nothing_left(tmp_path / "d", base)


def test_run_directories_are_not_made_where_a_user_can_replace_them(
    tmp_path: Path, his: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(his / "run"))
    said = failure("create", tmp_path / "d", "--size", "1M")
    assert f"{his} belongs to uid {NOBODY}" in said
    (his / "run").rmdir()
    (his / "run").symlink_to(victim)
    assert "which root does not follow" in failure("create", tmp_path / "d", "--size", "1M")
    untouched(victim)


def test_what_holds_something_is_no_backing_store_without_force(tmp_path: Path, base: Path) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 16 * MIB)
    run("mkfs.ext4", "-q", image)
    before = image.read_bytes()
    words = ["create", tmp_path / "d", "--size", "1M", "--writeback", image]
    assert f"{image} holds a signature of ext4, which write-back would overwrite" in failure(*words)
    assert image.read_bytes() == before
    with device(tmp_path / "d", None) as made, pytest.raises(OSError, match="File exists"):
        made.write("zram/backing_dev", str(image))
    zramfs(*words, "--force")
    zramfs("stop", tmp_path / "d")
    nothing_left(tmp_path / "d", base)


def test_check_config_names_the_line_of_a_file_that_holds_something_and_of_a_place_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    (tmp_path / "etc/zramfs").mkdir(parents=True)
    file = tmp_path / "etc/zramfs/r.conf"
    file.write_text("mount-point = /var/tmp\n")
    other = tmp_path / "etc/zramfs/s.conf"
    other.write_text(f"directory = {tmp_path}/s\nwriteback-device = /etc/passwd\n")
    done = zramfs("check-config", check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert f"{other}:2: writeback-device: expected a block device, or a file that is there for this alone; " \
           "/etc/passwd holds data that zramfs has not put there" in said
    assert f"{file}:1: mount-point: everybody writes to /var/tmp, so a file system there needs mode" in said
    other.unlink()
    file.write_text("mount-point = /var/tmp\nmode = 1777\n")
    assert zramfs("check-config").returncode == 0
