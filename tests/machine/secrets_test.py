# SPDX-License-Identifier: Apache-2.0
"""What a device keeps to itself: its memory, its descriptors, its files."""
from __future__ import annotations

import os
import re
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import state_of
from tests.support.paths import python_environment
from tests.support.users import as_nobody
from tests.support.whole import MIB, Device, device, opened, run

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]

SECRET = b"a sentence that nobody else may read; "


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with device(tmp_path_factory.mktemp("secrets") / "z", MIB, "--algo", "none") as made:
        with opened(made.disk) as fd:
            os.pwrite(fd, SECRET * 5000, 0)
        yield made


def test_the_files_of_a_device_are_its_owners(made: Device) -> None:
    rundir = Path(state_of(made.directory).disk).parent
    assert stat.S_IMODE(rundir.stat().st_mode) == 0o700
    files = [rundir / name for name in ("disk", "log", "state.json")]
    for path in (*files, made.disk, made.directory / "control"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


@pytest.mark.requires("root", "setpriv")
def test_another_user_reaches_the_daemon_in_no_other_way(made: Device) -> None:
    pid = state_of(made.directory).pid
    for path in ("fd", "mem", "map_files", "environ", "maps"):
        done = run(*as_nobody("sh", "-c", 'cat "$1" || ls "$1"/', "sh", f"/proc/{pid}/{path}"), check=False)
        assert done.stdout == "" and done.returncode != 0, path
    assert run(*as_nobody("kill", "-TERM", str(pid)), check=False).returncode != 0
    assert made.read("zram/initstate") == "1\n"


# A store full of data that does not compress, in a process that asks for every kind of mapping in its
# core dump that there is, and then aborts.
ABORT = """
import os, resource
from zramfs.store.store import Store
store = Store({size}, algo="none")
for offset in range(0, {size}, 1 << 20):
    store.write(offset, os.urandom(1 << 20))
open("/proc/self/coredump_filter", "w").write("0x7f")
resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
os.abort()
"""


@pytest.mark.requires("root")
def test_a_core_dump_leaves_the_pool_out(tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if "/" in pattern or pattern.startswith("|"):
        pytest.skip(f"core dumps do not go to the working directory (kernel.core_pattern is {pattern})")
    size = 64 * MIB
    words = [sys.executable, "-c", ABORT.format(size=size)]
    environment = python_environment()
    done = run(*words, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == -signal.SIGABRT, done.stderr
    [core] = tmp_path.iterdir()
    # The interpreter's own memory is in it.
    assert MIB < core.stat().st_blocks * 512 < size // 2


@pytest.mark.requires("root")
def test_the_pool_of_a_daemon_is_marked_so(made: Device) -> None:
    smaps = Path(f"/proc/{state_of(made.directory).pid}/smaps").read_text()
    pools = re.findall(r"/memfd:zramfs \(deleted\)$.*?^VmFlags: (.*?)$", smaps, re.MULTILINE | re.DOTALL)
    assert pools and all("dd" in flags.split() for flags in pools)
