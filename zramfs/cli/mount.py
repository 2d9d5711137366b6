# SPDX-License-Identifier: Apache-2.0
"""mount -t fuse.zramfs NAME DIR -o size=1G,...

mount(8) runs mount.fuse3, which runs `zramfs NAME DIR -o OPTIONS` through sh, and has taken the words
out that are for mount itself (noauto, nofail, _netdev, x-...). Called by hand they may all be there.
"""
from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

import click

from zramfs.host import safe_paths
from zramfs.lifecycle import claim, start
from zramfs.model.config import DeviceConfig

from .options import PARSERS, described
from .output import say

# Words that every file system takes in fstab. The mounts are always nosuid and nodev, and hold no programs,
# so the words that allow or forbid these things decide nothing.
_FOR_ALL = frozenset((
    "defaults", "rw", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev",
    "silent", "loud", "dev", "nodev", "suid", "nosuid", "exec", "noexec", "async", "sync", "dirsync",
    "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime",
    "lazytime", "nolazytime",
))
_NEVER = {
    "ro": "a device begins empty, so read-only there is nothing to read",
    "remount": "a device keeps its options; `zramfs control` changes what can be changed",
}
_OURS = (
    "size=SIZE, algo=NAME[:LEVEL], recomp_algo=NAME[:LEVEL] (up to three times), mem_limit=SIZE, "
    "keep_free=SIZE, threads=NUMBER, writeback=PATH, access_times, wipe, allow_other, lock, standby"
)


def is_mount_call(words: Sequence[str], commands: Container[str]) -> bool:
    """NAME DIR -o OPTIONS. mount.fuse3 always puts rw or ro first, which no command of ours takes
    after -o; so NAME may even be the word of a command."""
    if len(words) < 2 or words[0].startswith("-"):
        return False
    if len(words) == 4 and words[2] == "-o" and words[3].split(",")[0] in ("rw", "ro"):
        return True
    return words[0] not in commands and "-o" in words[2:]


def mount(words: Sequence[str]) -> None:
    """Makes the device and returns when it is ready. Raises click.UsageError, ZramfsError."""
    if len(words) != 4 or words[2] != "-o":
        raise click.UsageError(f"expected NAME DIR -o OPTIONS as mount.fuse3 calls it, got {' '.join(words)}")
    new, config = claim.claim_place(safe_paths.resolve(words[1]), "device", parse_options(words[3]), say=say)
    start.start_device(new, replace(config, name=words[0]), say=say)


def parse_options(text: str) -> DeviceConfig:
    """Our own options in a list of mount options. Raises click.UsageError about the first bad one."""
    values: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
        key, _, value = word.partition("=")
        if key in PARSERS:
            if not value:
                raise click.UsageError(f"the mount option {key} needs a value; expected some of {_OURS}")
            try:
                parsed = PARSERS[key](value)
                values[key] = (*values.get(key, ()), parsed) if key == "recomp_algo" else parsed
            except ValueError as error:
                raise click.UsageError(f"the mount option {word}: {error}") from None
        elif word in ("allow_other", "access_times", "wipe", "lock", "standby"):
            values[key] = True
        elif key in _NEVER:
            raise click.UsageError(f"the mount option {word} makes no sense here: {_NEVER[key]}")
        elif word not in _FOR_ALL and key != "comment" and not word.startswith(("x-", "X-")):
            raise click.UsageError(
                f"unknown mount option {word!r}: expected some of {_OURS}, or what every file system takes"
            )
    return described(**values)
