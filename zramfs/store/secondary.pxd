# SPDX-License-Identifier: Apache-2.0
# Lock order: store_t.contexts_lock stands outside the locks of slots.pxd, and nobody who has it takes one of
# those. A thread that serves requests never takes it. Who has it may wait for memory, and never for the GIL.
"""Secondary algorithms that a store takes, and gives up, while it is in use.

A slot names the priority of the algorithm that made its object, so at every instant each thread can read what
each slot names. Who changes what, and in which order:

To take one (set_secondary):
  1. Post-processing is kept away (Store.begin_post), and a save too: no slot gets the priority meanwhile.
  2. Each context gets a workspace for it, made and made resident here. A context that is made meanwhile finds
     the algorithm in store_t.codec; contexts_lock keeps both apart. If one can't be had, all go again.
  3. Note 0 names it, in one step (Arena.set_note): a successor finds the table with it or without it.
  4. The next recompression may store objects of that priority. Its commit releases the slot, and who reads
     the slot has locked it: so who meets the priority sees the workspace.
A process that is killed before 3 leaves the old table, and after it the new one, which no slot needs yet.

To give one up (drop_secondary):
  1. Post-processing and saves are kept away.
  2. No unit has the priority (units_t.by_prio), nor has a slot: not one that is locked either, which keeps
     its value but for the lock bit. An object in the pool is decompressed under the lock of its slot, so no
     thread is at work on one.
  3. An object on the backing store, and one that an estimate looks at, is decompressed after its slot was
     unlocked, which may have changed by then. store_ctx_t.fetching says so from before the slot is unlocked.
     What a unit has is unpacked while its slot is locked, but another thread may replace the unit meanwhile:
     unit_cache_t.unpacks says so. No context has the priority in one of them.
  4. Note 0 goes without it, and then the workspaces and the dictionary are freed.
A process that is killed before 4 leaves the old table, and after it the new one, which is enough.
"""
from libc.stdint cimport uint32_t

from zramfs.codecs.codec cimport codec_t
from zramfs.store.slots cimport store_t

# Step 2 of each; the caller keeps post-processing away. codec_install: 0 or -ENOMEM, and nothing has changed.
cdef int codec_install(store_t* st, uint32_t prio, const codec_t* codec) noexcept nogil
cdef void codec_remove(store_t* st, uint32_t prio) noexcept nogil
# Whether a slot or a unit names the priority, or a thread decompresses an object that had it.
cdef bint priority_needed(store_t* st, uint32_t prio) noexcept nogil
