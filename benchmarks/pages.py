# SPDX-License-Identifier: Apache-2.0
"""The two kinds of data every peer stores, as image files in the cache directory.

half   fio's own data at buffer_compress_percentage=50: in every 512 bytes half is random, so no two
       pages are the same and none is filled with one word
real   an ext4 file system made by mkfs.ext4 -d from a random sample of the files of /usr
"""
from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

from benchmarks.tools import BenchmarkError, LeftOutError, cache_dir, command, need

DATA = ("half", "real")
SAMPLED = Path("/usr")
SEED = 20
BLOCK = 4096
INODE = 256
# The rest: group tables, extents of large files, directories of several blocks. An image of 8 MiB to
# 1 GiB then has 2 to 4 % same-filled pages.
FILLED = 0.985


def image(data: str, size: int) -> Path:
    """The image of `size` bytes (a multiple of 1 MiB) with data "half" or "real"; made if missing."""
    target = cache_dir() / f"{data}-{size >> 20}M.img"
    if target.exists() and target.stat().st_size == size:
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="making-") as scratch:
        fresh = Path(scratch) / "image"
        if data == "half":
            _fio_data(fresh, size)
        else:
            _file_system(fresh, Path(scratch) / "tree", size)
        fresh.rename(target)
    return target


def _fio_data(target: Path, size: int) -> None:
    command([need("fio", "fio"), "--name=image", f"--filename={target}", f"--size={size}", "--rw=write",
             "--bs=1M", "--ioengine=psync", "--refill_buffers", "--buffer_compress_percentage=50",
             "--fallocate=none"])


def _file_system(target: Path, tree: Path, size: int) -> None:
    try:
        mkfs = need("mkfs.ext4", "e2fsprogs")
    except LeftOutError as missing:
        raise BenchmarkError(f"real pages cannot be made: {missing}") from None
    inodes = _copy_sample(tree, int(size * FILLED))
    # Without a journal and spare inodes, which would be tens of MiB of zeros.
    command([mkfs, "-q", "-F", "-b", str(BLOCK), "-m", "0", "-N", str(inodes + 64),
             "-O", "^has_journal,^resize_inode", "-d", tree, target, f"{size >> 10}k"])


def _copy_sample(tree: Path, budget: int) -> int:
    """Copy random files of /usr until they would fill `budget` bytes of blocks and inodes.

    Returns the number of inodes that takes."""
    names = sorted(os.path.join(folder, name) for folder, _, here in os.walk(SAMPLED) for name in here)
    random.Random(SEED).shuffle(names)
    spent = files = 0
    folders = {SAMPLED}
    for name in names:
        source = Path(name)
        if source.is_symlink() or not source.is_file():
            continue
        length = source.stat().st_size
        new = [parent for parent in source.parents if parent not in folders and SAMPLED in parent.parents]
        cost = -(-length // BLOCK) * BLOCK + INODE + len(new) * (BLOCK + INODE)
        # One file must not decide what the data is like.
        if not length or cost > budget // 16 or spent + cost > budget:
            continue
        folders.update(new)
        spent += cost
        files += 1
        copy = tree / source.relative_to(SAMPLED)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, copy)
        except OSError as error:
            raise BenchmarkError(f"cannot copy {source} into the sample: {error.strerror}") from None
        if spent > budget * 0.98:
            break
    if spent < budget * 0.95:
        raise BenchmarkError(f"{SAMPLED} has only {spent >> 20} MiB of files to sample; "
                             f"choose --size {max(1, spent >> 20)}M or less")
    return files + len(folders)
