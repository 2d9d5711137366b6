# SPDX-License-Identifier: Apache-2.0
"""The stacks of all threads on a signal, for a process that must not end by it."""
from __future__ import annotations

import contextlib
import faulthandler
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def written_on(number: signal.Signals) -> Iterator[Callable[[], None]]:
    """Inside, and after the function that it gives was called, the signal writes the stacks of all Python
    threads to stderr, also while the main thread waits in a system call. To be entered in the main thread,
    before others are begun.

    By a thread that waits for the signal, and has the GIL when it looks: nobody's stack changes then.
    faulthandler.register() looks in the middle of whatever runs, and met a frame that was just being left:
    that ended a daemon, and its data (Python 3.11).
    """
    over = False
    thread: threading.Thread | None = None

    def start() -> None:
        nonlocal thread
        if thread is None:
            begun = threading.Thread(target=wait, name="stacks", daemon=True)
            begun.start()
            thread = begun

    def wait() -> None:
        while True:
            signal.sigwait({number})
            if over:
                return
            faulthandler.dump_traceback(all_threads=True)

    # In all threads that are begun from here on: only a signal that nobody takes can be waited for.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield start
    finally:
        over = True
        if thread is not None:
            signal.pthread_kill(thread.ident or 0, number)
            thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
