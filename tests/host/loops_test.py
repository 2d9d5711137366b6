# SPDX-License-Identifier: Apache-2.0
"""What losetup says of loop devices, and how long it is waited for."""
from __future__ import annotations

import select
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from zramfs.host import bounded, loops, programs

# It says nothing before there is the file $0.go.
LOSETUP = """#!/bin/sh
until [ -e "$0.go" ]; do sleep 0.02; done
echo '{"loopdevices": [{"name": "/dev/loop7", "back-maj:min": " 0:77"},'
echo '{"name": "/dev/loop8", "back-maj:min": null}]}'
"""


@pytest.fixture
def losetup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "losetup"
    program.write_text(LOSETUP)
    program.chmod(0o755)
    monkeypatch.setattr(programs, "find", lambda name: str(program))
    monkeypatch.setattr(loops, "_loops", lambda: ["/dev/loop7"])
    return program


def test_losetup_that_does_not_return_is_given_up(losetup: Path) -> None:
    assert loops._backing_devices(0.3) == {}


def test_a_machine_that_stands_still_hides_no_loop_device(
    losetup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a minute in the first wait of 20 seconds: a device that is in use would seem to be unused."""
    stalls = [0.0]

    def wait(fds: list[int], _w: object, _x: object, seconds: float) -> tuple[list[int], ...]:
        if not stalls[0]:
            stalls[0] = 60.0
            Path(f"{losetup}.go").touch()
            return [], [], []
        return select.select(fds, [], [], seconds)

    monkeypatch.setattr(bounded, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + stalls[0]))
    monkeypatch.setattr(bounded, "select", SimpleNamespace(select=wait))
    assert loops._backing_devices(20.0) == {"/dev/loop7": "0:77", "/dev/loop8": ""}
