# SPDX-License-Identifier: Apache-2.0
"""Daemons that fail before they are ready, seen by the command that has started them."""
from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.whole import run
from zramfs.errors import ZramfsError
from zramfs.host import detach

pytestmark = pytest.mark.requires("root")


def _fails_and_ends_late(on_ready: Callable[[], None]) -> int:
    if os.fork() == 0:  # as a keeper, which ends after its daemon
        time.sleep(0.3)
        os._exit(0)
    raise OSError(errno.ENOSPC, "no room")


def test_a_failed_start_is_told_when_the_file_system_of_its_log_is_free(tmp_path: Path) -> None:
    run("mount", "-t", "tmpfs", "none", tmp_path)
    try:
        with pytest.raises(ZramfsError, match="^no room$") as caught:
            detach.run(_fails_and_ends_late, tmp_path / "log")
        assert caught.value.errno == errno.ENOSPC
    finally:
        run("umount", tmp_path)
