# SPDX-License-Identifier: Apache-2.0
"""The file `metrics`: OpenMetrics by its own parser, and each number against the attribute files."""
from __future__ import annotations

import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as prometheus_families

from tests.support.backing_tools import backing_file
from tests.support.fakes import FakeLane
from zramfs.device.device import Device
from zramfs.model.config import Algorithm, DeviceConfig
from zramfs.model.stats import BUCKET_BOUNDS, OPERATIONS, Latency
from zramfs.tree import metrics
from zramfs.tree.files import tree_of
from zramfs.tree.metric_table import TABLE
from zramfs.tree.tree import Directory
from zramfs.views import sample

PAGE = 4096


def latency(seed: int) -> Latency:
    return Latency(tuple(range(seed, seed + len(BUCKET_BOUNDS) + 1)), seed * 1_000_000_007)


def made(size: int = 0, directory: str = "/mnt/z0", name: str = "mnt-z0", **more: object) -> Device:
    """A device whose lane says a different number for everything that it counts."""
    lane = FakeLane()
    numbers = {field: number for number, field in enumerate(lane.counters.__dataclass_fields__, 1000)}
    lane.counters = dataclasses.replace(
        lane.counters, **numbers | {"latency": tuple(map(latency, (3, 5, 7))), "can_resend": True}
    )
    config = DeviceConfig(directory=Path(directory), rundir=Path("/run/z0"), size=size, name=name, **more)
    return Device(config, lane)


async def filled() -> Device:
    """Data of every kind, holes, both compactions, a balloon."""
    device = made(64 << 20, mem_limit=48 << 20, algorithms=(Algorithm("zstd", 5),))
    await device.start()
    store = device._lane.store
    source = os.urandom(PAGE)
    for page in range(3000):
        kept = page * 37 % PAGE
        store.write(page * PAGE, source[:kept].ljust(PAGE, b"z") if page % 5 else bytes(PAGE))
    store.write(3000 * PAGE, b"12345678" * 512)
    for page in range(0, 3000, 3):
        store.zero(page * PAGE, PAGE)
    await device.command("mem_limit=4096")
    with pytest.raises(OSError, match="No space"):
        store.write(3001 * PAGE, os.urandom(PAGE))
    await device.command("mem_limit=48M")
    await device.command("compact")
    for page in range(1, 3000, 3):
        store.zero(page * PAGE, PAGE)
    await device.command("balloon=1M")
    store.balloon.adjust(256, None)
    with tempfile.TemporaryDirectory() as place:
        await device.command(f"save={place}/image")
    return device


def tree(device: Device) -> dict[str, str]:
    """What the readable files say."""

    def below(directory: Directory, above: str) -> dict[str, str]:
        found = {}
        for node in directory.children:
            if isinstance(node, Directory):
                found |= below(node, f"{above}{node.name}/")
            elif getattr(node, "read", None):
                found[above + node.name] = node.read().decode()
        return found

    return below(tree_of(device, Path("/run/z0/disk")), "")


