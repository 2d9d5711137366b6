# SPDX-License-Identifier: Apache-2.0
"""Daemons that are killed while their devices are used: whoever does I/O notices a pause and nothing else."""
from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.child import stopped
from tests.support.commands import nothing_left
from tests.support.governed import end_file_system, kernel_log
from tests.support.killer import Killer, found, has_standby, kill_daemon, serving_pids, state
from tests.support.page_kinds import prose
from tests.support.scale import scaled
from tests.support.swap_load import group
from tests.support.whole import (
    MIB,
    PAGE,
    ZRAMFS,
    Device,
    copy_real_files,
    device,
    manifest,
    opened,
    run,
    stop,
    wait_until,
    zramfs,
)
from zramfs.host import process
from zramfs.lifecycle.rundir import Rundir

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]

KILLS = scaled(30, 12)
# Puts a shell into a memory cgroup, and more bytes than the group may have into the shell.
EATER = 'echo $$ >"$0/cgroup.procs" && exec dd if=/dev/zero of=/dev/null bs=200M count=1'
# Seconds between two kills. With a standby the next daemon serves in a few milliseconds.
PAUSES = (0.01, 0.25)


FSCK = {
    "ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n"), "btrfs": ("btrfs", "check", "--check-data-csum"),
}


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return int(KILLS * max(1.0, request.config.getoption("soak")))


def expect_all_taken_over(killer: Killer) -> None:
    # The keeper wakes the next one before it says so.
    wait_until(lambda: killer.log().count("takes over") >= killer.kills, "the last line of the keeper")
    log = killer.log()
    lost = {int(number) for number in re.findall(r"(\d+) are lost", log)}
    assert lost <= {0}, log[-4000:]
    assert set(re.findall(r"the daemon, process \d+, (.*)", log)) == {"was ended by signal 9"}, log[-4000:]
    assert "Traceback" not in log


