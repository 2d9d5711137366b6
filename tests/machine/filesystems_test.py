# SPDX-License-Identifier: Apache-2.0
"""File systems and swap on a loop device on zramfs: real files in, everything back out."""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import capabilities, leftovers
from tests.support.governed import sync_file_system
from tests.support.scale import scaled
from tests.support.whole import (
    GIB,
    KIB,
    MIB,
    copy_real_files,
    device,
    loop,
    manifest,
    mounted,
    run,
    tool_environment,
    wait_until,
)
from zramfs.host import swaps

pytestmark = [pytest.mark.requires("fuse", "loop"), pytest.mark.timeout(300)]

FSCK = {
    "ext4": ("e2fsck", "-f", "-n"),
    "xfs": ("xfs_repair", "-n"),
    "btrfs": ("btrfs", "check", "--readonly"),
}
FILES = scaled(96, 48) * MIB
MKFS = {"ext4": ("-q", "-F"), "xfs": ("-q", "-f"), "btrfs": ("-q", "-f")}


@pytest.mark.parametrize("name", [pytest.param(fs, marks=pytest.mark.requires(fs)) for fs in FSCK])
def test_file_system_survives_copy_fsck_trim_and_remount(name: str, tmp_path: Path) -> None:
    point = tmp_path / "mnt"
    with device(tmp_path / "z", GIB) as z, loop(z.disk, "--sector-size=4096") as block:
        run(f"mkfs.{name}", *MKFS[name], block)
        with mounted(block, point):
            expected = copy_real_files(point, FILES)
        run(*FSCK[name], block, timeout=120)

        with mounted(block, point):
            assert manifest(point) == expected
            full = z.mm_stat()
            assert full["orig_data_size"] >= 0.93 * FILES
            assert full["mem_used_total"] < full["orig_data_size"]

            # Every second file, so that what stays is scattered over the whole device.
            for path in list(expected)[::2]:
                (point / path).unlink()
                del expected[path]
            sync_file_system(point)
            run("fstrim", point)
            z.write("zram/compact", "1")
            halved = z.mm_stat()
            assert halved["orig_data_size"] < 0.75 * full["orig_data_size"]
            assert halved["mem_used_total"] < 0.75 * full["mem_used_total"]
        run(*FSCK[name], block, timeout=120)

        with mounted(block, point):
            assert manifest(point) == expected


@pytest.mark.requires("ext4")
def test_discarding_mount_frees_memory_without_fstrim(tmp_path: Path) -> None:
    with device(tmp_path / "z", 256 * MIB) as z, loop(z.disk) as block:
        run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", block)
        with mounted(block, tmp_path / "mnt", "-o", "discard") as point:
            (point / "random").write_bytes(os.urandom(64 * MIB))
            sync_file_system(point)
            before = z.mm_stat()["mem_used_total"]
            assert before > 64 * MIB
            (point / "random").unlink()
            sync_file_system(point)
            wait_until(lambda: z.mm_stat()["mem_used_total"] < 16 * MIB, "the discards have arrived")


# ---- swap ------------------------------------------------------------------------------------------
# Runs in a memory cgroup that holds less than a quarter of it. Each page has its number and 2 KiB
# that do not compress; it is read back twice, the second time in another order.
_SWAPPER = """
import mmap, random, sys
pages = int(sys.argv[1])
def content(i):
    return (i.to_bytes(8, "little") + random.Random(i).randbytes(2040)).ljust(4096, b"z")
area = mmap.mmap(-1, pages * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for i in range(pages):
    area[i * 4096:(i + 1) * 4096] = content(i)
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSwap")], flush=True)
for order in (range(pages), range(pages - 1, -1, -7)):
    for i in order:
        if area[i * 4096:(i + 1) * 4096] != content(i):
            sys.exit(f"page {i} came back different")
"""


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A memory cgroup with a limit of 64 MiB; the daemon stays outside."""
    parent, limit = capabilities.memcg_parent()
    group = parent / leftovers.owner_name()
    group.mkdir()
    try:
        (group / limit).write_text(str(64 * MIB))
        yield group
    finally:
        def gone() -> bool:
            with contextlib.suppress(OSError):
                group.rmdir()
            return not group.exists()

        wait_until(gone, f"{group} is empty")


@pytest.mark.requires("swap", "memcg")
def test_swap_brings_every_page_back(tmp_path: Path, memory_group: Path) -> None:
    with device(tmp_path / "z", 256 * MIB) as z, loop(z.disk) as block:
        run("mkswap", block)
        # Below every other swap area: the group has no other one to go to that is as fast to fill up.
        run("swapon", "--discard", "--priority", "32000", block)
        try:
            # Once more where the kernel kills it for lack of memory: see Filler in support/swap_load.py.
            for _ in range(3):
                # A shell, so that the group is entered before there is anything to swap.
                child = subprocess.Popen(
                    ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', memory_group,
                     sys.executable, "-c", _SWAPPER, str(160 * MIB // 4096)],
                    stdout=subprocess.PIPE, text=True, env=tool_environment(),
                )
                try:
                    output, _ = child.communicate(timeout=150)
                finally:
                    child.kill()
                    child.wait()
                if child.returncode != -signal.SIGKILL:
                    break
            assert child.returncode == 0
            assert int(output) * KIB > 64 * MIB, "the kernel swapped too little out for this to be a test"
            if above := [area for area in swaps.swap_areas() if area.priority > 32000]:
                pytest.skip(f"another program's swap takes the pages: {above[0].path}")
            # The peak: what the child has freed at its end was discarded since.
            assert z.mm_stat()["mem_used_max"] > 32 * MIB
            assert z.io_stat()["failed_writes"] == z.io_stat()["failed_reads"] == 0
        finally:
            run("swapoff", block)
