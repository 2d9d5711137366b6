# SPDX-License-Identifier: Apache-2.0
"""A device full of units under random writes, discards and reads, against a model.

Half a minute in full; --soak MINUTES stretches the load to about as many minutes.
"""
from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.support.real_pages import real_pages
from tests.support.scale import is_full
from tests.support.whole import MIB, PAGE, Device, device, opened, punch_hole, wait_until

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.soak]

SIZE = 32 * MIB
# The model of a load works on a part of the device at a time, so that units come about beside it.
WINDOW = 2 * MIB
# Seconds of load without --soak.
LOAD, LOAD_IN_PART = 15.0, 3.0
MORE_THAN_FRESH = 1.05


def rested(z: Device) -> int:
    """The bytes of memory that the device takes once nothing is left to make smaller."""
    def is_resting() -> bool:
        return any("density_resting{" in line and line.endswith(" 1.0")
                   for line in z.read("metrics").splitlines())

    wait_until(is_resting, "nothing is left to pack", 120)
    z.write("control", "compact")
    return z.mm_stat()["mem_used_total"]


def pages_in_units(z: Device) -> int:
    return int(dict(line.split() for line in z.read("memory/contents").splitlines())["units_pages"])


class Load:
    """Writes, discards and reads at random places, each checked against the model at once."""

    def __init__(self, fd: int, pages: list[bytes], seed: int) -> None:
        self.fd = fd
        self.random = random.Random(seed)
        self.corpus = b"".join(pages)
        self.model = bytearray(SIZE)

    def data(self, size: int) -> bytes:
        """Bytes as files have them, hardly ever the same page twice."""
        at = self.random.randrange(len(self.corpus) - size)
        return self.corpus[at:at + size]

    def fill(self) -> None:
        for at in range(0, SIZE, MIB):
            self.write(at, MIB)

    def write(self, at: int, size: int) -> None:
        data = self.data(size)
        assert os.pwrite(self.fd, data, at) == size
        self.model[at:at + size] = data

    def step(self, window: int) -> None:
        size = self.random.choice((PAGE, PAGE, PAGE, 3 * PAGE, 16 * PAGE, 48 * PAGE))
        at = window + self.random.randrange((WINDOW - size) // PAGE + 1) * PAGE
        chance = self.random.random()
        if chance < 0.4:
            self.write(at, size)
        elif chance < 0.5:
            punch_hole(self.fd, at, size)
            self.model[at:at + size] = bytes(size)
        else:
            self.expect(at, size)

    def expect(self, at: int, size: int) -> None:
        os.posix_fadvise(self.fd, at, size, os.POSIX_FADV_DONTNEED)
        if os.pread(self.fd, size, at) != self.model[at:at + size]:
            raise AssertionError(f"the {size} bytes at {at} are not what was written there")

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            window = self.random.randrange(SIZE // WINDOW) * WINDOW
            until = min(end, time.monotonic() + 2)
            while time.monotonic() < until:
                self.step(window)
            # Reads of pages that are in units by then.
            for _ in range(64):
                self.expect(self.random.randrange(SIZE // PAGE) * PAGE, PAGE)


def test_nothing_is_wrong_and_memory_does_not_creep(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    soak = request.config.getoption("soak")
    seconds = 60 * soak if soak else LOAD if is_full() else LOAD_IN_PART
    with device(tmp_path / "z", SIZE, "--density", "max") as z, opened(z.disk) as fd:
        load = Load(fd, real_pages(8192), seed=12)
        load.fill()
        wait_until(lambda: pages_in_units(z) > SIZE // PAGE // 2, "most pages are in units", 120)
        load.run(seconds)
        taken = rested(z)
        for at in range(0, SIZE, MIB):
            load.expect(at, MIB)
        assert z.io_stat()["failed_reads"] == z.io_stat()["failed_writes"] == 0
        model = bytes(load.model)
    with device(tmp_path / "fresh", SIZE, "--density", "max") as z, opened(z.disk) as fd:
        for at in range(0, SIZE, MIB):
            os.pwrite(fd, model[at:at + MIB], at)
        fresh = rested(z)
    print(f"{taken} bytes, and freshly packed {fresh}: {taken / fresh:.3f}")
    assert taken <= MORE_THAN_FRESH * fresh, f"{taken} bytes, and freshly packed {fresh}"
