# SPDX-License-Identifier: Apache-2.0
"""Builds a source tree, and later uses all of it. Speaks as swap_image.c does.

python build_tree.py ARCHIVE DIRECTORY. Unpacks the tree into the directory, compiles its Python files, and
says "filled". After a line on its input it compares every file with the archive and loads every compiled
file, and says "used". Behind each word stand the seconds that it took.
"""
from __future__ import annotations

import marshal
import subprocess
import sys
import time
from pathlib import Path

HEADER_BYTES = 16  # of a .pyc file, before the code


def build(archive: str, place: Path) -> None:
    subprocess.run(["tar", "-xf", archive, "-C", place], check=True)
    # Python's library has files for its own tests that are not to compile: its exit status is 1 then.
    subprocess.run([sys.executable, "-W", "ignore", "-m", "compileall", "-qq", "-f", place], check=False)


def use(archive: str, place: Path) -> None:
    subprocess.run(["tar", "-df", archive, "-C", place], check=True)
    compiled = list(place.rglob("*.pyc"))
    if not compiled:
        raise SystemExit(f"expected compiled files below {place}, found none")
    for file in compiled:
        marshal.loads(file.read_bytes()[HEADER_BYTES:])


def main() -> None:
    archive, place = sys.argv[1], Path(sys.argv[2])
    for word, work in (("filled", build), ("used", use)):
        began = time.monotonic()
        work(archive, place)
        print(word, f"{time.monotonic() - began:.3f}", flush=True)
        if not sys.stdin.readline():
            return


main()
