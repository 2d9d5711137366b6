# SPDX-License-Identifier: Apache-2.0
"""A save takes its instant while the file systems on the device are frozen, and not after that."""
from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.box import MIB, PAGE, Box
from tests.support.images import content
from tests.support.page_kinds import noise
from zramfs.device import saving
from zramfs.device.freeze import ThawedError
from zramfs.errors import ZramfsError
from zramfs.host.mounts import Mount


def thaw_early(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Has that many freezes end before their time. An item of the list for each freeze."""
    freezes: list[int] = []

    @asynccontextmanager
    async def frozen(places: list[Mount]) -> AsyncIterator[None]:
        freezes.append(len(places))
        yield
        if len(freezes) <= times:
            raise ThawedError(errno.ETIMEDOUT, "/mnt/fs was thawed")

    monkeypatch.setattr(saving, "mounted_on", lambda disk: [])
    monkeypatch.setattr(saving, "frozen", frozen)
    return freezes


async def filled() -> Box:
    box = await Box(size=MIB).start()
    for number in range(MIB // PAGE):
        box.store.write(number * PAGE, noise(number))
    return box


async def test_a_file_system_that_was_thawed_before_the_instant_is_frozen_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await filled()
    freezes = thaw_early(monkeypatch, saving.INSTANTS - 1)
    await box.device.command(f"save={tmp_path / 'image'}")
    assert len(freezes) == saving.INSTANTS
    assert content(tmp_path / "image") == box.store.read(0, MIB)
    box.store.check(3)
    await box.device.close()


async def test_one_that_is_always_thawed_fails_the_save_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await filled()
    with monkeypatch.context() as patch:
        freezes = thaw_early(patch, 1 << 20)
        with pytest.raises(ZramfsError, match="/mnt/fs was thawed") as caught:
            await box.device.command(f"save={tmp_path / 'image'}")
        assert caught.value.errno == errno.ETIMEDOUT and len(freezes) == saving.INSTANTS
        assert list(tmp_path.iterdir()) == []
    thaw_early(monkeypatch, 0)
    await box.device.command(f"save={tmp_path / 'image'}")
    assert content(tmp_path / "image") == box.store.read(0, MIB)
    await box.device.close()
