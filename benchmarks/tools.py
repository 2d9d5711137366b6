# SPDX-License-Identifier: Apache-2.0
"""What every part of the benchmark needs: commands, our C programs, a place for files, Ctrl-C."""
from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType

HERE = Path(__file__).resolve().parent
COMMAND_SECONDS = 300
CFLAGS = ("-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-pthread")


class BenchmarkError(Exception):
    """A sentence: what was expected, what came, what to do."""


class LeftOutError(Exception):
    """A peer cannot take part on this machine; the sentence says why."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM came and everything is to be taken down. str() is the signal's name."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupt:
    """While entered, SIGINT and SIGTERM only set `requested`: nothing is left half made or half taken
    down by an exception in the middle. The work calls check() between its steps."""

    def __init__(self) -> None:
        self.requested = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = number

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted(self.requested)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within, Ctrl-C reaches neither this process nor the programs it starts, which inherit the mask:
    losetup or fusermount3 cut short would leave behind what they were to take down."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def command(words: Sequence[str | Path], seconds: float = COMMAND_SECONDS, **environment: str) -> str:
    """Run a command to its end, away from the terminal's Ctrl-C, and return its standard output.

    Raises BenchmarkError with the command's own words when it fails or takes longer than `seconds`.
    """
    shown = " ".join(str(word) for word in words)
    try:
        while True:
            done = subprocess.run([str(word) for word in words], capture_output=True, text=True,
                                  timeout=seconds, start_new_session=True, stdin=subprocess.DEVNULL,
                                  env=os.environ | environment)
            # One that came between its fork and its own session: it has not begun.
            if done.returncode != -signal.SIGINT:
                break
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"`{shown}` did not end within {seconds:.0f} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or "(it said nothing)"
        raise BenchmarkError(f"`{shown}` ended with status {done.returncode}: {said}")
    return done.stdout


def need(program: str, package: str) -> str:
    """The program's path, or LeftOutError with the Debian package that has it."""
    # Debian keeps losetup and mkfs out of an ordinary user's PATH.
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise LeftOutError(f"{program} is not installed (Debian: apt-get install {package})")
    return found


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Look every 10 ms; BenchmarkError if `ready` has not come true in time."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise BenchmarkError(f"{what}: still waiting after {seconds:.0f} s")
        time.sleep(0.01)


def cache_dir() -> Path:
    """Our private directory for data images and built programs, kept from one run to the next.

    Raises BenchmarkError if the name is taken by somebody else: what lies there is executed.
    """
    base = Path(os.environ.get("ZRAMFS_BENCHMARK_CACHE",
                               f"{tempfile.gettempdir()}/zramfs-benchmarks-{os.getuid()}"))
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BenchmarkError(f"{base} must be a directory that only you can write; remove it, or set "
                             "ZRAMFS_BENCHMARK_CACHE to another place")
    return base


def built(name: str) -> Path:
    """The program of benchmarks/<name>.c, compiled if its source or flags have changed."""
    source = HERE / f"{name}.c"
    mark = hashlib.sha256(source.read_bytes() + " ".join(CFLAGS).encode()).hexdigest()[:12]
    program = cache_dir() / f"{name}-{mark}"
    if not program.exists():
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            raise BenchmarkError("no C compiler (Debian: apt-get install gcc, or set CC)")
        fresh = program.with_name(f"{program.name}.{os.getpid()}")
        command([compiler, *CFLAGS, source, "-o", fresh])
        fresh.rename(program)
    return program
