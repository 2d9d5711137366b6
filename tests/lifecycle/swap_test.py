# SPDX-License-Identifier: Apache-2.0
"""`zramfs swap`: the way up, the way down, and the way back from every step that fails."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import capabilities
from tests.support.apart import apart
from tests.support.commands import failure, is_attached, kill_daemon, nothing_left, rows
from tests.support.whole import MIB, ZRAMFS, run, wait_until, zramfs
from zramfs.cli.status import DEFAULT
from zramfs.host import loops, swaps, watermark
from zramfs.lifecycle import rundir
from zramfs.lifecycle.rundir import State

pytestmark = [pytest.mark.requires("root", "fuse", "loop", "swap"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def swap0() -> Iterator[State]:
    """Swap of 64 MiB, below every other so that nobody's pages go there; taken down if need be."""
    zramfs("swap", "--size", "64M", "--priority", "0")
    try:
        yield named("swap0")
    finally:
        if rundir.find("swap0"):
            zramfs("stop", "swap0")


def named(name: str) -> State:
    found = rundir.find(name)
    assert found is not None
    state = found.read()
    assert state is not None
    return state


def gone(base: Path, state: State | None = None) -> None:
    nothing_left(base, base)
    assert not [area for area in swaps.swap_areas() if state and area.path == state.loop]


def test_swap_from_one_command(base: Path) -> None:
    done = zramfs("swap", "fast", "--size", "128M", "--priority", "7", "--algo", "zstd:1")
    assert done.stdout == ""
    try:
        state = named("fast")
        assert (state.kind, state.phase, state.where) == ("swap", "ready", "fast")
        [area] = [area for area in swaps.swap_areas() if area.path == state.loop]
        assert (area.size, area.used, area.priority) == (128 * MIB - 4096, 0, 7)
        queue = Path(f"/sys/block/{Path(state.loop).name}")
        assert (queue / "queue/logical_block_size").read_text() == "4096\n"
        assert (queue / "loop/dio").read_text() == "1\n"
        assert rows("fast", "-o", "MOUNTPOINT,ALGORITHM,SWAP-PRIO,STATE") == [
            {"mountpoint": "[SWAP]", "algorithm": "zstd", "swap-prio": 7, "state": "ready"}
        ]
        [shown] = rows("-b")
        assert list(shown) == [*(name.lower() for name in DEFAULT), "swap-used"]
        assert shown["swap-used"] == 0
    finally:
        done = zramfs("stop", "fast")
    assert (done.stdout, done.stderr) == ("", "")
    gone(base, state)


def test_what_keeps_the_machine_from_hanging_is_set_up(base: Path) -> None:
    free = watermark.SETTING.read_text()
    raised = int(free) + 50_000  # more than what another run on this machine may ask for just now
    done = zramfs("swap", "--size", "64M", "--priority", "0", "--reserve", "5M", "--min-free", f"{raised}K")
    try:
        state = named("swap0")
        said = [line.removeprefix("zramfs: note: ") for line in done.stderr.splitlines()]
        assert said[-1].startswith("raised vm.min_free_kbytes from ")
        assert said[-1].endswith(f" to {raised}; `zramfs stop` restores it")
        assert said[:-1] == state.notes
        assert watermark.SETTING.read_text() == f"{raised}\n"
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{state.pid}/status").read_text().splitlines()
        )
        # All is locked but what can't be, such as the kernel's own pages in the process.
        locked, size = (int(status[name].split()[0]) for name in ("VmLck", "VmSize"))
        assert size - 1024 < locked <= size
        # The memory file is as long as ever, and holds what is needed.
        assert int(status["VmRSS"].split()[0]) < 200_000
        group = Path(f"/proc/{state.pid}/cgroup").read_text()
        assert ":memory:/\n" in group or "0::/\n" in group
        if capabilities.missing("sys_resource"):
            assert said[-2].startswith("without PR_SET_IO_FLUSHER and oom_score_adj -1000 (")
        else:
            assert Path(f"/proc/{state.pid}/oom_score_adj").read_text() == "-1000\n"
        threads = {(task / "comm").read_text().strip() for task in Path(f"/proc/{state.pid}/task").iterdir()}
        assert "zramfs-reserve" in threads
    finally:
        zramfs("stop", "swap0")
    assert int(watermark.SETTING.read_text()) < raised
    assert not [user for user in watermark.users() if user.startswith(str(base))]


