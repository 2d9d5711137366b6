# SPDX-License-Identifier: Apache-2.0
"""How much a test does where more of the same only makes it surer: rounds, kills, bytes, drawn examples.

The whole of it is done in CI and by `scripts/test --full`, and otherwise a part, so that a run of every test
takes minutes. A test must be able to fail in both.
"""
from __future__ import annotations

import os

ENVIRONMENT = "ZRAMFS_TEST_FULL"


def is_full() -> bool:
    """conftest.py sets the variable for --full. It is read when a test file is loaded, too."""
    return os.environ.get("CI") == "true" or ENVIRONMENT in os.environ


def scaled(whole: int, part: int) -> int:
    return whole if is_full() else part
