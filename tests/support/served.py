# SPDX-License-Identifier: Apache-2.0
"""A device served by zramfs.daemon.serve in a child process, without the command line."""
from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import python_environment

TIMEOUT = 20  # seconds for everything that a child is waited for


def run(*words, **how) -> subprocess.CompletedProcess[str]:
    """A command, ended after TIMEOUT at the latest."""
    return subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, **how)


class Served:
    """directory: of the tree. The child says READY and TEARDOWN on its stdout; its log is a file."""

    def __init__(
        self, place: Path, *, beat: bool = False, ready: str = "", user: int | None = None, **config
    ) -> None:
        self.directory, self.rundir = place / "tree", place / "run"
        for directory in (self.directory, self.rundir):
            directory.mkdir(exist_ok=True)
            if user is not None:
                os.chown(directory, user, user)
        self.log_path = self.rundir / "log"
        config = {"directory": str(self.directory), "rundir": str(self.rundir), "name": place.name, **config}
        how = json.dumps({"config": config, "beat": beat, "ready": ready, "user": user})
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.served", how], stdout=subprocess.PIPE, stderr=log,
                stdin=subprocess.DEVNULL, text=True, env=python_environment(),
            )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.said = ""

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def disk(self) -> Path:
        return self.directory / "disk"

    def hear(self, word: str) -> None:
        """Waits until the child has said `word`."""
        end = time.monotonic() + TIMEOUT
        while word not in self.said:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise AssertionError(f"no {word} in time, only {self.said!r}; log:\n{self.log}")
            chunk = self.process.stdout.read()
            if not chunk:
                raise AssertionError(f"the child ended before {word}, after {self.said!r}; log:\n{self.log}")
            self.said += chunk

    def forget(self) -> None:
        """Drops what the child has said so far."""
        # TypeError is how a text stream that does not block says that there is nothing to read.
        with contextlib.suppress(TypeError):
            self.process.stdout.read()
        self.said = ""

    def wait(self) -> int:
        status = self.process.wait(TIMEOUT)
        self.said += self.process.stdout.read() or ""
        return status

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def mounts(self) -> list[str]:
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return [line for line in lines if f" {self.directory}" in line or f" {self.rundir}" in line]

    def read(self, path: str) -> str:
        return (self.directory / path).read_text()

    def write(self, path: str, text: str) -> None:
        """One write(2), as of echo."""
        with open(self.directory / path, "wb", buffering=0) as file:
            file.write(text.encode())

    def end(self) -> None:
        """Whatever the state of the test is."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGUSR1)
                time.sleep(0.5)
                self.process.kill()
                self.process.wait(TIMEOUT)
                sys.stderr.write(f"the daemon did not end; its log:\n{self.log}\n")
        self.process.stdout.close()


@contextlib.contextmanager
def serving(place: Path, **how) -> Iterator[Served]:
    place.mkdir(exist_ok=True)
    child = Served(place, **how)
    try:
        child.hear("READY")
        yield child
    finally:
        child.end()


def _beat() -> None:
    """Shows on stdout that the interpreter runs, and keeps it busy, so that requests wait for it."""
    while True:
        until = time.monotonic() + 0.003
        while time.monotonic() < until:
            pass
        os.write(1, b".")
        time.sleep(0.0005)


def main() -> None:
    from zramfs.config import DeviceConfig
    from zramfs.daemon import serve

    how = json.loads(sys.argv[1])
    config = how["config"]
    config |= {name: Path(config[name]) for name in ("directory", "rundir")}

    def ready() -> None:
        exec(how["ready"])
        os.write(1, b"READY\n")
        if how["beat"]:
            threading.Thread(target=_beat, daemon=True).start()

    if how["user"] is not None:
        # Only here: he may not be able to read the interpreter's directory.
        os.setgroups([])
        os.setresgid(*[how["user"]] * 3)
        os.setresuid(*[how["user"]] * 3)
    status = serve(DeviceConfig(**config), ready, lambda: os.write(1, b"TEARDOWN\n"))
    os._exit(status) if how["beat"] else sys.exit(status)


if __name__ == "__main__":
    main()
