# SPDX-License-Identifier: Apache-2.0
"""C interface of background threads: those that may wait for memory, so that no other thread has to."""

# Starts a thread that takes no signal: 0, or an errno. Its first act is background_enter(). name: at
# most 15 bytes, for ps and top.
cdef int background_start(unsigned long* thread, void* (*work)(void*) noexcept nogil, void* arg,
                          const char* name) noexcept nogil
cdef void background_join(unsigned long thread) noexcept nogil
# Makes the calling thread's stack resident, and puts the thread first among those that want a CPU:
# who waits for memory waits for this thread.
cdef void background_enter() noexcept nogil
# Lets the calling thread sleep.
cdef void background_sleep(unsigned int ms) noexcept nogil
