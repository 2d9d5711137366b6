# SPDX-License-Identifier: Apache-2.0
# Locks: see migrate.pxd.
"""C interface of compaction: runs over the pageblocks of an arena."""
from allocator.arena cimport Arena
from allocator.frames cimport arena_t
from allocator.layout cimport migrate_stats_t
from allocator.migrate cimport compact_run_t

# Both take migrate_lock, which guards the run. The next compact_begin() ends a run that was not
# finished; so does free(run.blocks).
cdef int compact_begin(arena_t* a, compact_run_t* run, migrate_stats_t* stats, bint all_blocks) noexcept nogil
cdef bint compact_step(arena_t* a, compact_run_t* run, migrate_stats_t* stats) noexcept nogil


cdef class Migration:
    cdef readonly Arena arena
    cdef migrate_stats_t* stats_        # in the memory file, so that the counts outlive the process
    cdef compact_run_t run_
