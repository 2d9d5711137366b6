# SPDX-License-Identifier: Apache-2.0
"""Dictionaries that a device trains on its own cold pages, judges on others, and recompresses with.

A dictionary that is taken is a generation: a secondary algorithm at a priority that its user has left free
(store/secondary.pxd). Cold pages go to the newest one, and so do units that are made (store/unit_making.pyx).
An older one stays as long as a page needs it. There are at most three, because there are three priorities.

Where all that is cold is to become units at once, a dictionary is judged by what it wins in them
(unit_judge.py), and no page is recompressed: 64 KiB have most of what a dictionary tells in themselves, so it
wins 3 to 8 % there, and up to 30 % of single pages.
"""
from __future__ import annotations

import errno
import logging
import mmap
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from zramfs.codecs.codec import Codec
from zramfs.codecs.spec import DEFAULT_LEVEL, PRIORITIES
from zramfs.codecs.trainer import train
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm
from zramfs.model.stats import DictionaryStats, GenerationStats
from zramfs.store import secondary
from zramfs.text.sizes import PAGE, format_size

from .algorithms import RecompressArguments
from .jobs import AfterSlice, InThread
from .postprocess import PostProcessor, parse_idle
from .unit_judge import JUDGED_GROUPS, UNIT_PAGES, UnitJudge

if TYPE_CHECKING:
    from zramfs.store.store import Store

    from .device import Device

log = logging.getLogger(__name__)

# Pages that were not looked at yet, from which on a look is worth its CPU: a dictionary and its tables take
# 0.5 MiB with three threads, and the best ones win 30 % of a quarter of a page.
LEAST_FRESH = 4096
# Pages. 1024 are 4 MiB, 64 times the dictionary. Training on twice as many makes documents 1 % smaller, and
# programs 0.5 %, for twice the time.
TRAINED_ON, JUDGED_BY = 1024, 256
SIZE = 64 << 10  # bytes; with half of it programs win a third less
# It takes CPU, and what is cold may be warm tomorrow: it has to win more than its memory.
WORTH = 2
# Pages read, or judged with each algorithm, in a slice of 2 to 5 ms.
BATCH = 64


@dataclass(frozen=True)
class DictionaryArguments:
    """marked, age: as UnitArguments has them. level: of zstd; None = Dictionaries.level_for()."""

    marked: bool = True
    age: int | None = None
    level: int | None = None


def parse_dictionary(text: str) -> DictionaryArguments:
    """What is written to dictionary. ZramfsError: EINVAL, ERANGE."""
    return DictionaryArguments(**parse_idle(text, "dictionary", "idle", "level"))


@dataclass(frozen=True)
class _Cold:
    """Which pages are cold: see Dictionaries.consider()."""

    marked: bool
    older: int | None
    in_units: bool


@dataclass(frozen=True)
class _Figures:
    """Bytes a page that a generation won when it was judged, and bytes that it costs. in_units: pages in
    units have judged it."""

    won_each: float
    cost: int
    in_units: bool = False


@dataclass
class _Judged:
    """Pages that a dictionary was not trained on, and bytes of memory that they take, by size classes."""

    pages: int = 0
    without: int = 0  # with the better one of zstd without a dictionary and the newest generation
    with_it: int = 0

    @property
    def won_each(self) -> float:
        return (self.without - self.with_it) / self.pages if self.pages else 0.0


