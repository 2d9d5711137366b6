# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""A user of a pool that works from many threads at once without the GIL, and knows what every object
must hold: each word of it is made from the slot, the version and the place in the object."""
from libc.errno cimport ENOMEM, ENOSPC
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from allocator.arena cimport Arena
from allocator.check cimport check_arena, check_pool
from allocator.layout cimport CHAIN_MAX
from allocator.pool cimport pool_delete, pool_new, pool_stats
from allocator.prim cimport add64, cas64, load64, now_ns, peek64, relax, store64
from allocator.zscompact cimport zs_compact
from allocator.zsmalloc cimport zs_flush_deferred, zs_free, zs_malloc, zs_map, zs_unmap, zs_write
from allocator.zspage cimport pool_ops_t, pool_t

# A slot's word: 0 if it is empty, else location << 8 | 2; bit 0 is its lock.
cdef enum:
    LOCK = 1
    FILLED = 2
    LOC_SHIFT = 8
    WORDS = 512


cdef struct user_t:
    pool_t* pool
    uint64_t nr
    uint64_t* slots     # atomic
    uint64_t* versions  # guarded by the slot's lock
    uint64_t operations
    uint64_t full       # allocations that were refused
    uint64_t wrong      # objects that were not what they must be


cdef inline uint64_t mixed(uint64_t x) noexcept nogil:
    x = (x ^ (x >> 31)) * <uint64_t>0x7fb5d329728ea185
    x = (x ^ (x >> 27)) * <uint64_t>0x81dadef4bc2dd44d
    return x ^ (x >> 33)


cdef uint32_t content(uint64_t slot, uint64_t version, uint64_t* out) noexcept nogil:
    """The object's bytes and their number: every size, small ones and whole pages more often."""
    cdef uint64_t base = mixed(slot << 32 | version), kind = base & 3
    cdef uint32_t size = <uint32_t>(base >> 8) % 4096 + 1, i
    if kind == 0:
        size = size % 300 + 1
    elif kind == 1 and base & 16:
        size = 4096
    for i in range((size + 7) // 8):
        out[i] = mixed(base + i)
    return size


cdef uint64_t lock(user_t* u, uint64_t slot) noexcept nogil:
    cdef unsigned int round = 0
    cdef uint64_t v
    while True:
        v = peek64(&u.slots[slot])
        if not v & LOCK and cas64(&u.slots[slot], v, v | LOCK):
            return v
        relax(round)
        round += 1


cdef bint user_pin(void* ctx, uint64_t tag, uint64_t loc) noexcept nogil:
    cdef user_t* u = <user_t*>ctx
    cdef uint64_t v = loc << LOC_SHIFT | FILLED
    return cas64(&u.slots[tag], v, v | LOCK)


cdef void user_moved(void* ctx, uint64_t tag, uint64_t loc) noexcept nogil:
    store64(&(<user_t*>ctx).slots[tag], loc << LOC_SHIFT | FILLED)


cdef void verify_locked(user_t* u, uint64_t slot, uint64_t v) noexcept nogil:
    cdef uint64_t expected[WORDS]
    cdef uint64_t found[WORDS]
    cdef uint8_t scratch[4096]
    cdef uint32_t size = 0, n = content(slot, u.versions[slot], expected), i
    cdef const uint8_t* p = zs_map(u.pool, v >> LOC_SHIFT, scratch, &size)
    if p == NULL or size != n:
        add64(&u.wrong, 1)
    if p == NULL:
        return
    found[(n - 1) // 8] = expected[(n - 1) // 8]
    memcpy(found, p, size)
    zs_unmap(u.pool, v >> LOC_SHIFT)
    # Compared here, and not by memcmp(), so that the thread sanitizer sees every byte.
    for i in range((n + 7) // 8):
        if found[i] != expected[i]:
            add64(&u.wrong, 1)
            break


cdef uint64_t store_locked(user_t* u, uint64_t slot, uint64_t v) noexcept nogil:
    """A new version in place of the old one, if there is room: the slot's new word."""
    cdef uint64_t words[WORDS]
    cdef uint64_t loc = 0
    cdef uint32_t n = content(slot, u.versions[slot] + 1, words)
    cdef int r = zs_malloc(u.pool, n, slot, &loc)
    if r == -ENOSPC or r == -ENOMEM:
        add64(&u.full, 1)
        return v
    if r != 0 or zs_write(u.pool, loc, <const uint8_t*>words, n) != 0:
        add64(&u.wrong, 1)
        return v
    u.versions[slot] += 1
    if v != 0 and zs_free(u.pool, v >> LOC_SHIFT) < 0:
        add64(&u.wrong, 1)
    return loc << LOC_SHIFT | FILLED


cdef void one(user_t* u, uint64_t slot, uint32_t dice, uint32_t dense) noexcept nogil:
    cdef uint64_t v = lock(u, slot)
    if v != 0:
        verify_locked(u, slot, v)
    if dice < 40:
        if dice < dense:
            v = store_locked(u, slot, v)
        elif v != 0:
            if zs_free(u.pool, v >> LOC_SHIFT) < 0:
                add64(&u.wrong, 1)
            v = 0
    store64(&u.slots[slot], v)


cdef class Crowd:
    """On an arena that has no pool. Every method may be called from any thread."""
    cdef Arena arena
    cdef user_t u

    def __cinit__(self, Arena arena not None, uint64_t nr_slots):
        cdef pool_ops_t ops
        self.arena = arena
        self.u.nr = nr_slots
        self.u.slots = <uint64_t*>calloc(nr_slots, sizeof(uint64_t))
        self.u.versions = <uint64_t*>calloc(nr_slots, sizeof(uint64_t))
        ops.ctx = &self.u
        ops.pin = user_pin
        ops.moved = user_moved
        self.u.pool = pool_new(arena.open(), CHAIN_MAX, &ops)

    def __dealloc__(self):
        with nogil:
            pool_delete(self.u.pool, True)
        free(self.u.slots)
        free(self.u.versions)

    def work(self, double seconds, uint64_t seed):
        """Reads, rewrites and frees any objects for so long. All workers mostly rewrite for 8 operations a
        slot, and mostly free for the next 8, so that the pool grows and becomes sparse in turns, however slow
        they are."""
        cdef uint64_t now = now_ns(), until = now + <uint64_t>(seconds * 1e9), n = 0, random
        cdef uint32_t dense
        with nogil:
            while now < until:
                dense = 35 if add64(&self.u.operations, 64) // (8 * self.u.nr) % 2 else 10
                for _ in range(64):
                    n += 1
                    random = mixed(seed << 40 ^ n)
                    one(&self.u, random % self.u.nr, <uint32_t>(random >> 32) % 100, dense)
                now = now_ns()

    def compact(self):
        cdef uint64_t freed
        with nogil:
            freed = zs_compact(self.u.pool)
            zs_flush_deferred(self.u.pool)
        return freed

    def verify(self):
        """Every object, at rest: how many there are."""
        cdef uint64_t slot, v, filled = 0
        with nogil:
            for slot in range(self.u.nr):
                v = load64(&self.u.slots[slot])
                if v != 0:
                    filled += 1
                    verify_locked(&self.u, slot, v)
        assert self.u.wrong == 0, f"{self.u.wrong} objects were damaged"
        return filled

    def check(self, int level):
        check_arena(self.arena.open(), level)
        check_pool(self.u.pool, level)

    def empty(self):
        """Frees every object."""
        cdef uint64_t slot
        for slot in range(self.u.nr):
            if self.u.slots[slot] != 0:
                assert zs_free(self.u.pool, self.u.slots[slot] >> LOC_SHIFT) > 0
                self.u.slots[slot] = 0

    @property
    def isolated(self):
        cdef uint32_t i
        return sum(self.u.pool.classes[i].isolated for i in range(self.u.pool.nr_classes))

    @property
    def operations(self):
        return load64(&self.u.operations)

    @property
    def full(self):
        return self.u.full

    def stats(self):
        return pool_stats(self.u.pool)
