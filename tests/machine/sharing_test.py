# SPDX-License-Identifier: Apache-2.0
"""Two copies of a tree of real files, on ext4 on a loop device on zramfs, share their pages."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.whole import (
    MIB,
    Device,
    copy_real_files,
    device,
    drop_caches,
    loop,
    manifest,
    mounted,
    run,
)

pytestmark = [pytest.mark.requires("fuse", "loop", "ext4"), pytest.mark.timeout(300)]


def settled(z: Device, point: Path, *commands: str) -> dict[str, int]:
    """What the device holds when all is written, and these commands are done."""
    run("sync", "-f", point)
    for each in (*commands, "compact"):
        z.write("control", each)
    return z.mm_stat()


def test_two_copies_of_a_tree_cost_at_most_a_tenth_more_than_one(tmp_path: Path) -> None:
    with device(tmp_path / "z", 256 * MIB) as z, loop(z.disk, "--sector-size=4096") as block:
        run("mkfs.ext4", "-q", "-F", block)
        with mounted(block, tmp_path / "mnt") as point:
            expected = copy_real_files(point / "one", 40 * MIB)
            one = settled(z, point)
            shutil.copytree(point / "one", point / "two", symlinks=True)
            two = settled(z, point)
            assert two["mem_used_total"] > 1.8 * one["mem_used_total"]
            shared = settled(z, point, "share idle=all")
            assert shared["orig_data_size"] >= two["orig_data_size"]
            ratio = shared["mem_used_total"] / one["mem_used_total"]
            assert ratio <= 1.1, f"two copies take {ratio:.3f} times the memory of one"
            drop_caches(point)
            assert manifest(point / "one") == manifest(point / "two") == expected
            # One of them goes, and the other one keeps its files.
            shutil.rmtree(point / "one")
            run("fstrim", point)
            assert manifest(point / "two") == expected
        run("e2fsck", "-f", "-n", block, timeout=120)
        with mounted(block, tmp_path / "mnt") as point:
            drop_caches(point)
            assert manifest(point / "two") == expected
            last = settled(z, point, "share idle=all")
            assert last["mem_used_total"] <= 1.1 * one["mem_used_total"]
