# SPDX-License-Identifier: Apache-2.0
"""The log of this process: one format for a terminal or a file, one for the journal."""
from __future__ import annotations

import logging
import os
import sys


class JournalFormatter(logging.Formatter):
    """As sd-daemon(3) wants it: a priority before each line; the journal has time and process itself."""

    _PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in self._PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


def log_to_stderr() -> None:
    """Sets the root logger up, unless somebody has."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    if _is_journal(2):
        handler.setFormatter(JournalFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    # A full disk or a closed terminal is no reason for a trace there.
    logging.raiseExceptions = False


def _is_journal(fd: int) -> bool:
    """Whether the descriptor is the stream that JOURNAL_STREAM names, and not what it was changed to."""
    try:
        seen = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{seen.st_dev}:{seen.st_ino}"
