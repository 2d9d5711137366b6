#!/usr/bin/python3 -I
# SPDX-License-Identifier: Apache-2.0
"""The command zramfs of the Debian package: its libraries stand beside nobody else's."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib/zramfs"))

from zramfs.__main__ import run  # noqa: E402

run()
