# SPDX-License-Identifier: Apache-2.0
"""When `zramfs stop` does not even begin to bring pages back: whole machines, small ones, in files."""
from __future__ import annotations

import errno
from pathlib import Path

import pytest

from zramfs.errors import ZramfsError
from zramfs.host import memcg, swaps
from zramfs.host.swaps import SwapArea
from zramfs.lifecycle import swap

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that sets what is available of the memory, in MiB, and the swap areas, as (path, size,
    used). No memory cgroup has a limit."""
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(swap, "MEMINFO", meminfo)
    monkeypatch.setattr(memcg, "hierarchy", lambda: None)

    def have(available: int, *areas: tuple[str, int, int]) -> None:
        meminfo.write_text(f"MemTotal: 999999 kB\nMemFree: 1 kB\nMemAvailable: {available << 10} kB\n")
        found = [SwapArea(path, size * MIB, used * MIB, 0) for path, size, used in areas]
        monkeypatch.setattr(swaps, "swap_areas", lambda: found)

    return have


@pytest.mark.parametrize(("available", "areas"), [
    (100, [("/dev/loop0", 500, 100)]),
    (50, [("/dev/loop0", 500, 100), ("/dev/sda2", 100, 50)]),
    (0, [("/dev/loop0", 500, 0)]),
    (0, [("/dev/sda2", 500, 500)]),
])
def test_what_fits(machine, available: int, areas: list[tuple[str, int, int]]) -> None:
    machine(available, *areas)
    swap.expect_room("/dev/loop0")


@pytest.mark.parametrize(("available", "areas", "missing"), [
    (99, [("/dev/loop0", 500, 100)], "only 99M of memory are available and 0B of other swap free"),
    (49, [("/dev/loop0", 500, 100), ("/dev/sda2", 100, 50)],
     "only 49M of memory are available and 50M of other swap free"),
])
def test_what_does_not(machine, available: int, areas: list[tuple[str, int, int]], missing: str) -> None:
    machine(available, *areas)
    with pytest.raises(ZramfsError) as caught:
        swap.expect_room("/dev/loop0")
    assert caught.value.errno == errno.ENOMEM
    assert str(caught.value) == (
        f"100M are in swap on /dev/loop0, and {missing}, so nothing was changed; stop some programs, add "
        "other swap, or take --force, which may end programs for want of memory")


@pytest.mark.parametrize(("available", "used", "made"), [(400, 100, True), (399, 100, False), (0, 0, True)])
def test_the_daemon_makes_the_call_itself_only_where_memory_is_ample(
    machine, monkeypatch: pytest.MonkeyPatch, available: int, used: int, made: bool
) -> None:
    """The kernel kills first whoever is in swapoff(2), and this process has the pages."""
    machine(available, ("/dev/loop0", 500, used))
    calls = []
    monkeypatch.setattr(swap.system_calls, "end_swap", calls.append)

    def no_process(command: list[str]) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(swap, "run", no_process)
    if made:
        swap.off("/dev/loop0")
    else:
        # No ZramfsError, which would be a refusal: this is worth another try.
        with pytest.raises(OSError, match="memory is too short to do without it"):
            swap.off("/dev/loop0")
    assert calls == ["/dev/loop0"] * made
