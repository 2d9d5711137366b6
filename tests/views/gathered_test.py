# SPDX-License-Identifier: Apache-2.0
"""What `zramfs metrics` makes of the files of several devices: one text in either format."""
from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as families

from tests.support.sources import PAGE, source_in
from zramfs.host import bounded
from zramfs.tree.metric import COUNTER
from zramfs.tree.metric_table import TABLE
from zramfs.views import gathered
from zramfs.views.gathered import Gatherer, Source


class Collected:
    """Both texts of these sources, and what was said meanwhile."""

    def __init__(self, *sources: Source) -> None:
        self.said: list[str] = []
        gatherer = Gatherer(lambda: sources, self.said.append)
        try:
            self.text = gathered.to_prometheus(gatherer).decode()
            self.warnings = self.said.copy()
            self.openmetrics = gathered.to_openmetrics(gatherer).decode()
        finally:
            gatherer.close()

    def values(self, name: str) -> dict[str, float]:
        """By device."""
        return {each.labels.get("device", ""): each.value
                for family in families(self.text) for each in family.samples if each.name == name}


async def test_the_families_of_all_devices_stand_once_in_both_formats(tmp_path: Path) -> None:
    got = Collected(await source_in(tmp_path, "a"), await source_in(tmp_path, "b", pages=7))
    for text, parse in ((got.text, families), (got.openmetrics, open_families)):
        names = re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)
        assert len(names) == len(set(names)) == len(TABLE) + 2
        found = list(parse(text))
        assert {each.labels.get("device") for family in found for each in family.samples} == {None, "a", "b"}
    assert got.openmetrics.endswith("# EOF\n") and "# EOF" not in got.text
    assert got.values("zramfs_orig_data_bytes") == {"a": 0, "b": 7 * PAGE}
    assert got.values("zramfs_up") == {"a": 1, "b": 1} and got.values("zramfs_devices") == {"": 2}
    assert got.warnings == []


async def test_counters_keep_type_and_help_in_the_format_of_the_textfile_collector(tmp_path: Path) -> None:
    """It knows a counter by a TYPE line with the very name of the sample."""
    text = Collected(await source_in(tmp_path, "a"), await source_in(tmp_path, "b")).text
    for metric in TABLE:
        if metric.kind == COUNTER:
            name = f"zramfs_{metric.name}_total"
            head = f"# HELP {name} {metric.help}\n# TYPE {name} counter\n"
            assert f"{head}{name}{{" in text, name
        else:
            head = f"# HELP zramfs_{metric.name} {metric.help}\n# TYPE zramfs_{metric.name} {metric.kind}\n"
            assert head in text, metric.name


async def test_a_device_that_does_not_answer_is_down_and_left_out(tmp_path: Path) -> None:
    good, gone, other = [await source_in(tmp_path, name) for name in ("good", "gone", "other")]
    (gone.directory / "metrics").unlink()
    (other.directory / "metrics").write_text("something else\n")
    dead = Source("dead", tmp_path / "dead", "ramdisk", "/mnt/dead", "its daemon is dead")
    got = Collected(good, gone, other, dead)
    assert got.values("zramfs_up") == {"good": 1, "gone": 0, "other": 0, "dead": 0}
    assert got.values("zramfs_devices") == {"": 4}
    assert got.values("zramfs_disksize_bytes").keys() == {"good"}
    assert 'zramfs_up{device="dead",kind="ramdisk",where="/mnt/dead"} 0.0' in got.text
    said = dict(each.split(": ", 1) for each in got.warnings)
    assert said["dead"] == "its daemon is dead"
    assert said["gone"] == f"{gone.directory}/metrics: No such file or directory"
    assert said["other"].startswith(f"{other.directory}/metrics does not read as OpenMetrics of zramfs")
    assert said.keys() == {"dead", "gone", "other"}


