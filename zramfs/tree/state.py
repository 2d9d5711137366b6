# SPDX-License-Identifier: Apache-2.0
"""The state of a device in words: for `control`, and on one line for a service manager."""
from __future__ import annotations

import time
from collections.abc import Iterator

from zramfs.device.commands import COMMANDS
from zramfs.model.device_stats import DeviceStats
from zramfs.model.stats import BackingSettings, BackingStats, LaneStats, WritebackStats
from zramfs.text.key_values import shown
from zramfs.text.sizes import format_size, format_time


def status_line(stats: DeviceStats) -> str:
    """The state of a device on one line, for `systemctl status`."""
    if not stats.alive:
        return "the lane has ended; disk does not answer any more"
    store = stats.store
    if store is None:
        return "not set up: it has no size yet"
    ratio = f", ratio {store.orig_data_size / store.mem_used_total:.2f}" if store.mem_used_total else ""
    limit = f" of {format_size(stats.mem_limit)}" if stats.mem_limit else ""
    failed = "".join(
        f"; {count} {what} failed" if count else ""
        for count, what in ((store.failed_writes, "writes"), (store.failed_reads, "reads"))
    )
    if stats.headroom.room == 0:
        failed += "; no memory for more"
    return (f"{format_size(store.orig_data_size)} of {format_size(stats.disksize)} stored in "
            f"{format_size(store.mem_used_total)}{limit}{ratio}{failed}")


def _backing_rows(
    settings: BackingSettings, backing: BackingStats | None, done: WritebackStats
) -> Iterator[tuple[str, str]]:
    """For people, in `control`."""
    if backing is None:
        return
    limit = f"limit {settings.limit} blocks" if settings.limit_enable else "no limit"
    yield "backing", (
        f"{repr(settings.path)[1:-1]}: {backing.used} of {backing.blocks} blocks in use, "
        f"{backing.reads} read, {backing.writes} written, "
        f"{backing.read_errors} + {backing.write_errors} failed, {limit}")
    yield "written back", (
        f"{done.pages} pages in {done.runs} runs, {done.passed} used meanwhile, {done.failed} failed")


def control_text(stats: DeviceStats) -> str:
    """What reading `control` answers: the device for people, then the commands it takes."""
    rows = [("device", f"{stats.name} on {stats.directory}"), *_device_rows(stats)]
    rows.append(("last error", stats.last_error or "none"))
    commands = [(command.usage, command.summary) for command in COMMANDS.values()]
    return "\n".join([
        *(f"{name:<13}{text}" for name, text in rows),
        "",
        "Commands, one a line, as in: echo compact > control",
        *(f"  {usage:<45}{summary}" for usage, summary in commands),
        "",
    ])


def _recompression(stats: DeviceStats) -> str:
    names = ", ".join(
        f"#{priority} {each.name}" + ("" if each.level is None else f" level {each.level}")
        for priority, each in enumerate(stats.algorithms) if priority and each
    )
    done = stats.recompression
    if not names:
        return "no: there is no recomp_algorithm"
    return (f"with {names}: {done.won} of {done.tried} pages tried, {format_size(done.bytes_saved)} saved, "
            f"{done.incompressible} incompressible")


def _units(stats: DeviceStats) -> str:
    """Of several pages compressed as one."""
    store, done = stats.store, stats.unit_making
    if store is None or not store.units:
        return "none"
    return (f"{store.units} of {store.unit_pages} pages in {format_size(store.unit_bytes)}, "
            f"{store.unit_dead} places dead; {format_size(done.bytes_saved)} saved in "
            f"{format_time(done.cpu_ns / 1e9)} of CPU")


def _shared(stats: DeviceStats) -> str:
    """Pages with equal contents."""
    store, done = stats.store, stats.sharing
    if store is None or not store.shared_pages:
        return "none"
    return (f"{store.shared_pages} pages in {store.shared_objects} objects of "
            f"{format_size(store.shared_bytes)}; {format_size(done.bytes_saved)} saved")


def _dictionaries(stats: DeviceStats) -> str:
    """Of the device's own."""
    done = stats.dictionaries
    if not done.trained and not done.generations:
        return "none"
    used = ", ".join(
        f"#{each.priority} zstd level {each.level} with {format_size(each.size)}: {each.pages} pages, "
        f"{format_size(max(0, each.won))} won for {format_size(each.memory)}" for each in done.generations)
    return (f"{used or 'none in use'}; {done.trained} trained, {done.taken} taken, {done.rejected} rejected, "
            f"{done.dropped} dropped, in {format_time(done.cpu_seconds)} of CPU; the last was "
            f"{done.verdict or 'not judged yet'}")


def _policies(stats: DeviceStats) -> str:
    said = []
    for each in stats.policies:
        if each.policy is None:
            continue
        done = each.done
        what = (f"{done.pages} of {done.tried} pages smaller, {format_size(done.bytes)} saved"
                if each.kind != "writeback" else
                f"{done.pages} pages written, {format_size(each.today)} in the last 24 hours")
        trouble = f"; {each.last_error}" if each.last_error else ""
        said.append(f"{each.policy}: {each.rounds} rounds, {what}{trouble}")
    return "; ".join(said) or "none"


def _density(stats: DeviceStats) -> str:
    """How it becomes denser by itself, and what each step has won and cost."""
    density = stats.density
    if density.mode == "off":
        return "off"
    share = f", with at most {density.share} % of a core" if density.mode == "auto" else ""
    steps = "".join(
        f"; {name}: {done.pages} pages, {format_size(done.bytes)} saved in {format_time(done.cpu_seconds)}"
        " of CPU" for name, done in density.steps.items())
    said = [each for each in (density.lacks, density.last_error) if each]
    return f"{density.mode}{share}{steps}" + "".join(f"; {each}" for each in said)