def families(text: str):
    return list(text_string_to_metric_families(text))


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, label=value, ...) -> number, without the label `device`."""
    found = {}
    for family in families(text):
        for each in family.samples:
            labels = (f"{k}={v}" for k, v in sorted(each.labels.items()) if k != "device")
            key = (each.name.removeprefix("zramfs_"), *labels)
            assert key not in found
            found[key] = each.value
    return found


async def test_it_is_openmetrics():
    text = tree(await filled())["metrics"]
    assert text.endswith("\n# EOF\n")
    for family in families(text):
        assert family.name.startswith("zramfs_") and family.documentation.endswith("."), family.name
        # node_exporter's textfile collector refuses a file with any other type.
        assert family.type in ("counter", "gauge", "histogram"), family.name
        for ending in ("bytes", "seconds", "ratio"):
            assert family.name.endswith(ending) == (family.unit == ending), family.name
        assert family.samples, family.name
        for each in family.samples:
            assert each.labels["device"] == "mnt-z0" and not math.isnan(each.value), each
    assert len(families(text)) == len(TABLE) == len({metric.name for metric in TABLE})
    assert re.findall(r"^# TYPE zramfs_(\S+) ", text, re.MULTILINE) == [metric.name for metric in TABLE]


async def test_it_is_also_in_the_format_that_node_exporter_reads():
    """That is the older one: from OpenMetrics it would take each counter for untyped, since the type stands
    with a name that no sample has."""
    device = await filled()
    text = metrics.prometheus_text(device).decode()
    assert "# EOF" not in text and "# UNIT" not in text
    typed = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    for line in text.splitlines():
        if not line.startswith("#"):
            name = re.match(r"[a-z_]+", line)[0]
            histogram = re.sub("_(bucket|sum|count)$", "", name)
            assert typed.get(name) in ("counter", "gauge") or typed[histogram] == "histogram", line
    classic = {
        (each.name, *sorted(each.labels.items())): each.value
        for family in prometheus_families(text) for each in family.samples
    }
    ours = metrics.openmetrics_text(device).decode()
    assert classic.keys() == {
        (each.name, *sorted(each.labels.items())) for family in families(ours) for each in family.samples}
    assert len(typed) == len(TABLE)


async def test_every_number_of_the_attribute_files_is_in_it():
    device = await filled()
    files = tree(device)
    got = samples(files["metrics"])
    expected: dict[tuple[str, ...], float] = {}

    def expect(name: str, value: float, *labels: str) -> None:
        expected[name, *labels] = value

    assert files["zram/initstate"] == "1\n"
    expect("disksize_bytes", int(files["zram/disksize"]))
    algorithm = re.search(r"\[(\w+)\]", files["zram/comp_algorithm"])[1]
    expect("device_info", 1, f"algorithm={algorithm}", "directory=/mnt/z0", "level=5", "version=0.1.0")
    names = ("orig_data_bytes", "compr_data_bytes", "mem_used_bytes", "mem_limit_bytes", "mem_used_max_bytes",
             "same_pages", "pages_compacted_total", "huge_pages", "huge_pages_stored_total")
    for name, word in zip(names, files["zram/mm_stat"].split(), strict=True):
        expect(name, int(word))
    names = ("failed_reads_total", "failed_writes_total", "", "notify_free_total")
    for name, word in zip(names, files["zram/io_stat"].split(), strict=True):
        expect(name, int(word)) if name else None

    head = device.stats().headroom
    expect("keep_free_bytes", head.keep_free)
    limit = int(files["zram/mm_stat"].split()[3]) - int(files["zram/mm_stat"].split()[2])
    for bound, room in (("host", head.host_room), ("cgroup", head.group_room), ("mem_limit", limit)):
        expect("room_bytes", room, f"bound={bound}") if room is not None else None
    expect("room_looks_total", head.looks)
    expect("room_refused_total", 0)

    expect("algorithms", 1, f"algorithm={algorithm}", "dictionary=", "level=5", "priority=0")
    expect("access_times", 0)
    expect("wipe", 0)
    done = device.stats().recompression
    expect("recompress_tried_total", done.tried)
    for result in ("won", "kept", "no_room", "busy"):
        expect("recompress_pages_total", getattr(done, result), f"result={result}")
    expect("recompress_saved_bytes_total", done.bytes_saved)
    expect("recompress_incompressible_total", done.incompressible)

    for name in ("units", "unit_bytes", "unit_reads_total", "unit_saved_bytes_total",
                 "unit_making_cpu_seconds_total", "unit_pages_tried_total", "unit_pages_packed_total"):
        expect(name, 0)
    for state in ("live", "dead"):
        expect("unit_places", 0, f"state={state}")
    for result in ("made", "kept", "dissolved", "no_room"):
        expect("unit_making_total", 0, f"result={result}")
    for result in ("joined", "busy"):
        expect("unit_making_pages_total", 0, f"result={result}")

    for name in ("shared_pages", "shared_objects", "shared_bytes", "share_looked_total",
                 "share_objects_total", "share_saved_bytes_total", "share_table_bytes",
                 "dictionaries_trained_total", "dictionary_cpu_seconds_total"):
        expect(name, 0)
    for result in ("joined", "unequal", "alone", "no_room", "busy"):
        expect("share_pages_total", 0, f"result={result}")
    for result in ("taken", "rejected", "dropped"):
        expect("dictionaries_total", 0, f"result={result}")
    for name in ("dictionary_pages", "dictionary_won_bytes", "dictionary_memory_bytes"):
        for priority in (1, 2, 3):
            expect(name, 0, f"priority={priority}")

    for state in ("used", "stale", "free"):
        expect("backing_blocks", 0, f"state={state}")
    for name in ("backing_read_blocks_total", "backing_written_blocks_total", "writeback_limit_blocks",
                 "writeback_limit_enable", "writeback_runs_total"):
        expect(name, 0)
    expect("writeback_batch_size", int(files["zram/writeback_batch_size"]))
    expect("writeback_compressed", int(files["zram/compressed_writeback"]))
    for operation in ("read", "write"):
        expect("backing_errors_total", 0, f"operation={operation}")
    for result in ("written", "used", "failed"):
        expect("writeback_pages_total", 0, f"result={result}")

    # stat says in whole ms, and in the sum of the buckets, what the histograms say exactly.
    r, _, rs, _, w, _, ws, _, flying, busy, _, d, _, ds, *_ = map(int, files["zram/stat"].split())
    expect("requests_in_flight", flying)
    expect("io_time_seconds_total", busy / 1000)
    for operation, sectors in (("read", rs), ("write", ws), ("discard", ds)):
        expect("request_bytes_total", sectors * 512, f"operation={operation}")
    assert (r, w, d) == (1000, 1003, 1009), "of the lane's numbers, which hold no histogram here"
    for operation, one in zip(OPERATIONS, device._lane.counters.latency, strict=True):
        label = f"operation={operation}"
        for i, bound in enumerate(BUCKET_BOUNDS):
            expect("request_duration_seconds_bucket", sum(one.counts[:i + 1]), f"le={bound / 1e9}", label)
        expect("request_duration_seconds_bucket", one.count, "le=+Inf", label)
        expect("request_duration_seconds_count", one.count, label)
        expect("request_duration_seconds_sum", one.ns / 1e9, label)

    lane = device._lane.counters
    expect("longest_request_seconds", lane.longest_us / 1e6)
    expect("protocol_errors_total", lane.protocol_errors)
    expect("reply_errors_total", lane.reply_errors)
    expect("refused_truncations_total", lane.refused_sizes, "reason=size")
    expect("refused_truncations_total", lane.busy_truncations, "reason=busy")
    expect("lane_unlocked_bytes", lane.unlocked_bytes)
    expect("helped_pieces_total", lane.helped_pieces)
    expect("put_off_requests_total", lane.put_off)
    expect("waited_requests_total", lane.waited)
    expect("written_back_pages", 0)
    expect("recoveries_total", 0)
    expect("pages_lost_total", 0)
    expect("fuse_minor", lane.protocol_minor)
    expect("fuse_can_resend", 1)
    expect("lane_alive", 1)
    expect("lane_threads", 2)
    expect("disk_opens", 0)

    for order, word in enumerate(files["memory/buddyinfo"].split()[4:]):
        expect("free_blocks", int(word), f"order={order}")
    blocks = sample._pageblocks(files["memory/pageblocks"])
    resident = [block for block in blocks if block.resident]
    expect("pageblocks_in_use", len(resident))
    expect("resident_bytes", sum(512 - block.balloon for block in resident) * PAGE)
    expect("frames", sum(block.used for block in resident), "state=used")
    expect("frames", sum(block.free for block in resident), "state=free")
    expect("pageblocks_most", device.stats().store.pageblocks_total)
    expect("reserve_bytes", 0, "state=ready")
    expect("reserve_bytes", 0, "state=target")
    expect("reserve_misses_total", 0)
    expect("ballast_bytes", 0, "state=held")
    expect("ballast_bytes", 0, "state=target")
    expect("ballast_releases_total", 0)
    expect("corrupt_total", 0)

    rows = dict(line.split() for line in files["memory/compaction"].splitlines())
    for row, name, *labels in (
        ("proactiveness", "compaction_proactiveness"), ("runs", "migration_runs_total"),
        ("slices", "compactor_slices_total"), ("pages_scanned", "migration_pages_scanned_total"),
        ("pages_isolated", "migration_pages_isolated_total"),
        ("pages_migrated", "migration_pages_migrated_total"),
        ("failed_busy", "migration_failures_total", "reason=busy"),
        ("failed_again", "migration_failures_total", "reason=again"),
        ("failed_refused", "migration_failures_total", "reason=refused"),
        ("failed_unmovable", "migration_failures_total", "reason=unmovable"),
        ("failed_no_target", "migration_failures_total", "reason=no_target"),
        ("owner_gone", "migration_pages_owner_gone_total"), ("put_back", "migration_pages_put_back_total"),
        ("pageblocks_freed", "migration_pageblocks_freed_total"),
        ("pageblocks_deferred", "migration_pageblocks_deferred_total"),
        ("bytes_returned", "returned_bytes_total"),
    ):
        expect(name, int(rows.pop(row)), *labels)
    assert int(rows.pop("pages_compacted")) == expected["pages_compacted_total",]
    for row, name, factor, digits in (
        ("threshold_percent", "compaction_threshold_ratio", 100, 2),
        ("winnable_percent", "compaction_winnable_ratio", 100, 2),
        ("unusable_index", "compaction_unusable_ratio", 1, 3),
    ):
        assert rows.pop(row) == f"{factor * got[name,]:.{digits}f}"
        expect(name, got[name,])
    for row, name in (("time_ms", "compactor_time_seconds_total"),
                      ("migration_ms", "migration_time_seconds_total")):
        assert int(rows.pop(row)) == int(got[name,] * 1000)
        expect(name, got[name,])
    assert not rows
    expect("compactor_rounds_total", 0)

    rows = dict(line.split() for line in files["memory/policies"].splitlines())
    for row, name in (
        ("idle_seconds", "policy_idle_seconds"), ("rounds", "policy_rounds_total"),
        ("pages_tried", "policy_pages_tried_total"), ("pages_won pages_written", "policy_pages_total"),
        ("bytes_saved bytes_written", "policy_bytes_total"),
    ):
        names = row.split()
        for kind, of_kind in (("recompress", names[0]), ("units", names[0]), ("writeback", names[-1])):
            expect(name, int(rows.pop(f"{kind}_{of_kind}")), f"policy={kind}")
    expect("policy_written_bytes", int(rows.pop("writeback_bytes_in_24_hours")))
    assert not rows

    for mode in ("off", "auto", "max"):
        expect("density_mode", int(mode == "off"), f"mode={mode}")
    expect("density_share_ratio", 0.05)
    expect("density_resting", 0)
    for step in ("recompress", "dictionaries", "share", "units"):
        for number in ("rounds", "pages", "saved_bytes", "cpu_seconds"):
            expect(f"density_{number}_total", 0, f"step={step}")
    for step in ("recompress", "share"):
        expect(f"{step}_cpu_seconds_total", got[f"{step}_cpu_seconds_total",])

    rows = dict(line.split() for line in files["memory/units"].splitlines())
    for row, name, *label in (
        ("units", "units"), ("bytes", "unit_bytes"), ("unpacked", "unit_reads_total"),
        ("pages", "unit_places", "state=live"), ("dead_places", "unit_places", "state=dead"),
        *((result, "unit_making_total", f"result={result}")
          for result in ("made", "kept", "dissolved", "no_room")),
        *((f"pages_{what}", f"unit_pages_{what}_total") for what in ("tried", "packed")),
        *((f"pages_{what}", "unit_making_pages_total", f"result={what}") for what in ("joined", "busy")),
        ("bytes_saved", "unit_saved_bytes_total"),
    ):
        assert float(rows.pop(row)) == got[name, *label], row
    assert int(rows.pop("cpu_ms")) == int(1000 * got["unit_making_cpu_seconds_total",])
    expect("backing_unit_returned_total", int(rows.pop("returned_units")))
    expect("backing_unit_return_pages_total", int(rows.pop("returned_pages")), "result=pages")
    for result in ("busy", "failed"):
        expect("backing_unit_return_pages_total", 0, f"result={result}")
    assert int(rows.pop("return_cpu_ms")) == int(1000 * got["backing_unit_return_cpu_seconds_total",])
    expect("backing_unit_return_cpu_seconds_total", 0)
    for name in ("backing_unit_return_no_room_total", "backing_unit_pages_left_total"):
        expect(name, 0)
    assert not rows

    pairs = (line.split() for line in files["memory/contents"].splitlines())
    rows = {name: int(value) for name, value in pairs}
    # What lies where is taken from counters, and the file of mm_stat has the sums.
    assert sum(rows[name] for name in rows if name.endswith("_pages") and "step" not in name) * PAGE == int(
        files["zram/mm_stat"].split()[0])
    for kind in ("hot", "huge", "recompressed", "units", "shared", "same", "written_back"):
        expect("contents_pages", rows.pop(f"{kind}_pages"), f"kind={kind}")
        expect("contents_bytes", rows.pop(f"{kind}_bytes"), f"kind={kind}")
    expect("contents_bytes", rows.pop("rest_bytes"), "kind=rest")
    total = sum(value for (name, *_), value in got.items() if name == "contents_bytes")
    assert total == got["mem_used_bytes",]
    for step, name in (("recompress", "recompress_cpu"), ("share", "share_cpu"),
                       ("units", "unit_making_cpu")):
        expect(f"{name}_seconds_total", got[f"{name}_seconds_total",])
        assert rows.pop(f"step_{step}_cpu_ms") == int(1000 * got[f"{name}_seconds_total",])
    for step, name in (("recompress", "recompress"), ("share", "share"), ("units", "unit")):
        assert rows.pop(f"step_{step}_bytes_saved") == got[f"{name}_saved_bytes_total",]
    assert [rows.pop(f"step_{step}_pages") for step in ("recompress", "share", "units")] == [
        got["recompress_pages_total", "result=won"], got["share_pages_total", "result=joined"],
        got["unit_making_pages_total", "result=joined"]]
    assert rows.pop("step_dictionaries_cpu_ms") == int(1000 * got["dictionary_cpu_seconds_total",])
    for row, name in (("pages", "dictionary_pages"), ("bytes_saved", "dictionary_won_bytes")):
        assert rows.pop(f"step_dictionaries_{row}") == sum(
            got[name, f"priority={priority}"] for priority in (1, 2, 3))
    assert not rows and not files["memory/estimate"]

    rows = dict(line.split(" ", 1) for line in files["memory/governor"].splitlines())
    for state in ("off", "on", "braked", "frozen"):
        expect("governor_state", int(rows["state"] == state), f"state={state}")
    expect("governor_room_bytes", int(rows["room"] or 0))
    expect("governor_room_ratio", float(rows["ratio"]))
    expect("governor_freezes_total", int(rows["freezes"]))
    for row, kind in (("reserve", "size"), ("over", "used")):
        expect("governor_reserve_bytes", int(rows[row]), f"kind={kind}")
    for kind in ("free", "withheld", "allowed"):
        expect("governor_blocks_bytes", int(rows[kind] or 0), f"kind={kind}")

    expect("saves_total", 1, "result=saved")
    expect("saves_total", 0, "result=failed")
    expect("save_running", 0)
    saved = device.stats().save
    assert saved.taken == saved.pages > 0
    for kind, number in (("all", saved.pages), ("taken", saved.pages), ("kept", 0), ("lost", 0)):
        expect("save_pages", number, f"kind={kind}")
    expect("save_written_bytes", saved.written)
    expect("saved_timestamp_seconds", saved.saved_at)

    rows = dict(line.split() for line in files["memory/balloon"].splitlines())
    expect("balloon_target_bytes", int(rows.pop("target")))
    expect("balloon_bytes", int(rows.pop("size")))
    expect("balloon_isolated_pages", int(rows.pop("isolated")))
    expect("balloon_migrated_pages_total", int(rows.pop("migrated")))
    assert not rows

    for task in ("compactor", "density", "governor", "host memory", "kept image", "policies", "trimmer"):
        expect("task_failures_total", 0, f"task={task}")

    header, *lines = (line.split() for line in files["zsmalloc/classes"].splitlines())
    for cells in lines:
        if not cells or cells[0] == "Total":
            continue
        row = dict(zip(header, cells, strict=True))
        if row["pages_used"] == "0":
            continue
        label = f"size={row['size']}"
        for column, name in (("obj_allocated",) * 2, ("obj_used",) * 2, ("pages_used",) * 2,
                             ("pages_per_zspage",) * 2, ("freeable", "freeable_pages")):
            expect(f"class_{name}", int(row[column]), label)
        for group in header[2:13]:
            if row[group] != "0":
                expect("class_zspages", int(row[group]), f"fullness={group}", label)
    assert got == expected

    # What the device did is worth a comparison: nothing of it is 0 on both sides for want of use.
    for name in ("failed_writes_total", "notify_free_total", "pages_compacted_total", "same_pages",
                 "huge_pages", "balloon_bytes", "migration_runs_total", "class_obj_used"):
        assert any(value for key, value in got.items() if key[0] == name), name


class Recorder:
    """Stands for an object of statistics, and writes down which of its fields are asked for."""

    def __init__(self, real: object, asked: set[str]) -> None:
        self._real, self._asked = real, asked

    def __getattr__(self, name: str) -> object:
        self._asked.add(f"{type(self._real).__name__}.{name}")
        value = getattr(self._real, name)
        return Recorder(value, self._asked) if dataclasses.is_dataclass(value) else value


def every_field(stats: object) -> Iterator[str]:
    """Of a dataclass and of those in it."""
    for field in dataclasses.fields(stats):
        value = getattr(stats, field.name)
        if dataclasses.is_dataclass(value):
            yield from every_field(value)
        else:
            yield f"{type(stats).__name__}.{field.name}"


# What another metric says already, and what is no number.
ELSEWHERE = {
    *(f"LaneStats.{operation}_{what}" for operation in OPERATIONS for what in ("ios", "ms")),
    "LaneStats.queue_ms", "StoreStats.mem_limit", "ClassStats.index", "ClassStats.objs_per_zspage",
    "DeviceStats.last_error", "DeviceStats.room", "MemoryStats.won", "MemoryStats.store",
    "BackingSettings.path", "DeviceStats.proactiveness", "TaskStats.last_error", "GovernorStats.last_error",
    "GovernorStats.mountpoint", "GovernorStats.fstype", "UnitMakingStats.groups",
    "DictionaryStats.verdict",
    "SaveStats.path", "SaveStats.last_error", "DeviceStats.restored", "DeviceStats.survival",
    "DeviceStats.estimate",
    "DensityStats.lacks", "DensityStats.last_error",
}


async def test_no_statistic_is_left_out():
    """A new field needs a row in TABLE, or a word here why not."""
    device = await filled()
    asked: set[str] = set()
    stats, memory, classes = device.stats(), device.memory(), device.classes()
    figures = metrics.Figures(
        Recorder(stats, asked), Recorder(memory, asked), [Recorder(c, asked) for c in classes]
    )
    list(metrics.Collector(figures).collect())
    fields = {name for each in (stats, memory, classes[0]) for name in every_field(each)}
    assert fields - asked - ELSEWHERE == set()


async def test_write_back(tmp_path):
    device = made(1 << 20, writeback=backing_file(tmp_path / "file", 100 * PAGE))
    await device.start()
    store = device._lane.store
    store.write(0, os.urandom(20 * PAGE))
    await device.command("writeback=page_indexes=0-9")
    await device.command("writeback_limit_enable=on")
    await device.command("writeback_limit=5")
    with pytest.raises(OSError, match="used up"):
        await device.command("writeback=huge")
    store.read(0, 3 * PAGE)
    store.zero(PAGE, PAGE)
    files = tree(device)
    got = samples(files["metrics"])
    used, reads, writes = map(int, files["zram/bd_stat"].split())
    assert (used, reads, writes) == (14, 3, 15)
    assert got["backing_blocks", "state=used"] == used and got["written_back_pages",] == 14
    # A block that was taken and not written, because nothing more was allowed, counts as stale too.
    assert got["backing_blocks", "state=stale"] >= 1
    assert sum(got["backing_blocks", f"state={state}"] for state in ("used", "stale", "free")) == 100
    assert (got["backing_read_blocks_total",], got["backing_written_blocks_total",]) == (reads, writes)
    assert [got["backing_errors_total", f"operation={way}"] for way in ("read", "write")] == [0, 0]
    assert got["writeback_limit_blocks",] == int(files["zram/writeback_limit"]) == 0
    assert got["writeback_runs_total",] == 2 and got["writeback_pages_total", "result=written"] == 15
    await device.close()


async def test_a_device_that_is_not_set_up():
    device = made()
    got = samples(tree(device)["metrics"])
    assert got["disksize_bytes",] == got["orig_data_bytes",] == 0
    assert got["longest_request_seconds",] > 0
    assert not [key for key in got if key[0].startswith(("class_", "balloon_", "migration_", "free_blocks"))]
    await device.command("disksize=1M")
    assert samples(tree(device)["metrics"])["balloon_target_bytes",] == 0
    await device.command("reset")
    got = samples(tree(device)["metrics"])
    assert got["disksize_bytes",] == 0
    assert not [value for key, value in got.items() if key[0].startswith("request_") and value]


@pytest.mark.parametrize("name", ['a "quoted" name', "back\\slash", "two\nlines", "{brace}", "é", "\udcff"])
def test_names_that_text_formats_fear(name):
    device = made(directory=f"/mnt/{name}", name=name)
    shown = name.encode(errors="replace").decode()
    found = families(metrics.openmetrics_text(device).decode())
    [info] = [family for family in found if family.name.endswith("_info")]
    assert info.samples[0].labels["device"] == shown
    assert info.samples[0].labels["directory"] == f"/mnt/{shown}"
