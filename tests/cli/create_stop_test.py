# SPDX-License-Identifier: Apache-2.0
"""The command line on real devices: calls, create and stop, for root and for ordinary users."""
from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.commands import failure, nothing_left, state_of
from tests.support.whole import MIB, ZRAMFS, Device, device, opened, run, wait_until, zramfs
from zramfs.errors import ZramfsError
from zramfs.host import detach, mounts

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run directories of this test alone, so that a list of all devices is a list of its own."""
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def test_help_lists_the_commands() -> None:
    listed = zramfs("--help").stdout
    for command in ("create", "ramdisk", "stop", "status", "control"):
        assert f"\n  {command} " in listed


def test_version() -> None:
    import zramfs as package

    assert zramfs("--version").stdout == f"zramfs {package.__version__}\n"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["create"], "Missing argument 'DIR'"),
        (["create", "/x", "--size", "12Q"], "'12Q' has the unknown unit 'Q': expected bytes"),
        (["create", "/x", "--size", "0"], "'0' is too small: expected at least 1 byte"),
        (["create", "/x", "--size", "1G", "--algo", "lzma"], "lzma"),
        (["create", "/x", "--size", "1G", "--algo", "zstd:99"], "99"),
        (
            ["create", "/x", "--size", "1G", "--threads", "0"],
            "'0' is not a number of threads: expected 1 to 64",
        ),
        (["create", "/x", "--size", "1G", "--mem-limit", "-1"], "'-1' is not a size"),
        (["ramdisk", "/x"], "Missing option '--size'"),
        (["ramdisk", "/x", "--size", "1G", "--fs", "ntfs"], "'ntfs' is not one of"),
        (["status", "--output", "NAME,SIZE"], "unknown column 'SIZE': expected some of NAME, DISKSIZE"),
        (["nonsense"], "no such command: 'nonsense'"),
        (["control", "/x", "a\nb"], "expected a command of one line"),
    ],
)
def test_wrong_calls_end_with_2_and_a_reason(words: list[str], reason: str, base: Path) -> None:
    assert reason in " ".join(failure(*words, code=2).split())
    assert not base.exists()


def test_no_such_device(tmp_path: Path) -> None:
    for command in (["stop"], ["status"], ["control"]):
        said = failure(*command, tmp_path / "x")
        assert f"no zramfs device of yours is on {tmp_path}/x" in said
        assert "there is none at all" in said


def test_create_is_ready_when_it_returns_and_stop_leaves_nothing(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "my device, with-odd \\ name"
    done = zramfs(
        "create", directory, "--size", "10M", "--algo", "zstd:3", "--mem-limit", "4M", "--threads", "3"
    )
    assert (done.stdout, done.stderr) == ("", "")
    try:
        made = Device(directory)
        assert made.disk.stat().st_size == 10 * MIB
        data = os.urandom(4096) + b"zramfs" * 2000
        with opened(made.disk) as fd:
            os.pwrite(fd, data, 4096)
            assert os.pread(fd, len(data), 4096) == data
        assert made.mm_stat()["mem_limit"] == 4 * MIB
        assert "[zstd]" in made.read("zram/comp_algorithm")
        state = state_of(directory)
        assert (state.kind, state.phase, state.threads, state.directory) == (
            "device",
            "ready",
            3,
            str(directory),
        )
        assert state.alive()
    finally:
        stopped = zramfs("stop", directory)
    assert (stopped.stdout, stopped.stderr) == ("", "")
    assert not state.alive()
    assert not directory.exists()  # create made it
    nothing_left(directory, base)


def test_a_device_can_have_a_name_of_its_own(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    zramfs("create", directory, "--size", "1M", "--name", "first")
    try:
        assert [path.name for path in base.iterdir()] == ["first"]
        assert state_of(directory).name == "first" and mounts.mount_at(directory).source == "first"
        shown = zramfs("status", "first", "-n", "--raw", "-o", "NAME,DIRECTORY").stdout
        assert shown == f"first {directory}\n"
        said = failure("create", tmp_path / "other", "--size", "1M", "--name", "first")
        assert f"a zramfs device is there on {directory}" in said
        said = failure("create", directory, "--size", "1M", "--name", "second")
        assert f"a zramfs device is there on {directory}" in said
        assert not (tmp_path / "other").exists()
    finally:
        zramfs("stop", "first")
    nothing_left(directory, base)


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "x" * 65, "ü"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, base: Path, name: str) -> None:
    said = failure("create", tmp_path / "d", "--size", "1M", f"--name={name}", code=2)
    assert "expected a NAME of 1 to 64 letters, digits and _ : . -" in " ".join(said.split())
    assert not base.exists()


def test_stop_keeps_a_directory_that_was_there(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    directory.mkdir()
    (directory / "file").write_text("covered by the mount")
    with device(directory, MIB):
        assert not (directory / "file").exists()
    assert (directory / "file").read_text() == "covered by the mount"
    nothing_left(directory, base)


def test_create_without_a_size_is_set_up_later(tmp_path: Path) -> None:
    with device(tmp_path / "device", None) as made:
        assert made.read("zram/initstate") == "0\n"
        made.write("zram/disksize", "3M")
        assert made.disk.stat().st_size == 3 * MIB


def test_the_daemon_belongs_to_nobody(tmp_path: Path) -> None:
    with device(tmp_path / "device", MIB):
        state = state_of(tmp_path / "device")
        proc = Path(f"/proc/{state.pid}")
        fields = (proc / "stat").read_text().rpartition(")")[2].split()
        session, terminal = int(fields[3]), int(fields[4])
        assert session not in (state.pid, os.getsid(0))  # not its leader: it can never get a terminal
        assert terminal == 0
        assert os.readlink(proc / "cwd") == "/"
        log = str(Path(state.disk).parent / "log")
        assert [os.readlink(proc / f"fd/{n}") for n in (0, 1, 2)] == ["/dev/null", log, log]


def test_the_daemon_keeps_no_descriptor_of_its_caller(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    try:
        subprocess.run(
            [*ZRAMFS, "create", tmp_path / "device", "--size", "1M"],
            pass_fds=[write_end],
            check=True,
            timeout=60,
        )
        try:
            os.close(write_end)
            os.set_blocking(read_end, False)
            assert os.read(read_end, 1) == b""  # EOF; BlockingIOError if the daemon had the other end
        finally:
            zramfs("stop", tmp_path / "device")
    finally:
        os.close(read_end)


def test_a_second_device_is_refused_and_the_first_lives_on(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    with device(directory, MIB) as made:
        for path in (directory, f"{directory}/../device/"):
            said = failure("create", path, "--size", "1M")
            assert (
                f"a zramfs device is there on {directory} (daemon pid {state_of(directory).pid}, since "
                in said
            )
            assert f"`zramfs stop {directory}` first" in said
        assert made.read("zram/initstate") == "1\n"
        elsewhere = run(
            *ZRAMFS, "create", directory, check=False, env={**os.environ, "ZRAMFS_RUN_DIR": f"{base}2"}
        )
        assert elsewhere.returncode == 1
        assert "a zramfs device of another user or run directory is mounted on" in elsewhere.stderr
    nothing_left(directory, base)


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    said = failure("create", directory, "--size", "9223372036854775807")
    assert said.startswith("zramfs: ")
    assert "9223372036854775807" in said
    assert not directory.exists()
    nothing_left(directory, base)


@pytest.mark.requires("root")
def test_a_run_directory_that_is_read_only_leaves_no_directory_behind(tmp_path: Path, base: Path) -> None:
    base.mkdir()
    run("mount", "-t", "tmpfs", "-o", "ro,mode=0711", "none", base)
    try:
        said = failure("create", tmp_path / "device", "--size", "1M")
        assert said.startswith(f"zramfs: {base}/") and said.endswith(": Read-only file system\n")
        assert not (tmp_path / "device").exists()
    finally:
        run("umount", base)


def test_foreground_serves_until_it_is_told_to_end(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "device"
    command = [*ZRAMFS, "create", str(directory), "--size", "1M", "--foreground"]
    for how in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_until(lambda: (directory / "disk").exists(), "the device is there")
                assert state_of(directory).keeper_pid == process.pid
                wait_until(lambda: state_of(directory).phase == "ready", "the device is ready")
                process.send_signal(how)
                assert process.wait(60) == 0
            finally:
                process.kill()
            assert f"{directory} is ready" in process.stderr.read()
        nothing_left(directory, base)


def runs(word: str) -> bool:
    """Whether a process has the word in its command line."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in file.read_bytes():
                return True
    return False


