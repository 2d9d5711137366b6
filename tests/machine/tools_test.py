# SPDX-License-Identifier: Apache-2.0
"""The tools that people point at a disk, on `disk` and on a loop device on it."""
from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.whole import KIB, MIB, PAGE, Device, device, loop, opened, run

pytestmark = [pytest.mark.requires("fuse")]

SIZE = 64 * MIB


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with device(tmp_path_factory.mktemp("tools") / "z", SIZE) as z:
        yield z


@pytest.fixture
def z(shared: Device) -> Device:
    """A device of 64 MiB that holds nothing."""
    shared.write("zram/reset", "1")
    shared.write("zram/disksize", str(SIZE))
    assert shared.mm_stat()["orig_data_size"] == 0
    return shared


def half_random(pages: int) -> bytes:
    return b"".join(os.urandom(PAGE // 2) + bytes(PAGE // 2) for _ in range(pages))


def write(path: Path | str, data: bytes, offset: int = 0) -> None:
    with opened(path) as fd:
        while data:
            done = os.pwrite(fd, data, offset)
            data, offset = data[done:], offset + done
        os.fsync(fd)


def read(path: Path | str, size: int, offset: int = 0) -> bytes:
    parts = []
    with opened(path, os.O_RDONLY) as fd:
        while size and (part := os.pread(fd, size, offset)):
            parts.append(part)
            size, offset = size - len(part), offset + len(part)
    return b"".join(parts)


# ---- loop, discard, holes ----------------------------------------------------------------------------
@pytest.mark.requires("loop")
def test_loop_device_with_direct_io_shows_the_same_bytes(z: Device) -> None:
    data = half_random(512)
    with loop(z.disk) as block:
        assert Path(f"/sys/block/{Path(block).name}/loop/dio").read_text() == "1\n"
        assert int(Path(f"/sys/block/{Path(block).name}/size").read_text()) * 512 == SIZE
        write(block, data, 3 * MIB)
        assert read(z.disk, len(data), 3 * MIB) == data
        write(z.disk, data, 9 * MIB)
    with loop(z.disk) as block:
        assert read(block, len(data), 9 * MIB) == data


@pytest.mark.requires("loop", "blkdiscard")
@pytest.mark.parametrize("zero", [False, True], ids=["discard", "zeroout"])
def test_blkdiscard_frees_the_range_and_nothing_else(z: Device, zero: bool) -> None:
    pages = 1024
    data = half_random(pages)
    write(z.disk, data)
    mode = ("--zeroout",) if zero else ()
    with loop(z.disk, "--sector-size=4096") as block:
        full = z.mm_stat()
        assert full["orig_data_size"] == pages * PAGE
        run("blkdiscard", *mode, "--offset", MIB, "--length", 2 * MIB, block)
        some = z.mm_stat()
        assert some["orig_data_size"] == (pages - 512) * PAGE
        assert some["mem_used_total"] < full["mem_used_total"]
        assert read(block, pages * PAGE) == data[:MIB] + bytes(2 * MIB) + data[3 * MIB:]

        run("blkdiscard", "--force", *mode, block)
        assert z.mm_stat()["orig_data_size"] == z.mm_stat()["mem_used_total"] == 0
        assert read(block, pages * PAGE) == bytes(pages * PAGE)
        # The lower bound: one notification a page, also of pages that were empty already.
        assert z.io_stat()["notify_free"] >= pages


@pytest.mark.parametrize("option", ["--punch-hole", "--zero-range"])
def test_fallocate_zeroes_exactly_the_bytes_it_was_given(z: Device, option: str) -> None:
    data = half_random(64)
    write(z.disk, data)
    start, length = 3 * PAGE + 100, 20 * PAGE + 1000
    run("fallocate", option, "--keep-size", "--offset", start, "--length", length, z.disk)
    assert read(z.disk, len(data)) == data[:start] + bytes(length) + data[start + length:]
    # Pages 4 to 22 lie wholly inside; of 3 and 23 only a part is zeroed.
    assert z.mm_stat()["orig_data_size"] == (64 - 19) * PAGE
    assert z.disk.stat().st_size == SIZE


def test_fallocate_without_a_mode_is_refused(z: Device) -> None:
    done = run("fallocate", "--length", MIB, z.disk, check=False)
    assert done.returncode != 0
    assert os.strerror(errno.EOPNOTSUPP) in done.stderr


# ---- copies that know of holes -----------------------------------------------------------------------
def test_cp_sparse_finds_the_holes(z: Device, tmp_path: Path) -> None:
    data = half_random(256)
    write(z.disk, data, 5 * MIB)
    for mode in ("auto", "always"):
        copy = tmp_path / mode
        run("cp", f"--sparse={mode}", z.disk, copy)
        run("cmp", z.disk, copy)
        assert copy.stat().st_size == SIZE
        # st_blocks counts 512 bytes; a file system may add a few blocks for its extents.
        assert len(data) <= copy.stat().st_blocks * 512 <= len(data) + 128 * KIB


def test_dd_conv_sparse_stores_only_data(z: Device, tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = half_random(256)
    with opened(source, os.O_RDWR | os.O_CREAT) as fd:
        os.truncate(fd, SIZE)
        os.pwrite(fd, data, 17 * MIB)
    run("dd", f"if={source}", f"of={z.disk}", "bs=64K", "conv=sparse,notrunc,fsync")
    run("cmp", source, z.disk)
    stat = z.mm_stat()
    assert stat["orig_data_size"] == len(data)
    assert stat["same_pages"] == 0


@pytest.mark.requires("qemu-img", "qemu-io")
def test_qemu_img_converts_onto_it_and_back(z: Device, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    raw = tmp_path / "raw"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, SIZE)
    run("qemu-io", "-f", "qcow2", image, "-c", "write -P 0x5a 1M 3M", "-c", "write -P 0x77 40000000 65536")
    run("qemu-img", "convert", "-n", "-O", "raw", image, z.disk)
    compare = ("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image)
    run(*compare, z.disk)
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", z.disk, raw)
    run(*compare, raw)
    assert raw.stat().st_blocks * 512 < 8 * MIB, "the holes of the device became data"

    before = z.mm_stat()["orig_data_size"]
    run("qemu-io", "-f", "raw", "-d", "unmap", z.disk, "-c", "discard 1M 1M", "-c", "read -P 0 1M 1M",
        "-c", "read -P 0x5a 2M 2M")
    assert z.mm_stat()["orig_data_size"] == before - MIB
