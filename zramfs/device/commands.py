# SPDX-License-Identifier: Apache-2.0
"""The grammar of the file `control`: which commands there are, and what each takes.

Nothing here runs a command: handlers.py says what a device does for each. The command line reads this
table for its help and its completion, so it loads no compiled part.
"""
from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from zramfs.errors import ZramfsError
from zramfs.model.density import Density, parse_density
from zramfs.model.estimate import DEFAULT_SAMPLE, parse_sample
from zramfs.model.policy import Policy, parse_policy
from zramfs.text.kernel_numbers import U64_MAX, printable
from zramfs.text.key_values import shown
from zramfs.text.sizes import parse_size

U32_MAX = 0xFFFFFFFF
WRITE_LIMIT = 4096  # bytes that one write(2) may bring

# NAME, NAME=VALUE or NAME VALUE; a value may have blanks and further = in it.
_LINE = re.compile(r"(?P<name>[a-z_]+)(?:(?:\s*=\s*|\s+)(?P<value>(?s:.*)))?")


@dataclass(frozen=True)
class Command:
    """argument: what the help calls the part behind `=`; None = the command takes none. value: makes
    the argument of its text, or raises ZramfsError(EINVAL). optional: it may be left out."""

    name: str
    argument: str | None
    summary: str
    value: Callable[[str], Any] = str
    optional: bool = False

    @property
    def usage(self) -> str:
        if self.argument is None:
            return self.name
        return f"{self.name}[={self.argument}]" if self.optional else f"{self.name}={self.argument}"


@dataclass(frozen=True)
class SaveArguments:
    """path None: the file that the device keeps. rate: bytes a second, 0 = any. force: replace a file that
    is no image."""

    path: Path | None = None
    rate: int = 0
    force: bool = False


def _size(text: str) -> int:
    # Plain bytes go as far as the kernel's attributes do, beyond what a file can be long.
    if text.isdecimal() and int(text) <= U64_MAX:
        return int(text)
    try:
        return parse_size(text)
    except ValueError as error:
        raise ZramfsError(errno.EINVAL, str(error)) from None


def _sample(text: str) -> int:
    try:
        return parse_sample(text) if text else DEFAULT_SAMPLE
    except ValueError as error:
        raise ZramfsError(errno.EINVAL, str(error)) from None


def _new_size(text: str) -> tuple[int, bool]:
    """Bytes, and whether what is stored behind them is to be dropped."""
    size, _, rest = text.partition(" ")
    if rest.strip() not in ("", "discard"):
        raise ZramfsError(
            errno.EINVAL, f"resize takes a size, and discard if pages behind it may go, not {shown(rest)}")
    return _size(size), bool(rest.strip())


def _save(text: str) -> SaveArguments:
    """The path comes last, so that it may have blanks in it."""
    options, slash, path = text.partition("/")
    rate, force = 0, False
    for word in options.split():
        key, _, value = word.partition("=")
        if word == "force":
            force = True
        elif key == "rate" and value:
            rate = _size(value)
        else:
            raise ZramfsError(
                errno.EINVAL, f"save takes rate=SIZE (a second), force, and last an absolute path, not "
                f"{shown(word)}")
    return SaveArguments(Path(slash + path) if slash else None, rate, force)


def _kept(text: str) -> Path | None:
    if text == "off":
        return None
    if not text.startswith("/"):
        raise ZramfsError(errno.EINVAL, f"keep takes an absolute path or off, not {shown(text)}")
    return Path(text)


def _governed(text: str) -> bool | int:
    """Whether it is, or bytes that it is spared for a while."""
    word, _, size = text.partition(" ")
    return _size(size.strip()) if word == "spare" else _switch(text)


def _zero(text: str) -> None:
    if text != "0":
        raise ZramfsError(errno.EINVAL, f"mem_used_max takes 0 only (forget the peak), not {text!r}")


def _kind_of_compaction(text: str) -> str:
    if text not in ("", "objects", "pages", "all"):
        raise ZramfsError(errno.EINVAL, f"compact takes objects, pages or all (the default), not {text!r}")
    return text or "all"


def _switch(text: str) -> bool:
    if text not in ("on", "off", "1", "0"):
        raise ZramfsError(errno.EINVAL, f"expected on or off, got {shown(text)}")
    return text in ("on", "1")


def age_of(text: str) -> int | None:
    """Seconds as kstrtoull() reads them with base 0; None for `all`."""
    if text == "all":
        return None
    if not re.fullmatch(r"\+?(0[xX][0-9a-fA-F]{1,40}|0[0-7]{0,40}|[1-9][0-9]{0,40})", text):
        raise ZramfsError(errno.EINVAL, f"idle takes all or an age in seconds, not {shown(text)}")
    digits = text.removeprefix("+")
    octal = digits.startswith("0") and digits[1:].isdecimal()
    age = int(digits, 8 if octal else 0)
    if age > U64_MAX:
        raise ZramfsError(errno.EINVAL, f"idle takes an age of at most {U64_MAX} seconds, not {shown(text)}")
    return age


def _blocks(text: str, least: int = 0, most: int = U64_MAX) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text) or not least <= int(text) <= most:
        raise ZramfsError(
            errno.EINVAL, f"expected a number of blocks from {least} to {most}, got {shown(text)}")
    return int(text)


def _policy(text: str) -> tuple[str, Policy | None]:
    try:
        return parse_policy(text)
    except ValueError as error:
        raise ZramfsError(errno.EINVAL, str(error)) from None


def _density(text: str) -> Density:
    try:
        return parse_density(text)
    except ValueError as error:
        raise ZramfsError(errno.EINVAL, str(error)) from None


def _whole_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ZramfsError(errno.EINVAL, f"expected a whole number, got {printable(text.encode())}")
    return int(text)


