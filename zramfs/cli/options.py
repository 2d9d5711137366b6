# SPDX-License-Identifier: Apache-2.0
"""Values on the command line and in mount options: sizes, algorithms, directories."""
from __future__ import annotations

import errno
from pathlib import Path

import click

from .. import rundir, sizes
from ..config import DEFAULT_ALGO, DEFAULT_THREADS
from ..errors import ZramfsError
from ..rundir import Rundir

# More threads than this never helped on one connection, and each keeps 1 MiB buffers.
MAX_THREADS = 64


def size(text: str, *, least: int) -> int:
    """Bytes. ValueError with a sentence."""
    value = sizes.parse_size(text)
    if value < least:
        raise ValueError(f"{text!r} is too small: expected at least {least} byte{'s' if least != 1 else ''}")
    return value


def algorithm(text: str) -> tuple[str, int | None]:
    """NAME[:LEVEL] as (name, level). ValueError with a sentence."""
    from .. import codecs

    codec = codecs.parse(text)
    return codec.algo, codec.level


def threads(text: str) -> int:
    """ValueError with a sentence."""
    if not (text.isdecimal() and 1 <= int(text) <= MAX_THREADS):
        raise ValueError(f"{text!r} is not a number of threads: expected 1 to {MAX_THREADS}")
    return int(text)


class _Value(click.ParamType):
    def __init__(self, name: str, parse: object) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


DEVICE_SIZE = _Value("size", lambda text: size(text, least=1))
LIMIT = _Value("size", lambda text: size(text, least=0))
ALGORITHM = _Value("algo[:level]", algorithm)
THREADS = _Value("number", threads)


def device_options(command: object) -> object:
    """--algo, --mem-limit and --threads, which every command that makes a device has."""
    for option in (
        click.option(
            "--threads", type=THREADS, default=str(DEFAULT_THREADS), show_default=True,
            help="Threads that serve the device.",
        ),
        click.option(
            "--mem-limit", type=LIMIT, default="0", metavar="SIZE",
            help="Memory the compressed data may take; more answers ENOSPC.  [default: no limit]",
        ),
        click.option(
            "--algo", type=ALGORITHM, default=DEFAULT_ALGO, metavar="ALGO[:LEVEL]", show_default=True,
            help="Compressor: lz4, lz4hc, zstd or none.",
        ),
    ):
        command = option(command)
    return command


def directory(text: str) -> Path:
    return rundir.resolve(text)


def device(text: str) -> Rundir:
    """The device that DIR means. Raises ZramfsError."""
    found = rundir.find(text)
    if found is None:
        raise no_device(text)
    return found


def no_device(text: str) -> ZramfsError:
    known = [
        (state.mountpoint or state.directory) if state else each.name
        for each in rundir.rundirs()
        for state in [each.read()]
    ]
    there = f"there {'is' if len(known) == 1 else 'are'} {', '.join(known)}" if known else "there is none at all"
    return ZramfsError(
        errno.ENODEV, f"no zramfs device of yours is on {rundir.resolve(text)}, and none is called {text}; {there}"
    )
