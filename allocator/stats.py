# SPDX-License-Identifier: Apache-2.0
"""Statistics of the allocator: frozen, with units in the field comments."""
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ArenaStats:
    frames_used: int  # 4 KiB frames handed out
    frames_free: int  # free frames inside pageblocks in use: resident once they were touched
    pageblocks_in_use: int
    pageblocks_total: int  # as many as can ever be in use
    resident: int  # bytes of the pageblocks in use and in reserve, less what the balloon has punched out
    bytes_returned: int  # bytes given back to the OS since creation
    punch_errors: int  # pageblocks that the OS did not take back
    reserve: int  # bytes of free pageblocks that are resident, so that using them waits for nothing
    reserve_target: int  # bytes to be kept so, 0 = none
    reserve_misses: int  # allocations that found it empty, and waited up to 0.1 s
    refused: int  # times that the OS refused memory, each a failed allocation or one that was tried again


@dataclass(frozen=True, slots=True)
class PoolStats:
    pages: int  # pool pages of 4 KiB (the kernel's mem_used_total / 4096)
    max_pages: int  # their peak
    limit_pages: int  # 0 = none
    pages_compacted: int  # freed by object compaction since creation
    objects: int
    zspages: int
    corrupt: int  # locations that named no object: 0 in a sound pool


@dataclass(frozen=True, slots=True)
class HeadroomStats:
    keep_free: int  # bytes of the host's memory that stay available to others, 0 = no floor
    host_room: int | None  # bytes above that floor; None = not bounded
    group_room: int | None  # bytes below the limits of memory cgroups, with a margin; None = not bounded
    looks: int  # at the host's and the groups' files, since creation
    refused: int  # requests for pool pages that found no room

    @property
    def room(self) -> int | None:
        """Bytes that the pool may take; None = not bounded."""
        return min((each for each in (self.host_room, self.group_room) if each is not None), default=None)


@dataclass(frozen=True, slots=True)
class ClassStats:
    index: int  # raw class number, (size - 32) / 16
    size: int  # bytes of an object with its header
    zspages_by_group: tuple[int, ...]  # fullness groups 0 %, 10 % ... 90 %, 99 %, 100 %
    obj_allocated: int  # places for objects in all zspages
    obj_used: int
    pages_used: int
    pages_per_zspage: int
    objs_per_zspage: int
    freeable: int  # pool pages that object compaction could free


@dataclass(frozen=True, slots=True)
class CompactionStats:
    runs: int  # compaction runs begun
    scanned: int  # frames looked at
    isolated: int  # frames taken from their owners for a move
    migrated: int  # frames moved
    owner_gone: int  # frames freed by their owner after isolation: nothing to move
    unmovable: int  # ranges given up for a frame that no owner can move
    busy: int  # frames locked, or refused by their owner for now
    again: int  # frames still busy after the tenth pass
    refused: int  # frames that their owner could not move
    no_target: int  # frames for which there was no free one to move to
    put_back: int  # isolated frames that stayed where they were
    blocks_freed: int  # pageblocks emptied and given back to the OS
    deferred: int  # pageblocks passed by because they failed lately
    ns: int  # nanoseconds spent in runs


@dataclass(frozen=True, slots=True)
class PageblockStats:
    free: int  # frames, of 512
    used: int
    movable: int  # of the used ones
    isolated: int  # of the used ones, under migration now
    balloon: int  # of the used ones, kept from the pool
    resident: bool  # False: given back to the OS


@dataclass(frozen=True, slots=True)
class BalloonStats:
    target: int  # pages the balloon shall hold
    pages: int  # pages it holds
    isolated: int  # of these, under migration now
    migrated: int  # pages moved by compaction since creation
