# SPDX-License-Identifier: Apache-2.0
"""A kernel whose pages are not of 4 KiB: one sentence, and nothing is made."""
from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from zramfs.daemon.daemon import serve_device
from zramfs.doctor.checks import _kernel
from zramfs.errors import ZramfsError
from zramfs.host.machine import Machine
from zramfs.lane.lane import Lane
from zramfs.model.config import DeviceConfig
from zramfs.store.store import Store


@pytest.fixture(params=[16, 64])
def sentence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    sysconf = os.sysconf
    size = request.param << 10
    monkeypatch.setattr(os, "sysconf", lambda name: size if name == "SC_PAGESIZE" else sysconf(name))
    return (f"this kernel has pages of {request.param} KiB, and zramfs needs pages of 4 KiB: "
            "boot a kernel that has them")


def test_neither_a_lane_nor_a_store_nor_a_daemon_is_made(sentence: str, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    config = DeviceConfig(directory=tmp_path / "tree", rundir=tmp_path, name="z")
    for make in (lambda: Lane(-1), lambda: Store(1 << 20), lambda: serve_device(config, lambda: None)):
        with pytest.raises(ZramfsError) as caught:
            make()
        assert (caught.value.errno, str(caught.value)) == (errno.EOPNOTSUPP, sentence)
    assert list(tmp_path.iterdir()) == [tmp_path / "tree"]


def test_doctor_says_so(sentence: str) -> None:
    state, found, advice = _kernel(Machine())
    assert state == "missing" and "pages of" in found and advice == "a kernel with pages of 4 KiB"


def test_this_kernel_is_right() -> None:
    assert _kernel(Machine())[0] != "missing"
