# SPDX-License-Identifier: Apache-2.0
"""Modes, users and groups as people write them. Each raises ValueError that says what was expected."""
from __future__ import annotations

import grp
import pwd
import re
from collections.abc import Callable


def parse_mode(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{3,4}", text):
        raise ValueError(f"expected an octal mode such as 1777 or 0640, got {text!r}")
    return int(text, 8)


def parse_user(text: str) -> int:
    """A user's name or number."""
    return _identity(text, "user", lambda name: pwd.getpwnam(name).pw_uid)


def parse_group(text: str) -> int:
    """A group's name or number."""
    return _identity(text, "group", lambda name: grp.getgrnam(name).gr_gid)


def _identity(text: str, what: str, look_up: Callable[[str], int]) -> int:
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    try:
        return look_up(text)
    except (KeyError, ValueError):  # a NUL byte is a ValueError
        raise ValueError(f"expected a {what} of this machine or a number, got {text!r}") from None
