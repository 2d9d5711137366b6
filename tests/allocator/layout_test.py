# SPDX-License-Identifier: Apache-2.0
"""The layout of a pool is frozen. Whoever changes it raises LAYOUT_VERSION and then this file: a pool
that outlives its process is read by another build."""
import os
import re
import subprocess

import pytest

from allocator import Arena, Pool
from tests.support import capabilities, memory_file
from tests.support.memory_file import MemoryFile
from tests.support.paths import ROOT

LAYOUT_H = ROOT / "allocator" / "layout.h"

STRUCTS = """
superblock_t 2032
  magic 0 8, version 8 4, chain_max 12 4, user_off 16 8, user_size 24 8, pageblock_off 32 8,
  page_off 40 8, zspage_off 48 8, frames_off 56 8, nr_pageblocks 64 8, file_size 72 8,
  note_off 80 8, note 88 16, fresh 104 4, described 108 4, next_number 112 4, numbers_described 116 4,
  bytes_returned 120 8, punch_errors 128 8, refused 136 8, reserve_misses 144 8, max_pages 152 8,
  limit_pages 160 8, pages_compacted 168 8, balloon_target 176 8, migration 184 112,
  reserved 296 712, user_record 1008 1024
migrate_stats_t 112
  runs 0 8, scanned 8 8, isolated 16 8, migrated 24 8, owner_gone 32 8, unmovable 40 8, busy 48 8,
  again 56 8, refused 64 8, no_target 72 8, put_back 80 8, blocks_freed 88 8, deferred 96 8, ns 104 8
page_desc_t 16
  flags 0 2, order 2 1, owner 3 1, ref 4 4, next 8 4, prev 12 4
pageblock_desc_t 16
  nr_free 0 2, flags 2 2, skip 4 2, defer 6 2, next 8 4, ready 12 4
zspage_desc_t 64
  frames 0 32, next 32 4, prev 36 4, inuse 40 2, freeobj 42 2, magic 44 2, class_idx 46 1,
  fullness 47 1, rwlock 48 4, isolated 52 4, huge_header 56 8
"""

CONSTANTS = """
SUPERBLOCK_MAGIC 0x30736672616d7a7a, LAYOUT_VERSION 3, NR_NOTES 2, NOTE_HALF 0x500000, USER_RECORD 1024,
LOC_NONE 0xffffffffff, FRAME_SHIFT 12, FRAME_SIZE 4096, PAGEBLOCK_ORDER 9, PAGEBLOCK_FRAMES 512,
PAGEBLOCK_SIZE 2097152, NR_ORDERS 10, UNIT_FRAMES 16, NONE32 0xffffffff,
PG_FREE 1, PG_USED 2, PG_MOVABLE 4, PG_ISOLATED 8, PG_LOCKED 16,
OWNER_NONE 0, OWNER_ZSMALLOC 1, OWNER_BALLOON 2, PB_IN_USE 1, PB_ISOLATED 2, PB_HELD 4,
CHAIN_MAX 8, ZSPAGE_MAGIC 0x7a73, NR_FULLNESS 12, FULLNESS_FULL 11, FULLNESS_OFF_LIST 255,
ZS_MIN_ALLOC 32, ZS_MAX_ALLOC 4096, ZS_CLASS_DELTA 16, NR_RAW_CLASSES 255, OBJ_HEADER 8,
LOC_IDX_BITS 8, LOC_BITS 40, HDR_ALLOCATED 1, HDR_TAG_SHIFT 16, HDR_SIZE_MASK 0x3fff, TAG_BITS 48
"""


def frozen_structs() -> dict[str, list[tuple[str, int, int]]]:
    found: dict[str, list[tuple[str, int, int]]] = {}
    for line in STRUCTS.strip().splitlines():
        if not line.startswith(" "):
            name, size = line.split()
            found[name] = [("", 0, int(size))]
        else:
            for item in filter(None, (item.strip() for item in line.split(","))):
                field, off, size = item.split()
                found[name].append((field, int(off), int(size)))
    return found


def frozen_constants() -> dict[str, int]:
    return {name: int(value, 0) for name, value in (item.split() for item in CONSTANTS.split(","))}