def test_a_needed_setting_that_is_refused_ends_it_unless_forced(base: Path) -> None:
    """Without CAP_IPC_LOCK memory can't be locked beyond RLIMIT_MEMLOCK."""
    bare = ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock")
    words = (*ZRAMFS, "swap", "--size", "64M", "--priority", "0")
    done = run(*bare, *words, check=False, env=dict(os.environ))
    assert done.returncode == 1
    assert "swap would not be safe here, so nothing was set up; --force goes on without:\n" in done.stderr
    assert "  memory lock: CAP_IPC_LOCK is lacking and RLIMIT_MEMLOCK is " in done.stderr
    gone(base)
    done = run(*bare, *words, "--force", env=dict(os.environ))
    try:
        assert "forced to go on without what swap needs:\n  memory lock: " in done.stderr
        assert named("swap0").loop in swaps.swaps()
    finally:
        zramfs("stop", "swap0")
    gone(base)


def test_swap_without_a_reserve_is_refused(base: Path) -> None:
    said = failure("swap", "--size", "16M", "--reserve", "0")
    assert "swap needs a reserve of ready memory: expected at least 2M, got 0" in said
    gone(base)


def test_names_are_given_in_order_and_printed_and_a_taken_one_is_refused(swap0: State) -> None:
    done = zramfs("swap", "--size", "64M", "--priority", "0")
    try:
        assert done.stdout == "swap1\n"
        assert named("swap1").loop != swap0.loop
        said = failure("swap", "swap0", "--size", "64M")
        assert f"a zramfs device is there on swap0 (daemon pid {swap0.pid}, since " in said
        assert "use another name, or `zramfs stop swap0` first" in said
    finally:
        zramfs("stop", "swap1")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["a/b", "--size", "1M"], "expected a NAME of 1 to 64 letters, digits and _ : . -, got 'a/b'"),
        (["..", "--size", "1M"], "expected a NAME"),
        (["--size", "32K"], "expected a size of at least 40960 bytes, got 32768"),
        (["--size", "1M", "--priority", "-2"], "-2 is not in the range 0<=x<=32767"),
        (["--size", "1M", "--discard", "never"], "'never' is not one of 'both', 'once', 'pages', 'none'"),
        (["--size", "1M", "--algo", "lz4hc:10"], "lz4hc above level 9 takes memory for every page"),
        (["--size", "1M", "--reserve", "lots"], "lots"),
        ([], "Missing option '--size'"),
    ],
)
def test_wrong_calls(words: list[str], reason: str, base: Path) -> None:
    assert reason in failure("swap", *words, code=2)
    assert not base.exists()


