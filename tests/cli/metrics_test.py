# SPDX-License-Identifier: Apache-2.0
"""zramfs metrics on real devices: to stdout, into a file, and over HTTP."""
from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families as families

from tests.support.child import stopped
from tests.support.commands import failure, kill_daemon, state_of
from tests.support.paths import ROOT
from tests.support.whole import MIB, ZRAMFS, Device, device, opened, run, tool_environment, wait_until, zramfs

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]
SECONDS = 60


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run directories of this test alone."""
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Device, Device]]:
    """An empty device and one with 8 pages."""
    with device(tmp_path / "first", MIB) as first, device(tmp_path / "second", 2 * MIB) as second:
        with opened(second.disk) as fd:
            os.pwrite(fd, b"some text " * 3277, 0)
        yield first, second


def by_device(text: str, name: str, parse=families) -> dict[str, float]:
    """Of the sample `name`, by the last part of the device's directory."""
    return {each.labels.get("device", "").rpartition("-")[2]: each.value
            for family in parse(text) for each in family.samples if each.name == name}


def test_all_devices_or_those_that_are_named(two: tuple[Device, Device]) -> None:
    done = zramfs("metrics")
    assert by_device(done.stdout, "zramfs_disksize_bytes") == {"first": MIB, "second": 2 * MIB}
    assert by_device(done.stdout, "zramfs_orig_data_bytes") == {"first": 0, "second": 9 * 4096}
    assert done.stderr == ""
    done = zramfs("metrics", two[1].directory, "--openmetrics")
    assert by_device(done.stdout, "zramfs_up", open_families) == {"second": 1}
    assert by_device(done.stdout, "zramfs_devices", open_families) == {"": 1}
    # What a device's own file says is here word for word, but for what the look itself changed.
    heads = [line for line in two[1].read("metrics").splitlines() if line.startswith("# ")]
    assert set(heads) <= set(done.stdout.splitlines())


def test_dead_and_hanging_devices_are_down(two: tuple[Device, Device]) -> None:
    first, second = two
    kill_daemon(state_of(first.directory))
    with stopped(state_of(second.directory).pid):
        done = zramfs("metrics")
    assert by_device(done.stdout, "zramfs_up") == {"first": 0, "second": 0}
    assert by_device(done.stdout, "zramfs_disksize_bytes") == {}
    what = f"its daemon is dead, and its data is lost; `zramfs stop {first.directory}` cleans up"
    assert what in done.stderr
    assert re.search(r"second: it has not answered for \d+ s", done.stderr)
    assert done.stderr.count("warning: ") == 2
    assert by_device(zramfs("metrics").stdout, "zramfs_up") == {"first": 0, "second": 1}


@pytest.mark.requires("promtool")
def test_promtool_finds_nothing_wrong_with_it(two: tuple[Device, Device]) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=zramfs("metrics").stdout, text=True,
                          capture_output=True, timeout=SECONDS, env=tool_environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_file_for_the_textfile_collector(two: tuple[Device, Device], tmp_path: Path) -> None:
    place = tmp_path / "collector"
    place.mkdir()
    file = place / "zramfs.prom"
    before = os.umask(0o077)
    try:
        assert zramfs("metrics", "--output", file).stdout == ""
    finally:
        os.umask(before)
    assert by_device(file.read_text(), "zramfs_up") == {"first": 1, "second": 1}
    assert stat.S_IMODE(file.stat().st_mode) == 0o644, "node_exporter has a user of its own"
    with open(file) as reader:
        start = reader.read(100)
        zramfs("metrics", two[0].directory, "--output", file)
        assert by_device(start + reader.read(), "zramfs_up") == {"first": 1, "second": 1}, "whole, as it was"
    assert by_device(file.read_text(), "zramfs_up") == {"first": 1}
    assert os.listdir(place) == ["zramfs.prom"]


