# SPDX-License-Identifier: Apache-2.0
"""Memory cgroups as they look from inside of them: on the machine, in a container, in a namespace."""
from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fake_groups import MIB, FakeGroup
from zramfs.host import memcg


class Seen:
    """A process that has its cgroups mounted at `top`. place: as /proc tells it; mount_root: the directory of
    the hierarchy that is mounted."""

    def __init__(self, tmp_path: Path, version: int, place: str, mount_root: str = "/") -> None:
        self.top = tmp_path / "cgroup"
        self.proc = tmp_path / "proc"
        self.proc.mkdir()
        self.version = version
        line = f"4:memory:{place}\n0::/elsewhere\n" if version == 1 else f"3:cpu:/x\n0::{place}\n"
        (self.proc / "cgroup").write_text(line)
        fstype = "cgroup" if version == 1 else "cgroup2"
        (self.proc / "mountinfo").write_text(
            "22 1 0:20 / / rw - ext4 /dev/vda rw\n"
            f"31 22 0:28 {mount_root} {self.top} rw - {fstype} {fstype} rw,memory\n")

    def group(self, path: str) -> FakeGroup:
        return FakeGroup(self.top / path, self.version).set()

    @property
    def hierarchy(self) -> memcg.Hierarchy:
        found = memcg.hierarchy(self.proc)
        assert found is not None
        return found


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_of_all_groups_above_is_found(tmp_path: Path, version: int) -> None:
    seen = Seen(tmp_path, version, "/user/1000/app")
    top, user, one, app = (seen.group(path) for path in (".", "user", "user/1000", "user/1000/app"))
    found = seen.hierarchy
    assert (found.here, found.version, found.limited()) == (app.path, version, None)
    one.set(limit=200)
    assert found.limited() == one.path
    user.set(limit=100)
    assert found.limited() == user.path and found.limit(user.path) == 100 * MIB
    app.set(limit=50)
    assert found.limited() == app.path
    assert [group for group in found.bounding()] == [app.path, one.path, user.path, top.path]
    assert found.may_leave()


def test_memory_high_is_a_limit(tmp_path: Path) -> None:
    seen = Seen(tmp_path, 2, "/a")
    group = seen.group("a").set(limit=500, high=100)
    assert seen.hierarchy.limit(group.path) == 100 * MIB


def test_the_topmost_group_of_the_machine_has_no_limit_and_bounds_nothing(tmp_path: Path) -> None:
    """Version 2 has no memory.max there."""
    seen = Seen(tmp_path, 2, "/a")
    group = seen.group("a")
    (seen.top / "cgroup.procs").write_text("")
    assert seen.hierarchy.bounding() == [group.path]
    assert seen.hierarchy.limit(seen.top) is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_sees_its_own_group_as_the_topmost_can_not_leave_it(
    tmp_path: Path, version: int
) -> None:
    """In a cgroup namespace: the place is /, and the limit is that of the container."""
    seen = Seen(tmp_path, version, "/")
    top = seen.group(".").set(limit=100)
    found = seen.hierarchy
    assert (found.here, found.limited()) == (top.path, top.path)
    assert not found.may_leave()


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_without_a_namespace_has_its_part_of_the_hierarchy_mounted(
    tmp_path: Path, version: int
) -> None:
    seen = Seen(tmp_path, version, "/docker/4711/inner", "/docker/4711")
    top = seen.group(".").set(limit=100)
    inner = seen.group("inner")
    found = seen.hierarchy
    assert (found.root, found.here, found.limited()) == (top.path, inner.path, top.path)
    assert not found.may_leave()


@pytest.mark.parametrize("place", ["/../other", "/not/there"])
def test_a_process_outside_of_what_it_can_see_is_bounded_by_the_topmost(tmp_path: Path, place: str) -> None:
    seen = Seen(tmp_path, 2, place)
    top = seen.group(".").set(limit=100)
    assert seen.hierarchy.limited() == top.path


def test_a_limit_of_version_1_above_what_can_be_seen_counts(tmp_path: Path) -> None:
    seen = Seen(tmp_path, 1, "/")
    top = seen.group(".").set(above=100)
    found = seen.hierarchy
    assert found.limit(top.path) == 100 * MIB
    assert not found.may_leave()


def test_leaving_is_writing_to_the_topmost_group(tmp_path: Path) -> None:
    seen = Seen(tmp_path, 2, "/a")
    seen.group(".")
    seen.group("a").set(limit=100)
    seen.hierarchy.leave()
    assert (seen.top / "cgroup.procs").read_text() == "0"


def test_no_hierarchy_is_none(tmp_path: Path) -> None:
    seen = Seen(tmp_path, 2, "/a")
    (seen.proc / "mountinfo").write_text("22 1 0:20 / / rw - ext4 /dev/vda rw\n")
    assert memcg.hierarchy(seen.proc) is None
    (seen.proc / "cgroup").unlink()
    assert memcg.hierarchy(seen.proc) is None
