# SPDX-License-Identifier: Apache-2.0
"""Ends a test run that its own time limit cannot end, and takes down what it left.

pytest's timer is a thread that needs the GIL. A fork does not give the GIL back while its child waits for a
stopped server, and a process with a thread in such a wait survives even SIGKILL until the server has gone.
So a second process watches the run: conftest.py tells it on a pipe how many seconds the present test may
take, 0 for no test.
"""
from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

from tests.support import leftovers
from tests.support.paths import ROOT

GRACE_SECONDS = 20  # for pytest's own timer to be the one that ends the run, with its stacks


class Guardian:
    """The side of the run."""

    def __init__(self) -> None:
        read_end, self._pipe = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.guardian", str(os.getpid()), leftovers.owner_name()],
            stdin=read_end, cwd=ROOT,
            start_new_session=True,  # Ctrl-C is for the run, and what it leaves for the guardian
        )
        os.close(read_end)

    def limit(self, seconds: float) -> None:
        os.write(self._pipe, f"{seconds}\n".encode())

    def end(self) -> None:
        os.close(self._pipe)
        self._process.wait()


def main(pid: int, owner: str) -> None:
    limit = 0.0
    since = time.monotonic()
    while leftovers.lives(owner):
        if select.select([sys.stdin], [], [], 1)[0]:
            said = os.read(sys.stdin.fileno(), 65536)
            if not said:
                break
            limit, since = float(said.split()[-1]), time.monotonic()
        if limit and time.monotonic() > since + limit + GRACE_SECONDS:
            print(f"\nguardian: a test took longer than {limit:g} s and did not end", file=sys.stderr)
            os.kill(pid, signal.SIGKILL)
            break
    for leftover in leftovers.sweep(lambda other: other == owner):
        print(f"guardian: took down {leftover}", file=sys.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
