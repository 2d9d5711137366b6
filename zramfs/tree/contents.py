# SPDX-License-Identifier: Apache-2.0
"""What the tree keeps for its open files: bounded for each user, and in all.

A file is made when it is read at its start, and must stay the same for the small reads behind that. So a
reader with a small buffer has a copy, of `metrics` about 30 KiB. Whoever may open the files (--allow-other)
could fill the daemon's memory with copies, which no memory cgroup of his pays for. Equal copies are one, a
copy that was delivered as a whole is not kept, and beyond these bounds only the user who fills them sees an
error.
"""
from __future__ import annotations

import errno
from collections import Counter
from dataclasses import dataclass, field

from zramfs.errors import ZramfsError

# Open files; RLIMIT_NOFILE is 1024 for most processes, and one handle takes about 250 bytes here.
HANDLES_A_USER, HANDLES = 4096, 16384
# Of copies. A screen of `zramfs top` and each scraper need none, since they read with buffers of 64 KiB.
BYTES_A_USER, BYTES = 1 << 20, 4 << 20


@dataclass(eq=False, slots=True)
class Content:
    """data, and how many handles of which user have it."""

    key: object
    data: bytes
    holders: Counter[int] = field(default_factory=Counter)


class Contents:
    """owner: the uid of the daemon. He and root have a share that the others cannot take: their bounds count
    for each user and in all, his only for himself."""

    def __init__(self, owner: int) -> None:
        self._trusted = {0, owner}
        self._handles: Counter[int] = Counter()
        self._bytes: Counter[int] = Counter()
        self._latest: dict[object, Content] = {}  # by key, while anybody has it

    def admit(self, user: int) -> None:
        """One more handle. Raises ZramfsError(EMFILE)."""
        others = self._sum_of_others(self._handles)
        if self._handles[user] >= HANDLES_A_USER or user not in self._trusted and others >= HANDLES:
            raise ZramfsError(
                errno.EMFILE, f"uid {user} has {self._handles[user]} files of the tree open; expected at "
                f"most {HANDLES_A_USER} for a user, and {HANDLES} for all")
        self._handles[user] += 1

    def dismiss(self, user: int) -> None:
        _subtract(self._handles, user, 1)

    def keep(self, key: object, data: bytes, user: int) -> Content:
        """data for one handle; what others have of the same key is shared if it is equal. Raises
        ZramfsError(ENOMEM)."""
        content = self._latest.get(key)
        if content is None or content.data != data:
            content = Content(key, data)
        if not content.holders[user]:
            others = self._sum_of_others(self._bytes)
            size = len(data)
            if self._bytes[user] + size > BYTES_A_USER or user not in self._trusted and others + size > BYTES:
                raise ZramfsError(
                    errno.ENOMEM, f"uid {user} has {self._bytes[user]} bytes of half-read files open; "
                    f"expected at most {BYTES_A_USER} for a user, and {BYTES} for all. Read with a larger "
                    "buffer")
            self._bytes[user] += size
        content.holders[user] += 1
        self._latest[key] = content
        return content

    def drop(self, content: Content, user: int) -> None:
        _subtract(content.holders, user, 1)
        if not content.holders[user]:
            _subtract(self._bytes, user, len(content.data))
        if not content.holders and self._latest.get(content.key) is content:
            del self._latest[content.key]

    def _sum_of_others(self, counts: Counter[int]) -> int:
        """Of all but the trusted ones. There are few users with open files, and so few terms."""
        return sum(count for user, count in counts.items() if user not in self._trusted)


def _subtract(counts: Counter[int], user: int, number: int) -> None:
    counts[user] -= number
    if counts[user] <= 0:
        del counts[user]
