# SPDX-License-Identifier: Apache-2.0
"""A machine that boots with systemd, and shuts down: one file in /etc/zramfs is enough."""
from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.commands import backing_files
from tests.support.container import Container, booted
from tests.support.whole import wait_until
from zramfs.host import swaps

pytestmark = [
    pytest.mark.requires("systemd_container", "root", "fuse", "loop", "swap", "ext4"),
    pytest.mark.timeout(240),
]

CONFIGURATION = {
    "fast.conf": "mount-point = /mnt/fast\nzram-size = 64\ncompression-algorithm = zstd\nmode = 1777\n",
    "conf.d/plain.conf": "[plain]\ndirectory = /mnt/plain\nzram-size = 16\n",
    # Of priority 0: below every other, so that nobody's pages go there.
    "s.conf": "zram-size = 64\nswap-priority = 0\nreserve = 4\n",
    "broken.conf": "zram-size = ram /\n",
    "absent.conf": "directory = /mnt/absent\nhost-memory-limit = 1\n",
}

# A service as any other, that keeps its files on the RAM disk and may be swapped out.
USER = """
[Unit]
DefaultDependencies=no
RequiresMountsFor=/mnt/fast
After=local-fs.target swap.target
Conflicts=shutdown.target
Before=shutdown.target
[Service]
# Before its start is over, so that no shutdown comes earlier.
ExecStartPre=/bin/sh -c 'echo text >/mnt/fast/file'
ExecStart=/bin/sleep infinity
ExecStop=/bin/sh -c 'echo "user ends: $$(cat /mnt/fast/file); $$({swaps})" >>{trace}'
"""
AT_THE_END = """
[Service]
ExecStopPost=/bin/sh -c 'echo "%p ends: $$(grep -c " /mnt/fast " /proc/mounts) mounted; \
$$({swaps})" >>{trace}'
"""
SWAPS = 'cut -d" " -f1 /proc/swaps | tr "\\\\n" " "'


def expect_in_journal(machine: Container, unit: str, words: str) -> None:
    """journald reads what a service says some time after that."""
    command = ("journalctl", "--no-pager", "--output=cat", "-u", unit)
    wait_until(lambda: words in machine.run(*command), f"{unit} says {words}", 30)


def metrics_file(machine: Container, place: Path, up: Sequence[str]) -> str:
    """What zramfs-metrics.timer has written: within a second, since a drop-in says so, and not a minute. up:
    patterns of lines that it has at last. A device that a busy machine keeps waiting is not up at once."""
    made = place / "collector"
    made.mkdir()
    for unit, text in (
        ("service", f"[Unit]\nConditionPathIsDirectory=\n[Service]\nReadWritePaths={made}\n"
                    f"Environment=ZRAMFS_TEXTFILE={made}/zramfs.prom\n"),
        ("timer", "[Timer]\nOnCalendar=\nOnCalendar=*-*-* *:*:*\nRandomizedDelaySec=0\n"),
    ):
        directory = f"/run/systemd/system/zramfs-metrics.{unit}.d"
        machine.run("sh", "-c", f"mkdir -p {directory}; printf %s \"$1\" >{directory}/test.conf", "sh", text)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "zramfs-metrics.timer")
    file = made / "zramfs.prom"

    def shows_all() -> bool:
        text = file.read_text() if file.exists() else ""
        return all(re.search(line, text, re.MULTILINE) for line in up)

    try:
        wait_until(shows_all, "the timer has written its file", 30)
    except pytest.fail.Exception:
        said = machine.run("journalctl", "--no-pager", "-u", "zramfs-metrics.service", check=False)
        pytest.fail(said + (file.read_text() if file.exists() else ""))
    machine.run("systemctl", "stop", "zramfs-metrics.timer")
    return file.read_text()


