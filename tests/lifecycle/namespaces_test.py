# SPDX-License-Identifier: Apache-2.0
"""zramfs stop where something holds the file system that is not in this mount namespace, or in no table."""
from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apart import apart
from tests.support.commands import child, failure, nothing_left, state_of
from tests.support.whole import MIB, ZRAMFS, device, run, wait_until, zramfs
from zramfs.errors import ZramfsError
from zramfs.host import in_use, loops, mounts, system_calls
from zramfs.host.process import process_name
from zramfs.lifecycle import ramdisk, rundir, stop

pytestmark = [pytest.mark.requires("root", "fuse", "loop", "ext4", "unshare"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A RAM disk with a file, taken down if the test has not done that."""
    point = tmp_path / "disk"
    zramfs("ramdisk", point, "--size", "16M")
    (point / "file").write_text("kept")
    try:
        yield point
    finally:
        if rundir.find(str(point)):
            zramfs("stop", point)


@contextlib.contextmanager
def process_apart(*words: object, first: str = "true") -> Iterator[int]:
    """A process in a mount namespace of its own, after a command of the shell: its pid."""
    command = apart("sh", "-c", f"{first} && echo there && exec cat", "sh", *words)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "there\n"
            # It goes on to be cat, and whoever asks for its name twice is to hear the same.
            wait_until(lambda: process_name(process.pid) == "cat", "the shell is cat")
            yield process.pid
        finally:
            process.kill()


def untouched(disk: Path) -> None:
    assert (disk / "file").read_text() == "kept"
    assert ramdisk.mounted(state_of(disk).loop, disk)


def test_a_copy_of_the_mount_in_a_namespace_that_does_not_use_it_goes_too(disk: Path, base: Path) -> None:
    with process_apart() as pid:
        assert disk in {each.mountpoint for each in mounts.mounts(pid)}
        assert (pid, disk) in in_use.copies([disk])
        done = zramfs("stop", disk)
        assert (done.stdout, done.stderr) == ("", "")
        assert not [each for each in mounts.mounts(pid) if each.mountpoint.is_relative_to(disk.parent)]
    nothing_left(disk, base)


def test_the_copies_of_a_plain_device_do_not_hold_it_up(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    with process_apart(), device(directory, MIB), process_apart() as pid:
        zramfs("stop", directory)
        assert not [each for each in mounts.mounts(pid) if each.mountpoint.is_relative_to(directory)]
        zramfs("create", directory, "--size", "1M")
    nothing_left(directory, base)


def test_a_mount_that_a_container_asked_for_is_named_and_nothing_is_changed(
    disk: Path, tmp_path: Path, base: Path
) -> None:
    (tmp_path / "data").mkdir()
    with process_apart(disk, tmp_path / "data", first='mount --bind "$1" "$2" && umount "$1"') as pid:
        said = failure("stop", disk)
        name = process_name(pid)
        assert "is in use, so nothing was changed:\n" in said
        assert f"  {state_of(disk).loop} is mounted on {tmp_path}/data in the mount namespace of {name} " \
               f"(pid {pid})\n" in said
        untouched(disk)
    zramfs("stop", disk)
    nothing_left(disk, base)


def test_an_overlay_on_it_is_named(disk: Path, tmp_path: Path) -> None:
    for name in ("upper", "work"):
        (disk / name).mkdir()
    (tmp_path / "merged").mkdir()
    (tmp_path / "lower").mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={disk}/upper,workdir={disk}/work"
    if run("mount", "-t", "overlay", "-o", options, "overlay", tmp_path / "merged", check=False).returncode:
        pytest.skip("this kernel has no overlay")
    try:
        said = failure("stop", disk)
        assert f"  the overlay on {tmp_path}/merged has its upperdir in {disk}/upper\n" in said
        untouched(disk)
    finally:
        run("umount", tmp_path / "merged")
        # A namespace that another run has just made has it for a moment, as apart() says.
        wait_until(
            lambda: not any(each.mountpoint == tmp_path / "merged" for _, table in mounts.namespaces()
                            for each in table),
            "the overlay is gone")


def test_a_file_of_a_mount_that_was_detached_is_named(disk: Path) -> None:
    device = state_of(disk).loop
    with child("f = open(sys.argv[1])", disk / "file") as pid:
        run("umount", "--lazy", disk)
        said = failure("stop", disk)
        assert f"(pid {pid}) has " in said and " open, of a mount that was detached\n" in said
        assert loops.is_claimed(device)
    assert loops.wait_unclaimed(device, 60)


def test_a_frozen_file_system_is_thawed_and_stopped(disk: Path, base: Path) -> None:
    # Whoever calls sync() waits for it meanwhile.
    watchdog = threading.Timer(40, lambda: ramdisk.thaw(disk))
    watchdog.start()
    try:
        ramdisk.freeze(disk)
        assert zramfs("stop", disk).stderr == (
            f"zramfs: {disk} was frozen (fsfreeze), and is thawed to be unmounted\n")
    finally:
        watchdog.cancel()
    nothing_left(disk, base)


def test_a_file_system_that_lives_on_is_mounted_again_with_its_options(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody holds it whom no table shows."""
    monkeypatch.setattr(loops, "wait_unclaimed", lambda device, timeout: False)
    with pytest.raises(ZramfsError, match="it is mounted again, and nothing else was changed"):
        stop.stop_device(rundir.find(str(disk)), lambda _: None)
    untouched(disk)
    options = run("findmnt", "-no", "OPTIONS", disk).stdout
    assert "discard" in options


def test_a_ram_disk_of_a_private_namespace_is_stopped_from_outside(tmp_path: Path, base: Path) -> None:
    point = tmp_path / "disk"
    run(*apart(*ZRAMFS, "ramdisk", point, "--size", "16M"), env=dict(os.environ))
    state = state_of(point)
    assert mounts.mount_at(point) is None
    assert mounts.mounts(state.pid)[-1].mountpoint == point
    done = zramfs("stop", point)
    assert (done.stdout, done.stderr) == ("", "")
    assert not state.alive()
    nothing_left(point, base)


def test_a_wait_for_the_daemon_is_announced(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "SILENCE", 0.05)
    monkeypatch.setattr(stop, "END_TIMEOUT", 0.2)
    said: list[str] = []
    state = state_of(disk)
    pidfd = os.pidfd_open(state.pid)
    try:
        assert not stop._wait_end(pidfd, state, said.append)
    finally:
        os.close(pidfd)
    assert said == [f"waiting up to 0.2 s until the daemon (pid {state.pid}) has let go of its users and of "
                    "its memory"]


def test_a_wait_for_the_loop_device_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    monkeypatch.setattr(loops, "_SILENCE", 0.05)
    monkeypatch.setattr(loops, "stands_on", lambda *_: True)
    monkeypatch.setattr(loops, "backing_file", lambda _: str(disk))
    monkeypatch.setattr(system_calls, "release_loop", lambda device: None)
    said: list[str] = []
    with pytest.raises(ZramfsError, match="still in use 0.2 s after it was detached"):
        loops.detach("/dev/loop-none", disk, 0.2, 1, said.append)
    assert said == [f"waiting up to 0.2 s until /dev/loop-none lets go of {disk}"]


def test_a_ram_disk_is_stopped_without_any_program_and_swap_misses_its_own_at_once(
    disk: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop.programs, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ZramfsError, match="stopping .* needs swapoff, which is in none of "):
        stop._expect_programs(state_of(disk)._replace(kind="swap"))
    stop.stop_device(rundir.find(str(disk)), lambda _: None)
    nothing_left(disk, base)
