# SPDX-License-Identifier: Apache-2.0
"""Swap whose daemon is killed while programs have most of their memory on it, and verify every byte."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.killer import Killer, found, kill_daemon, state
from tests.support.swap_load import build, fillers, group, until_swapped
from tests.support.whole import MIB, wait_until, zramfs
from zramfs.lifecycle import rundir

pytestmark = [
    pytest.mark.requires("root", "fuse", "loop", "swap", "memcg", "unsanitized"),
    pytest.mark.timeout(200),
    pytest.mark.soak,
]

KILLS = 15
# Seconds between two kills: the keeper starts the next standby when the last one serves.
PAUSES = (0.2, 1.0)
NAME = Path("killed")


def test_programs_on_swap_notice_no_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    kills = int(KILLS * max(1.0, request.config.getoption("soak")))
    program = build(tmp_path)
    zramfs("swap", NAME, "--size", "1G", "--priority", "32767")
    try:
        assert state(NAME).standby_pid, "swap always has a standby"
        with group(100 * MIB) as small, fillers(program, small, 300) as [filler]:
            until_swapped(small, 150 * MIB)
            with Killer.at_work(NAME, PAUSES) as killer:
                wait_until(lambda: killer.kills >= kills, "all kills", 120)
            filler.read_pass()
            filler.finish()
        log = found(NAME).log.read_text()
        assert {int(number) for number in re.findall(r"(\d+) are lost", log)} == {0}
        ends = set(re.findall(r"the daemon, process \d+, (.*)", log))
        assert ends == {"was ended by signal 9"}, log[-4000:]
        kill_daemon(NAME)
        wait_until(lambda: state(NAME).standby_pid != 0, "another standby", 30)
    finally:
        if rundir.find(str(NAME)):
            zramfs("stop", NAME)
