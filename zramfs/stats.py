# SPDX-License-Identifier: Apache-2.0
"""Statistics of a device's store: frozen, with units in the field comments."""
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreStats:
    # the columns of the kernel's mm_stat, in its order
    orig_data_size: int  # bytes stored, same-filled pages included
    compr_data_size: int  # bytes of their objects, same-filled pages not
    mem_used_total: int  # bytes of pool pages
    mem_limit: int  # bytes, 0 = none
    mem_used_max: int  # bytes, peak of mem_used_total
    same_pages: int  # pages
    pages_compacted: int  # pool pages freed by object compaction since creation
    huge_pages: int  # pages stored raw, now
    huge_pages_since: int  # and since creation
    # io_stat
    failed_reads: int  # pages
    failed_writes: int  # pages
    notify_free: int  # pages discarded or zeroed whole, stored or not
    # the arena under the pool
    resident: int  # bytes of pageblocks in use
    pageblocks_in_use: int
    pageblocks_total: int
    bytes_returned: int  # given back to the OS since creation
    frames_used: int
    frames_free: int
    corrupt: int  # locations that named no object: 0 in a sound pool


EMPTY = StoreStats(*[0] * len(StoreStats.__slots__))
