# SPDX-License-Identifier: Apache-2.0
"""The keeper alone, with daemons that serve nothing (tests/support/fake_daemon.py)."""
from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.child import stopped
from tests.support.kept import alive, kept, own_ends, put_hand
from tests.support.whole import wait_until
from zramfs.host import locks
from zramfs.host.process import children_of
from zramfs.keeper.client import PROGRAM

MIB = 1 << 20


def test_the_keeper_starts_another_daemon_as_often_as_one_dies(tmp_path: Path) -> None:
    with kept(tmp_path) as keeper:
        for time_ in range(1, 8):
            server = keeper.wait_for("serving", time_)
            os.kill(server, (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)[time_ % 3])
        keeper.wait_for("serving", 8)
        assert len({pid for pid, _ in keeper.events("serving")}) == 8
        assert f"the daemon, process {server}, was ended by signal" in keeper.log
        assert keeper.stop() == 7, "the keeper ends as its daemon does"
        assert len(keeper.events("ending")) == 1 and len(keeper.events("serving")) == 8


def test_a_standby_takes_over_and_another_one_is_there_at_once(tmp_path: Path) -> None:
    with kept(tmp_path, standby=True) as keeper:
        server = keeper.wait_for("serving")
        for time_ in range(2, 7):
            standby = keeper.wait_for_standby(server)
            os.kill(server, signal.SIGKILL)
            server = keeper.wait_for("serving", time_)
            assert server == standby
        assert keeper.stop() == 7
        wait_until(lambda: not alive(keeper.wait_for_standby()), "the standby has ended with the device")


def test_a_standby_that_dies_is_replaced(tmp_path: Path) -> None:
    with kept(tmp_path, standby=True) as keeper:
        server = keeper.wait_for("serving")
        standby = keeper.wait_for_standby()
        os.kill(standby, signal.SIGKILL)
        other = keeper.wait_for_standby(standby)
        os.kill(server, signal.SIGKILL)
        assert keeper.wait_for("serving", 2) == other


def test_a_standby_that_never_becomes_ready_is_ended_and_replaced(tmp_path: Path) -> None:
    with kept(tmp_path, standby=True, hang_ms=1000) as keeper:
        server = keeper.wait_for("serving")
        standby = keeper.wait_for_standby()
        (tmp_path / "stuck").touch()
        os.kill(standby, signal.SIGKILL)
        stuck = keeper.wait_for("stuck")
        (tmp_path / "stuck").unlink()
        wait_until(lambda: keeper.events("standby")[-1][1] not in (0, standby), "another standby", 60)
        other = keeper.events("standby")[-1][1]
        assert other != stuck
        assert keeper.log.count(f"the standby, process {stuck}, has not become ready, and is ended") == 1
        os.kill(server, signal.SIGKILL)
        assert keeper.wait_for("serving", 2) == other


def test_a_daemon_and_its_standby_killed_at_once_are_replaced(tmp_path: Path) -> None:
    with kept(tmp_path, standby=True) as keeper:
        server, standby = keeper.wait_for("serving"), keeper.wait_for_standby()
        with stopped(keeper.pid):
            os.kill(standby, signal.SIGKILL)
            os.kill(server, signal.SIGKILL)
        assert keeper.wait_for("serving", 2) != server
        assert len(keeper.events("serving")) == 2


def test_a_daemon_that_dies_before_it_serves_is_replaced_by_its_own_standby(tmp_path: Path) -> None:
    with kept(tmp_path, standby=True) as keeper:
        server = keeper.wait_for("serving")
        keeper.wait_for_standby()
        (tmp_path / "fails_late").touch()
        os.kill(server, signal.SIGKILL)
        keeper.wait_for("failing")
        keeper.wait_for("serving", 2)