def test_from_boot_to_shutdown(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.touch()
    units = {"user.service": USER.format(trace=trace, swaps=SWAPS)}
    for unit in ("zramfs@fast", "zramfs-swap@s"):
        units[f"{unit}.service.d/trace.conf"] = AT_THE_END.format(trace=trace, swaps=SWAPS)
    with booted(tmp_path, CONFIGURATION, units) as machine:
        for unit, state in (("zramfs@fast", "active"), ("zramfs@plain", "active"),
                            ("zramfs-swap@s", "active"), ("zramfs@broken", "failed"),
                            ("zramfs@absent", "inactive")):
            assert machine.state(f"{unit}.service") == state, machine.run(
                "journalctl", "--no-pager", check=False)
        assert machine.run("findmnt", "-no", "FSTYPE,OPTIONS", "/mnt/fast").startswith("ext4")
        assert machine.run("stat", "-c", "%s %a", "-L", "/mnt/plain/disk") == f"{16 << 20} 600\n"
        swap = json.loads(machine.run("cat", f"{tmp_path}/run/s/state.json"))["loop"]
        assert swap in swaps.swaps()

        # It is told some time after the start.
        status = r"\n     Status: \".* of 64M stored in "
        wait_until(lambda: re.search(status, machine.run("systemctl", "status", "--no-pager", "zramfs@fast")),
                   "the status", 30)
        why = "/etc/zramfs/broken.conf:1: zram-size: expected a number, a name or a parenthesis"
        expect_in_journal(machine, "zramfs@broken", why)
        expect_in_journal(machine, "zramfs@fast", f"zramfs.daemon: fast: ready at {tmp_path}/run/fast/tree")

        # The numbers of all of them, each minute, in one file.
        text = metrics_file(machine, tmp_path, [
            rf'^zramfs_up{{device="{name}",kind="{kind}",where="[^"]+"}} 1.0$'
            for name, kind in (("fast", "ramdisk"), ("plain", "device"), ("s", "swap"))])
        assert "# TYPE zramfs_failed_writes_total counter" in text

        # A file more, and it is there without a boot.
        machine.run("sh", "-c", "printf 'directory = /mnt/late\nzram-size = 1\n' >/etc/zramfs/late.conf")
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", "zramfs@late")
        assert machine.run("stat", "-c", "%s", "-L", "/mnt/late/disk") == f"{1 << 20}\n"
        machine.run("systemctl", "stop", "zramfs@late")
        assert "dead" in machine.run("systemctl", "status", "--no-pager", "zramfs@late", check=False)

        machine.run("systemctl", "start", "user.service")
        machine.power_off()
    first, *others = trace.read_text().splitlines()
    assert first.startswith("user ends: text; ") and f"{swap} " in f"{first} "
    ends = {line.partition(": ")[0]: line for line in others}
    assert ends.keys() == {"zramfs ends", "zramfs-swap ends"}
    assert ends["zramfs ends"].startswith("zramfs ends: 0 mounted; ")
    assert f"{swap} " not in f"{ends['zramfs-swap ends']} "
    assert swap not in swaps.swaps()
    assert not [path for path in backing_files() if path.startswith(str(tmp_path))]


def test_a_service_all_of_whose_processes_are_killed_goes_on_with_its_data(tmp_path: Path) -> None:
    configuration = {name: CONFIGURATION[name] for name in ("fast.conf", "s.conf", "conf.d/plain.conf")}
    without = {"zramfs@plain.service.d/without.conf": "[Service]\nFileDescriptorStoreMax=0\n"}
    with booted(tmp_path, configuration, without) as machine:
        machine.run("sh", "-c", "echo text >/mnt/fast/file; sync -f /mnt/fast")
        for unit, name in (("zramfs@fast", "fast"), ("zramfs-swap@s", "s")):
            before = json.loads(machine.run("cat", f"{tmp_path}/run/{name}/state.json"))
            machine.run("systemctl", "kill", "--signal=KILL", f"{unit}.service")
            old = before["keeper_pid"]
            wait_until(lambda unit=unit, old=old: pid_of(machine, unit) not in (0, old), f"{unit} runs", 30)
            wait_until(lambda unit=unit: machine.state(f"{unit}.service") == "active", f"{unit} is up", 30)
            after = json.loads(machine.run("cat", f"{tmp_path}/run/{name}/state.json"))
            assert after["loop"] == before["loop"] and after["keeper_pid"] != old
            assert after["loop"] in swaps.swaps() or name == "fast"
        assert machine.run("cat", "/mnt/fast/file") == "text\n"
        # Out of the page cache, and nothing else: another test compares the kernel's zram devices.
        write = "echo more >/mnt/fast/file; sync -f /mnt/fast"
        machine.run("sh", "-c", f"{write}; dd of=/mnt/fast/file oflag=nocache conv=notrunc,fdatasync count=0")
        assert machine.run("cat", "/mnt/fast/file") == "more\n"
        # Where nothing was kept no empty device stands in its place.
        machine.run("systemctl", "kill", "--signal=KILL", "zramfs@plain.service")
        wait_until(lambda: machine.state("zramfs@plain.service") == "failed", "the end of plain", 30)
        expect_in_journal(machine, "zramfs@plain", "nothing was kept of it: its data is gone")
        wait_until(lambda: not (tmp_path / "run/plain").exists(), "nothing is left of it", 30)
        # An end in order leaves nothing to go on with.
        machine.run("systemctl", "restart", "zramfs@fast")
        assert machine.run("ls", "/mnt/fast") == "lost+found\n"
        machine.power_off()
    assert not [path for path in backing_files() if path.startswith(str(tmp_path))]


def test_an_upgrade_keeps_the_main_process_the_data_and_what_the_manager_has_stored(tmp_path: Path) -> None:
    """The store is seen by a kill of the whole unit afterwards."""
    configuration = {name: CONFIGURATION[name] for name in ("fast.conf", "s.conf")}
    with booted(tmp_path, configuration, {}) as machine:
        machine.run("sh", "-c", "echo text >/mnt/fast/file; sync -f /mnt/fast")
        units = {"fast": "zramfs@fast", "s": "zramfs-swap@s"}

        def state(name: str) -> dict[str, object]:
            return json.loads(machine.run("cat", f"{tmp_path}/run/{name}/state.json"))

        before = {name: state(name) for name in units}
        said = machine.run(
            "env", f"ZRAMFS_RUN_DIR={tmp_path}/run", str(tmp_path / "zramfs-command"), "upgrade", "--all")
        for name, unit in units.items():
            assert f"(pid {before[name]['pid']}) -> " in said
            now = state(name)
            assert now["pid"] != before[name]["pid"] and now["keeper_pid"] == before[name]["keeper_pid"]
            assert machine.state(f"{unit}.service") == "active"
            assert pid_of(machine, unit) == now["keeper_pid"]
            status = machine.run("systemctl", "show", "--property=NRestarts", "--value", f"{unit}.service")
            assert status == "0\n"
        assert before["s"]["loop"] in swaps.swaps()
        assert machine.run("cat", "/mnt/fast/file") == "text\n"
        machine.run("systemctl", "kill", "--signal=KILL", "zramfs@fast.service")
        old = before["fast"]["keeper_pid"]
        wait_until(lambda: pid_of(machine, "zramfs@fast") not in (0, old), "it runs", 30)
        wait_until(lambda: machine.state("zramfs@fast.service") == "active", "it is up", 30)
        assert machine.run("cat", "/mnt/fast/file") == "text\n"
        machine.power_off()
    assert not [path for path in backing_files() if path.startswith(str(tmp_path))]


def pid_of(machine: Container, unit: str) -> int:
    return int(machine.run("systemctl", "show", "--property=MainPID", "--value", f"{unit}.service"))
