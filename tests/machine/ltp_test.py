# SPDX-License-Identifier: Apache-2.0
"""The steps of the zram tests of LTP and of the kernel's selftests, with their sizes, on a device of ours.

Where they stop at a printed FAIL or compare nothing, this is stricter. Reading zram-control's hot_add and
writing to its hot_remove have no twin: `zramfs create` without a size and `zramfs stop` stand in for them,
/sys/block/zramN is the directory zram/ of the device, and /dev/zramN a loop device on disk where a block
device is needed. tests/machine/scripts_test.py runs the same scripts on both.
"""
from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.governed import sync_file_system
from tests.support.whole import (
    GIB,
    MIB,
    PAGE,
    Device,
    device,
    fill_with_zeros,
    loop,
    mounted,
    opened,
    run,
    wait_until,
)

pytestmark = [pytest.mark.requires("fuse")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with device(tmp_path_factory.mktemp("ltp") / "z", None) as z:
        yield z


@pytest.fixture
def z(shared: Device) -> Device:
    """A device that is not set up, as hot_add leaves it."""
    shared.write("zram/reset", "1")
    assert shared.read("zram/initstate") == "0\n"
    return shared


def fill_and_ratio(z: Device, point: Path) -> int:
    """Fills with zeros; LTP's and the selftest's figure: 100 times the bytes written per byte of memory."""
    blocks = fill_with_zeros(point / "file")
    assert blocks > 0
    sync_file_system(point)
    wait_until(lambda: z.mm_stat()["mem_used_total"] > 0, "mem_used_total above 0")
    return 100 * 1024 * blocks // z.mm_stat()["mem_used_total"]


@pytest.mark.requires("loop")
@pytest.mark.parametrize(
    ("fs", "size"),
    [
        pytest.param("ext4", 26214400, marks=pytest.mark.requires("ext4")),
        pytest.param("xfs", 314572800, marks=pytest.mark.requires("xfs")),
        pytest.param("btrfs", 402653184, marks=pytest.mark.requires("btrfs")),
    ],
)
def test_ltp_zram01_fills_a_file_system(z: Device, fs: str, size: int, tmp_path: Path) -> None:
    write_every_algorithm(z)
    z.write("zram/disksize", str(size))
    z.write("zram/mem_limit", f"{size // MIB}M")
    assert z.read("zram/disksize") == f"{size}\n"
    assert z.mm_stat()["mem_limit"] == size
    with loop(z.disk) as block:
        run(f"mkfs.{fs}", block)
        with mounted(block, tmp_path / "mnt", "-t", fs) as point:
            assert fill_and_ratio(z, point) >= 100
    assert z.io_stat()["failed_writes"] == 0


@pytest.mark.requires("loop", "ext4")
def test_kernel_selftest_zram01(z: Device, tmp_path: Path) -> None:
    """Ours has no lzo, the algorithm that it writes; lz4 stands in."""
    assert "[lz4]" in z.read("zram/comp_algorithm")
    z.write("zram/comp_algorithm", "lz4")
    z.write("zram/disksize", "2097152")
    z.write("zram/mem_limit", "2M")
    with loop(z.disk) as block:
        run("mkfs.ext4", block)
        with mounted(block, tmp_path / "mnt") as point:
            assert fill_and_ratio(z, point) >= 100


def write_every_algorithm(z: Device) -> None:
    """LTP's zram_compress_alg: each name that comp_algorithm offers can be chosen."""
    names = re.sub(r"[\[\]]", "", z.read("zram/comp_algorithm")).split()
    assert names
    for name in names:
        z.write("zram/comp_algorithm", name)
        assert f"[{name}]" in z.read("zram/comp_algorithm")


def test_ltp_zram03_shared_mapping_of_512_mib(z: Device) -> None:
    size = 536870912
    z.write("zram/disksize", str(size))

    with opened(z.disk) as fd, mmap.mmap(fd, size, mmap.MAP_SHARED) as area:
        for offset in range(0, size, MIB):
            area[offset:offset + MIB] = b"a" * MIB
        area[size - 1] = 0
    dump(z)

    with opened(z.disk, os.O_RDONLY) as fd, mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ) as area:
        assert area.find(b"\0") == size - 1
        assert not area[:size - 1].strip(b"a")
    # All pages hold one repeated byte, the last excepted.
    assert z.mm_stat()["orig_data_size"] == size
    assert z.mm_stat()["same_pages"] == size // PAGE - 1

    z.write("zram/reset", "1")
    dump(z)
    assert z.read("zram/initstate") == "0\n"
    assert z.mm_stat()["mem_used_total"] == 0


def dump(z: Device) -> None:
    """What zram03 reads, in the formats that it parses."""
    assert z.read("zram/initstate") in ("0\n", "1\n")
    assert z.read("zram/disksize").strip().isdigit()
    assert len(z.mm_stat()) == 9
    assert len([int(word) for word in z.read("zram/stat").split()]) == 17


@pytest.mark.requires("loop", "swap")
def test_ltp_zram02_swap_on_100_gib_with_a_limit_of_1_mib(z: Device) -> None:
    write_every_algorithm(z)
    z.write("zram/disksize", "107374182400")
    z.write("zram/mem_limit", "1M")
    assert z.read("zram/disksize") == f"{100 * GIB}\n"
    with loop(z.disk) as block:
        run("mkswap", block)
        run("swapon", block)
        run("swapoff", block)
    assert z.mm_stat()["mem_used_total"] <= MIB
    assert z.io_stat()["failed_writes"] == 0


@pytest.mark.requires("loop", "swap")
def test_kernel_selftest_zram02_swap_on_1_mib(z: Device) -> None:
    z.write("zram/disksize", "1048576")
    z.write("zram/mem_limit", "1M")
    with loop(z.disk) as block:
        run("mkswap", block)
        run("swapon", block)
        run("swapoff", block)
