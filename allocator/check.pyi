# SPDX-License-Identifier: Apache-2.0
from .arena import Arena
from .pool import Pool

class CheckError(AssertionError):
    """An invariant is broken: the message begins with its label in layout.h."""

def check(what: Arena | Pool, level: int = 1) -> None:
    """Check an Arena or a Pool (with its arena), at rest. Level 1: counters and lists; level 2: every
    frame and object too. Raises CheckError, whose message begins with the label of the broken sum."""
