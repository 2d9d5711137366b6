# SPDX-License-Identifier: Apache-2.0
"""A store in a process of its own, which is looked at wherever it could be killed.

The process stops before each of its stores into the memory file (kill_points.c). The file is what a SIGKILL
would leave there: the test copies it, and adopts the copy. Ops are lists, so that the child and the test's
model understand the same: see apply().
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support import native
from tests.support.memory_file import MemoryFile
from tests.support.page_kinds import block, hard, noise, prose, record
from tests.support.paths import SUPPORT, python_environment
from tests.support.scale import scaled
from zramfs.codecs.codec import Codec
from zramfs.store.back_upkeep import BackUpkeep
from zramfs.store.backing import Backing
from zramfs.store.recompress import Recompression
from zramfs.store.resize import resize
from zramfs.store.secondary import drop_secondary, set_secondary
from zramfs.store.sharing import Sharing
from zramfs.store.store import Store
from zramfs.store.unit_making import UnitMaking
from zramfs.store.writeback import WritebackRun

PAGE = 4096
Op = Sequence[Any]
MAKERS = {"prose": prose, "hard": hard, "noise": noise, "record": record}


def content(op: Op) -> bytes:
    """Of ["write", offset, kind, seed, length]."""
    _, _, kind, seed, n = op
    return MAKERS[kind](seed)[:n] if kind in MAKERS else block(kind, seed, n)


def apply(store: Store, op: Op) -> None:
    match op[0]:
        case "write":
            store.write(op[1], content(op))
        case "zero":
            store.zero(op[1], op[2])
        case "read":
            store.read(op[1], op[2])
        case "compact":
            store.compact()
        case "migrate":
            store.migration.run()
        case "idle":
            store.mark_idle()
        case "times":
            store.access_times = op[1]
        case "balloon":
            store.balloon.set_target(op[1])
            store.balloon.adjust(1 << 20)
        case "recompress":
            job = Recompression(store, op[2] if len(op) > 2 else 1, max_pages=op[1])
            while job.select(1 << 30) or job.step(1 << 30):
                pass
            job.finish()
        case "take":
            set_secondary(store, op[1], Codec("zstd", op[2], record(op[3])[:1000]))
        case "drop":
            assert drop_secondary(store, op[1]) is op[2]
        case "units" | "upkeep":
            making = UnitMaking(store, joins=op[0] == "units", thorough=op[0] == "units")
            while making.step(1 << 30):
                pass
            making.finish()
        case "return":
            upkeep = BackUpkeep(store)
            while upkeep.step(1 << 30):
                pass
            assert upkeep.finish().pages == op[1]
        case "share":
            sharing = Sharing(store)
            while sharing.step(1 << 30):
                pass
            sharing.finish()
        case "write back":
            run = WritebackRun(store, *op[3:] or [4])
            run.select(op[1], op[2], None)
            while run.left:
                run.write()
            run.finish()
        case "note":
            store.note = op[1].encode() * op[2]
        case "resize":
            resize(store, op[1], discard=op[2])
        case _:
            raise AssertionError(f"no such op: {op}")


def apply_to_model(model: bytearray, op: Op) -> None:
    if op[0] == "write":
        data = content(op)
        model[op[1]:op[1] + len(data)] = data
    elif op[0] == "zero":
        model[op[1]:op[1] + op[2]] = bytes(op[2])
    elif op[0] == "resize":
        model[:] = model[:op[1]].ljust(op[1], b"\0")


def copy_of(fd: int) -> int:
    """A memory file with the same bytes, and holes where the other has them."""
    to = os.memfd_create("copy", os.MFD_CLOEXEC)
    size, at = os.fstat(fd).st_size, 0
    os.ftruncate(to, size)
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(fd, at, os.SEEK_HOLE)
        while at < end:
            at += os.pwrite(to, os.pread(fd, min(end - at, 1 << 20), at), at)
    return to


def held_by_frames(fd: int) -> int:
    """Bytes of memory that the frames of a memory file hold."""
    at, held, size = MemoryFile(fd).superblock.frames_off, 0, os.fstat(fd).st_size
    with contextlib.suppress(OSError):
        while at < size:
            at = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, at, os.SEEK_HOLE)
            held += end - at
            at = end
    return held


@functools.cache
def _library() -> Path:
    place = Path(tempfile.mkdtemp(prefix="points-"))
    return native.compiled(SUPPORT / "kill_points.c", place / "kill_points.so", "-shared", "-fPIC",
                           "-D_GNU_SOURCE", "-ldl")


# A migration has 1168 points, and a look takes 7 ms.
ALL_OF, STEP = scaled(100, 40), scaled(1, 7)


def each_point(
    setup: Sequence[Op], ops: Sequence[Op], look: Callable[[int, bytes, bytes], None], *, size: int,
    backing: Path | None = None, **how: Any,
) -> int:
    """Makes a store of `size` bytes, does the ops of setup and then the others one by one. look(fd, old, new)
    is called at every point of those, or after the first ALL_OF at every STEPth: the memory file, and the
    device before and after the op. How many points."""
    fd = os.memfd_create(f"points-{os.getpid()}")
    told, tell = os.pipe()
    heard, hear = os.pipe()
    words = json.dumps({"setup": list(setup), "ops": list(ops), "size": size, "how": how,
                        "backing": str(backing) if backing else None})
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.support.kill_points", str(fd), str(heard), str(tell)],
        pass_fds=(fd, heard, tell), stdin=subprocess.PIPE, stderr=log,
        env={**python_environment(), "LD_PRELOAD": str(_library())},
    )
    os.close(tell)
    os.close(heard)
    assert child.stdin is not None
    child.stdin.write(words.encode())
    child.stdin.close()
    model, found = bytearray(size), 0
    for op in setup:
        apply_to_model(model, op)
    try:
        for op in ops:
            old = bytes(model)
            apply_to_model(model, op)
            while (word := os.read(told, 1)) == b"p":
                if found < ALL_OF or found % STEP == 0:
                    look(fd, old, bytes(model))
                found += 1
                os.write(hear, b"g")
            log.seek(0)
            assert word == b"d", (op, log.read().decode())
    finally:
        child.kill()
        child.wait(60)
        log.close()
        for each in (fd, told, hear):
            os.close(each)
    return found


def _main(fd: int, heard: int, tell: int) -> None:
    words = json.load(sys.stdin)
    how = words["how"]
    if "secondary" in how:
        how["secondary"] = [Codec(name) for name in how["secondary"]]
    if words["backing"]:
        how["backing"] = Backing(words["backing"])
    store = Store(words["size"], fd=fd, **how)
    for op in words["setup"]:
        apply(store, op)
    points = ctypes.CDLL(None)
    frames = MemoryFile(fd).superblock.frames_off
    for op in words["ops"]:
        assert points.points_begin(fd, ctypes.c_long(frames), heard, tell) == 0
        try:
            apply(store, op)
        finally:
            points.points_end()
        store.check(2)
        os.write(tell, b"d")


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
