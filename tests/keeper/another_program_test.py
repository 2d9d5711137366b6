# SPDX-License-Identifier: Apache-2.0
"""The keeper becomes another program, and returns to the one before when the daemon of that does not hold."""
from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.support import native
from tests.support.child import kill_wholly, stopped
from tests.support.kept import Kept, alive, kept, own_ends, put_hand
from tests.support.paths import ROOT
from tests.support.whole import wait_until
from zramfs.keeper.client import PROGRAM


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A keeper at another path, as another version has."""
    return Path(shutil.copy(PROGRAM, tmp_path / "other-keeper"))


@pytest.mark.parametrize("standby", [True, False], ids=["standby", "alone"])
def test_the_keeper_becomes_another_program_with_all_that_it_has(
    tmp_path: Path, other: Path, standby: bool
) -> None:
    with kept(tmp_path, standby=standby, program=str(other), hang_ms=600) as keeper:
        server = keeper.wait_for("serving")
        before = keeper.wait_for_standby() if standby else 0
        for time_ in range(1, 4):
            os.kill(server, signal.SIGUSR2)
            keeper.wait_for("greeting", time_)
            assert keeper.events("greeting")[-1] == (server, keeper.pid)
            assert os.readlink(f"/proc/{keeper.pid}/exe") == str(other)
            if standby:
                wait_until(lambda old=before: not alive(old), "the end of the standby before")
                before = keeper.wait_for_standby(before)
            with keeper.page(server) as page:
                assert own_ends(page) == time_ - 1
            # SIGABRT: it is told the status, so it is still the parent.
            os.kill(server, signal.SIGABRT)
            dead = server
            server = keeper.wait_for("serving", time_ + 1)
            assert f"the daemon, process {dead}, was ended by signal 6" in keeper.log
            assert not standby or server == before
            if standby:
                before = keeper.wait_for_standby(server)
        with keeper.page(server) as page:  # it has the page, too
            put_hand(page, 3, unique=44)
            keeper.wait_for("serving", 5)
            put_hand(page, 3, unique=0)
        assert keeper.stop() == 7


@pytest.mark.parametrize("standby", [True, False], ids=["standby", "alone"])
@pytest.mark.parametrize("how", ["fails", "faults"])
def test_another_version_that_does_not_hold_is_followed_by_the_one_before(
    tmp_path: Path, other: Path, how: str, standby: bool
) -> None:
    with kept(tmp_path, standby=standby, program=str(other), other=how) as keeper:
        server = keeper.wait_for("serving")
        before = keeper.wait_for_standby() if standby else 0
        upgrade(keeper, server, other)
        if standby:
            keeper.wait_for_standby(before)
        os.kill(server, signal.SIGKILL)
        failed = keeper.wait_for("other")
        server = keeper.wait_for("serving", 3 if how == "faults" else 2)
        assert server != failed and len(keeper.events("other")) == 1, "the other one is not tried again"
        assert os.readlink(f"/proc/{keeper.pid}/exe") == str(PROGRAM)
        assert "this version does not hold: the one before takes over again" in keeper.log
        assert f"the daemon, process {failed}, " in keeper.log, "it is still told how that has ended"
        with keeper.page(server) as page:
            assert own_ends(page) == 1
        # From here on all is as if nothing had been tried.
        wait_until(lambda: not alive(failed), "the end of the other version")
        os.kill(server, signal.SIGKILL)
        keeper.wait_for("serving", 4 if how == "faults" else 3)
        assert keeper.stop() == 7 and len(keeper.events("other")) == 1


def test_another_version_that_the_one_before_could_not_follow_is_followed_by_its_own(
    tmp_path: Path, other: Path
) -> None:
    """It has written what that cannot read, and has said so."""
    with kept(tmp_path, standby=True, program=str(other), other="forgets") as keeper:
        server = keeper.wait_for("serving")
        before = keeper.wait_for_standby()
        upgrade(keeper, server, other)
        keeper.wait_for_standby(before)
        os.kill(server, signal.SIGKILL)
        keeper.wait_for("serving", 3)
        assert len(keeper.events("other")) == 2 and os.readlink(f"/proc/{keeper.pid}/exe") == str(other)
        assert keeper.stop() == 7


def test_another_version_that_hangs_before_it_serves_is_followed_by_the_one_before(tmp_path: Path) -> None:
    """The other keeper waits 3 s for it, where it is 2 minutes otherwise."""
    sources = ROOT / "zramfs/keeper"
    text = (sources / "keeper.c").read_text()
    assert text.count("START_MS = 120000,") == 1
    (tmp_path / "hasty.c").write_text(text.replace("START_MS = 120000,", "START_MS = 3000,"))
    other = native.compiled(tmp_path / "hasty.c", tmp_path / "other-keeper", "-D_GNU_SOURCE", f"-I{sources}")
    with kept(tmp_path, program=str(other), other="hangs") as keeper:
        server = keeper.wait_for("serving")
        upgrade(keeper, server, other)
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: len(keeper.events("serving")) == 2, "a daemon of the version before", 60)
        assert os.readlink(f"/proc/{keeper.pid}/exe") == str(PROGRAM)
        assert "has not served within 3 s, and is ended" in keeper.log
        assert keeper.stop() == 7


@pytest.mark.parametrize("how", ["fails", "faults"])
def test_a_standby_of_the_version_before_takes_over_when_its_files_are_gone(
    tmp_path: Path, other: Path, how: str
) -> None:
    """As after a package was upgraded. It was loaded before, and has waited beside the new version's."""
    with kept(tmp_path, standby=True, program=str(other), other=how) as keeper:
        server = keeper.wait_for("serving")
        before = keeper.wait_for_standby()
        (tmp_path / "gone").touch()
        upgrade(keeper, server, other)
        keeper.wait_for_standby(before)
        assert alive(before)
        os.kill(server, signal.SIGKILL)
        count = 3 if how == "faults" else 2
        assert keeper.wait_for("serving", count) == before
        (tmp_path / "gone").unlink()
        after = keeper.wait_for_standby(before)
        os.kill(before, signal.SIGKILL)
        assert keeper.wait_for("serving", count + 1) == after
        assert keeper.stop() == 7 and len(keeper.events("other")) == 1