def declared_structs() -> dict[str, list[str]]:
    """Names of the fields, as layout.h declares them."""
    text = re.sub(r"/\*.*?\*/", "", LAYOUT_H.read_text(), flags=re.DOTALL)
    return {
        name: re.findall(r"(\w+)(?:\[[\w /]+\])?;", body)
        for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", text, flags=re.DOTALL)
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the C compiler makes of layout.h: "struct field offset size" and "constant value"."""
    capabilities.require("cc")
    directory = tmp_path_factory.mktemp("layout")
    lines = []
    for struct, fields in declared_structs().items():
        lines.append(f'printf("{struct}  0 %zu\\n", sizeof({struct}));')
        lines += [
            f'printf("{struct} {field} %zu %zu\\n", '
            f'offsetof({struct}, {field}), sizeof((({struct} *)0)->{field}));'
            for field in fields
        ]
    lines += [f'printf("{name} %llu\\n", (unsigned long long){name});' for name in frozen_constants()]
    source = directory / "layout.c"
    source.write_text("\n".join(
        ["#include <stdio.h>", '#include "layout.h"', "int main(void) {", *lines, "}", ""]
    ))
    # A sanitizer that is preloaded into this process is not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run(
        ["cc", "-std=gnu11", "-I", LAYOUT_H.parent, "-o", directory / "layout", source],
        check=True, timeout=60, env=environment,
    )
    run = subprocess.run(
        [directory / "layout"], check=True, capture_output=True, text=True, timeout=60, env=environment
    )
    return run.stdout.splitlines()


def test_structs_are_frozen(compiled: list[str]) -> None:
    assert set(declared_structs()) == set(frozen_structs())
    found: dict[str, list[tuple[str, int, int]]] = {}
    for line in compiled:
        if (words := line.split(" ")) and len(words) == 4:
            found.setdefault(words[0], []).append((words[1], int(words[2]), int(words[3])))
    assert found == frozen_structs(), "the layout has changed: raise LAYOUT_VERSION first"


def test_constants_are_frozen(compiled: list[str]) -> None:
    found = dict(line.split(" ") for line in compiled if line.count(" ") == 1)
    assert {name: int(value) for name, value in found.items()} == frozen_constants()


def test_a_change_of_layout_is_noticed() -> None:
    """The parser above sees every field: the sizes of the fields that it names fill the structs."""
    for struct, ((_, _, size), *fields) in frozen_structs().items():
        assert sum(n for _, _, n in fields) == size, f"{struct} has a gap that no field names"
        assert [field for field, _, _ in fields] == declared_structs()[struct]


@pytest.mark.parametrize("user_size", [0, 1, 4096, 1 << 20, (1 << 30) + 5])
@pytest.mark.parametrize("nr_pageblocks", [1, 3, 300])
def test_arrays_follow_one_another(user_size: int, nr_pageblocks: int) -> None:
    arena = Arena(user_size, nr_pageblocks)
    sb = MemoryFile(arena.fileno()).superblock
    nr_frames = 512 * nr_pageblocks
    assert (sb.magic.to_bytes(8, "little"), sb.version) == (b"zzmarfs0", 3)
    assert sb.user_off == 4096 + 4 * (5 << 20)
    assert sb.user_size == -(-user_size // 4096) * 4096
    assert sb.pageblock_off == sb.user_off + sb.user_size
    for off, before, entries, form in (
        (sb.page_off, sb.pageblock_off, nr_pageblocks, memory_file.PAGEBLOCK),
        (sb.zspage_off, sb.page_off, nr_frames, memory_file.PAGE),
        (sb.frames_off, sb.zspage_off, nr_frames, memory_file.ZSPAGE),
    ):
        assert off >= before + entries * form.size and off % 4096 == 0
    assert sb.frames_off % (2 << 20) == 0
    assert sb.nr_pageblocks == nr_pageblocks
    assert sb.file_size == sb.frames_off + nr_pageblocks * (2 << 20) == os.fstat(arena.fileno()).st_size


def test_objects_lie_where_the_drawing_says() -> None:
    """A pool's content is found again from its memory file and the tags alone."""
    arena = Arena(0, 8)
    pool = Pool(arena)
    stored = {tag: bytes([tag]) * size for tag, size in enumerate(range(1, 4097, 97), 1)}
    for tag, data in stored.items():
        pool.malloc(tag, data)
    file = MemoryFile(arena.fileno())
    assert file.superblock.chain_max == 8
    for tag, data in stored.items():
        number, index = pool.location(tag)
        header, found = file.object(number << 8 | index)
        assert header == (tag, len(data), True) and found == data
        zspage = file.zspage(number)
        assert zspage.magic == 0x7A73 and index < 256
        pages = {c.index: c.pages_per_zspage for c in pool.classes()}[zspage.class_idx]
        for frame in zspage.frames[:pages]:
            page = file.page(frame)
            assert page.owner == 1 and page.ref == number and page.flags & 2


def test_a_free_object_names_the_next_one() -> None:
    arena = Arena(0, 8)
    pool = Pool(arena)
    for tag in range(7):
        pool.malloc(tag, bytes(500))
    for tag in (2, 5, 3):
        pool.free(tag)
    number, _ = pool.location(0)
    file = MemoryFile(arena.fileno())
    chain, index = [], file.zspage(number).freeobj
    while index < 8:
        chain.append(index)
        header, _ = file.object(number << 8 | index)
        assert not header.allocated and header.tag == 0
        index = header.size
    assert chain == [3, 5, 2, 7]
