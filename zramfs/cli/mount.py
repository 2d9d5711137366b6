# SPDX-License-Identifier: Apache-2.0
"""mount -t fuse.zramfs NAME DIR -o size=1G,... for a device; with fs=TYPE for a RAM disk

mount(8) runs mount.fuse3, which runs `zramfs NAME DIR -o OPTIONS` through sh, and has taken the words
out that are for mount itself (noauto, nofail, _netdev, x-...). Called by hand they may all be there.

A RAM disk is a file system of the kernel, which umount(8) takes away without a word to anybody. So the device
stays with its data, and the next mount on the directory mounts it again.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from zramfs.host import safe_paths
from zramfs.lifecycle import claim, images, ramdisk, remount, rundir, start
from zramfs.lifecycle.ramdisk import FileSystem
from zramfs.model.config import DeviceConfig
from zramfs.model.density import AUTO

from .options import PARSERS, TOP_PARSERS, described, expect_file_system, expect_kept
from .output import say

# Words that every file system takes in fstab, for mount(8) itself and for the mount. The mounts of a device
# are always nosuid and nodev, and hold no programs, so the words that allow or forbid these things decide
# nothing there; those for the mount go on to the file system of a RAM disk.
_FOR_MOUNT = frozenset((
    "silent", "loud", "dev", "nodev", "suid", "nosuid", "exec", "noexec", "async", "sync", "dirsync",
    "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime",
    "lazytime", "nolazytime", "discard", "nodiscard",
))
_FOR_ALL = _FOR_MOUNT | {
    "defaults", "rw", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev",
}
# By the field of FileSystem. x-fs-type is what others call it, and comes only where mount(8) is not between.
_TOP = {"fs": "fs", "x-fs-type": "fs", "mode": "mode", "uid": "owner", "gid": "group", "label": "label"}
_NEVER = {
    "ro": "a device begins empty, so read-only there is nothing to read",
    "remount": "a device keeps its options; `zramfs control` changes what can be changed",
}
_OURS = (
    "size=SIZE, algo=NAME[:LEVEL], recomp_algo=NAME[:LEVEL] (up to three times), mem_limit=SIZE, "
    "keep_free=SIZE, threads=NUMBER, writeback=PATH, density=MODE, access_times, wipe, allow_other, lock, "
    "standby, mode=MODE, uid=USER, gid=GROUP, restore=FILE, and for a RAM disk fs=ext4|xfs|btrfs, "
    "label=LABEL, keep=FILE, keep_every=AGE"
)


def mount(words: Sequence[str]) -> None:
    """Makes the device and returns when it is ready. Raises click.UsageError, ZramfsError."""
    if len(words) != 4 or words[2] != "-o":
        raise click.UsageError(f"expected NAME DIR -o OPTIONS as mount.fuse3 calls it, got {' '.join(words)}")
    place = safe_paths.resolve(words[1])
    config, top = parse_options(words[3], place)
    if top is None:
        new, config = claim.claim_place(place, "device", images.with_image(config), say=say)
        start.start_device(new, replace(config, name=words[0]), say=say)
        return
    ramdisk.expect_able(top.type)
    if remount.mount_again(rundir.find(str(place)), place, say):
        return
    config, restored = images.with_kept(config, top, say)
    new, config = claim.claim_place(place, "ramdisk", config, say=say, mode=top.mode)
    start.start_device(new, replace(config, name=words[0]), restored, say)


def parse_options(text: str, place: Path = Path("/")) -> tuple[DeviceConfig, FileSystem | None]:
    """Our own options in a list of mount options, and the file system on `place` of a RAM disk. Raises
    click.UsageError about the first bad one."""
    values: dict[str, Any] = {}
    top: dict[str, Any] = {}
    passed = []
    for word in filter(None, text.split(",")):
        key, _, value = word.partition("=")
        if key in PARSERS:
            parsed = _parsed(PARSERS[key], key, value, word)
            values[key] = (*values.get(key, ()), parsed) if key == "recomp_algo" else parsed
        elif key in _TOP and "=" in word:
            top[_TOP[key]] = _parsed(TOP_PARSERS.get(_TOP[key], str), key, value, word)
        elif word in ("allow_other", "access_times", "wipe", "lock", "standby"):
            values[key] = True
        elif key in _NEVER:
            raise click.UsageError(f"the mount option {word} makes no sense here: {_NEVER[key]}")
        elif word in _FOR_MOUNT:
            passed.append(word)
        elif word not in _FOR_ALL and key != "comment" and not word.startswith(("x-", "X-")):
            raise click.UsageError(
                f"unknown mount option {word!r}: expected some of {_OURS}, or what every file system takes"
            )
    if "fs" in top:
        return _ram_disk(values, top, passed, place)
    if "label" in top:
        raise click.UsageError("the mount option label is for a RAM disk: add fs=ext4, fs=xfs or fs=btrfs")
    if {"keep", "keep_every"} & set(values):
        raise click.UsageError("the mount option keep is for a RAM disk: add fs=ext4, fs=xfs or fs=btrfs")
    return described(**values, **top), None


def _parsed(parse: Callable[[str], Any], key: str, value: str, word: str) -> Any:
    if not value:
        raise click.UsageError(f"the mount option {key} needs a value; expected some of {_OURS}")
    try:
        return parse(value)
    except ValueError as error:
        raise click.UsageError(f"the mount option {word}: {error}") from None


def _ram_disk(
    values: dict[str, Any], top: dict[str, Any], passed: list[str], place: Path
) -> tuple[DeviceConfig, FileSystem]:
    fs = top.pop("fs")
    if fs not in ramdisk.MKFS:
        raise click.UsageError(
            f"the mount option fs={fs}: expected one of {', '.join(sorted(ramdisk.MKFS))}")
    if "restore" in values:
        raise click.UsageError("the mount option restore is for a plain device; a RAM disk has keep=FILE")
    if "allow_other" in values:
        raise click.UsageError("the mount option allow_other means nothing for a RAM disk: mode=1777 lets "
                               "everybody write")
    if not values.get("size"):
        raise click.UsageError("a RAM disk cannot do without a size: expected the mount option size=SIZE")
    words = passed if {"discard", "nodiscard"} & set(passed) else [ramdisk.DEFAULT_OPTIONS, *passed]
    wanted = FileSystem(fs, place, ",".join(words), **top)
    config = described(**{"density": AUTO, **values})
    expect_kept(config, "keep")
    expect_file_system(wanted, config.size, "size=")
    return config, wanted