def _tasks(stats: DeviceStats) -> str:
    failed = [f"{task.name} failed {task.failures} times, the last time with {task.last_error}"
              for task in stats.tasks if task.failures]
    return "; ".join(failed) or "all run"


def _room(stats: DeviceStats) -> str:
    """What the pool may still take, and what bounds that."""
    head = stats.headroom
    floor = f"{format_size(head.keep_free)} of the host's memory are kept free" if head.keep_free else ""
    if stats.room is None:
        return "not bounded: no mem_limit, no keep_free, and no memory cgroup with a limit"
    bound = {head.group_room: "by a memory cgroup", head.host_room: "by the host's memory"}.get(
        stats.room, "by mem_limit")
    refused = f"; {head.refused} times there was none" if head.refused else ""
    return f"{format_size(stats.room)} more, bounded {bound}" + (f"; {floor}" if floor else "") + refused


def _governor(stats: DeviceStats) -> str:
    """Of the file system that is kept within the limit."""
    g = stats.governor
    if g.state == "off":
        return "not governed"
    if g.room is None:
        return f"{g.fstype} on {shown(g.mountpoint)}: there is no limit to keep it to"
    words = {"on": "", "braked": "; its writers are braked",
             "frozen": "; it is frozen, and writers wait: raise mem_limit, delete something, lower it again"}
    return (f"{g.fstype} on {shown(g.mountpoint)}: {format_size(g.allowed or 0)} of {format_size(g.free)} "
            f"free are left to its users, reserve {format_size(g.reserve)}, {format_size(g.over)} of it used"
            f"{words[g.state]}")


def _save(stats: DeviceStats) -> str:
    done = stats.save
    if done.is_running:
        share = f"{100 * done.taken // done.pages} %" if done.pages else "looking for its pages"
        return f"to {repr(done.path)[1:-1]}: {share}, {format_size(done.written)} written"
    if done.last_error:
        return f"the last one failed: {done.last_error}"
    if done.saved_at is None:
        return "not saved"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(done.saved_at))
    lost = f", {done.lost} of them could not be read" if done.lost else ""
    return f"{when} to {repr(done.path)[1:-1]}: {done.taken} pages in {format_size(done.written)}{lost}"


def _restored(stats: DeviceStats) -> list[tuple[str, str]]:
    if (from_image := stats.restored) is None:
        return []
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(from_image.created))
    lost = f"; {from_image.lost} are lost" if from_image.lost else ""
    damage = "".join(f"; {each}" for each in from_image.damage[:3])
    path = repr(from_image.path)[1:-1]
    return [("restored", f"{from_image.pages} pages of {when} from {path}{lost}{damage}")]


def _lane(stats: DeviceStats) -> str:
    alive = "" if stats.alive else "; it has ended, disk does not answer any more"
    return (f"{stats.threads} threads, disk is open {stats.open_count} times, {stats.lane.in_flight} "
            f"requests in flight, {stats.lane.protocol_errors} protocol errors{alive}")


def _device_rows(stats: DeviceStats) -> list[tuple[str, str]]:
    dictionary = stats.algorithms[0].dictionary
    level = ("" if stats.level is None else f", level {stats.level}") + (
        f", dictionary {shown(str(dictionary))}" if dictionary else "")
    limit = f"limit {format_size(stats.mem_limit)}" if stats.mem_limit else "no limit"
    rows = [
        ("size", format_size(stats.disksize) if stats.disksize else "not set up: write disksize=SIZE"),
        ("algorithm", stats.algo + level),
    ]
    if store := stats.store:
        ratio = store.orig_data_size / store.mem_used_total if store.mem_used_total else None
        rows += [
            ("data", f"{format_size(store.orig_data_size)}, with {store.same_pages} same-filled "
                     f"and {store.huge_pages} huge (incompressible) pages"),
            ("compressed", format_size(store.compr_data_size)),
            ("memory", f"{format_size(store.mem_used_total)} in the pool, at most "
                       f"{format_size(store.mem_used_max)}, {limit}; {format_size(store.resident)} resident"),
            ("room", _room(stats)),
            ("ratio", f"{ratio:.2f} (data / memory)" if ratio else "none: no data in memory"),
            ("failed I/O", f"{store.failed_reads} reads, {store.failed_writes} writes"),
            ("recompressed", _recompression(stats)),
            ("units", _units(stats)),
            ("shared", _shared(stats)),
            ("dictionaries", _dictionaries(stats)),
            *_backing_rows(stats.backing_dev, stats.backing, stats.writeback),
            ("policies", _policies(stats)),
            ("density", _density(stats)),
            ("file system", _governor(stats)),
            ("saved", _save(stats)), *_restored(stats),
            *([("wipe", "what is discarded or overwritten is zeroed")] if stats.wipe else ()),
        ]
    else:
        rows += [("memory", limit), ("density", _density(stats))]
    return [*rows, ("requests", _requests(stats.lane)), ("lane", _lane(stats)), ("tasks", _tasks(stats)),
            ("survival", stats.survival)]


def _requests(lane: LaneStats) -> str:
    return (f"{lane.read_ios} reads, {lane.write_ios} writes, {lane.discard_ios} discards; "
            f"the longest took {format_time(lane.longest_us / 1e6)}")
