# SPDX-License-Identifier: Apache-2.0
"""The dashboard and the alerts of monitoring/ against what `zramfs metrics` prints.

Every metric and label that a query names must be printed by a device. The alerts run in Prometheus' own
evaluator (promtool): none fires on a device that idles or on empty swap, each fires on its trouble, and none
is left after the trouble has gone.
"""
from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as families

from tests.support.backing_tools import backing_file
from tests.support.paths import ROOT
from tests.support.sources import source_in
from tests.support.whole import tool_environment
from zramfs.model.policy import Recompress
from zramfs.views import gathered
from zramfs.views.gathered import Gatherer, Source

DASHBOARD = json.loads((ROOT / "monitoring/zramfs-dashboard.json").read_text())
RULES = ROOT / "monitoring/zramfs.rules.yml"
PAGE = 4096
# Of node_exporter, which is no metric of ours.
FOREIGN = {"node_textfile_mtime_seconds": {"file", "instance"}}
_SELECTOR = re.compile(r"(?<![\w$])((?:zramfs|node)_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"((?:[^"\\]|\\.)*)"')


def alerts() -> dict[str, str]:
    """The expression of each, by its name."""
    found = {}
    for block in re.split(r"^ {6}- alert: ", RULES.read_text(), flags=re.MULTILINE)[1:]:
        text = re.search(r"^ {8}expr: (.*\n(?: {10}.*\n)*)", block, re.MULTILINE)[1]
        found[block.splitlines()[0]] = " ".join(text.removeprefix("|").split())
    return found


def panels() -> list[dict]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


async def text_of(place: Path, name: str, pages: int = 0, **config: object) -> Source:
    return await source_in(place, name, pages, size=64 << 20, **config)


def printed(*sources: Source) -> list[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each sample, in Prometheus' format."""
    gatherer = Gatherer(lambda: sources, pytest.fail)
    text = gathered.to_prometheus(gatherer).decode()
    return [(each.name, {"instance": "host", **each.labels}, each.value)
            for family in families(text) for each in family.samples]


@pytest.fixture
async def shown(tmp_path: Path) -> dict[str, dict[str, set[str]]]:
    """Of every sample that there can be: its name, its labels, and their values."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    source = await text_of(tmp_path, "z", 100, mem_limit=32 << 20, policies=(Recompress(60),),
                           writeback=backing_file(tmp_path / "file", 100 * PAGE))
    for name, labels, _ in printed(source):
        for label, value in labels.items():
            found[name][label].add(value)
    return found


def expect_known(query: str, shown: dict[str, dict[str, set[str]]]) -> None:
    selectors = _SELECTOR.findall(query)
    assert selectors, query
    labels_of_all = set()
    for name, matchers in selectors:
        if name in FOREIGN:
            labels_of_all |= FOREIGN[name]
            continue
        assert name in shown, f"no device prints {name}: {query}"
        assert not re.sub(r"[\s,]", "", _MATCHER.sub("", matchers)), matchers
        for label, how, value in _MATCHER.findall(matchers):
            assert label in shown[name], f"{name} has no label {label}: {query}"
            if "$" not in value:
                words = value.split("|") if "~" in how else [value]
                assert set(words) <= shown[name][label], f"{label}={value}: {sorted(shown[name][label])}"
        labels_of_all |= shown[name].keys()
    for labels in re.findall(r"\b(?:on|by|ignoring|without) ?\(([^)]*)\)", query):
        assert {label.strip() for label in labels.split(",")} <= labels_of_all, query


async def test_every_query_of_the_dashboard_asks_for_what_is_printed(shown) -> None:
    assert len(panels()) >= 20
    for panel in panels():
        for target in panel["targets"]:
            expect_known(target["expr"], shown)
            names = {name for name, _ in _SELECTOR.findall(target["expr"])}
            labels = set.intersection(*(set(shown[name]) for name in names))
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert label in labels, f"{panel['title']}: {label} of {target['expr']}"
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            inner, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
            expect_known(inner, shown)
            assert label in shown[_SELECTOR.match(inner)[1]]


def test_the_dashboard_has_what_grafana_loads() -> None:
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert {"datasource", "instance", "device"} == known
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"} == known
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) and DASHBOARD["schemaVersion"] >= 36
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["title"] and panel["datasource"]["uid"] == "${datasource}"
        assert [t["refId"] for t in panel["targets"]] == [chr(65 + i) for i in range(len(panel["targets"]))]


async def test_every_alert_asks_for_what_is_printed_and_says_what_to_do(shown) -> None:
    text = RULES.read_text()
    for name, query in alerts().items():
        expect_known(query, shown)
        block = text.split(f"- alert: {name}\n")[1].split("- alert: ")[0]
        assert re.search(r"severity: (info|warning|critical)", block), name
        assert "summary:" in block and "description:" in block, name
        known = {label for each, _ in _SELECTOR.findall(query) for label in shown.get(each) or FOREIGN[each]}
        assert set(re.findall(r"\$labels\.(\w+)", block)) <= known, name
    assert f"{len(alerts())} alerts" in (ROOT / "docs/monitoring.md").read_text()


# What happens to a device for each alert: the series by name and labels, and its values each minute. The
# trouble begins at minute 10 and is over at minute 50 at the latest.
TROUBLE: dict[str, list[tuple[str, dict[str, str], str]]] = {
    "ZramfsDeviceDown": [("zramfs_up", {}, "1x9 0x39 1x200")],
    "ZramfsDataDamaged": [("zramfs_failed_reads_total", {}, "0x9 2x240")],
    "ZramfsWritesRefused": [("zramfs_failed_writes_total", {}, "5x9 905x240")],
    "ZramfsNoRoom": [("zramfs_room_refused_total", {}, "0x9 1x240")],
    "ZramfsAlmostFull": [("zramfs_mem_limit_bytes", {}, "1000000x250"),
                         ("zramfs_mem_used_bytes", {}, "0x9 950000x39 20000x200")],
    "ZramfsHardlyCompresses": [("zramfs_orig_data_bytes", {}, "0x9 1100000000x39 1100000000x200"),
                               ("zramfs_mem_used_bytes", {}, "0x9 1000000000x39 400000000x200")],
    "ZramfsSlowRequests": [
        ("zramfs_request_duration_seconds_bucket", {"operation": "read", "le": "0.067108864"},
         "0x9 0+1000x39 40000x200"),
        ("zramfs_request_duration_seconds_bucket", {"operation": "read", "le": "0.134217728"},
         "0x9 0+1200x39 48000x200"),
        ("zramfs_request_duration_seconds_bucket", {"operation": "read", "le": "+Inf"},
         "0x9 0+1200x39 48000x200"),
        ("zramfs_request_duration_seconds_bucket", {"operation": "read", "le": "1.073741824"},
         "0x9 0+1200x39 48000x200"),
        ("zramfs_request_duration_seconds_count", {"operation": "read"}, "0x9 0+1200x39 48000x200")],
    "ZramfsStalled": [
        ("zramfs_request_duration_seconds_count", {"operation": "write"}, "7000+10x9 7101+10x240"),
        ("zramfs_request_duration_seconds_bucket", {"operation": "write", "le": "1.073741824"},
         "7000+10x9 7100+10x240")],
    "ZramfsPastLimit": [("zramfs_governor_state", {"state": "frozen"}, "0x9 1x39 0x200")],
    "ZramfsBackingStoreFails": [("zramfs_backing_errors_total", {"operation": "write"}, "0x9 1x240")],
    "ZramfsMachineStoodStill": [("zramfs_ballast_releases_total", {}, "0x9 1x240")],
    "ZramfsSwapNotLocked": [("zramfs_lane_unlocked_bytes", {}, "0x9 65536x39 0x200"),
                            ("zramfs_reserve_bytes", {"state": "target"}, "16777216x250")],
    "ZramfsTaskFailed": [("zramfs_task_failures_total", {"task": "compactor"}, "0x9 1x240")],
}
HOURS = "x250"  # minutes that a series without trouble stays as it is


def series(name: str, labels: dict[str, str], values: str) -> dict[str, str]:
    said = ",".join(f"{label}={json.dumps(value)}" for label, value in labels.items())
    return {"series": f"{name}{{{said}}}", "values": values}


def evaluated(place: Path, input_series: list[dict[str, str]], firing: dict[int, set[str]]) -> str:
    """What promtool complains about: "" if at each of these minutes just these alerts fire. It gets the
    series that a rule asks for, since each that it loads costs a millisecond."""
    asked = {name for query in alerts().values() for name, _ in _SELECTOR.findall(query)}
    input_series = [each for each in input_series if each["series"].partition("{")[0] in asked]
    expected = [
        {"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": f"{minute}m",
         "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(names)]}
        for minute, names in firing.items()
    ]
    test = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [
        {"interval": "1m", "input_series": input_series, "promql_expr_test": expected}]}
    file = place / "test.yml"
    file.write_text(json.dumps(test))  # which is YAML too
    done = subprocess.run(["promtool", "test", "rules", file], text=True, capture_output=True, timeout=200,
                          env=tool_environment())
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.requires("promtool")
async def test_no_alert_fires_on_a_device_that_idles_or_on_empty_swap(tmp_path: Path) -> None:
    """Also not on one that an ordinary user made, whose lane is not locked, or whose longest request was
    slow long ago."""
    lane_text = await text_of(tmp_path, "plain", mem_limit=32 << 20)
    file = lane_text.directory / "metrics"
    file.write_text(re.sub(r"^(zramfs_(?:lane_unlocked_bytes|longest_request_seconds)\{.*\}) .*", r"\1 70000",
                           file.read_text(), flags=re.MULTILINE))
    swap = await text_of(tmp_path, "swap", 1)  # mkswap writes a page
    swap_file = swap.directory / "metrics"
    text, times = re.subn(r'(zramfs_reserve_bytes\{.*state="target"\}) .*', r"\1 16777216",
                          swap_file.read_text())
    assert times == 1
    swap_file.write_text(text)
    rows = printed(lane_text, swap)
    assert [value for name, labels, value in rows if name == "zramfs_orig_data_bytes"] == [0, PAGE]
    constant = [series(name, labels, f"{value:.17g}{HOURS}") for name, labels, value in rows]
    quiet = {minute: set() for minute in (1, 5, 30, 90, 240)}
    assert evaluated(tmp_path, constant, quiet) == ""
    # That the test can fail: the same with one dead device.
    down = [each | ({"values": "0x250"} if each["series"].startswith("zramfs_up{") else {})
            for each in constant]
    assert "ZramfsDeviceDown" in evaluated(tmp_path, down, quiet)


@pytest.mark.requires("promtool")
@pytest.mark.parametrize("name", [name for name in alerts() if name != "ZramfsMetricsStale"])
async def test_an_alert_fires_on_its_trouble_and_clears_after_it(name: str, tmp_path: Path) -> None:
    rows = printed(await text_of(tmp_path, "z", 50))
    input_series = []
    changes = TROUBLE[name].copy()
    for metric, labels, value in rows:
        values = f"{value:.17g}{HOURS}"
        for change in TROUBLE[name]:
            if change[0] == metric and change[1].items() <= labels.items():
                values = change[2]
                changes.remove(change)
        input_series.append(series(metric, labels, values))
    assert changes == [], "each names exactly one series"
    # Events are seen for 10 minutes; a state has to last for up to 30.
    during = 15 if "x240" in TROUBLE[name][0][2] else 47
    assert evaluated(tmp_path, input_series, {5: set(), during: {name}, 75: set(), 200: set()}) == ""


@pytest.mark.requires("promtool")
def test_a_text_file_that_nobody_renews_is_an_alert_until_somebody_does(tmp_path: Path) -> None:
    """promtool's clock begins at 0."""
    labels = {"file": "/var/lib/prometheus/node-exporter/zramfs.prom", "instance": "host"}
    values = "0+60x10 600x20 1860+60x100"
    rows = [series("node_textfile_mtime_seconds", labels, values),
            series("node_textfile_mtime_seconds", labels | {"file": "/x/apt.prom"}, "0x130")]
    assert evaluated(tmp_path, rows, {5: set(), 25: {"ZramfsMetricsStale"}, 40: set()}) == ""


def test_every_alert_has_a_trouble_in_the_tests() -> None:
    assert TROUBLE.keys() | {"ZramfsMetricsStale"} == alerts().keys()


@pytest.mark.requires("promtool")
def test_promtool_takes_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", RULES], text=True, capture_output=True, timeout=200,
                          env=tool_environment())
    assert done.returncode == 0 and f"SUCCESS: {len(alerts())} rules found" in done.stdout, done
