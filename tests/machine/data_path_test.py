# SPDX-License-Identifier: Apache-2.0
"""Whoever serves swap must not wait for memory: the threads of a daemon that serve its disk allocate nothing,
map nothing, and need no Python, whatever comes."""
from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.backing_tools import backing_file
from tests.support.child import Child
from tests.support.commands import state_of
from tests.support.lane_watch import LaneWatch, environment
from tests.support.page_kinds import KINDS, block
from tests.support.scale import scaled
from tests.support.whole import KIB, MIB, PAGE, ZRAMFS, Device, opened, punch_hole, run, wait_until, zramfs
from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import State

pytestmark = [pytest.mark.requires("root", "fuse", "loop", "unsanitized"), pytest.mark.timeout(240)]

CLIENTS = 3
REQUESTS = scaled(120, 50)  # of each
SHARE = 8 * MIB  # of the device, for each
LENGTHS = (1, 512, PAGE, PAGE, 3 * PAGE, 5000, 32 * KIB, 200 * KIB, MIB)  # a large one is shared by threads


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return environment(tmp_path / "watch")


@contextlib.contextmanager
def daemon(watched: dict[str, str], *words: object, name: str) -> Iterator[tuple[State, LaneWatch]]:
    """Of `zramfs WORDS`, with what stands on its disk taken off, and what its threads do."""
    said = Path(watched["ZRAMFS_RUN_DIR"]).with_suffix(".said")
    child = Child([*ZRAMFS, *words, "--foreground"], said, env=watched)

    def is_ready() -> bool:
        assert child.process.poll() is None, child.log
        return " is ready\n" in child.log

    try:
        wait_until(is_ready, "the device is ready", 30)
        state = state_of(Path(name))
        if state.loop:
            run("swapoff", state.loop)
        yield state, LaneWatch(watched["LANE_WATCH"])
    except BaseException:
        print(child.log)
        raise
    finally:
        try:
            if rundir.find(name):
                zramfs("stop", name)
                child.wait()
        finally:
            child.end()
    assert child.process.returncode == 0, child.log


def client(disk: int, number: int, seed: int, requests: int) -> None:
    """Everything that a device is asked for, on a share of its own, compared with what must be there."""
    rng = random.Random(f"{number} {seed}")
    at = number * SHARE
    model = bytearray(os.pread(disk, SHARE, at))
    for _ in range(requests):
        length = rng.choice(LENGTHS)
        offset = rng.randrange(SHARE - length)
        if rng.random() < 0.7:
            offset -= offset % PAGE
        match rng.choice(("write", "write", "read", "discard")):
            case "write":
                data = block(rng.choice(KINDS), rng.randrange(20), length)
                assert os.pwrite(disk, data, at + offset) == length
                model[offset:offset + length] = data
            case "read":
                assert os.pread(disk, length, at + offset) == model[offset:offset + length]
            case "discard":
                punch_hole(disk, at + offset, length)
                model[offset:offset + length] = bytes(length)
    assert os.pread(disk, SHARE, at) == model


def load(state: State, seed: int, requests: int = REQUESTS) -> None:
    with opened(state.disk) as disk, ThreadPoolExecutor(CLIENTS) as clients:
        at_work = [clients.submit(client, disk, n, seed, requests) for n in range(CLIENTS)]
        for each in at_work:
            each.result(150)


def swap_daemon(watched: dict[str, str], *words: object) -> contextlib.AbstractContextManager:
    size = ("--size", CLIENTS * SHARE, "--priority", 0)
    return daemon(watched, "swap", "swap0", *size, *words, name="swap0")


@pytest.mark.requires("swap")
@pytest.mark.parametrize("algo", ["lz4", "lz4hc:9", "zstd:1", "zstd:15"])
def test_threads_that_serve_swap_allocate_nothing_and_need_no_python(
    watched: dict[str, str], algo: str
) -> None:
    with swap_daemon(watched, "--algo", algo, "--recomp-algo", "zstd:3") as (state, watch):
        load(state, 1)
        watch.forget()
        load(state, 2)
        # Objects move, some are another algorithm's then, and some of several pages.
        zramfs("control", "swap0", "recompress", "units idle=all", "compact", "proactiveness=100")
        load(state, 3)
        with watch.gil_held():
            load(state, 4)
            assert watch.is_gil_held()
        assert watch.counts() == {}


@pytest.mark.requires("swap")
def test_threads_that_wait_for_the_backing_store_allocate_nothing(
    watched: dict[str, str], tmp_path: Path
) -> None:
    back = backing_file(tmp_path / "back", 2 * CLIENTS * SHARE)
    with swap_daemon(watched, "--writeback", back) as (state, watch):
        device = Device(Path(state.directory))

        def figures() -> list[int]:
            return [int(word) for word in device.read("zram/bd_stat").split()]

        for seed in (1, 2):
            load(state, seed)
            device.write("zram/writeback", f"page_indexes=0-{CLIENTS * SHARE // PAGE - 1}")
        count, reads, _ = figures()
        watch.forget()
        with watch.gil_held():
            load(state, 3)
        assert watch.counts() == {}
        left, reads_since, _ = figures()
        assert 0 < left < count and reads_since > reads


def test_what_allocates_or_wants_python_is_seen(watched: dict[str, str], tmp_path: Path) -> None:
    """A plain device with lz4hc from level 10 on, which `zramfs swap` refuses, takes memory for each page,
    and gives back at once what is discarded. Its tree is served by Python."""
    tree = tmp_path / "tree"
    words = ("create", tree, "--size", CLIENTS * SHARE, "--algo", "lz4hc:10")
    with daemon(watched, *words, name=str(tree)) as (state, watch):
        load(state, 1, 120)
        watch.forget()
        load(state, 2, 120)
        with opened(state.disk) as disk:
            punch_hole(disk, 0, CLIENTS * SHARE)
        counts = watch.counts()
        calls, first = counts["heap"]
        assert calls > 1000
        assert first.startswith(("malloc by liblz4", "free by liblz4"))
        assert counts["holes"][0] > 0
        with subprocess.Popen(["cat", tree / "control"], stdout=subprocess.PIPE) as ends:
            assert b"lz4hc" in ends.communicate(timeout=60)[0]
        with watch.gil_held(), subprocess.Popen(["cat", tree / "control"], stdout=subprocess.PIPE) as waits:
            time.sleep(0.5)
            assert waits.poll() is None
            watch.release_gil()
            assert b"lz4hc" in waits.communicate(timeout=60)[0]
