# SPDX-License-Identifier: Apache-2.0
"""What a command loads: of the time of a short one, most goes into that."""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import python_environment
from tests.support.whole import MIB, Device, device, run, zramfs

pytestmark = pytest.mark.requires("fuse")

# Only a daemon, a screen, or a command that asks for much needs these. Each costs 5 to 50 ms.
HEAVY = {
    "trio", "pyfuse3", "prometheus_client", "rich", "zramfs.store.store", "zramfs.codecs.codec",
    "zramfs.daemon.daemon", "asyncio", "ssl", "email", "importlib.metadata",
}
# What `status` does without, since it starts no program and makes no call that Python lacks. Each costs 0.3
# to 3 ms, of 60 that it may take.
UNUSED = {
    "subprocess", "shutil", "ctypes", "hashlib", "fractions", "decimal", "difflib", "logging", "socket",
    "dataclasses", "copy", "struct", "click.shell_completion", "zramfs.host.package_managers",
    "zramfs.host.system_calls", "zramfs.host.in_use", "zramfs.views.scrape", "zramfs.model.config",
    "zramfs.cli.fleet",
}
# `status` has 135 of them on Python 3.11, most of them Python's own and click's.
MOST_MODULES = 150


# What the processes of a device do without. All that they load is in memory several times.
NOT_OF_A_DAEMON = {
    "click", "rich", "asyncio", "zramfs.cli", "zramfs.views", "zramfs.configuration",
}
# It has 492 of them on Python 3.11.
MOST_OF_A_DAEMON = 530


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    with device(tmp_path / "z", MIB) as made:
        yield made


def loaded(*words: object) -> set[str]:
    """The modules that a command which succeeds has loaded at its end."""
    code = (
        "import json, sys\n"
        "from zramfs.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = run(sys.executable, "-c", code, *words, env=dict(os.environ))
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("how", [[], ["--json"], ["--raw"]], ids=["table", "json", "raw"])
def test_status_loads_nothing_that_it_does_without(ready: Device, how: list[str]) -> None:
    found = loaded("status", ready.directory, *how)
    assert not found & (HEAVY | UNUSED)
    assert len(found) <= MOST_MODULES, sorted(found)


def test_help_loads_no_heavy_library() -> None:
    assert not loaded("--help") & HEAVY


def test_control_and_stop_load_no_heavy_library(ready: Device, tmp_path: Path) -> None:
    assert not loaded("control", ready.directory, "compact") & HEAVY
    zramfs("create", tmp_path / "y", "--size", MIB)
    assert not loaded("stop", tmp_path / "y") & HEAVY


def test_a_process_that_serves_loads_nothing_that_it_does_without() -> None:
    """As one that the keeper starts."""
    code = ("import json, sys\n"
            "from zramfs.lifecycle import serve\n"
            "from zramfs.daemon import daemon, keeper_line, layouts\n"
            "print(json.dumps(sorted(sys.modules)))")
    found = set(json.loads(run(sys.executable, "-c", code, env=python_environment()).stdout))
    assert not found & NOT_OF_A_DAEMON
    assert len(found) <= MOST_OF_A_DAEMON, sorted(found)
