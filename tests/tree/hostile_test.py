# SPDX-License-Identifier: Apache-2.0
"""Any bytes at all, written to every file of the tree: taken, or refused with an errno that
docs/control.md promises, and then nothing has changed and nothing but the refusal is in the log."""
from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.control_page import errors, section, table
from tests.support.hostile_text import NAMES, NUMBERS, SIZES, phrases, texts
from tests.support.scale import scaled
from tests.support.unmounted import OK, Ours, device
from zramfs.device.commands import COMMANDS

EXAMPLES = scaled(50, 10)
STATES = ("before it has a size", "with data", "while disk is open")
OPEN = {"EACCES", "EBUSY", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENODEV", "ENOENT", "ENOTDIR", "ENXIO", "EPERM",
        "EROFS", "ETXTBSY"}
PROMISED = {f"zram/{row[0].strip('`')}": errors(row[4]) | (OPEN if "open(2)" in row[4] else set())
            for row in table(section("Attributes"))}
PROMISED |= {
    "memory/balloon": {"EINVAL"}, "memory/proactiveness": {"EINVAL", "ERANGE"},
    "control": {"EINVAL", "E2BIG", *OPEN}.union(*(errors(row[2]) for row in table(section("Commands")))),
}


WRITABLE = sorted(path for path, file in Ours(Path("/nowhere")).files.items() if file.write)

commands = st.builds(
    lambda name, equals, value: name.encode() + equals + value,
    st.sampled_from(sorted(COMMANDS)), st.sampled_from([b"=", b" = ", b"", b"=="]), st.one_of(phrases, texts),
)
lines = st.lists(st.one_of(commands, phrases), max_size=3).map(b"\n".join)
values = st.one_of(st.sampled_from(SIZES + NUMBERS + NAMES), texts, phrases)


async def hostile(path: str, state: str, data: bytes) -> None:
    async with device(Path("/nowhere")) as ours:
        if state != STATES[0]:
            await ours.done(("zram/disksize", "1M"))
            ours.store.write(0, b"text " * 2000 + os.urandom(8192))
        ours.lane.open_count = int(state == STATES[2])
        shown = [name for name, file in ours.files.items()
                 if name != "control" and (file.read or file.read_from)]
        before = {name: ours.read(name) for name in shown}
        answer = await ours.write(path, data)
        if answer != OK:
            assert answer in PROMISED[path]
            if path != "control":  # of several commands the first ones may have been done
                assert {name: ours.read(name) for name in shown} == before
            last = ours.device.stats().last_error
            assert last is not None and last.endswith(f"({answer})")
            last.encode()
        ours.read("control").encode()
        if ours.store:
            ours.store.check(3)


@pytest.mark.parametrize("path", WRITABLE)
def test_any_bytes_are_taken_or_refused_as_promised(
    path: str, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    longer = max(1, int(request.config.getoption("soak")))

    @settings(max_examples=EXAMPLES * longer, deadline=None, derandomize=longer == 1,
              suppress_health_check=[HealthCheck.too_slow])
    @given(st.sampled_from(STATES), lines if path == "control" else values)
    def run(state: str, data: bytes) -> None:
        trio.run(hostile, path, state, data)

    run()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
