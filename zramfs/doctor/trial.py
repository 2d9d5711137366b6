# SPDX-License-Identifier: Apache-2.0
"""A device of a few pages, made, used and taken down again, to see whether that works here."""
from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

from zramfs.host import bounded
from zramfs.lifecycle import claim, rundir, start, stop
from zramfs.model.config import DeviceConfig

from .checks import Verdict

# A device is there and gone again in 0.4 s; the rest is for a machine that is very busy.
TIMEOUT = 60.0  # seconds; a start takes half a second, and took 8 s on two CPUs with a load of 28
_SIZE = 1 << 20


def run() -> Verdict:
    """Never takes longer than twice TIMEOUT, and leaves nothing if the machine lets it."""
    directory = Path(tempfile.mkdtemp(prefix="zramfs-doctor-"))
    place = directory / "device"
    begin = time.monotonic()
    try:
        bounded.call(partial(_live, place), TIMEOUT)
    except TimeoutError:
        found = f"a device on {place} was not made, used and ended within {TIMEOUT:g} s"
        return "missing", found, f"zramfs create {place} --size 1M --foreground shows where it stands"
    except OSError as error:
        return "missing", error.strerror or str(error), "zramfs create DIR --size 1M --foreground says more"
    finally:
        with contextlib.suppress(OSError):
            bounded.call(partial(_clear, place), TIMEOUT)
        shutil.rmtree(directory, ignore_errors=True)
    return "ok", f"one was made, written, read and ended in {time.monotonic() - begin:.1f} s", ""


def _live(place: Path) -> None:
    new, config = claim.claim_place(place, "device", DeviceConfig(size=_SIZE, threads=1), say=_quiet)
    start.start_device(new, config)
    try:
        written = os.urandom(8192)
        with open(place / "disk", "r+b", buffering=0) as disk:
            os.pwrite(disk.fileno(), written, 4096)
            if os.pread(disk.fileno(), len(written), 4096) != written:
                raise OSError(errno.EIO, f"{place}/disk does not give back what was written to it")
    finally:
        stop.stop_device(new, _quiet)


def _clear(place: Path) -> None:
    if left := rundir.find(str(place)):
        stop.stop_device(left, _quiet)


def _quiet(_message: str) -> None:
    """What commands say to people has no place in a verdict."""
