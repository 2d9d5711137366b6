# SPDX-License-Identifier: Apache-2.0
"""How a device of zramfs is made as small as it gets: what its density `max` and `auto` end at.

This is the one place that knows the steps. Whoever measures says how small, and waits here until the device
is at rest.
"""
from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.peers import Server
from benchmarks.tools import BenchmarkError, Interrupt

# The level of zstd that single pages and units get.
AUTO, MAX = 3, 9
# Access times are whole seconds: between the last use of what is to be packed, and the first use of the rest.
APART_SECONDS = 4.0


@dataclass(frozen=True)
class Packing:
    """level: of zstd, for units and for pages that stay single; shared: equal pages become one object."""

    level: int
    shared: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Of `zramfs create`, for a device that is to be packed so."""
        return "--recomp-algo", f"zstd:{self.level}"


def pack(server: Server, packing: Packing, interrupt: Interrupt, unused_since: float | None = None) -> None:
    """Pack every page, or those that nobody has used since that moment (time.monotonic(); the device keeps
    access times), and return when nothing is left to do.

    Shared pages stay as they are from then on, so they come after recompression and before units.
    """
    def idle() -> str:
        interrupt.check()
        if unused_since is None:
            return "idle=all"
        return f"idle={int(time.monotonic() - unused_since - APART_SECONDS / 2)}"

    # Recompression takes the marks off.
    control(server, idle())
    control(server, "recompress=type=idle priority=1")
    if packing.shared:
        control(server, f"share={idle()}")
    control(server, f"units={idle()} level={packing.level}")
    control(server, "compact")


def control(server: Server, line: str) -> None:
    """One command of the device; returns when it is done."""
    if server.tree is None:
        raise BenchmarkError(f"{server.path} is no device of zramfs, so it has no `{line}`")
    (server.tree / "control").write_text(line + "\n")
