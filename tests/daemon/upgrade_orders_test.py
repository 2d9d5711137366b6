# SPDX-License-Identifier: Apache-2.0
"""What a daemon says to its keeper for an upgrade, and when it refuses one."""
from __future__ import annotations

import errno
from pathlib import Path

import pytest

from zramfs.daemon import layouts
from zramfs.daemon.keeper_line import KeeperLine, LineSettings
from zramfs.errors import ZramfsError


class FakeKeeper:
    """pid: of no process."""

    pid, standby_pid = 1, 0

    def __init__(self) -> None:
        self.said: list[object] = []

    def serving(self, *, survives: bool, standby: bool) -> None:
        self.said.append(("serving", survives, standby))

    def ending(self) -> None:
        self.said.append("ending")

    def upgrade(self, program: Path, command: list[str], back: object) -> None:
        self.said.append(("upgrade", program, command, back))


def line(keeper: FakeKeeper) -> KeeperLine:
    settings = LineSettings(Path("/nowhere"), ["/bin/false"], False, lambda *_: None, lambda: None)
    return KeeperLine(keeper, settings)


@pytest.mark.parametrize("survives", [None, False], ids=["starts", "linux-6.8"])
async def test_a_device_that_would_not_survive_its_daemon_is_not_touched(survives: bool | None) -> None:
    keeper = FakeKeeper()
    made = line(keeper)
    if survives is not None:
        made.serving(survives)
    said = list(keeper.said)
    with pytest.raises(ZramfsError, match="Linux 6.9 or later: this device goes on") as caught:
        await made.upgrade(Path("/keeper"), ["/bin/true"])
    assert caught.value.errno == errno.EOPNOTSUPP and keeper.said == said


async def test_a_device_that_ends_is_not_upgraded() -> None:
    keeper = FakeKeeper()
    made = line(keeper)
    made.serving(True)
    made.ending()
    said = list(keeper.said)
    with pytest.raises(ZramfsError, match="the device ends"):
        await made.upgrade(Path("/keeper"), ["/bin/true"])
    assert keeper.said == said


def test_a_layout_is_read_if_this_version_writes_it_and_no_other_is() -> None:
    assert layouts.refusal(layouts.LAYOUTS) is None
    for name, version in layouts.LAYOUTS.items():
        assert f"got {version + 1}" in layouts.refusal({**layouts.LAYOUTS, name: version + 1})
        without = {each: other for each, other in layouts.LAYOUTS.items() if each != name}
        assert "got none" in layouts.refusal(without)
    # In a store of 1, units have no dictionary, and none lies on the backing store.
    assert layouts.LAYOUTS["store"] == 2 and layouts.refusal({**layouts.LAYOUTS, "store": 1}) is None
    assert "store in it: expected a layout that this version reads (1, 2), got 3" in layouts.refusal(
        {**layouts.LAYOUTS, "store": 3})
    assert "units: expected a layout that this version reads (none), got 1" in layouts.refusal(
        {**layouts.LAYOUTS, "units": 1})
