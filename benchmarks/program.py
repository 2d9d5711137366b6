# SPDX-License-Identifier: Apache-2.0
"""A program that works in phases: it says a word when one is over, and waits for a line before the next."""
from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

from benchmarks.tools import BenchmarkError, Interrupt

LOOK_SECONDS = 0.2
PHASE_SECONDS = 1800.0  # the longest of ours takes two minutes on a quiet machine


class Program:
    """words: the command. As a context manager it ends the program, with all its children, in any case."""

    def __init__(self, *words: object) -> None:
        self.words = " ".join(map(str, words))
        self._said = b""
        self._child = subprocess.Popen([*map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, start_new_session=True)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        # Until it is waited for, the number of its session is its own.
        if self._child.returncode is None:
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.communicate()

    @property
    def cpu(self) -> float:
        """Seconds of CPU, user and system, of the program and of those children that it has waited for."""
        fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def go(self) -> None:
        """The line that it waits for. If it has ended, wait_word() says so."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(b"\n")
            self._child.stdin.flush()

    def wait_word(self, word: str, interrupt: Interrupt) -> float:
        """The seconds behind `word`, once it is said. Raises BenchmarkError if anything else comes."""
        assert self._child.stdout is not None and self._child.stderr is not None
        end = time.monotonic() + PHASE_SECONDS
        out = self._child.stdout.fileno()
        while b"\n" not in self._said:
            interrupt.check()
            if time.monotonic() > end:
                raise BenchmarkError(f"`{self.words}` did not say {word!r} within {PHASE_SECONDS:.0f} s")
            if select.select([out], [], [], LOOK_SECONDS)[0]:
                some = os.read(out, 4096)
                if not some:
                    failure = self._child.stderr.read().decode(errors="replace").strip()
                    raise BenchmarkError(
                        f"`{self.words}` ended before {word!r}: {failure or '(it said nothing)'}")
                self._said += some
        line, _, self._said = self._said.partition(b"\n")
        found = line.decode(errors="replace").split()
        if len(found) != 2 or found[0] != word:
            raise BenchmarkError(f"expected `{self.words}` to say {word!r} and seconds, got {line!r}")
        return float(found[1])
