# SPDX-License-Identifier: Apache-2.0
"""Mounting and unmounting FUSE connections, with nobody, somebody and somebody stopped behind them."""
from __future__ import annotations

import contextlib
import errno
import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import leftovers
from tests.support.apart import apart
from tests.support.child import TIMEOUT, process_state
from tests.support.paths import python_environment
from tests.support.whole import wait_until
from zramfs.errors import ZramfsError
from zramfs.host import fusermount, mounts, programs, system_calls

pytestmark = pytest.mark.requires("fuse")


@contextlib.contextmanager
def mounted(path: Path, **options: str | bool) -> Iterator[int]:
    """A mount that nobody serves."""
    fd = fusermount.mount_file(path, options=options)
    try:
        yield fd
    finally:
        os.close(fd)
        with contextlib.suppress(fusermount.MountError):
            fusermount.unmount(path, lazy=True)


def options_of(path: Path) -> tuple[set[str], str, str, set[str]]:
    """(mount options, type, source, super block options) from mountinfo."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        head, _, tail = line.partition(" - ")
        if leftovers._unescape(head.split()[4]) == str(path):
            kind, source, rest = tail.split()
            return set(head.split()[5].split(",")), kind, leftovers._unescape(source), set(rest.split(","))
    raise AssertionError(f"{path} is not in mountinfo")


@pytest.fixture
def point(tmp_path: Path) -> Path:
    (tmp_path / "point").touch()
    return tmp_path / "point"


@pytest.mark.parametrize("name", [
    "plain", "with space", "tab\tnewline\nbackslash\\", "comma,equals=", "-leading", "ünïcödé", "\\040",
    "#hash",
])
@pytest.mark.parametrize("directory", [False, True])
def test_mounts_on_any_name(tmp_path: Path, name: str, directory: bool):
    path = tmp_path / name
    path.mkdir() if directory else path.touch()
    assert not fusermount.is_mounted(path)
    with mounted(path, fsname="source"):
        assert fusermount.is_mounted(path)
        assert not fusermount.is_mounted(tmp_path)
        fusermount.unmount(path)
        assert not fusermount.is_mounted(path)


def test_options(point: Path):
    with mounted(point, fsname="a,b\\c d=e", subtype="zramfs-disk", default_permissions=True,
                 allow_other=False, max_read="1048576", ro=True, noexec=True, noatime=True):
        ours, kind, source, theirs = options_of(point)
        assert {"ro", "noexec", "noatime", "nosuid", "nodev"} <= ours
        assert (kind, source) == ("fuse.zramfs-disk", "a,b\\c d=e")
        assert {"default_permissions", "max_read=1048576", f"user_id={os.getuid()}"} <= theirs
        assert "allow_other" not in theirs
        fusermount.unmount(point)
    with mounted(point):
        ours, kind, _, theirs = options_of(point)
        assert kind == "fuse" and {"rw", "nosuid", "nodev"} <= ours and "default_permissions" not in theirs
        fusermount.unmount(point)


@pytest.mark.requires("root")  # others need user_allow_other in /etc/fuse.conf
def test_allow_other(point: Path):
    with mounted(point, allow_other=True):
        assert "allow_other" in options_of(point)[3]
        fusermount.unmount(point)


def test_the_descriptor_is_a_connection_and_closes_on_exec(point: Path):
    with mounted(point) as fd:
        assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/fuse"
        assert not os.get_inheritable(fd)
        fusermount.unmount(point)


def test_relative_paths_and_links_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "point").touch()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "link")
    with mounted(Path("point")):
        through_the_link = str(tmp_path / "link" / "point")
        for path in ("point", "./point", "../link/point", tmp_path / "real" / "point", through_the_link):
            assert fusermount.is_mounted(path), path
        # Root goes through no link that another user could have made.
        fusermount.unmount("point" if os.geteuid() == 0 else "../link/point")
        assert not fusermount.is_mounted(tmp_path / "real" / "point")


# --- refusals

def open_descriptors() -> int:
    gc.collect()  # what earlier tests left for it may have some open
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("options", "number", "sentence"), [
    ({"bogus": True}, errno.EINVAL, "unknown option 'bogus'"),
    ({"fsname": "x", "max_read": "many"}, errno.EINVAL, "Invalid argument"),
    ({"auto_unmount": True}, errno.EINVAL, "without auto_unmount"),
])
def test_refused_options(point: Path, options, number, sentence):
    before = open_descriptors()
    with pytest.raises(fusermount.MountError, match=sentence) as caught:
        fusermount.mount_file(point, options=options)
    assert caught.value.errno == number and isinstance(caught.value, OSError)
    assert not fusermount.is_mounted(point) and open_descriptors() == before


def test_a_missing_mount_point(tmp_path: Path):
    sentence = f"mounting {tmp_path}/none: .*No such file or directory"
    with pytest.raises(fusermount.MountError, match=sentence) as caught:
        fusermount.mount_file(tmp_path / "none", options={})
    assert caught.value.errno == errno.ENOENT


def test_unmounting_what_is_not_mounted(point: Path):
    for lazy in (False, True):
        with pytest.raises(fusermount.MountError, match=f"unmounting {point}: ") as caught:
            fusermount.unmount(point, lazy=lazy)
        assert caught.value.errno == errno.EINVAL


def test_whatever_path_says_the_usual_places_are_looked_at_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert programs.find("fusermount3") in ("/usr/bin/fusermount3", "/bin/fusermount3")


def test_a_machine_without_fusermount3(point: Path, monkeypatch: pytest.MonkeyPatch):
    """Only ordinary users need it."""
    monkeypatch.setattr(programs, "find", lambda name: None)
    with monkeypatch.context() as patch:
        patch.setattr(fusermount.os, "geteuid", lambda: 65534)
        sentence = "not installed; to get it: install fuse3"
        with pytest.raises(fusermount.MountError, match=sentence) as caught:
            fusermount.mount_file(point, options={})
        assert caught.value.errno == errno.ENOENT
    if os.geteuid() == 0:
        with mounted(point):
            assert fusermount.is_mounted(point)


@pytest.mark.requires("root")
def test_root_mounts_on_what_it_has_opened_though_a_parent_is_replaced_by_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The user whose directory it is renames it between the look and the mount."""
    for name in ("his/point", "victim/point"):
        (tmp_path / name).mkdir(parents=True)
    os.chown(tmp_path / "his", 65534, 65534)
    (tmp_path / "victim/point/file").touch()
    mount = system_calls.mount

    def replaced(*words: object) -> None:
        (tmp_path / "his").rename(tmp_path / "old")
        (tmp_path / "his").symlink_to("victim")
        mount(*words)

    monkeypatch.setattr(system_calls, "mount", replaced)
    fd = fusermount.mount_file(tmp_path / "his/point", options={"fsname": "his", "subtype": "zramfs-disk"})
    try:
        assert os.listdir(tmp_path / "victim/point") == ["file"]
        assert mounts.mount_at(tmp_path / "old/point").source == "his"
        with pytest.raises(ZramfsError, match="leads through the link"):
            fusermount.unmount(tmp_path / "his/point")
    finally:
        fusermount.unmount(tmp_path / "old/point", lazy=True)
        os.close(fd)