async def test_no_series_stands_twice_whatever_a_device_says(tmp_path: Path) -> None:
    """Prometheus refuses all of a text in which one does."""
    one, liar = await source_in(tmp_path, "one"), await source_in(tmp_path, "liar")
    (liar.directory / "metrics").write_text((one.directory / "metrics").read_text())
    dead = Source("one", tmp_path / "elsewhere", "device", "/mnt/one", "its daemon is dead")
    got = Collected(dead, one, liar)
    lines = [line.rpartition(" ")[0] for line in got.text.splitlines() if line[0] != "#"]
    assert len(lines) == len(set(lines))
    assert got.values("zramfs_up") == {"one": 1, "liar": 0}, "of two with a name, the one that lives"
    assert got.values("zramfs_devices") == {"": 2}
    assert "liar: expected samples of the device liar, got one of 'one'" in got.warnings


async def test_daemons_of_two_versions_are_put_together(tmp_path: Path) -> None:
    old, new = await source_in(tmp_path, "old"), await source_in(tmp_path, "new")
    text = (old.directory / "metrics").read_text()
    text = text.replace("# TYPE zramfs_same_pages gauge", "# TYPE zramfs_same_pages unknown")
    text = re.sub(r"# HELP zramfs_wipe (?:.*\n)+?(?=# HELP)", "", text)
    (old.directory / "metrics").write_text(text)
    got = Collected(new, old)
    assert got.values("zramfs_same_pages").keys() == {"new"}, "of two types the first"
    assert got.values("zramfs_wipe").keys() == {"new"}
    assert got.values("zramfs_corrupt_total").keys() == {"old", "new"}


def test_without_a_device_there_is_a_text_all_the_same() -> None:
    got = Collected()
    assert "\nzramfs_devices 0.0\n" in got.text
    assert got.values("zramfs_up") == {} and got.openmetrics.endswith("# EOF\n")


async def test_names_that_text_formats_fear(tmp_path: Path) -> None:
    source = await source_in(tmp_path, 'a "b" \\ {c}')
    hostile = Source(source.name, source.directory, "device", "/mnt/\udcff\n")
    got = Collected(hostile)
    assert got.values("zramfs_up") == {source.name: 1} and got.warnings == []
    assert [each.labels["where"] for family in families(got.text) for each in family.samples
            if each.name == "zramfs_up"] == ["/mnt/?\n"]


async def test_a_device_that_hangs_has_one_read_under_way_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server would have it that is asked again and again."""
    monkeypatch.setattr(bounded, "ANSWER_TIMEOUT", 3)  # of which the other device needs little on any machine
    good, slow = await source_in(tmp_path, "good"), await source_in(tmp_path, "slow")
    answer = (slow.directory / "metrics").read_bytes()
    (slow.directory / "metrics").unlink()
    os.mkfifo(slow.directory / "metrics")  # whose reader waits, as behind a server that hangs
    said: list[str] = []
    gatherer = Gatherer(lambda: (good, slow), said.append)
    gathered.to_prometheus(gatherer)
    under_way = gatherer._readers[slow.directory]._call
    text = gathered.to_prometheus(gatherer).decode()
    assert under_way is not None and gatherer._readers[slow.directory]._call is under_way
    assert 'zramfs_up{device="slow",kind="device",where="/mnt/slow"} 0.0' in text
    assert 'zramfs_disksize_bytes{device="good"}' in text
    assert 'zramfs_disksize_bytes{device="slow"}' not in text
    assert len(said) == 2 and all(re.fullmatch(r"slow: it has not answered for \d+ s", each) for each in said)
    with open(slow.directory / "metrics", "wb") as pipe:
        pipe.write(answer)
    monkeypatch.setattr(bounded, "ANSWER_TIMEOUT", 60)
    text = gathered.to_prometheus(gatherer).decode()
    assert 'zramfs_disksize_bytes{device="slow"} 1.048576e+06' in text
    gatherer.close()
