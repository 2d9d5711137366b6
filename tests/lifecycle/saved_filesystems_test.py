# SPDX-License-Identifier: Apache-2.0
"""Images on file systems of each kind, and of RAM disks with file systems of each kind."""
from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backing_tools import tmpfs
from tests.support.killed_saves import POINTS
from tests.support.paths import python_environment
from tests.support.whole import MIB, device, loop, mounted, run, stop, wait_until, zramfs
from zramfs.host import mounts
from zramfs.lifecycle import rundir

pytestmark = [pytest.mark.requires("root", "fuse", "loop"), pytest.mark.timeout(240)]

FSCK = {
    "ext4": ("e2fsck", "-f", "-n"), "xfs": ("xfs_repair", "-n"), "btrfs": ("btrfs", "check", "--readonly"),
}
# The least that each can be made in.
SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}
FORCE = {"ext4": "-F", "xfs": "-f", "btrfs": "-f"}
KINDS = [pytest.param(kind, marks=pytest.mark.requires(kind)) for kind in FSCK]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@contextlib.contextmanager
def file_system(kind: str, tmp_path: Path) -> Iterator[Path]:
    """Mounted, on a loop device on a file with holes."""
    if kind == "tmpfs":
        with tmpfs(tmp_path / "mounted", 64 * MIB) as place:
            yield place
        return
    with open(tmp_path / "blocks", "wb") as file:
        file.truncate(SIZES[kind])
    with loop(tmp_path / "blocks") as block:
        run(f"mkfs.{kind}", "-q", FORCE[kind], block)
        with mounted(block, tmp_path / "mounted") as place:
            yield place


@pytest.mark.requires("ext4")
@pytest.mark.parametrize("kind", ["tmpfs", *KINDS])
def test_a_device_is_kept_in_a_file_of(kind: str, tmp_path: Path) -> None:
    with file_system(kind, tmp_path) as place:
        killed = place / "killed"
        killed.mkdir()
        expect_whole_images(killed)
        image, point = place / "image", tmp_path / "disk"
        zramfs("ramdisk", point, "--size", 16 * MIB, "--keep", image)
        try:
            for text in ("first", "second"):
                (point / "file").write_text(text)
                zramfs("save", point, image)
            (point / "file").write_text("third")
        finally:
            stop(point)
        assert names(place) == ["image", "killed"]
        # What a daemon has left that died between the two steps that give an image its name.
        (place / "image.tmp").write_bytes(b"left")
        zramfs("ramdisk", point, "--size", 16 * MIB, "--keep", image)
        try:
            wait_until(lambda: names(place) == ["image", "killed"], "the start has removed what was left", 60)
            assert (point / "file").read_text() == "third"
        finally:
            stop(point)


def names(place: Path) -> list[str]:
    return sorted(name for name in os.listdir(place) if name != "lost+found")


def expect_whole_images(place: Path) -> None:
    """Wherever a save is killed, the old image is there or the new one. Nothing else is, but for the moment
    between the two steps that give a file its name, and that goes with the next start."""
    done = run(sys.executable, "-m", "tests.support.killed_saves", place, env=python_environment())
    found = json.loads(done.stdout)
    assert found.keys() == POINTS.keys()
    for point, (killed, after, cleaned) in found.items():
        which = "new" if point in ("after the rename", "before the directory is on the disk") else "old"
        left = ["image.tmp"] if point in ("when it has a name", "before the rename") else []
        assert killed and after == ["image", *left, which] and cleaned == ["image", which], point


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_ram_disk_is_saved_while_its_file_system_is_in_use(kind: str, tmp_path: Path) -> None:
    """Files are written one after the other, each synced: those in the image are the first ones, whole."""
    point, image = tmp_path / "disk", tmp_path / "image"
    zramfs("ramdisk", point, "--size", SIZES[kind], "--fs", kind)
    written, over = [0], threading.Event()

    def write() -> None:
        while not over.is_set() and written[0] < 2000:
            with open(point / f"file{written[0]}", "wb") as file:
                file.write(content(written[0]))
                file.flush()
                os.fsync(file.fileno())
            written[0] += 1

    thread = threading.Thread(target=write, daemon=True)
    try:
        thread.start()
        wait_until(lambda: written[0] > 20, "it writes", 60)
        zramfs("save", point, image)
        before = written[0]
        wait_until(lambda: written[0] > before or written[0] == 2000, "it is not frozen any more", 60)
        over.set()
        thread.join()
        zramfs("stop", point)
    finally:
        over.set()
        if rundir.find(str(point)):
            zramfs("stop", "--force", point)
    with device(tmp_path / "z", None, "--restore", image) as z, loop(z.disk) as block:
        # Before it is checked: a frozen xfs has a log that a mount has to play back.
        with mounted(block, tmp_path / "again") as again:
            files = sorted(int(path.name[4:]) for path in again.glob("file*"))
            assert len(files) > 20 and files == list(range(len(files)))
            assert all((again / f"file{n}").read_bytes() == content(n) for n in files[:-1])
        run(*FSCK[kind], block, timeout=120)
    # As a RAM disk that is kept in it, and is there again.
    for text in ("first", "second"):
        zramfs("ramdisk", point, "--size", SIZES[kind], "--fs", kind, "--keep", image)
        try:
            assert mounts.mount_at(point).fstype == kind and (point / "file0").read_bytes() == content(0)
            assert text == "first" or (point / "kept").read_text() == "first"
            (point / "kept").write_text(text)
        finally:
            stop(point)


def content(number: int) -> bytes:
    return random.Random(number).randbytes(5000)
