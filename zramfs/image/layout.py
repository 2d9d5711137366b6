# SPDX-License-Identifier: Apache-2.0
"""The format of an image. All numbers are little endian, and everything begins at a multiple of 4096 bytes.

    +--------+------------+-----+--------+--------+-- ... --+--------+------------+-----+---------+
    | header | algorithms | map | part 0 | part 1 |         | header | algorithms | map | trailer |
    +--------+------------+-----+--------+--------+-- ... --+--------+------------+-----+---------+
      head                                                    the same once more

    header      see Header. It has the sums of the algorithms and of the map.
    algorithms  four entries, by priority (name, level, length of the dictionary), and then the dictionaries
    map         for each chunk of 512 pages that has any: its number (8 bytes), and a bit for each page
    part        a header, a directory with 8 bytes for each page (zramfs/store/image_entry.pxd), and their
                bytes: the compressed object, the whole page, or the word that fills it
    trailer     where the second head begins, and how many parts there are

A part has a sum of its own. One that is damaged costs its pages: the map says which they are. Parts are
found by their magic and the number that the image drew by lot, so one without its header does not cost the
next. Of a file that was cut off the first head is left, of one whose beginning is damaged the second.

All sums are CRC-32 (zlib's), begun with the image's number, so that a part of another image is not taken for
one of this.
"""
from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from zramfs.model.config import ALGORITHMS
from zramfs.text.sizes import PAGE

VERSION = 1
HEAD_MAGIC, PART_MAGIC, TRAILER_MAGIC = b"zramfsIM", b"zramfsPT", b"zramfsTR"
PRIORITIES = 4
MAX_DISKSIZE = 1 << 48
MAX_DICTIONARY = 1 << 20
MAP_CHUNK = 8 + 64  # bytes
MAX_ENTRIES = 16384  # of a part
MAX_DATA = (1 << 20) + PAGE  # bytes of a part behind its directory

# magic, version, page, id, disksize, pages, seconds since 1970, lengths and sums of algorithms and map,
# version of zramfs; the sum of the block stands in its last 4 bytes.
_HEADER = struct.Struct("<8sII16sQQQIIQI32s")
_ALGORITHM = struct.Struct("<16siI")
# Magic, id, number, pages, bytes of data, sum of directory and data, sum of the header.
_PART = struct.Struct("<8s16sIIIII")
_TRAILER = struct.Struct("<8s16sQQ")
_SUM = struct.Struct("<I")
PART_HEADER = _PART.size


