# SPDX-License-Identifier: Apache-2.0
"""Programs of the system: losetup, mkfs, mount, swapon and the like."""
from __future__ import annotations

import subprocess


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, without input. What it said and how it ended is for the caller to judge."""
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
