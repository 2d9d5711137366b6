# SPDX-License-Identifier: Apache-2.0
"""The queue of the slow threads; see slow.pxd."""
from libc.string cimport memcpy

from allocator.prim cimport (
    add64, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, store64,
)
from zramfs.lane.worker cimport REQUEST_HEAD, worker_t


cdef void slow_init(slow_t* s) noexcept nogil:
    pthread_mutex_init(&s.lock, NULL)


cdef void resting_call_locked(slow_t* s) noexcept nogil:
    """Wakes the thread that rests since the shortest time, if one does."""
    cdef resting_t* last = s.resting
    if last != NULL:
        s.resting = last.before
        last.is_called = True
        # Under the lock: it cannot go before this has come back.
        pthread_cond_signal(&last.call)


cdef void resting_wait_locked(slow_t* s) noexcept nogil:
    """Until called. The lock is not held meanwhile."""
    cdef resting_t me
    pthread_cond_init(&me.call, NULL)
    me.is_called = False
    me.before = s.resting
    s.resting = &me
    while not me.is_called:
        pthread_cond_wait(&me.call, &s.lock)
    pthread_cond_destroy(&me.call)


cdef bint slow_put(slow_t* s, worker_t* w, size_t got) noexcept nogil:
    cdef put_off_t* p
    cdef bint payload = got > REQUEST_HEAD
    cdef bint room
    pthread_mutex_lock(&s.lock)
    room = s.waiting < SLOW_QUEUE and not s.ending and (not payload or s.spares > 0)
    if room:
        p = &s.queue[(s.first + s.waiting) % SLOW_QUEUE]
        p.got, p.began, p.done, p.data = got, w.began, w.done, NULL
        if payload:
            p.data = w.data
            s.spares -= 1
            w.data = s.spare[s.spares]
        else:
            memcpy(p.head, w.data - REQUEST_HEAD, REQUEST_HEAD)
        s.waiting += 1
        resting_call_locked(s)
    # Before somebody can take it: whoever has the answer finds the request counted.
    add64(&s.put_off if room else &s.refused, 1)
    pthread_mutex_unlock(&s.lock)
    if room:
        w.began = w.done = 0
    return room


cdef bint slow_take(slow_t* s, worker_t* w, size_t* got) noexcept nogil:
    cdef put_off_t* p
    cdef bint more
    pthread_mutex_lock(&s.lock)
    while s.waiting == 0 and not s.ending:
        resting_wait_locked(s)
    more = not s.ending
    if more:
        p = &s.queue[s.first]
        s.first = (s.first + 1) % SLOW_QUEUE
        s.waiting -= 1
        if p.data != NULL:
            s.spare[s.spares] = w.data
            s.spares += 1
            w.data = p.data
        else:
            memcpy(w.data - REQUEST_HEAD, p.head, REQUEST_HEAD)
        got[0], w.began, w.done = p.got, p.began, p.done
        # Mark it as being served before it leaves the queue, so that lane_is_idle() never misses it.
        store64(&w.serving, 1)
    pthread_mutex_unlock(&s.lock)
    return more


cdef void slow_end(slow_t* s) noexcept nogil:
    pthread_mutex_lock(&s.lock)
    s.ending = True
    while s.resting != NULL:
        resting_call_locked(s)
    pthread_mutex_unlock(&s.lock)


cdef bint slow_idle(slow_t* s) noexcept nogil:
    cdef bint idle
    pthread_mutex_lock(&s.lock)
    idle = s.waiting == 0
    pthread_mutex_unlock(&s.lock)
    return idle
