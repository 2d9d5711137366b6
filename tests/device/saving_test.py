# SPDX-License-Identifier: Apache-2.0
"""The command save of a whole device, and devices that are made of an image."""
from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backing_tools import tmpfs
from tests.support.images import content
from tests.support.page_kinds import block
from tests.support.served import ServedDevice, served_device
from tests.support.steps import Writer, at_work, in_turn
from tests.support.whole import punch_hole, wait_until
from zramfs.host import fusermount

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]
PAGE = 4096
MIB = 1 << 20
RATE = 128 << 10  # bytes a second


class DiskFile:
    """The file `disk`, for Writer."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def write(self, off: int, data: bytes) -> int:
        return os.pwrite(self.fd, data, off)

    def zero(self, off: int, n: int) -> None:
        punch_hole(self.fd, off, n)


@contextlib.contextmanager
def opened(device: ServedDevice) -> Iterator[int]:
    fd = os.open(device.disk, os.O_RDWR)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):  # the device was killed
            os.close(fd)


@contextlib.contextmanager
def slow_save(device: ServedDevice, path: Path) -> Iterator[list[OSError]]:
    """One that is so slow that a busy machine does not miss it, in a thread. What it was answered with."""
    answers: list[OSError] = []

    def save() -> None:
        try:
            device.write("control", f"save=rate={RATE} {path}")
        except OSError as error:
            answers.append(error)

    thread = threading.Thread(target=save, daemon=True)
    thread.start()
    running, taken = 'save_running{device="%s"}', 'save_pages{device="%s",kind="taken"}'
    wait_until(lambda: metric(device, running) == 1 and metric(device, taken) > 0, "it has taken a page")
    try:
        yield answers
    finally:
        thread.join(90)
        assert not thread.is_alive()


def metric(device: ServedDevice, name: str) -> float:
    name = name % device.directory.parent.name if "%s" in name else name
    for line in device.read("metrics").splitlines():
        if line.startswith(f"zramfs_{name} "):
            return float(line.split()[-1])
    raise AssertionError(f"no metric {name}")


def last_error(device: ServedDevice) -> str:
    return next(line for line in device.read("control").splitlines() if line.startswith("last error"))


def test_what_is_saved_is_one_instant_of_what_programs_write(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with served_device(tmp_path / "device", size=32 * MIB, policies=[]) as device, opened(device) as fd:
        disk = DiskFile(fd)
        ordered = [Writer(disk, 0, 701), Writer(disk, 1024, 601)]
        alone = Writer(disk, 2048, 801)
        filler = block("mixed", 5, 16 * MIB)
        os.pwrite(fd, filler, 16 * MIB)
        for writer in (*ordered, alone):
            for _ in range(900):
                writer.advance()
        step = in_turn(ordered)
        with at_work(step, step, alone.advance):
            for _ in range(2):
                device.write("control", "compact")
                before = alone.step
                device.write("control", f"save={image}")
                saved = content(image)
                found = [writer.steps_in(saved) for writer in (*ordered, alone)]
                assert abs(found[0] - found[1]) <= 1 and before <= found[2] <= alone.step
                assert saved[16 * MIB:] == filler
    with served_device(tmp_path / "again", size=32 * MIB, restore=str(image)) as device, opened(device) as fd:
        assert os.pread(fd, 32 * MIB, 0) == saved
        rows = [line for line in device.read("control").splitlines() if line.startswith("restored")]
        assert len(rows) == 1 and str(image) in rows[0]


@pytest.mark.requires("fio")
def test_fio_verifies_what_it_writes_while_saves_run(tmp_path: Path) -> None:
    with served_device(tmp_path / "device", size=64 * MIB) as device:
        command = [
            "fio", "--name=load", f"--filename={device.disk}", "--size=48M",
            "--rw=randwrite", "--bs=4k-64k", "--ioengine=libaio", "--iodepth=16", "--direct=1",
            "--verify=crc32c", "--verify_fatal=1",
            "--do_verify=1", "--verify_backlog=500", "--verify_state_save=0", "--time_based",
            "--runtime=10000", "--group_reporting"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              cwd=tmp_path) as fio:
            try:
                wait_until(lambda: fio.poll() is not None or written(device) > 1000, "fio writes")
                saves, end = 0, time.monotonic() + 2
                while fio.poll() is None and (saves < 2 or time.monotonic() < end):
                    device.write("control", f"save={tmp_path / 'image'}")
                    assert len(content(tmp_path / "image")) == 64 * MIB
                    saves += 1
            finally:
                fio.send_signal(signal.SIGINT)
                said = fio.communicate(timeout=60)[0]
            assert fio.returncode in (0, 128) and "verify:" not in said, said  # 128: by our SIGINT
        assert saves >= 2


def written(device: ServedDevice) -> int:
    """Requests so far."""
    return int(device.read("zram/stat").split()[4])


def test_a_rate_is_kept_and_progress_is_shown(tmp_path: Path) -> None:
    with served_device(tmp_path / "device", size=16 * MIB) as device, opened(device) as fd:
        # The first MiB at once, and then twelve seconds, of which a busy machine may keep us waiting some.
        os.pwrite(fd, random.Random(1).randbytes(20 * RATE), 0)
        began = time.monotonic()
        with slow_save(device, tmp_path / "image") as answers:
            assert metric(device, 'save_running{device="%s"}') == 1
            row = next(line for line in device.read("control").splitlines() if line.startswith("saved"))
            assert f"to {tmp_path}/image: " in row and " %, " in row
            os.pwrite(fd, b"meanwhile" * 1000, 0)
        assert answers == [] and 8 < time.monotonic() - began < 90
        assert metric(device, 'save_running{device="%s"}') == 0
        assert metric(device, 'saves_total{device="%s",result="saved"}') == 1
        assert content(tmp_path / "image")[:20 * RATE] == random.Random(1).randbytes(20 * RATE)


def test_a_killed_save_leaves_the_old_image_whole(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with served_device(tmp_path / "device", size=16 * MIB) as device:
        with opened(device) as fd:
            os.pwrite(fd, random.Random(1).randbytes(4 * MIB), 0)
            device.write("control", f"save={image}")
            old = image.read_bytes()
            os.pwrite(fd, random.Random(2).randbytes(12 * MIB), 0)
            with slow_save(device, image):
                device.process.kill()
        device.process.wait()
        for place in (device.directory, device.rundir / "disk"):
            fusermount.unmount(place, lazy=True)
    is_old = image.read_bytes() == old  # without pytest's comparison of megabytes
    assert is_old and not (tmp_path / "image.tmp").exists()
    with served_device(tmp_path / "again", size=16 * MIB, restore=str(image)) as device:
        with opened(device) as fd:
            assert os.pread(fd, 4 * MIB, 0) == random.Random(1).randbytes(4 * MIB)
        device.write("control", f"save={image}")
    assert not (tmp_path / "image.tmp").exists()


def test_reset_cuts_a_save_short(tmp_path: Path) -> None:
    with served_device(tmp_path / "device", size=16 * MIB) as device:
        with opened(device) as fd:
            os.pwrite(fd, random.Random(1).randbytes(8 * MIB), 0)
        with slow_save(device, tmp_path / "image") as answers:
            with pytest.raises(OSError) as caught:
                device.write("control", f"save={tmp_path / 'other'}")
            assert caught.value.errno == errno.EBUSY
            began = time.monotonic()
            device.write("control", "reset")
            assert time.monotonic() - began < 40, "all of it takes a minute"
        # Python writes the line again after EINTR, and then the device has no size.
        assert [error.errno for error in answers] == [errno.EINVAL]
        assert "save was cut short by reset" in (device.rundir / "log").read_text()
        assert not list(tmp_path.glob("image*")) and not list(tmp_path.glob("other*"))


def test_a_device_that_ends_cuts_a_save_short(tmp_path: Path) -> None:
    with served_device(tmp_path / "device", size=16 * MIB) as device:
        with opened(device) as fd:
            os.pwrite(fd, random.Random(1).randbytes(8 * MIB), 0)
        with slow_save(device, tmp_path / "image"):
            began = time.monotonic()
            device.process.terminate()
            device.process.wait(60)
            assert time.monotonic() - began < 40, "all of it takes a minute"
    assert not list(tmp_path.glob("image*"))


def test_what_save_refuses(tmp_path: Path) -> None:
    with served_device(tmp_path / "device", size=MIB) as device:
        for line, number, words in (
            ("save", errno.ENODATA, "the device keeps no image"),
            ("save=image", errno.EINVAL, "last an absolute path"),
            ("save=rate=fast /x", errno.EINVAL, "fast"),
            ("save=quick /x", errno.EINVAL, "not 'quick'"),
            ("save=/nowhere/image", errno.ENOENT, "/nowhere/image"),
            ("save=/proc", errno.EEXIST, "is no image"),
            ("keep=image", errno.EINVAL, "keep takes an absolute path or off"),
        ):
            with pytest.raises(OSError) as caught:
                device.write("control", line)
            assert caught.value.errno == number and words in last_error(device), line


def test_a_file_with_blanks_in_its_name_and_one_that_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a letter"
    path.write_text("Dear all")
    with served_device(tmp_path / "device", size=MIB) as device:
        with pytest.raises(OSError) as caught:
            device.write("control", f"save={path}")
        assert caught.value.errno == errno.EEXIST and path.read_text() == "Dear all"
        device.write("control", f"save=force rate=1G {path}")
    assert content(path) == bytes(MIB)


def test_an_image_is_kept_by_the_clock(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with (served_device(tmp_path / "device", size=MIB, keep=str(image), keep_every=1) as device,
          opened(device) as fd):
        os.pwrite(fd, b"first" * 1000, 0)
        wait_until(lambda: image.exists() and content(image)[:5000] == b"first" * 1000, "it is saved")

        def stays() -> bool:
            seen = image.stat().st_ino
            time.sleep(1.2)
            return image.stat().st_ino == seen

        # A save that began while the write was being counted is followed by one more.
        wait_until(stays, "nothing has changed")
        os.pwrite(fd, b"second" * 1000, 0)
        wait_until(lambda: content(image)[:6000] == b"second" * 1000, "it is saved again")


@pytest.mark.requires("root")
def test_a_full_disk_fails_the_save_and_leaves_the_old_image(tmp_path: Path) -> None:
    with (tmpfs(tmp_path / "small", 2 * MIB) as small,
          served_device(tmp_path / "device", size=16 * MIB) as device, opened(device) as fd):
        device.write("control", f"save={small / 'image'}")
        old = (small / "image").read_bytes()
        os.pwrite(fd, random.Random(1).randbytes(4 * MIB), 0)
        with pytest.raises(OSError) as caught:
            device.write("control", f"save={small / 'image'}")
        assert caught.value.errno == errno.ENOSPC
        assert "what was there before stays" in last_error(device)
        assert os.listdir(small) == ["image"] and (small / "image").read_bytes() == old
        assert metric(device, 'saves_total{device="%s",result="failed"}') == 1
        os.pwrite(fd, b"it goes on" * 100, 0)
