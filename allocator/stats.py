# SPDX-License-Identifier: Apache-2.0
"""Statistics of the allocator: frozen, with units in the field comments."""
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ArenaStats:
    frames_used: int  # 4 KiB frames handed out
    frames_free: int  # free frames inside pageblocks in use: resident once they were touched
    pageblocks_in_use: int
    pageblocks_total: int  # as many as can ever be in use
    resident: int  # bytes of the pageblocks in use
    bytes_returned: int  # bytes given back to the OS since creation
    punch_errors: int  # pageblocks that the OS did not take back


@dataclass(frozen=True, slots=True)
class PoolStats:
    pages: int  # pool pages of 4 KiB (the kernel's mem_used_total / 4096)
    max_pages: int  # their peak since creation or reset_max()
    limit_pages: int  # 0 = none
    pages_compacted: int  # freed by object compaction since creation
    objects: int
    zspages: int
    corrupt: int  # zspages met with a wrong magic


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