def padded(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


@dataclass(frozen=True)
class SavedAlgorithm:
    name: str
    level: int
    dictionary: bytes | None = None


@dataclass(frozen=True)
class Head:
    """id: 16 bytes, drawn by lot. algorithms: by priority, None where there is none. chunks: the map. pages:
    how many bits it has."""

    id: bytes
    disksize: int
    pages: int
    created: int
    algorithms: tuple[SavedAlgorithm | None, ...]
    chunks: bytes
    writer: str = ""

    def pack(self) -> bytes:
        algorithms = pack_algorithms(self.algorithms)
        header = _HEADER.pack(
            HEAD_MAGIC, VERSION, PAGE, self.id, self.disksize, self.pages, self.created, len(algorithms),
            checksum(self.id, algorithms), len(self.chunks), checksum(self.id, self.chunks),
            self.writer.encode()[:32])
        return b"".join((with_sum(header, self.id), _pad(algorithms), _pad(self.chunks)))


@dataclass(frozen=True)
class Header:
    """What the first block of a head says."""

    id: bytes
    disksize: int
    pages: int
    created: int
    algorithms_length: int
    algorithms_sum: int
    chunks_length: int
    chunks_sum: int
    writer: str


def checksum(number: bytes, *pieces: bytes) -> int:
    """number: the image's id."""
    value = zlib.crc32(number)
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value


def _pad(content: bytes) -> bytes:
    return content + bytes(-len(content) % PAGE)


def with_sum(content: bytes, number: bytes) -> bytes:
    block = content.ljust(PAGE - _SUM.size, b"\0")
    return block + _SUM.pack(checksum(number, block))


def _has_sum(block: bytes, number: bytes) -> bool:
    return len(block) == PAGE and _SUM.unpack(block[-4:])[0] == checksum(number, block[:-4])


def unpack_header(block: bytes) -> Header:
    """Raises ValueError with a sentence: no header of an image, damaged, or of another version."""
    if not block.startswith(HEAD_MAGIC) or len(block) != PAGE:
        raise ValueError("it does not begin as an image of a zramfs device does")
    _, version, page, number, disksize, pages, created, *lengths, writer = _HEADER.unpack_from(block)
    if not _has_sum(block, number):
        raise ValueError("its header is damaged")
    text = writer.rstrip(b"\0").decode("ascii", "replace")
    if version != VERSION or page != PAGE:
        raise ValueError(
            f"it has format {version} with pages of {page} bytes, written by zramfs {text}; this version "
            f"reads format {VERSION} with pages of {PAGE} bytes")
    header = Header(number, disksize, pages, created, lengths[0], lengths[1], lengths[2], lengths[3], text)
    if (not 1 <= disksize <= MAX_DISKSIZE or disksize % PAGE or header.chunks_length % MAP_CHUNK
            or header.chunks_length // MAP_CHUNK > -(-disksize // (512 * PAGE))
            or header.algorithms_length > PRIORITIES * (_ALGORITHM.size + MAX_DICTIONARY)):
        raise ValueError("its header has impossible lengths")
    return header


def pack_algorithms(algorithms: Sequence[SavedAlgorithm | None]) -> bytes:
    entries, dictionaries = [], []
    for each in algorithms:
        content = (each and each.dictionary) or b""
        name, level = (each.name.encode(), each.level) if each else (b"", 0)
        entries.append(_ALGORITHM.pack(name, level, len(content)))
        dictionaries.append(content)
    return b"".join((*entries, *dictionaries))


def unpack_algorithms(content: bytes) -> tuple[SavedAlgorithm | None, ...]:
    """Raises ValueError with a sentence."""
    at = PRIORITIES * _ALGORITHM.size
    if len(content) < at:
        raise ValueError("its list of algorithms is too short")
    found: list[SavedAlgorithm | None] = []
    for name, level, length in _ALGORITHM.iter_unpack(content[:at]):
        word = name.rstrip(b"\0").decode("ascii", "replace")
        if word and word not in ALGORITHMS:
            raise ValueError(f"it is compressed with {word!r}, which this version does not know")
        dictionary = content[at:at + length]
        if len(dictionary) != length or length > MAX_DICTIONARY:
            raise ValueError("its dictionaries are too short")
        at += length
        found.append(SavedAlgorithm(word, level, dictionary or None) if word else None)
    if at != len(content) or found[0] is None:
        raise ValueError("its list of algorithms is not what an image has")
    return tuple(found)


def pack_part(number: bytes, index: int, directory: bytes, data: bytes) -> bytes:
    """With its padding."""
    head = _PART.pack(
        PART_MAGIC, number, index, len(directory) // 8, len(data), checksum(number, directory, data), 0)[:-4]
    return _pad(b"".join((head, _SUM.pack(checksum(number, head)), directory, data)))


@dataclass(frozen=True)
class PartHeader:
    index: int
    count: int
    data_length: int
    sum: int

    @property
    def length(self) -> int:
        """Of the part, with its padding."""
        return padded(PART_HEADER + 8 * self.count + self.data_length)


def unpack_part_header(content: bytes, number: bytes) -> PartHeader | None:
    """None for anything but the header of a part of this image."""
    if len(content) < PART_HEADER or not content.startswith(PART_MAGIC + number):
        return None
    *_, index, count, length, body, own = _PART.unpack_from(content)
    if own != checksum(number, content[:PART_HEADER - 4]) or count > MAX_ENTRIES or length > MAX_DATA:
        return None
    return PartHeader(index, count, length, body)


def pack_trailer(number: bytes, second_head: int, parts: int) -> bytes:
    return with_sum(_TRAILER.pack(TRAILER_MAGIC, number, second_head, parts), number)


def unpack_trailer(block: bytes) -> tuple[bytes, int, int] | None:
    """The image's id, where the second head begins, and the number of parts; None for anything else."""
    if not block.startswith(TRAILER_MAGIC) or len(block) != PAGE:
        return None
    _, number, second_head, parts = _TRAILER.unpack_from(block)
    return (number, second_head, parts) if _has_sum(block, number) else None
