# SPDX-License-Identifier: Apache-2.0
"""Which layouts this version writes, and which ones of other versions it reads.

A daemon leaves a memory file, a page and papers to its successor, which the keeper starts. Where that is of
another version (`zramfs upgrade`), both have to mean the same by each of them.
"""
from __future__ import annotations

from collections.abc import Mapping

from zramfs.device import takeover
from zramfs.keeper.client import MESSAGES_VERSION

from .papers import PAPERS_VERSION

LAYOUTS = {**takeover.LAYOUTS, "papers": PAPERS_VERSION, "messages": MESSAGES_VERSION}
# By the same names. Add an older number here when the code that reads it is there, and a test of it.
READABLE = {name: {version} for name, version in LAYOUTS.items()}
READABLE["store"].add(1)  # units without a dictionary
_NAMES = {
    "memory": "the memory file", "store": "the store in it", "page": "the page of the lane",
    "settings": "the settings", "papers": "the papers of the daemon",
    "messages": "what is said to the keeper",
}


def refusal(found: Mapping[str, int]) -> str | None:
    """Why this version can't take over from a daemon that writes these; None if it can."""
    for name in (*READABLE, *found):
        if found.get(name) not in READABLE.get(name, ()):
            read = ", ".join(map(str, sorted(READABLE.get(name, ())))) or "none"
            return (f"{_NAMES.get(name, name)}: expected a layout that this version reads ({read}), "
                    f"got {found.get(name, 'none')}")
    return None
