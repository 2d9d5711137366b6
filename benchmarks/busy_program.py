# SPDX-License-Identifier: Apache-2.0
"""A program whose memory is what swap gets: trees, texts, numbers, and tables of them.

python busy_program.py BYTES. It reads Python's own library, and keeps of each file the text, the parsed tree,
the code, an index of its words, and a table of where they stand. When it has so many bytes it writes "ready",
and waits for the end of its input.
"""
from __future__ import annotations

import ast
import contextlib
import itertools
import re
import struct
import sys
import sysconfig
from pathlib import Path

WORD = re.compile(r"\w+")


def resident() -> int:
    """Bytes of the program's anonymous memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise SystemExit("/proc/self/status has no RssAnon")


def work(file: Path) -> tuple[object, ...]:
    """All that is kept of one file."""
    text = file.read_text(errors="replace")
    tree: ast.Module | None = None
    code: object = None
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        tree = ast.parse(text)
        code = compile(tree, str(file), "exec")
    index: dict[str, list[int]] = {}
    for match in WORD.finditer(text):
        index.setdefault(match[0], []).append(match.start())
    places = b"".join(struct.pack("<QI", len(word), at) for word in index for at in index[word])
    return text, tree, code, index, places


def main() -> None:
    wanted = int(sys.argv[1])
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    if not files:
        raise SystemExit("Python's library has no source files here")
    kept = []
    for file in itertools.cycle(files):
        kept.append(work(file))
        if resident() >= wanted:
            break
    print("ready", flush=True)
    sys.stdin.read()


main()
