# SPDX-License-Identifier: Apache-2.0
"""The table of the files `metrics` and `metrics.prom`: every number that the device knows.

Only counters, gauges and histograms: node_exporter's textfile collector refuses a file with any other type.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from zramfs import __version__
from zramfs.model.contents import REST, kinds_of, rest_of
from zramfs.model.density import MODES
from zramfs.model.stats import FULLNESS_GROUPS, NO_BACKING, OPERATIONS, BackingStats, Latency
from zramfs.text.sizes import PAGE

from .metric import COUNTER, GAUGE, HISTOGRAM, NS_PER_SECOND, SECTOR, Figures, Metric, Number, Value

if TYPE_CHECKING:
    from allocator.stats import ClassStats
    from zramfs.model.device_stats import MemoryStats
    from zramfs.model.stats import PolicyStats, StepStats


def _memory(value: Callable[[MemoryStats], Value]) -> Callable[[Figures], Value | None]:
    return lambda f: None if f.memory is None else value(f.memory)


def _backing(value: Callable[[BackingStats], Value]) -> Callable[[Figures], Value]:
    return lambda f: value(f.device.backing or NO_BACKING)


def _by(names: Iterable[str], values: Iterable[Number | Latency]) -> Value:
    return {(name,): value for name, value in zip(names, values, strict=True)}


def _by_policy(value: Callable[[PolicyStats], Number]) -> Callable[[Figures], Value]:
    return lambda f: {(p.kind,): value(p) for p in f.device.policies}


def _by_step(value: Callable[[StepStats], Number]) -> Callable[[Figures], Value]:
    return lambda f: {(name,): value(step) for name, step in f.device.density.steps.items()}


def _by_class(value: Callable[[ClassStats], Number]) -> Callable[[Figures], Value | None]:
    """Of the size classes that hold anything."""
    return lambda f: {(str(c.size),): value(c) for c in f.classes if c.pages_used}


def _zspages(f: Figures) -> Value:
    groups = ("0%", *FULLNESS_GROUPS)
    return {
        (str(c.size), group): zspages
        for c in f.classes
        for group, zspages in zip(groups, c.zspages_by_group, strict=True)
        if zspages
    }


_INFO_LABELS = ("directory", "algorithm", "level", "version")


def _info(f: Figures) -> Value:
    d = f.device
    level = "default" if d.level is None else str(d.level)
    return {(str(d.directory), d.algo, level, __version__): 1}


_GOVERNED = ("off", "on", "braked", "frozen")
_SHARED = ("joined", "unequal", "alone", "no_room", "busy")
_DICTIONARIES = ("taken", "rejected", "dropped")
_RETURNED = ("pages", "busy", "failed")
_UNITS = ("made", "kept", "dissolved", "no_room")
_RECOMPRESSED = ("won", "kept", "no_room", "busy")


def _algorithms(f: Figures) -> Value:
    return {
        (str(priority), each.name, "default" if each.level is None else str(each.level),
         str(each.dictionary or "")): 1
        for priority, each in enumerate(f.device.algorithms) if each
    }


def _contents_bytes(f: Figures) -> Value:
    found = {name: kind.nbytes for name, kind in kinds_of(f.store).items()} | {REST: rest_of(f.store)}
    return {(name,): value for name, value in found.items()}


def _generations(f: Figures, name: str) -> Value:
    """0 for a priority that has none."""
    found = {each.priority: getattr(each, name) for each in f.device.dictionaries.generations}
    return {(str(priority),): found.get(priority, 0) for priority in (1, 2, 3)}


def _room(f: Figures) -> Value:
    d = f.device
    limit = max(0, d.mem_limit - f.store.mem_used_total) if d.mem_limit else None
    bounds = {"mem_limit": limit, "host": d.headroom.host_room, "cgroup": d.headroom.group_room}
    return {(bound,): room for bound, room in bounds.items() if room is not None}


TABLE = (
    # the device
    Metric(GAUGE, "device_info", "1; what it is, in the labels.", _info, labels=_INFO_LABELS),
    Metric(GAUGE, "disksize_bytes", "Size of the block device, 0 before it is set up.",
           lambda f: f.device.disksize, "bytes"),
    Metric(GAUGE, "disk_opens", "Open files on disk.", lambda f: f.device.open_count),
    Metric(COUNTER, "task_failures", "Failures of a task beside the lane, each of which was started again.",
           lambda f: {(task.name,): task.failures for task in f.device.tasks}, labels=("task",)),
    # mm_stat
    Metric(GAUGE, "orig_data_bytes", "Data stored, in whole pages, same-filled ones included.",
           lambda f: f.store.orig_data_size, "bytes"),
    Metric(GAUGE, "compr_data_bytes", "What it was compressed to, same-filled pages left out.",
           lambda f: f.store.compr_data_size, "bytes"),
    Metric(GAUGE, "mem_used_bytes", "Memory of the pool for that.",
           lambda f: f.store.mem_used_total, "bytes"),
    Metric(GAUGE, "contents_pages", "Stored pages by how they are kept; together they are all.",
           lambda f: {(name,): kind.pages for name, kind in kinds_of(f.store).items()}, labels=("kind",)),
    Metric(GAUGE, "contents_bytes", "Pool memory by what it holds; together it is mem_used_bytes.",
           _contents_bytes, "bytes", labels=("kind",)),
    Metric(GAUGE, "mem_limit_bytes", "The most that the pool may take, 0 for no limit.",
           lambda f: f.device.mem_limit, "bytes"),
    Metric(GAUGE, "keep_free_bytes", "Memory of the host that is left to others, 0 for none.",
           lambda f: f.device.headroom.keep_free, "bytes"),
    Metric(GAUGE, "room_bytes", "What the pool may still take, by each bound that there is.", _room, "bytes",
           labels=("bound",)),
    Metric(COUNTER, "room_looks", "Looks at what the host and its cgroups can give.",
           lambda f: f.device.headroom.looks),
    Metric(COUNTER, "room_refused", "Requests for pool memory that the host or a cgroup had no room for.",
           lambda f: f.device.headroom.refused),
    Metric(GAUGE, "mem_used_max_bytes", "Peak of mem_used_bytes.", lambda f: f.store.mem_used_max, "bytes"),
    Metric(GAUGE, "same_pages", "Stored pages that hold one repeated word and take no memory.",
           lambda f: f.store.same_pages),
    Metric(COUNTER, "pages_compacted", "Pages of the pool freed by object compaction.",
           lambda f: f.store.pages_compacted),
    Metric(GAUGE, "huge_pages", "Stored pages that do not compress.", lambda f: f.store.huge_pages),
    Metric(COUNTER, "huge_pages_stored", "Pages that did not compress when they were stored.",
           lambda f: f.store.huge_pages_since),
    Metric(GAUGE, "written_back_pages", "Stored pages that lie on the backing store.",
           lambda f: f.store.written_back),
    # io_stat
    Metric(COUNTER, "failed_reads", "Pages that could not be read.", lambda f: f.store.failed_reads),
    Metric(COUNTER, "failed_writes", "Pages that could not be stored.", lambda f: f.store.failed_writes),
    Metric(COUNTER, "notify_free", "Pages discarded or zeroed as a whole.", lambda f: f.store.notify_free),
    # recovery
    Metric(COUNTER, "recoveries", "Times that a process took over what a killed one had stored.",
           lambda f: f.store.recoveries),
    Metric(COUNTER, "pages_lost", "Pages that could not be taken over: EIO until they are written.",
           lambda f: f.store.pages_lost),
    # recompression
    Metric(GAUGE, "algorithms", "1 for each algorithm; priority 0 is that of writes.", _algorithms,
           labels=("priority", "algorithm", "level", "dictionary")),
    Metric(GAUGE, "access_times", "1 while the time of each page's last access is kept.",
           lambda f: int(f.device.access_times)),
    Metric(GAUGE, "wipe", "1 while what is discarded or overwritten is zeroed.",
           lambda f: int(f.device.wipe)),
    Metric(COUNTER, "recompress_tried", "Pages compressed again with a secondary algorithm.",
           lambda f: f.recompression.tried),
    Metric(COUNTER, "recompress_pages", "What came of them.",
           lambda f: _by(_RECOMPRESSED, (getattr(f.recompression, name) for name in _RECOMPRESSED)),
           labels=("result",)),
    Metric(COUNTER, "recompress_saved_bytes", "Compressed data that became less by it.",
           lambda f: f.recompression.bytes_saved, "bytes"),
    Metric(COUNTER, "recompress_cpu_seconds", "CPU time that it took.",
           lambda f: f.recompression.cpu_ns / NS_PER_SECOND, "seconds"),
    Metric(COUNTER, "recompress_incompressible", "Pages marked incompressible by it.",
           lambda f: f.recompression.incompressible),
    # units
    Metric(GAUGE, "units", "Units of several pages that are compressed as one.", lambda f: f.store.units),
    Metric(GAUGE, "unit_places", "Pages in units, and places whose page has left.",
           lambda f: _by(("live", "dead"), (f.store.unit_pages, f.store.unit_dead)), labels=("state",)),
    Metric(GAUGE, "unit_bytes", "Compressed data in units.", lambda f: f.store.unit_bytes, "bytes"),
    Metric(COUNTER, "unit_reads", "Units unpacked for a read.", lambda f: f.store.units_unpacked),
    Metric(COUNTER, "unit_making", "Groups of 16 pages, by what the making of units did with them.",
           lambda f: _by(_UNITS, (getattr(f.device.unit_making, name) for name in _UNITS)),
           labels=("result",)),
    Metric(COUNTER, "unit_making_pages", "Pages that joined a unit, and those that were used first.",
           lambda f: _by(("joined", "busy"), (f.device.unit_making.pages, f.device.unit_making.busy)),
           labels=("result",)),
    Metric(COUNTER, "unit_pages_tried", "Pages that were compressed together, to see if a unit is smaller.",
           lambda f: f.device.unit_making.tried),
    Metric(COUNTER, "unit_pages_packed", "Of these, pages in the units that were made.",
           lambda f: f.device.unit_making.packed),
    Metric(COUNTER, "unit_saved_bytes", "Memory that became less by it.",
           lambda f: f.device.unit_making.bytes_saved, "bytes"),
    Metric(COUNTER, "unit_making_cpu_seconds", "CPU time that making units and their upkeep took.",
           lambda f: f.device.unit_making.cpu_ns / NS_PER_SECOND, "seconds"),
    # shared pages
    Metric(GAUGE, "shared_pages", "Pages that share an object, because their contents are equal.",
           lambda f: f.store.shared_pages),
    Metric(GAUGE, "shared_objects", "The objects that they share.", lambda f: f.store.shared_objects),
    Metric(GAUGE, "shared_bytes", "Compressed data in these.", lambda f: f.store.shared_bytes, "bytes"),
    Metric(COUNTER, "share_looked", "Pages that were compared with others.",
           lambda f: f.device.sharing.looked),
    Metric(COUNTER, "share_pages", "Of these, by what came of them; most pages have no equal.",
           lambda f: _by(_SHARED, (getattr(f.device.sharing, name) for name in _SHARED)), labels=("result",)),
    Metric(COUNTER, "share_objects", "Objects made to be shared.", lambda f: f.device.sharing.made),
    Metric(COUNTER, "share_saved_bytes", "Memory that became less by it.",
           lambda f: f.device.sharing.bytes_saved, "bytes"),
    Metric(COUNTER, "share_cpu_seconds", "CPU time that the search for equal pages took.",
           lambda f: f.device.sharing.cpu_ns / NS_PER_SECOND, "seconds"),
    Metric(GAUGE, "share_table_bytes", "What the table of the pages may take, while `share` is under way.",
           lambda f: f.device.sharing.table_bytes, "bytes"),
    # dictionaries of its own
    Metric(COUNTER, "dictionaries_trained", "Dictionaries trained on cold pages.",
           lambda f: f.device.dictionaries.trained),
    Metric(COUNTER, "dictionaries", "Of these, by what became of them.",
           lambda f: _by(_DICTIONARIES, (getattr(f.device.dictionaries, name) for name in _DICTIONARIES)),
           labels=("result",)),
    Metric(COUNTER, "dictionary_cpu_seconds", "CPU time to sample, train and judge.",
           lambda f: f.device.dictionaries.cpu_seconds, "seconds"),
    Metric(GAUGE, "dictionary_pages", "Made with each dictionary in use, when they were last counted.",
           lambda f: _generations(f, "pages"), labels=("priority",)),
    Metric(GAUGE, "dictionary_won_bytes", "Memory that these pages take less by it.",
           lambda f: _generations(f, "won"), "bytes", labels=("priority",)),
    Metric(GAUGE, "dictionary_memory_bytes", "What it costs, with its tables and workspaces.",
           lambda f: _generations(f, "memory"), "bytes", labels=("priority",)),
    # write-back
    Metric(GAUGE, "backing_blocks", "Blocks of 4 KiB of the backing store.",
           _backing(lambda b: _by(
               ("used", "stale", "free"), (b.used, b.stale, b.blocks - b.used - b.stale))),
           labels=("state",)),
    Metric(COUNTER, "backing_read_blocks", "Blocks read from the backing store.",
           _backing(lambda b: b.reads)),
    Metric(COUNTER, "backing_written_blocks", "Blocks written to it.", _backing(lambda b: b.writes)),
    Metric(COUNTER, "backing_errors", "Reads that failed or found damage, writes that failed.",
           _backing(lambda b: _by(("read", "write"), (b.read_errors, b.write_errors))),
           labels=("operation",)),
    Metric(COUNTER, "backing_unit_pages_left",
           "Pages overwritten or discarded in units on it, whose blocks stay until the last one has gone.",
           _backing(lambda b: b.unit_left)),
    Metric(COUNTER, "backing_unit_returned", "Units of which little was left, that came back to memory.",
           lambda f: f.device.back_upkeep.units),
    Metric(COUNTER, "backing_unit_return_pages", "Pages of such units: those that came back, and others.",
           lambda f: _by(_RETURNED, (getattr(f.device.back_upkeep, name) for name in _RETURNED)),
           labels=("result",)),
    Metric(COUNTER, "backing_unit_return_no_room", "Looks that ended because the pool had no room for them.",
           lambda f: f.device.back_upkeep.no_room),
    Metric(COUNTER, "backing_unit_return_cpu_seconds", "CPU time that it took.",
           lambda f: f.device.back_upkeep.cpu_ns / NS_PER_SECOND, "seconds"),
    Metric(GAUGE, "writeback_limit_blocks", "Blocks that may still be written, if that is limited.",
           lambda f: f.device.backing_dev.limit),
    Metric(GAUGE, "writeback_limit_enable", "1 while it is.",
           lambda f: int(f.device.backing_dev.limit_enable)),
    Metric(GAUGE, "writeback_batch_size", "Pages that are written at once.",
           lambda f: f.device.backing_dev.batch_size),
    Metric(GAUGE, "writeback_compressed", "1 if pages are written as they are in the pool.",
           lambda f: int(f.device.backing_dev.compressed)),
    Metric(COUNTER, "writeback_runs", "Runs of write-back.", lambda f: f.device.writeback.runs),
    Metric(COUNTER, "writeback_pages", "What came of the pages that were to be written back.",
           lambda f: _by(("written", "used", "failed"), (
               f.device.writeback.pages, f.device.writeback.passed, f.device.writeback.failed)),
           labels=("result",)),
    # stat, and what else the lane knows
    Metric(HISTOGRAM, "request_duration_seconds", "Time from taking a request up to its reply.",
           lambda f: _by(OPERATIONS, f.lane.latency), "seconds", ("operation",)),
    Metric(COUNTER, "request_bytes", "Bytes read, written and discarded.",
           lambda f: _by(OPERATIONS, (n * SECTOR for n in (
               f.lane.read_sectors, f.lane.write_sectors, f.lane.discard_sectors))), "bytes", ("operation",)),
    Metric(GAUGE, "requests_in_flight", "Requests in hand.", lambda f: f.lane.in_flight),
    Metric(COUNTER, "io_time_seconds", "Time with at least one request in hand.",
           lambda f: f.lane.io_ms / 1000, "seconds"),
    Metric(GAUGE, "longest_request_seconds", "The longest that a request took, since the lane began.",
           lambda f: f.lane.longest_us / 1e6, "seconds"),
    Metric(GAUGE, "lane_alive", "1 while disk answers.", lambda f: int(f.device.alive)),
    Metric(GAUGE, "lane_threads", "Threads that serve disk.", lambda f: f.device.threads),
    Metric(GAUGE, "lane_unlocked_bytes", "Memory of these threads that could not be locked.",
           lambda f: f.lane.unlocked_bytes, "bytes"),
    Metric(COUNTER, "protocol_errors", "Requests of the kernel that did not hold together.",
           lambda f: f.lane.protocol_errors),
    Metric(COUNTER, "reply_errors", "Replies that the kernel refused for an unexpected reason.",
           lambda f: f.lane.reply_errors),
    Metric(COUNTER, "refused_truncations", "Truncations of disk that were refused: to more than its "
           "size, and to 0 while others had it open.",
           lambda f: _by(("size", "busy"), (f.lane.refused_sizes, f.lane.busy_truncations)),
           labels=("reason",)),
    Metric(COUNTER, "helped_pieces", "Pieces of 32 KiB of large requests done by another thread.",
           lambda f: f.lane.helped_pieces),
    Metric(COUNTER, "put_off_requests", "Requests that waited for the backing store in a thread for that.",
           lambda f: f.lane.put_off),
    Metric(COUNTER, "waited_requests", "And in a thread of the lane, because too many were put off.",
           lambda f: f.lane.waited),
    Metric(GAUGE, "fuse_minor", "N of the protocol FUSE 7.N agreed on, 0 before that.",
           lambda f: f.lane.protocol_minor),
    Metric(GAUGE, "fuse_can_resend", "1 if the kernel can send unanswered requests again.",
           lambda f: int(f.lane.can_resend)),
    # the arena
    Metric(GAUGE, "resident_bytes", "Memory of the pageblocks in use and in reserve.",
           lambda f: f.store.resident, "bytes"),
    Metric(GAUGE, "pageblocks_in_use", "Pageblocks of 2 MiB in use.", lambda f: f.store.pageblocks_in_use),
    Metric(GAUGE, "pageblocks_most", "As many as can ever be in use.", lambda f: f.store.pageblocks_total),
    Metric(COUNTER, "returned_bytes", "Memory given back to the OS.",
           lambda f: f.store.bytes_returned, "bytes"),
    Metric(GAUGE, "frames", "Frames of 4 KiB in the pageblocks in use.",
           lambda f: _by(("used", "free"), (f.store.frames_used, f.store.frames_free)), labels=("state",)),
    Metric(GAUGE, "reserve_bytes", "Memory of free pageblocks kept ready for swap, and how much is to be.",
           lambda f: _by(("ready", "target"), (f.store.reserve, f.store.reserve_target)), "bytes",
           labels=("state",)),
    Metric(COUNTER, "reserve_misses", "Allocations that found the reserve empty, and waited up to 0.1 s.",
           lambda f: f.store.reserve_misses),
    Metric(GAUGE, "ballast_bytes", "Memory held to be given to a kernel that is stuck for want of it.",
           lambda f: _by(("held", "target"), (f.device.ballast.held, f.device.ballast.target)), "bytes",
           labels=("state",)),
    Metric(COUNTER, "ballast_releases", "How often 2 MiB of that were given away.",
           lambda f: f.device.ballast.released),
    Metric(COUNTER, "corrupt", "Locations that named no object: 0 in a sound pool.",
           lambda f: f.store.corrupt),
    Metric(GAUGE, "free_blocks", "Free blocks of 2^order frames, as in memory/buddyinfo.",
           _memory(lambda m: _by(map(str, range(len(m.orders))), m.orders)), labels=("order",)),
    # memory/compaction
    Metric(GAUGE, "compaction_proactiveness", "How readily the pool is compacted unasked, 0 to 100.",
           _memory(lambda m: m.compactor.proactiveness)),
    Metric(GAUGE, "compaction_threshold_ratio", "Winnable share from which on the compactor works.",
           _memory(lambda m: m.compactor.threshold), "ratio"),
    Metric(GAUGE, "compaction_winnable_ratio", "Share of the pageblocks in use that compaction could empty.",
           _memory(lambda m: m.compactor.winnable), "ratio"),
    Metric(GAUGE, "compaction_unusable_ratio", "Share of the free frames outside whole free pageblocks.",
           _memory(lambda m: m.unusable_index), "ratio"),
    Metric(COUNTER, "compactor_rounds", "Rounds of work that the compactor has begun by itself.",
           _memory(lambda m: m.compactor.runs)),
    Metric(COUNTER, "compactor_slices", "Slices of about 1 ms that it has worked.",
           _memory(lambda m: m.compactor.slices)),
    Metric(COUNTER, "compactor_time_seconds", "Time spent in these slices.",
           _memory(lambda m: m.compactor.ns / NS_PER_SECOND), "seconds"),
    Metric(COUNTER, "migration_runs", "Runs of page migration.", _memory(lambda m: m.migration.runs)),
    Metric(COUNTER, "migration_time_seconds", "Time spent in these runs.",
           _memory(lambda m: m.migration.ns / NS_PER_SECOND), "seconds"),
    Metric(COUNTER, "migration_pages_scanned", "Frames looked at.", _memory(lambda m: m.migration.scanned)),
    Metric(COUNTER, "migration_pages_isolated", "Frames taken from their owners for a move.",
           _memory(lambda m: m.migration.isolated)),
    Metric(COUNTER, "migration_pages_migrated", "Frames moved.", _memory(lambda m: m.migration.migrated)),
    Metric(COUNTER, "migration_pages_put_back", "Isolated frames that stayed where they were.",
           _memory(lambda m: m.migration.put_back)),
    Metric(COUNTER, "migration_pages_owner_gone", "Frames freed by their owner after isolation.",
           _memory(lambda m: m.migration.owner_gone)),
    Metric(COUNTER, "migration_failures", "Frames not moved, and pageblocks given up (unmovable), by reason.",
           _memory(lambda m: _by(("busy", "again", "refused", "unmovable", "no_target"), (
               m.migration.busy, m.migration.again, m.migration.refused, m.migration.unmovable,
               m.migration.no_target))), labels=("reason",)),
    Metric(COUNTER, "migration_pageblocks_freed", "Pageblocks emptied and given back to the OS.",
           _memory(lambda m: m.migration.blocks_freed)),
    Metric(COUNTER, "migration_pageblocks_deferred", "Pageblocks passed by because they failed lately.",
           _memory(lambda m: m.migration.deferred)),
    # memory/policies
    Metric(GAUGE, "policy_idle_seconds",
           "Age from which on a page is idle for the policy, 0 while it is off.",
           _by_policy(lambda p: p.policy.idle if p.policy else 0), "seconds", labels=("policy",)),
    Metric(COUNTER, "policy_rounds", "Looks of the policy.", _by_policy(lambda p: p.rounds),
           labels=("policy",)),
    Metric(COUNTER, "policy_pages_tried", "Idle pages that the policy took up.",
           _by_policy(lambda p: p.done.tried), labels=("policy",)),
    Metric(COUNTER, "policy_pages", "Pages that the policy made smaller, or wrote back.",
           _by_policy(lambda p: p.done.pages), labels=("policy",)),
    Metric(COUNTER, "policy_bytes", "Bytes that the policy saved, or wrote.",
           _by_policy(lambda p: p.done.bytes), "bytes", labels=("policy",)),
    Metric(GAUGE, "policy_written_bytes", "Bytes that the policy wrote in the last 24 hours.",
           lambda f: next(p.today for p in f.device.policies if p.kind == "writeback"), "bytes"),
    # density
    Metric(GAUGE, "density_mode", "1 for how readily the device becomes denser by itself.",
           lambda f: _by(MODES, (int(f.device.density.mode == each) for each in MODES)), labels=("mode",)),
    Metric(GAUGE, "density_share_ratio", "Share of one core that auto may take.",
           lambda f: f.device.density.share / 100, "ratio"),
    Metric(GAUGE, "density_resting", "1 while nothing is due, and nothing will be without I/O.",
           lambda f: int(f.device.density.is_resting)),
    Metric(COUNTER, "density_rounds", "Passes of the step.", _by_step(lambda s: s.rounds), labels=("step",)),
    Metric(COUNTER, "density_pages", "Pages that the step looked at closely.", _by_step(lambda s: s.pages),
           labels=("step",)),
    Metric(COUNTER, "density_saved_bytes", "Bytes that the step saved.", _by_step(lambda s: s.bytes), "bytes",
           labels=("step",)),
    Metric(COUNTER, "density_cpu_seconds", "CPU time of the step.", _by_step(lambda s: s.cpu_seconds),
           "seconds", labels=("step",)),
    # memory/governor
    Metric(GAUGE, "governor_state", "1 for what the governor of the file system does.",
           lambda f: _by(_GOVERNED, (int(f.governor.state == state) for state in _GOVERNED)),
           labels=("state",)),
    Metric(GAUGE, "governor_room_bytes", "What the pool may still take, below 0 past its limit; 0 without.",
           lambda f: f.governor.room or 0, "bytes"),
    Metric(GAUGE, "governor_reserve_bytes", "What it may take beyond that, and what of it is taken.",
           lambda f: _by(("size", "used"), (f.governor.reserve, f.governor.over)), "bytes", labels=("kind",)),
    Metric(GAUGE, "governor_room_ratio", "Bytes of blocks that a byte of room is reckoned for.",
           lambda f: f.governor.ratio, "ratio"),
    Metric(GAUGE, "governor_blocks_bytes", "Free blocks: all, withheld, and allowed (0 without a limit).",
           lambda f: _by(("free", "withheld", "allowed"), (
               f.governor.free, f.governor.withheld, f.governor.allowed or 0)), "bytes", labels=("kind",)),
    Metric(COUNTER, "governor_freezes", "How often the file system had to be frozen.",
           lambda f: f.governor.freezes),
    # saves
    Metric(COUNTER, "saves", "Saves of the device into an image, by result.",
           lambda f: _by(("saved", "failed"), (f.device.save.saves, f.device.save.failures)),
           labels=("result",)),
    Metric(GAUGE, "save_running", "1 while a save runs.", lambda f: int(f.device.save.is_running)),
    Metric(GAUGE, "save_pages", "Pages of the save that runs, or of the last one.",
           lambda f: _by(("all", "taken", "kept", "lost"), (
               f.device.save.pages, f.device.save.taken, f.device.save.kept, f.device.save.lost)),
           labels=("kind",)),
    Metric(GAUGE, "save_written_bytes", "Bytes of its image.", lambda f: f.device.save.written, "bytes"),
    Metric(GAUGE, "saved_timestamp_seconds", "When the last save ended, 0 before the first.",
           lambda f: f.device.save.saved_at or 0, "seconds"),
    # memory/balloon
    Metric(GAUGE, "balloon_target_bytes", "Memory that shall be kept from the pool.",
           _memory(lambda m: m.balloon.target * PAGE), "bytes"),
    Metric(GAUGE, "balloon_bytes", "Memory that is kept from the pool.",
           _memory(lambda m: m.balloon.pages * PAGE), "bytes"),
    Metric(GAUGE, "balloon_isolated_pages", "Pages of the balloon under migration.",
           _memory(lambda m: m.balloon.isolated)),
    Metric(COUNTER, "balloon_migrated_pages", "Pages of the balloon that were moved.",
           _memory(lambda m: m.balloon.migrated)),
    # zsmalloc/classes
    Metric(GAUGE, "class_obj_allocated", "Places for objects, by size class in bytes.",
           _by_class(lambda c: c.obj_allocated), labels=("size",)),
    Metric(GAUGE, "class_obj_used", "Objects.", _by_class(lambda c: c.obj_used), labels=("size",)),
    Metric(GAUGE, "class_pages_used", "Pages of the pool.",
           _by_class(lambda c: c.pages_used), labels=("size",)),
    Metric(GAUGE, "class_pages_per_zspage", "Pages of one zspage.",
           _by_class(lambda c: c.pages_per_zspage), labels=("size",)),
    Metric(GAUGE, "class_freeable_pages", "Pages that object compaction could free.",
           _by_class(lambda c: c.freeable), labels=("size",)),
    Metric(GAUGE, "class_zspages", "Zspages by how full they are: up to 10 %, 20 % ...; zeros are left out.",
           _zspages, labels=("size", "fullness")),
)
