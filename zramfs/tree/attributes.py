# SPDX-License-Identifier: Apache-2.0
"""The files of zram/, zsmalloc/ and memory/: the kernel's names, formats and errors.

An attribute is a pair of pure functions on the border of the device: what to show of its
statistics, and which command line a write stands for. The formats are those of drivers/block/zram,
mm/zsmalloc.c, block/genhd.c and /proc/buddyinfo.
"""
from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zramfs.errors import ZramfsError
from zramfs.model.config import ALGORITHMS, NAME_LIMIT, SECONDARY, Algorithm
from zramfs.model.stats import EMPTY, NO_BACKING, BackingStats
from zramfs.text.kernel_numbers import U64_MAX, c_string, kstrtoull, memparse, page_align, printable
from zramfs.text.key_values import text_of

if TYPE_CHECKING:
    from zramfs.model.device_stats import DeviceStats
    pass

U16_MAX, U32_MAX = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class Attribute:
    """show: the text of a read, None = write-only. parse: the command line that a write of these
    bytes (at most one page) stands for, None = read-only; raises ZramfsError with the kernel's errno.
    """

    name: str
    show: Callable[[DeviceStats], str] | None = None
    parse: Callable[[bytes], str] | None = None

    @property
    def mode(self) -> int:
        return (0o444 if self.show else 0) | (0o200 if self.parse else 0)


def _show_mm_stat(stats: DeviceStats) -> str:
    s = stats.store or EMPTY
    return _columns((
        s.orig_data_size, s.compr_data_size, s.mem_used_total, stats.mem_limit, s.mem_used_max,
        s.same_pages, s.pages_compacted, s.huge_pages, s.huge_pages_since,
    ))


def _show_io_stat(stats: DeviceStats) -> str:
    s = stats.store or EMPTY
    # The third number, invalid_io, is a constant without a width in the kernel too.
    return f"{s.failed_reads:8} {s.failed_writes:8} 0 {s.notify_free:8}\n"


def _show_stat(stats: DeviceStats) -> str:
    s = stats.lane
    flushes = 0  # there are none, nor has a zram device any: it has no cache that could be written
    merges = 0  # a FUSE server sees requests as they come; what the block layer merged above is not known
    return _columns((
        s.read_ios, merges, s.read_sectors, s.read_ms,
        s.write_ios, merges, s.write_sectors, s.write_ms,
        s.in_flight, s.io_ms, s.queue_ms,
        s.discard_ios, merges, s.discard_sectors, s.discard_ms,
        flushes, flushes,
    ))


def _columns(values: Sequence[int]) -> str:
    return " ".join(f"{value:8}" for value in values) + "\n"


def _parse_disksize(data: bytes) -> str:
    size, _ = memparse(data)
    if size == 0:
        raise ZramfsError(errno.EINVAL, f"expected a size above 0, such as 4G, got {printable(data)}")
    return f"disksize={size}"


def _parse_mem_limit(data: bytes) -> str:
    limit, used = memparse(data)
    if used == 0:
        raise ZramfsError(
            errno.EINVAL, f"expected a size such as 2G, or 0 for no limit, got {printable(data)}"
        )
    return f"mem_limit={page_align(limit)}"


def _parse_mem_used_max(data: bytes) -> str:
    try:
        value = kstrtoull(data)
    except ZramfsError:
        value = None
    if value != 0:
        raise ZramfsError(errno.EINVAL, f"expected 0 (forget the peak), got {printable(data)}")
    return "mem_used_max=0"


def _parse_algorithm(data: bytes) -> str:
    text = c_string(data)
    if len(text) >= NAME_LIMIT:
        raise ZramfsError(
            errno.E2BIG,
            f"expected a name shorter than {NAME_LIMIT} bytes, got {len(text)}: {printable(text)}",
        )
    name = text.removesuffix(b"\n").decode("utf-8", "backslashreplace")
    if name not in ALGORITHMS:
        raise ZramfsError(errno.EINVAL, f"expected one of {', '.join(ALGORITHMS)}, got {printable(text)}")
    return f"comp_algorithm={name}"


def _parse_reset(data: bytes) -> str:
    if kstrtoull(data, U16_MAX) == 0:
        raise ZramfsError(errno.EINVAL, f"expected 1 (or any other number but 0), got {printable(data)}")
    return "reset"


def _parse_idle(data: bytes) -> str:
    text = c_string(data).removesuffix(b"\n")
    # A line of `control` may have blanks around its value.
    if text != text.strip():
        raise ZramfsError(
            errno.EINVAL, f"expected all or an age in seconds, without blanks, got {printable(text)}")
    return f"idle={text_of(data)}"


