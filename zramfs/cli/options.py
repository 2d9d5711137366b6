# SPDX-License-Identifier: Apache-2.0
"""Values on the command line and in mount options: sizes, algorithms, directories."""
from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from zramfs.codecs.spec import parse_secondary, parse_spec
from zramfs.host.rights import parse_group, parse_mode, parse_user
from zramfs.lifecycle import ramdisk
from zramfs.lifecycle.ramdisk import FileSystem
from zramfs.model.config import DEFAULT_ALGO, DEFAULT_THREADS, MAX_THREADS, Algorithm, DeviceConfig
from zramfs.model.density import DEFAULTS, MODES, parse_density
from zramfs.model.policy import parse_age
from zramfs.text import sizes

from . import completion
from .output import say

_NAME = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_:.-]{0,63}", re.ASCII)
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


def interval(text: str) -> int:
    """Seconds, 0 for none. ValueError with a sentence."""
    return 0 if text == "0" else parse_age(text)


def rate(text: str) -> int:
    """Bytes a second. ValueError with a sentence."""
    value = sizes.parse_size(text)
    if value == 0:
        raise ValueError(f"{text!r} is too little: expected at least 1 byte a second")
    return value


def name(text: str) -> str:
    """ValueError with a sentence."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"expected a NAME of 1 to 64 letters, digits and _ : . -, got {text!r}")
    return text


def mkfs_words(text: str) -> tuple[str, ...]:
    """As a shell splits them. ValueError with a sentence."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"{text!r} does not split into words: {str(error).lower()}") from None


def mount_options(text: str) -> str:
    """ValueError with a sentence."""
    if not text.isprintable() or " " in text:
        raise ValueError(f"expected options with commas and without blanks between, got {text!r}")
    return text


# By the name they have for described() and as mount options.
PARSERS: dict[str, Callable[[str], Any]] = {
    "size": device_size,
    "algo": parse_spec,
    "recomp_algo": parse_secondary,
    "mem_limit": sizes.parse_size,
    "keep_free": sizes.parse_size,
    "threads": threads,
    "writeback": path,
    "restore": path,
    "keep": path,
    "keep_every": interval,
    "density": parse_density,
}
# What describes the file system of a RAM disk, by the field of FileSystem.
TOP_PARSERS: dict[str, Callable[[str], Any]] = {
    "mode": parse_mode,
    "owner": parse_user,
    "group": parse_group,
    "label": str,
    "mkfs": mkfs_words,
    "options": mount_options,
}


_VALUES = {**PARSERS, **TOP_PARSERS, "name": name, "rate": rate}


class Value(click.ParamType):
    """A value that a function makes of the text, its ValueError being the complaint."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return _VALUES[self.name](value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


DEVICE_SIZE = Value("size")
NAME = Value("name")


def device_options(command: C) -> C:
    """--algo and the like, which every command that makes a device has.

    Long: a table of options."""
    for option in (
        click.option(
            "--threads", type=Value("threads"), default=str(DEFAULT_THREADS), metavar="NUMBER",
            show_default=True, help="Threads that serve the device.",
        ),
        click.option(
            "--mem-limit", type=Value("mem_limit"), default="0", metavar="SIZE",
            help="Memory the compressed data may take; more answers ENOSPC.  [default: no limit]",
        ),
        click.option(
            "--keep-free", type=Value("keep_free"), metavar="SIZE",
            help="Memory of the host to leave to others: while less is available, the device does not grow, "
                 "and answers ENOSPC; 0 for none.  [default: 3% of the RAM, at least 64M; none for swap]",
        ),
        click.option(
            "--writeback", type=Value("writeback"), metavar="PATH", shell_complete=completion.files,
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
            "--recomp-algo", type=Value("recomp_algo"), multiple=True, metavar="ALGO[:LEVEL][:dict=FILE]",
            help="Compressor of recompression; up to three, by priority from 1.",
            shell_complete=completion.one_of(("lz4", "lz4hc", "zstd")),
        ),
        click.option(
            "--algo", type=Value("algo"), default=DEFAULT_ALGO, metavar="ALGO[:LEVEL][:dict=FILE]",
            show_default=True, help="Compressor: lz4, lz4hc, zstd or none, with a dictionary if you like.",
            shell_complete=completion.one_of(("lz4", "lz4hc", "zstd", "none")),
        ),
    ):
        command = option(command)
    return command


def name_option(command: C) -> C:
    """--name, for devices that are found by their directory as well."""
    return click.option(
        "--name", type=NAME, metavar="NAME",
        help="What status, stop and control call the device.  [default: from DIR]")(command)


def file_system_options(command: C) -> C:
    """What describes the file system of a RAM disk, by the fields of FileSystem."""
    for option in (
        click.option("--mode", type=Value("mode"), metavar="MODE",
                     help="Of the root directory, in octal: 1777 lets everybody write."),
        click.option("--options", type=Value("options"), default=ramdisk.DEFAULT_OPTIONS, metavar="LIST",
                     show_default=True, help="Mount options, separated by commas."),
        click.option("--mkfs-options", "mkfs", type=Value("mkfs"), default="", metavar="WORDS",
                     help="More words for mkfs, in quotes; they override those of zramfs."),
        click.option("--label", type=Value("label"), metavar="LABEL", help="Of the file system."),
    ):
        command = option(command)
    return command


def expect_file_system(wanted: FileSystem, size: int, size_word: str = "--size ") -> None:
    """Raises click.UsageError about what only the other values tell. size_word: how the size was given."""
    trouble = ramdisk.trouble_with_size(wanted.type, size)
    if trouble:
        raise click.UsageError(f"{trouble}, got {size_word}{sizes.format_size(size)}")
    if wanted.label is not None and (trouble := ramdisk.trouble_with_label(wanted.type, wanted.label)):
        raise click.UsageError(trouble)
    if not any(word.partition("=")[0] == "discard" for word in wanted.options.split(",")):
        say("warning: without the option discard the memory of deleted files is not given back")


def expect_kept(config: DeviceConfig, word: str = "--keep") -> None:
    """Raises click.UsageError. word: how the image is given."""
    if config.keep_every and config.keep is None:
        raise click.UsageError(f"{word}-every says how often {word} is saved: expected {word} FILE too")


def over_contents(command: C) -> C:
    """--force; `swap` has one of its own, which does more."""
    return click.option(
        "--force", "forced", is_flag=True,
        help="Take what --writeback names although it holds something, which is lost.")(command)


def density_option(kind: str) -> Callable[[C], C]:
    """--density, with the default of the kind of device."""
    return click.option(
        "--density", type=Value("density"), default=str(DEFAULTS[kind]), metavar="MODE",
        show_default=True, shell_complete=completion.one_of(MODES),
        help="Become denser by itself, as pages grow old: off, auto (with at most 5% of a core; auto:20%: "
             "with 20%), or max (at once, with all that it takes).")


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
