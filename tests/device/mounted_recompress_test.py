# SPDX-License-Identifier: Apache-2.0
"""Recompression, idle marks and block_state of a mounted device, while `disk` is in use."""
from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.page_kinds import hard, noise, prose
from tests.support.served import ServedDevice, served_device
from tests.support.whole import run, wait_until

pytestmark = pytest.mark.requires("fuse")

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDevice]:
    with served_device(tmp_path / "dev", access_times=True) as child:
        yield child
        assert child.process.poll() is not None or child.stop() == 0, child.log
        assert "Traceback" not in child.log
        assert child.mounts() == []


def set_up(served: ServedDevice, size: str = "16M", level: int = 9) -> None:
    """As a script for the kernel's zram does it."""
    script = f"""set -e
        echo lz4 > comp_algorithm
        echo "algo=zstd" > recomp_algorithm
        echo "algo=zstd priority=1 level={level}" > algorithm_params
        echo {size} > disksize"""
    done = run("bash", "-c", script, cwd=served.directory / "zram")
    assert done.stderr == ""


def write_pages(served: ServedDevice, pages: list[bytes]) -> None:
    with open(served.disk, "r+b", buffering=0) as disk:
        os.pwrite(disk.fileno(), b"".join(pages), 0)


def test_a_script_for_the_kernel_works(served: ServedDevice) -> None:
    set_up(served)
    write_pages(served, [prose(1), hard(1), noise(1), bytes(PAGE)])
    assert served.read("zram/recomp_algorithm") == "#1: lz4 lz4hc [zstd] \n"
    script = "echo all > idle && cut -c34- block_state && echo 'type=huge_idle algo=zstd' > recompress &&" \
             " cut -c34- block_state && cat debug_stat"
    done = run("bash", "-c", script, cwd=served.directory / "zram")
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "...i..", "..hi..", "..hi..", "s.....", "...i..", "....r.", "..h..n", "s.....",
        "version: 1", "0        0"]
    served.write("control", "recompress type=idle\n")
    assert "recompressed with #1 zstd level 9: 2 of 3 pages tried" in served.read("control")


