# SPDX-License-Identifier: Apache-2.0
"""What the shell offers when TAB is pressed. Nothing here asks a device, so a device that does not answer
cannot hang the shell. The scripts for bash, zsh and fish are in completions/."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


def _item(value: str, **more: Any) -> CompletionItem:
    from click.shell_completion import CompletionItem  # only the shell's questions need it

    return CompletionItem(value, **more)


def directories(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [_item(incomplete, type="dir")]


def files(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [_item(incomplete, type="file")]


def devices(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """This user's devices, by directory, or by name once the text begins like one."""
    from zramfs.lifecycle import rundir

    found = []
    for each in rundir.rundirs():
        state = each.read()
        place = (state.mountpoint or state.directory) if state else None
        if place is not None and place.startswith(incomplete):
            found.append(_item(place, help=state.kind if state else None))
        elif place is None or incomplete:
            found += _fitting([each.name], incomplete)
    # A path that is relative, or has links in it.
    return found or directories(_ctx, _param, incomplete)


def configured(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from zramfs.configuration import settings

    return _fitting(settings.load_configuration().devices, incomplete)


def configured_or_files(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    return configured(ctx, param, incomplete) or files(ctx, param, incomplete)


def commands(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Lines for `control`: mem_limit=, compact, compact=objects, ..."""
    from zramfs.device.commands import COMMANDS

    offered = []
    for command in COMMANDS.values():
        if command.argument is None or command.optional:
            offered.append(_item(command.name, help=command.summary))
        if command.argument is not None:
            # Capitals stand for something that only the user knows.
            values = command.argument.split("|")
            if not all(re.fullmatch("[a-z0-9]+", value) for value in values) or len(values) == 1:
                values = [*(v for v in values[:-1] if re.fullmatch("[a-z0-9]+", v)), ""]
            offered += [_item(f"{command.name}={value}", help=command.summary) for value in values]
    return [item for item in offered if item.value.startswith(incomplete)]


def one_of(words: Iterable[str]) -> Complete:
    """Completes one of `words`."""
    offered = list(words)
    return lambda _ctx, _param, incomplete: _fitting(offered, incomplete)


def list_of(words: Iterable[str]) -> Complete:
    """Completes the last of several words separated by commas, without those that stand there already. The
    list may begin with a +."""
    offered = list(words)

    def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, _, last = incomplete.rpartition(",")
        plus = "+" if not before and last.startswith("+") else ""
        there = before.lstrip("+").upper().split(",")
        head = f"{before}," if before else plus
        return [
            _item(head + word)
            for word in offered
            if word not in there and word.startswith(last.removeprefix(plus).upper())
        ]

    return complete


def _fitting(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [_item(word) for word in words if word.startswith(incomplete)]
