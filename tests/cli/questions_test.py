# SPDX-License-Identifier: Apache-2.0
"""Commands that ask a device, when it hangs, is dead, or the command itself is ended."""
from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.child import stopped
from tests.support.commands import failure, kill_daemon, state_of
from tests.support.whole import MIB, ZRAMFS, Device, device, wait_until, zramfs
from zramfs.host import in_use

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run directories of this test alone."""
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Device]:
    with device(tmp_path / "z", MIB) as made:
        yield made


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_killed(pid: int) -> bool:
    """It is gone, or goes as soon as the request that it is in is answered: SIGKILL is pending."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    return fields["State"].startswith("Z") or bool(pending >> (signal.SIGKILL - 1) & 1)


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP),
    (signal.SIGKILL, -signal.SIGKILL),
])
def test_a_command_that_is_ended_leaves_no_process_in_its_write(
    made: Device, number: signal.Signals, status: int
) -> None:
    state = state_of(made.directory)
    with stopped(state.pid, 60):
        process = subprocess.Popen([*ZRAMFS, "control", made.directory, "compact"], stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: children(process.pid), "it asks the device in a child")
            [asking] = children(process.pid)
            time.sleep(0.3)  # into the write
            process.send_signal(number)
            assert process.wait(60) == status
            wait_until(lambda: is_killed(asking), "its child is killed")
        finally:
            process.kill()
            process.wait()
    wait_until(lambda: not in_use.users_of([made.directory], but=[state.pid]), "nobody uses the device")
    zramfs("stop", made.directory)
    zramfs("create", made.directory, "--size", MIB)


def test_train_gives_a_device_that_hangs_up_in_seconds(made: Device, tmp_path: Path) -> None:
    with stopped(state_of(made.directory).pid, 60):
        began = time.monotonic()
        said = failure("train", made.directory, "--output", tmp_path / "dict")
        assert time.monotonic() - began < 60, "not the 120 s that a sample may take"
    assert f"{made.directory} has not answered for 2 s" in said


def test_a_dead_device_is_explained_by_every_command(tmp_path: Path) -> None:
    place = tmp_path / "z"
    zramfs("create", place, "--size", MIB)
    kill_daemon(state_of(place))
    expected = f"{place}: the daemon is dead, and its data is lost; `zramfs stop {place}` cleans up\n"
    for words in (["control", place], ["control", place, "compact"],
                  ["report", place, "--output", tmp_path / "x.png"],
                  ["train", place, "--output", tmp_path / "dict"]):
        assert failure(*words) == f"zramfs: {expected}", words
    assert f"`zramfs stop {place}` cleans up" in zramfs("status", check=False).stderr
    assert f"`zramfs stop {place}` cleans up" in zramfs("top", "-i", "0.1", "-c", "1").stdout
    assert "had died" in zramfs("stop", place).stderr


def test_an_unknown_command_of_control_is_answered_with_the_nearest(made: Device) -> None:
    for wrong, right in (("compct", "compact[="), ("mem_limt=3M", "mem_limit=SIZE"), ("Reset", "reset")):
        assert f"did you mean {right}" in failure("control", made.directory, wrong)
    assert "did you mean" not in failure("control", made.directory, "frobnicate")
