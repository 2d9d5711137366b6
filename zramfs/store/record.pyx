# SPDX-License-Identifier: Apache-2.0
"""The record of a store, and what it was made with: see record.h and record.pxd."""
from allocator.arena cimport Arena
from allocator.layout cimport superblock_t
from allocator.prim cimport pread

import json

from zramfs.codecs.codec import Codec


cdef bytes codecs_packed(tuple codecs):
    """A line of JSON with the name, the level and the length of the dictionary of each priority, and then the
    dictionaries."""
    dictionaries = [codec.dictionary or b"" if codec else b"" for codec in codecs]
    table = [codec and [codec.algo, codec.level, len(content)]
             for codec, content in zip(codecs, dictionaries, strict=True)]
    return json.dumps(table).encode() + b"\n" + b"".join(dictionaries)


cdef list codecs_unpacked(bytes note):
    """[name, level, dictionary or None] or None by priority. ValueError."""
    line, _, rest = note.partition(b"\n")
    found = []
    for each in json.loads(line):
        if each is not None:
            name, level, n = each
            each, rest = [name, level, rest[:n] or None], rest[n:]
        found.append(each)
    return found


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
    if record.version != RECORD_VERSION:
        raise ValueError(
            f"expected a store with record {RECORD_VERSION}, got {record.version}: the version of zramfs "
            "that made it can read it")
    if bool(record.has_backing) is not (backing is not None):
        raise ValueError("expected the backing store that the store has pages on, and no other")
    primary, *secondary = codecs_unpacked(arena.note(0))
    return {
        "disksize": record.nr_slots << 12, "grows_to": record.most_slots << 12,
        "algo": primary[0], "level": primary[1], "dictionary": primary[2],
        "secondary": [each and Codec(*each) for each in secondary], "wipe": record.wipe != 0,
    }
