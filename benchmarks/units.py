# SPDX-License-Identifier: Apache-2.0
"""What units of 16 pages win, and what they cost: python -m benchmarks.units [MIB]

Three corpora: the memory of a running program, an ext4 image of a part of /usr, and text. Of each, memory and
time of lz4 pages, of single zstd:3 pages, and of units of zstd 3. Memory is all that the memory file holds
(slot table, descriptors, frames), after both compactions. Times are CPU times of one thread.
"""
from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from zramfs.codecs.codec import Codec
from zramfs.store.recompress import Recompression
from zramfs.store.store import Store
from zramfs.store.unit_making import UnitMaking

PAGE = 4096
GROUP = 16 * PAGE
MIB = 1 << 20
SLICE = 1 << 30  # ns
TEXT = ("/usr/include", "/usr/share/doc", "/usr/share/perl", f"{sys.base_prefix}/lib/python3.11")
TREE = ("/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/share/perl", "/usr/include")
PROGRAM = """
import ast, sys
from pathlib import Path
files = sorted(Path(ast.__file__).parent.glob("*.py"))[:150]
kept = [ast.parse(file.read_text(errors="replace")) for file in files]
print("ready", flush=True)
sys.stdin.read()
"""


# ---- corpora --------------------------------------------------------------------------------------

def process_memory(most: int) -> bytes:
    """The private memory of a Python that has parsed a part of its library."""
    words = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = bytearray()
        with open(f"/proc/{child.pid}/maps") as maps, open(f"/proc/{child.pid}/mem", "rb", 0) as memory:
            for line in maps:
                words = line.split()
                low, high = (int(end, 16) for end in words[0].split("-"))
                if words[1].startswith("rw") and len(words) < 6 or words[-1] == "[heap]":
                    memory.seek(low)
                    found += memory.read(high - low)
                if len(found) >= most:
                    break
        child.communicate()
    return bytes(found[:most])


def files_below(places: tuple[str, ...], most: int, largest: int) -> Iterator[Path]:
    total = 0
    for place in places:
        here = 0
        for file in sorted(Path(place).glob("**/*")):
            if not file.is_symlink() and file.is_file() and 0 < file.stat().st_size <= largest:
                yield file
                here += file.stat().st_size
                total += file.stat().st_size
            if here >= most // len(places):
                break
        if total >= most:
            return


def text(most: int) -> bytes:
    found = bytearray()
    for file in files_below(TEXT, most, 1 << 18):
        data = file.read_bytes()
        if b"\0" not in data[:1000]:
            found += data
    return bytes(found[:most])


def file_system(most: int) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        tree, image = Path(place, "tree"), Path(place, "image")
        for file in files_below(TREE, most * 8 // 10, 4 * MIB):
            to = tree / file.relative_to("/")
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(file.read_bytes())
        subprocess.run(["mkfs.ext4", "-q", "-d", str(tree), str(image), f"{most // MIB}M"], check=True)
        return image.read_bytes()


# ---- measurements ---------------------------------------------------------------------------------

def settled(store: Store, data: int) -> float:
    """Memory over data, when both compactions have nothing left to win."""
    for _ in range(3):
        store.compact()
        store.migration.run()
    return os.fstat(store.migration.arena.fileno()).st_blocks * 512 / data


def filled(data: bytes, algo: str, level: int | None) -> Store:
    store = Store(len(data), algo=algo, level=level, secondary=[Codec("zstd", 3)])
    for off in range(0, len(data), MIB):
        store.write(off, data[off:off + MIB])
    return store


def recompressed(store: Store) -> None:
    job = Recompression(store, 1)
    while job.select(SLICE) or job.step(SLICE):
        pass
    job.finish()


def units_made(store: Store) -> None:
    making = UnitMaking(store)
    while making.step(SLICE):
        pass
    making.finish()


def us_a_page(store: Store, work: object) -> float:
    """Of the pages that were stored."""
    began = time.thread_time()
    work(store)
    return (time.thread_time() - began) / (store.stats().orig_data_size / PAGE) * 1e6


def read_in_order(store: Store, size: int) -> float:
    """GB/s, the best of five."""
    best = 0.0
    for _ in range(5):
        store.mark_idle()
        began = time.thread_time()
        for off in range(0, size, MIB // 8):
            store.read(off, MIB // 8)
        best = max(best, size / (time.thread_time() - began) / 1e9)
    return best


def read_cold(store: Store, size: int) -> tuple[float, float]:
    """us, median and p99, of a page of a group that is not the last one read."""
    rng, took = random.Random(1), []
    store.mark_idle()
    for _ in range(3000):
        off = rng.randrange(size // PAGE) * PAGE
        began = time.perf_counter()
        store.read(off, PAGE)
        took.append((time.perf_counter() - began) * 1e6)
    return statistics.median(took), statistics.quantiles(took, n=100)[98]


def report(name: str, data: bytes) -> None:
    lz4, single = filled(data, "lz4", None), filled(data, "lz4", None)
    memory = {"lz4": settled(lz4, len(data))}
    costs = {"zstd:3": us_a_page(single, recompressed)}
    memory["zstd:3"] = settled(single, len(data))
    costs["units"] = us_a_page(lz4, units_made)
    memory["units"] = settled(lz4, len(data))
    stats = lz4.stats()
    print(f"{name}: {len(data) // MIB} MiB, {stats.unit_pages} of {stats.orig_data_size // PAGE} pages in "
          f"{stats.units} units; compressed {stats.compr_data_size / len(data):.3f}")
    for kind, share in memory.items():
        print(f"  {kind:8} memory {share:.3f} of the data, {share / memory['lz4']:.2f} of lz4"
              + (f"; made in {costs[kind]:.1f} us a page" if kind in costs else ""))
    median, last = read_cold(lz4, len(data))
    print(f"  read: in order {read_in_order(lz4, len(data)):.2f} GB/s, "
          f"a cold page {median:.0f} us (p99 {last:.0f})")
    lz4.check(3)


def main() -> None:
    most = int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 128 * MIB
    for make in (process_memory, file_system, text):
        data = make(most)
        report(make.__name__.replace("_", " "), data[:len(data) // GROUP * GROUP])


if __name__ == "__main__":
    main()
