# SPDX-License-Identifier: Apache-2.0
"""A device in use that takes a dictionary of its own, and whose daemon is killed after that."""
from __future__ import annotations

import contextlib
import os
import random
import threading
from pathlib import Path

import pytest

from tests.support.killer import kill_daemon
from tests.support.page_kinds import record
from tests.support.whole import MIB, PAGE, device, opened, wait_until, zramfs

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(120)]
PAGES = 5000
KINDS = 1000


def state_line(control: str) -> str:
    return next(line for line in control.splitlines() if line.startswith("dictionaries"))


def is_readable(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return bool(path.read_text())
    return False


def test_readers_see_nothing_of_it_and_the_next_daemon_reads_all_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    data = b"".join(record(number % KINDS) for number in range(PAGES))
    wrong: list[int] = []
    over = threading.Event()
    with device(tmp_path / "z", 32 * MIB, "--standby") as z, opened(os.path.realpath(z.disk)) as fd:
        os.pwrite(fd, data, 0)

        def read() -> None:
            while not over.is_set():
                number = random.randrange(PAGES)
                if os.pread(fd, PAGE, number * PAGE) != data[number * PAGE:(number + 1) * PAGE]:
                    wrong.append(number)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        z.write("control", "dictionary=idle=all")
        assert state_line(z.read("control")).startswith("dictionaries #1 zstd level 3 with 64K: ")
        used = z.mm_stat()["compr_data_size"]
        kill_daemon(z.directory)
        wait_until(lambda: is_readable(z.directory / "control"), "the tree", 30)
        over.set()
        reader.join(60)
        assert not wrong and not reader.is_alive()
        assert "1 trained, 1 taken, 0 rejected, 0 dropped" in state_line(z.read("control"))
        assert z.read("zram/recomp_algorithm") == "#1: lz4 lz4hc [zstd] \n"
        assert z.mm_stat()["compr_data_size"] == used
        assert b"".join(os.pread(fd, MIB, at) for at in range(0, len(data), MIB))[:len(data)] == data
        zramfs("save", tmp_path / "z", tmp_path / "image")
    zramfs("create", tmp_path / "z", "--restore", tmp_path / "image")
    try:
        assert (tmp_path / "z/zram/recomp_algorithm").read_text() == "#1: lz4 lz4hc [zstd] \n"
        with opened(tmp_path / "z/disk") as fd:
            assert b"".join(os.pread(fd, MIB, at) for at in range(0, len(data), MIB))[:len(data)] == data
    finally:
        zramfs("stop", tmp_path / "z")
