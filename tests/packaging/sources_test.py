# SPDX-License-Identifier: Apache-2.0
"""Small rooms: how long files and functions may be, and that what a comment or a page cites is there."""
from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

MOST_LINES, MOST_OF_A_FUNCTION = 450, 40
REASON = "Long:"  # begins the sentence of a docstring that says why a function is longer
SOURCES = sorted(
    path for place in ("allocator", "zramfs") for path in (ROOT / place).rglob("*")
    if path.suffix in (".py", ".pyx", ".pxd", ".pyi", ".h", ".c"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
_FUNCTION = re.compile(r"( *)(?:async def|def|cdef|cpdef)\b[^=]*\(")
_CITED = re.compile(r"(?<![\w./*-])((?:[\w-]+/)*[\w-]+\.(?:py|pyx|pxd|md|h|c))(?![\w/])")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[tuple[str, int, str]]:
    """Head, number of lines and text of each function. It ends before the next line that stands no deeper."""
    lines = path.read_text().splitlines()
    for start, line in enumerate(lines):
        if not (found := _FUNCTION.match(line)) or line.lstrip().startswith("#"):
            continue
        head = next((number for number in range(start, min(start + 12, len(lines)))
                     if lines[number].rstrip().endswith(":")), None)
        if head is None:
            continue  # a declaration
        last = head
        for number in range(head + 1, len(lines)):
            text = lines[number]
            if text.strip():
                if len(text) - len(text.lstrip()) <= len(found[1]):
                    break
                last = number
        yield line.strip(), last - start + 1, "\n".join(lines[start:last + 1])


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_file_is_a_small_room(path: Path) -> None:
    length = len(path.read_text().splitlines())
    assert length <= MOST_LINES, f"{named(path)} has {length} lines: expected at most {MOST_LINES}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix in (".py", ".pyx")], ids=named)
def test_a_long_function_says_why(path: Path) -> None:
    long = [(head, length) for head, length, text in functions(path)
            if length > MOST_OF_A_FUNCTION and REASON not in text]
    assert not long, f"expected at most {MOST_OF_A_FUNCTION} lines, or a docstring with `{REASON} ...`"


def known_names() -> tuple[set[str], set[str]]:
    """Paths of the repository, and their last parts."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    paths = set(done.stdout.splitlines())
    return paths, {path.rpartition("/")[2] for path in paths}


def missing(text: str) -> list[str]:
    """What looks like a file of ours and is none. A path may be written from the root or from a package."""
    paths, last = known_names()
    found = []
    for cited in dict.fromkeys(_CITED.findall(text)):
        whole = any(path == cited or path.endswith(f"/{cited}") for path in paths)
        if not (whole if "/" in cited else cited in last):
            found.append(cited)
    return found


# Files of the system, of the kernel's source and of programs, which our texts name too.
FOREIGN = {
    "malloc.h", "zdict.h", "zstd.h", "linux/btrfs.h", "linux/capability.h", "linux/fs.h", "linux/fuse.h",
    "linux/stat.h",
    "block/genhd.c", "mm/zsmalloc.c", "mm/swapfile.c",
}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_comment_cites_what_is_there(path: Path) -> None:
    text = path.read_text()
    if path.suffix in (".h", ".c"):
        said = "\n".join(re.findall(r"/\*.*?\*/", text, re.S))
    else:
        said = "\n".join(re.findall(r'"""(?:.|\n)*?"""|#.*', text))
    assert set(missing(said)) <= FOREIGN


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_a_page_names_files_that_are_there(path: Path) -> None:
    quoted = "\n".join(re.findall(r"`([^`\n]+)`", path.read_text()))
    assert set(missing(quoted)) <= FOREIGN
