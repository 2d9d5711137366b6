# SPDX-License-Identifier: Apache-2.0
"""Work in several threads, whose first failure is the test's."""
from __future__ import annotations

import threading
from collections.abc import Callable


def together(*jobs: Callable[[], object]) -> None:
    """Runs each job in a thread of its own, waits for all, and raises what the first to fail raised."""
    failures: list[BaseException] = []

    def guarded(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
