# SPDX-License-Identifier: Apache-2.0
"""Text that others wrote, made fit to be shown."""
from __future__ import annotations


def plain(text: str) -> str:
    """With a question mark for each character that would steer a terminal, and for each byte of a path
    that is no text."""
    return "".join(each if each.isprintable() else "?" for each in text)
