# SPDX-License-Identifier: Apache-2.0
"""A whole device with a backing store: verified load while pages leave and come back, a file system on
it, and an end in the middle of write-back."""
from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import whole
from tests.support.backing_tools import MIB, PAGE, backing_file
from tests.support.served import ServedDevice
from tests.support.whole import Device, run, zramfs

pytestmark = pytest.mark.requires("fuse")


def bd_stat(device: Device) -> list[int]:
    return [int(word) for word in device.read("zram/bd_stat").split()]


@contextmanager
def loop_over(path: Path, size: int) -> Iterator[str]:
    with whole.loop(backing_file(path, size)) as name:
        yield name


@contextmanager
def writing_back(device: Device) -> Iterator[list[int]]:
    """All that is idle, over and over; yields the rounds."""
    ends, rounds = threading.Event(), [0]

    def work() -> None:
        while not ends.is_set():
            device.write("zram/idle", "all")
            ends.wait(0.05)
            device.write("zram/writeback", "idle")
            rounds[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield rounds
    finally:
        ends.set()
        thread.join()


@pytest.mark.requires("fio")
@pytest.mark.parametrize("kind", ["file", pytest.param("block device", marks=pytest.mark.requires("loop"))])
def test_verified_load_while_pages_leave_and_come_back(tmp_path: Path, kind: str) -> None:
    with (
        (loop_over(tmp_path / "back", 256 * MIB) if kind == "block device" else
         _itself(backing_file(tmp_path / "back", 256 * MIB))) as back,
        whole.device(tmp_path / "z", "48M", "--writeback", back) as device,
    ):
        assert device.read("zram/backing_dev") == f"{back}\n"
        with writing_back(device) as rounds:
            for _ in range(10):
                for name, how in (
                    ("pages", ("--bs=4k", "--ioengine=io_uring", "--iodepth=16")),
                    ("parts", ("--bsrange=512-16k", "--bs_unaligned=1", "--ioengine=psync")),
                ):
                    run("fio", f"--name={name}", f"--filename={device.disk}", "--size=32M", "--rw=randrw",
                        "--direct=1", "--verify=crc32c", "--verify_fatal=1",
                        "--buffer_compress_percentage=50", "--refill_buffers",
                        "--verify_backlog=256", "--io_size=48M", *how, cwd=tmp_path, timeout=150)
                used, reads, writes = bd_stat(device)
                put_off = [line for line in device.read("metrics").splitlines()
                           if line.startswith("zramfs_put_off_requests_total")]
                # On a busy machine it may be written back seldom: then fio goes on.
                if rounds[0] > 3 and reads > 1000 and writes > 1000 and float(put_off[0].split()[-1]) > 100:
                    break
        assert rounds[0] > 3 and reads > 1000 and writes > 1000 and used > 100
        assert device.io_stat()["failed_reads"] == device.io_stat()["failed_writes"] == 0
        assert "0 + 0 failed" in device.read("control")
        assert float(put_off[0].split()[-1]) > 100


@contextmanager
def _itself(path: Path) -> Iterator[Path]:
    yield path


@pytest.mark.requires("loop", "ext4", "fstrim")
def test_a_file_system_whose_pages_were_all_written_back(tmp_path: Path) -> None:
    back = backing_file(tmp_path / "back", 256 * MIB)
    with whole.device(tmp_path / "z", "128M", "--writeback", back) as device, whole.loop(device.disk) as loop:
        run("mkfs.ext4", "-q", loop)
        with whole.mounted(loop, tmp_path / "m", "-o", "discard") as point:
            expected = whole.copy_real_files(point, 48 * MIB)
            whole.drop_caches(point)
            before = device.mm_stat()
            device.write("zram/idle", "all")
            device.write("zram/writeback", "type=idle")
            after, (used, _, writes) = device.mm_stat(), bd_stat(device)
            assert after["orig_data_size"] == before["orig_data_size"]
            assert after["mem_used_total"] < before["mem_used_total"] / 10
            assert used == writes < before["orig_data_size"] / PAGE * 0.8, "packed"
            assert back.stat().st_blocks * 512 <= (used + 16) * PAGE
            assert whole.manifest(point) == expected
            assert bd_stat(device)[1] > used / 2
            for path in point.iterdir():
                if path.name != "lost+found":
                    run("rm", "-r", path)
            run("fstrim", point)
            whole.wait_until(lambda: back.stat().st_blocks * 512 < 8 * MIB, "holes in the backing file")
        run("e2fsck", "-fn", loop)
    assert back.stat().st_blocks == 0


def test_a_signal_in_the_middle_of_write_back(tmp_path: Path) -> None:
    """Once more where a busy machine let this process wait until all was written back."""
    assert any(ends_in_the_middle(tmp_path / str(number)) for number in range(5))


def ends_in_the_middle(place: Path) -> bool:
    place.mkdir()
    back = backing_file(place / "back", 512 * MIB)
    served = ServedDevice(place, size=300 * MIB, writeback=str(back))
    try:
        served.hear("READY")
        run("dd", "if=/dev/urandom", f"of={served.disk}", "bs=1M", "count=200", "conv=notrunc", "status=none")
        served.write("zram/writeback_batch_size", "1")
        job = subprocess.Popen(["bash", "-c", f"echo huge > {served.directory}/zram/writeback"],
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "LC_ALL": "C"})
        whole.wait_until(lambda: int(served.read("zram/bd_stat").split()[2]) > 0, "write-back to begin")
        assert served.stop() == 0, served.log
        said = job.communicate(timeout=60)[1]
        assert "Interrupted system call" in said or job.returncode == 0
        assert ("was cut short by the end of the device" in served.log) == (said != "")
    finally:
        served.end()
    assert back.stat().st_blocks == 0
    return said != ""


def test_what_create_refuses(tmp_path: Path) -> None:
    for path, sentence in ((tmp_path / "missing", "No such file"), (tmp_path, "got the directory"),
                           (backing_file(tmp_path / "empty", 0), "truncate --size")):
        done = zramfs("create", tmp_path / "z", "--size", "1M", "--writeback", path, check=False)
        assert done.returncode and sentence in done.stderr, done.stderr
    back = backing_file(tmp_path / "back")
    with whole.device(tmp_path / "z", "1M", "--writeback", back):
        done = zramfs("create", tmp_path / "y", "--size", "1M", "--writeback", back, check=False)
        assert done.returncode and "locked by somebody else" in done.stderr
