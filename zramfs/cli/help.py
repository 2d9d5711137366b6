# SPDX-License-Identifier: Apache-2.0
"""zramfs help: what --help prints, for people who try it as a command"""
from __future__ import annotations

import click

from . import completion


def _complete_commands(ctx: click.Context, param: click.Parameter, incomplete: str) -> list:
    assert ctx.parent is not None and isinstance(ctx.parent.command, click.Group)
    return completion.one_of(ctx.parent.command.list_commands(ctx.parent))(ctx, param, incomplete)


@click.command("help")
@click.argument("command", required=False, shell_complete=_complete_commands)
@click.pass_context
def help_command(ctx: click.Context, command: str | None) -> None:
    """Show this list, or what one COMMAND does and takes."""
    group = ctx.parent
    assert group is not None and isinstance(group.command, click.Group)
    if command is None:
        click.echo(group.get_help())
        return
    _, found, _ = group.command.resolve_command(group, [command])
    assert found is not None
    with click.Context(found, info_name=command, parent=group) as own:
        click.echo(found.get_help(own))
