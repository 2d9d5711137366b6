# SPDX-License-Identifier: Apache-2.0
"""The lane and the backing store: requests for what was written back wait in threads of their own, and
nobody else waits for them. The backing store that stands still is the disk of another zramfs."""
from __future__ import annotations

import errno
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.backing_tools import MIB, PAGE, backing_file, write_back
from tests.support.lane_watch import LaneWatch, environment
from tests.support.page_kinds import noise, prose
from tests.support.served import ServedLane, served_lane
from tests.support.whole import run, wait_until
from tests.support.wire import KEEP_SIZE, PUNCH_HOLE, Op, Wire, fallocate_in, read_in, wired, write_in
from zramfs.store.backing import Backing
from zramfs.store.store import Store

SLOW_THREADS, SPARES = 4, 4
BACK = 64  # pages on the backing store; as many behind them stay in memory


def slow_threads() -> list[str]:
    return sorted(read_task(task, "comm") for task in slow_tasks())


def slow_tasks() -> list[Path]:
    return [task for task in Path("/proc/self/task").iterdir()
            if read_task(task, "comm").startswith("zramfs-slow")]


def read_task(task: Path, name: str) -> str:
    """Empty of one that has ended."""
    try:
        return (task / name).read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@contextmanager
def half_written_back(path: Path, **how: object) -> Iterator[Wire]:
    with wired(2 * MIB, backing=Backing(str(path)), **how) as wire:
        for n in range(2 * BACK):
            wire.store.write(n * PAGE, noise(n) if n % 2 else prose(n))
        assert write_back(wire.store, (0, BACK)).pages == BACK
        try:
            yield wire
            wire.store.check(3)
        except BaseException:
            # The other device could not end while this one has it open.
            wire.lane.abort()
            wire.lane.join()
            wire.store.close()
            raise


def content(n: int) -> bytes:
    return noise(n) if n % 2 else prose(n)


# ---- what it answers -----------------------------------------------------------------------------

def test_reads_of_pages_on_the_backing_store(tmp_path: Path) -> None:
    with half_written_back(backing_file(tmp_path / "file")) as wire:
        assert slow_threads() == [f"zramfs-slow{n}" for n in range(SLOW_THREADS)]
        sent = {}
        for n in random.Random(1).sample(range(2 * BACK), 2 * BACK):
            sent[wire.send(Op.READ, read_in(n * PAGE, PAGE))] = n
        for _ in range(2 * BACK):
            reply = wire.receive()
            assert reply.error == 0 and reply.data == content(sent.pop(reply.unique))
        assert wire.read(0, 2 * BACK * PAGE) == b"".join(map(content, range(2 * BACK)))
        stats = wire.lane.stats()
        assert (stats.put_off, stats.waited) == (BACK + 1, 0)
        assert stats.read_ios == 2 * BACK + 1, "each is counted once"
        assert stats.read_sectors == 4 * BACK * PAGE // 512
        assert stats.in_flight == 0
        assert wire.store.stats().written_back == BACK
    assert not slow_threads()


def test_without_a_backing_store_there_are_no_slow_threads(tmp_path: Path) -> None:
    with wired() as wire:
        wire.write(0, noise(1))
        assert not slow_threads()
        # And with the first one there are, for good.
        assert wire.lane.claim()
        old, wire.store = wire.store, Store(MIB, backing=Backing(str(backing_file(tmp_path / "file"))))
        wire.lane.set_store(wire.store)
        old.close()
        wire.lane.release_claim()
        wire.write(0, noise(2))
        write_back(wire.store)
        assert wire.read(0, PAGE) == noise(2)
        assert len(slow_threads()) == SLOW_THREADS


def test_parts_of_pages_on_the_backing_store(tmp_path: Path) -> None:
    with half_written_back(backing_file(tmp_path / "file")) as wire:
        expected = bytearray(b"".join(map(content, range(2 * BACK))))
        for off, n in ((5, 9), (3 * PAGE - 3, 2 * PAGE + 6), (10 * PAGE + 1, PAGE - 1),
                       (20 * PAGE + 7, 40 * PAGE), (66 * PAGE + 3, 4)):
            data = random.Random(off).randbytes(n)
            expected[off:off + n] = data
            assert wire.write(off, data) == n
        assert wire.read(0, len(expected)) == expected
        notified = wire.store.stats().notify_free
        reply = wire.call(Op.FALLOCATE, fallocate_in(12 * PAGE + 5, 3 * PAGE, PUNCH_HOLE | KEEP_SIZE))
        assert reply.error == 0
        expected[12 * PAGE + 5:15 * PAGE + 5] = bytes(3 * PAGE)
        assert wire.store.stats().notify_free == notified + 2, "whole pages are counted once"
        assert wire.read(0, len(expected)) == expected
        stats = wire.lane.stats()
        assert (stats.write_ios, stats.discard_ios, stats.waited) == (5, 1, 0)
        assert stats.put_off >= 6


