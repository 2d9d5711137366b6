# SPDX-License-Identifier: Apache-2.0
"""The file `control`: its commands, one a line, and the state it shows to people."""
from __future__ import annotations

import errno
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import backing_store
from .arguments import shown
from .errors import ZramfsError
from .memparse import U64_MAX, printable
from .policy import parse_policy
from .sizes import format_size, format_time, parse_size

if TYPE_CHECKING:
    from .device import Device
    from .device_stats import DeviceStats

U32_MAX = 0xFFFFFFFF
WRITE_LIMIT = 4096  # bytes that one write(2) may bring

# NAME, NAME=VALUE or NAME VALUE; a value may have blanks and further = in it.
_LINE = re.compile(r"(?P<name>[a-z_]+)(?:(?:\s*=\s*|\s+)(?P<value>(?s:.*)))?")


@dataclass(frozen=True)
class Command:
    """argument: what the help calls the part behind `=`; None = the command takes none. optional: it
    may be left out."""

    name: str
    argument: str | None
    summary: str
    run: Callable[[Device, str], Awaitable[None]]
    optional: bool = False

    @property
    def usage(self) -> str:
        if self.argument is None:
            return self.name
        return f"{self.name}[={self.argument}]" if self.optional else f"{self.name}={self.argument}"


def _size(text: str) -> int:
    # Plain bytes go as far as the kernel's attributes do, beyond what a file can be long.
    if text.isdecimal() and int(text) <= U64_MAX:
        return int(text)
    try:
        return parse_size(text)
    except ValueError as error:
        raise ZramfsError(errno.EINVAL, str(error)) from None


async def _reset_peak(device: Device, text: str) -> None:
    if text != "0":
        raise ZramfsError(errno.EINVAL, f"mem_used_max takes 0 only (forget the peak), not {text!r}")
    await device.reset_mem_used_max()


async def _compact(device: Device, text: str) -> None:
    if text not in ("", "objects", "pages", "all"):
        raise ZramfsError(errno.EINVAL, f"compact takes objects, pages or all (the default), not {text!r}")
    await device.compact(text or "all")


def _switch(text: str) -> bool:
    if text not in ("on", "off", "1", "0"):
        raise ZramfsError(errno.EINVAL, f"expected on or off, got {shown(text)}")
    return text in ("on", "1")


def _age(text: str) -> int | None:
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


async def _set(device: Device, **values: int | bool) -> None:
    device.backing_store.set(**values)


def _blocks(text: str, least: int = 0, most: int = U64_MAX) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text) or not least <= int(text) <= most:
        raise ZramfsError(
            errno.EINVAL, f"expected a number of blocks from {least} to {most}, got {shown(text)}")
    return int(text)


async def _set_policy(device: Device, text: str) -> None:
    try:
        kind, policy = parse_policy(text)
    except ValueError as error:
        raise ZramfsError(errno.EINVAL, str(error)) from None
    await device.set_policy(kind, policy)


async def _govern(device: Device, text: str) -> None:
    await (device.governor.take() if _switch(text) else device.governor.let_go())


def _whole_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ZramfsError(errno.EINVAL, f"expected a whole number, got {printable(text.encode())}")
    return int(text)


