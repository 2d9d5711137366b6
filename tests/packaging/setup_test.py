# SPDX-License-Identifier: Apache-2.0
"""What scripts/setup asks each package manager for, on a machine that lacks what builds."""
from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TOOLS = ("bash", "sed", "cut", "sort", "tr", "cat", "tail", "grep", "flock", "mkdir", "dirname", "head")
# Without gcc nobody looks for its headers.
NEEDED = {
    "apt-get": "fuse3 gcc libfuse3-dev liblz4-dev libzstd-dev pkg-config",
    "dnf": "fuse3 fuse3-devel gcc libzstd-devel lz4-devel pkgconf-pkg-config",
    "pacman": "fuse3 gcc lz4 pkgconf zstd",
    "apk": "fuse3 fuse3-dev gcc lz4-dev pkgconf zstd-dev",
}
SHOWN = {"apt-get": "apt-get install", "dnf": "dnf install", "pacman": "pacman -S --needed", "apk": "apk add"}
UPDATES = {"apt-get": ["-q update"], "apk": ["-q update"]}


def setup(place: Path, manager: str, uid: int) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What scripts/setup says where there is nothing but `manager`, and the calls of that."""
    tools = place / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name) or name)
    calls = place / "calls"
    for name, text in ((manager, f'echo "$*" >>{calls}\nexit 1'), ("id", f"echo {uid}")):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    script = place / "scripts/setup"
    script.parent.mkdir()
    shutil.copy(ROOT / "scripts/setup", script)
    done = subprocess.run(
        [tools / "bash", script], env={"PATH": str(tools), "HOME": "/"}, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=200, check=False)
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def bare() -> None:
    for name in ("gcc", "pkg-config", "fusermount3", "apt-get", "dnf"):
        if any(os.path.exists(f"{place}/{name}") for place in ("/usr/sbin", "/sbin")):
            pytest.skip(f"scripts/setup finds {name} whatever PATH says")


@pytest.mark.parametrize("manager", NEEDED)
def test_a_user_is_told_what_to_ask_for(bare: None, tmp_path: Path, manager: str) -> None:
    done, calls = setup(tmp_path, manager, 1000)
    assert (done.returncode, calls) == (1, [])
    assert "setup: this machine still lacks what zramfs cannot do without:\n" in done.stderr
    [line] = [line for line in done.stderr.splitlines() if "to get it: " in line]
    command, names = line.removeprefix("setup: to get it: sudo "), NEEDED[manager]
    assert command.startswith(f"{SHOWN[manager]} ")
    given = command.removeprefix(f"{SHOWN[manager]} ").split()
    # Where this machine's Python has no headers, its packages are needed too.
    assert [name for name in given if "python" not in name] == names.split()


@pytest.mark.parametrize("manager", NEEDED)
def test_root_has_it_installed_without_a_question(bare: None, tmp_path: Path, manager: str) -> None:
    done, calls = setup(tmp_path, manager, 0)
    assert done.returncode == 1
    assert f"setup: {manager} could not install it" in done.stderr
    updates = UPDATES.get(manager, [])
    assert calls[:len(updates)] == updates
    asked = {word for call in calls[len(updates):] for word in call.split()}
    assert set(NEEDED[manager].split()) <= asked
    assert ("debhelper" in asked) == (manager == "apt-get")
    if manager != "apt-get":
        assert len(calls) - len(updates) >= len(NEEDED[manager].split()), "one package a call"
