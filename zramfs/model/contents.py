# SPDX-License-Identifier: Apache-2.0
"""What lies where: the pages of a device by how they are kept, and what each step that makes them smaller has
won and cost."""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from zramfs.text.sizes import PAGE

if TYPE_CHECKING:
    from .device_stats import DeviceStats
    from .stats import StoreStats

# In the order in which they are shown, with what is said of each.
KINDS = {
    "hot": "single pages, as they were written",
    "huge": "single pages that do not compress",
    "recompressed": "single pages, compressed again",
    "units": "pages compressed together with their neighbours",
    "shared": "equal pages that share an object",
    "same": "pages of one repeated word",
    "written_back": "pages on the backing store",
}
REST = "rest"  # what the pool takes beyond all objects: their headers, and room between and behind them
STEPS = {
    "recompress": "pages compressed again",
    "dictionaries": "of these, pages with a trained dictionary",
    "share": "pages that share",
    "units": "pages in units",
}


class Kind(NamedTuple):
    """nbytes: of their objects, in the pool."""

    pages: int
    nbytes: int


class Step(NamedTuple):
    """What a step has done since the device was set up, whoever asked for it. pages: that it made smaller.

    Of dictionaries: a part of what recompression has done, by those that are in use now. cpu_ns: to sample,
    train and judge all that there ever were.
    """

    pages: int
    bytes_saved: int
    cpu_ns: int


def kinds_of(s: StoreStats) -> dict[str, Kind]:
    """By the names of KINDS: each page that is stored is of one kind. What is left is hot. The counters are
    read one after the other, so a page that becomes another kind meanwhile may be missed there."""
    found = {
        "huge": Kind(s.huge_pages, s.huge_pages * PAGE),
        "recompressed": Kind(s.recompressed_pages, s.recompressed_bytes),
        "units": Kind(s.unit_pages, s.unit_bytes),
        "shared": Kind(s.shared_pages, s.shared_bytes),
        "same": Kind(s.same_pages, 0),
        "written_back": Kind(s.written_back, 0),
    }
    pages = s.orig_data_size // PAGE - sum(kind.pages for kind in found.values())
    nbytes = s.compr_data_size - sum(kind.nbytes for kind in found.values())
    found["hot"] = Kind(max(0, pages), max(0, nbytes))
    return {name: found[name] for name in KINDS}


def rest_of(s: StoreStats) -> int:
    """Bytes of REST: with those of all kinds they are mem_used_total."""
    return max(0, s.mem_used_total - s.compr_data_size)


def steps_of(d: DeviceStats) -> dict[str, Step]:
    r, s, u, learned = d.recompression, d.sharing, d.unit_making, d.dictionaries
    in_use = learned.generations
    return {
        "recompress": Step(r.won, r.bytes_saved, r.cpu_ns),
        "dictionaries": Step(sum(each.pages for each in in_use), sum(each.won for each in in_use),
                             round(learned.cpu_seconds * 1e9)),
        "share": Step(s.joined, s.bytes_saved, s.cpu_ns),
        "units": Step(u.pages, u.bytes_saved, u.cpu_ns),
    }
