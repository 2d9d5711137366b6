# SPDX-License-Identifier: Apache-2.0
"""Swap at work: programs with several times the memory that their memory cgroup allows, all the rest of it
on zramfs, and every byte verified."""
from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apart import apart
from tests.support.backing_tools import backing_file
from tests.support.child import stopped
from tests.support.commands import failure, rows
from tests.support.paths import ROOT
from tests.support.scale import is_full, scaled
from tests.support.swap_load import Group, build, faults, fillers, group, until_swapped
from tests.support.whole import MIB, PAGE, Device, loop, run, wait_until, zramfs
from zramfs.host import loops, swaps
from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import State

pytestmark = [
    pytest.mark.requires("root", "fuse", "loop", "swap", "memcg", "unshare", "unsanitized"),
    # Half a minute each on two idle CPUs, three times that where others are at work.
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("swap"))


@contextlib.contextmanager
def swapping(*words: object) -> Iterator[State]:
    """Swap of 1.5 GiB, used before any other."""
    zramfs("swap", "load", "--size", "1536M", "--priority", "32767", *words)
    state = rundir.find("load").read()
    try:
        yield state
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGCONT)
        if rundir.find("load"):
            zramfs("stop", "load")


@pytest.fixture
def swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    with swapping() as state:
        yield state


@pytest.fixture
def small(swap: State) -> Iterator[Group]:
    """Of 100 MiB, after `swap`, so that it is empty before that is taken down."""
    with group(100 * MIB) as made:
        yield made


@pytest.fixture
def times(request: pytest.FixtureRequest) -> int:
    """How often what takes about half a minute is done: once, or --soak times."""
    return max(1, int(request.config.getoption("soak")))


def control(state: State) -> dict[str, str]:
    lines = (Path(state.directory) / "control").read_text().split("\n\n")[0].splitlines()
    return {line[:13].strip(): line[13:] for line in lines}


def clean(state: State, before: dict[str, int]) -> None:
    """No I/O failed, and no thread that serves has waited for a page of memory."""
    assert control(state)["failed I/O"] == "0 reads, 0 writes"
    assert faults(state.pid) == before
    assert len([name for name in before if name.startswith("zramfs-lane")]) == state.threads


@pytest.mark.soak
def test_a_gibibyte_verified_three_times(swap: State, small: Group, program: Path, times: int) -> None:
    """Or 400 MiB, in a group of 100."""
    before = faults(swap.pid)
    small.limit(scaled(200, 100) * MIB)
    with fillers(program, small, scaled(1024, 400), passes=3 * times) as [filler]:
        until_swapped(small, scaled(700, 250) * MIB)
        # Nothing else uses the area; what is on its way there the group counts, too.
        [row] = rows("--bytes")
        assert row["swap-used"] > scaled(600, 220) * MIB
        filler.finish(200 * times)
    assert [line.split()[0] for line in filler.lines] == [str(n + 1) for n in range(3 * times)]
    assert small.kills <= 1, "see Filler"
    clean(swap, before)
    # What its end has freed was discarded, and went back to the OS.
    device = Device(Path(swap.directory))
    wait_until(lambda: device.mm_stat()["orig_data_size"] < 64 * MIB, "the discards have arrived")
    assert device.mm_stat()["mem_used_max"] > scaled(400, 130) * MIB


@pytest.mark.soak
def test_several_programs_with_the_compactor_at_work_and_the_daemon_frozen_now_and_then(
    swap: State, small: Group, program: Path, times: int
) -> None:
    device = Device(Path(swap.directory))
    device.write("control", "proactiveness=100")
    before = faults(swap.pid)
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            os.kill(swap.pid, signal.SIGSTOP)
            time.sleep(0.15)
            os.kill(swap.pid, signal.SIGCONT)
            time.sleep(0.35)

    with fillers(program, small, *((120, 100, 100) if is_full() else (70, 60, 60))) as at_work:
        until_swapped(small, scaled(100, 50) * MIB)
        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for _ in range(3 * times):
                for each in at_work:
                    each.read_pass()
        finally:
            over.set()
            thread.join()
        device.write("control", "compact")
        for each in at_work:
            each.read_pass()
            each.finish()
    assert small.kills <= 1, "see Filler"
    clean(swap, before)
    runs = [line.split() for line in device.read("memory/compaction").splitlines()]
    assert next(int(row[1]) for row in runs if row[0] == "runs") > 0


