# SPDX-License-Identifier: Apache-2.0
"""The files of `memory/` and `zsmalloc/`: their formats, which are those of /proc/buddyinfo and mm/zsmalloc.c
where the kernel has such a file, and what may be written to them."""
from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from zramfs.errors import ZramfsError
from zramfs.model.contents import REST, kinds_of, rest_of, steps_of
from zramfs.model.stats import FULLNESS_GROUPS
from zramfs.text.kernel_numbers import kstrtoull, memparse, printable
from zramfs.text.sizes import PAGE

if TYPE_CHECKING:
    from allocator.stats import ClassStats, PageblockStats
    from zramfs.model.device_stats import DeviceStats, MemoryStats
    from zramfs.model.estimate import Estimate
    from zramfs.model.stats import GovernorStats, PolicyStats


def format_classes(classes: Sequence[ClassStats]) -> str:
    """zsmalloc/classes: one line a size class, then their sums. Classes that were merged are not in it."""
    head = " ".join(f"{group:>9}" for group in FULLNESS_GROUPS)
    rows = [
        f" {'class':>5} {'size':>5} {head} {'obj_allocated':>13} {'obj_used':>10} {'pages_used':>10} "
        f"{'pages_per_zspage':>16} {'freeable':>8}"
    ]
    for c in classes:
        rows.append(_class_row(
            str(c.index), str(c.size), c.zspages_by_group[1:],
            (c.obj_allocated, c.obj_used, c.pages_used), str(c.pages_per_zspage), c.freeable,
        ))
    groups = [sum(c.zspages_by_group[group] for c in classes) for group in range(1, len(FULLNESS_GROUPS) + 1)]
    objects = [sum(getattr(c, name) for c in classes) for name in ("obj_allocated", "obj_used", "pages_used")]
    rows += ["", _class_row("Total", "", groups, objects, "", sum(c.freeable for c in classes))]
    return "\n".join(rows) + "\n"


def _class_row(
    index: str, size: str, groups: Sequence[int], objects: Sequence[int], per_zspage: str, freeable: int
) -> str:
    allocated, used, pages = objects
    head = " ".join(f"{number:9}" for number in groups)
    return f" {index:>5} {size:>5} {head} {allocated:13} {used:10} {pages:10} {per_zspage:>16} {freeable:8}"


def format_buddyinfo(orders: Sequence[int] | None) -> str:
    """memory/buddyinfo: free blocks of order 0, 1, ... of the arena; empty while there is none."""
    if orders is None:
        return ""
    return f"Node 0, zone {'arena':>8} " + "".join(f"{blocks:6} " for blocks in orders) + "\n"


def format_pageblocks(blocks: Sequence[PageblockStats]) -> str:
    """memory/pageblocks: a line for each pageblock that was ever used; the columns count its frames."""
    rows = ["pageblock free used movable isolated balloon state"]
    rows += [
        f"{number} {b.free} {b.used} {b.movable} {b.isolated} {b.balloon} "
        f"{'resident' if b.resident else 'returned'}"
        for number, b in enumerate(blocks)
    ]
    return "\n".join(rows) + "\n"


def format_compaction(m: MemoryStats | None) -> str:
    """memory/compaction: a name and a number a line; empty while the device is not set up."""
    if m is None:
        return ""
    c, g, s = m.compactor, m.migration, m.store
    rows = {
        "proactiveness": c.proactiveness, "threshold_percent": f"{100 * c.threshold:.2f}",
        "winnable_percent": f"{100 * c.winnable:.2f}", "unusable_index": f"{m.unusable_index:.3f}",
        "runs": g.runs, "slices": c.slices, "time_ms": c.ns // 1_000_000,
        "migration_ms": g.ns // 1_000_000,
        "pages_scanned": g.scanned, "pages_isolated": g.isolated, "pages_migrated": g.migrated,
        "failed_busy": g.busy, "failed_again": g.again, "failed_refused": g.refused,
        "failed_unmovable": g.unmovable, "failed_no_target": g.no_target, "owner_gone": g.owner_gone,
        "put_back": g.put_back, "pageblocks_freed": g.blocks_freed, "pageblocks_deferred": g.deferred,
        "pages_compacted": s.pages_compacted, "bytes_returned": s.bytes_returned,
    }
    return "".join(f"{name} {value}\n" for name, value in rows.items())


