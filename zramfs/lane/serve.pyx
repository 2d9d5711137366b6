# SPDX-License-Identifier: Apache-2.0
# Locks: crew_t.rest_lock for a few words, and under it, once, when all have to end, slow_t.lock (slow.pxd).
"""What the threads of a connection do; see serve.pxd."""
from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, EIO, ENODEV, ENOENT, ENOTCONN, errno
from libc.stdint cimport uint8_t, uint64_t
from posix.unistd cimport dup2, read, write

from allocator.prim cimport (
    add64, cas64, load64, now_ns, peek64, pthread_mutex_lock, pthread_mutex_unlock, store64, sub64,
)
from zramfs.lane.pieces cimport help_with_pieces
from zramfs.lane.requests cimport PUT_OFF, answer, payload_of, refuse, takes_long
from zramfs.lane.slow cimport (
    pthread_cond_broadcast, pthread_cond_signal, pthread_cond_wait, slow_end, slow_put, slow_take,
)
from zramfs.lane.worker cimport MAX_IO, REPLY_HEAD, REQUEST_HEAD, SHARED_BYTES

cdef enum:
    LOOK_EVERY = 8              # requests between two looks for more waiting; a power of two
    # Looking for a request before sleeping: see serve.pxd. Measured on two CPUs.
    HOPE_NS = 300000            # sleeps shorter than this promise a request within a look: at depth 1
                                # most take 30 to 60 us, nearly all of which is waking up
    AT_ONCE_NS = 2000           # and one so short was none
    MAX_ROW = 3                 # requests in a row without a wait: more come from a client with a deep
                                # queue, who needs the CPU himself (without this 12 to 25 % less at depth 16)
    MIN_CALM = 4                # waits in a row that promise one: a deep queue has single short ones
    MAX_MISSES = 4              # looks in vain, then sleep; a new hope has one look


cdef bint ended(int err) noexcept nogil:
    """Unmounted or aborted; ENOTCONN and EPIPE's like are for a connection over a socket."""
    return err == ENODEV or err == ECONNABORTED or err == ENOTCONN


cdef bint reply(thread_t* t, size_t size, uint64_t unique) noexcept nogil:
    """Sends the reply at w.data - REPLY_HEAD. False if the connection has ended."""
    if write(t.crew.fd, t.w.data - REPLY_HEAD, size) >= 0:
        return True
    if errno == ENOENT:
        return True             # the caller was killed while its request was in hand
    if ended(errno):
        return False
    # A request that stays unanswered hangs its caller for ever: end it with an error. If the
    # kernel had already ended it, this one gets ENOENT.
    store64(&t.reply_errors, peek64(&t.reply_errors) + 1)
    write(t.crew.fd, t.w.data - REPLY_HEAD, refuse(&t.w, unique, EIO))
    return True


cdef bint waiting(crew_t* crew) noexcept nogil:
    cdef pollfd wait
    wait.fd, wait.events = crew.fd, POLLIN
    return poll(&wait, 1, 0) > 0


cdef void rest(crew_t* crew, bint started) noexcept nogil:
    """Until called, or until all have to end."""
    pthread_mutex_lock(&crew.rest_lock)
    add64(&crew.resting, 1)
    # The last one to read may have turned to a long request before it could see us resting.
    if not started or load64(&crew.reading):
        while crew.called == 0 and crew.blocked == 0 and not load64(&crew.stopping):
            pthread_cond_wait(&crew.rest_over, &crew.rest_lock)
    if crew.called:
        crew.called -= 1
    sub64(&crew.resting, 1)
    pthread_mutex_unlock(&crew.rest_lock)


cdef void call(void* arg, uint64_t threads) noexcept nogil:
    cdef crew_t* crew = <crew_t*> arg
    if load64(&crew.resting) == 0:
        return
    pthread_mutex_lock(&crew.rest_lock)
    while threads > 0 and crew.called < crew.resting:
        crew.called += 1
        threads -= 1
        pthread_cond_signal(&crew.rest_over)
    pthread_mutex_unlock(&crew.rest_lock)


cdef void block(crew_t* crew) noexcept nogil:
    """The caller will wait for the backing store: all that rest go on, and none rests any more."""
    pthread_mutex_lock(&crew.rest_lock)
    crew.blocked += 1
    pthread_cond_broadcast(&crew.rest_over)
    pthread_mutex_unlock(&crew.rest_lock)


cdef void unblock(crew_t* crew) noexcept nogil:
    pthread_mutex_lock(&crew.rest_lock)
    crew.blocked -= 1
    pthread_mutex_unlock(&crew.rest_lock)


cdef bint help_others(thread_t* t) noexcept nogil:
    cdef int i
    cdef bint helped = False
    for i in range(t.crew.count):
        if i != t.index and help_with_pieces(&t.w, &t.crew.threads[i].w):
            helped = True
    return helped


cdef void rest_and_help(thread_t* t, bint started) noexcept nogil:
    """Until there is a request to read."""
    rest(t.crew, started)
    while not load64(&t.crew.stopping) and not waiting(t.crew) and help_others(t):
        # Whoever was helped reads again in a moment, or is stopped.
        rest(t.crew, False)


cdef void stop_all(crew_t* crew) noexcept nogil:
    pthread_mutex_lock(&crew.rest_lock)
    store64(&crew.stopping, 1)
    pthread_cond_broadcast(&crew.rest_over)
    if crew.slow != NULL:
        slow_end(crew.slow)
    pthread_mutex_unlock(&crew.rest_lock)


