# SPDX-License-Identifier: Apache-2.0
"""What the tests of the command line share: calls, what they left, and processes in the way."""
from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.child import has_ended, stopped
from tests.support.paths import ROOT
from tests.support.whole import ZRAMFS, wait_until, zramfs
from zramfs.host import locks, loops, mounts, process
from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import State


def state_of(directory: Path) -> State:
    """Of the device on `directory`, which must be there."""
    found = rundir.find(str(directory))
    assert found is not None
    state = found.read()
    assert state is not None
    return state


def failure(*words: object, code: int = 1) -> str:
    """What a call says on stderr that must fail with `code` and say nothing else."""
    done = zramfs(*words, check=False)
    assert (done.returncode, done.stdout) == (code, ""), done
    assert "Traceback" not in done.stderr
    return done.stderr


def nothing_left(directory: Path, base: Path) -> None:
    """No run directory, and no mount and no loop device below the parent of `directory`."""
    assert os.listdir(base) == []
    assert not [m for m in mounts.mounts() if m.mountpoint.is_relative_to(directory.parent)]
    assert not [path for path in backing_files() if path.startswith(str(directory.parent))]


def backing_files() -> list[str]:
    """Of all loop devices of this machine."""
    return [loops.backing_file(f"/dev/{name}") or "" for name in os.listdir("/sys/block")]


def rows(*words: object, code: int = 0) -> list[dict[str, object]]:
    """What `zramfs status` shows."""
    done = zramfs("status", "--json", *words, check=False)
    assert done.returncode == code, done
    return json.loads(done.stdout)["zramfs"]


def is_attached(state: State) -> bool:
    """Whether the loop device of a device still stands on it, and not on somebody else's file by now."""
    return loops.stands_on(state.loop, Path(state.disk), state.attached)


def kill_daemon(state: State) -> None:
    """With its keeper and its standby, so that the device dies. Each holds the lock of the run directory,
    which the kernel lets go of a moment after the end of the last one."""
    place = rundir.find(state.name)
    pids = [pid for pid in (state.keeper_pid, state.standby_pid, state.pid) if pid]
    with contextlib.ExitStack() as stack:
        for pid in (state.pid, state.keeper_pid):
            if pid and not has_ended(pid):
                stack.enter_context(stopped(pid))
        # A standby may have been started since.
        pids += [pid for pid in process.children_of(state.keeper_pid or -1) if pid not in pids]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(map(has_ended, pids)) and not state.alive(), "the daemon is dead")
    wait_until(lambda: place is None or not locks.is_locked(place.path), "its lock is free")


@contextlib.contextmanager
def child(code: str, *words: object, **more: object) -> Iterator[int]:
    """A Python process that runs `code`, says so, and stays: its pid."""
    command = [
        sys.executable,
        "-c",
        f"import os, sys, mmap\n{code}\nprint('there', flush=True)\nsys.stdin.read()",
    ]
    with subprocess.Popen(
        [*command, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more
    ) as process:
        try:
            assert process.stdout.readline() == "there\n"
            yield process.pid
        finally:
            process.kill()


def installed_program(place: Path) -> Path:
    """A command `zramfs` in `place` that runs what this interpreter would import."""
    program = place / "zramfs-command"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(ZRAMFS)} "$@"\n')
    program.chmod(0o755)
    return program


def systemd_units(target: Path) -> Path:
    """The units of systemd/, as an installation for this interpreter would have them."""
    program = installed_program(target.parent)
    target.mkdir()
    for unit in (ROOT / "systemd").glob("*.service"):
        (target / unit.name).write_text(unit.read_text().replace("/usr/bin/zramfs", str(program)))
    return target