def with_program(tmp_path: Path, name: str, script: str) -> dict[str, str]:
    """An environment where the program `name` is a shell script."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


@pytest.mark.parametrize("program", ["mkswap", "swapon"])
def test_a_step_that_fails_undoes_everything_and_is_quoted(tmp_path: Path, base: Path, program: str) -> None:
    env = with_program(tmp_path, program, "echo 'not today' >&2; exit 1")
    done = run(*ZRAMFS, "swap", "--size", "16M", check=False, env=env)
    assert done.returncode == 1
    assert "` failed: not today" in done.stderr
    gone(base)


def test_a_swapoff_that_met_a_page_in_motion_is_tried_again(tmp_path: Path, base: Path, swap0: State) -> None:
    """Twice it finds no memory, as the kernel says when a program has just taken the page itself."""
    real, count = shutil.which("swapoff"), tmp_path / "count"
    env = with_program(
        tmp_path, "swapoff",
        f'echo >>{count}; [ "$(wc -l <{count})" -gt 2 ] && exec {real} "$@"; echo no memory >&2; exit 2')
    done = run(*ZRAMFS, "stop", "swap0", env=env)
    assert (done.stdout, done.stderr, count.read_text()) == ("", "", "\n\n\n")
    gone(base, swap0)


def test_a_swapoff_that_finds_no_memory_again_and_again_ends_it(tmp_path: Path, swap0: State) -> None:
    env = with_program(tmp_path, "swapoff", "echo no memory >&2; exit 2")
    done = run(*ZRAMFS, "stop", "swap0", check=False, env=env)
    assert (done.returncode, done.stderr) == (1, f"zramfs: `swapoff {swap0.loop}` failed: no memory\n")
    assert swap0.alive() and swap0.loop in swaps.swaps()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_daemon_that_is_told_to_end_takes_the_swap_down(swap0: State, base: Path, number: int) -> None:
    os.kill(swap0.pid, number)
    wait_until(lambda: not swap0.alive(), "the daemon has ended", 30)
    gone(base, swap0)


def test_an_unmounted_tree_ends_it_in_order(swap0: State, base: Path) -> None:
    run("umount", swap0.directory)
    wait_until(lambda: not swap0.alive(), "the daemon has ended", 30)
    gone(base, swap0)


def test_a_disk_that_was_unmounted_under_the_swap(swap0: State, base: Path) -> None:
    """umount --lazy hides the disk from everybody, also from a command that looks for what stands on it."""
    run("umount", "--lazy", swap0.disk)
    assert swap0.loop in swaps.swaps()
    zramfs("stop", "swap0")
    assert not is_attached(swap0)
    gone(base, swap0)


def test_a_signal_after_the_disk_was_unmounted_under_the_swap(swap0: State, base: Path) -> None:
    run("umount", "--lazy", swap0.disk)
    os.kill(swap0.pid, signal.SIGTERM)
    wait_until(lambda: not swap0.alive(), "the daemon has ended", 30)
    assert not is_attached(swap0)
    gone(base, swap0)


def test_a_daemon_that_died_after_its_disk_was_unmounted_under_the_swap(swap0: State, base: Path) -> None:
    run("umount", "--lazy", swap0.disk)
    kill_daemon(swap0)
    assert "cleaned up swap0: " in zramfs("stop", "swap0").stderr
    assert not is_attached(swap0)
    gone(base, swap0)


def test_a_loop_device_that_somebody_else_has_by_now_is_left_alone(
    swap0: State, base: Path, tmp_path: Path
) -> None:
    run("swapoff", swap0.loop)
    run("losetup", "--detach", swap0.loop)
    wait_until(lambda: not is_attached(swap0), "the loop device has let go")
    (tmp_path / "file").write_bytes(bytes(MIB))
    # It is the next one that the kernel gives away, perhaps to another test.
    wait_until(lambda: run("losetup", swap0.loop, tmp_path / "file", check=False).returncode == 0,
               f"{swap0.loop} is ours")
    try:
        zramfs("stop", "swap0")
        assert loops.backing_file(swap0.loop) == str(tmp_path / "file")
    finally:
        run("losetup", "--detach", swap0.loop)
    gone(base, swap0)


def test_a_loop_device_that_was_detached_under_the_swap(swap0: State, base: Path) -> None:
    """losetup says that it did, and the kernel does it after swapoff."""
    run("losetup", "--detach", swap0.loop)
    assert swap0.loop in swaps.swaps()
    zramfs("stop", "swap0")
    gone(base, swap0)


@pytest.mark.parametrize("room", ["nr_inodes=3", "nr_inodes=4", "nr_inodes=5", "nr_inodes=6", "size=4k"])
def test_a_full_run_directory_ends_the_start_and_leaves_nothing(base: Path, room: str) -> None:
    """Room for directories and not for what is to be in them; for files and not for text."""
    base.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"{room},mode=0711", "none", base)
    try:
        said = failure("swap", "--size", "16M")
        assert f"{base}/swap0/" in said and said.endswith(": No space left on device\n")
        assert os.listdir(base) == []
    finally:
        run("umount", base)
    gone(base)


def test_swap_needs_no_fusermount3_and_a_private_namespace_is_no_obstacle_to_its_end(
    tmp_path: Path, base: Path
) -> None:
    """Its program is hidden in a mount namespace, in which the daemon stays."""
    hidden = tmp_path / "empty"
    hidden.touch()
    real = run("sh", "-c", "command -v fusermount3").stdout.strip()
    words = " ".join(map(str, (*ZRAMFS, "swap", "--size", "16M")))
    script = f"mount --bind {hidden} {real} && {words}"
    run(*apart("sh", "-c", script), env=dict(os.environ))
    zramfs("stop", "swap0")
    gone(base)


def test_stop_after_somebody_else_has_ended_the_swap(swap0: State, base: Path) -> None:
    run("swapoff", swap0.loop)
    run("losetup", "--detach", swap0.loop)
    wait_until(lambda: not is_attached(swap0), "the loop device has let go")
    zramfs("stop", "swap0")
    gone(base, swap0)


def test_stop_names_what_else_uses_the_device_and_changes_nothing(swap0: State) -> None:
    code = "import sys; f = open(sys.argv[1], 'rb'); print('there', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        ["python3", "-c", code, swap0.disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            process.stdout.readline()
            said = failure("stop", "swap0")
            assert said.startswith("zramfs: swap0 is in use, so nothing was changed:\n")
            assert f" (pid {process.pid}) has " in said
            assert len(said.splitlines()) == 2
        finally:
            process.kill()
    assert swap0.loop in swaps.swaps()


def test_the_swap_of_a_daemon_that_died_is_taken_down(swap0: State, base: Path) -> None:
    kill_daemon(swap0)
    assert rows("-o", "NAME,STATE", code=1) == [{"name": "swap0", "state": "dead"}]
    said = zramfs("stop", "swap0").stderr
    assert f"cleaned up swap0: its daemon (pid {swap0.pid}, since " in said
    gone(base, swap0)


def test_a_lost_state_leaves_no_setting_behind(swap0: State, base: Path) -> None:
    assert f"{base}/swap0" in watermark.users()
    kill_daemon(swap0)
    (base / "swap0/state.json").unlink()
    said = failure("stop", "swap0")
    assert f"{base}/swap0 is in use, so nothing was changed:\n" in said
    assert f"\n  swap is on {swap0.loop}\n" in said
    run("swapoff", swap0.loop)
    run("losetup", "--detach", swap0.loop)
    assert "left by a start that never finished" in zramfs("stop", "swap0").stderr
    assert f"{base}/swap0" not in watermark.users()
    gone(base, swap0)


def test_the_name_of_a_daemon_that_died_can_be_taken_again(swap0: State) -> None:
    kill_daemon(swap0)
    assert "cleaned up swap0: " in zramfs("swap", "swap0", "--size", "64M", "--priority", "0").stderr
    assert swap0.loop not in swaps.swaps() or named("swap0").loop == swap0.loop


def test_a_swap_area_keeps_its_size_and_the_sentence_says_what_to_do(swap0: State) -> None:
    said = failure("resize", "swap0", "128M")
    assert "zramfs swap NAME --size SIZE" in said and "zramfs stop swap0" in said
    with pytest.raises(OSError):
        (Path(swap0.directory) / "control").write_text("resize=128M\n")
    assert loops.size(swap0.loop) == swap0.size == 64 * MIB