def test_five_deaths_without_serving_end_the_device_with_a_sentence(tmp_path: Path) -> None:
    """The pauses between them are a sixth of hang_ms, and longer each time: files may be replaced then."""
    with kept(tmp_path, hang_ms=1200) as keeper:
        server = keeper.wait_for("serving")
        (tmp_path / "fails").touch()
        began = time.monotonic()
        os.kill(server, signal.SIGKILL)
        assert keeper.wait() == 3
        assert time.monotonic() - began > 1.2
        assert len(keeper.events("failing")) == 5
        assert "ended 5 times within a minute without serving: the device is given up" in keeper.log


def test_four_deaths_without_serving_do_not(tmp_path: Path) -> None:
    with kept(tmp_path, hang_ms=600) as keeper:
        server = keeper.wait_for("serving")
        (tmp_path / "fails").write_text("4")
        os.kill(server, signal.SIGKILL)
        keeper.wait_for("serving", 2)
        assert len(keeper.events("failing")) == 4


def test_nobody_takes_over_from_a_daemon_that_has_never_served(tmp_path: Path) -> None:
    with kept(tmp_path, never=True) as keeper:
        assert keeper.wait() == 0
        assert not keeper.events("serving")


def test_what_cannot_be_taken_over_ends_with_its_daemon(tmp_path: Path) -> None:
    with kept(tmp_path, survives=False) as keeper:
        os.kill(keeper.wait_for("serving"), signal.SIGKILL)
        assert keeper.wait() == 128 + signal.SIGKILL
        assert "nothing can take over from it: the device is gone" in keeper.log


def test_a_daemon_killed_after_it_said_that_it_ends_is_not_replaced(tmp_path: Path) -> None:
    """With the keeper stopped, both reach it at once: what the daemon has said counts."""
    with kept(tmp_path) as keeper:
        server = keeper.wait_for("serving")
        with stopped(keeper.pid):
            os.kill(server, signal.SIGTERM)
            keeper.wait_for("ending")
        assert keeper.wait() == 7
        assert len(keeper.events("serving")) == 1


def test_a_stop_signal_during_a_takeover_reaches_the_next_daemon(tmp_path: Path) -> None:
    with kept(tmp_path) as keeper:
        server = keeper.wait_for("serving")
        with stopped(keeper.pid):
            os.kill(server, signal.SIGKILL)
            keeper.process.terminate()
        assert keeper.wait() == 7
        assert len(keeper.events("serving")) == 2 and len(keeper.events("ending")) == 1


def test_a_daemon_whose_keeper_dies_starts_another_one_which_works_as_well(tmp_path: Path) -> None:
    with kept(tmp_path, standby=True) as keeper:
        server = keeper.wait_for("serving")
        for time_ in range(1, 4):
            pid = keeper.pid if time_ == 1 else keeper.events("new-keeper")[-1][1]
            os.kill(pid, signal.SIGKILL)
            keeper.wait_for("new-keeper", time_)
        keeper.wait_for("unneeded")  # the old keeper's standby
        last = keeper.events("new-keeper")[-1][1]
        # The ones between may have had a standby, too.
        wait_until(lambda: keeper.events("standby")[-1][1] in children_of(last), "a standby")
        standby = keeper.events("standby")[-1][1]
        os.kill(server, signal.SIGKILL)
        assert keeper.wait_for("serving", 2) == standby
        assert tmp_path.exists() and last in locks.holders(tmp_path)
        os.kill(last, signal.SIGTERM)
        wait_until(lambda: len(keeper.events("ending")) == 1 and not alive(last), "the end in order")


def test_a_request_in_hand_for_too_long_ends_the_daemon_with_its_stacks(tmp_path: Path) -> None:
    with kept(tmp_path, hang_ms=1200) as keeper:
        for time_ in range(1, 11):
            server = keeper.wait_for("serving", time_)
            with keeper.page(server) as page:
                put_hand(page, 3, unique=44)
                began = time.monotonic()
                keeper.wait_for("serving", time_ + 1)
                put_hand(page, 3, unique=0)
            assert time.monotonic() - began > 1
            assert "has worked on one request for" in keeper.log
            # It has 200 ms to write them, which a busy machine may need for others.
            if (server, 0) in keeper.events("stacks"):
                return
        pytest.fail("none of ten daemons has written its stacks")


