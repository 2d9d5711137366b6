# SPDX-License-Identifier: Apache-2.0
"""Long commands run beside short ones, one of a kind at a time; reset and the end cut them short."""
from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from tests.support.backing_tools import backing_file
from tests.support.box import MIB, PAGE, Box
from tests.support.page_kinds import prose
from zramfs.device import compactor as compactor_module
from zramfs.device import policies as policies_module
from zramfs.device.jobs import Jobs
from zramfs.errors import ZramfsError
from zramfs.model.config import Algorithm
from zramfs.model.policy import Recompress

TWO = (Algorithm("lz4"), Algorithm("zstd"))
SLOW = (Algorithm("lz4"), Algorithm("zstd", 19))


async def busy_box(**more: object) -> Box:
    """With 16 MiB that take zstd 19 some seconds."""
    box = await Box(size=16 * MIB, algorithms=SLOW, **more).start()
    for slot in range(4096):
        box.store.write(slot * PAGE, prose(slot % 64))
    return box


async def recompressing(box: Box, nursery: trio.Nursery, data: str = "") -> list[int]:
    """Begins to recompress. The outcome stands in the list when it has ended."""
    outcome: list[int] = []

    async def work() -> None:
        outcome.append(await box.outcome("recompress", data))

    nursery.start_soon(work)
    while box.device.stats().recompression.tried < 3:
        await trio.sleep(0.005)
    return outcome


@pytest.mark.parametrize("line", [
    "mem_limit=64M", "mem_used_max=0", "proactiveness=7", "balloon=0", "access_times=on",
    "policy=recompress idle=1d", "writeback_limit=5", "idle=all", "compact",
])
async def test_a_command_does_not_wait_for_a_recompression(line: str) -> None:
    box = await busy_box()
    async with trio.open_nursery() as nursery:
        outcome = await recompressing(box, nursery)
        with trio.fail_after(60):
            await box.device.command(line)
        assert outcome == [], "the recompression is still under way"
        with trio.fail_after(60):
            await box.device.command("reset")
    assert outcome == [errno.EINTR]


async def test_a_second_job_of_a_kind_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    box = await busy_box(writeback=backing_file(tmp_path / "store"))
    async with trio.open_nursery() as nursery:
        outcome = await recompressing(box, nursery, "max_pages=300")
        with trio.fail_after(60):
            assert await box.refused("recompress", "", "another recompress is under way") == errno.EBUSY
            assert "another recompress is under way" in (box.device.stats().last_error or "")
            # Of another kind, but both select pages.
            with pytest.raises(OSError, match="units, sharing or write-back is under way") as caught:
                await box.write("writeback", "huge")
            assert caught.value.errno == errno.EBUSY
        assert outcome == []
    assert outcome == [0] and box.device.stats().recompression.tried == 300
    await box.write("recompress", "max_pages=1")
    await box.write("writeback", "huge")
    box.store.check(3)
    await box.device.close()


async def test_commands_that_are_wrong_are_refused_before_they_are_jobs() -> None:
    box = await busy_box()
    async with trio.open_nursery() as nursery:
        outcome = await recompressing(box, nursery, "max_pages=100")
        assert await box.refused("recompress", "type=hueg", "type=idle, huge or huge_idle") == errno.EINVAL
        assert await box.refused("recompress", "priority=3", "nothing has the priority") == errno.EINVAL
    assert outcome == [0]


