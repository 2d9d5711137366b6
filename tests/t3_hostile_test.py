# SPDX-License-Identifier: Apache-2.0
"""Any bytes at all, written to every file of the tree: taken, or refused with an errno that
docs/control.md promises, and then nothing has changed and nothing but the refusal is in the log."""
from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import trio
from fakes import FakeLane
from hostile_text import NAMES, NUMBERS, SIZES, phrases, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from t3_docs_test import errors, section, table

from zramfs.config import DeviceConfig
from zramfs.control import COMMANDS
from zramfs.device import Device
from zramfs.tree import Directory, File, Node, build

EXAMPLES = 50
STATES = ("before it has a size", "with data", "while disk is open")
PROMISED = {f"zram/{row[0].strip('`')}": errors(row[4]) for row in table(section("Attributes"))}
PROMISED |= {
    "memory/balloon": {"EINVAL"}, "memory/proactiveness": {"EINVAL", "ERANGE"},
    "control": {"EINVAL", "E2BIG"}.union(*(errors(row[2]) for row in table(section("Commands")))),
}


def files(node: Node, above: str = "") -> dict[str, File]:
    if isinstance(node, Directory):
        found: dict[str, File] = {}
        for child in node.children:
            found |= files(child, f"{above}/{child.name}".lstrip("/"))
        return found
    return {above: node} if isinstance(node, File) else {}


def new_device() -> tuple[Device, FakeLane]:
    lane = FakeLane()
    config = DeviceConfig(directory=Path("/nowhere"), rundir=Path("/nowhere"), name="z")
    return Device(config, lane), lane


WRITABLE = sorted(path for path, file in files(build(new_device()[0], Path("/nowhere/disk"))).items()
                  if file.write)

commands = st.builds(
    lambda name, equals, value: name.encode() + equals + value,
    st.sampled_from(sorted(COMMANDS)), st.sampled_from([b"=", b" = ", b"", b"=="]), st.one_of(phrases, texts),
)
lines = st.lists(st.one_of(commands, phrases), max_size=3).map(b"\n".join)
values = st.one_of(st.sampled_from(SIZES + NUMBERS + NAMES), texts, phrases)


async def hostile(path: str, state: str, data: bytes) -> None:
    device, lane = new_device()
    if state != STATES[0]:
        await device.command("disksize=1M")
        lane.store.write(0, b"text " * 2000 + os.urandom(8192))
    lane.started, lane.open_count = True, state == STATES[2]
    tree = files(build(device, Path("/nowhere/disk")))
    shown = {name: file.read for name, file in tree.items() if file.read and name != "control"}
    before = {name: answer(read) for name, read in shown.items()}
    try:
        used = await tree[path].write(data)
    except OSError as error:
        assert errno.errorcode[error.errno] in PROMISED[path], error
        if path != "control":  # of several commands the first ones may have been done
            assert {name: answer(read) for name, read in shown.items()} == before
        last = device.stats().last_error
        assert last is not None and last.endswith(f"({errno.errorcode[error.errno]})")
        last.encode()
    else:
        assert used == min(len(data), 4096)
    tree["control"].read()
    if lane.store:
        lane.store.check(3)
    lane.open_count = 0
    await device.close()


def answer(read) -> bytes | int:
    """Some files cannot be read before the device has a size."""
    try:
        return read()
    except OSError as error:
        return error.errno


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
