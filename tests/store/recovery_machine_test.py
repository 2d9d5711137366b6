# SPDX-License-Identifier: Apache-2.0
"""Any sequence of calls, in which the process is killed now and then, against a bytearray."""
from __future__ import annotations

import os
import random
import signal
import time

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.kill_points import PAGE, Op, apply, apply_to_model
from tests.support.page_kinds import KINDS
from tests.support.scale import scaled
from zramfs.codecs.codec import Codec
from zramfs.store.store import Store

PAGES = 700
SIZE = PAGES * PAGE


def any_op(rng: random.Random, wipe: bool) -> Op:
    """A store that wipes makes no units."""
    off, n = rng.randrange(SIZE - 1), rng.choice((1, 100, PAGE, 3 * PAGE, 90 * PAGE, 300 * PAGE))
    if rng.random() < .7:
        off &= -PAGE
    n = min(n, SIZE - off)
    return rng.choice([
        ["write", off, rng.choice(KINDS), rng.randrange(9), n], ["write", off, "random", rng.randrange(9), n],
        ["zero", off, n], ["zero", off, n], ["compact"], ["migrate"], ["recompress", 50], ["idle"],
        ["times", rng.random() < .5], ["balloon", rng.choice((0, 20, 300))], ["compact" if wipe else "units"],
        ["share"],
    ])


class KilledStore(RuleBasedStateMachine):
    """The store is in a memory file of the test's, and is adopted after each kill."""

    @initialize(wipe=st.booleans())
    def begin(self, wipe: bool) -> None:
        self.fd = os.memfd_create("killed")
        self.store = Store(SIZE, fd=self.fd, secondary=[Codec("zstd")], wipe=wipe)
        self.model = bytearray(SIZE)
        self.limit, self.wipe = 0, wipe

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            os.close(self.fd)

    @rule(seed=st.integers(0, 1 << 30), n=st.integers(1, 6))
    def work(self, seed: int, n: int) -> None:
        rng = random.Random(seed)
        for _turn in range(n):
            op = any_op(rng, self.wipe)
            apply(self.store, op)
            apply_to_model(self.model, op)

    @rule(mib=st.sampled_from([0, 64, 256]))
    def set_limit(self, mib: int) -> None:
        self.store.set_mem_limit(mib << 20)
        self.limit = mib << 20

    @rule()
    def adopt_at_rest(self) -> None:
        before, classes = self.store.stats(), self.store.classes()
        self.store.leave()
        self.store = Store.adopt(self.fd)
        assert self.store.classes() == classes and self.store.recovered.locks == 0
        after = self.store.stats()
        different = {name for name in before.__slots__ if getattr(before, name) != getattr(after, name)}
        # A page that has just left the balloon has no memory, and its pageblock is whole.
        assert different <= {"recoveries", "bytes_returned", "pageblocks_in_use", "frames_free", "resident",
                             "units_unpacked"}

    @rule(seed=st.integers(0, 1 << 30), n=st.integers(1, 4), delay=st.floats(0, 0.006))
    def kill_and_recover(self, seed: int, n: int, delay: float) -> None:
        """A child does the ops, until it is killed or has done all of them."""
        ops = [any_op(random.Random(seed + turn), self.wipe) for turn in range(n)]
        states = [bytes(self.model)]
        for op in ops:
            apply_to_model(self.model, op)
            states.append(bytes(self.model))
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(told, b".")
                for op in ops:
                    apply(self.store, op)
            finally:
                os._exit(0)
        os.close(told)
        assert os.read(ready, 1) == b"."
        os.close(ready)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.store.leave()
        self.store = Store.adopt(self.fd)
        assert self.store.recovered.lost == self.store.recovered.zspages_damaged == 0
        found = self.store.read(0, SIZE)
        for at in range(0, SIZE, PAGE):
            page = found[at:at + PAGE]
            assert page in [state[at:at + PAGE] for state in states], f"page {at // PAGE}"
        self.model = bytearray(found)

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "store"):
            self.store.check(3)
            assert self.store.stats().mem_limit == self.limit
            assert self.store.read(0, SIZE) == bytes(self.model)


TestKilledStore = KilledStore.TestCase
TestKilledStore.settings = settings(max_examples=scaled(25, 10), stateful_step_count=15, deadline=None)
