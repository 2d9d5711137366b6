# SPDX-License-Identifier: Apache-2.0
"""Calls that may never return: how long they are waited for."""
from __future__ import annotations

import errno
import os
import select
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from zramfs.errors import ZramfsError
from zramfs.host import bounded


def test_a_call_that_does_not_return_is_given_up() -> None:
    read_end, write_end = os.pipe()
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        bounded.call(lambda: os.read(read_end, 1).decode(), 0.25)
    assert time.monotonic() - began >= 0.25
    os.close(read_end)
    os.close(write_end)


def test_a_machine_that_stands_still_is_no_call_that_does_not_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a minute in the first wait of 20 seconds, in which nobody else could do anything either."""
    read_end, write_end = os.pipe()
    stalls = [0.0]

    def wait(fds: list[int], _w: object, _x: object, seconds: float) -> tuple[list[int], ...]:
        if not stalls[0]:
            stalls[0] = 60.0
            return [], [], []
        os.write(write_end, b"x")
        return select.select(fds, [], [], seconds)

    monkeypatch.setattr(bounded, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + stalls[0]))
    monkeypatch.setattr(bounded, "select", SimpleNamespace(select=wait))
    assert bounded.call(lambda: os.read(read_end, 1).decode(), 20.0) == "x"
    os.close(read_end)
    os.close(write_end)


def test_an_answer_that_is_there_is_taken_after_the_time_is_up() -> None:
    call = bounded.Call(lambda: "answer")
    while not select.select([call.fileno()], [], [], 60)[0]:
        pass
    assert call.result(time.monotonic() - 5) == "answer"


def alone() -> None:
    """Returns when the other actions of this child have answered."""
    while threading.active_count() > 1:
        time.sleep(0.001)


def test_of_actions_in_one_child_each_has_its_own_outcome() -> None:
    """One that never returns, and one that fails, keep no other answer back."""
    read_end, write_end = os.pipe()

    def hang() -> None:
        alone()
        os.write(write_end, b"x")
        signal.pause()

    def fail() -> None:
        raise FileNotFoundError(errno.ENOENT, "gone", "/there")

    call = bounded.Call(hang, lambda: "answer", fail)
    assert os.read(read_end, 1) == b"x"
    late, answer, failed = call.outcomes(time.monotonic())
    assert isinstance(late, TimeoutError) and answer == "answer"
    assert isinstance(failed, FileNotFoundError) and failed.filename == "/there"
    os.close(read_end)
    os.close(write_end)


def test_a_child_that_dies_leaves_the_answers_that_it_gave() -> None:
    def die() -> None:
        alone()
        os.kill(os.getpid(), signal.SIGKILL)

    died, answer = bounded.Call(die, lambda: "x" * 300_000).outcomes()
    assert isinstance(died, ZramfsError) and "without a result" in str(died)
    assert answer == "x" * 300_000