def test_block_state_offsets_are_page_numbers(served: ServedDevice) -> None:
    assert os.stat(served.directory / "zram/block_state").st_mode & 0o7777 == 0o400
    with pytest.raises(OSError) as failure:
        served.read("zram/block_state")
    assert failure.value.errno == errno.EINVAL
    set_up(served)
    write_pages(served, [prose(n % 50) for n in range(4096)])
    whole = [int(line.split()[0]) for line in served.read("zram/block_state").splitlines()]
    assert whole == list(range(4096))
    fd = os.open(served.directory / "zram/block_state", os.O_RDONLY)
    first = os.read(fd, 1000)
    assert len(first) % 40 == 0 and len(first) <= 1000
    assert os.read(fd, 100).split()[0] == str(len(first) // 40).encode()
    os.lseek(fd, 3000, os.SEEK_SET)
    assert os.read(fd, 100).split()[0] == b"3000"
    assert os.pread(fd, 100, 4095).split()[0] == b"4095"
    assert os.pread(fd, 100, 4096) == b""
    assert os.pread(fd, 1 << 20, 0).split()[0] == b"0"
    os.close(fd)
    done = run("tail", "-n", "1", served.directory / "zram/block_state")
    assert done.stdout.split()[0] == "4095"


def test_under_load_with_verification(served: ServedDevice) -> None:
    """Writers and readers of `disk` beside recompression and idle marks: every page is what was written."""
    set_up(served, "32M", level=3)
    stop = time.monotonic() + 2
    failures: list[BaseException] = []
    counts: list[int] = []
    pages = [maker(n) for maker in (prose, hard, noise) for n in range(20)] + [bytes(PAGE)]

    def user(first: int) -> None:
        rng, mine, done = random.Random(first), {}, 0
        fd = os.open(served.disk, os.O_RDWR)
        try:
            while time.monotonic() < stop or done <= 100:
                slot = first + rng.randrange(2000)
                mine[slot] = rng.choice(pages)
                os.pwrite(fd, mine[slot], slot * PAGE)
                slot = rng.choice(list(mine))
                assert os.pread(fd, PAGE, slot * PAGE) == mine[slot]
                done += 1
            for slot, page in mine.items():
                assert os.pread(fd, PAGE, slot * PAGE) == page
        except BaseException as error:
            failures.append(error)
        finally:
            os.close(fd)
        counts.append(done)

    threads = [threading.Thread(target=user, args=(n * 2048,)) for n in range(3)]
    for thread in threads:
        thread.start()
    rounds = 0
    while any(thread.is_alive() for thread in threads) or rounds < 2:
        served.write("zram/idle", "all")
        served.write("zram/recompress", "type=idle")
        rounds += 1
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert min(counts) > 100
    io_stat = [int(number) for number in served.read("zram/io_stat").split()]
    assert io_stat[:2] == [0, 0]


def test_stop_cuts_it_short(served: ServedDevice) -> None:
    set_up(served, "64M", level=19)
    write_pages(served, [prose(n % 300) for n in range(16384)])
    writer = subprocess.Popen(
        ["bash", "-c", f"echo > {served.directory}/zram/recompress"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "LC_ALL": "C"})
    end = time.monotonic() + 60
    while " 0 pages tried" in served.read("control").replace("0 of 0 pages", "0 pages"):
        assert time.monotonic() < end
        time.sleep(0.02)
    assert served.stop() == 0, served.log
    assert "Interrupted system call" in writer.communicate(timeout=60)[1]
    assert "was cut short by the end of the device" in served.log


# ---- beside other commands ---------------------------------------------------------------------------------

@contextlib.contextmanager
def long_recompression(served: ServedDevice, name: str = "control") -> Iterator[subprocess.Popen[str]]:
    """The program that waits for it. It has begun, and takes many seconds."""
    set_up(served, "64M", level=19)
    write_pages(served, [prose(n % 300) for n in range(16384)])
    line = "recompress" if name == "control" else ""
    writer = subprocess.Popen(
        ["bash", "-c", f"echo {line} > {served.directory}/{name}"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "LC_ALL": "C"})
    with writer:
        end = time.monotonic() + 60
        while tried(served) == 0:
            assert time.monotonic() < end and writer.poll() is None
            time.sleep(0.02)
        yield writer


def tried(served: ServedDevice) -> int:
    return int(re.search(r"(\d+) pages tried", served.read("control"))[1])


def written(served: ServedDevice, name: str, text: str) -> str:
    """The shell's complaint about a write."""
    done = subprocess.run(
        ["bash", "-c", f"echo {shlex.quote(text)} > {served.directory}/{name}"], timeout=60,
        capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return done.stderr.rpartition(": ")[2].strip()


@pytest.mark.parametrize("name", ["control", "zram/recompress"])
def test_other_writers_of_the_same_file_do_not_wait_for_it(served: ServedDevice, name: str) -> None:
    with long_recompression(served, name) as writer:
        assert written(served, "control", "mem_limit=100M") == ""
        assert written(served, "zram/mem_limit", "200M") == ""
        assert written(served, "control", "policy=recompress idle=1d") == ""
        assert written(served, name, "recompress" if name == "control" else "") == "Device or resource busy"
        assert "another recompress is under way" in served.read("control")
        assert written(served, "zram/idle", "all") == ""
        assert written(served, "control", "idle=all") == ""
        assert written(served, "zram/compact", "1") == ""
        assert writer.poll() is None
        # The mode holds for all numbers of the file.
        os.chmod(served.directory / "control", 0o640)
        assert os.stat(served.directory / "control").st_mode & 0o777 == 0o640
        assert written(served, "control" if name == "control" else "zram/reset",
                       "reset" if name == "control" else "1") == ""
        assert "Interrupted system call" in writer.communicate(timeout=60)[1]
    assert served.read("zram/disksize") == "0\n"


def test_a_file_has_one_number_while_nobody_writes(served: ServedDevice) -> None:
    control = served.directory / "control"
    first = control.stat().st_ino
    with open(control, "wb", buffering=0) as one:
        assert os.fstat(one.fileno()).st_ino == first
        second = control.stat().st_ino
        assert second != first
        with open(control, "wb", buffering=0) as two:
            assert os.fstat(two.fileno()).st_ino == second
            two.write(b"mem_limit=1M\n")
        one.write(b"mem_limit=2M\n")
        # What is open may be opened once more by way of its descriptor.
        with open(f"/proc/self/fd/{one.fileno()}", "wb", buffering=0) as again:
            again.write(b"mem_limit=3M\n")
    assert served.read("zram/mm_stat").split()[3] == str(3 << 20)
    assert control.stat().st_ino == first
    for _ in range(50):
        with open(control, "wb", buffering=0) as one, open(control, "wb", buffering=0) as two:
            two.write(b"# nothing\n")
    assert control.stat().st_ino == first


def test_a_client_that_is_killed_leaves_its_work(served: ServedDevice) -> None:
    with long_recompression(served) as writer:
        writer.kill()
        before = tried(served)
        wait_until(lambda: tried(served) > before, "it goes on")
        assert writer.poll() is None, "the kernel keeps it until its write is answered"
        assert written(served, "control", "reset") == ""
        assert writer.wait(60) == -signal.SIGKILL
