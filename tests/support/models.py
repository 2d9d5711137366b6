# SPDX-License-Identifier: Apache-2.0
"""Plain models of the arena, the pool and the device: what they hold and count, worked out from the
rules in words. They share no code with the compiled core."""
from __future__ import annotations

import bisect
import ctypes
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PAGE = 4096
PAGEBLOCK_FRAMES = 512
ORDERS = range(10)
OBJ_HEADER = 8
HUGE = 3625  # bytes: compressed pages of this size and more are kept raw


class SizeClass(NamedTuple):
    index: int
    size: int  # bytes of an object with its header
    pages: int  # per zspage
    objs: int  # per zspage


# Of the kernel with CONFIG_ZSMALLOC_CHAIN_SIZE=8, merged classes left out: index:size/pages/objs.
_TABLE = """
0:32/1/128 1:48/3/256 2:64/1/64 3:80/5/256 4:96/3/128 5:112/7/256 6:128/1/32 7:144/7/199 8:160/5/128
9:176/4/93 10:192/3/64 11:208/3/59 12:224/7/128 13:240/1/17 14:256/1/16 15:272/1/15 16:288/5/71
17:304/7/94 18:320/5/64 19:336/6/73 20:352/8/93 21:368/8/89 22:384/3/32 23:400/5/51 24:416/6/59
25:432/7/66 26:448/7/64 27:464/5/44 28:480/2/17 29:496/4/33 30:512/1/8 31:528/4/31 32:544/2/15
33:560/7/51 34:576/1/7 35:592/8/55 36:608/7/47 37:624/2/13 38:640/5/32 39:656/5/31 40:672/1/6
41:688/8/47 42:704/5/29 43:720/3/17 44:736/2/11 45:752/7/38 46:768/3/16 47:784/5/26 49:816/1/5
50:832/8/39 51:848/5/24 52:864/7/33 53:880/8/37 54:896/7/32 55:912/7/31 56:928/5/22 57:944/3/13
58:960/4/17 59:976/6/25 60:992/8/33 62:1024/1/4 64:1056/8/31 65:1072/5/19 66:1088/4/15 67:1104/3/11
68:1120/8/29 69:1136/5/18 71:1168/2/7 72:1184/7/24 73:1200/5/17 74:1216/3/10 75:1232/7/23
76:1248/4/13 78:1280/5/16 79:1296/7/22 83:1360/1/3 87:1424/8/23 88:1440/6/17 89:1456/5/14
91:1488/4/11 92:1504/7/19 94:1536/3/8 95:1552/8/21 96:1568/5/13 97:1584/7/18 100:1632/2/5
103:1680/7/17 104:1696/5/12 105:1712/8/19 107:1744/3/7 110:1792/7/16 111:1808/4/9 114:1856/5/11
116:1888/6/13 117:1904/7/15 118:1920/8/17 126:2048/1/2 134:2176/8/15 135:2192/7/13 137:2224/6/11
140:2272/5/9 144:2336/4/7 147:2384/7/12 151:2448/3/5 155:2512/8/13 158:2560/5/8 160:2592/7/11
168:2720/2/3 177:2864/7/10 180:2912/5/7 184:2976/8/11 190:3072/3/4 197:3184/7/9 202:3264/4/5
211:3408/5/6 217:3504/6/7 222:3584/7/8 225:3632/8/9 254:4096/1/1
"""
CHAIN_8 = [SizeClass(*map(int, item.replace(":", "/").split("/"))) for item in _TABLE.split()]
_SIZES = [c.size for c in CHAIN_8]


def size_class(nbytes: int) -> SizeClass:
    """The class of an object of 1 to 4096 bytes."""
    return CHAIN_8[bisect.bisect_left(_SIZES, min(nbytes + OBJ_HEADER, PAGE))]


