# SPDX-License-Identifier: Apache-2.0
"""The record of a store, and what it was made with: see record.h and record.pxd."""
from allocator.arena cimport Arena
from allocator.layout cimport LAYOUT_VERSION, superblock_t
from allocator.prim cimport pread, round_up
from zramfs.store.slots cimport NR_PRIO, PAGE, PAGE_SHIFT, user_bytes

import json
from zlib import crc32

from zramfs.codecs.codec import Codec

LAYOUTS = {"memory": LAYOUT_VERSION, "store": RECORD_VERSION}   # what this build writes


cdef bytes codecs_packed(tuple codecs, tuple generations):
    """A line of JSON with the name, the level and the length of the dictionary of each priority, and then the
    dictionaries. In front of them their CRC-32, since a dictionary that has changed makes other pages. Last
    the generations, where a version that knows none does not look."""
    dictionaries = [codec.dictionary or b"" if codec else b"" for codec in codecs]
    table = [codec and [codec.algo, codec.level, len(content)]
             for codec, content in zip(codecs, dictionaries, strict=True)]
    body = json.dumps(table).encode() + b"\n" + b"".join(dictionaries)
    if any(generations):
        body += json.dumps(generations).encode()
    return b"%08x " % crc32(body) + body


cdef tuple codecs_unpacked(bytes note):
    """[name, level, dictionary or None] or None by priority, and the generations. ValueError."""
    check, _, body = note.partition(b" ")
    if check != b"%08x" % crc32(body):
        raise ValueError("expected the algorithms of the store in note 0, got bytes without their sum")
    line, _, rest = body.partition(b"\n")
    found = []
    try:
        for each in json.loads(line):
            if each is not None:
                name, level, n = each
                each, rest = [name + "", level + 0, rest[:n + 0] or None], rest[n:]
            found.append(each)
        generations = tuple([int(each) for each in json.loads(rest)]) if rest else (0,) * NR_PRIO
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError("expected the algorithms of the store in note 0, got another list") from error
    if len(found) != NR_PRIO or len(generations) != NR_PRIO or found[0] is None:
        raise ValueError(f"expected {NR_PRIO} algorithms of the store in note 0, got {len(found)}")
    return found, generations


def is_kept(int fd):
    """Whether a memory file holds a store that can be adopted, or could be by another version of zramfs.
    False: it may be used for a new one."""
    cdef superblock_t sb
    return (pread(fd, &sb, sizeof(sb), 0) == sizeof(sb)
            and (<store_record_t*>sb.user_record).magic == RECORD_MAGIC)


cdef dict kept_arguments(Arena arena, object backing):
    cdef store_record_t* record = record_of(arena.open())
    if record.magic != RECORD_MAGIC:
        raise ValueError("expected a memory file with a store in it, got one without")
    if not RECORD_OLDEST <= record.version <= RECORD_VERSION:
        raise ValueError(
            f"expected a store with record {RECORD_OLDEST} to {RECORD_VERSION}, got {record.version}: the "
            "version of zramfs that made it can read it")
    if record_slots(record) == 0 or arena.a.sb.user_size != round_up(user_bytes(record.most_slots), PAGE):
        raise ValueError("expected the record of a store, got one that is damaged: its size is wrong")
    if bool(record.has_backing) is not (backing is not None):
        raise ValueError("expected the backing store that the store has pages on, and no other")
    (primary, *secondary), generations = codecs_unpacked(arena.note(0))
    return {
        "disksize": record_slots(record) << PAGE_SHIFT, "grows_to": record.most_slots << PAGE_SHIFT,
        "algo": primary[0], "level": primary[1], "dictionary": primary[2],
        "secondary": [each and Codec(*each, only_decompresses=True) for each in secondary],
        "generations": generations,
        "wipe": record.wipe != 0,
    }
