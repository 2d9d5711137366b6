# SPDX-License-Identifier: Apache-2.0
"""The command line for ordinary users, and what they may do with the devices of others."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.users import NOBODY, SOMEBODY, as_nobody, fuse_for_everybody, zramfs_as_nobody
from tests.support.whole import MIB, device, run
from zramfs.host import paths

pytestmark = [pytest.mark.requires("root", "fuse", "setpriv", "unshare", "nsenter"), pytest.mark.timeout(240)]


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
            state_file = base / paths.escape(his / "device") / "state.json"
            assert (base.stat().st_mode & 0o777, base.stat().st_uid) == (0o700, NOBODY)
            assert state_file.parent.stat().st_mode & 0o777 == 0o700
            live_with(command, prefix, his)
        finally:
            run(*command, "stop", his / "device", cwd="/")
    assert not state_file.parent.exists()
    assert os.listdir(his) == []


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


FILES = "/usr/include/linux"
# What an ordinary user does with a device, each step with a tool that knows nothing of zramfs.
# $1 is the device's directory, $2 an empty one of his.
NO_ROOT = f"""
set -e
PATH=/usr/sbin:/usr/bin:/sbin:/bin
[ "$(id -u)" != 0 ]
mkfs.ext4 -q -F -E nodiscard "$1/disk"
mkdir "$2/mnt"
# In the foreground, to wait for: it writes what it holds back when it ends, some time after its unmount.
# By a relative name, which mounts then shows: mkfs.btrfs of another test would not be let in by its path.
(cd "$1" && exec fuse2fs -f -o fakeroot disk "$2/mnt") >"$2/said" 2>&1 & server=$!
for try in $(seq 1000); do mountpoint -q "$2/mnt" && break; sleep 0.05; done
mountpoint -q "$2/mnt" || {{ cat "$2/said"; exit 1; }}
cp -r {FILES} "$2/mnt/files"
diff -r {FILES} "$2/mnt/files"
fusermount3 -u "$2/mnt"
wait $server
e2fsck -fn "$1/disk" >"$2/e2fsck" 2>&1 || {{ cat "$2/e2fsck"; exit 1; }}
qemu-img convert -f raw -O qcow2 "$1/disk" "$2/copy.qcow2"
qemu-img compare -f raw -F qcow2 "$1/disk" "$2/copy.qcow2"
dd if=/dev/zero of="$1/disk" bs=1M count=64 conv=notrunc status=none
qemu-img convert -n -f qcow2 -O raw "$2/copy.qcow2" "$1/disk"
qemu-img compare -f qcow2 -F raw "$2/copy.qcow2" "$1/disk"
rm "$2/copy.qcow2" "$2/e2fsck" "$2/said"
rmdir "$2/mnt"
"""


@pytest.mark.requires("mkfs.ext4", "fuse2fs", "qemu-img", "e2fsck")
def test_an_ordinary_user_lives_without_root(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZRAMFS_RUN_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    his = home / "his"
    his.mkdir()
    os.chown(his, NOBODY, NOBODY)
    with fuse_for_everybody(home) as prefix:
        command = zramfs_as_nobody(prefix)
        run(*command, "create", his / "device", "--size", "64M", "--algo", "zstd", cwd="/")
        try:
            script = as_nobody("sh", "-c", NO_ROOT, "sh", his / "device", his)
            said = run(*prefix, *script, cwd="/", timeout=200).stdout
            assert said.splitlines() == ["Images are identical."] * 2
            stat_ = run(*prefix, *as_nobody("cat", his / "device/zram/mm_stat"), cwd="/").stdout.split()
            assert int(stat_[1]) < int(stat_[0]), "it was not compressed"
            # Nobody else gets in: not another ordinary user, and not even root.
            for others in (as_nobody(uid=SOMEBODY), []):
                for path in ("disk", "control", "zram/mm_stat"):
                    refused = run(*prefix, *others, "cat", his / "device" / path, check=False, cwd="/")
                    assert (refused.returncode, refused.stdout) == (1, "")
                    assert "Permission denied" in refused.stderr
        finally:
            run(*command, "stop", his / "device", cwd="/")
    assert os.listdir(his) == []


def test_what_needs_root_says_so(home: Path) -> None:
    command = zramfs_as_nobody([])
    for words, sentence in (
        (["ramdisk", home / "z", "--size", "1M"], "a RAM disk needs root, for its loop device and its mount"),
        (["swap", "--size", "1M"], "swap needs root, for its loop device and for swapon"),
    ):
        refused = run(*command, *words, check=False, cwd="/")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert sentence in refused.stderr
    refused = run(*command, "create", home / "z", "--size", "1M", "--allow-other", check=False, cwd="/")
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr  # of the directory, which is root's
    assert not (home / "z").exists()


def test_nobody_but_the_owner_reads_disk_or_writes_anything(home: Path) -> None:
    """Also where others may look: --allow-other."""
    with device(home / "device", MIB, "--allow-other") as made:
        tried = 0
        for path in sorted(made.directory.rglob("*")):
            if path.is_dir():
                continue
            tried += 1
            script = 'exec 3<>"$1"'
            refused = run(*as_nobody("sh", "-c", script, "sh", path), check=False, cwd="/")
            assert refused.returncode != 0 and "Permission denied" in refused.stderr, path
        assert tried > 15
        for path in (made.disk, made.disk.resolve(), made.directory / "control"):
            refused = run(*as_nobody("cat", path), check=False, cwd="/")
            assert (refused.returncode, refused.stdout) == (1, "") and "Permission denied" in refused.stderr
        # Nor may he give himself the right, or make names of his own.
        for words in (["chmod", "666", made.disk], ["chown", str(NOBODY), made.directory / "control"],
                      ["touch", made.directory / "new"], ["rm", "-f", made.directory / "control"]):
            assert run(*as_nobody(*words), check=False, cwd="/").returncode != 0, words
        assert made.read("zram/initstate") == "1\n"
