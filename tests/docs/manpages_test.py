# SPDX-License-Identifier: Apache-2.0
"""The manual pages: correct for mandoc and groff, and complete beside the command line."""
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from tests.support.paths import ROOT
from zramfs.cli import zramfs

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.[1-8]"))


def section(title: str) -> str:
    """The source of a command's section in zramfs(1), up to the next heading of any level."""
    text = (DOCS / "zramfs.1").read_text()
    match = re.search(rf"^\.SS {title}\n(.*?)(?=^\.S[SH] )", text, re.MULTILINE | re.DOTALL)
    assert match, f"docs/zramfs.1 has no section {title}"
    return match[1]


@pytest.mark.requires("mandoc", "groff")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_wrong_with_a_page(page: Path) -> None:
    for command in (
        ["mandoc", "-T", "lint", "-W", "warning", page],
        ["groff", "-t", "-man", "-ww", "-z", "-T", "utf8", page],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), command


@pytest.mark.parametrize("name", [name for name, command in zramfs.commands.items() if not command.hidden])
def test_every_option_of_a_command_is_in_its_section(name: str) -> None:
    text = section(name).replace(r"\-", "-")
    for parameter in zramfs.commands[name].params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            for option in (*parameter.opts, *parameter.secondary_opts):
                assert re.search(rf"(?<![-\w]){option}\b", text), f"{name} {option}"


def test_every_page_can_be_asked_for() -> None:
    """The first word of .TH and the section are what man(1) looks for."""
    assert PAGES
    for page in PAGES:
        [heading] = re.findall(r"^\.TH (\S+) (\d)", page.read_text(), re.MULTILINE)
        assert (heading[0].lower().replace(r"\-", "-"), heading[1]) == (page.stem.lower(), page.suffix[1:])
