# SPDX-License-Identifier: Apache-2.0
"""Paths on which another user can put a link in root's way."""
from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import leftovers
from zramfs.errors import ZramfsError
from zramfs.host import fusermount, paths, safe_paths

NOBODY = 65534
pytestmark = pytest.mark.requires("root")


@pytest.fixture
def alone() -> Iterator[Path]:
    """A directory that, with all above it, is root's alone."""
    place = Path(tempfile.mkdtemp(prefix=leftovers.owner_name(), dir="/run"))
    place.chmod(0o755)
    try:
        yield place
    finally:
        shutil.rmtree(place)


@pytest.fixture
def his(alone: Path) -> Path:
    """Another user's directory, with a file and a directory of that user's."""
    place = alone / "his"
    (place / "disk").mkdir(parents=True)
    (place / "file").write_text("text")
    for each in (place, place / "disk", place / "file"):
        os.chown(each, NOBODY, NOBODY)
    return place


def refused(path: Path) -> str:
    for action in (safe_paths.resolve, safe_paths.make_directory, safe_paths.remove_directory,
                   lambda path: safe_paths.open_path(path, os.O_RDONLY),
                   lambda path: safe_paths.open_path(path, os.O_PATH)):
        with pytest.raises(ZramfsError) as caught:
            action(path)
        assert caught.value.errno == errno.ELOOP
    return caught.value.sentence


def test_a_link_in_a_directory_of_another_user_is_refused(alone: Path, his: Path) -> None:
    (alone / "etc").mkdir()
    (his / "link").symlink_to("/etc/cron.d")
    (his / "way").symlink_to(alone / "etc")
    assert refused(his / "link").startswith(
        f"{his}/link leads through the link {his}/link, which root does not follow, because {his} belongs "
        "to uid 65534: expected a path without links")
    assert f"through the link {his}/way" in refused(his / "way/below")


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_a_directory_that_others_may_write_to_is_like_another_users(alone: Path, mode: int) -> None:
    (alone / "link").symlink_to("/etc")
    assert safe_paths.resolve(alone / "link/x") == Path("/etc/x")
    alone.chmod(mode)
    assert f"others may write to {alone} (mode {mode:04o})" in refused(alone / "link/x")


def test_below_another_users_directory_no_link_is_followed_though_it_is_in_one_of_roots(his: Path) -> None:
    (his / "roots").mkdir()
    (his / "roots/link").symlink_to("/etc")
    assert f"because {his} belongs to uid" in refused(his / "roots/link")


def test_a_link_of_roots_to_another_users_directory_is_followed_and_what_is_below_is_not(
    alone: Path, his: Path
) -> None:
    (alone / "to-his").symlink_to("his")
    (his / "link").symlink_to("/etc")
    assert safe_paths.resolve(alone / "to-his/disk") == his / "disk"
    assert f"the link {his}/link" in refused(alone / "to-his/link")


def test_what_a_user_shows_on_fuse_is_not_taken_for_roots(alone: Path) -> None:
    """Whoever serves a FUSE mount says whose its directories are. Nobody serves this one: the walk does not
    ask about the last name, and the first name below hangs, so only the table of mounts is looked at."""
    (alone / "point").mkdir()
    fd = fusermount.mount_file(alone / "point", options={"fsname": "test"})
    try:
        assert safe_paths.resolve(alone / "point") == alone / "point"
        walk = safe_paths._Walk(alone / "point")
        walk.done, walk.shared = ["point"], None
        os.close(walk.fd)
        walk.fd = os.open(alone / "point", os.O_PATH)
        seen = os.stat_result((0o40755, 1, 1, 1, 0, 0, 0, 0, 0, 0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(safe_paths.os, "fstat", lambda fd: seen)
            assert walk._sharing() == "/point is on FUSE"
        walk.close()
    finally:
        fusermount.unmount(alone / "point", lazy=True)
        os.close(fd)


def test_paths_resolve_as_for_everybody_where_all_is_roots(alone: Path) -> None:
    (alone / "a/b").mkdir(parents=True)
    (alone / "a/up").symlink_to("../a/b")
    (alone / "absolute").symlink_to(alone / "a")
    (alone / "circle").symlink_to("circle")
    for text in ("a/b", "a/up", "a/up/none/below", "absolute/up/x", "a/b/", "a/./b", "absolute/../a", "none",
                 "."):
        assert safe_paths.resolve(f"{alone}/{text}") == paths.resolve(f"{alone}/{text}"), text
    assert safe_paths.resolve("/") == Path("/")
    with pytest.raises(ZramfsError, match="runs in a circle of symbolic links"):
        safe_paths.resolve(alone / "circle/x")


def test_a_hard_link_in_a_directory_of_another_user_is_refused(alone: Path, his: Path) -> None:
    (alone / "secret").write_text("secret")
    os.link(alone / "secret", his / "secret")
    with pytest.raises(ZramfsError, match=f"{his}/secret is one of 2 names of a file") as caught:
        safe_paths.open_path(his / "secret", os.O_RDONLY)
    assert caught.value.errno == errno.EMLINK
    os.close(safe_paths.open_path(alone / "secret", os.O_RDONLY))


def test_a_link_that_comes_after_the_look_is_not_followed(his: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = safe_paths._Walk

    def replaced(path: Path) -> safe_paths._Walk:
        walk = look(path)
        (his / "file").unlink()
        (his / "file").symlink_to("/etc/passwd")
        return walk

    monkeypatch.setattr(safe_paths, "_Walk", replaced)
    for flags in (os.O_RDONLY, os.O_PATH):
        with pytest.raises(OSError) as caught:
            os.close(safe_paths.open_path(his / "file", flags))
        assert caught.value.errno == errno.ELOOP
        (his / "file").unlink()
        (his / "file").touch()


def test_parents_are_made_and_a_directory_is_removed_without_following_links(alone: Path, his: Path) -> None:
    safe_paths.make_parents(his / "a/b/c")
    safe_paths.make_directory(his / "a/b/c", 0o700)
    assert (his / "a/b/c").stat().st_mode & 0o777 == 0o700
    safe_paths.remove_directory(his / "a/b/c")
    assert not (his / "a/b/c").exists()
    (his / "a/link").symlink_to(alone)
    with pytest.raises(ZramfsError, match="leads through the link"):
        safe_paths.make_parents(his / "a/link/new/x")
    assert not (alone / "new").exists()


def test_an_ordinary_user_follows_links(his: Path) -> None:
    (his / "link").symlink_to("disk")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresuid(NOBODY, NOBODY, NOBODY)
            assert safe_paths.resolve(his / "link/x") == his / "disk/x"
            os.close(safe_paths.open_path(his / "link", os.O_RDONLY | os.O_DIRECTORY))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def test_who_can_replace_a_directory(alone: Path, his: Path) -> None:
    assert safe_paths.replaceable(alone / "x") is None
    assert safe_paths.replaceable(Path("/tmp/x")) is None  # sticky: what root makes there stays
    assert safe_paths.replaceable(his / "x/y") == f"{his} belongs to uid {NOBODY}"
    alone.chmod(0o777)
    assert safe_paths.replaceable(alone / "x") == f"others may write to {alone} (mode 0777)"
