# SPDX-License-Identifier: Apache-2.0
"""The command line for ordinary users, and what they may do with the devices of others."""
from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from users import NOBODY, as_nobody, fuse_for_everybody, zramfs_as_nobody
from whole import MIB, device, run

from zramfs import rundir

pytestmark = [pytest.mark.requires("root", "fuse", "setpriv", "unshare", "nsenter"), pytest.mark.timeout(120)]


def test_an_ordinary_user_has_devices_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZRAMFS_RUN_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    his, base = home / "his", Path(f"/tmp/zramfs-{NOBODY}")
    his.mkdir()
    os.chown(his, NOBODY, NOBODY)
    with fuse_for_everybody(home) as prefix:
        command = zramfs_as_nobody(prefix)
        run(*command, "create", his / "device", "--size", "1M", cwd="/")
        try:
            state_file = base / rundir.escape(his / "device") / "state.json"
            assert (base.stat().st_mode & 0o777, base.stat().st_uid) == (0o700, NOBODY)
            assert state_file.parent.stat().st_mode & 0o777 == 0o700
            live_with(command, prefix, his)
        finally:
            run(*command, "stop", his / "device", cwd="/")
    assert not state_file.parent.exists()
    assert os.listdir(his) == []
    with contextlib.suppress(OSError):  # he may have others
        base.rmdir()


def live_with(command: list[str], prefix: list[str], his: Path) -> None:
    shown = json.loads(
        run(*command, "status", "--json", his / "device", "-o", "DISKSIZE,STATE", cwd="/").stdout
    )
    assert shown == {"zramfs": [{"disksize": "1M", "state": "ready"}]}
    disk = his / "device/disk"
    script = f"printf mine | dd of={disk} conv=notrunc status=none && head -c 4 {disk}"
    assert run(*prefix, *as_nobody("sh", "-c", script), cwd="/").stdout == "mine"
    assert "no limit" in run(*command, "control", his / "device", cwd="/").stdout
    refused = run(*command, "ramdisk", his / "fs", "--size", "1M", check=False, cwd="/")
    assert refused.returncode == 1
    assert "a RAM disk needs root, for its loop device and its mount" in refused.stderr
    refused = run(*command, "create", "/mnt/his", "--size", "1M", check=False, cwd="/")
    assert refused.returncode == 1
    assert "/mnt/his does not exist and could not be created: Permission denied" in refused.stderr


def test_others_may_look_at_a_device_with_allow_other_and_not_touch_it(home: Path) -> None:
    command = zramfs_as_nobody([])
    for options, code in (([], 1), (["--allow-other"], 0)):
        with device(home / "device", MIB, *options) as made:
            seen = run(
                *command, "status", made.directory, "-n", "-o", "DISKSIZE,STREAMS", check=False, cwd="/"
            )
            assert (seen.returncode, seen.stdout.split()) == (code, ["1M"] if options else [])
            assert f"{made.directory}/zram/disksize: Permission denied" in seen.stderr or options
            for words in (["control", made.directory], ["control", made.directory, "compact"]):
                refused = run(*command, *words, check=False, cwd="/")
                assert refused.returncode == 1
                assert f"{made.directory}/control: Permission denied" in refused.stderr
            refused = run(*command, "stop", made.directory, check=False, cwd="/")
            assert "no zramfs device of yours is on" in refused.stderr
            assert run(*as_nobody("cat", made.disk), check=False, cwd="/").returncode != 0