def _arguments_of(command: str) -> Callable[[bytes], str]:
    return lambda data: f"{command}={text_of(data)}"


def _parse_backing_dev(data: bytes) -> str:
    # No text_of(): a path may have blanks.
    return "backing_dev=" + c_string(data).removesuffix(b"\n").decode("utf-8", "surrogateescape")


def _parse_number(command: str, limit: int = U64_MAX, least: int = 0) -> Callable[[bytes], str]:
    """Numbers whose every fault is EINVAL."""
    def parse(data: bytes) -> str:
        try:
            value = kstrtoull(data, limit)
        except ZramfsError as error:
            raise ZramfsError(errno.EINVAL, error.sentence) from None
        if value < least:
            raise ZramfsError(errno.EINVAL, f"expected a number of at least {least}, got {printable(data)}")
        return f"{command}={value}"
    return parse


def _parse_limit_enable(data: bytes) -> str:
    value = _parse_number("writeback_limit_enable")(data)
    return "writeback_limit_enable=" + ("off" if value.endswith("=0") else "on")


def _parse_compressed_writeback(data: bytes) -> str:
    """kstrtobool(): the first letter or two count, what follows is ignored."""
    text = c_string(data)[:2].lower()
    on = text[:1] in (b"y", b"t", b"1") or text == b"on"
    if not on and text[:1] not in (b"n", b"f", b"0") and text != b"of":
        raise ZramfsError(errno.EINVAL, f"expected 1 or 0 (y, n, on, off), got {printable(data)}")
    return f"compressed_writeback={'on' if on else 'off'}"


ATTRIBUTES = (
    Attribute("disksize", lambda stats: f"{stats.disksize}\n", _parse_disksize),
    Attribute("initstate", lambda stats: f"{int(stats.disksize != 0)}\n"),
    Attribute("comp_algorithm", lambda stats: show_choice(stats.algo, ALGORITHMS), _parse_algorithm),
    Attribute("algorithm_params", None, _arguments_of("algorithm_params")),
    Attribute("recomp_algorithm", lambda stats: show_secondary(stats.algorithms),
              _arguments_of("recomp_algorithm")),
    Attribute("recompress", None, _arguments_of("recompress")),
    Attribute("idle", None, _parse_idle),
    Attribute("backing_dev", lambda stats: f"{stats.backing_dev.path or 'none'}\n", _parse_backing_dev),
    Attribute("writeback", None, _arguments_of("writeback")),
    Attribute("writeback_limit", lambda stats: f"{stats.backing_dev.limit}\n",
              _parse_number("writeback_limit")),
    Attribute("writeback_limit_enable", lambda stats: f"{int(stats.backing_dev.limit_enable)}\n",
              _parse_limit_enable),
    Attribute("writeback_batch_size", lambda stats: f"{stats.backing_dev.batch_size}\n",
              _parse_number("writeback_batch_size", U32_MAX, least=1)),
    Attribute("compressed_writeback", lambda stats: f"{int(stats.backing_dev.compressed)}\n",
              _parse_compressed_writeback),
    Attribute("bd_stat", lambda stats: show_bd_stat(stats.backing)),
    Attribute("mem_limit", None, _parse_mem_limit),
    Attribute("mem_used_max", None, _parse_mem_used_max),
    Attribute("mm_stat", _show_mm_stat),
    Attribute("io_stat", _show_io_stat),
    # writestall, which is 0 in the kernel too, and miss_free: a discard here waits for the slot's lock.
    Attribute("debug_stat", lambda stats: f"version: 1\n{0} {0:8}\n"),
    Attribute("stat", _show_stat),
    Attribute("compact", None, lambda data: "compact"),
    Attribute("reset", None, _parse_reset),
)


def show_choice(chosen: str, names: Sequence[str]) -> str:
    """As the kernel does, with a blank behind the last."""
    return "".join(f"[{name}] " if name == chosen else f"{name} " for name in names) + "\n"


def show_secondary(algorithms: Sequence[Algorithm | None]) -> str:
    return "".join(
        f"#{priority}: {show_choice(each.name, SECONDARY)}"
        for priority, each in enumerate(algorithms) if priority and each
    )


def show_bd_stat(backing: BackingStats | None) -> str:
    b = backing or NO_BACKING
    return f"{b.used:8} {b.reads:8} {b.writes:8}\n"
