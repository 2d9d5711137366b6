# SPDX-License-Identifier: Apache-2.0
"""The sections and tables of docs/control.md, for tests that hold the code against them."""
from __future__ import annotations

import re

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "control.md").read_text()


def section(title: str) -> str:
    """The text from a heading to the next one of any level."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert match, f"docs/control.md has no section {title}"
    return match[1]


def table(text: str) -> list[list[str]]:
    """The rows of the first table, without its two lines of heading."""
    first = re.search(r"(^\|.*\n)+", text, re.MULTILINE)
    rows = first[0].splitlines() if first else []
    cells = ([cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows)
    return list(cells)[2:]


def errors(cell: str) -> set[str]:
    return set(re.findall(r"\bE[A-Z0-9]{3,}\b", cell))
