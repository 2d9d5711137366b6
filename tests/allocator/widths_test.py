# SPDX-License-Identifier: Apache-2.0
"""Sizes are computed with 64 bits. A macro of layout.h that Cython takes for a 64-bit number has to be one
for the C compiler too: a product of 32-bit factors silently loses everything from 4 GiB on."""
import os
import re
import subprocess
from pathlib import Path

import pytest

from allocator import Arena, Balloon, Migration, Pool, Reserve
from allocator.check import check
from tests.support import capabilities

SOURCES = Path(__file__).parents[2] / "allocator"
BLOCK = 2 << 20
# Pageblocks: 4 GiB less one, 4 GiB, one more, 8 GiB, 1 TiB, all that an arena can have.
COUNTS = [2047, 2048, 2049, 4096, 1 << 19, (1 << 23) - 1]


def declared() -> list[tuple[str, str, int]]:
    """(header, macro, bits) of every constant that a .pxd file declares with a width."""
    found = []
    block = re.compile(r'cdef extern from "(\w+\.h)"[^\n]*\n((?:(?:    .*)?\n)+)')
    constant = re.compile(r"^    const (?:uint(\d\d)_t|size_t) (.*)$", flags=re.MULTILINE)
    for path in sorted(SOURCES.glob("*.pxd")):
        for header, body in block.findall(path.read_text()):
            for bits, names in constant.findall(body):
                found += [(header, name.strip(), int(bits or 64)) for name in names.split(",")]
    return found


def test_constants_are_as_wide_as_cython_takes_them_for(tmp_path: Path) -> None:
    capabilities.require("cc")
    constants = declared()
    assert {"PAGEBLOCK_SIZE", "NONE32", "LOC_MASK"} <= {name for _, name, _ in constants}
    source = tmp_path / "widths.c"
    source.write_text("\n".join([
        *(f'#include "{header}"' for header in sorted({header for header, _, _ in constants})),
        *(f'_Static_assert(sizeof({name}) * 8 >= {bits}, "{name} is narrower than {bits} bits");'
          for _, name, bits in constants), "",
    ]))
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run = subprocess.run(
        ["cc", "-std=gnu11", "-D_GNU_SOURCE", "-fsyntax-only", "-I", SOURCES, source], timeout=60,
        env=environment, capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.requires("unsanitized")
@pytest.mark.parametrize("blocks", COUNTS)
def test_a_reserve_in_an_arena_of_any_size(blocks: int) -> None:
    arena = Arena(0, blocks)
    reserve = Reserve(arena, 16 << 20)
    assert (arena.stats().reserve, arena.stats().reserve_target) == (16 << 20, 16 << 20)
    reserve.close()
    with pytest.raises(ValueError, match=f"a reserve of 1 to {blocks * BLOCK} bytes expected"):
        Reserve(arena, blocks * BLOCK + 1)


@pytest.mark.requires("unsanitized")
@pytest.mark.parametrize("blocks", COUNTS)
def test_an_arena_of_any_size_at_work(blocks: int) -> None:
    arena = Arena(0, blocks)
    pool, balloon, migration = Pool(arena), Balloon(arena), Migration(arena)
    assert os.fstat(arena.fileno()).st_size > blocks * BLOCK
    pool.set_limit(blocks * 512)
    assert pool.stats().limit_pages == blocks * 512
    pool.malloc((1 << 48) - 1, b"an object")
    balloon.set_target(blocks * 512)
    balloon.adjust(100)
    assert arena.stats().resident == BLOCK - 100 * 4096
    migration.run()
    with pytest.raises(ValueError):
        arena.frame(blocks * 512)
    assert arena.stats().pageblocks_total == blocks
    assert pool.read((1 << 48) - 1) == b"an object"
    check(pool, 2)


@pytest.mark.requires("unsanitized")
@pytest.mark.parametrize("size", [(4 << 30) - 1, 4 << 30, (4 << 30) + 1, 1 << 45])
def test_a_user_region_of_any_size(size: int) -> None:
    arena = Arena(size, 1)
    arena.frame(arena.alloc())[:5] = memoryview(b"frame")
    assert os.fstat(arena.fileno()).st_size > size + BLOCK
    check(arena, 2)
