# SPDX-License-Identifier: Apache-2.0
"""Shortage at every place where there can be one: each allocation of a scripted life fails once."""
from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support import models
from tests.support.page_kinds import KINDS, block, page_of_size
from tests.support.paths import ROOT
from zramfs.store.store import Store

PAGE = 4096
SIZE = 3 << 20


class Life:
    """A device and its model; a step that fails leaves both with the old data."""

    def __init__(self) -> None:
        self.store = Store(SIZE)
        self.model = models.Device(SIZE)
        self.failures = 0

    def write(self, off: int, data: bytes) -> None:
        written = len(data)
        try:
            self.store.write(off, data)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            written = error.written
            assert written < len(data) and ((off + written) % PAGE == 0 or written == 0)
            self.failures += 1
        self.model.write(off, data[:written])

    def zero(self, off: int, n: int) -> None:
        """Of one page, or of whole pages: all or nothing."""
        try:
            self.store.zero(off, n)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            self.failures += 1
        else:
            self.model.zero(off, n)

    def verify(self) -> None:
        self.store.check(3)
        assert self.store.read(0, SIZE) == self.model.data
        stats = self.store.stats()
        assert {name: getattr(stats, name) for name in self.model.stats()} == self.model.stats()
        assert (stats.failed_writes, stats.failed_reads, stats.corrupt) == (self.failures, 0, 0)
        assert stats.mem_used_total == stats.frames_used * PAGE


def script(life: Life) -> Iterator[None]:
    """Every way to need a frame: pages of every kind, overwritten with every other, in part and whole."""
    for n, kind in enumerate(KINDS):
        life.write(n * 30 * PAGE, block(kind, 1, 12 * PAGE))
        yield
    for n, kind in enumerate(KINDS[::-1]):
        life.write(n * 30 * PAGE + 5 * PAGE + 77, block(kind, 2, 5 * PAGE))
        yield
    life.zero(20, 1000)
    life.zero(180 * PAGE + 20, 1000)
    yield
    life.zero(90 * PAGE, 130 * PAGE)
    yield
    life.store.compact()
    yield
    for size in (30, 300, 700, 1200, 2000, 2600, 3200, 3600, 3700):
        life.write(size // 10 * PAGE, page_of_size(size))
        life.write(size // 10 * PAGE + 300, b"a few bytes")
        yield
    life.store.compact()
    yield


def test_every_allocation_of_a_life_fails_once() -> None:
    nth, failed = 0, 1
    while failed:
        nth += 1
        life = Life()
        life.store.inject_failure(nth)
        for _ in script(life):
            if life.failures:
                life.verify()
        failed = life.failures
        assert failed <= 1
        # What failed works now.
        life.store.inject_failure(0)
        life.write(0, block("random", 3, 20 * PAGE))
        assert life.failures == failed
        life.verify()
        life.store.zero(0, SIZE)
        assert life.store.stats().frames_used == 0
        life.store.close()
    assert nth > 100, "the script has fewer allocations than it was written for"


def test_every_second_allocation_fails() -> None:
    """Failures that follow one another, each before the next success."""
    life = Life()
    for step, _ in enumerate(script(life)):
        life.store.inject_failure(1 + step % 3)
        life.verify()
    assert life.failures > 8


def sparse(life: Life) -> None:
    rng = random.Random(1)
    for index in range(0, SIZE // PAGE, 4):
        life.write(index * PAGE, b"".join(page_of_size(3500 + 100 * n) for n in range(4)))
    for index in rng.sample(range(SIZE // PAGE), SIZE // PAGE * 2 // 3):
        life.zero(index * PAGE, PAGE)


def test_every_allocation_of_a_migration_fails_once() -> None:
    """Where a target frame is lacking, the page stays; a run never fails, and loses nothing."""
    life = Life()
    sparse(life)
    life.store.migration.run()
    soundly = life.store.migration.stats()
    assert soundly.migrated > 50 and soundly.blocks_freed >= 1
    fewer = 0
    # Every target frame, and one more.
    for nth in range(1, soundly.migrated + 2):
        life = Life()
        sparse(life)
        life.store.inject_failure(nth)
        freed = life.store.migration.run()
        assert freed <= soundly.blocks_freed
        fewer += freed < soundly.blocks_freed
        life.verify()
        life.store.inject_failure(0)
        life.store.migration.run()
        life.verify()
        assert life.store.stats().pageblocks_in_use == -(-life.store.stats().frames_used // 512)
        life.store.close()
    assert fewer


# ---- what the OS refuses -----------------------------------------------------------------------------------

REFUSED = """
import os, resource
from zramfs.store.store import Store
first = Store(1 << 30)
first.write(0, b"kept")
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
%s
files = len(os.listdir("/proc/self/fd"))
try:
    Store(1 << 40)
except MemoryError as error:
    print(error)
assert len(os.listdir("/proc/self/fd")) == files
assert first.read(0, 4) == b"kept"
first.check(3)
"""


@pytest.mark.parametrize("limit", [
    "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 32), used + (1 << 32)))",
    "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 33, 1 << 33))",
], ids=["address space", "file size"])
def test_a_device_that_the_os_refuses_is_a_memory_error(limit: str) -> None:
    root = ROOT
    run = subprocess.run(
        [sys.executable, "-c", REFUSED % limit], capture_output=True, text=True, timeout=60, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "could be mapped; see `ulimit -v`" in run.stdout
