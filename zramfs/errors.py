# SPDX-License-Identifier: Apache-2.0
"""The error that is meant for people."""
from __future__ import annotations


class ZramfsError(OSError):
    """An expected failure: `errno` for a program, `sentence` for a person.

    The sentence says what was expected, what came, and what to do. It is what str() gives, so that
    the command line and the log print it as it stands. Raise it as ZramfsError(errno.EBUSY, "...").
    """

    def __init__(self, errno: int, sentence: str) -> None:
        super().__init__(errno, sentence)
        self._sentence = sentence

    @property
    def sentence(self) -> str:
        return self._sentence

    def __str__(self) -> str:
        return self._sentence
