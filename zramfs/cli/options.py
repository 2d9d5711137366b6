# SPDX-License-Identifier: Apache-2.0
"""Values on the command line and in mount options: sizes, algorithms, directories."""
from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from zramfs import __version__
from zramfs.codecs.spec import parse_secondary, parse_spec
from zramfs.errors import ZramfsError
from zramfs.host import mounts, paths
from zramfs.lifecycle import claim, rundir
from zramfs.lifecycle.rundir import Rundir
from zramfs.model.config import DEFAULT_ALGO, DEFAULT_THREADS, MAX_THREADS, Algorithm, DeviceConfig
from zramfs.text import sizes

from . import completion

C = TypeVar("C", bound=Callable[..., Any])


def described(
    size: int | None = None, algo: Algorithm | None = None, recomp_algo: Sequence[Algorithm] = (),
    **values: Any,
) -> DeviceConfig:
    """A device as it was asked for. size in bytes, None = to be set up later; recomp_algo by priority from
    1; values: fields of DeviceConfig."""
    return DeviceConfig(size=size or 0, algorithms=(algo or Algorithm(DEFAULT_ALGO), *recomp_algo), **values)


def device_size(text: str) -> int:
    """Bytes, at least one. ValueError with a sentence."""
    value = sizes.parse_size(text)
    if value == 0:
        raise ValueError(f"{text!r} is too small: expected at least 1 byte")
    return value


def threads(text: str) -> int:
    """ValueError with a sentence."""
    if not (text.isdecimal() and 1 <= int(text) <= MAX_THREADS):
        raise ValueError(f"{text!r} is not a number of threads: expected 1 to {MAX_THREADS}")
    return int(text)


def path(text: str) -> Path:
    """Absolute, because the device has another working directory. ValueError with a sentence."""
    if not text or "\n" in text:
        raise ValueError(f"{text!r} is not a path that can be used here")
    return Path(os.path.abspath(text))


# By the name they have for described() and as mount options.
PARSERS: dict[str, Callable[[str], Any]] = {
    "size": device_size,
    "algo": parse_spec,
    "recomp_algo": parse_secondary,
    "mem_limit": sizes.parse_size,
    "keep_free": sizes.parse_size,
    "threads": threads,
    "writeback": path,
}


class _Value(click.ParamType):
    """A value that a function makes of the text, its ValueError being the complaint."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return PARSERS[self.name](value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


DEVICE_SIZE = _Value("size")


def device_options(command: C) -> C:
    """--algo and the like, which every command that makes a device has.

    Long: a table of options."""
    for option in (
        click.option(
            "--threads", type=_Value("threads"), default=str(DEFAULT_THREADS), metavar="NUMBER",
            show_default=True, help="Threads that serve the device.",
        ),
        click.option(
            "--mem-limit", type=_Value("mem_limit"), default="0", metavar="SIZE",
            help="Memory the compressed data may take; more answers ENOSPC.  [default: no limit]",
        ),
        click.option(
            "--keep-free", type=_Value("keep_free"), metavar="SIZE",
            help="Memory of the host to leave to others: while less is available, the device does not grow, "
                 "and answers ENOSPC; 0 for none.  [default: 3% of the RAM, at least 64M; none for swap]",
        ),
        click.option(
            "--writeback", type=_Value("writeback"), metavar="PATH", shell_complete=completion.files,
            help="Block device or regular file for write-back; its data is lost.",
        ),
        click.option(
            "--wipe", is_flag=True,
            help="Zero what was discarded or overwritten, in memory and on the backing store.",
        ),
        click.option(
            "--access-times", is_flag=True,
            help="Keep the time of each page's last access (4 bytes a page), for marking idle by age.",
        ),
        click.option(
            "--recomp-algo", type=_Value("recomp_algo"), multiple=True, metavar="ALGO[:LEVEL][:dict=FILE]",
            help="Compressor of recompression; up to three, by priority from 1.",
            shell_complete=completion.one_of(("lz4", "lz4hc", "zstd")),
        ),
        click.option(
            "--algo", type=_Value("algo"), default=DEFAULT_ALGO, metavar="ALGO[:LEVEL][:dict=FILE]",
            show_default=True, help="Compressor: lz4, lz4hc, zstd or none, with a dictionary if you like.",
            shell_complete=completion.one_of(("lz4", "lz4hc", "zstd", "none")),
        ),
    ):
        command = option(command)
    return command


def over_contents(command: C) -> C:
    """--force; `swap` has one of its own, which does more."""
    return click.option(
        "--force", "forced", is_flag=True,
        help="Take what --writeback names although it holds something, which is lost.")(command)


def lock_option(command: C) -> C:
    """--lock, for devices other than swap, which is always locked."""
    return click.option(
        "--lock", is_flag=True, help="Lock the device's memory, so that none of it is swapped out to a disk.",
    )(command)


def standby_option(command: C) -> C:
    """--standby, for devices other than swap, which always has one."""
    return click.option(
        "--standby", is_flag=True,
        help="Keep a second process ready, so that the death of the first is a pause of milliseconds.",
    )(command)


def version(command: C, **more: Any) -> C:
    """-V and --version; more: what else click.option() knows."""
    return click.version_option(
        __version__, "-V", "--version", prog_name="zramfs", message="%(prog)s %(version)s", **more)(command)


def device(text: str) -> Rundir:
    """The device that DIR means. Raises ZramfsError."""
    found = rundir.find(text)
    if found is None:
        raise no_device(text)
    return found


def tree(text: str) -> Path:
    """The directory with `control` and the rest: of a device of this user, or of another user's device that
    is mounted on this very directory. Raises ZramfsError."""
    place = paths.resolve(text)
    mount = mounts.mount_at(place)
    if mount is not None and mount.fstype == mounts.FSTYPE:
        return place
    state = device(text).read()
    if state is None:
        raise ZramfsError(errno.ENODEV, f"the device {text} never came up; `zramfs stop {text}` cleans it up")
    return Path(state.directory)


def no_device(text: str) -> ZramfsError:
    known = [
        state.where if state else each.name
        for each in rundir.rundirs()
        for state in [each.read()]
    ]
    place = paths.resolve(text)
    there = f"yours are on {', '.join(known)}" if known else "there is none at all"
    return ZramfsError(
        errno.ENODEV,
        f"no zramfs device of yours is on {place}, and none is called {text}; "
        f"{claim.foreign_mount(place) or there}",
    )
