# SPDX-License-Identifier: Apache-2.0
"""The figures of a device's pool at one moment: read from its tree, kept as JSON."""
from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from zramfs.errors import ZramfsError
from zramfs.model.contents import KINDS, REST

FRAME = 4096
PAGEBLOCK_FRAMES = 512
PAGEBLOCK = FRAME * PAGEBLOCK_FRAMES
ORDERS = 10  # blocks of 1 to 512 frames; the last is a whole pageblock
FILES = (
    "zram/disksize", "zram/comp_algorithm", "zram/mm_stat", "zsmalloc/classes", "memory/buddyinfo",
    "memory/pageblocks", "memory/compaction", "memory/balloon",
)
# A daemon of an older version has no such files.
UNITS, CONTENTS = "memory/units", "memory/contents"
MM_STAT = (
    "orig_data_size", "compr_data_size", "mem_used_total", "mem_limit", "mem_used_max", "same_pages",
    "pages_compacted", "huge_pages", "huge_pages_since",
)
# The key that tells our JSON from any other, and the version of what stands beside it.
MARK, VERSION = "zramfs_report", 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pageblock:
    """Frames of 4 KiB, together 512; movable, isolated and balloon are among the used ones. Not
    resident: its memory is given back to the OS."""

    free: int
    used: int
    movable: int
    isolated: int
    balloon: int
    resident: bool


@dataclass(frozen=True, slots=True)
class SizeClass:
    """size in bytes; zspages: their number by fullness, up to 10 %, 20 % ... 90 %, 99 % and 100 %."""

    index: int
    size: int
    zspages: tuple[int, ...]
    obj_allocated: int
    obj_used: int
    pages_used: int
    pages_per_zspage: int
    freeable: int


@dataclass(frozen=True)
class Sample:
    """taken: ISO 8601; sizes in bytes; orders: free blocks of 2^k frames; compaction and balloon: the
    lines of their files. The files are read one after the other: under load they differ by what
    happened in between. units, contents: the lines of memory/units and memory/contents."""

    name: str
    directory: str
    taken: str
    disksize: int
    algorithm: str
    mm_stat: dict[str, int]
    orders: tuple[int, ...]
    pageblocks: tuple[Pageblock, ...]
    classes: tuple[SizeClass, ...]
    compaction: dict[str, float]
    balloon: dict[str, int]
    units: dict[str, int] = field(default_factory=dict)
    contents: dict[str, int] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Data ÷ memory of the pool."""
        used = self.mm_stat["mem_used_total"]
        return self.mm_stat["orig_data_size"] / used if used else None

    @property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """Pages and bytes of each kind that there is; the rest of the pool has no pages."""
        found = {name: (self.contents.get(f"{name}_pages", 0), self.contents.get(f"{name}_bytes", 0))
                 for name in (*KINDS, REST)}
        return {name: each for name, each in found.items() if any(each)}

    @property
    def in_use(self) -> int:
        """Pageblocks that are resident."""
        return sum(block.resident for block in self.pageblocks)

    @property
    def returned(self) -> int:
        """Pageblocks that were in use before and are given back to the OS."""
        return len(self.pageblocks) - self.in_use

    @property
    def resident(self) -> int:
        """Bytes of the pageblocks in use, less what the balloon has taken out of them."""
        return sum(PAGEBLOCK - block.balloon * FRAME for block in self.pageblocks if block.resident)

    @property
    def free(self) -> int:
        """Bytes of free frames, inside pageblocks in use and in whole pageblocks."""
        return sum(blocks << order for order, blocks in enumerate(self.orders)) * FRAME

    @property
    def whole_share(self) -> float | None:
        """Share of the free memory that lies in whole free pageblocks, 0 to 1; None if nothing is free."""
        return self.orders[-1] * PAGEBLOCK / self.free if self.free else None

    def to_json(self) -> str:
        columns = [column.name for column in fields(Pageblock)]
        figures = asdict(self) | {
            # A list a pageblock: a pool of 64 GiB has 32 768 of them.
            "pageblocks": {"columns": columns, "rows": [astuple(block) for block in self.pageblocks]},
        }
        return json.dumps({MARK: VERSION} | figures) + "\n"


def moment(sample: Sample) -> str:
    """When it was taken, for people."""
    return datetime.fromisoformat(sample.taken).strftime("%Y-%m-%d %H:%M:%S")


def texts(directory: Path) -> dict[str, str]:
    """The files of a device's tree that a sample is made of, by their paths below `directory`."""
    found = {name: (directory / name).read_text() for name in FILES}
    for name in (UNITS, CONTENTS):
        with suppress(FileNotFoundError):
            found[name] = (directory / name).read_text()
    return found


