# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3
"""What only the allocator's C interface shows. ScriptedOwner: an owner of movable pages whose answers
are laid down beforehand, and which writes down how it was asked. Page locks and zspages held by hand.
"""
from libc.errno cimport EAGAIN
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from allocator.arena cimport Arena
from allocator.buddy cimport arena_alloc_frames, arena_free_block
from allocator.frames cimport arena_t, frame_ptr, page_owner_t
from allocator.layout cimport *
from allocator.migrate cimport (
    clear_page_movable, owner_register, owner_unregister, page_trylock, page_unlock, set_page_movable,
)
from allocator.pool cimport Pool
from allocator.populate cimport arena_populate_user
from allocator.prim cimport add64, load16, load32, relax, store32
from zramfs.store.page cimport fill_words, same_filled
from allocator.zsmalloc cimport zs_map, zs_unmap
from allocator.zspage cimport pool_t

cdef enum:
    MOST = 1 << 20        # pages of a scripted owner

FOR_EVER = 0xffffffff


def populate_user(Arena arena, uint64_t offset, uint64_t n):
    """0 or an errno."""
    cdef arena_t* a = arena.open()
    cdef int r
    with nogil:
        r = arena_populate_user(a, offset, n)
    return -r


cdef struct entry_t:
    uint32_t frame              # NONE32 once it is freed
    uint64_t content            # the word that fills the page
    # the script
    uint32_t refuse             # times that isolate() says no
    uint32_t again              # times that migrate() says -EAGAIN; FOR_EVER
    int error                   # then migrate() says this errno
    void* on_isolate            # Python callable or NULL: called once, when the page is asked for
    void* on_migrate
    # what happened
    uint32_t isolates
    uint32_t migrates
    uint32_t putbacks
    bint isolated


cdef struct script_t:
    arena_t* arena
    uint8_t number
    uint32_t n
    uint64_t violations         # calls that break the core's promises
    entry_t entries[MOST]


cdef inline entry_t* entry_of(script_t* s, uint32_t frame) noexcept nogil:
    """The entry that a page names, by the number in its descriptor."""
    cdef entry_t* e = &s.entries[s.arena.pages[frame].ref]
    add64(&s.violations, e.frame != frame)
    return e


cdef inline void expect(script_t* s, uint32_t frame, uint16_t flags) noexcept nogil:
    add64(&s.violations, load16(&s.arena.pages[frame].flags) != flags)


cdef uint32_t lock_entry(script_t* s, entry_t* e) noexcept nogil:
    """The page may move until it is locked: its frame, then."""
    cdef uint32_t frame
    cdef unsigned int round = 0
    while True:
        frame = load32(&e.frame)
        if page_trylock(s.arena, frame):
            if load32(&e.frame) == frame:
                return frame
            page_unlock(s.arena, frame)
        relax(round)
        round += 1


cdef void give_up(script_t* s, uint32_t i) noexcept nogil:
    """Frees a page as an owner does: under its lock, and not if the core has it."""
    cdef uint32_t frame = lock_entry(s, &s.entries[i])
    cdef bint mine
    mine = clear_page_movable(s.arena, frame)
    add64(&s.violations, mine == s.entries[i].isolated)
    s.entries[i].isolated = False
    store32(&s.entries[i].frame, NONE32)
    page_unlock(s.arena, frame)
    if mine:
        arena_free_block(s.arena, frame, 0)


cdef void call_python(void* hook) noexcept with gil:
    # An exception is reported as one that can't be raised, which pytest takes for an error.
    (<object>hook)()


cdef void call_once(void** hook) noexcept nogil:
    cdef void* now = hook[0]
    hook[0] = NULL
    if now != NULL:
        call_python(now)


cdef bint script_isolate(void* ctx, uint32_t frame) noexcept nogil:
    cdef script_t* s = <script_t*>ctx
    cdef entry_t* e = entry_of(s, frame)
    expect(s, frame, PG_USED | PG_MOVABLE | PG_LOCKED)
    add64(&s.violations, e.isolated)
    e.isolates += 1
    call_once(&e.on_isolate)
    if e.refuse != 0:
        e.refuse -= 1
        return False
    e.isolated = True
    return True


cdef int script_migrate(void* ctx, uint32_t new, uint32_t old) noexcept nogil:
    cdef script_t* s = <script_t*>ctx
    cdef entry_t* e = entry_of(s, old)
    expect(s, old, PG_USED | PG_MOVABLE | PG_ISOLATED | PG_LOCKED)
    expect(s, new, PG_USED | PG_LOCKED)
    add64(&s.violations, not e.isolated)
    e.migrates += 1
    call_once(&e.on_migrate)
    if e.again != 0:
        e.again -= e.again != 0xffffffffu
        return -EAGAIN
    if e.error != 0:
        return -e.error
    memcpy(frame_ptr(s.arena, new), frame_ptr(s.arena, old), FRAME_SIZE)
    set_page_movable(s.arena, new, s.number, <uint32_t>(e - s.entries))
    add64(&s.violations, clear_page_movable(s.arena, old))
    store32(&e.frame, new)
    e.isolated = False
    return 0


