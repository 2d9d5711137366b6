# SPDX-License-Identifier: Apache-2.0
# Locks:
# * lane_t.rest_lock, for a few words; under it, once, when all workers have to end, slow_t.lock (slow.pxd).
"""What the workers of a lane do; see serve.pxd."""
from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, EIO, ENODEV, ENOENT, ENOTCONN, errno
from libc.stdint cimport uint64_t
from posix.unistd cimport dup2, read, write

from allocator.prim cimport (
    add64, cas64, load64, now_ns, pthread_mutex_lock, pthread_mutex_unlock, store64, sub64,
)
from zramfs.lane.kept cimport FUSE_RESENT, is_refused
from zramfs.lane.pieces cimport help_with_pieces
from zramfs.lane.requests cimport PUT_OFF, answer_request, request_payload, refuse_request, request_takes_long
from zramfs.lane.slow cimport (
    pthread_cond_broadcast, pthread_cond_signal, pthread_cond_wait, slow_end, slow_put, slow_take,
)
from zramfs.lane.worker cimport MAX_IO, REPLY_HEAD, REQUEST_HEAD, SHARED_BYTES, add_count

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


cdef bint connection_ended(int err) noexcept nogil:
    """Unmounted or aborted; ENOTCONN and EPIPE's like are for a connection over a socket."""
    return err == ENODEV or err == ECONNABORTED or err == ENOTCONN


cdef bint worker_reply(worker_thread_t* t, size_t size, uint64_t unique) noexcept nogil:
    """Sends the reply at w.data - REPLY_HEAD. False if the connection has ended."""
    if write(t.lane.fd, t.w.data - REPLY_HEAD, size) >= 0:
        return True
    if errno == ENOENT:
        return True             # the caller was killed while its request was served
    if connection_ended(errno):
        return False
    # A request without an answer hangs its caller: end it with an error. If the
    # kernel had already ended it, this one gets ENOENT.
    add_count(&t.w.counts.reply_errors, 1)
    write(t.lane.fd, t.w.data - REPLY_HEAD, refuse_request(&t.w, unique, EIO))
    return True


cdef bint lane_has_requests(lane_t* lane) noexcept nogil:
    cdef pollfd wait
    wait.fd, wait.events = lane.fd, POLLIN
    return poll(&wait, 1, 0) > 0


cdef void worker_rest(lane_t* lane, bint started) noexcept nogil:
    """Until woken, or until all workers have to end."""
    pthread_mutex_lock(&lane.rest_lock)
    add64(&lane.resting, 1)
    # The last one to read may have turned to a long request before it could see us resting.
    if not started or load64(&lane.reading):
        while lane.woken == 0 and lane.blocked == 0 and not load64(&lane.stopping):
            pthread_cond_wait(&lane.rest_over, &lane.rest_lock)
    if lane.woken:
        lane.woken -= 1
    sub64(&lane.resting, 1)
    pthread_mutex_unlock(&lane.rest_lock)


cdef void lane_wake_workers(void* arg, uint64_t threads) noexcept nogil:
    cdef lane_t* lane = <lane_t*> arg
    if load64(&lane.resting) == 0:
        return
    pthread_mutex_lock(&lane.rest_lock)
    while threads > 0 and lane.woken < lane.resting:
        lane.woken += 1
        threads -= 1
        pthread_cond_signal(&lane.rest_over)
    pthread_mutex_unlock(&lane.rest_lock)


cdef void lane_begin_blocking(lane_t* lane) noexcept nogil:
    """The caller will wait for the backing store: all that rest go on, and none rests any more."""
    pthread_mutex_lock(&lane.rest_lock)
    add64(&lane.blocked, 1)
    pthread_cond_broadcast(&lane.rest_over)
    pthread_mutex_unlock(&lane.rest_lock)


cdef void lane_end_blocking(lane_t* lane) noexcept nogil:
    pthread_mutex_lock(&lane.rest_lock)
    sub64(&lane.blocked, 1)
    pthread_mutex_unlock(&lane.rest_lock)


