# SPDX-License-Identifier: Apache-2.0
"""A command that is a fork of the zygote (tests/support/zygote.py) does what the program itself does, and its
daemon is such a process as the program's."""
from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support import zygote
from tests.support.commands import state_of
from tests.support.whole import MIB, ZRAMFS, Device, device, run, zramfs

pytestmark = pytest.mark.requires("fuse")

SAME = (
    "Umask", "Uid", "Gid", "Groups", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "CapEff", "NoNewPrivs",
    "Seccomp", "Threads",
)


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def program(*words: object) -> subprocess.CompletedProcess[str]:
    return run(*ZRAMFS, *words, check=False, env=dict(os.environ))


@pytest.mark.parametrize("words", [
    ["--version"], ["--help"], ["status"], ["status", "--json"], ["status", "/nowhere"], ["nonsense"],
    ["create"], ["create", "/x", "--size", "12Q"], ["check-config"], ["stop", "a\udcff"],
])
def test_it_says_and_ends_with_the_same(words: list[str]) -> None:
    assert zygote.zygote() is not None
    forked, own = zramfs(*words, check=False), program(*words)
    assert (forked.returncode, forked.stdout, forked.stderr) == (own.returncode, own.stdout, own.stderr)


def test_it_stands_in_this_directory_with_this_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("one", "two"):
        monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path / expected))
        (tmp_path / expected / "etc/zramfs").mkdir(parents=True)
        (tmp_path / expected / f"etc/zramfs/{expected}.conf").write_text(f"[{expected}]\nzram-size = 1M\n")
        (tmp_path / "alone.conf").write_text(f"[alone-{expected}]\nzram-size = 1M\n")
        said = zramfs("check-config", expected, "./alone.conf", check=False).stdout
        assert said == program("check-config", expected, "./alone.conf").stdout and expected in said


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with device(tmp_path / "z", MIB), pytest.raises(subprocess.TimeoutExpired):
        zramfs("top", tmp_path / "z", "--interval", "60", timeout=1)


def daemon_facts(made: Device) -> dict[str, object]:
    """What tells one daemon's process from another's, without what is its own by nature."""
    pid = state_of(made.directory).pid
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    _, _, _, session, terminal = (proc / "stat").read_text().rpartition(")")[2].split()[:5]
    targets = [os.readlink(proc / "fd" / fd) for fd in os.listdir(proc / "fd")]
    return {name: status[name] for name in SAME} | {
        "descriptors": sorted(re.sub(r"[0-9]+", "N", target) for target in targets),
        "session is another": session != str(os.getsid(0)), "leads": session == str(pid),
        "terminal": terminal, "name": status["Name"], "limits": (proc / "limits").read_text(),
        **{link: os.readlink(proc / link) for link in ("cwd", "root", "exe")},
    }


def test_its_daemon_is_such_a_process_as_the_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for fresh in (True, False):
        monkeypatch.setattr(zygote, "fresh", fresh)
        with device(tmp_path / "z", MIB) as made:
            found.append(daemon_facts(made))
    assert found[0] == found[1]
    assert found[0]["session is another"] and found[0]["terminal"] == "0"