class Dictionaries:
    """in_thread: runs a call in a worker thread.

    Only consider() changes anything. One at a time; its caller is a job, which keeps the store open.
    """

    def __init__(self, device: Device, post: PostProcessor, in_thread: InThread[Any]) -> None:
        self._device = device
        self._post = post
        self._in_thread = in_thread
        self.forget()

    def _written(self) -> int:
        """Bytes, by the users of the device, since the lane began."""
        return self._device._lane.stats().write_sectors << 9

    def forget(self) -> None:
        self._done = DictionaryStats()
        self._judged: dict[int, _Figures] = {}  # by the number of a generation
        self._pages = (0,) * PRIORITIES
        self._looked_at = 0  # cold pages at the last look, and bytes that were written before it
        self._written_then = 0
        self._refused = 0  # looks one behind the other that came to nothing

    def kept(self) -> dict[str, Any]:
        """For inherit() in a process that takes over."""
        done = self._done
        return {"judged": [[number, *astuple(figures)] for number, figures in self._judged.items()],
                "trained": done.trained, "taken": done.taken, "rejected": done.rejected,
                "dropped": done.dropped, "cpu_seconds": done.cpu_seconds, "verdict": done.verdict}

    def inherit(self, found: dict[str, Any] | None) -> None:
        """None: the predecessor's version knew of none."""
        if found is None:
            return
        self._judged = {number: _Figures(*figures) for number, *figures in found["judged"]}
        self._done = DictionaryStats(**{name: value for name, value in found.items() if name != "judged"})

    @property
    def newest(self) -> int | None:
        """The priority of the newest generation; None = there is none."""
        store = self._device.store
        if store is None or not any(store.generations):
            return None
        return max(range(PRIORITIES), key=store.generations.__getitem__)

    @property
    def cpu_seconds(self) -> float:
        """To sample, train and judge, so far."""
        return self._done.cpu_seconds

    def algorithm_at(self, priority: int) -> Algorithm | None:
        """Of a generation."""
        store = self._device.store
        codec = store.codecs[priority] if store and store.generations[priority] else None
        return Algorithm(codec.algo, codec.level) if codec else None

    def stats(self) -> DictionaryStats:
        store = self._device.store
        if store is None:
            return self._done
        found, in_units = [], secondary.count_in_units(store)
        for priority, generation in enumerate(store.generations):
            codec, pages, unit_pages = store.codecs[priority], self._pages[priority], in_units[priority]
            if not generation or codec is None:
                continue
            size = len(codec.dictionary or b"")
            # One that came with an image was judged elsewhere.
            figures = self._judged.get(generation, _Figures(0.0, size))
            # In units it wins less than of single pages, and how much is not known then.
            won = round((pages + (unit_pages if figures.in_units else 0)) * figures.won_each)
            found.append(GenerationStats(
                generation, priority, codec.level, size, figures.cost, pages + unit_pages, won))
        return replace(self._done, generations=tuple(sorted(found, key=lambda each: each.number)))

    def level_for(self, store: Store) -> int:
        """That of the last configured secondary algorithm, if it is zstd."""
        configured = [codec for codec, generation in zip(store.codecs, store.generations, strict=True)
                      if codec and not generation][1:]
        return configured[-1].level if configured and configured[-1].algo == "zstd" else DEFAULT_LEVEL["zstd"]

    async def consider(self, rest: AfterSlice, *, marked: bool = True, older: int | None = None,
                       level: int | None = None, asked: bool = False, in_units: bool = False) -> bool:
        """A round: drops generations that no page needs, and if there are cold pages enough that were not
        looked at, trains a dictionary, judges it, and recompresses to it if it is taken. True: it was. rest
        comes after each slice.

        marked: pages that are marked idle are cold; else all are, or with `older` those that were not used
        for more than so many seconds. level: of zstd; None = level_for(). asked: somebody wants a look at
        what is there, however often it was looked at; ZramfsError(EINVAL) says then what is missing.
        in_units: pages in units are cold, too, and all that is cold is about to be in units of that level: so
        the dictionary is judged by units, and nothing is recompressed. Else ZramfsError: EINVAL (access times
        are not kept), ENOMEM, EBUSY (other post-processing).
        """
        store = self._expect_store()
        try:
            return await self._consider(
                store, rest, _Cold(marked, older, in_units), level or self.level_for(store), asked)
        except ValueError as error:
            raise ZramfsError(errno.EINVAL, str(error)) from None
        except MemoryError as error:
            raise ZramfsError(errno.ENOMEM, str(error)) from None
        finally:
            if self._device.store is store and any(store.generations):
                self._pages = await self._in_thread(partial(secondary.count_priorities, store))

    async def _consider(self, store: Store, rest: AfterSlice, which: _Cold, level: int, asked: bool) -> bool:
        if not secondary.can_change(store):
            if asked:
                raise ZramfsError(
                    errno.EBUSY, "a save or other post-processing is under way, which needs the algorithms "
                    "as they are; try again when it has ended")
            return False
        await self._drop_unneeded(store)
        free = [priority for priority in range(1, PRIORITIES) if store.codecs[priority] is None]
        cold = await self._in_thread(
            partial(secondary.count_cold, store, which.marked, which.older, which.in_units))
        reason = self._reason_against(store, cold, free, asked)
        if reason:
            if asked:
                raise ZramfsError(errno.EINVAL, reason)
            return False
        learned = await self._learn(store, which, cold, level, rest)
        if learned is None:
            return False
        made, won_each = learned
        cost = secondary.cost_of(store, made)
        won = round(won_each * cold)
        assert made.dictionary is not None
        said = (f"a dictionary of {format_size(len(made.dictionary))} would win {format_size(max(0, won))} "
                f"of {cold} cold pages by zstd:{level}, {won_each:.0f} bytes each, and costs "
                f"{format_size(cost)}")
        if won < WORTH * cost:
            self._refuse(said)
            return False
        await self._take(store, free[0], made, _Figures(won_each, cost, in_units=which.in_units), said)
        if which.in_units:
            return True
        wanted = RecompressArguments(idle=which.marked, older=which.older)
        await self._post.recompress(store, free[0], wanted, rest, again=True)
        await self._drop_unneeded(store)
        return True

    async def _learn(self, store: Store, which: _Cold, cold: int, level: int,
                     rest: AfterSlice) -> tuple[Codec, float] | None:
        """A codec with a dictionary, and bytes that it won of each page that judged it."""
        with _Pages(min(cold, TRAINED_ON + JUDGED_BY)) as pages:
            await self._sample(store, which, cold, pages, rest)
            self._looked_at, self._written_then = cold, self._written()
            trained_on = pages.count * TRAINED_ON // (TRAINED_ON + JUDGED_BY)
            dictionary = await self._train(pages, trained_on, level)
            await rest()
            if dictionary is None:
                self._refuse("the pages have nothing in common")
                return None
            made = Codec("zstd", level, dictionary)
            if which.in_units:
                return made, await self._judge_units(store, made, pages, trained_on, rest)
            return made, await self._judge(store, made, pages, trained_on, rest)

    def _expect_store(self) -> Store:
        store = self._device.store
        if store is None:
            raise ZramfsError(errno.EINTR, "the device was reset before the round began")
        return store

    def _reason_against(self, store: Store, cold: int, free: Sequence[int], asked: bool) -> str | None:
        if not free:
            return ("expected a free priority for a dictionary, got algorithms or dictionaries in use at all "
                    "three")
        if cold < LEAST_FRESH:
            return (f"expected at least {LEAST_FRESH} cold pages with data of their own, got {cold}: a "
                    "dictionary costs more memory than it can win of so few")
        if asked:
            return None
        written = max(0, self._written() - self._written_then) // PAGE
        fresh = max(0, cold - self._looked_at) + written
        # The more often nothing came of it, and where there is one, the more must have changed: after six
        # times 0.3 s of CPU for each GiB that is written.
        needed = LEAST_FRESH << min(self._refused, 6)
        if any(store.generations):
            needed = max(needed, cold // 4)
        return "nothing has changed since the last look" if fresh < needed else None

    def _refuse(self, verdict: str) -> None:
        self._refused += 1
        self._done = replace(self._done, rejected=self._done.rejected + 1, verdict=f"rejected: {verdict}")
        log.info("%s", self._done.verdict)

    async def _drop_unneeded(self, store: Store) -> None:
        for priority, generation in enumerate(store.generations):
            if generation and await self._changed(partial(secondary.drop_secondary, store, priority)):
                self._judged.pop(generation, None)
                self._done = replace(self._done, dropped=self._done.dropped + 1)
                log.info("generation %d of the dictionaries is dropped: no page needs it", generation)

    async def _changed(self, change: Callable[[], Any]) -> Any:
        try:
            return await self._in_thread(change)
        except OSError as error:
            raise ZramfsError(error.errno or errno.EBUSY, error.strerror or str(error)) from None

    async def _take(self, store: Store, priority: int, codec: Codec, figures: _Figures,
                    verdict: str) -> None:
        await self._changed(partial(secondary.set_secondary, store, priority, codec))
        self._judged[store.generations[priority]] = figures
        self._refused = 0
        self._done = replace(self._done, taken=self._done.taken + 1, verdict=f"taken: {verdict}")
        log.info("%s", self._done.verdict)

    async def _timed(self, work: Callable[[], Any]) -> Any:
        """In a worker thread; its CPU is counted."""
        def timed() -> tuple[Any, float]:
            began = time.thread_time()
            return work(), time.thread_time() - began

        result, took = await self._in_thread(timed)
        self._done = replace(self._done, cpu_seconds=self._done.cpu_seconds + took)
        return result

    async def _sample(self, store: Store, which: _Cold, cold: int, pages: _Pages, rest: AfterSlice) -> None:
        """From everywhere, each page as likely as any other, in no order. Marks and access times stay."""
        places = random.sample(range(cold), pages.most)
        numbers = await self._timed(partial(
            secondary.find_cold, store, which.marked, places, which.older, which.in_units))
        random.shuffle(numbers)
        for at in range(0, len(numbers), BATCH):
            await self._timed(partial(pages.read, store, numbers[at:at + BATCH]))
            await rest()

    async def _train(self, pages: _Pages, count: int, level: int) -> bytes | None:
        """From the first of them."""
        self._done = replace(self._done, trained=self._done.trained + 1)
        try:
            return await self._timed(partial(pages.train, count, level))
        except ValueError as error:
            log.debug("%s", error)
            return None

    async def _judge(self, store: Store, codec: Codec, pages: _Pages, first: int,
                     rest: AfterSlice) -> float:
        rivals = [Codec("zstd", codec.level)]
        newest = store.codecs[self.newest] if self.newest else None
        if newest is not None:
            rivals.append(Codec("zstd", newest.level, newest.dictionary))
        judged = _Judged()
        for at in range(first, pages.count, BATCH):
            batch = [pages[number] for number in range(at, min(at + BATCH, pages.count))]
            await self._timed(partial(_judge, store, codec, rivals, batch, judged))
            await rest()
        return judged.won_each

    async def _judge_units(self, store: Store, codec: Codec, pages: _Pages, first: int,
                           rest: AfterSlice) -> float:
        """By the groups of the pages from the first one on that it was not trained on."""
        newest = store.codecs[self.newest] if self.newest else None
        groups = dict.fromkeys(number // UNIT_PAGES for number in pages.numbers[first:])
        judge = UnitJudge(store, codec, newest, codec.level, pages.numbers[:first])
        for group in list(groups)[:JUDGED_GROUPS]:
            await self._timed(partial(judge.look, group))
            await rest()
        return judge.won_each


class _Pages:
    """A sample, in memory that is mapped for it and given back at the end. A heap would keep it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0
        self.numbers: list[int] = []  # on the device
        self._area = mmap.mmap(-1, max(1, most) * PAGE)

    def __enter__(self) -> _Pages:
        return self

    def __exit__(self, *_: object) -> None:
        self._area.close()

    def __getitem__(self, number: int) -> bytes:
        return self._area[number * PAGE:(number + 1) * PAGE]

    def read(self, store: Store, numbers: Sequence[int]) -> None:
        for each in numbers:
            try:
                page = store.peek(each)
            except OSError:  # damaged: whoever needs it hears of it
                continue
            # It may have been overwritten since it was found.
            if page is not None and page != page[:8] * (PAGE // 8):
                self._area[self.count * PAGE:(self.count + 1) * PAGE] = page
                self.count += 1
                self.numbers.append(each)

    def train(self, count: int, level: int) -> bytes:
        with memoryview(self._area) as view, view[:count * PAGE] as sample:
            return train(sample, SIZE, level)


def _judge(store: Store, codec: Codec, rivals: Sequence[Codec], pages: Sequence[bytes],
           judged: _Judged) -> None:
    def memory(with_codec: Codec, page: bytes) -> int:
        packed = with_codec.compress(page, PAGE)
        return secondary.class_bytes(store, len(packed) if packed else PAGE)

    for page in pages:
        judged.pages += 1
        rival = min(memory(each, page) for each in rivals)
        judged.without += rival
        # A page that would not become smaller stays as it is.
        judged.with_it += min(rival, memory(codec, page))
