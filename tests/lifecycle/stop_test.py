# SPDX-License-Identifier: Apache-2.0
"""zramfs stop when it must not, and devices whose daemon is dead or stuck."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.apart import apart
from tests.support.child import stopped
from tests.support.commands import child, failure, kill_daemon, nothing_left, rows, state_of
from tests.support.paths import python_environment
from tests.support.whole import MIB, ZRAMFS, Device, device, loop, opened, run, zramfs
from zramfs.errors import ZramfsError
from zramfs.lifecycle import rundir
from zramfs.lifecycle import stop as stop_module

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run directories of this test alone, so that a list of all devices is a list of its own."""
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


USERS = {
    "works in": "os.chdir(sys.argv[1])",
    "has {disk} open": "f = open(sys.argv[2], 'rb')",
    "has {disk} mapped": "f = open(sys.argv[2], 'r+b'); m = mmap.mmap(f.fileno(), 4096); f.close()",
    "has {tree}/zram/mm_stat open": "f = open(sys.argv[1] + '/zram/mm_stat')",
}


@pytest.mark.parametrize("way", USERS)
def test_stop_names_the_process_that_uses_the_device_and_changes_nothing(
    tmp_path: Path, base: Path, way: str
) -> None:
    directory = tmp_path / "device"
    with device(directory, MIB) as made:
        with opened(made.disk) as fd:
            os.pwrite(fd, b"kept", 0)
        code = USERS[way]
        if "mapped" in way:  # python's mmap holds a descriptor of its own, which would be found first
            code += "\nfor n in range(3, 10):\n  try: os.close(n)\n  except OSError: pass"
        with child(code, directory, made.disk) as pid:
            said = failure("stop", directory)
            expected = way.format(disk=state_of(directory).disk, tree=directory)
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            assert said.startswith(f"zramfs: {directory} is in use, so nothing was changed:\n")
            assert f"  {name} (pid {pid}) {expected}" in said
            assert len(said.splitlines()) == 2
        with opened(made.disk) as fd:
            assert os.pread(fd, 4, 0) == b"kept"
    nothing_left(directory, base)