# --- nobody answers

def is_in_fuse(pid: int) -> bool:
    """Whether it waits for an answer. Where only root may see that: whether it rests."""
    try:
        return "fuse" in Path(f"/proc/{pid}/stack").read_text()
    except PermissionError:
        return Path(f"/proc/{pid}/comm").read_text() == "stat\n" and process_state(pid) in "SD"


def test_nothing_hangs_on_a_mount_that_nobody_serves(point: Path):
    with mounted(point):
        assert fusermount.is_mounted(point)
        fusermount.unmount(point)
        assert not fusermount.is_mounted(point)
    with mounted(point):
        waiting = subprocess.Popen(["stat", point], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: is_in_fuse(waiting.pid), "it waits for an answer")
        assert waiting.poll() is None
        assert fusermount.is_mounted(point)
        with pytest.raises(fusermount.MountError) as caught:
            fusermount.unmount(point)
        assert caught.value.errno == errno.EBUSY
        fusermount.unmount(point, lazy=True)
        assert not fusermount.is_mounted(point)
    assert waiting.wait(TIMEOUT) != 0, "closing the connection ended the wait"


def python_apart(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python in a mount namespace of its own."""
    return subprocess.run(
        apart(sys.executable, "-c", textwrap.dedent(code), *arguments),
        capture_output=True, text=True, timeout=60,
        env=python_environment(),
    )


# --- somebody else

USER = """
    # Some for zramfs.host: this user may not be able to read the interpreter's directory.
    import errno, os, shutil, socket, subprocess, sys
    from pathlib import Path
    place, uid = Path(sys.argv[1]), 65534
    # As distributions have it; here the machine may keep /dev/fuse for root.
    subprocess.run(["mknod", "-m", "666", place / "fuse", "c", "10", "229"], check=True)
    subprocess.run(["mount", "--bind", place / "fuse", "/dev/fuse"], check=True)
    from zramfs.host import fusermount
    from zramfs.lane.lane import Lane
    from zramfs.store.store import Store
    point, foreign = place / "mine" / "point", place / "roots"
    foreign.touch()
    point.parent.mkdir()
    point.touch()
    os.chown(point.parent, uid, uid)
    os.chown(point, uid, uid)
    place.chmod(0o755)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    options = {"fsname": "users", "subtype": "zramfs-disk", "default_permissions": True}

    def refused(call, *arguments, **how):
        try:
            call(*arguments, **how)
        except fusermount.MountError as error:
            return f"{errno.errorcode[error.errno]}: {error}"

    print(refused(fusermount.mount_file, foreign, options=options))
    print(refused(fusermount.mount_file, point, options={**options, "allow_other": True}))
    lane = Lane(fusermount.mount_file(point, options=options))
    store = Store(1 << 20)
    lane.set_store(store)
    lane.start()
    status = os.stat(point)
    print(status.st_uid, status.st_gid, oct(status.st_mode), status.st_size)
    with open(point, "r+b", buffering=0) as file:
        print(os.pwrite(file.fileno(), b"user", 5), os.pread(file.fileno(), 6, 4))
        print(refused(fusermount.unmount, point))
    fusermount.unmount(point)
    print(lane.join(20), lane.error, fusermount.is_mounted(point))
    store.close()
    """


@pytest.mark.requires("root", "unshare")  # to become an ordinary user who may open /dev/fuse
def test_an_ordinary_user(tmp_path: Path):
    if "user_allow_other" in Path("/etc/fuse.conf").read_text().split("\n"):
        pytest.skip("/etc/fuse.conf has user_allow_other")
    for parent in [tmp_path, *tmp_path.parents]:
        if leftovers.owner_of(str(parent)):
            parent.chmod(0o755)
    done = python_apart(USER, tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("EACCES: ") or said[0].startswith("EPERM: "), said
    assert said[1].startswith("EINVAL: ") and "user_allow_other" in said[1]
    assert said[2] == "65534 65534 0o100600 1048576"
    assert said[3] == "4 b'\\x00user\\x00'"
    assert said[4].startswith("EBUSY: ")
    assert said[5] == "True None False"
