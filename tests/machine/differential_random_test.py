# SPDX-License-Identifier: Apache-2.0
"""Any sequence of attribute writes and I/O, to a zram device of the kernel and to one of ours.

Where a difference that tests/machine/differences_test.py lists would show, a step is left out; every other
answer and number must be the same after every step, column 2 of mm_stat by each side's own LZ4.
"""
from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.hostile_text import IDLE, NAMES, NUMBERS, SIZES, texts
from tests.support.lz4_lengths import kept, kernel_length, library_length
from tests.support.page_kinds import block
from tests.support.real_pages import real_pages
from tests.support.scale import scaled
from tests.support.twins import Pair, both, mm_stat, reset_both
from tests.support.whole import PAGE

pytestmark = pytest.mark.requires("fuse", "zram")

PAGES = 64
EXAMPLES = scaled(60, 20)  # about 10 a second
REAL = 100
# "odd word": ours takes memory for it, which a limit would show.
KINDS = ("zeros", "small word", "halves", "text", "half random", "random", "real")


def page_of(kind: str, seed: int) -> bytes:
    return real_pages(REAL)[seed % REAL] if kind == "real" else block(kind, seed, PAGE)


def stores(name: str, values: tuple[bytes, ...]) -> st.SearchStrategy:
    return st.tuples(st.just("store"), st.just(name), st.one_of(st.sampled_from(values), texts))


places = st.integers(0, PAGES - 1)
contents = st.tuples(st.sampled_from(KINDS), st.integers(0, 30))
writes = st.tuples(st.just("write"), places, st.lists(contents, min_size=1, max_size=6))
frees = st.tuples(st.sampled_from(["discard", "zero"]), places, st.integers(1, 20))
limits = st.tuples(st.just("store"), st.just("mem_limit"), st.sampled_from([b"40K", b"64K", b"128K", b"0"]))
attributes = st.one_of(
    limits, stores("mem_limit", SIZES), stores("disksize", SIZES), stores("mem_used_max", NUMBERS),
    stores("compact", (b"1",)), stores("comp_algorithm", NAMES), stores("idle", IDLE),
    stores("reset", NUMBERS),
)
steps = st.one_of(writes, writes, writes, frees, attributes, st.sampled_from([("hold",), ("let_go",)]))


class Run:
    """One sequence on both devices, and what they must hold after each step."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.stored: dict[int, bytes] = {}
        self.huge_since = [0, 0]
        reset_both(pair)
        assert both(pair, lambda twin: twin.store("disksize", b"%d" % (PAGES * PAGE))) == 6

    def step(self, kind: str, *words: object) -> None:
        if kind in ("write", "discard", "zero") and self.pages() == 0:
            return  # ours is ENXIO
        getattr(self, kind)(*words) if kind not in ("discard", "zero") else self.free(kind, *words)

    def pages(self) -> int:
        return int(self.pair[0].show("disksize")) // PAGE

    def store(self, name: str, data: bytes) -> None:
        without_size = self.pages() == 0
        if name == "disksize" and without_size and (self.pair[0].held is not None or data[:1] != b"4"):
            return  # EBUSY in ours while it is open; and the kernel takes 16 bytes a page at once
        if name == "comp_algorithm" and data.startswith(b"lz4\n\n"):
            return
        answer = both(self.pair, lambda twin: twin.store(name, data))
        if name == "reset" and data and isinstance(answer, int):
            self.stored.clear()
            self.huge_since = [0, 0]
            both(self.pair, lambda twin: twin.store("comp_algorithm", b"lz4"))

    def write(self, place: int, contents: list[tuple[str, int]]) -> None:
        theirs, ours = self.pair
        now = mm_stat(theirs)
        if now["mem_limit"]:
            if now["mem_used_total"] > now["mem_limit"]:
                return  # the kernel refuses more then
            contents = contents[:1]  # of several, FUSE and the block layer tell differently what was written
        contents = contents[:self.pages() - place]
        pages = [page_of(kind, seed) for kind, seed in contents]
        if not pages:
            return
        data = b"".join(pages)
        answers = theirs.write(place, data), ours.write(place, data)
        if answers == ("EIO", "ENOSPC") and now["mem_limit"]:
            return
        assert answers == (len(data), len(data))
        for at, page in enumerate(pages, place):
            self.stored[at] = page
            for side, length in enumerate((kernel_length, library_length)):
                self.huge_since[side] += kept(page, length) == PAGE

    def free(self, call: str, place: int, pages: int) -> None:
        pages = min(pages, self.pages() - place)
        if pages <= 0:
            return
        assert both(self.pair, lambda twin: getattr(twin, call)(place, pages)) is None
        for at in range(place, place + pages):
            self.stored.pop(at, None)

    def hold(self) -> None:
        for twin in self.pair:
            twin.hold()

    def let_go(self) -> None:
        for twin in self.pair:
            twin.let_go()

    def check(self) -> None:
        for name in ("disksize", "initstate", "io_stat", "debug_stat"):
            both(self.pair, lambda twin, name=name: twin.show(name))
        theirs, ours = map(mm_stat, self.pair)
        for stats, length, since in zip(
            (theirs, ours), (kernel_length, library_length), self.huge_since, strict=True
        ):
            sizes = [kept(page, length) for page in self.stored.values()]
            assert stats["orig_data_size"] == PAGE * len(sizes)
            assert stats["compr_data_size"] == sum(sizes)
            assert stats["same_pages"] == sizes.count(0)
            assert stats["huge_pages"] == sizes.count(PAGE)
            assert stats["huge_pages_since"] == since
        assert ours["mem_limit"] == theirs["mem_limit"]
        # A page at the border of a class may lie in another; a zspage has up to 8 pages.
        assert ours["mem_used_total"] == pytest.approx(theirs["mem_used_total"], rel=0.01, abs=16 * PAGE)

    def end(self) -> None:
        self.let_go()
        self.check()
        if pages := self.pages():
            shown = both(self.pair, lambda twin: twin.read(0, min(pages, PAGES)))
            assert shown == b"".join(self.stored.get(at, bytes(PAGE)) for at in range(min(pages, PAGES)))


def test_any_sequence_does_the_same_to_both(pair: Pair, request: pytest.FixtureRequest) -> None:
    longer = max(1, int(request.config.getoption("soak")))

    @settings(max_examples=EXAMPLES * longer, deadline=None, derandomize=longer == 1,
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(st.lists(steps, min_size=5, max_size=40))
    def run(sequence: list) -> None:
        both_devices = Run(pair)
        for step in sequence:
            both_devices.step(*step)
            both_devices.check()
        both_devices.end()

    run()