@pytest.mark.parametrize("harmless", ["waits", "changes", "moves"])
def test_a_request_that_waits_or_moves_on_and_one_after_another_are_no_hang(
    tmp_path: Path, harmless: str
) -> None:
    for attempt in range(20):
        place = tmp_path / str(attempt)
        place.mkdir()
        with kept(place, hang_ms=300) as keeper:
            server = keeper.wait_for("serving")
            longest, last = 0.0, time.monotonic()
            with keeper.page(server) as page:
                for number in range(2, 103):
                    put_hand(page, 0, unique=number if harmless == "changes" else 44,
                             waits=harmless == "waits", steps=number if harmless == "moves" else 0)
                    longest, last = max(longest, time.monotonic() - last), time.monotonic()
                    time.sleep(0.01)
                put_hand(page, 0, unique=0)
                longest = max(longest, time.monotonic() - last)
            if not keeper.events("stacks") and len(keeper.events("serving")) == 1:
                return
        # It did hang: a busy machine has let this process wait.
        assert harmless != "waits" and longest > 0.15, longest
    pytest.fail("this process has had to wait again and again")


def test_a_daemon_that_is_stopped_does_not_hang(tmp_path: Path) -> None:
    with kept(tmp_path, hang_ms=300) as keeper:
        server = keeper.wait_for("serving")
        with keeper.page(server) as page, stopped(server):
            put_hand(page, 0, unique=44)
            time.sleep(1)
            # Before it goes on: this process may not run for longer than a hang takes here.
            put_hand(page, 0, unique=0)
        time.sleep(0.5)
        assert not keeper.events("stacks") and len(keeper.events("serving")) == 1


def test_ends_by_the_daemons_own_fault_are_counted_and_a_kill_from_outside_is_none(tmp_path: Path) -> None:
    with kept(tmp_path, hang_ms=2000) as keeper:
        own = 0
        ends = (signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT, None, signal.SIGKILL)
        for time_, number in enumerate(ends, 1):
            server = keeper.wait_for("serving", time_)
            with keeper.page(server) as page:
                assert own_ends(page) == own
                if number is None:
                    put_hand(page, 67, unique=46)  # it hangs
                else:
                    os.kill(server, number)
                own += number != signal.SIGKILL
                keeper.wait_for("serving", time_ + 1)
                put_hand(page, 67, unique=0)


def test_the_keeper_is_locked_takes_less_than_a_mebibyte_and_grows_by_nothing(tmp_path: Path) -> None:
    with kept(tmp_path, standby=True) as keeper:
        server = keeper.wait_for("serving")
        wait_until(lambda: keeper.events("standby"), "a standby")
        before = memory(keeper.pid)
        for time_ in range(2, 8):
            os.kill(server, signal.SIGKILL)
            server = keeper.wait_for("serving", time_)
            keeper.wait_for_standby(server)
        after = memory(keeper.pid)
        assert after["VmRSS"] <= MIB and after["VmRSS"] == before["VmRSS"]
        assert after["VmData"] == before["VmData"]
        if os.geteuid() == 0:
            assert after["VmLck"] > 0 and after["VmSwap"] == 0


def test_the_keeper_says_what_it_expects_when_it_is_called_by_hand() -> None:
    done = subprocess.run([PROGRAM], capture_output=True, text=True)
    assert done.returncode == 2 and "expected SOCKET PID RUNDIR HANG_MS COMMAND" in done.stderr


def memory(pid: int) -> dict[str, int]:
    """Bytes, by the names of /proc/PID/status."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) << 10 for words in lines if words[-1] == "kB"}
