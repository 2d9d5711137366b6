# SPDX-License-Identifier: Apache-2.0
"""A zram device of the live kernel, added for a test and removed after it; never one that was there."""
from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import leftovers

CONTROL = Path("/sys/class/zram-control")
# udev and util-linux look into a device whose size has changed, and have it open meanwhile.
LOOKED_AT = 5.0


@dataclass(frozen=True)
class KernelZram:
    number: int

    @property
    def directory(self) -> Path:
        return Path(f"/sys/block/zram{self.number}")

    @property
    def disk(self) -> Path:
        return Path(f"/dev/zram{self.number}")

    def read(self, name: str) -> str:
        return (self.directory / name).read_text()

    def write(self, name: str, data: bytes) -> int:
        """One write(2)."""
        fd = os.open(self.directory / name, os.O_WRONLY)
        try:
            return os.write(fd, data)
        finally:
            os.close(fd)

    def reset(self, data: bytes = b"1") -> int:
        """A write to reset that waits for lookers."""
        return unbothered(lambda: self.write("reset", data))


def unbothered(store, seconds: float = LOOKED_AT):
    """What store() answers, called again while that is EBUSY because somebody looks."""
    until = time.monotonic() + seconds
    while True:
        try:
            return store()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= until:
                raise
            time.sleep(0.005)


@contextlib.contextmanager
def kernel_zram() -> Iterator[KernelZram]:
    zram = KernelZram(int((CONTROL / "hot_add").read_text()))
    mark = leftovers.zram_mark(zram.directory.name, leftovers.owner_name())
    mark.touch()
    try:
        yield zram
    finally:
        zram.reset()
        unbothered(lambda: (CONTROL / "hot_remove").write_text(str(zram.number)))
        mark.unlink()