cdef bint worker_help_others(worker_thread_t* t) noexcept nogil:
    cdef int i
    cdef bint helped = False
    for i in range(t.lane.count):
        if i != t.index and help_with_pieces(&t.w, &t.lane.threads[i].w):
            helped = True
    return helped


cdef void worker_rest_and_help(worker_thread_t* t, bint started) noexcept nogil:
    """Until there is a request to read."""
    worker_rest(t.lane, started)
    while not load64(&t.lane.stopping) and not lane_has_requests(t.lane):
        if worker_help_others(t):
            # The worker that was helped reads again in a moment, or is stopped.
            worker_rest(t.lane, False)
        elif load64(&t.lane.reading) and load64(&t.lane.blocked) == 0:
            # It came too late: all pieces were taken. The next large request wants help again. Two readers
            # would take turns, and nobody would help either: 1 MiB reads and writes at depth 1 lose a tenth.
            worker_rest(t.lane, True)
        else:
            return


cdef void lane_stop_workers(lane_t* lane) noexcept nogil:
    pthread_mutex_lock(&lane.rest_lock)
    store64(&lane.stopping, 1)
    pthread_cond_broadcast(&lane.rest_over)
    if lane.slow != NULL:
        slow_end(lane.slow)
    pthread_mutex_unlock(&lane.rest_lock)


cdef bint worker_may_rest(worker_thread_t* t) noexcept nogil:
    if t.requests % LOOK_EVERY and not t.long_request:
        return False
    if load64(&t.lane.reading) == 0 or lane_has_requests(t.lane):
        t.alone = 0
        return False
    # Long requests are worth a second reader while there are several: with resting in between, 1 MiB
    # reads at depth 4 lose about 10 %. Where there is only one at a time, its reader wants help.
    t.alone += 1
    if t.long_request and t.alone < LOOK_EVERY:
        return False
    t.alone = 0
    return True


cdef void* worker_serve(void* arg) noexcept nogil:
    cdef worker_thread_t* t = <worker_thread_t*> arg
    cdef lane_t* lane = t.lane
    if t.index:
        worker_rest_and_help(t, False)
    while not load64(&lane.stopping) and worker_serve_request(t):
        # Thread 0 never rests, so somebody always reads, or will when his request is done.
        if t.index and worker_may_rest(t):
            worker_rest_and_help(t, True)
    lane_stop_workers(lane)
    store64(&t.running, 0)
    lane_drop_workers(lane, 1)
    return NULL


cdef void worker_look_for_request(worker_thread_t* t) noexcept nogil:
    """Returns when a request waits, or when it is time to sleep."""
    cdef lane_t* lane = t.lane
    cdef uint64_t until
    if lane_has_requests(lane):
        t.row += 1
        t.hopeful = t.row <= MAX_ROW
        return
    t.row = 0
    # One at a time: a second one would take a CPU from the client that it waits for.
    if not cas64(&lane.polling, 0, 1):
        return
    until = now_ns() + lane.poll_ns
    while not lane_has_requests(lane):
        if now_ns() > until:
            t.misses += 1
            t.hopeful = t.misses < MAX_MISSES
            break
    else:
        t.misses = 0
    store64(&lane.polling, 0)


cdef void worker_note_wait(worker_thread_t* t, uint64_t ns) noexcept nogil:
    """A request came after ns nanoseconds of sleep, or of none."""
    if ns < AT_ONCE_NS:
        t.row += 1
        return
    t.calm = t.calm + 1 if ns < HOPE_NS and t.row <= MAX_ROW else 0
    t.hopeful = t.calm >= MIN_CALM
    t.row = 0


cdef void* slow_worker_serve(void* arg) noexcept nogil:
    cdef worker_thread_t* t = <worker_thread_t*> arg
    cdef lane_t* lane = t.lane
    cdef size_t got = 0, size
    cdef uint64_t unique
    # A reply that comes too late goes to what stands in the connection's place.
    while not load64(&lane.stopping) and slow_take(lane.slow, &t.w, &got):
        unique = (<uint64_t*> (t.w.data - REQUEST_HEAD))[1]
        store64(&t.hand.unique, unique & ~<uint64_t> FUSE_RESENT)
        size = answer_request(&t.w, got)
        store64(&t.w.serving, 0)
        if size:
            worker_reply(t, size, unique)
        store64(&t.hand.unique, 0)
    store64(&t.running, 0)
    lane_drop_workers(lane, 1)
    return NULL