def fewest_pages(sizes: Iterable[int]) -> int:
    """Pool pages of objects of these sizes when every class has as few zspages as it can."""
    counts = Counter(size_class(n) for n in sizes)
    return sum(-(-count // c.objs) * c.pages for c, count in counts.items())


# ---- arena ------------------------------------------------------------------------------------

def free_blocks(used: int, order: int) -> Iterator[int]:
    """Orders of the free blocks among 2^order frames; bit n of used says that frame n is in use. They
    are unique: a block is as large as its alignment and its neighbours in use allow."""
    half = 1 << order >> 1
    if not used:
        yield order
    elif order:
        yield from free_blocks(used & (1 << half) - 1, order - 1)
        yield from free_blocks(used >> half, order - 1)


class Arena:
    """Frames in use. A pageblock is taken when no free block is large enough, and given back when
    none of its frames is in use."""

    def __init__(self, nr_pageblocks: int) -> None:
        self.nr_pageblocks = nr_pageblocks
        self.blocks: dict[int, int] = {}  # first frame: order
        self.used: dict[int, int] = {}  # pageblock in use: bits of its frames in use
        self.ever_used = 0  # pageblocks that were in use at one time

    def _bits(self, first: int, order: int) -> tuple[int, int]:
        block, start = divmod(first, PAGEBLOCK_FRAMES)
        return block, (1 << (1 << order)) - 1 << start

    def is_used(self, first: int, order: int) -> bool:
        """All frames of a block are."""
        block, bits = self._bits(first, order)
        return first >= 0 and self.used.get(block, 0) & bits == bits

    def frames_used(self) -> int:
        return sum(1 << order for order in self.blocks.values())

    def buddyinfo(self) -> tuple[int, ...]:
        count = Counter(order for used in self.used.values() for order in free_blocks(used, ORDERS[-1]))
        count[ORDERS[-1]] += self.ever_used - len(self.used)
        return tuple(count[order] for order in ORDERS)

    def has_room(self, order: int) -> bool:
        return len(self.used) < self.nr_pageblocks or any(self.buddyinfo()[order:ORDERS[-1]])

    def alloc(self, first: int, order: int) -> None:
        block, bits = self._bits(first, order)
        assert first % (1 << order) == 0 and 0 <= block < self.nr_pageblocks
        assert not self.used.get(block, 0) & bits, f"frame {first}, order {order}, was in use"
        self.blocks[first] = order
        self.used[block] = self.used.get(block, 0) | bits
        self.ever_used = max(self.ever_used, len(self.used))

    def free(self, first: int) -> None:
        block, bits = self._bits(first, self.blocks.pop(first))
        self.used[block] &= ~bits
        if not self.used[block]:
            del self.used[block]


# ---- device -----------------------------------------------------------------------------------

@functools.cache
def _liblz4() -> ctypes.CDLL:
    lib = ctypes.CDLL("liblz4.so.1")
    lib.LZ4_compress_default.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
    return lib


@functools.lru_cache(maxsize=1 << 14)
def lz4_size(page: bytes) -> int:
    """Of the library's own one-shot call, as in the kernel. (The lz4 package goes through the
    streaming interface, whose hash table is another: its results differ by some bytes.)"""
    out = ctypes.create_string_buffer(2 * PAGE)
    size = _liblz4().LZ4_compress_default(page, out, len(page), len(out))
    assert size > 0
    return size


class Page(NamedTuple):
    """How a page is kept."""

    same: bool
    huge: bool
    compressed: int  # bytes that count as compressed data
    object: int  # bytes of its object, 0 = it has none


def kept(page: bytes) -> Page:
    assert len(page) == PAGE
    if page == page[:8] * (PAGE // 8):
        word = int.from_bytes(page[:8], "little")
        in_slot = word < 1 << 40 or word >> 32 == word & 0xFFFFFFFF
        return Page(True, False, 0, 0 if in_slot else 8)
    size = lz4_size(page)
    if size >= HUGE:
        return Page(False, True, PAGE, PAGE)
    return Page(False, False, size, size)


class Device:
    """A device of lz4 pages as a bytearray and the set of its pages that are stored."""

    def __init__(self, disksize: int) -> None:
        self.size = -(-disksize // PAGE) * PAGE
        self.data = bytearray(self.size)
        self.stored: set[int] = set()
        self.huge_pages_since = 0
        self.notify_free = 0

    def page(self, index: int) -> bytes:
        return bytes(self.data[index * PAGE:(index + 1) * PAGE])

    def write(self, off: int, data: bytes) -> None:
        if not data:
            return
        self.data[off:off + len(data)] = data
        for index in range(off // PAGE, (off + len(data) - 1) // PAGE + 1):
            self.stored.add(index)
            self.huge_pages_since += kept(self.page(index)).huge

    def zero(self, off: int, n: int) -> None:
        self.data[off:off + n] = bytes(n)
        for index in range(off // PAGE, -(-(off + n) // PAGE)):
            if off <= index * PAGE and (index + 1) * PAGE <= off + n:
                self.notify_free += 1
                self.stored.discard(index)
            elif n and index in self.stored:
                self.huge_pages_since += kept(self.page(index)).huge

    def resize(self, size: int) -> None:
        """To a multiple of 4096. What lies behind a smaller size is gone."""
        self.data = self.data[:size] + bytes(max(0, size - self.size))
        self.size = size
        self.stored = {index for index in self.stored if index < size // PAGE}

    def seek(self, off: int, hole: bool) -> int | None:
        """None where the call fails with ENXIO."""
        if off >= self.size:
            return None
        for index in range(off // PAGE, self.size // PAGE):
            if (index in self.stored) != hole:
                return max(off, index * PAGE)
        return self.size if hole else None

    def objects(self) -> list[int]:
        """Sizes of the objects that the stored pages need."""
        return [size for index in self.stored if (size := kept(self.page(index)).object)]

    def stats(self) -> dict[str, int]:
        """Those that follow from the content and the calls alone."""
        pages = [kept(self.page(index)) for index in self.stored]
        return {
            "orig_data_size": len(pages) * PAGE,
            "compr_data_size": sum(page.compressed for page in pages),
            "same_pages": sum(page.same for page in pages),
            "huge_pages": sum(page.huge for page in pages),
            "huge_pages_since": self.huge_pages_since,
            "notify_free": self.notify_free,
        }
