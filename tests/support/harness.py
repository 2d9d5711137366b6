# SPDX-License-Identifier: Apache-2.0
"""A store and a lane, mounted on a file, in a process of their own.

The process takes commands as lines on its stdin and answers each with a line of JSON. It ends by
itself when its stdin closes, and with the stacks of all its threads in its log when it is older than
LIFETIME: a test that hangs on the mount in the kernel could not be ended otherwise.
"""
from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support import leftovers
from tests.support.paths import python_environment
from zramfs import mounting
from zramfs.lane import Lane
from zramfs.store import Store

TIMEOUT = 20.0  # seconds for an answer of the process
LIFETIME = 100.0  # below pytest's limit for a test


class Disk:
    """The test's side."""

    def __init__(self, place: Path, **how: object) -> None:
        self.path = place / "disk"
        self.path.touch()
        self.size = how["size"]
        self.log = place / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.harness", json.dumps({"path": str(self.path), **how})],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
                env=python_environment(),
            )
        try:
            self.answer()
        except BaseException:
            self.end()
            raise

    def answer(self) -> object:
        if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
            raise AssertionError(f"the server does not answer; its stacks:\n{self.log.read_text()}")
        line = self.process.stdout.readline()
        assert line, f"the server ended; its log:\n{self.log.read_text()}"
        return json.loads(line)

    def call(self, *words: str | int) -> object:
        """stats | open_count | store_stats | claim | release_claim | resize BYTES | mem_limit BYTES |
        abort | alive | error | check."""
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        return self.answer()

    @contextlib.contextmanager
    def open(self, flags: int = os.O_RDWR) -> Iterator[int]:
        fd = os.open(self.path, flags | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The server stands still meanwhile, but not longer than TIMEOUT, whatever hangs on it: a test
        in uninterruptible sleep could not wake it."""
        wake = f"import os, time; time.sleep({TIMEOUT}); os.kill({self.process.pid}, {int(signal.SIGCONT)})"
        waker = subprocess.Popen([sys.executable, "-c", wake])
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)
            waker.kill()
            waker.wait(TIMEOUT)

    def join(self) -> int:
        """Waits for the server to end after its connection did; its exit status."""
        return self.process.wait(TIMEOUT)

    def end(self) -> None:
        """Takes everything down, whatever state it is in."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(mounting.MountError):
            mounting.unmount(self.path, lazy=True)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
            self.process.kill()
            self.process.wait(TIMEOUT)
            raise AssertionError(f"the server did not end; its stacks:\n{self.log.read_text()}") from None
        finally:
            self.process.stdout.close()


@contextlib.contextmanager
def served(
    place: Path, size: int = 16 << 20, *, threads: int = 2, algo: str = "lz4", mem_limit: int = 0
) -> Iterator[Disk]:
    disk = Disk(place, size=size, threads=threads, algo=algo, mem_limit=mem_limit)
    try:
        yield disk
    finally:
        disk.end()


class Server:
    """The process's side."""

    def __init__(self, how: dict) -> None:
        options = {"fsname": f"disk:{leftovers.owner_of(how['path']) or 'by-hand'}", "subtype": "zramfs-disk",
                   "default_permissions": True}
        self.how = how
        descriptor = mounting.mount_file(how["path"], options=options)
        self.lane = Lane(descriptor, threads=how["threads"], poll_us=100)
        self.store = self.new_store(how["size"])
        self.lane.set_store(self.store)
        self.lane.start()
        os.stat(how["path"])

    def new_store(self, size: int) -> Store | None:
        return Store(size, algo=self.how["algo"], mem_limit=self.how["mem_limit"]) if size else None

    def run(self, command: str, *arguments: str) -> object:
        match command:
            case "stats":
                return dataclasses.asdict(self.lane.stats())
            case "store_stats":
                return dataclasses.asdict(self.store.stats())
            case "open_count" | "alive" | "error":
                return getattr(self.lane, command)
            case "claim" | "release_claim" | "abort":
                return getattr(self.lane, command)()
            case "resize":
                old, self.store = self.store, self.new_store(int(arguments[0]))
                self.lane.set_store(self.store)
                if old:
                    old.close()
                return self.lane.notify_size()
            case "mem_limit":
                return self.store.set_mem_limit(int(arguments[0]))
            case "check":
                return self.store.check(1)
        raise ValueError(command)

    def serve(self) -> int:
        """Until stdin closes, or the connection ends."""
        while True:
            ready, _, _ = select.select([0, self.lane.done_fd], [], [])
            if 0 not in ready:
                break
            line = sys.stdin.readline()
            if not line:
                break
            print(json.dumps(self.run(*line.split())), flush=True)
        if not self.lane.join(TIMEOUT):
            faulthandler.dump_traceback()
            self.lane.abort()
            return 1
        return 0


def main() -> int:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    faulthandler.dump_traceback_later(LIFETIME, exit=True)
    server = Server(json.loads(sys.argv[1]))
    print(json.dumps("mounted"), flush=True)
    return server.serve()


if __name__ == "__main__":
    sys.exit(main())