cdef size_t worker_answer_or_put_off(worker_thread_t* t, size_t got) noexcept nogil:
    """0 if the slow threads will answer."""
    cdef size_t size = answer_request(&t.w, got)
    if size != PUT_OFF:
        return size
    if slow_put(t.lane.slow, &t.w, got):
        return 0
    # No room: to wait here costs others time, to refuse would cost data. Somebody else has to read
    # meanwhile, also one that is about to rest because it has just helped with this very request.
    lane_begin_blocking(t.lane)
    store64(&t.hand.waits, 1)
    t.w.may_wait = True
    size = answer_request(&t.w, got)
    t.w.may_wait = False
    store64(&t.hand.waits, 0)
    lane_end_blocking(t.lane)
    return size


cdef ssize_t worker_read_request(worker_thread_t* t) noexcept nogil:
    """As read(2), of the next request, to w.data - REQUEST_HEAD."""
    cdef lane_t* lane = t.lane
    cdef uint64_t began = 0
    cdef ssize_t got
    add64(&lane.reading, 1)
    if lane.poll_ns:
        if t.hopeful:
            worker_look_for_request(t)
        began = now_ns()
    got = read(lane.fd, t.w.data - REQUEST_HEAD, REQUEST_HEAD + MAX_IO)
    sub64(&lane.reading, 1)
    if lane.poll_ns and not t.hopeful:
        worker_note_wait(t, now_ns() - began)
    return got


cdef bint connection_lasts(lane_t* lane, ssize_t got) noexcept nogil:
    """After a read without a request. got 0: a socket's other end was closed. Waits if the read did not."""
    cdef pollfd wait
    if got == 0:
        return False
    if errno == EINTR or errno == ENOENT:
        return True             # ENOENT: the request was withdrawn while it was being read
    if errno == EAGAIN:
        wait.fd, wait.events = lane.fd, POLLIN
        poll(&wait, 1, -1)
        return True
    if not connection_ended(errno):
        store64(&lane.end_errno, <uint64_t> errno)
    return False


cdef bint worker_serve_request(worker_thread_t* t) noexcept nogil:
    """Reads a request and answers it. False if the connection has ended."""
    cdef lane_t* lane = t.lane
    cdef size_t size
    cdef uint64_t unique, payload
    cdef bint lasts
    cdef ssize_t got = worker_read_request(t)
    if got <= 0:
        return connection_lasts(lane, got)
    store64(&t.w.serving, 1)
    t.requests += 1
    payload = request_payload(&t.w, <size_t> got)
    t.long_request = request_takes_long(&t.w, <size_t> got, payload)
    # A worker that is woken for a shared request (by the request itself) reads if others wait.
    if payload < SHARED_BYTES and not load64(&lane.reading) and (
            t.long_request or (t.requests % LOOK_EVERY == 0 and lane_has_requests(lane))):
        lane_wake_workers(lane, 1)
    unique = (<uint64_t*> (t.w.data - REQUEST_HEAD))[1]
    store64(&t.hand.unique, unique & ~<uint64_t> FUSE_RESENT)
    if unique & FUSE_RESENT and is_refused(lane.shared.kept, unique):
        size = refuse_request(&t.w, unique, EIO)
    else:
        size = worker_answer_or_put_off(t, <size_t> got)
    store64(&t.w.serving, 0)
    lasts = size == 0 or worker_reply(t, size, unique)
    store64(&t.hand.unique, 0)
    return lasts


cdef void lane_drop_workers(lane_t* lane, uint64_t threads) noexcept nogil:
    cdef uint64_t one = 1
    if sub64(&lane.live, threads) == 0:
        # Nobody will answer any more: give the connection up, so that the kernel fails what waits
        # instead of letting it hang. dup2 keeps the descriptor's number taken.
        dup2(lane.null_fd, lane.fd)
        write(lane.done_fd, &one, sizeof(one))