def test_a_standby_of_the_version_before_ends_with_the_device(tmp_path: Path, other: Path) -> None:
    with kept(tmp_path, standby=True, program=str(other), other="works") as keeper:
        server = keeper.wait_for("serving")
        before = keeper.wait_for_standby()
        upgrade(keeper, server, other)
        keeper.wait_for_standby(before)
        os.kill(server, signal.SIGKILL)
        keeper.wait_for("serving", 2)
        assert alive(before) and keeper.stop() == 7
        wait_until(lambda: not alive(before), "it has ended with the device")


def test_of_two_standbys_that_are_orphaned_only_the_new_one_has_what_was_kept(
    tmp_path: Path, other: Path
) -> None:
    """Or both would take over from a daemon that dies as its keeper does."""
    with kept(tmp_path, standby=True, program=str(other), other="works") as keeper:
        server = keeper.wait_for("serving")
        before = keeper.wait_for_standby()
        upgrade(keeper, server, other)
        after = keeper.wait_for_standby(before)
        os.kill(keeper.pid, signal.SIGKILL)
        keeper.wait_for("unneeded", 2)
        assert set(keeper.events("unneeded")) == {(before, 0), (after, 3)}


def test_a_kill_from_outside_says_nothing_about_another_version_that_has_served(
    tmp_path: Path, other: Path
) -> None:
    with kept(tmp_path, program=str(other), other="works") as keeper:
        server = keeper.wait_for("serving")
        upgrade(keeper, server, other)
        for time_ in range(2, 5):
            os.kill(server, signal.SIGKILL)
            server = keeper.wait_for("serving", time_)
            assert keeper.events("other")[-1][0] == server
        assert os.readlink(f"/proc/{keeper.pid}/exe") == str(other)
        assert keeper.stop() == 7


def upgrade(keeper: Kept, server: int, other: Path) -> None:
    os.kill(server, signal.SIGUSR2)
    keeper.wait_for("greeting")
    assert os.readlink(f"/proc/{keeper.pid}/exe") == str(other)


@pytest.mark.parametrize("program", ["/nowhere", "/", "no-program"])
def test_a_keeper_that_cannot_become_another_program_goes_on(tmp_path: Path, program: str) -> None:
    (tmp_path / "no-program").write_text("text")
    (tmp_path / "no-program").chmod(0o755)
    with kept(tmp_path, standby=True, program=str(tmp_path / program)) as keeper:
        server = keeper.wait_for("serving")
        before = keeper.wait_for_standby()
        os.kill(server, signal.SIGUSR2)
        keeper.wait_for("refused")
        assert keeper.events("refused")[0][1] in (errno.ENOENT, errno.EACCES, errno.ENOEXEC)
        assert "another program cannot be run in place of this keeper" in keeper.log
        after = keeper.wait_for_standby(before)
        os.kill(server, signal.SIGKILL)
        assert keeper.wait_for("serving", 2) == after


def test_a_keeper_whose_daemon_has_ended_stays_the_program_that_it_is(tmp_path: Path, other: Path) -> None:
    with kept(tmp_path, program=str(other)) as keeper:
        server = keeper.wait_for("serving")
        with stopped(keeper.pid):
            os.kill(server, signal.SIGUSR2)
            keeper.wait_for("ordered")
            kill_wholly(server)
        keeper.wait_for("serving", 2)
        assert os.readlink(f"/proc/{keeper.pid}/exe") == str(PROGRAM)
