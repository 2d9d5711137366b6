# SPDX-License-Identifier: Apache-2.0
"""The tables of scripts/fragmentation, beside the figures of the kernel series."""
from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from zramfs.views.sample import FRAME, ORDERS

if TYPE_CHECKING:
    from benchmarks.fragmentation import Outcome

WIDTH = 122
AIM = 0.95
# Free blocks of order 0 to 10 after compaction, zone DMA32, as the series of 2016 gave them: the free
# memory of a whole machine, while zramfs counts that of its pool alone. Order 10, which an arena has
# not, has no block in either.
SERIES = {
    "kernel, pages not movable": (5219, 5526, 4969, 3455, 1831, 677, 139, 15, 0, 0, 0),
    "kernel, pages movable": (1612, 3139, 3154, 2469, 1745, 990, 384, 94, 7, 0, 0),
}


def share_from(orders: Sequence[int], least: int) -> float:
    """Share of the free memory in blocks of at least this order, 0 to 1."""
    sizes = [blocks << order for order, blocks in enumerate(orders)]
    return sum(sizes[least:]) / sum(sizes) if any(sizes) else 0.0


def show(outcomes: Sequence[Outcome], size_mib: int, algo: str, console: Console) -> None:
    console.print(
        f"ext4 on a zramfs device ({algo}), eight files of {size_mib} MiB written at once, every second one "
        "deleted, fstrim", soft_wrap=True, highlight=False,
    )
    for title, table in (
        ("Free blocks per order", _orders(outcomes)), ("Memory (MiB)", _memory(outcomes)),
        ("What must hold", _verdicts(outcomes)),
    ):
        console.print()
        console.print(title, style="bold", highlight=False)
        console.print(table)


def text(outcomes: Sequence[Outcome], size_mib: int, algo: str) -> str:
    page = io.StringIO()
    show(outcomes, size_mib, algo, Console(width=WIDTH, file=page, color_system=None))
    return "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines())


def reached(outcome: Outcome) -> bool:
    """At least 95 % of the free memory lies in whole pageblocks, and the OS has as much of what was freed."""
    share = outcome.after.sample.whole_share
    return share is not None and min(share, outcome.left) >= AIM


def _table(first: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _orders(outcomes: Sequence[Outcome]) -> Table:
    table = _table("", *map(str, range(ORDERS)), "free MiB", "order ≥ 4", "≥ 7", "≥ 9")
    for name, orders in SERIES.items():
        _order_row(table, name, orders)
    table.add_section()
    for outcome in outcomes:
        _order_row(table, f"{outcome.setting.text}: before", outcome.before.sample.orders)
        _order_row(table, f"{outcome.setting.text}: after", outcome.after.sample.orders)
    return table


def _order_row(table: Table, name: str, orders: Sequence[int]) -> None:
    free = sum(blocks << order for order, blocks in enumerate(orders)) * FRAME
    shares = [f"{100 * share_from(orders, least):.1f} %" for least in (4, 7, 9)]
    table.add_row(name, *map(str, orders[:ORDERS]), _mib(free), *shares)


def _memory(outcomes: Sequence[Outcome]) -> Table:
    table = _table(
        "", "pool\nfull", "pool\nafter", "freed", "daemon\nfull", "daemon\nbefore", "daemon\nafter",
        "given\nback", "of what\nwas freed", "seconds",
    )
    for outcome in outcomes:
        pools = [moment.sample.mm_stat["mem_used_total"] for moment in (outcome.full, outcome.after)]
        daemons = [moment.rss for moment in (outcome.full, outcome.before, outcome.after)]
        table.add_row(
            outcome.setting.text,
            *map(_mib, [*pools, pools[0] - pools[1], *daemons, daemons[0] - daemons[2]]),
            f"{100 * outcome.left:.1f} %", f"{outcome.seconds:.1f}",
        )
    return table


def _verdicts(outcomes: Sequence[Outcome]) -> Table:
    table = _table(
        "", "free memory in\nwhole pageblocks", "freed memory\nno longer resident",
        f"≥ {100 * AIM:.0f} %\nof both",
    )
    for outcome in outcomes:
        share = outcome.after.sample.whole_share
        table.add_row(
            outcome.setting.text,
            "–" if share is None else f"{100 * share:.1f} %", f"{100 * outcome.left:.1f} %",
            "yes" if reached(outcome) else "no",
        )
    return table


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
