# SPDX-License-Identifier: Apache-2.0
"""A daemon that is killed while its device is saved: the save is lost, and nothing else."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.images import is_written_in
from tests.support.killer import kill_daemon
from tests.support.whole import MIB, ZRAMFS, device, opened, wait_until, zramfs

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]


def test_whoever_saves_is_told_and_the_old_image_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    image = tmp_path / "image"
    with device(tmp_path / "z", 16 * MIB, "--standby") as z:
        with opened(os.path.realpath(z.disk)) as fd:
            os.pwrite(fd, os.urandom(8 * MIB), 0)
            zramfs("save", tmp_path / "z", image)
            before = image.read_bytes()
            saving = subprocess.Popen([*ZRAMFS, "save", "--rate", "64K", str(tmp_path / "z"), str(image)],
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            wait_until(lambda: is_written_in(tmp_path), "a part of the new image", 30)
            kill_daemon(z.directory)
            said = saving.communicate(timeout=60)[1]
        assert saving.returncode == 1 and "the daemon died before it answered, and another process" in said
        assert image.read_bytes() == before and list(tmp_path.glob("image*")) == [image]
        wait_until(lambda: os.path.exists(z.directory / "control"), "the tree", 30)
        zramfs("save", tmp_path / "z", image)
        assert list(tmp_path.glob("image*")) == [image]
    zramfs("create", tmp_path / "z", "--restore", image)
    zramfs("stop", tmp_path / "z")