COMMANDS = {
    command.name: command
    for command in (
        Command("compact", "objects|pages|all",
                "make the pool dense and give memory back; returns when it is done",
                _kind_of_compaction, optional=True),
        Command("reset", None, "drop all data and settings; nobody may have disk open"),
        Command("disksize", "SIZE", "set the device up, once until the next reset", _size),
        Command("resize", "SIZE [discard]",
                "make a device that may be in use larger or smaller; discard: drop what lies behind SIZE",
                _new_size),
        Command("comp_algorithm", "NAME[:LEVEL][:dict=/PATH]", "choose the compressor, before disksize"),
        Command("algorithm_params", "KEY=VALUE...",
                "algo=, priority=, level=, dict= of a chosen compressor, before disksize", optional=True),
        Command("recomp_algorithm", "algo=NAME [priority=1..3]",
                "choose a compressor to recompress with, before disksize"),
        Command("recompress", "KEY=VALUE...",
                "type=idle|huge|huge_idle, threshold=, max_pages=, algo=, priority=; default: all pages",
                optional=True),
        Command("units", "KEY=VALUE...",
                "compress neighbours that are idle as one: idle=all|SECONDS, level=; default: marked pages",
                optional=True),
        Command("share", "KEY=VALUE",
                "one object for idle pages with equal contents: idle=all|SECONDS; default: marked pages",
                optional=True),
        Command("dictionary", "KEY=VALUE...",
                "train on idle pages, and recompress if it is worth it: idle=all|SECONDS, level=; default: "
                "marked pages", optional=True),
        Command("estimate", "SIZE",
                "try on a sample of this size what recompress, share and units would win; changes nothing",
                _sample, optional=True),
        Command("idle", "all|SECONDS", "mark pages idle: all, or those not used for so long", age_of),
        Command("access_times", "on|off", "keep the time of each page's last access, for idle=SECONDS",
                _switch),
        Command("backing_dev", "PATH", "block device or file for write-back, before disksize",
                optional=True),
        Command("writeback", "MODE|KEY=VALUE...",
                "type=idle|huge|huge_idle|incompressible, page_index=, page_indexes=LO-HI", optional=True),
        Command("writeback_limit", "BLOCKS", "how many blocks of 4 KiB may still be written back", _blocks),
        Command("writeback_limit_enable", "on|off", "whether writeback_limit is kept to", _switch),
        Command("writeback_batch_size", "BLOCKS", "blocks that are written at once, up to 256",
                partial(_blocks, least=1, most=U32_MAX)),
        Command("compressed_writeback", "on|off", "kept for scripts; data is written back compressed anyway",
                _switch),
        Command("save", "[rate=SIZE] [force] PATH",
                "save the device as it is now into a file; returns when it is there. Without PATH: where it "
                "is kept", _save, optional=True),
        Command("keep", "PATH|off", "file that the device is saved into at its end", _kept),
        Command("policy", "KIND KEY=VALUE...|off",
                "recompress idle=AGE [algo=NAME]; units idle=AGE [level=NUMBER]; writeback idle=AGE "
                "[limit=SIZE, in 24 hours]", _policy),
        Command("density", "off|auto[:SHARE%]|max",
                "become denser by itself: auto with little CPU as pages grow old, max at once", _density),
        Command("mem_limit", "SIZE", "memory that the pool may take, 0 for no limit", _size),
        Command("keep_free", "SIZE", "memory of the host that is left to others, 0 for none", _size),
        Command("mem_used_max", "0", "forget the peak of the memory used", _zero),
        Command("proactiveness", "0..100", "how readily the pool is compacted unasked, 0 for never",
                _whole_number),
        Command("govern", "on|off|spare SIZE",
                "keep the file system on disk's loop device within mem_limit; spare: let it have more",
                _governed),
        Command("balloon", "SIZE", "memory to keep from the pool, for the host", _size),
    )
}


def lines(data: bytes) -> list[str]:
    """The commands in what one write(2) brought; blank lines and those that begin with # are left out.

    Raises ZramfsError: E2BIG, EINVAL (NUL bytes, not UTF-8).
    """
    if len(data) > WRITE_LIMIT:
        raise ZramfsError(
            errno.E2BIG,
            f"expected at most {WRITE_LIMIT} bytes of commands in one write, got at least {len(data)}",
        )
    if b"\0" in data:
        raise ZramfsError(errno.EINVAL, f"expected lines of text, got a NUL byte at offset {data.index(0)}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ZramfsError(
            errno.EINVAL,
            f"expected UTF-8, got {printable(data[error.start : error.end])} at offset {error.start}",
        ) from None
    stripped = (line.strip() for line in text.split("\n"))
    return [line for line in stripped if line and not line.startswith("#")]


def parse(line: str) -> tuple[Command, str]:
    """The command of a line, and the text behind its `=`. Raises ZramfsError(EINVAL)."""
    match = _LINE.fullmatch(line)
    command = COMMANDS.get(match["name"]) if match else None
    if match is None or command is None:
        usages = ", ".join(known.usage for known in COMMANDS.values())
        close = difflib.get_close_matches(re.split(r"[\s=]", line)[0].lower(), COMMANDS, 1)
        hint = f"; did you mean {COMMANDS[close[0]].usage}?" if close else ";"
        raise ZramfsError(
            errno.EINVAL, f"unknown command {shown(line)}{hint} expected one of {usages}"
        )
    value = match["value"]
    if command.argument is None and value is not None:
        raise ZramfsError(
            errno.EINVAL,
            f"{command.name} takes no value, got {shown(value)}; write {command.usage}",
        )
    if command.argument is not None and not value and not command.optional:
        raise ZramfsError(errno.EINVAL, f"{command.name} needs a value: write {command.usage}")
    return command, value or ""
