# SPDX-License-Identifier: Apache-2.0
"""How a device of zramfs is made as small as it gets: by density `max`, or by the steps of `auto`.

This is the one place that knows the steps. Whoever measures says how small, and waits here until the device
is at rest. `max` comes to rest in seconds, and is used as it is. `auto` waits for 10 minutes or 20 before it
touches a page, so its steps are commands here.
"""
from __future__ import annotations

import errno
import time
from dataclasses import dataclass

from benchmarks.memory import resident
from benchmarks.peers import Server
from benchmarks.tools import BenchmarkError, Interrupt, wait_until

# The level of zstd that single pages and units get.
AUTO, MAX = 3, 9
# Access times are whole seconds: between the last use of what is to be packed, and the first use of the rest.
APART_SECONDS = 4.0
# 256 MiB take 60 to 90 s at a load of 25.
REST_SECONDS = 600.0
# Object compaction and the giving back of memory go on for a moment after the last step.
SETTLED_SECONDS = 3.0


@dataclass(frozen=True)
class Packing:
    """level: of zstd, for units and for pages that stay single; dense: equal pages become one object, and the
    device trains dictionaries."""

    level: int
    dense: bool = False

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
    if packing.dense:
        train(server, idle())
        control(server, f"share={idle()}")
    control(server, f"units={idle()} level={packing.level}")
    control(server, "compact")


def train(server: Server, idle: str) -> None:
    """A dictionary, where there are pages enough that stand to gain by one."""
    try:
        control(server, f"dictionary={idle}")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def come_to_rest(server: Server, interrupt: Interrupt) -> None:
    """Density `max`, until it has nothing left to do, and memory no longer shrinks."""
    least, since = float("inf"), time.monotonic()

    def is_resting() -> bool:
        nonlocal least, since
        interrupt.check()
        time.sleep(0.5)
        if resident(server.pids) < least:
            least, since = resident(server.pids), time.monotonic()
        return metric(server, "density_resting") == 1 and time.monotonic() > since + SETTLED_SECONDS

    control(server, "density=max")
    wait_until(is_resting, "density max", REST_SECONDS)


def metric(server: Server, name: str) -> float:
    """The sum of all samples of a metric of the device."""
    assert server.tree is not None
    lines = (server.tree / "metrics").read_text().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"zramfs_{name}{{"))


def control(server: Server, line: str) -> None:
    """One command of the device; returns when it is done."""
    if server.tree is None:
        raise BenchmarkError(f"{server.path} is no device of zramfs, so it has no `{line}`")
    (server.tree / "control").write_text(line + "\n")
