# SPDX-License-Identifier: Apache-2.0
"""A daemon without a device, for tests of the keeper: it says in a file what happens to it.

    python -m tests.support.fake_daemon DIR        becomes a keeper and the first daemon
    python -m tests.support.fake_daemon DIR next   is started by the keeper

DIR has plan.json: standby, survives (bits of SERVING), hang_ms, never (the first one does not serve), program
(that the keeper is to become upon SIGUSR2), threads (of the first daemon, more of them), ends (these do,
after a second), holds (a file that it has open). While there is a file DIR/fails, no successor serves; a
number in it says how many do not. While there is DIR/stuck, none that is started gets ready. DIR/fails_late
is for one of them, which has a standby by then. With `other` in the plan, the program has daemons of another
version, which note it, and of which each one that takes over ends ("fails"), hangs ("hangs"), or ends by a
fault of its own when it has served ("faults"); or the first one does that, and has said that there is no way
back ("forgets"); or none does ("works"). While there is a file DIR/gone, none
of the first version starts.
Each event is a line in DIR/events: its name, the pid, and a number. SIGTERM ends it in order, with status 7.
"""
from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from pathlib import Path

from tests.support.child import live_for_a_test
from zramfs.keeper.client import GREETING, NOT_UPGRADED, PROGRAM, Keeper, Place, fork_standby

PAGE_BYTES = 69632
KEPT_TEXT = b"what is kept"


class FakeDaemon:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.plan = json.loads((place / "plan.json").read_text())
        self.command = [sys.executable, "-m", "tests.support.fake_daemon", str(place), "next"]
        self.is_other = sys.argv[3:] == ["other"]
        self.kept: list[int] = []

    def note(self, event: str, number: int = 0) -> None:
        fd = os.open(self.place / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(fd, f"{event} {os.getpid()} {number}\n".encode())
        os.close(fd)

    def first(self) -> None:
        keeper = Keeper.fork(self.place, self.command, self.plan.get("hang_ms", 30_000))
        live_for_a_test()
        self.note("keeper", keeper.pid)
        page = os.memfd_create("page")
        os.ftruncate(page, PAGE_BYTES)
        text = os.memfd_create("text")
        os.write(text, KEPT_TEXT)
        null = os.open("/dev/null", os.O_RDWR)
        self.kept = [null, page, text]
        self.stand_by(keeper)
        keeper.keep(self.kept)
        if "holds" in self.plan:
            os.open(self.plan["holds"], os.O_RDONLY)
        for _ in range(self.plan.get("threads", 0)):
            pause = 1.0 if self.plan.get("ends") else None
            threading.Thread(target=threading.Event().wait, args=(pause,), daemon=True).start()
        if not self.plan.get("never"):
            self.serve(keeper)

    def stand_by(self, keeper: Keeper) -> None:
        if self.plan.get("standby") and (place := fork_standby(keeper)):
            self.succeed(place)

    def succeed(self, place: Place) -> None:
        self.note("waiting")
        turn = place.wait_turn()
        if turn is None:
            self.note("unneeded", len(place.orphaned()[0]))
            os._exit(0)
        self.kept, keeper = turn
        assert os.pread(self.kept[2], 100, 0) == KEPT_TEXT
        if self.is_other:
            self.note("other")
            if self.plan["other"] == "forgets":
                keeper.forget_way_back()
            if self.plan["other"] == "hangs":
                signal.pause()
            if self.plan["other"] == "fails":
                os._exit(3)
        if self.is_to_fail():
            self.note("failing")
            os._exit(3)
        self.stand_by(keeper)
        if (self.place / "fails_late").exists():
            (self.place / "fails_late").unlink()
            self.note("failing")
            os._exit(3)
        self.serve(keeper)
        os._exit(0)

    def order_upgrade(self, keeper: Keeper) -> None:
        if "other" in self.plan:
            keeper.upgrade(Path(self.plan["program"]), [*self.command, "other"], (PROGRAM, self.command))
        else:
            keeper.upgrade(Path(self.plan["program"]), self.command)

    def faults_once(self) -> bool:
        file = self.place / "faulted"
        is_first = self.plan["other"] == "forgets" and not file.exists()
        file.touch()
        return is_first

    def is_to_fail(self) -> bool:
        file = self.place / "fails"
        if not file.exists():
            return False
        if (left := file.read_text()) == "1":
            file.unlink()
        elif left:
            file.write_text(str(int(left) - 1))
        return True

    def serve(self, keeper: Keeper) -> None:
        awake, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGUSR1, lambda *_: self.note("stacks"))
        signal.signal(signal.SIGUSR2, lambda *_: None)
        keeper.serving(survives=self.plan.get("survives", True), standby=self.plan.get("standby", False))
        self.note("serving", self.kept[1])
        if self.is_other and (self.plan["other"] == "faults" or self.faults_once()):
            os.kill(os.getpid(), signal.SIGSEGV)
        while True:
            ready = select.select([keeper, awake], [], [])[0]
            if awake in ready:
                number = os.read(awake, 1)[0]
                if number == signal.SIGTERM:
                    keeper.ending()
                    self.note("ending")
                    os._exit(7)
                if number == signal.SIGUSR2:
                    self.order_upgrade(keeper)
                    self.note("ordered")
            if keeper not in ready:
                continue
            heard = keeper.hear()
            if heard is not None and heard[0] in (GREETING, NOT_UPGRADED):
                self.note("greeting" if heard[0] == GREETING else "refused", heard[1])
            elif heard is None:
                keeper.close()
                keeper = Keeper.start(self.place, self.command, self.plan.get("hang_ms", 30_000))
                self.note("new-keeper", keeper.pid)
                keeper.keep(self.kept)
                keeper.serving(survives=True, standby=self.plan.get("standby", False))
            else:
                self.note("standby", keeper.standby_pid)


def main() -> None:
    daemon = FakeDaemon(Path(sys.argv[1]))
    if sys.argv[2:3] == ["next"]:
        if (daemon.place / "gone").exists() and not daemon.is_other:
            os._exit(3)
        while (daemon.place / "stuck").exists():
            daemon.note("stuck")
            signal.pause()
        daemon.succeed(Place.of_keeper())
    else:
        daemon.first()


if __name__ == "__main__":
    main()
