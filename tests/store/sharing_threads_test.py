# SPDX-License-Identifier: Apache-2.0
"""Sharing beside readers, writers and discarders of the same pages. All of it works without the GIL."""
from __future__ import annotations

import random
import time

from tests.store.store_threads_test import eager_switches, run
from tests.support.page_kinds import prose
from tests.support.page_users import CHUNK, USERS, PageUser, size_changes
from tests.support.share_tools import share
from tests.support.unit_tools import make_units
from zramfs.codecs.codec import Codec
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store

__all__ = ["eager_switches"]

PAGE = 4096
PAGES = 300


def test_pages_share_and_part_beside_all_that_uses_them() -> None:
    store = Store(PAGES * PAGE, secondary=[Codec("zstd", 1)])
    users = [PageUser(store, first, PAGES, 6, 0.3) for first in range(USERS)]
    joined = alone = 0

    def post_process() -> None:
        nonlocal joined, alone
        done = share(store)
        joined += done.joined
        alone += done.alone
        assert done.no_room == 0
        if joined % 3 == 0:
            job = Recompression(store, 1)
            while job.select(1 << 20) or job.step(1 << 20):
                pass
            job.finish()
            make_units(store)

    def housekeeping() -> None:
        store.compact()
        store.migration.run()
        store.mark_idle()
        stats = store.stats()
        assert stats.corrupt == stats.failed_reads == 0
        assert max(stats.shared_pages, stats.shared_objects, stats.shared_bytes) < 1 << 40
        time.sleep(0.001)

    run(*(user.job for user in users), post_process, housekeeping, seconds=3,
        enough=lambda: joined > 20)
    assert joined > 20
    for user in users:
        user.verify()
    store.check(3)
    store.zero(0, PAGES * PAGE)
    stats = store.stats()
    assert stats.shared_pages == stats.shared_objects == stats.shared_bytes == stats.mem_used_total == 0
    store.check(3)


def test_pages_that_many_read_while_their_object_comes_and_goes_are_always_the_same() -> None:
    store = Store(64 * PAGE)
    content = [prose(number % 4) for number in range(64)]
    for number, each in enumerate(content):
        store.write(number * PAGE, each)

    def read() -> None:
        number = random.randrange(60)
        assert store.read(number * PAGE, 4 * PAGE) == b"".join(content[number:number + 4])

    def write() -> None:
        """The same bytes again, which leave the object all the same."""
        number = random.randrange(64)
        store.write(number * PAGE, content[number])

    def churn() -> None:
        store.compact()
        store.migration.run()

    run(read, read, write, lambda: share(store) and None, churn)
    store.check(3)


def test_a_device_that_becomes_smaller_and_larger_beside_the_sharing_keeps_its_sums() -> None:
    store = Store(2 * CHUNK * PAGE, grows_to=2 * CHUNK * PAGE)
    user = PageUser(store, 0, PAGES, 6, 0.3)
    fill, change = size_changes(store)
    run(user.job, fill, fill, change, lambda: share(store) and None)
    user.verify()
    store.check(3)