def format_policies(policies: Sequence[PolicyStats]) -> str:
    """memory/policies: a name and a value a line. idle is 0 for a policy that is off."""
    rows: dict[str, object] = {}
    for each in policies:
        policy, done = each.policy, each.done
        mine = {"idle_seconds": policy.idle if policy else 0, "rounds": each.rounds,
                "pages_tried": done.tried}
        if each.kind != "writeback":
            mine |= {"pages_won": done.pages, "bytes_saved": done.bytes}
        else:
            mine |= {"pages_written": done.pages, "bytes_written": done.bytes,
                     "bytes_in_24_hours": each.today}
        rows |= {f"{each.kind}_{name}": value for name, value in mine.items()}
    return "".join(f"{name} {value}\n" for name, value in rows.items())


def format_units(stats: DeviceStats) -> str:
    """memory/units: a name and a value a line, bytes and ms; empty while the device is not set up."""
    now, done, back = stats.store, stats.unit_making, stats.back_upkeep
    if now is None:
        return ""
    rows = {"units": now.units, "pages": now.unit_pages, "dead_places": now.unit_dead,
            "bytes": now.unit_bytes, "unpacked": now.units_unpacked, "made": done.made, "kept": done.kept,
            "dissolved": done.dissolved, "no_room": done.no_room, "pages_tried": done.tried,
            "pages_packed": done.packed, "pages_joined": done.pages, "pages_busy": done.busy,
            "bytes_saved": done.bytes_saved, "cpu_ms": done.cpu_ns // 1_000_000,
            "returned_units": back.units, "returned_pages": back.pages,
            "return_cpu_ms": back.cpu_ns // 1_000_000}
    return "".join(f"{name} {value}\n" for name, value in rows.items())


def format_contents(stats: DeviceStats) -> str:
    """memory/contents: a name and a number a line, of each kind its pages and bytes, and of each step what it
    has won and cost; empty while the device is not set up."""
    if stats.store is None:
        return ""
    rows: dict[str, int] = {}
    for name, kind in kinds_of(stats.store).items():
        rows |= {f"{name}_pages": kind.pages, f"{name}_bytes": kind.nbytes}
    rows[f"{REST}_bytes"] = rest_of(stats.store)
    for name, step in steps_of(stats).items():
        rows |= {f"step_{name}_pages": step.pages, f"step_{name}_bytes_saved": step.bytes_saved,
                 f"step_{name}_cpu_ms": step.cpu_ns // 1_000_000}
    return "".join(f"{name} {value}\n" for name, value in rows.items())


def format_estimate(e: Estimate | None) -> str:
    """memory/estimate: the fields of the last estimate, a name and a number a line; empty before the first
    one."""
    return "".join(f"{each.name} {getattr(e, each.name)}\n" for each in fields(e)) if e else ""


def format_governor(g: GovernorStats) -> str:
    """memory/governor: a name and a value a line, sizes in bytes; no value = none."""
    rows = {"state": g.state, "mountpoint": g.mountpoint, "type": g.fstype, "room": g.room,
            "reserve": g.reserve, "over": g.over, "ratio": f"{g.ratio:.2f}", "allowed": g.allowed,
            "free": g.free,
            "withheld": g.withheld, "freezes": g.freezes, "last_error": g.last_error}
    return "".join(f"{name} {'' if value is None else value}\n" for name, value in rows.items())


def format_balloon(m: MemoryStats | None) -> str:
    """memory/balloon: target and size in bytes, then pages; empty while the device is not set up."""
    if m is None:
        return ""
    b = m.balloon
    return f"target {b.target * PAGE}\nsize {b.pages * PAGE}\nisolated {b.isolated}\nmigrated {b.migrated}\n"


def format_proactiveness(stats: DeviceStats) -> str:
    return f"{stats.proactiveness}\n"


def parse_proactiveness(data: bytes) -> str:
    return f"proactiveness={kstrtoull(data)}"


def parse_balloon(data: bytes) -> str:
    size, used = memparse(data)
    if used == 0:
        raise ZramfsError(errno.EINVAL, f"expected a size such as 256M, or 0 for none, got {printable(data)}")
    return f"balloon={size}"