@pytest.mark.soak
@pytest.mark.requires("fio")
@pytest.mark.parametrize("standby", [True, False], ids=["standby", "alone"])
def test_verified_load_on_the_file_meets_no_error(tmp_path: Path, kills: int, standby: bool) -> None:
    kills = kills if standby else kills // 6
    with device(tmp_path / "z", 256 * MIB, *(["--standby"] if standby else [])) as z:
        with Killer.at_work(z.directory, PAUSES) as killer:
            load = subprocess.Popen(
                ["fio", "--name=kills", f"--filename={os.path.realpath(z.disk)}", "--rw=randrw", "--direct=1",
                 "--bssplit=4k/60:16k/20:64k/10:128k/5:1m/5", "--ioengine=libaio", "--iodepth=16",
                 "--size=200m",
                 "--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--verify_state_save=0",
                 "--time_based", "--runtime=10000", "--serialize_overlap=1", "--minimal",
                 "--buffer_compress_percentage=50", "--refill_buffers", "--allow_file_create=0"],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
            try:
                wait_until(lambda: killer.is_done(kills) or load.poll() is not None, "all kills",
                           90 * max(1, kills // KILLS))
            finally:
                load.send_signal(signal.SIGINT)
                said = load.communicate(timeout=60)[0]
        assert "verify" not in said.lower() and "error" not in said.lower(), said
        assert load.returncode in (0, 128), said  # 128: by our SIGINT
        expect_all_taken_over(killer)
        wait_until(lambda: readable(z.directory / "control"), "the tree", 5)
        assert z.io_stat() == dict.fromkeys(z.io_stat(), 0)


@pytest.mark.soak
def test_what_was_written_before_a_kill_is_read_after_it(tmp_path: Path, kills: int) -> None:
    """At depth 1, with trims, against a model: each request is done wholly, and once."""
    rng = random.Random(11)
    model = bytearray(16 * MIB)
    with device(tmp_path / "z", len(model), "--standby") as z, opened(os.path.realpath(z.disk)) as fd:
        with Killer.at_work(z.directory, PAUSES) as killer:
            while not killer.is_done(kills):
                size = rng.choice((512, PAGE, PAGE, 3 * PAGE, 64 << 10))
                at = rng.randrange((len(model) - size) // 512) * 512
                if rng.random() < 0.5:
                    data = rng.randbytes(size // 2) + bytes(size - size // 2)
                    assert os.pwrite(fd, data, at) == size
                    model[at:at + size] = data
                else:
                    assert os.pread(fd, size, at) == model[at:at + size]
        expect_all_taken_over(killer)
        assert os.pread(fd, len(model), 0) == model


@pytest.mark.soak
@pytest.mark.parametrize("fstype", [
    pytest.param(each, marks=pytest.mark.requires("root", "loop", each)) for each in FSCK])
def test_a_file_system_on_loop_loses_nothing(tmp_path: Path, kills: int, fstype: str) -> None:
    point = tmp_path / "fast"
    kills //= 3
    zramfs("ramdisk", point, "--size", "512M", "--fs", fstype, "--standby")
    loop = state(point).loop
    # Now: another test may have had the loop device just before. And by the kernel log's own clock, which is
    # not exactly that of anything else.
    since = max((at for at, _ in kernel_log()), default=0.0)
    try:
        with Killer.at_work(point, PAUSES) as killer:
            for _ in range(1000):
                expected = copy_real_files(point / "copy", 8 * MIB)
                run("sync", "-f", point)
                run("fstrim", point)
                assert manifest(point / "copy") == expected
                run("rm", "-r", point / "copy")
                if killer.is_done(kills):
                    break
        expect_all_taken_over(killer)
        expected = copy_real_files(point / "copy", 8 * MIB)
        end_file_system(point, fstype, loop)
        run(*FSCK[fstype], loop)
        run("mount", loop, point)
        assert manifest(point / "copy") == expected
        assert [text for at, text in kernel_log() if at > since and "error" in text.lower()
                and re.search(rf"\b{Path(loop).name}\b", text)] == []
    finally:
        stop(point)


def test_the_pause_of_a_reader_is_short_where_a_standby_waits(tmp_path: Path) -> None:
    """80 to 180 ms on two CPUs for which 17 others waited."""
    pauses = []
    with device(tmp_path / "z", 64 * MIB, "--standby") as z, opened(os.path.realpath(z.disk)) as fd:
        os.pwrite(fd, os.urandom(32 * MIB), 0)
        pid = 0
        for _ in range(10):
            # The one that was killed is the daemon still, as long as it has its run directory locked.
            wait_until(
                lambda old=pid: has_standby(z.directory) and state(z.directory).pid != old, "a standby")
            pid = state(z.directory).pid
            os.kill(pid, signal.SIGKILL)
            killed, longest = time.monotonic(), 0.0
            while (began := time.monotonic()) < killed + 0.3:
                assert len(os.pread(fd, PAGE, PAGE)) == PAGE
                longest = max(longest, time.monotonic() - began)
            pauses.append(longest)
    print("pauses in ms:", sorted(round(each * 1e3) for each in pauses))
    assert sorted(pauses)[len(pauses) // 2] < 1


def test_the_tree_is_there_again_and_settings_stay(tmp_path: Path) -> None:
    with device(tmp_path / "z", 16 * MIB, "--standby", "--algo", "zstd:3", "--recomp-algo", "zstd:19") as z:
        z.write("control", "mem_limit=8M")
        z.write("control", "proactiveness=77")
        z.write("control", "policy=recompress idle=1h")
        names = ("zram/comp_algorithm", "zram/recomp_algorithm", "zram/disksize")
        before = {name: z.read(name) for name in names}
        with opened(os.path.realpath(z.disk)) as fd:
            os.pwrite(fd, b"x" * PAGE, PAGE)
            kill_daemon(z.directory)
            wait_until(lambda: readable(z.directory / "control"), "the tree", 10)
            text = z.read("control")
            assert "disk is open 1 times" in text
        wait_until(lambda: "disk is open 0 times" in z.read("control"), "the file is closed")
        assert {name: z.read(name) for name in before} == before
        assert z.mm_stat()["mem_limit"] == 8 * MIB
        text = z.read("control")
        assert "recompress idle=1h" in text and "another process takes over" in text
        assert z.read("memory/proactiveness") == "77\n"
        assert state(z.directory).tree_dev == tree_dev(z.directory)


def test_the_policy_of_units_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Which may come while it makes one."""
    data = b"".join(prose(number % 50) for number in range(1024))
    with device(tmp_path / "z", 16 * MIB, "--standby", "--access-times") as z:
        z.write("control", "policy=units idle=1s")
        z.write("control", "density=auto:20%")
        with opened(os.path.realpath(z.disk)) as fd:
            for off in (0, len(data)):
                os.pwrite(fd, data, off)
                wait_until(lambda most=off // PAGE: units_of(z) > most, "units of the policy", 60)
                kill_daemon(z.directory)
                wait_until(lambda: readable(z.directory / "control"), "the tree", 5)
                assert "policies     units idle=1s" in z.read("control")
                assert "density      auto, with at most 20 % of a core" in z.read("control")
            wait_until(lambda: units_of(z) >= 2 * len(data) // PAGE, "all pages are in units", 60)
            for off in (0, len(data)):
                assert os.pread(fd, len(data), off) == data


def units_of(z: Device) -> int:
    """Pages in units."""
    found = re.search(r"^units +\d+ of (\d+) pages", z.read("control"), re.MULTILINE)
    return int(found[1]) if found else 0


def tree_dev(directory: Path) -> str:
    device_ = os.stat(directory).st_dev
    return f"{os.major(device_)}:{os.minor(device_)}"


def readable(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.read_text()
        return True
    return False


def test_a_device_that_was_reset_or_has_no_size_survives_as_well(tmp_path: Path) -> None:
    with device(tmp_path / "z", None) as z:
        kill_daemon(z.directory)
        wait_until(lambda: readable(z.directory / "control"), "the tree", 5)
        z.write("control", "disksize=1M")
        kill_daemon(z.directory)
        wait_until(lambda: readable(z.directory / "control"), "the tree", 5)
        assert int(z.read("zram/disksize")) == MIB
        z.write("control", "reset")
        kill_daemon(z.directory)
        wait_until(lambda: readable(z.directory / "control"), "the tree", 5)
        assert int(z.read("zram/disksize")) == 0
        z.write("control", "disksize=2M")
        assert os.path.getsize(z.disk) == 2 * MIB


def test_what_was_written_back_is_there_after_a_kill(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.touch(0o600)
    os.truncate(backing, 8 * MIB)
    data = random.Random(3).randbytes(MIB)
    with device(tmp_path / "z", 16 * MIB, "--writeback", backing) as z:
        with opened(z.disk) as fd:
            os.pwrite(fd, data, 0)
        z.write("control", "idle=all")
        z.write("control", "writeback=type=idle")
        assert int(z.read("zram/bd_stat").split()[0]) == len(data) // PAGE
        kill_daemon(z.directory)
        wait_until(lambda: readable(z.directory / "control"), "the tree", 5)
        with opened(z.disk) as fd:
            assert os.pread(fd, len(data), 0) == data
        assert int(z.read("zram/bd_stat").split()[0]) == len(data) // PAGE


def test_a_killed_keeper_is_replaced_and_the_device_survives_the_next_kill(tmp_path: Path) -> None:
    with device(tmp_path / "z", 16 * MIB, "--standby") as z, opened(os.path.realpath(z.disk)) as fd:
        os.pwrite(fd, b"kept", 0)
        for _ in range(3):
            before = state(z.directory)
            os.kill(before.keeper_pid, signal.SIGKILL)
            old = before.keeper_pid
            wait_until(lambda old=old: state(z.directory).keeper_pid not in (old, 0), "a keeper")
            kill_daemon(z.directory)
            assert os.pread(fd, 4, 0) == b"kept"
        wait_until(lambda: state(z.directory).standby_pid != 0, "a standby")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_daemon_that_crashes_is_replaced(tmp_path: Path, number: signal.Signals) -> None:
    with device(tmp_path / "z", 16 * MIB, "--standby") as z, opened(os.path.realpath(z.disk)) as fd:
        os.pwrite(fd, b"kept", 0)
        kill_daemon(z.directory, number)
        assert os.pread(fd, 4, 0) == b"kept"
        # The keeper wakes the next one before it says so.
        wait_until(lambda: "takes over" in found(z.directory).log.read_text(), "the last line of the keeper")
        assert f"was ended by signal {int(number)}" in found(z.directory).log.read_text()


@pytest.mark.requires("root", "memcg")
def test_a_daemon_that_the_kernel_ends_for_want_of_memory_is_replaced(tmp_path: Path) -> None:
    with (group(64 * MIB) as small, device(tmp_path / "z", 16 * MIB, "--standby") as z,
          opened(os.path.realpath(z.disk)) as fd):
        os.pwrite(fd, b"kept", 0)
        daemon = state(z.directory).pid
        Path(f"/proc/{daemon}/oom_score_adj").write_text("1000")
        # Or the group is swapped out where another test has swap.
        for name, value in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", 64 * MIB)):
            if (small.path / name).exists():
                (small.path / name).write_text(str(value))
        (small.path / "cgroup.procs").write_text(str(daemon))
        eater = subprocess.Popen(["sh", "-c", EATER, small.path])
        wait_until(lambda: small.kills > 0 or eater.poll() is not None, "an OOM kill", 30)
        eater.kill()
        eater.wait()
        wait_until(lambda: state(z.directory).pid != daemon, "another daemon", 30)
        assert os.pread(fd, 4, 0) == b"kept"


def test_a_standby_takes_over_when_keeper_and_daemon_die_together(tmp_path: Path) -> None:
    with device(tmp_path / "z", 16 * MIB, "--standby") as z, opened(os.path.realpath(z.disk)) as fd:
        os.pwrite(fd, b"kept", 0)
        for order in ("keeper first", "daemon first", "keeper first"):
            wait_until(lambda: has_standby(z.directory), "a standby", 30)
            before = state(z.directory)
            pids = [before.keeper_pid, before.pid]
            with stopped(before.pid):
                for pid in pids if order == "keeper first" else pids[::-1]:
                    os.kill(pid, signal.SIGKILL)
            assert os.pread(fd, 4, 0) == b"kept"
            wait_until(lambda old=before.keeper_pid: state(z.directory).keeper_pid not in (0, old),
                       "another keeper", 30)
        wait_until(lambda: readable(z.directory / "control"), "the tree", 10)


def test_a_standby_without_a_keeper_is_gone_when_there_is_another_one(tmp_path: Path) -> None:
    with device(tmp_path / "z", 16 * MIB, "--standby") as z:
        before = state(z.directory)
        os.kill(before.keeper_pid, signal.SIGKILL)
        assert before.standby_pid
        wait_until(lambda: not os.path.exists(f"/proc/{before.standby_pid}"), "its end", 30)
        wait_until(lambda: has_standby(z.directory) and state(z.directory).standby_pid != before.standby_pid,
                   "another standby", 30)


def test_counters_of_requests_go_on_in_the_next_daemon(tmp_path: Path) -> None:
    with device(tmp_path / "z", 16 * MIB, "--standby") as z, opened(os.path.realpath(z.disk)) as fd:
        for count in range(1, 4):
            os.pwrite(fd, bytes(PAGE), 0)
            os.pread(fd, PAGE, 0)
            kill_daemon(z.directory)
            wait_until(lambda: readable(z.directory / "control"), "the tree", 10)
            reads, _, _, _, writes, _, sectors, *_ = map(int, z.read("zram/stat").split())
            assert (reads, writes, sectors) == (count, count, count * PAGE // 512)


def test_a_killed_standby_is_replaced(tmp_path: Path) -> None:
    with device(tmp_path / "z", 16 * MIB, "--standby") as z:
        old = state(z.directory).standby_pid
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: state(z.directory).standby_pid not in (old, 0), "another standby", 20)
        kill_daemon(z.directory)
        assert os.path.getsize(os.path.realpath(found(z.directory).disk)) == 16 * MIB


def test_a_standby_has_a_replacement_before_its_turn_and_it_is_the_next_standby(tmp_path: Path) -> None:
    with device(tmp_path / "z", 16 * MIB, "--standby") as z:
        for _ in range(3):
            spare = spare_pid(z.directory)
            kill_daemon(z.directory)
            wait_until(lambda spare=spare: state(z.directory).standby_pid == spare, "it is the standby")


def test_a_replacement_ends_with_its_standby_and_a_killed_one_does_not_count(tmp_path: Path) -> None:
    with device(tmp_path / "z", 16 * MIB, "--standby") as z:
        spare, old = spare_pid(z.directory), state(z.directory).standby_pid
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: not os.path.exists(f"/proc/{spare}"), "its end")
        wait_until(lambda: state(z.directory).standby_pid not in (0, old), "another standby", 30)
        spare = spare_pid(z.directory)
        os.kill(spare, signal.SIGKILL)
        wait_until(lambda: not os.path.exists(f"/proc/{spare}"), "its end")
        kill_daemon(z.directory)
        wait_until(lambda: has_standby(z.directory), "another standby", 30)


def spare_pid(directory: Path) -> int:
    """The process that the standby has forked; the keeper is its parent. Beside the daemon it has older ones,
    which have died and are not gone yet."""
    found_one = 0

    def is_there() -> bool:
        nonlocal found_one
        now = state(directory)
        since = process.process_start(now.standby_pid) if has_standby(directory) else None
        younger = [pid for pid in process.children_of(now.keeper_pid)
                   if since is not None and (process.process_start(pid) or 0) > since]
        found_one = younger[0] if len(younger) == 1 else 0
        return bool(found_one)

    wait_until(is_there, "a spare process", 30)
    return found_one


def test_without_a_standby_a_keeper_and_a_daemon_killed_at_once_end_the_device_and_stop_cleans_up(
    tmp_path: Path, base: Path
) -> None:
    zramfs("create", tmp_path / "z", "--size", "16M")
    before = state(tmp_path / "z")
    with stopped(before.pid):
        os.kill(before.keeper_pid, signal.SIGKILL)
        os.kill(before.pid, signal.SIGKILL)
    wait_until(lambda: not before.alive(), "the end")
    with pytest.raises(OSError) as caught:
        os.open(before.disk, os.O_RDONLY)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert "had died, and its data with it" in zramfs("stop", tmp_path / "z").stderr
    nothing_left(tmp_path / "z", base)


def test_a_device_is_stopped_all_the_same_when_its_daemon_is_killed_meanwhile(
    tmp_path: Path, base: Path
) -> None:
    for pause in (0.0, 0.05, 0.1, 0.2, 0.4):
        zramfs("create", tmp_path / "z", "--size", "16M", "--standby")
        place, keeper = found(tmp_path / "z"), state(tmp_path / "z").keeper_pid
        stopping = subprocess.Popen([*ZRAMFS, "stop", tmp_path / "z"], stderr=subprocess.PIPE)
        time.sleep(pause)
        with contextlib.suppress(OSError):
            for pid in serving_pids(place):
                os.kill(pid, signal.SIGKILL)
        stopping.communicate(timeout=60)
        # Whoever was killed in the midst of its end is not replaced, and else the keeper may be at it still.
        wait_until(lambda place=place: not place.path.exists()
                   or zramfs("stop", tmp_path / "z", check=False).returncode == 0, "it is stopped")
        wait_until(lambda keeper=keeper: not os.path.exists(f"/proc/{keeper}"), "the keeper has ended")
        nothing_left(tmp_path / "z", base)


def test_a_start_whose_daemon_is_killed_fails_and_leaves_nothing(tmp_path: Path, base: Path) -> None:
    for pause in (0.3, 0.4, 0.5, 0.6):
        words = [*ZRAMFS, "create", tmp_path / "z", "--size", "16M"]
        starting = subprocess.Popen(words, stderr=subprocess.PIPE)
        time.sleep(pause)
        for place in base.glob("*") if base.exists() else ():
            with contextlib.suppress(OSError):
                for pid in serving_pids(Rundir(place)):
                    os.kill(pid, signal.SIGKILL)
        starting.communicate(timeout=60)
        # Where it was killed before it had said anything, its keeper may be at the end still.
        wait_until(lambda: zramfs("stop", tmp_path / "z", check=False) and not any(base.glob("*")),
                   "it is stopped")
        nothing_left(tmp_path / "z", base)


def test_a_device_ends_by_its_unmount_and_by_a_signal_to_its_keeper(tmp_path: Path, base: Path) -> None:
    for way in ("unmount", "signal"):
        zramfs("create", tmp_path / "z", "--size", "16M", "--standby")
        before = state(tmp_path / "z")
        if way == "unmount":
            run("umount", tmp_path / "z")
        else:
            os.kill(before.keeper_pid, signal.SIGTERM)
        for pid in (before.pid, before.keeper_pid, before.standby_pid):
            wait_until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), f"{way}: the end of {pid}", 30)
        nothing_left(tmp_path / "z", base)


def test_the_memory_of_keeper_daemon_and_standby(tmp_path: Path) -> None:
    """Shared pages are counted once. As it is in the long run: the standby has forked its replacement."""
    with device(tmp_path / "z", 16 * MIB, "--standby") as z:
        spare, now = spare_pid(z.directory), state(z.directory)
        sizes = {name: pss(pid) for name, pid in (
            ("keeper", now.keeper_pid), ("daemon", now.pid), ("standby", now.standby_pid), ("spare", spare))}
        print(sizes)
        assert sizes["keeper"] <= MIB
        assert sum(sizes.values()) <= 45 * MIB, sizes
        # They wait, and have written to nothing that would not be in their way.
        own = [memory_of(pid, "Private_Dirty") for pid in (now.standby_pid, spare)]
        assert max(own) <= 2.25 * MIB, own


def pss(pid: int) -> int:
    return memory_of(pid, "Pss")


def memory_of(pid: int, kind: str) -> int:
    """Bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(rf"^{kind}: +(\d+) kB", text, re.MULTILINE)[1]) << 10