cdef void script_putback(void* ctx, uint32_t frame) noexcept nogil:
    cdef script_t* s = <script_t*>ctx
    cdef entry_t* e = entry_of(s, frame)
    expect(s, frame, PG_USED | PG_MOVABLE | PG_ISOLATED | PG_LOCKED)
    add64(&s.violations, not e.isolated)
    e.putbacks += 1
    e.isolated = False


cdef class ScriptedOwner:
    """number: an OWNER_ number that nobody uses on the arena."""
    cdef Arena arena
    cdef script_t* s
    cdef list hooks     # keeps them alive

    def __cinit__(self, Arena arena not None, uint8_t number):
        cdef page_owner_t owner
        self.arena = arena
        self.hooks = []
        self.s = <script_t*>calloc(1, sizeof(script_t))
        self.s.arena = arena.open()
        self.s.number = number
        owner.ctx = self.s
        owner.isolate = script_isolate
        owner.migrate = script_migrate
        owner.putback = script_putback
        if not owner_register(self.s.arena, number, &owner):
            raise ValueError(f"owner {number} is there already")

    def __dealloc__(self):
        free(self.s)

    cdef entry_t* entry(self, uint32_t i) except NULL:
        if i >= self.s.n:
            raise IndexError(i)
        return &self.s.entries[i]

    def add(self, uint64_t content):
        """A page filled with a word: its number."""
        cdef uint32_t i = self.s.n
        cdef entry_t* e = &self.s.entries[i]
        if i == MOST:
            raise IndexError(f"{MOST} pages at most")
        if arena_alloc_frames(self.s.arena, 1, self.s.number, i, &e.frame) != 0:
            raise MemoryError
        e.content = content
        fill_words(frame_ptr(self.s.arena, e.frame), content)
        set_page_movable(self.s.arena, e.frame, self.s.number, i)
        self.s.n += 1
        return i

    def script(self, i, *, refuse=0, again=0, error=0, on_isolate=None, on_migrate=None):
        cdef entry_t* e = self.entry(i)
        e.refuse, e.again, e.error = refuse, again, error
        self.hooks += [on_isolate, on_migrate]
        e.on_isolate = NULL if on_isolate is None else <void*>on_isolate
        e.on_migrate = NULL if on_migrate is None else <void*>on_migrate

    def free(self, i):
        cdef entry_t* e = self.entry(i)
        if load32(&e.frame) != NONE32:
            give_up(self.s, i)

    def frame(self, i):
        """Where the page lies; None once it is freed."""
        cdef uint32_t frame = load32(&self.entry(i).frame)
        return None if frame == NONE32 else frame

    def intact(self, i):
        cdef entry_t* e = self.entry(i)
        cdef uint64_t word = 0
        return (e.frame != NONE32 and not e.isolated
                and same_filled(frame_ptr(self.s.arena, e.frame), &word) and word == e.content)

    def asked(self, i):
        """How often the core called isolate, migrate and putback for the page."""
        cdef entry_t* e = self.entry(i)
        return e.isolates, e.migrates, e.putbacks

    @property
    def violations(self):
        return self.s.violations

    def __len__(self):
        cdef uint32_t i
        return sum(load32(&self.s.entries[i].frame) != NONE32 for i in range(self.s.n))

    def close(self):
        """Frees all pages and ends the ownership."""
        owner_unregister(self.s.arena, self.s.number)
        for i in range(self.s.n):
            self.free(i)


# ---- held by hand ---------------------------------------------------------------------------------------

def lock_page(Arena arena not None, uint32_t frame):
    """As somebody who is at work on the page just now. False if somebody else is."""
    return page_trylock(arena.open(), frame)


def unlock_page(Arena arena not None, uint32_t frame):
    page_unlock(arena.open(), frame)


def read_begin(Pool pool not None, tag):
    """Holds the object's zspage as a reader does: the object's location, for read_end()."""
    cdef uint64_t loc = pool.find(tag)
    cdef uint32_t size = 0
    cdef uint8_t scratch[FRAME_SIZE]
    if zs_map(pool.open(), loc, scratch, &size) == NULL:
        raise ValueError(f"object {tag} is damaged")
    return loc


def read_end(Pool pool not None, uint64_t loc):
    zs_unmap(pool.open(), loc)


def isolated_zspages(Pool pool not None):
    """Zspages that the classes count as off their lists."""
    cdef pool_t* p = pool.open()
    cdef uint32_t i
    return sum(p.classes[i].isolated for i in range(p.nr_classes))


def deferred_zspages(Pool pool not None):
    """Numbers of the empty zspages that wait to be freed."""
    cdef pool_t* p = pool.open()
    cdef uint32_t number = p.deferred
    found = []
    while number != NONE32:
        found.append(number)
        number = p.arena.zspages[number].next
    return found
