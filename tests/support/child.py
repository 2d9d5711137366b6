# SPDX-License-Identifier: Apache-2.0
"""The one way to run a server in a process of its own: start it, hear it, stop it for a while, end it.

The test's own process must not serve a mount: a test that hangs on it in the kernel could not be ended.
Child starts any program. Talker is a Child that runs one of our modules and speaks this protocol: it says one
word a line on its stdout, and reads commands as lines on its stdin, which it answers with `= JSON`.
The functions for a process id are for daemons that a command has started.
"""
from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.support.paths import python_environment

TIMEOUT = 60.0  # seconds for everything that a child is waited for; of a busy machine ten can be a stall
LIFETIME = 200.0  # seconds until a Talker ends by itself with its stacks; below pytest's limit for a test
_ANSWER = "= "


def process_state(pid: int) -> str:
    """One letter, as in ps: R, S, D, T, Z."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stands_still(pid: int) -> bool:
    """Whether all threads of the process are stopped; a SIGSTOP reaches one after the other."""
    states = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            states.append(process_state(int(task.name)))
    return set(states) == {"T"}


def has_ended(pid: int) -> bool:
    """Nobody need have heard of it yet: a zombie holds nothing."""
    try:
        return process_state(pid) in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextlib.contextmanager
def stopped(pid: int, seconds: float = TIMEOUT) -> Iterator[None]:
    """The process stands still inside, but not longer than `seconds`, whatever hangs on it: a test in
    uninterruptible sleep could not wake it."""
    wake = f"import os, time; time.sleep({seconds}); os.kill({pid}, {int(signal.SIGCONT)})"
    waker = subprocess.Popen([sys.executable, "-S", "-c", wake])
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + TIMEOUT
    try:
        while not stands_still(pid):
            assert time.monotonic() < end, f"process {pid} does not stop"
            time.sleep(0.001)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        waker.kill()
        waker.wait(TIMEOUT)


def kill_wholly(pid: int) -> None:
    """SIGKILL; returns when the last thread has ended, which its parent need not have heard yet."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], TIMEOUT)[0], f"process {pid} does not end"
    finally:
        os.close(pidfd)


def stacks(pid: int, log: Path) -> str:
    """The log of a process that does not answer, with the stacks of its threads at its end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)
    return log.read_text(errors="replace")


class Child:
    """A program whose stderr is the file `log_path`; its stdout too, unless `talks`."""

    def __init__(
        self, words: Sequence[object], log_path: Path, *, env: Mapping[str, str] | None = None,
        talks: bool = False,
    ) -> None:
        self.log_path = log_path
        self._log_seen = 0
        pipe = subprocess.PIPE if talks else None
        with open(log_path, "w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in words], stdin=pipe or subprocess.DEVNULL, stdout=pipe or log,
                stderr=log, env=env,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def forget_log(self) -> None:
        self._log_seen = len(self.log)

    def new_log(self) -> str:
        """What it has logged since forget_log()."""
        return self.log[self._log_seen:]

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        return stopped(self.pid)

    def wait(self, seconds: float = TIMEOUT) -> int:
        """Its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            seen = stacks(self.pid, self.log_path)
            raise AssertionError(f"the child did not end within {seconds:g} s; its stacks:\n{seen}") from None

    def stop(self) -> int:
        """Asks it to end, as a service manager would; its exit status."""
        self.process.terminate()
        return self.wait()

    def end(self) -> None:
        """Whatever state it is in. Fails the test if it has to be killed."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        try:
            self.stop()
        finally:
            self.process.kill()
            self.process.wait(TIMEOUT)


class Talker(Child):
    """`python -m MODULE WORDS...`; said: the words that have come since forget()."""

    def __init__(self, module: str, *words: object, log_path: Path) -> None:
        command = [sys.executable, "-m", module, *words]
        super().__init__(command, log_path, env=python_environment(), talks=True)
        self.said: list[str] = []
        self._heard = 0  # words of `said` that hear() has gone past
        self._rest = b""
        os.set_blocking(self.process.stdout.fileno(), False)

    def _take(self, seconds: float) -> bool:
        """Moves what comes within this time to `said`. False when nothing came, or nothing more will."""
        out = self.process.stdout.fileno()
        # Not select(2), which takes no descriptor from 1024 on.
        poll = select.poll()
        poll.register(out, select.POLLIN)
        if not poll.poll(max(0.0, seconds) * 1000):
            return False
        chunk = os.read(out, 1 << 16)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self.said += [line.decode() for line in lines]
        return chunk != b""

    def hear(self, word: str) -> str:
        """Waits for a word that begins so, after the last one that was waited for."""
        end = time.monotonic() + TIMEOUT
        while True:
            for at in range(self._heard, len(self.said)):
                if self.said[at].startswith(word):
                    self._heard = at + 1
                    return self.said[at]
            self._heard = len(self.said)
            if not self._take(end - time.monotonic()):
                why = "has ended" if self.process.poll() is not None else f"did not say so in {TIMEOUT:g} s"
                raise AssertionError(
                    f"expected {word!r} of the child, but it {why}; it has said {self.said[-20:]}; "
                    f"its stacks:\n{stacks(self.pid, self.log_path)}"
                )

    def forget(self) -> None:
        """Drops what has come so far."""
        while self._take(0):
            pass
        self.said.clear()
        self._heard = 0

    def call(self, *words: str | int) -> object:
        """The answer to a command."""
        self.process.stdin.write((" ".join(map(str, words)) + "\n").encode())
        self.process.stdin.flush()
        return json.loads(self.hear(_ANSWER).removeprefix(_ANSWER))

    def wait(self, seconds: float = TIMEOUT) -> int:
        status = super().wait(seconds)
        while self._take(0):
            pass
        return status

    def end(self) -> None:
        try:
            super().end()
        finally:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.stdout.close()


# ---- the child's side ----------------------------------------------------------------------------------

def live_for_a_test() -> None:
    """To be called first: whatever hangs, this process ends after LIFETIME, and its log says where it was."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(LIFETIME, exit=True)


def say(word: str) -> None:
    os.write(1, f"{word}\n".encode())


def answer(value: object) -> None:
    say(_ANSWER + json.dumps(value))