COMMANDS = {
    command.name: command
    for command in (
        Command("compact", "objects|pages|all",
                "make the pool dense and give memory back; returns when it is done", _compact, optional=True),
        Command("reset", None, "drop all data and settings; nobody may have disk open",
                lambda device, _: device.reset()),
        Command("disksize", "SIZE", "set the device up, once until the next reset",
                lambda device, text: device.set_disksize(_size(text))),
        Command("comp_algorithm", "NAME[:LEVEL][:dict=/PATH]", "choose the compressor, before disksize",
                lambda device, text: device.set_algorithm(text)),
        Command("algorithm_params", "KEY=VALUE...",
                "algo=, priority=, level=, dict= of a chosen compressor, before disksize",
                lambda device, text: device.set_parameters(text), optional=True),
        Command("recomp_algorithm", "algo=NAME [priority=1..3]",
                "choose a compressor to recompress with, before disksize",
                lambda device, text: device.set_secondary(text)),
        Command("recompress", "KEY=VALUE...",
                "type=idle|huge|huge_idle, threshold=, max_pages=, algo=, priority=; default: all pages",
                lambda device, text: device.recompress(text), optional=True),
        Command("idle", "all|SECONDS", "mark pages idle: all, or those not used for so long",
                lambda device, text: device.mark_idle(_age(text))),
        Command("access_times", "on|off", "keep the time of each page's last access, for idle=SECONDS",
                lambda device, text: device.set_access_times(_switch(text))),
        Command("backing_dev", "PATH", "block device or file for write-back, before disksize",
                lambda device, text: device.set_backing_dev(text), optional=True),
        Command("writeback", "MODE|KEY=VALUE...",
                "type=idle|huge|huge_idle|incompressible, page_index=, page_indexes=LO-HI",
                lambda device, text: device.write_back(text), optional=True),
        Command("writeback_limit", "BLOCKS", "how many blocks of 4 KiB may still be written back",
                lambda device, text: _set(device, limit=_blocks(text))),
        Command("writeback_limit_enable", "on|off", "whether writeback_limit is kept to",
                lambda device, text: _set(device, limit_enable=_switch(text))),
        Command("writeback_batch_size", "BLOCKS", "blocks that are written at once, up to 256",
                lambda device, text: _set(device, batch_size=_blocks(text, 1, U32_MAX))),
        Command("compressed_writeback", "on|off", "kept for scripts; data is written back compressed anyway",
                lambda device, text: device.set_compressed_writeback(_switch(text))),
        Command("policy", "recompress|writeback KEY=VALUE...|off",
                "recompress idle=AGE [algo=NAME]; writeback idle=AGE [limit=SIZE, in 24 hours]", _set_policy),
        Command("mem_limit", "SIZE", "memory that the pool may take, 0 for no limit",
                lambda device, text: device.set_mem_limit(_size(text))),
        Command("mem_used_max", "0", "forget the peak of the memory used", _reset_peak),
        Command("proactiveness", "0..100", "how readily the pool is compacted unasked, 0 for never",
                lambda device, text: device.set_proactiveness(_whole_number(text))),
        Command("govern", "on|off", "keep the file system on disk's loop device within mem_limit", _govern),
        Command("balloon", "SIZE", "memory to keep from the pool, for the host",
                lambda device, text: device.set_balloon(_size(text))),
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
        raise ZramfsError(
            errno.EINVAL, f"unknown command {shown(line)}; expected one of {usages}"
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


def state(stats: DeviceStats) -> str:
    """What reading `control` answers: the device for people, then the commands it takes."""
    rows = [("device", f"{stats.name} on {stats.directory}"), *_device_rows(stats)]
    rows.append(("last error", stats.last_error or "none"))
    commands = [(command.usage, command.summary) for command in COMMANDS.values()]
    return "\n".join([
        *(f"{name:<13}{text}" for name, text in rows),
        "",
        "Commands, one a line, as in: echo compact > control",
        *(f"  {usage:<45}{summary}" for usage, summary in commands),
        "",
    ])


def _recompression(stats: DeviceStats) -> str:
    names = ", ".join(
        f"#{priority} {each.name}" + ("" if each.level is None else f" level {each.level}")
        for priority, each in enumerate(stats.algorithms) if priority and each
    )
    done = stats.recompression
    if not names:
        return "no: there is no recomp_algorithm"
    return (f"with {names}: {done.won} of {done.tried} pages tried, {format_size(done.bytes_saved)} saved, "
            f"{done.incompressible} incompressible")


def _policies(stats: DeviceStats) -> str:
    said = []
    for each in stats.policies:
        if each.policy is None:
            continue
        done = each.done
        what = (f"{done.pages} of {done.tried} pages smaller, {format_size(done.bytes)} saved"
                if each.kind == "recompress" else
                f"{done.pages} pages written, {format_size(each.today)} in the last 24 hours")
        trouble = f"; {each.last_error}" if each.last_error else ""
        said.append(f"{each.policy}: {each.rounds} rounds, {what}{trouble}")
    return "; ".join(said) or "none"


def _governor(stats: DeviceStats) -> str:
    """Of the file system that is kept within the limit."""
    g = stats.governor
    if g.state == "off":
        return "not governed"
    if g.room is None:
        return f"{g.fstype} on {shown(g.mountpoint)}: there is no limit to keep it to"
    words = {"on": "", "braked": "; its writers are braked",
             "frozen": "; it is frozen, and writers wait: raise mem_limit, delete something, lower it again"}
    return (f"{g.fstype} on {shown(g.mountpoint)}: {format_size(g.allowed or 0)} of {format_size(g.free)} free are "
            f"left to its users, reserve {format_size(g.reserve)}, {format_size(g.over)} of it used{words[g.state]}")


def _device_rows(stats: DeviceStats) -> list[tuple[str, str]]:
    dictionary = stats.algorithms[0].dictionary
    level = ("" if stats.level is None else f", level {stats.level}") + (
        f", dictionary {shown(str(dictionary))}" if dictionary else "")
    limit = f"limit {format_size(stats.mem_limit)}" if stats.mem_limit else "no limit"
    lane = stats.lane
    rows = [
        ("size", format_size(stats.disksize) if stats.disksize else "not set up: write disksize=SIZE"),
        ("algorithm", stats.algo + level),
    ]
    if store := stats.store:
        ratio = store.orig_data_size / store.mem_used_total if store.mem_used_total else None
        rows += [
            ("data", f"{format_size(store.orig_data_size)}, with {store.same_pages} same-filled "
                     f"and {store.huge_pages} huge (incompressible) pages"),
            ("compressed", format_size(store.compr_data_size)),
            ("memory", f"{format_size(store.mem_used_total)} in the pool, at most "
                       f"{format_size(store.mem_used_max)}, {limit}; {format_size(store.resident)} resident"),
            ("ratio", f"{ratio:.2f} (data / memory)" if ratio else "none: no data in memory"),
            ("failed I/O", f"{store.failed_reads} reads, {store.failed_writes} writes"),
            ("recompressed", _recompression(stats)),
            *backing_store.rows(stats.backing_dev, stats.backing, stats.writeback),
            ("policies", _policies(stats)),
            ("file system", _governor(stats)),
        ]
    else:
        rows.append(("memory", limit))
    rows.append((
        "requests",
        f"{lane.read_ios} reads, {lane.write_ios} writes, {lane.discard_ios} discards, {lane.flush_ios} "
        f"flushes; the longest took {format_time(lane.longest_us / 1e6)}",
    ))
    alive = "" if stats.alive else "; it has ended, disk does not answer any more"
    rows.append((
        "lane",
        f"{stats.threads} threads, disk is open {stats.open_count} times, {lane.in_flight} requests in "
        f"flight, {lane.protocol_errors} protocol errors{alive}",
    ))
    return rows