def test_a_damaged_block_is_an_error_of_its_page_alone(tmp_path: Path) -> None:
    path = backing_file(tmp_path / "file")
    with half_written_back(path) as wire:
        sound = path.read_bytes()
        path.write_bytes(bytes(len(sound)))
        assert wire.call(Op.READ, read_in(0, PAGE)).error == errno.EIO
        assert wire.call(Op.WRITE, write_in(7, 2) + b"ab").error == errno.EIO
        assert wire.read(BACK * PAGE, PAGE) == content(BACK)
        path.write_bytes(sound)
        assert wire.read(0, PAGE) == content(0)


# ---- a backing store that stands still -----------------------------------------------------------

@contextmanager
def still(place: Path) -> Iterator[tuple[ServedLane, Path]]:
    place.mkdir()
    with served_lane(place, 16 * MIB) as disk:
        yield disk, disk.path


@pytest.mark.requires("fuse")
def test_pages_in_memory_do_not_wait_for_the_backing_store(tmp_path: Path) -> None:
    with still(tmp_path / "other") as (other, path), half_written_back(path) as wire:
        lag = []
        with other.stopped():
            waiting = {wire.send(Op.READ, read_in(n * PAGE, PAGE)): n for n in range(40)}
            writes = {wire.send(Op.WRITE, write_in(n * PAGE + 9, 4) + b"part"): n
                      for n in range(50, 50 + SPARES)}
            for n in range(BACK, 2 * BACK):
                began = time.monotonic()
                assert wire.read(n * PAGE, PAGE) == content(n)
                wire.write(n * PAGE, content(n))
                lag.append(time.monotonic() - began)
            # A thread of the lane may have had to wait for a CPU with the last of them.
            wait_until(lambda: wire.lane.stats().put_off == 40 + SPARES, "all of them are put off")
            assert wire.silent()
            assert wire.lane.stats().in_flight == 40 + SPARES
        # The other device stands still for up to a minute; a busy machine takes the CPU away now and then.
        assert sorted(lag)[len(lag) // 2] < 1 and max(lag) < 30
        for _ in range(40 + SPARES):
            reply = wire.receive()
            assert reply.error == 0
            if reply.unique in waiting:
                assert reply.data == content(waiting[reply.unique])
            else:
                n = writes[reply.unique]
                assert wire.store.read(n * PAGE, PAGE) == content(n)[:9] + b"part" + content(n)[13:]
        assert wire.lane.stats().in_flight == 0
        assert wire.lane.stats().longest_us > 50_000


def slow_calls() -> list[str]:
    """The system calls in which the slow threads stand, by number; not of those that are at work."""
    calls = [read_task(task, "syscall").partition(" ")[0] for task in slow_tasks()]
    return [call for call in calls if call not in ("", "running", "-1")]


def resting_call() -> str:
    """The system call in which slow threads rest. Waits until all of them do."""
    seen: list[str] = []

    def rest() -> bool:
        seen[:] = slow_calls()
        return len(seen) == SLOW_THREADS and len(set(seen)) == 1

    wait_until(rest, "all of them rest")
    return seen[0]


def at_work(resting: str) -> int:
    """How many of the slow threads stand in another system call."""
    return sum(call != resting for call in slow_calls())


def fill_the_queue(wire: Wire) -> None:
    """Each slow thread waits for the backing store, and behind them as many writes as there are spare
    buffers: to the first pages."""
    resting = resting_call()
    for n in range(SLOW_THREADS + SPARES):
        wire.send(Op.WRITE, write_in(n * PAGE + 9, 4) + b"part")
        wait_until(lambda n=n: wire.lane.stats().put_off == n + 1, "it is put off")
        # Whoever takes it gives his buffer back.
        taken = min(n + 1, SLOW_THREADS)
        wait_until(lambda taken=taken: at_work(resting) == taken, "it is taken")
    assert wire.silent()


@pytest.mark.requires("fuse")
def test_what_finds_no_room_to_wait_is_done_all_the_same(tmp_path: Path) -> None:
    with still(tmp_path / "other") as (other, path), half_written_back(path) as wire:
        nr = SLOW_THREADS + SPARES + 1
        with other.stopped():
            fill_the_queue(wire)
            wire.send(Op.WRITE, write_in((nr - 1) * PAGE + 9, 4) + b"part")
            wait_until(lambda: wire.lane.stats().waited == 1, "there is no room for the last")
            assert wire.read(BACK * PAGE, PAGE) == content(BACK), "the lane has another thread"
        for _ in range(nr):
            assert wire.receive().error == 0
        stats = wire.lane.stats()
        assert (stats.put_off, stats.waited) == (nr - 1, 1)
        for n in range(nr):
            assert wire.read(n * PAGE, PAGE) == content(n)[:9] + b"part" + content(n)[13:]


def a_request_that_waits_after_it_was_shared(place: Path) -> bool:
    """The two threads of a lane work on one write. The one that has it finds no room for what it needs of
    the backing store, and waits, while the other is on its way to rest and gets there late. True if it has
    helped."""
    watch = LaneWatch(os.environ.pop("LANE_WATCH"))
    del os.environ["LD_PRELOAD"]  # the other device is not watched
    how = {"threads": 2, "algo": "zstd", "level": 19}  # so slow that there is something left for a helper
    with still(place / "other") as (other, path), half_written_back(path, **how) as wire:
        full = SLOW_THREADS + SPARES
        with other.stopped():
            fill_the_queue(wire)
            watch.make_late("zramfs-lane1", 5000)
            # Of the last page it has a part only.
            data = random.Random(1).randbytes((BACK - full - 4) * PAGE + 9)
            wire.send(Op.WRITE, write_in(full * PAGE, len(data)) + data)
            wait_until(lambda: wire.lane.stats().waited == 1, "there is no room for the write")
            wire.send(Op.READ, read_in(BACK * PAGE, PAGE))
            # A part of what the other device may stand still for.
            assert not wire.silent(10), "a page in memory waits for the backing store"
            assert wire.receive().data == content(BACK)
            watch.make_late("", 0)
        for _ in range(full + 1):
            assert wire.receive().error == 0
        assert wire.read(full * PAGE, len(data)) == data
        return wire.lane.stats().helped_pieces > 0


@pytest.mark.requires("fuse", "unsanitized")
def test_a_thread_that_is_about_to_rest_is_not_missed(tmp_path: Path) -> None:
    script = """
import sys, pathlib
from tests.lane import mounted_slow_test
print(mounted_slow_test.a_request_that_waits_after_it_was_shared(pathlib.Path(sys.argv[1])))
"""
    for attempt in range(5):
        place = tmp_path / str(attempt)
        done = run(sys.executable, "-c", script, place, env=environment(place))
        if done.stdout == "True\n":
            break
    else:
        pytest.fail("the second thread never came to help")


@pytest.mark.requires("fuse")
def test_a_page_that_is_overwritten_while_its_old_content_is_awaited(tmp_path: Path) -> None:
    with still(tmp_path / "other") as (other, path), half_written_back(path) as wire:
        with other.stopped():
            reads = {wire.send(Op.READ, read_in(n * PAGE, PAGE)): n for n in range(8)}
            parts = {wire.send(Op.WRITE, write_in(n * PAGE, 4) + b"part"): n for n in (8, 9)}
            time.sleep(0.1)
            for n in range(10):
                assert wire.write(n * PAGE, noise(1000 + n)) == PAGE
            # Their blocks are free, but not for others while somebody reads them.
            assert write_back(wire.store, (BACK, BACK)).pages == 0
            assert wire.store.read(0, PAGE) == noise(1000)
        for _ in range(10):
            reply = wire.receive()
            assert reply.error == 0
            if reply.unique in reads:
                n = reads[reply.unique]
                assert reply.data in (content(n), noise(1000 + n))
        for n in range(8):
            assert wire.read(n * PAGE, PAGE) == noise(1000 + n)
        for n in parts.values():
            assert wire.read(n * PAGE, PAGE) == b"part" + noise(1000 + n)[4:], "on what was there"


@pytest.mark.requires("fuse")
def test_the_end_while_requests_wait(tmp_path: Path) -> None:
    with still(tmp_path / "other") as (other, path):
        lane = None
        with half_written_back(path) as wire:
            lane = wire.lane
            with other.stopped():
                resting = resting_call()
                for n in range(30):
                    wire.send(Op.READ, read_in(n * PAGE, PAGE))
                wait_until(lambda: at_work(resting) == SLOW_THREADS, "each slow thread has one under way")
                ended = threading.Thread(target=lane.abort)
                ended.start()
                ended.join(0.05)
                assert lane.alive, "what is under way is waited for"
            ended.join(60)
            assert not lane.alive
        assert not slow_threads()


@pytest.mark.requires("fuse")
def test_a_backing_store_that_goes_away(tmp_path: Path) -> None:
    """Its pages are lost, and said to be; everything else goes on, and so does write-back's caller."""
    with still(tmp_path / "other") as (other, path), wired(2 * MIB, backing=Backing(str(path))) as wire:
        for n in range(8):
            wire.store.write(n * PAGE, content(n))
        write_back(wire.store, (0, 4))
        other.call("abort")
        other.wait()
        assert wire.call(Op.READ, read_in(0, PAGE)).error == errno.EIO
        run = write_back(wire.store, (4, 8), batch=2)
        assert (run.pages, run.failed) == (0, 4)
        assert run.error in (errno.ENOTCONN, errno.ECONNABORTED)
        assert wire.store.backing.stats().write_errors >= 2, "one error does not keep it from the rest"
        for n in range(4, 8):
            assert wire.read(n * PAGE, PAGE) == content(n)
        wire.store.check(2)
