# SPDX-License-Identifier: Apache-2.0
"""Text of others, on a terminal."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zramfs.text.plain import plain


@pytest.mark.parametrize("text, shown", [
    ("/mnt/z 0", "/mnt/z 0"), ("/srv/日本", "/srv/日本"),
    ("a\x1b[2Jb", "a?[2Jb"), ("two\nlines\t", "two?lines?"),
    ("\udcff", "?"), ("\u202e", "?"), ("", ""),
])
def test_only_what_steers_a_terminal_is_replaced(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(st.text())
def test_whatever_comes_can_be_shown(text: str) -> None:
    assert len(plain(text)) == len(text) and plain(text).isprintable()
    plain(text).encode()
