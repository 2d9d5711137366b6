# SPDX-License-Identifier: Apache-2.0
"""Pages of the files of this machine: programs, scripts, text."""
from __future__ import annotations

import functools
import random
import sys
from pathlib import Path

PAGE = 4096
_PLACES = ("/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/include", "/usr/share/perl",
           f"{sys.base_prefix}/lib")
_ENOUGH = 4096


@functools.cache
def _all() -> tuple[bytes, ...]:
    pages: list[bytes] = []
    for place in map(Path, _PLACES):
        here: list[bytes] = []
        for file in sorted(place.glob("**/*")) if place.is_dir() else ():
            if len(here) >= _ENOUGH:
                break
            if file.is_file() and not file.is_symlink():
                with open(file, "rb") as opened:
                    data = opened.read(64 * PAGE)
                here += [data[at:at + PAGE] for at in range(0, len(data) - PAGE + 1, PAGE)]
        pages += here
    random.Random(20).shuffle(pages)
    return tuple(pages)


def real_pages(number: int) -> list[bytes]:
    """As many whole pages, always the same on one machine, mixed from all places."""
    pages = _all()
    if len(pages) < number:
        raise AssertionError(f"only {len(pages)} pages below {', '.join(_PLACES)}; wanted {number}")
    return list(pages[:number])