@pytest.mark.parametrize("delay", [0.1, 0.2, 0.3, 0.5])
def test_an_interrupted_create_leaves_nothing_or_a_device(tmp_path: Path, base: Path, delay: float) -> None:
    directory = tmp_path / "device"
    with subprocess.Popen(
        [*ZRAMFS, "create", str(directory), "--size", "1M"], stderr=subprocess.PIPE
    ) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    if code == 0:  # too late: it was ready
        zramfs("stop", directory)
    # The daemon may still be on its way out: it was told to end while it started.
    wait_until(lambda: not base.exists() or os.listdir(base) == [], "the run directory is gone")
    wait_until(lambda: not runs(str(directory)), "so is the daemon")
    assert not [m for m in mounts.mounts() if m.mountpoint.is_relative_to(tmp_path)]


def test_a_daemon_that_is_killed_while_it_starts_is_reported_with_its_log(tmp_path: Path) -> None:
    def die(_on_ready: object) -> int:
        os.write(1, b"last words\n")
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(ZramfsError, match="ended before it was ready; the end of its log:\nlast words"):
        detach.run(die, tmp_path / "log")

    def break_down(_on_ready: object) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(ZramfsError, match=r"(?s)the daemon failed:\nTraceback.*RuntimeError: a bug"):
        detach.run(break_down, tmp_path / "log2")


def test_a_device_that_wipes_says_so(tmp_path: Path, base: Path) -> None:
    directory = tmp_path / "z"
    with device(directory, MIB, "--wipe"):
        said = (directory / "control").read_text()
        assert "wipe         what is discarded or overwritten is zeroed" in said
    with device(directory, MIB):
        assert not re.search("^wipe ", (directory / "control").read_text(), re.MULTILINE)
