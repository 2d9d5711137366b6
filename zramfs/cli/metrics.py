# SPDX-License-Identifier: Apache-2.0
"""zramfs metrics"""
from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zramfs.host.whole_file import replace_file

from . import completion, fleet
from .output import leave, say

if TYPE_CHECKING:
    from zramfs.views.gathered import Source

# node_exporter runs as a user of its own, and the numbers are no secrets: no data, and no keys.
READABLE = 0o644
_SUFFIX = ".prom"  # the only files that node_exporter's textfile collector reads


class _Address(click.ParamType):
    """[ADDRESS:]PORT, an IPv6 address in brackets: (address, port), of this machine's loopback."""

    name = "address"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        import ipaddress  # takes 4 ms, and few calls have this option

        host, _, port = str(value).rpartition(":")
        if not (port.isascii() and port.isdecimal() and 0 <= int(port) < 65536):
            self.fail(f"expected [ADDRESS:]PORT, such as 9101 or 127.0.0.1:9101, got {value!r}", param, ctx)
        # Without a name of its own: a name could lead anywhere.
        host = {"": "127.0.0.1", "localhost": "127.0.0.1"}.get(host, host)
        try:
            address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        except ValueError:
            self.fail(f"expected an IP address before the port, got {host!r}", param, ctx)
        if not address.is_loopback:
            self.fail(f"expected an address of the loopback, such as 127.0.0.1 or [::1], got {host}: the "
                      "server knows no passwords, so what lets other machines in belongs in front of it",
                      param, ctx)
        return str(address), int(port)


@click.command()
@click.argument("dirs", nargs=-1, metavar="[DIR]...", shell_complete=completion.devices)
@click.option("--openmetrics", is_flag=True,
              help="The OpenMetrics text format in place of Prometheus' own.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Into FILE in one step, for node_exporter's textfile collector.")
@click.option("--listen", type=_Address(), metavar="[ADDRESS:]PORT",
              help="Answer each HTTP request on this port of the loopback until the end.")
def metrics(
    dirs: tuple[str, ...], openmetrics: bool, output: Path | None, listen: tuple[str, int] | None
) -> None:
    """Print all numbers of the devices on the directories DIR, or of all of them, for Prometheus.

    zramfs_up says which of them have answered. Those that have not within two seconds are left out
    otherwise.
    """
    if listen is not None:
        if output or openmetrics:
            raise click.UsageError(
                "--listen goes alone: who asks chooses the format, and gets the answer in place of a file")
        _serve(dirs, listen)
        return
    if output is not None and not openmetrics and output.suffix != _SUFFIX:
        raise click.UsageError(f"expected --output to end with {_SUFFIX}, because node_exporter reads no "
                               f"other files; got {output}")
    from zramfs.views import gathered

    fleet.find_members(dirs)  # a DIR that has no device is an error
    signal.signal(signal.SIGTERM, leave)
    gatherer = gathered.Gatherer(lambda: _sources(dirs), lambda words: say(f"warning: {words}"))
    try:
        text = gathered.to_openmetrics(gatherer) if openmetrics else gathered.to_prometheus(gatherer)
    finally:
        gatherer.close()
    if output is None:
        sys.stdout.buffer.write(text)
    else:
        replace_file(output, text, READABLE)


def _sources(dirs: Sequence[str]) -> list[Source]:
    """The devices, without those that are just being started."""
    from zramfs.views.gathered import Source

    found = []
    for member in fleet.still_there(dirs):
        state, dead = member.state, None
        if state is not None and not state.alive():
            what = "has failed" if state.phase == "failed" else "is dead"
            dead = f"its daemon {what}, and its data is lost; `zramfs stop {state.where}` cleans up"
        if dead or state is None or state.phase != "starting":
            found.append(Source(member.name, member.directory, member.kind, member.where, dead))
    return found


def _serve(dirs: Sequence[str], address: tuple[str, int]) -> None:
    """Answers until SIGTERM or SIGINT, which are the usual end."""
    from zramfs.views import metrics_server

    fleet.find_members(dirs)
    with metrics_server.MetricsServer(address, lambda: _sources(dirs)) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.end())
        say(f"note: answering on {server.url}")
        server.serve()
