# SPDX-License-Identifier: Apache-2.0
"""A daemon's mount, told from others."""
from __future__ import annotations

from pathlib import Path

import pytest

from zramfs.daemon.own_mount import OwnMount
from zramfs.host import mounts
from zramfs.host.mounts import Mount

OURS = Mount(40, "0:50", Path("/mnt/ours"), "fuse.zramfs", "mnt-ours")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[Mount]:
    found = [OURS]
    monkeypatch.setattr(mounts, "mounts", lambda: found)
    return found


def own() -> OwnMount:
    made = OwnMount("ours", Path("/mnt/ours"), {"fsname": "mnt-ours", "subtype": "zramfs"})
    made.adopt((40, "0:50"))
    return made


def test_it_is_found_where_it_is_now(table: list[Mount]) -> None:
    mount = own()
    table[0] = OURS._replace(mountpoint=Path("/mnt/renamed"))
    assert mount.place() == Path("/mnt/renamed")


@pytest.mark.parametrize("other", [
    Mount(40, "0:50", Path("/mnt/another"), "fuse.zramfs", "mnt-another"),
    Mount(40, "0:50", Path("/run/zramfs/x/disk"), "fuse.zramfs-disk", "mnt-ours"),
    Mount(41, "0:50", Path("/mnt/ours"), "fuse.zramfs", "mnt-ours"),
])
def test_another_mount_with_its_numbers_is_another(table: list[Mount], other: Mount) -> None:
    mount = own()
    table[0] = other
    assert mount.place() is None and not mount.is_there() and not mount.is_covered()


def test_only_what_bears_its_name_is_taken_over(table: list[Mount]) -> None:
    table[0] = Mount(40, "0:50", Path("/mnt/ours"), "fuse.other", "mnt-ours")
    assert own().kept() is None
