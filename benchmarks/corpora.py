# SPDX-License-Identifier: Apache-2.0
"""The three kinds of data of benchmarks/density, as image files in the cache directory.

process   the resident anonymous memory of busy_program.py, page by page as swap would get it
image     an ext4 file system with a random sample of the files of /usr (pages.py)
text      a random sample of the source and text files of /usr and of Python's library; each begins at a
          page, as it does in a file system
"""
from __future__ import annotations

import os
import random
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import pages
from benchmarks.tools import HERE, BenchmarkError, cache_dir

CORPORA = ("process", "image", "text")
PAGE = 4096
PRESENT = 1 << 63  # a bit of /proc/PID/pagemap
START_SECONDS = 300.0
TEXT_PLACES = (Path("/usr/include"), Path(sysconfig.get_path("stdlib")), Path("/usr/share"), Path("/usr/src"))
TEXT_SUFFIXES = {
    ".c", ".el", ".h", ".html", ".json", ".md", ".pl", ".pm", ".po", ".py", ".rst", ".txt", ".xml",
}
MOST_OF_FILE = 1 << 20


def corpus(name: str, size: int) -> Path:
    """The image of `size` bytes (a multiple of 1 MiB); made if missing."""
    if name == "image":
        return pages.image("real", size)
    target = cache_dir() / f"{name}-{size >> 20}M.img"
    if target.exists() and target.stat().st_size == size:
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="making-") as scratch:
        fresh = Path(scratch) / "image"
        with open(fresh, "wb") as out:
            for piece in _process(size) if name == "process" else _text(size):
                out.write(piece[:size - out.tell()])
                if out.tell() == size:
                    break
            else:
                raise BenchmarkError(f"expected {size >> 20} MiB of {name}, got {out.tell() >> 20}; "
                                     f"choose --size {max(1, out.tell() >> 20)}M or less")
        fresh.rename(target)
    return target


def _process(size: int) -> Iterator[bytes]:
    program = subprocess.Popen(
        # Code, data and stack of the interpreter come first, and are no whole part of it.
        [sys.executable, HERE / "busy_program.py", str(size + size // 8)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, start_new_session=True, env=os.environ | {"PYTHONHASHSEED": "0"},
    )
    assert program.stdin and program.stdout
    try:
        if program.stdout.readline() != b"ready\n":
            raise BenchmarkError(f"busy_program.py ended with status {program.wait(START_SECONDS)} before it "
                                 "had its memory")
        yield from _anonymous_pages(program.pid)
    finally:
        program.stdin.close()
        program.kill()
        program.wait()
        program.stdout.close()


def _anonymous_pages(pid: int) -> Iterator[bytes]:
    """The resident pages of the private writable mappings that have no file, by address."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory, \
            open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            words = line.split(maxsplit=5)
            if words[1] != "rw-p" or words[4] != "0" or (len(words) > 5 and words[5] != "[heap]"):
                continue
            first, last = (int(word, 16) for word in words[0].split("-"))
            pagemap.seek(first // PAGE * 8)
            entries = memoryview(pagemap.read((last - first) // PAGE * 8)).cast("Q")
            for number, entry in enumerate(entries):
                if entry & PRESENT:
                    memory.seek(first + number * PAGE)
                    yield memory.read(PAGE)


def _text(size: int) -> Iterator[bytes]:
    """In an order drawn once: one behind the other by name, 30 % would be headers of one package."""
    paths = sorted(
        path for place in TEXT_PLACES for folder, _, names in os.walk(place) for name in names
        if (path := Path(folder, name)).suffix in TEXT_SUFFIXES and path.is_file() and not path.is_symlink())
    random.Random(pages.SEED).shuffle(paths)
    for path in paths:
        with open(path, "rb") as file:
            data = file.read(MOST_OF_FILE)
        yield data + bytes(-len(data) % PAGE)