# In a mount namespace, since not every machine has the kernel's control files mounted.
WAY_OUT = """
set -e
mountpoint -q /sys/fs/fuse/connections || mount -t fusectl fusectl /sys/fs/fuse/connections
{}
"""


def test_the_way_out_of_a_hang(swap: State, small: Group, program: Path) -> None:
    """As docs/operations.md has it: who needs the pages that are lost ends, and only the log is left."""
    manual = (ROOT / "docs/operations.md").read_text()
    block = manual.partition("**The way out**")[2].split("```")[1]
    script = WAY_OUT.format(block.replace("/run/zramfs/NAME/disk", swap.disk))
    with fillers(program, small, 200) as [filler]:
        until_swapped(small, 50 * MIB)
        filler.read_pass()
        with stopped(swap.pid, 120):
            run(*apart("sh", "-c", script))
            filler.process.communicate(timeout=60)
            assert filler.process.returncode == -signal.SIGBUS
        wait_until(lambda: not swap.alive(), "the daemon has ended", 30)
    assert swap.loop not in swaps.swaps()
    assert not loops.stands_on(swap.loop, Path(swap.disk), swap.attached)
    left = Path(swap.disk).parent
    assert sorted(os.listdir(left)) == ["log", "state.json"]
    said = zramfs("stop", "load").stderr
    assert "had failed, and its data is lost" in said and "aborted its connection" in said
    assert not left.exists()


def test_swapoff_under_load_brings_every_page_back(swap: State, small: Group, program: Path) -> None:
    with fillers(program, small, scaled(200, 110), scaled(100, 60)) as at_work:
        until_swapped(small, scaled(100, 50) * MIB)
        for each in at_work:
            each.read_pass()
        # The group could not take it, and the kernel would kill its programs.
        said = failure("stop", "load")
        assert f"the memory cgroup {small.path} has " in said
        assert "so nothing was changed; raise the limit" in said
        os.kill(swap.pid, signal.SIGTERM)
        log = Path(swap.disk).parent / "log"
        wait_until(
            lambda: "SIGTERM, but the device goes on: the memory cgroup " in log.read_text(), "refused")
        assert swap.loop in swaps.swaps()
        for each in at_work:
            each.read_pass()
        small.limit(512 * MIB)
        zramfs("stop", "load")
        assert swap.loop not in swaps.swaps() and not swap.alive()
        for each in at_work:
            each.read_pass()
            each.finish()
    assert small.kills <= 1, "see Filler"
    assert small.swap == 0


def test_pages_that_were_written_back(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a block device, again and again: the kernel reads some back, and discards and overwrites others."""
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    back = backing_file(tmp_path / "back", 256 * MIB)
    with loop(back) as backing, swapping("--writeback", backing) as state, group(100 * MIB) as small:
        device = Device(Path(state.directory))
        before = faults(state.pid)
        with fillers(program, small, 90, 70) as at_work:
            until_swapped(small, 50 * MIB)
            for _ in range(scaled(2, 1)):
                device.write("zram/writeback", f"page_indexes=0-{1536 * MIB // PAGE - 1}")
                for each in at_work:
                    each.read_pass()
            for each in at_work:
                each.finish()
        assert small.kills <= 1, "see Filler"
        _, reads, writes = (int(word) for word in device.read("zram/bd_stat").split())
        assert reads > 1000 and writes > 1000
        clean(state, before)
