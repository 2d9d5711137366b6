# SPDX-License-Identifier: Apache-2.0
"""zramfs doctor"""
from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .output import print_object

if TYPE_CHECKING:
    from zramfs.doctor.checks import Finding

_COLOURS = {"ok": "green", "degraded": "yellow", "missing": "red"}


@click.command()
@click.option("-J", "--json", "as_json", is_flag=True, help="As JSON.")
def doctor(as_json: bool) -> int:
    """Tell what on this machine stands in the way, what it is needed for, and what to do.

    Makes a small device in a temporary directory, and takes it down again. The exit status is 0
    if devices can be made, 1 if not.
    """
    from zramfs.doctor import checks as examination
    from zramfs.doctor import trial
    from zramfs.host.machine import Machine

    findings = examination.examine(Machine(path=os.environ["PATH"]), trial.run)
    able = examination.able(findings)
    if as_json:
        print_object({"able": able, "findings": [asdict(each) for each in findings]})
    elif sys.stdout.isatty():
        _show_table(findings)
    else:
        for finding in findings:
            print(f"{finding.state:8}  {finding.name}: {finding.found}{_advice(finding, '; ')}")
    if not as_json:
        print("Devices can be made here." if able else "No device can be made here.")
    return 0 if able else 1


def _advice(finding: Finding, separator: str) -> str:
    if finding.state == "ok":
        return ""
    return f"{separator}needed for: {finding.needed_for}{separator}do: {finding.advice}"


def _show_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        state = Text(finding.state, style=_COLOURS[finding.state])
        table.add_row(state, finding.name, Text(finding.found + _advice(finding, "\n")))
    Console(markup=False, highlight=False, emoji=False).print(table)