def test_who_only_looks_at_a_device_does_not_keep_it_from_being_stopped(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As udev and losetup do. In this process, so that the first look comes while somebody has it open."""
    directory = tmp_path / "device"
    zramfs("create", directory, "--size", MIB)
    found = rundir.find(str(directory))
    asked, look = [], stop_module._users
    with child("f = open(sys.argv[1], 'rb')", state_of(directory).disk) as pid:

        def users(*words: object) -> list[str]:
            asked.append(seen := look(*words))
            os.kill(pid, signal.SIGKILL)
            return seen

        monkeypatch.setattr(stop_module, "_users", users)
        monkeypatch.setattr(stop_module, "LOOKS_TIMEOUT", 30.0)
        stop_module.expect_unused(found, found.read())
    assert asked[0] != [] and asked[-1] == []
    zramfs("stop", directory)
    nothing_left(directory, base)


def test_who_looks_at_a_device_has_several_looks_to_go_away_also_on_a_machine_that_stood_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stall takes all the time at the first look, and nobody who looks could go away meanwhile."""
    looks = iter([["udev"]] * 3 + [[]])
    monkeypatch.setattr(stop_module, "_users", lambda *_: next(looks))
    monkeypatch.setattr(stop_module, "LOOKS_TIMEOUT", 0.0)
    stop_module.expect_unused(rundir.Rundir(tmp_path), None)
    assert list(looks) == []
    monkeypatch.setattr(stop_module, "_users", lambda *_: ["a program"])
    with pytest.raises(ZramfsError, match="a program"):
        stop_module.expect_unused(rundir.Rundir(tmp_path), None)


def test_stop_called_from_within_says_that_the_shell_is_there(tmp_path: Path) -> None:
    directory = tmp_path / "device"
    with device(directory, MIB):
        # `exit` keeps the shell: with one simple command alone it would be replaced by it.
        shell = ["sh", "-c", 'cd "$1" && shift && "$@" stop .; exit $?', "sh", str(directory), *ZRAMFS]
        done = run(
            *shell, check=False, env=python_environment()
        )
        assert done.returncode == 1
        assert f" works in {directory}\n" in done.stderr
        assert len(done.stderr.splitlines()) == 2


@pytest.mark.requires("loop")
def test_stop_names_loop_devices_and_what_is_on_them(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    with device(directory, 16 * MIB) as made, loop(made.disk) as name:
        assert f"  the loop device {name} stands on {base}/" in failure("stop", directory)
        run("mkfs.ext4", "-q", name)
        (tmp_path / "fs").mkdir()
        run("mount", name, tmp_path / "fs")
        try:
            said = failure("stop", directory)
            assert f"  {name} is mounted on {tmp_path}/fs\n" in said
            assert rows(directory, "-o", "MOUNTPOINT,LOOP") == [
                {"mountpoint": f"{tmp_path}/fs", "loop": name}
            ]
        finally:
            run("umount", tmp_path / "fs")


@pytest.mark.requires("loop")
def test_stop_finds_a_loop_device_that_knows_the_disk_by_another_path(tmp_path: Path) -> None:
    directory = tmp_path / "device"
    with device(directory, MIB):
        other = tmp_path / "other"
        other.touch()
        run("mount", "--bind", state_of(directory).disk, other)
        try:
            assert f" is mounted on {other}\n" in failure("stop", directory)
            with loop(other) as name:
                assert f"the loop device {name} stands on " in failure("stop", directory)
        finally:
            run("umount", other)


@pytest.mark.requires("swap", "loop")
def test_stop_names_swap(tmp_path: Path) -> None:
    directory = tmp_path / "device"
    with device(directory, 4 * MIB) as made, loop(made.disk) as name:
        run("mkswap", name)
        run("swapon", "--priority", "0", name)
        try:
            assert f"  swap is on {name}\n" in failure("stop", directory)
            assert rows(directory, "-o", "MOUNTPOINT") == [{"mountpoint": "[SWAP]"}]
        finally:
            run("swapoff", name)


@pytest.mark.requires("root", "unshare")
def test_stop_sees_processes_in_other_mount_namespaces(tmp_path: Path) -> None:
    directory = tmp_path / "device"
    with device(directory, MIB):
        command = apart(sys.executable, "-c", "import sys; print('there', flush=True); sys.stdin.read()")
        with subprocess.Popen(
            command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout.readline() == "there\n"
                assert f"(pid {process.pid}) works in {directory}\n" in failure("stop", directory)
            finally:
                process.kill()


def test_stop_cleans_up_after_a_daemon_that_died(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    zramfs("create", directory, "--size", "1M")
    state = state_of(directory)
    kill_daemon(state)
    done = zramfs("status", check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].split()[-1] == "STATE"
    assert done.stdout.splitlines()[1].split() == [state.name, "2", "dead"]
    assert f"its daemon is dead, and its data lost; `zramfs stop {directory}` cleans up" in done.stderr
    said = zramfs("stop", directory).stderr
    assert f"cleaned up {directory}: its daemon (pid {state.pid}, since {state.created}) had died" in said
    assert not directory.exists()
    nothing_left(directory, base)


def test_the_mount_of_a_dead_daemon_whose_run_directory_is_gone(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    zramfs("create", directory, "--size", "1M")
    state = state_of(directory)
    kill_daemon(state)
    run("fusermount3", "-u", state.disk)
    shutil.rmtree(base / state.name)
    advice = f"`fusermount3 -u {directory}`"
    for words in (["create", directory, "--size", "1M"], ["stop", directory]):
        assert f"if its daemon has died, take the mount away with {advice}" in failure(*words)
    run("fusermount3", "-u", directory)
    directory.rmdir()
    nothing_left(directory, base)


def test_create_cleans_up_after_a_daemon_that_died(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    zramfs("create", directory, "--size", "1M")
    kill_daemon(state_of(directory))
    said = zramfs("create", directory, "--size", "2M").stderr
    try:
        assert f"cleaned up {directory}: " in said
        assert Device(directory).disk.stat().st_size == 2 * MIB
    finally:
        zramfs("stop", directory)
    nothing_left(directory, base)


def test_a_dead_device_in_use_is_not_cleaned_up(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    zramfs("create", directory, "--size", "1M")
    with child("os.chdir(sys.argv[1])", directory) as pid:
        kill_daemon(state_of(directory))
        for command in (["stop", directory], ["create", directory, "--size", "1M"]):
            assert f"(pid {pid}) works in {directory}\n" in failure(*command)
    zramfs("stop", directory)
    nothing_left(directory, base)


def test_a_process_that_got_the_daemons_pid_is_left_alone(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    zramfs("create", directory, "--size", "1M")
    state = state_of(directory)
    kill_daemon(state)
    with subprocess.Popen(["sleep", "600"]) as innocent:
        try:
            found = rundir.find(str(directory))
            found.update(pid=innocent.pid)
            assert "had died" in zramfs("stop", directory).stderr
            time.sleep(0.2)
            assert innocent.poll() is None
        finally:
            innocent.kill()
    nothing_left(directory, base)


def test_a_device_that_hangs_holds_nobody_up(tmp_path: Path, base: Path) -> None:
    stuck, well = tmp_path / "stuck", tmp_path / "well"
    with device(well, MIB), device(stuck, MIB):
        state = state_of(stuck)
        with stopped(state.pid, 90):
            start = time.monotonic()
            shown = {row["directory"]: row for row in rows("-o", "DIRECTORY,STATE,DISKSIZE", code=1)}
            assert time.monotonic() - start < 45, "it waits for no stopped one"
            assert shown == {
                str(stuck): {"directory": str(stuck), "state": "hangs", "disksize": None},
                str(well): {"directory": str(well), "state": "ready", "disksize": "1M"},
            }
            assert (
                f"its daemon (pid {state.pid}) has not answered for 2 s"
                in zramfs("status", check=False).stderr
            )
            assert "has not answered for 2 s" in failure("control", stuck)
            said = failure("stop", stuck)
            assert (
                f"the daemon (pid {state.pid}) of {stuck} has not answered for 2 s, so nothing was changed"
                in said
            )
        assert rows(stuck, "-o", "STATE") == [{"state": "ready"}]
    assert os.listdir(base) == []
