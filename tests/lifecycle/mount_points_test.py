# SPDX-License-Identifier: Apache-2.0
"""Directories that must not be hidden by a device."""
from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from tests.support.commands import child, failure
from tests.support.whole import zramfs
from zramfs.errors import ZramfsError
from zramfs.lifecycle import mount_points


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


SYSTEM = ["/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/proc", "/root", "/run", "/sbin", "/sys",
          "/usr", "/usr/lib", "/usr/lib/systemd", "/usr/bin", "/usr/local", "/usr/share", "/var",
          "/var/lib", "/proc/1"]
PYTHON = [sys.prefix, sys.base_prefix, os.path.dirname(os.__file__),
          f"{os.path.dirname(os.__file__)}/encodings", os.path.dirname(sys.executable)]


@pytest.mark.parametrize("place", [*SYSTEM, *PYTHON, *map(str, Path(sys.base_prefix).parents)])
def test_what_the_machine_needs_is_not_hidden(place: str) -> None:
    with pytest.raises(ZramfsError, match="expected a directory to mount on, got ") as caught:
        mount_points.expect_allowed(Path(place))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("place", ["/mnt", "/mnt/z0", "/srv/x", "/home/user/disk", "/var/cache/x",
                                   "/var/lib/x", "/usr/local/scratch", "/opt/x", "/run/x", "/media/x",
                                   "/var/tmp/x"])
def test_other_places_are_anybodys(place: str) -> None:
    mount_points.expect_allowed(Path(place))


@pytest.mark.parametrize("place", ["/var/tmp", "/dev/shm"])
def test_a_place_for_all_needs_the_mode_for_all(place: str) -> None:
    for mode in (None, 0o755, 0o777, 0o1770):
        with pytest.raises(ZramfsError, match=f"everybody writes to {place}, so .* needs mode = 1777"):
            mount_points.expect_allowed(Path(place), mode)
    mount_points.expect_allowed(Path(place), 0o1777)


def test_a_place_among_the_run_directories_is_refused(base: Path) -> None:
    assert f"{base}/x, which is where zramfs keeps its run directories" in failure(
        "create", base / "x", "--size", "1M")
    assert zramfs("status").stdout == ""


def test_a_directory_in_use_is_refused_with_the_user(tmp_path: Path) -> None:
    place = tmp_path / "service"
    place.mkdir()
    (place / "data").write_text("text")
    mount_points.expect_idle(place)
    with child("f = open(sys.argv[1])", place / "data") as pid:
        with pytest.raises(ZramfsError, match=rf"\(pid {pid}\) has {place}/data open") as caught:
            mount_points.expect_idle(place)
        assert caught.value.errno == errno.EBUSY
        said = failure("create", place, "--size", "1M")
        assert f"{place} is in use, and a mount there would hide it" in said
    assert sorted(os.listdir(place)) == ["data"]
