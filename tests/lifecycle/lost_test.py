# SPDX-License-Identifier: Apache-2.0
"""Devices whose state file no longer tells the truth: moved, lost, or from another pid namespace."""
from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.apart import apart
from tests.support.commands import failure, kill_daemon, nothing_left, rows, state_of
from tests.support.whole import MIB, ZRAMFS, Device, device, opened, run, wait_until, zramfs
from zramfs.host import locks, mounts, process
from zramfs.lifecycle import rundir

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def make(kind: str, place: Path) -> None:
    zramfs(kind, place, "--size", "16M")


KINDS = [pytest.param("create"), pytest.param("ramdisk", marks=pytest.mark.requires("root", "loop", "ext4"))]


@pytest.mark.parametrize("by", ["old", "new", "signal"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_below_a_directory_that_was_renamed_is_stopped_where_it_is_now(
    tmp_path: Path, base: Path, kind: str, by: str
) -> None:
    old, new = tmp_path / "old/place", tmp_path / "new/place"
    old.parent.mkdir()
    make(kind, old)
    old.parent.rename(new.parent)
    column = "DIRECTORY" if kind == "create" else "MOUNTPOINT"
    assert rows("-o", f"{column},STATE") == [{column.lower(): str(new), "state": "ready"}]
    state = state_of(new)
    assert (state.where, state_of(old)) == (str(new), state)
    if by == "signal":
        os.kill(state.pid, signal.SIGTERM)
        wait_until(lambda: not state.alive(), "the daemon has ended", 30)
    else:
        zramfs("stop", old if by == "old" else new)
    assert not state.alive()
    nothing_left(new, base)
    assert not new.exists(), "the directory that it had made"


def test_a_new_device_may_be_made_on_the_old_name(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    zramfs("create", tmp_path / "old/a", "--size", "1M")
    (tmp_path / "old").rename(tmp_path / "new")
    said = failure("create", tmp_path / "new/a", "--size", "1M")
    assert f"a zramfs device is there on {tmp_path}/new/a" in said
    zramfs("stop", tmp_path / "new/a")


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_without_its_state_file_is_shown_and_stopped(tmp_path: Path, base: Path, kind: str) -> None:
    place = tmp_path / "place"
    make(kind, place)
    before = state_of(place)
    os.unlink(base / before.name / "state.json")
    state = state_of(place)
    same = ("name", "directory", "disk", "kind", "phase", "pid", "pid_start", "keeper_pid", "loop",
            "mountpoint", "fs", "attached")
    assert [getattr(state, key) for key in same] == [getattr(before, key) for key in same]
    assert [row["state"] for row in rows(place, "-o", "STATE")] == ["ready"]
    zramfs("stop", place)
    assert not before.alive()
    nothing_left(place, base)


@pytest.mark.requires("root", "loop", "swap")
def test_swap_without_its_state_file_is_stopped_too(tmp_path: Path, base: Path) -> None:
    zramfs("swap", "lost", "--size", "8M", "--force", "--priority", "0")
    before = state_of(Path("lost"))
    os.unlink(base / "lost/state.json")
    assert (state_of(Path("lost")).kind, state_of(Path("lost")).loop) == ("swap", before.loop)
    zramfs("stop", "lost")
    assert not before.alive()
    assert os.listdir(base) == []


def test_no_signal_goes_to_a_process_that_only_has_the_pid(tmp_path: Path, base: Path) -> None:
    """As where a run directory is shared between pid namespaces: the pid, and by chance the time, fit."""
    place = tmp_path / "place"
    zramfs("create", place, "--size", "1M")
    state = state_of(place)
    with subprocess.Popen(["sleep", "600"]) as innocent:
        try:
            found = rundir.find(str(place))
            found.update(pid=innocent.pid, pid_start=process.process_start(innocent.pid))
            assert set(locks.holders(found.path)) == {state.pid, state.keeper_pid}
            assert state_of(place).pid == state.pid
            zramfs("stop", place)
            assert innocent.poll() is None
        finally:
            innocent.kill()
    assert not state.alive()
    nothing_left(place, base)


@pytest.mark.requires("root", "unshare")
def test_a_device_is_not_taken_for_dead_in_another_pid_namespace(tmp_path: Path, base: Path) -> None:
    place = tmp_path / "place"
    zramfs("create", place, "--size", "1M")
    with opened(Device(place).disk) as fd:
        os.pwrite(fd, b"kept", 0)
    for words in (["stop", place], ["create", place, "--size", "1M"]):
        done = run(*apart("unshare", "--pid", "--fork", "--mount-proc", *ZRAMFS, *words), check=False,
                   env=dict(os.environ))
        assert done.returncode == 1
        assert f"{place} is served by a process that is not to be seen from here" in done.stderr
    with opened(Device(place).disk) as fd:
        assert os.pread(fd, 4, 0) == b"kept"
    zramfs("stop", place)
    nothing_left(place, base)


@pytest.mark.requires("root", "unshare")
def test_a_device_of_another_pid_namespace_is_stopped_from_outside(tmp_path: Path, base: Path) -> None:
    place = tmp_path / "place"
    command = apart("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c",
                    f'{" ".join(ZRAMFS)} create "$1" --size 1M && echo there && exec cat', "sh", place)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=dict(os.environ)) as inside:
        try:
            assert inside.stdout.readline() == "there\n"
            state = state_of(place)
            assert process.process_start(state.pid) is not None
            zramfs("stop", place)
            assert not state.alive()
            assert inside.poll() is None
        finally:
            inside.stdin.close()
            inside.wait(60)
    nothing_left(place, base)


def test_mounts_are_the_same_mount_after_a_rename(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    zramfs("create", tmp_path / "a/d", "--size", MIB)
    before = mounts.mount_at(tmp_path / "a/d")
    (tmp_path / "a").rename(tmp_path / "b")
    after = mounts.mount_at(tmp_path / "b/d")
    assert (before.id, before.dev) == (after.id, after.dev)
    zramfs("stop", tmp_path / "a/d")


@pytest.mark.requires("root")
def test_the_number_of_a_dead_tree_given_to_another_devices_tree_means_nothing(tmp_path: Path) -> None:
    """The kernel uses the numbers of mounts that are gone again."""
    with device(tmp_path / "lives", MIB) as lives:
        zramfs("create", tmp_path / "dies", "--size", "1M", "--name", "dies")
        try:
            state = state_of(tmp_path / "dies")
            kill_daemon(state)
            run("umount", tmp_path / "dies")
            found = rundir.find("dies")
            found.update(tree_dev=mounts.mount_at(lives.directory).dev)
            assert found.read().directory == str(tmp_path / "dies")
        finally:
            zramfs("stop", "dies")
        assert lives.read("zram/initstate") == "1\n"


@pytest.mark.requires("root")
def test_a_device_that_ends_takes_no_tree_that_has_the_number_of_its_own(tmp_path: Path) -> None:
    """It reads its state for the last time when its tree is gone, and while it still has its run directory
    locked."""
    with device(tmp_path / "lives", MIB) as lives:
        zramfs("create", tmp_path / "ends", "--size", "1M")
        found = rundir.find(str(tmp_path / "ends"))
        found.update(tree_dev=mounts.mount_at(lives.directory).dev)
        assert found.read().directory == str(tmp_path / "ends")
        zramfs("stop", tmp_path / "ends")
        assert mounts.mount_at(lives.directory)
        assert lives.read("zram/initstate") == "1\n"
