# SPDX-License-Identifier: Apache-2.0
"""mount -t fuse.zramfs NAME DIR -o size=1G,...

mount(8) runs mount.fuse3, which runs `zramfs NAME DIR -o OPTIONS` through sh, and has taken the words
out that are for mount itself (noauto, nofail, _netdev, x-...). Called by hand they may all be there.
"""
from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import click

from .. import lifecycle
from ..config import DEFAULT_ALGO, DEFAULT_THREADS, DeviceConfig
from . import options
from .output import say

# Words every file system takes in fstab. The mounts are nosuid and nodev whatever stands here, and
# hold no programs; so the words that allow or forbid these things have nothing to decide.
_FOR_ALL = frozenset((
    "defaults rw auto noauto user nouser users owner group nofail _netdev dev nodev suid nosuid exec noexec "
    "async sync dirsync atime noatime diratime nodiratime relatime norelatime strictatime nostrictatime "
    "lazytime nolazytime silent loud"
).split())
_NEVER = {
    "ro": "a device begins empty, so read-only there is nothing to read",
    "remount": "a device keeps its options; `zramfs control` changes what can be changed",
}
_OURS = "size=SIZE, algo=NAME[:LEVEL], mem_limit=SIZE, threads=NUMBER, allow_other"


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
    name, place = words[0], options.directory(words[1])
    values = parse(words[3])
    algo, level = values.get("algo", (DEFAULT_ALGO, None))
    threads = values.get("threads", DEFAULT_THREADS)
    shared = "allow_other" in values
    new = lifecycle.claim(place, "device", threads=threads, shared=shared, say=say)
    config = DeviceConfig(
        directory=place, rundir=new.path, size=values.get("size", 0), algo=algo, level=level,
        mem_limit=values.get("mem_limit", 0), threads=threads, name=name, allow_other=shared,
    )
    lifecycle.start(new, config)


def parse(text: str) -> dict[str, object]:
    """The values of our own options. Raises click.UsageError with a sentence about the first bad one."""
    parsers: dict[str, Callable[[str], object]] = {
        "size": lambda value: options.size(value, least=1),
        "mem_limit": lambda value: options.size(value, least=0),
        "algo": options.algorithm,
        "threads": options.threads,
    }
    values: dict[str, object] = {}
    for word in text.split(","):
        key, equals, value = word.partition("=")
        if key in parsers:
            if not value:
                raise click.UsageError(f"the mount option {key} needs a value; expected some of {_OURS}")
            try:
                values[key] = parsers[key](value)
            except ValueError as error:
                raise click.UsageError(f"the mount option {word}: {error}") from None
        elif word == "allow_other":
            values[key] = True
        elif key in _NEVER:
            raise click.UsageError(f"the mount option {word} makes no sense here: {_NEVER[key]}")
        elif word and not (word in _FOR_ALL or key == "comment" or word.startswith(("x-", "X-"))) or equals and not key:
            raise click.UsageError(
                f"unknown mount option {word!r}: expected some of {_OURS}, or what every file system takes"
            )
    return values
