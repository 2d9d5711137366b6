# SPDX-License-Identifier: Apache-2.0
"""`zramfs doctor` on this machine: as root, as an ordinary user, with and without /dev/fuse."""
from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from pathlib import Path

import pytest

from tests.support.apart import apart
from tests.support.commands import kill_daemon, state_of
from tests.support.users import fuse_for_everybody, zramfs_as_nobody
from tests.support.whole import ZRAMFS, run, zramfs
from zramfs.host import mounts

pytestmark = [pytest.mark.requires("root", "fuse", "setpriv", "unshare"), pytest.mark.timeout(240)]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def states(text: str) -> dict[str, str]:
    return {each["name"]: each["state"] for each in json.loads(text)["findings"]}


def fuse_mounts() -> list[Path]:
    """Of this run: the machine may have others, which come and go meanwhile."""
    ours = tempfile.gettempdir()
    return [mount.mountpoint for mount in mounts.mounts() if mount.mountpoint.is_relative_to(ours)]


def test_root_gets_a_device_and_nothing_is_left(base: Path, tmp_path: Path) -> None:
    done = zramfs("doctor", "--json")
    assert done.stderr == ""
    shown = json.loads(done.stdout)
    assert shown["able"] is True
    assert not [each for each in shown["findings"] if each["essential"] and each["state"] != "ok"]
    [trial] = [each for each in shown["findings"] if each["name"] == "a device"]
    assert trial["state"] == "ok" and trial["found"].startswith("one was made, written, read and ended in ")
    assert os.listdir(base) == []
    assert not list(tmp_path.glob("zramfs-doctor-*"))
    assert fuse_mounts() == []


def test_each_finding_is_a_line_with_what_to_do(base: Path) -> None:
    lines = zramfs("doctor").stdout.splitlines()
    assert lines.pop() == "Devices can be made here."
    for line in lines:
        state = line.split()[0]
        assert state in ("ok", "degraded", "missing")
        assert ("; needed for: " in line and "; do: " in line) == (state != "ok"), line


def test_a_terminal_gets_a_table(base: Path) -> None:
    command = "stty cols 90; " + " ".join(map(str, ZRAMFS)) + " doctor"
    done = run("script", "--quiet", "--return", "--command", command, "/dev/null", env=dict(os.environ))
    assert "\x1b[32mok" in done.stdout
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in done.stdout.splitlines()]
    assert max(map(len, lines)) <= 90
    assert lines[-1] == "Devices can be made here."


def leftovers() -> dict[str, str]:
    [found] = [
        each
        for each in json.loads(zramfs("doctor", "--json").stdout)["findings"]
        if each["name"] == "leftovers"
    ]
    return found


def test_what_a_dead_daemon_left_is_named_and_the_advice_works(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zramfs("create", tmp_path / "z", "--size", "1M")
    state = state_of(tmp_path / "z")
    kill_daemon(state)
    found = leftovers()
    assert found["state"] == "degraded"
    assert f"zramfs stop {tmp_path}/z" in found["advice"].split("; ")
    # Whoever does not know its run directory still sees its mounts, tree and lane.
    monkeypatch.setenv("ZRAMFS_RUN_DIR", f"{base}-of-others")
    assert f"fusermount3 -u {tmp_path}/z" in leftovers()["advice"].split("; ")
    assert f"fusermount3 -u {state.disk}" in leftovers()["advice"].split("; ")
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(base))
    zramfs("stop", tmp_path / "z")
    # Other test runs may have leftovers of their own.
    assert str(tmp_path) not in leftovers()["advice"]


def test_a_machine_without_fusermount3(base: Path, tmp_path: Path) -> None:
    """Its directory is covered, for this command only."""
    script = (
        "for place in /usr/bin /bin; do [ ! -e $place/fusermount3 ] || "
        'mount --bind /dev/null "$(realpath $place)/fusermount3"; done; exec "$@"'
    )
    words = apart("sh", "-c", script, "sh", *ZRAMFS, "doctor", "--json")
    done = run(*words, check=False, env=dict(os.environ))
    assert done.returncode == 0, "root mounts by itself"
    shown = json.loads(done.stdout)
    assert shown["able"] is True
    [found] = [each for each in shown["findings"] if each["name"] == "fusermount3"]
    assert (found["state"], found["advice"]) == ("degraded", "apt-get install fuse3")
    [trial] = [each for each in shown["findings"] if each["name"] == "a device"]
    assert trial["state"] == "ok"


def test_an_ordinary_user_is_told_what_needs_root(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZRAMFS_RUN_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    home.chmod(0o777)  # his trial goes to TMPDIR
    with fuse_for_everybody(home) as prefix:
        command = zramfs_as_nobody(prefix)
        done = run(
            *command, "doctor", "--json", cwd="/", check=False, env={**os.environ, "TMPDIR": str(home)}
        )
    assert done.returncode == 0, done.stdout + done.stderr
    found = states(done.stdout)
    assert (found["a device"], found["FUSE device"], found["fusermount3"]) == ("ok", "ok", "ok")
    assert (found["loop devices"], found["swap"]) == ("missing", "missing")
    assert not [name for name in os.listdir(home) if name.startswith("zramfs-doctor")]


@pytest.mark.requires("nsenter")
def test_an_ordinary_user_without_rights_on_dev_fuse(home: Path) -> None:
    """As on a machine without udev: 0600, of root."""
    node = home / "fuse"
    os.mknod(node, 0o600 | stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
    command = zramfs_as_nobody([])
    script = f'mount --bind {node} /dev/fuse && exec "$@"'
    done = run(*apart("sh", "-c", script, "sh", *command, "doctor"), check=False, cwd="/")
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if "FUSE device" in line]
    assert line.startswith("missing   FUSE device: /dev/fuse (mode 0600) cannot be opened: Permission denied")
    assert "do: as root: chmod 0666 /dev/fuse" in line
    assert done.stdout.endswith("No device can be made here.\n")