cdef bint may_rest(thread_t* t) noexcept nogil:
    if t.requests % LOOK_EVERY and not t.long_request:
        return False
    if load64(&t.crew.reading) == 0 or waiting(t.crew):
        t.alone = 0
        return False
    # Long requests are worth a second reader while there are several: with resting in between, 1 MiB
    # reads at depth 4 lose about 10 %. Where there is only one at a time, its reader wants help.
    t.alone += 1
    if t.long_request and t.alone < LOOK_EVERY:
        return False
    t.alone = 0
    return True


cdef void* serve(void* arg) noexcept nogil:
    cdef thread_t* t = <thread_t*> arg
    cdef crew_t* crew = t.crew
    if t.index:
        rest_and_help(t, False)
    while not load64(&crew.stopping) and serve_one(t):
        # Thread 0 never rests, so somebody always reads, or will when his request is done.
        if t.index and may_rest(t):
            rest_and_help(t, True)
    stop_all(crew)
    store64(&t.running, 0)
    leave(crew, 1)
    return NULL


cdef void look_for_request(thread_t* t) noexcept nogil:
    """Returns when a request waits, or when it is time to sleep."""
    cdef crew_t* crew = t.crew
    cdef uint64_t until
    if waiting(crew):
        t.row += 1
        t.hopeful = t.row <= MAX_ROW
        return
    t.row = 0
    # One at a time: a second one would take a CPU from the client that it waits for.
    if not cas64(&crew.polling, 0, 1):
        return
    until = now_ns() + crew.poll_ns
    while not waiting(crew):
        if now_ns() > until:
            t.misses += 1
            t.hopeful = t.misses < MAX_MISSES
            break
    else:
        t.misses = 0
    store64(&crew.polling, 0)


cdef void note_wait(thread_t* t, uint64_t ns) noexcept nogil:
    """A request came after ns nanoseconds of sleep, or of none."""
    if ns < AT_ONCE_NS:
        t.row += 1
        return
    t.calm = t.calm + 1 if ns < HOPE_NS and t.row <= MAX_ROW else 0
    t.hopeful = t.calm >= MIN_CALM
    t.row = 0


cdef void* serve_slow(void* arg) noexcept nogil:
    cdef thread_t* t = <thread_t*> arg
    cdef crew_t* crew = t.crew
    cdef size_t got = 0, size
    cdef uint64_t unique
    # A reply that comes too late goes to what stands in the connection's place.
    while not load64(&crew.stopping) and slow_take(crew.slow, &t.w, &got):
        unique = (<uint64_t*> (t.w.data - REQUEST_HEAD))[1]
        size = answer(&t.w, got)
        store64(&t.w.serving, 0)
        if size:
            reply(t, size, unique)
    store64(&t.running, 0)
    leave(crew, 1)
    return NULL


cdef size_t answer_or_put_off(thread_t* t, size_t got) noexcept nogil:
    """0 if the slow threads will answer."""
    cdef size_t size = answer(&t.w, got)
    if size != PUT_OFF:
        return size
    if slow_put(t.crew.slow, &t.w, got):
        return 0
    # No room: to wait here costs others time, to refuse would cost data. Somebody else has to read
    # meanwhile, also one that is about to rest because it has just helped with this very request.
    block(t.crew)
    t.w.may_wait = True
    size = answer(&t.w, got)
    t.w.may_wait = False
    unblock(t.crew)
    return size


cdef bint serve_one(thread_t* t) noexcept nogil:
    """Reads a request and answers it. False if the connection has ended."""
    cdef crew_t* crew = t.crew
    cdef uint8_t* request = t.w.data - REQUEST_HEAD
    cdef ssize_t got
    cdef size_t size
    cdef uint64_t unique, payload
    cdef pollfd wait
    cdef uint64_t began = 0
    add64(&crew.reading, 1)
    if crew.poll_ns:
        if t.hopeful:
            look_for_request(t)
        began = now_ns()
    got = read(crew.fd, request, REQUEST_HEAD + MAX_IO)
    sub64(&crew.reading, 1)
    if crew.poll_ns and not t.hopeful:
        note_wait(t, now_ns() - began)
    if got < 0:
        if errno == EINTR or errno == ENOENT:
            return True         # ENOENT: the request was withdrawn while it was being read
        if errno == EAGAIN:
            wait.fd, wait.events = crew.fd, POLLIN
            poll(&wait, 1, -1)
            return True
        if not ended(errno):
            store64(&crew.end_errno, <uint64_t> errno)
        return False
    if got == 0:
        return False            # a socket's other end was closed
    store64(&t.w.serving, 1)
    t.requests += 1
    payload = payload_of(&t.w, <size_t> got)
    t.long_request = takes_long(&t.w, <size_t> got, payload)
    # Whoever is called for a shared request (call() by the request itself) reads if others wait.
    if payload < SHARED_BYTES and not load64(&crew.reading) and (
            t.long_request or (t.requests % LOOK_EVERY == 0 and waiting(crew))):
        call(crew, 1)
    unique = (<uint64_t*> request)[1]
    size = answer_or_put_off(t, <size_t> got)
    store64(&t.w.serving, 0)
    return size == 0 or reply(t, size, unique)


cdef void leave(crew_t* crew, uint64_t threads) noexcept nogil:
    cdef uint64_t one = 1
    if sub64(&crew.live, threads) == 0:
        # Nobody will answer any more: give the connection up, so that the kernel fails what waits
        # instead of letting it hang. dup2 keeps the descriptor's number taken.
        dup2(crew.null_fd, crew.fd)
        write(crew.done_fd, &one, sizeof(one))
