# SPDX-License-Identifier: Apache-2.0
"""What a test serves in a child process, without the command line: a bare lane with a store on one file, or
a whole device with its tree, as zramfs.daemon.serve() makes it."""
from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support import leftovers
from tests.support.child import TIMEOUT, Talker, answer, live_for_a_test, say
from zramfs.host import fusermount
from zramfs.lane.lane import Lane
from zramfs.store.store import Store

_MODULE = "tests.support.served"


class ServedLane(Talker):
    """path: of the file that is the disk. Commands for call(): stats | open_count | store_stats | claim |
    release_claim | resize BYTES | mem_limit BYTES | abort | alive | error | check."""

    def __init__(self, place: Path, *, size: int, **how: object) -> None:
        self.path, self.size = place / "disk", size
        self.path.touch()
        how = json.dumps({"path": str(self.path), "size": size, **how})
        super().__init__(_MODULE, "lane", how, log_path=place / "log")

    @contextlib.contextmanager
    def open(self, flags: int = os.O_RDWR) -> Iterator[int]:
        fd = os.open(self.path, flags | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def end(self) -> None:
        """Its mount goes first, so that it need not wait for anybody who has the file open."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(fusermount.MountError):
            fusermount.unmount(self.path, lazy=True)
        super().end()


class ServedDevice(Talker):
    """directory: of the tree. It says READY and TEARDOWN, and with `beat` a dot whenever Python runs.

    ready: Python code that runs when it is ready. user: the uid whose device it is. config: of DeviceConfig.
    """

    def __init__(
        self, place: Path, *, beat: bool = False, ready: str = "", user: int | None = None, **config: object
    ) -> None:
        self.directory, self.rundir = place / "tree", place / "run"
        for directory in (self.directory, self.rundir):
            directory.mkdir(exist_ok=True)
            if user is not None:
                os.chown(directory, user, user)
        config = {"directory": str(self.directory), "rundir": str(self.rundir), "name": place.name, **config}
        how = json.dumps({"config": config, "beat": beat, "ready": ready, "user": user})
        super().__init__(_MODULE, "device", how, log_path=self.rundir / "log")

    @property
    def disk(self) -> Path:
        return self.directory / "disk"

    def mounts(self) -> list[str]:
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return [line for line in lines if f" {self.directory}" in line or f" {self.rundir}" in line]

    def read(self, path: str) -> str:
        return (self.directory / path).read_text()

    def write(self, path: str, text: str) -> None:
        """One write(2), as of echo."""
        with open(self.directory / path, "wb", buffering=0) as file:
            file.write(text.encode())


@contextlib.contextmanager
def _serving(child: Talker) -> Iterator[None]:
    try:
        child.hear("READY")
        yield
    finally:
        child.end()


@contextlib.contextmanager
def served_lane(
    place: Path, size: int = 16 << 20, *, threads: int = 2, algo: str = "lz4", mem_limit: int = 0
) -> Iterator[ServedLane]:
    child = ServedLane(place, size=size, threads=threads, algo=algo, mem_limit=mem_limit)
    with _serving(child):
        yield child


@contextlib.contextmanager
def served_device(place: Path, **how: object) -> Iterator[ServedDevice]:
    place.mkdir(exist_ok=True)
    child = ServedDevice(place, **how)
    with _serving(child):
        yield child


# ---- the child's side ----------------------------------------------------------------------------------

class LaneServer:
    """A lane with a store, mounted on a file."""

    def __init__(self, how: dict) -> None:
        options = {"fsname": f"disk:{leftovers.owner_of(how['path']) or 'by-hand'}", "subtype": "zramfs-disk",
                   "default_permissions": True}
        self.how = how
        descriptor = fusermount.mount_file(how["path"], options=options)
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
        """Until SIGTERM or the end of stdin, or until the connection ends."""
        awoken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes)
        signal.signal(signal.SIGTERM, lambda *_: None)
        say("READY")
        while True:
            ready = select.select([0, awoken, self.lane.done_fd], [], [])[0]
            if awoken in ready or 0 not in ready:
                break
            line = sys.stdin.readline()
            if not line:
                break
            live_for_a_test()  # it may serve all tests of a file
            answer(self.run(*line.split()))
        if not self.lane.join(TIMEOUT):
            faulthandler.dump_traceback()
            self.lane.abort()
            return 1
        return 0


def serve_lane(how: dict) -> int:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    return LaneServer(how).serve()


def _beat() -> None:
    """Shows that the interpreter runs, and keeps it busy, so that requests wait for it."""
    while True:
        until = time.monotonic() + 0.003
        while time.monotonic() < until:
            pass
        say(".")
        time.sleep(0.0005)


def serve_device(how: dict) -> int:
    from zramfs.daemon.daemon import serve_device as serve
    from zramfs.model.config import Algorithm, DeviceConfig

    config = how["config"]
    config |= {name: Path(config[name]) for name in ("directory", "rundir")}
    config["algorithms"] = tuple(map(Algorithm, config.get("algorithms", ["lz4"])))

    def ready() -> None:
        exec(how["ready"], {})
        say("READY")
        if how["beat"]:
            threading.Thread(target=_beat, daemon=True).start()

    if how["user"] is not None:
        # Only here: this user may not be able to read the interpreter's directory.
        os.setgroups([])
        os.setresgid(*[how["user"]] * 3)
        os.setresuid(*[how["user"]] * 3)
    status = serve(DeviceConfig(**config), ready, lambda: say("TEARDOWN"))
    if how["beat"]:
        os._exit(status)
    return status


if __name__ == "__main__":
    live_for_a_test()
    sys.exit({"lane": serve_lane, "device": serve_device}[sys.argv[1]](json.loads(sys.argv[2])))