@pytest.mark.parametrize("end", ["reset", "close"])
async def test_compaction_by_command_is_cut_short(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compactor_module, "JOB_PASSES", 1 << 40)
    box = await busy_box()
    outcome: list[int] = []

    async def work() -> None:
        outcome.append(await box.outcome("compact", "1"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        nursery.start_soon(work)  # waits for the first
        await trio.sleep(0.1)
        assert outcome == []
        with trio.fail_after(60):
            await (box.device.command("reset") if end == "reset" else box.device.close())
    assert outcome == [errno.EINTR, errno.EINTR]
    assert box.device.stats().disksize == 0


async def test_compaction_by_command_wins_what_can_be_won() -> None:
    box = await Box(size=64 * MIB).start()
    for slot in range(16384):
        box.store.write(slot * PAGE, os.urandom(1500) + bytes(PAGE - 1500))
    for slot in range(16384):
        if slot % 8:
            box.store.zero(slot * PAGE, PAGE)
    # As if the compactor had left a pass half-way.
    box.store.compact_slice(1)
    before = box.store.stats()
    await box.device.command("compact")
    after = box.store.stats()
    assert box.store.winnable()[0] == 0 and after.pageblocks_in_use < before.pageblocks_in_use // 2
    pages = before.mem_used_total - after.mem_used_total
    assert box.device.memory().won.startswith(f"{pages // PAGE} pool pages by object compaction, ")
    assert box.store.compact() == 0, "nothing was left"
    box.store.check(3)
    await box.device.close()


async def test_a_reset_waits_for_jobs_and_then_lets_new_ones_begin() -> None:
    box = await busy_box()
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            outcome = await recompressing(box, nursery)
            with trio.fail_after(60):
                await box.device.command("reset")
        assert outcome == [errno.EINTR]
        await box.write("recomp_algorithm", "algo=zstd")
        await box.write("algorithm_params", "algo=zstd level=19")
        await box.write("disksize", "16M")
        for slot in range(4096):
            box.store.write(slot * PAGE, prose(slot % 64))
    await box.device.close()


async def test_a_job_that_comes_during_a_reset_waits_for_it_and_finds_no_store() -> None:
    box = await busy_box()
    box.lane.kernel_answers.clear()
    outcome: list[int] = []

    async def work() -> None:
        outcome.append(await box.outcome("recompress", ""))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.device.command, "reset")
        await trio.sleep(0.1)
        nursery.start_soon(work)
        await trio.sleep(0.1)
        assert outcome == []
        box.lane.kernel_answers.set()
    assert outcome == [errno.EINVAL]


async def test_jobs_that_never_began_leave_nothing() -> None:
    jobs = Jobs()
    jobs.cut("a test")
    with pytest.raises(ZramfsError, match="cut short by a test") as caught:
        jobs.begin("idle", alone=False)
    assert caught.value.errno == errno.EINTR
    jobs.allow("a test")

    async def fail() -> None:
        raise MemoryError

    job = jobs.begin("idle", alone=True)
    with pytest.raises(MemoryError):
        await job.run(fail)
    await jobs.wait_ended()
    jobs.begin("idle", alone=True)


# ---- policies --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("end", ["reset", "close"])
async def test_a_policys_round_that_begins_during_the_end_does_no_harm(
    end: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(policies_module, "MIN_INTERVAL", 0.05)
    box = await Box(size=16 * MIB, algorithms=SLOW, policies=(Recompress(1),)).start()
    monkeypatch.setattr(policies_module, "LOOKS", 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.device.policies.run)
        # The end is stopped half-way, with the store still there, while rounds become due.
        await box.device.compactor.lock.acquire()
        stop = box.device.close if end == "close" else lambda: box.device.command("reset")

        ended = trio.Event()

        async def work() -> None:
            await stop()
            ended.set()

        nursery.start_soon(work)
        await trio.sleep(0.3)
        assert box.device.stats().disksize
        box.device.compactor.lock.release()
        with trio.fail_after(60):
            await ended.wait()
        await trio.sleep(0.3)
        assert box.device.stats().disksize == 0
        nursery.cancel_scope.cancel()
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_a_command_cuts_a_policys_round_short_and_is_not_refused() -> None:
    box = await busy_box(policies=(Recompress(1),))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.device.policies.run)
        with trio.fail_after(60):
            while box.device.stats().recompression.tried < 3:
                await trio.sleep(0.01)
        with trio.fail_after(60):
            await box.write("recompress", "max_pages=2")
        with trio.fail_after(60):
            await box.device.command("reset")
        nursery.cancel_scope.cancel()
    await box.device.close()


# ---- what goes wrong inside ------------------------------------------------------------------------------

Task = Callable[[], Awaitable[None]]


async def fails(task: Task, error: type[BaseException]) -> None:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - groups of one, or the error itself
        with trio.fail_after(60):
            await task()
    found = caught.value
    while isinstance(found, BaseExceptionGroup):
        assert len(found.exceptions) == 1
        found = found.exceptions[0]
    assert isinstance(found, error)


async def test_the_compactor_can_be_started_again_and_is_still_woken(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await Box(size=64 * MIB).start()
    compactor = box.device.compactor

    def no_descriptor(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd", no_descriptor)
        await fails(compactor.run, OSError)
    for _ in range(2):
        with trio.move_on_after(0.5):
            await compactor.run()
        with monkeypatch.context() as patch:
            patch.setattr(compactor, "_wants", lambda store: (_ for _ in ()).throw(MemoryError()))
            await fails(compactor.run, MemoryError)
        assert not compactor.lock.locked()
    for slot in range(16384):
        box.store.write(slot * PAGE, os.urandom(PAGE))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(compactor.run)
        await trio.sleep(0.6)  # it waits for frees, and nothing pokes it
        for slot in range(16384):
            if slot % 4:
                box.store.zero(slot * PAGE, PAGE)
        runs = compactor.stats().runs
        with trio.fail_after(60):
            while compactor.stats().runs == runs:
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    box.store.check(2)
    await box.device.close()


async def test_a_slice_that_fails_leaves_the_compactors_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    box = await Box(size=64 * MIB).start()
    compactor = box.device.compactor
    for slot in range(16384):
        box.store.write(slot * PAGE, os.urandom(PAGE))
    for slot in range(16384):
        if slot % 4:
            box.store.zero(slot * PAGE, PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(compactor, "_balloon_step", lambda store, most: most == 0 or 1 / 0)
        await fails(compactor.run, ZeroDivisionError)
    assert not compactor.lock.locked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(compactor.run)
        with trio.fail_after(60):
            while box.store.winnable()[0]:
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    box.store.check(2)
    await box.device.close()


@pytest.mark.parametrize("error", [MemoryError, OSError, RuntimeError])
async def test_policies_go_on_after_an_error_or_can_be_started_again(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies_module, "MIN_INTERVAL", 0.05)
    monkeypatch.setattr(policies_module, "LOOKS", 100)
    box = await Box(size=MIB, algorithms=TWO, policies=(Recompress(1),)).start()
    broken = True
    mark_idle = box.device._post.mark_idle

    async def fail(*arguments: object) -> None:
        if broken:
            raise error("out of something")
        await mark_idle(*arguments)

    monkeypatch.setattr(box.device._post, "mark_idle", fail)
    if error is RuntimeError:
        await fails(box.device.policies.run, RuntimeError)
    async with trio.open_nursery() as nursery:
        if error is RuntimeError:
            broken = False
        nursery.start_soon(box.device.policies.run)

        def has_looked() -> bool:
            found = box.device.policies.stats()[0]
            return found.rounds > 0 and bool(found.last_error) is broken

        with trio.fail_after(60):
            while not has_looked():
                await trio.sleep(0.02)
            broken = False
            while not has_looked():
                await trio.sleep(0.02)
        with trio.fail_after(60):
            await box.device.command("reset")
        nursery.cancel_scope.cancel()


async def test_the_task_of_the_backing_store_can_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zramfs.device import backing_store
    monkeypatch.setattr(backing_store, "TRIM_PAUSE", 0.01)
    box = await Box(size=MIB, writeback=backing_file(tmp_path / "store")).start()
    with monkeypatch.context() as patch:
        patch.setattr(box.device.backing_store, "_trim", lambda: (_ for _ in ()).throw(MemoryError()))
        await fails(box.device.backing_store.run, MemoryError)
    for slot in range(100):
        box.store.write(slot * PAGE, os.urandom(PAGE))
    await box.write("writeback", "huge")
    box.store.zero(0, MIB)
    assert box.device.backing_store.stats().stale == 100
    async with trio.open_nursery() as nursery:
        nursery.start_soon(box.device.backing_store.run)
        with trio.fail_after(60):
            while box.device.backing_store.stats().stale:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    await box.device.close()


@pytest.mark.parametrize("name, data", [("recompress", ""), ("writeback", "huge")])
async def test_a_job_that_gets_no_thread_is_done_without_one(
    name: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(size=MIB, algorithms=TWO, writeback=backing_file(tmp_path / "store"))
    await box.start()
    for slot in range(200):
        box.store.write(slot * PAGE, os.urandom(PAGE))

    async def no_thread(*arguments: object, **more: object) -> object:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", no_thread)
        for _ in range(2):  # and not EBUSY
            await box.write(name, data)
    box.store.check(3)
    await box.write(name, data)
    await box.device.close()


@pytest.mark.parametrize("name, data, call", [
    ("recompress", "", "step"), ("writeback", "huge", "write"),
])
async def test_a_job_that_fails_in_the_middle_leaves_nothing_selected(
    name: str, data: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Box(size=MIB, algorithms=TWO, writeback=backing_file(tmp_path / "store"))
    await box.start()
    for slot in range(200):
        box.store.write(slot * PAGE, os.urandom(PAGE))
    in_thread = box.device._job_thread

    async def fail(work: Callable[[], object]) -> object:
        if getattr(getattr(work, "func", None), "__name__", "") == call:
            raise OSError(errno.EMFILE, "too many open files")
        return await in_thread(work)

    for place in (box.device._post, box.device.backing_store):
        monkeypatch.setattr(place, "_in_thread" if place is box.device._post else "_job_thread", fail)
    with pytest.raises(OSError, match="too many"):
        await box.write(name, data)
    box.store.check(3)
    monkeypatch.undo()
    await box.write(name, data)  # and not EBUSY
    await box.device.close()