@pytest.mark.requires("prometheus-node-exporter")
def test_node_exporter_shows_types_and_helps(two: tuple[Device, Device], tmp_path: Path) -> None:
    place = tmp_path / "collector"
    place.mkdir()
    zramfs("metrics", "--output", place / "zramfs.prom")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    exporter = subprocess.Popen(
        ["prometheus-node-exporter", f"--web.listen-address={address}", "--collector.disable-defaults",
         "--collector.textfile", f"--collector.textfile.directory={place}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=tool_environment())
    try:
        wait_until(lambda: answers(address), "node_exporter answers", SECONDS)
        shown = asked(f"http://{address}/metrics")[1]
    finally:
        exporter.kill()
        exporter.wait()
    heads = [line for line in (place / "zramfs.prom").read_text().splitlines()
             if line.startswith("# ") and "class_zspages" not in line]  # which has no sample yet
    assert len(heads) > 200 and set(heads) - set(shown.splitlines()) == set()
    assert "\nnode_textfile_scrape_error 0\n" in shown


def answers(address: str) -> bool:
    host, _, port = address.partition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    place = tmp_path / "collector"
    place.mkdir()
    os.mkfifo(place / "pipe.prom")
    assert "to be a regular file, or a name that is not taken yet" in failure(
        "metrics", "--output", place / "pipe.prom")
    assert os.listdir(place) == ["pipe.prom"]
    assert "No such file or directory" in failure("metrics", "--output", tmp_path / "nowhere/x.prom")
    # No room for the new one: a file may have no more than a byte here.
    zramfs("metrics", "--output", place / "x.prom")
    text = (place / "x.prom").read_text()
    words = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *ZRAMFS, "metrics", "--output", place / "x.prom"]
    done = run(*words, env=dict(os.environ), check=False)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert (place / "x.prom").read_text() == text
    assert sorted(os.listdir(place)) == ["pipe.prom", "x.prom"]


@contextlib.contextmanager
def listening(*words: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """`zramfs metrics --listen` on a free port, and its URL."""
    process = subprocess.Popen([*ZRAMFS, "metrics", *map(str, words)], stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        found = re.fullmatch(r"zramfs: note: answering on (http://\S+/metrics)\n", line)
        assert found, line + process.stderr.read()
        yield process, found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0, "the usual end of a server"
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def asked(url: str, **headers: str) -> tuple[str, str]:
    """Type and text of the answer."""
    request = urllib.request.Request(url, headers={name.replace("_", "-"): v for name, v in headers.items()})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=SECONDS) as answer:
        body = answer.read()
        if answer.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        return answer.headers["Content-Type"], body.decode()


def test_over_http_in_the_format_that_is_asked_for(two: tuple[Device, Device]) -> None:
    with listening("--listen", "127.0.0.1:0") as (_, url):
        kind, text = asked(url)
        assert kind.startswith("text/plain; version=0.0.4")
        assert by_device(text, "zramfs_disksize_bytes") == {"first": MIB, "second": 2 * MIB}
        kind, text = asked(url, Accept="application/openmetrics-text; version=1.0.0", Accept_Encoding="gzip")
        assert kind.startswith("application/openmetrics-text")
        assert by_device(text, "zramfs_up", open_families) == {"first": 1, "second": 1}
        # What becomes of devices is seen by the next look.
        kill_daemon(state_of(two[0].directory))
        assert by_device(asked(url)[1], "zramfs_up") == {"first": 0, "second": 1}
        zramfs("stop", two[0].directory)
        assert by_device(asked(url)[1], "zramfs_up") == {"second": 1}
        zramfs("create", two[0].directory, "--size", "4M")
        assert by_device(asked(url)[1], "zramfs_disksize_bytes") == {"first": 4 * MIB, "second": 2 * MIB}


def test_neither_a_silent_client_nor_a_device_that_hangs_stops_the_server(two: tuple[Device, Device]) -> None:
    with listening("--listen", "0") as (process, url):
        port = int(url.rpartition(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as silent:
            assert by_device(asked(url)[1], "zramfs_up") == {"first": 1, "second": 1}
            silent.setblocking(False)
        state = state_of(two[1].directory)
        with stopped(state.pid, 60):
            for _ in range(3):
                assert by_device(asked(url)[1], "zramfs_up") == {"first": 1, "second": 0}
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            assert len(children.read_text().split()) <= 1, "one read is under way, not three"
        assert by_device(asked(url)[1], "zramfs_up") == {"first": 1, "second": 1}
        wait_until(lambda: not children.read_text().split(), "no child is left")


def test_a_device_that_was_named_and_is_stopped_is_no_longer_there(two: tuple[Device, Device]) -> None:
    with listening(two[0].directory, two[1].directory, "--listen", "0") as (_, url):
        assert by_device(asked(url)[1], "zramfs_up") == {"first": 1, "second": 1}
        zramfs("stop", two[0].directory)
        assert by_device(asked(url)[1], "zramfs_up") == {"second": 1}
        zramfs("create", two[0].directory, "--size", "4M")
        assert by_device(asked(url)[1], "zramfs_disksize_bytes") == {"first": 4 * MIB, "second": 2 * MIB}


def test_a_signal_leaves_no_process_that_waits_for_a_device(two: tuple[Device, Device]) -> None:
    with stopped(state_of(two[1].directory).pid):
        process = subprocess.Popen([*ZRAMFS, "metrics"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: children.read_text().split(), "it asks")
        waiting = children.read_text().split()
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 128 + signal.SIGTERM
        process.communicate()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in waiting), "none is left")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_in_order_in_the_middle_of_a_request(
    two: tuple[Device, Device], number: signal.Signals
) -> None:
    with stopped(state_of(two[1].directory).pid), listening("--listen", "0") as (process, url):
        answer: list[str] = []
        client = threading.Thread(target=lambda: answer.append(asked(url)[1]))
        client.start()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: children.read_text().split(), "it asks the devices")
        process.send_signal(number)
        assert process.wait(SECONDS) == 0
        client.join()
        assert by_device(answer[0], "zramfs_up") == {"first": 1, "second": 0}


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this kernel has no IPv6")
def test_ipv6(two: tuple[Device, Device]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("the loopback has no IPv6 address")
    with listening("--listen", "[::1]:0") as (_, url):
        assert url.startswith("http://[::1]:")
        assert by_device(asked(url)[1], "zramfs_up") == {"first": 1, "second": 1}


@pytest.mark.parametrize(("words", "why"), [
    (["--listen", "0.0.0.0:9101"], "expected an address of the loopback"),
    (["--listen", "[::]:9101"], "expected an address of the loopback"),
    (["--listen", "example.org:9101"], "expected an IP address before the port"),
    (["--listen", "65536"], "expected [ADDRESS:]PORT"),
    (["--listen", "http"], "expected [ADDRESS:]PORT"),
    (["--listen", "9101", "--output", "x.prom"], "--listen goes alone"),
    (["--listen", "9101", "--openmetrics"], "--listen goes alone"),
    (["--output", "x.txt"], "expected --output to end with .prom"),
])
def test_what_is_refused(words: list[str], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert why in failure("metrics", *words, code=2)


def test_a_directory_without_a_device_and_a_port_that_is_taken(tmp_path: Path) -> None:
    assert f"no zramfs device of yours is on {tmp_path}" in failure("metrics", tmp_path)
    assert f"no zramfs device of yours is on {tmp_path}" in failure("metrics", tmp_path, "--listen", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Address already in use" in failure("metrics", "--listen", taken.getsockname()[1])


def test_without_devices_it_says_so() -> None:
    assert "\nzramfs_devices 0.0\n" in zramfs("metrics").stdout


@pytest.mark.requires("systemd-analyze")
def test_the_units_are_right_and_closed(tmp_path: Path) -> None:
    """1.9 of 10 with systemd 252."""
    for unit in (ROOT / "systemd").glob("zramfs-metrics.*"):
        shutil.copy(unit, tmp_path)
    service = tmp_path / "zramfs-metrics.service"
    service.write_text(service.read_text().replace("/usr/bin/zramfs", "/bin/true"))
    environment = {**tool_environment(), "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    done = run("systemd-analyze", "verify", "--man=no", "--generators=no", service,
               tmp_path / "zramfs-metrics.timer", env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run("systemd-analyze", "security", "--offline=yes", "--no-pager", service, env=environment)
    score = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert score and float(score[1]) < 2.5, done.stdout
