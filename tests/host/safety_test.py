# SPDX-License-Identifier: Apache-2.0
"""What a server does to itself before it serves: needed for swap, as far as it can be had for the others."""
from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from zramfs.errors import ZramfsError
from zramfs.host import memcg, safety


def setting(
    name: str, refusal: str | None = None, *, needed: bool = False, note: str | None = None,
    others: str | None = None, warns: bool = False, done: list[str] | None = None,
) -> safety.Setting:
    def apply() -> tuple[str | None, str | None]:
        if done is not None:
            done.append(name)
        return refusal, note

    return safety.Setting(name, needed, f"{name} is lost", lambda: refusal, apply, others, warns)


@pytest.fixture(autouse=True)
def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memcg, "hierarchy", lambda: None)
    monkeypatch.setattr(safety.threading, "stack_size", lambda _: None)


def test_swap_has_all_settings_and_the_others_those_that_mean_something_for_them(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    listed = (setting("a", needed=True, done=done), setting("b", others="b", done=done, note="b is done"))
    monkeypatch.setattr(safety, "SETTINGS", listed)
    assert safety.enter("swap") == ["b is done"] and done == ["a", "b"]
    for kind in ("ramdisk", "device"):
        done.clear()
        assert safety.enter(kind) == ["b is done"] and done == ["b"]


def test_what_is_refused_ends_swap_warns_others_or_stands_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    listed = (setting("a", "no right", needed=True, others="a hurts", warns=True),
              setting("b", "no right", others="b hurts"))
    monkeypatch.setattr(safety, "SETTINGS", listed)
    assert safety.enter("device") == ["without a (no right): a hurts"]
    assert "without b (no right): b hurts" in caplog.text
    with pytest.raises(ZramfsError, match="swap would not be safe here.*a: no right; without it a is lost"):
        safety.enter("swap")
    notes = safety.enter("swap", force=True)
    assert len(notes) == 2 and "forced to go on" in notes[0] and "without b" in notes[1]


def test_memory_that_is_to_be_locked_and_can_not_be_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety, "SETTINGS", ())
    monkeypatch.setattr(safety, "_probe_lock", lambda: "no right")
    with pytest.raises(ZramfsError, match="the memory can't be locked.*no right"):
        safety.enter("device", lock=True)
    assert safety.enter("device") == []
    assert safety.lock_private() == "no right"


_LOCK = """
import mmap, sys
from zramfs.host import safety
shared = mmap.mmap(-1, 8 << 20)  # as the memory file with the data
shared[:] = bytes(8 << 20)
def locked():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmLck")).split()[1])
def of_shared():
    found = 0
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0]:
            is_shared = words[1][3] == "s"
        elif words[0] == "Locked:" and is_shared:
            found += int(words[1])
    return found
print(LOCK or "done", locked() > 4096, of_shared() >= 8192)
"""


@pytest.mark.requires("root")
@pytest.mark.parametrize(("lock", "expected"), [
    ("safety.lock_private()", "done True False"), ("safety._lock_all()", "done True True"),
])
def test_private_memory_is_locked_and_that_of_the_data_only_where_it_is_asked_for(
    lock: str, expected: str
) -> None:
    code = _LOCK.replace("LOCK", lock)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == expected