def parse_sample(files: Mapping[str, str], name: str, directory: str) -> Sample:
    """Raises ZramfsError: ENODATA for a device that is not set up, EBADMSG for text that is not a tree's."""

    def parsed(file: str, how: Callable[[str], T]) -> T:
        try:
            return how(files[file])
        except (ValueError, IndexError, KeyError) as error:
            raise ZramfsError(
                errno.EBADMSG,
                f"{directory}/{file} does not read as expected ({error}); is its daemon of another version?",
            ) from None

    disksize = parsed("zram/disksize", int)
    if disksize == 0:
        raise ZramfsError(
            errno.ENODATA, f"{directory} has no pool yet: set the device up with a disksize first"
        )
    return Sample(
        name=name,
        directory=directory,
        taken=datetime.now().astimezone().isoformat(timespec="seconds"),
        disksize=disksize,
        algorithm=parsed("zram/comp_algorithm", _algorithm),
        mm_stat=parsed("zram/mm_stat", lambda text: dict(zip(MM_STAT, map(int, text.split()), strict=True))),
        orders=parsed("memory/buddyinfo", _orders),
        pageblocks=parsed("memory/pageblocks", _pageblocks),
        classes=parsed("zsmalloc/classes", _classes),
        compaction=parsed("memory/compaction", lambda text: _lines(text, _number)),
        balloon=parsed("memory/balloon", lambda text: _lines(text, int)),
        units=parsed(UNITS, lambda text: _lines(text, int)) if UNITS in files else {},
        contents=parsed(CONTENTS, lambda text: _lines(text, int)) if CONTENTS in files else {},
    )


def from_json(text: str, where: str) -> Sample:
    """What to_json() made. Raises ZramfsError(EINVAL) with `where` in its sentence."""
    expected = f"expected {where} to be the JSON that `zramfs report` writes beside its picture"
    try:
        found = json.loads(text)
        version = found.pop(MARK)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZramfsError(errno.EINVAL, f"{expected}: {error}") from None
    if version != VERSION:
        raise ZramfsError(errno.EINVAL, f"{expected}, in version {VERSION}; it has version {version!r}")
    try:
        sample = Sample(**found | {
            "orders": tuple(found["orders"]),
            "pageblocks": _rows(found["pageblocks"]),
            "classes": tuple(_size_class(row) for row in found["classes"]),
        })
        _expect_figures(sample)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ZramfsError(errno.EINVAL, f"{expected}: {error}") from None
    return sample


def _expect_figures(sample: Sample) -> None:
    """Raises ValueError or TypeError unless everything that is drawn is there and adds up."""
    if missing := [name for name in MM_STAT if name not in sample.mm_stat]:
        raise ValueError(f"mm_stat lacks {', '.join(missing)}")
    datetime.fromisoformat(sample.taken)
    if len(sample.orders) != ORDERS:
        raise ValueError(f"{len(sample.orders)} orders, not {ORDERS}")
    numbers: list[object] = [
        sample.disksize, *sample.mm_stat.values(), *sample.orders, *sample.balloon.values(),
        *sample.units.values(), *sample.contents.values(),
    ]
    for block in sample.pageblocks:
        numbers += [block.free, block.used, block.balloon]
        if block.free + block.used != PAGEBLOCK_FRAMES:
            raise ValueError(f"{block.free} free and {block.used} used frames of a pageblock are not 512")
    for c in sample.classes:
        numbers += [c.size, c.pages_per_zspage, *c.zspages]
    for number in numbers:
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} stands where a count belongs")


def _rows(table: Mapping[str, Any]) -> tuple[Pageblock, ...]:
    return tuple(Pageblock(**dict(zip(table["columns"], row, strict=True))) for row in table["rows"])


def _size_class(row: Mapping[str, Any]) -> SizeClass:
    return SizeClass(**{**row, "zspages": tuple(row["zspages"])})


def _algorithm(text: str) -> str:
    chosen = re.search(r"\[(\S+)\]", text)
    if chosen is None:
        raise ValueError(f"no name in brackets in {text!r}")
    return chosen[1]


def _orders(text: str) -> tuple[int, ...]:
    # Node 0, zone    arena   COUNT ...
    orders = tuple(map(int, text.split()[4:]))
    if len(orders) != ORDERS:
        raise ValueError(f"{len(orders)} orders, not {ORDERS}")
    return orders


def _pageblocks(text: str) -> tuple[Pageblock, ...]:
    header, *rows = (line.split() for line in text.splitlines())
    found = []
    for cells in rows:
        row = dict(zip(header, cells, strict=True))
        state = row["state"]
        if state not in ("resident", "returned"):
            raise ValueError(f"the state of pageblock {row['pageblock']} is {state!r}")
        counts = {name: int(row[name]) for name in ("free", "used", "movable", "isolated", "balloon")}
        found.append(Pageblock(**counts, resident=state == "resident"))
    return tuple(found)


def _classes(text: str) -> tuple[SizeClass, ...]:
    header, *rows = (line.split() for line in text.splitlines())
    groups: Sequence[str] = [name for name in header if name.endswith("%")]
    found = []
    for cells in rows:
        if not cells or cells[0] == "Total":
            continue
        row = dict(zip(header, map(int, cells), strict=True))
        found.append(SizeClass(
            row["class"], row["size"], tuple(row[group] for group in groups), row["obj_allocated"],
            row["obj_used"], row["pages_used"], row["pages_per_zspage"], row["freeable"],
        ))
    return tuple(found)


def _lines(text: str, number: Callable[[str], T]) -> dict[str, T]:
    return {name: number(value) for name, value in (line.split() for line in text.splitlines())}


def _number(text: str) -> float:
    return float(text) if "." in text else int(text)
