# SPDX-License-Identifier: Apache-2.0
"""Where the checkout is, and how a Python process that a test starts finds it and the tests."""
from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"


def python_path() -> str:
    """For PYTHONPATH: the modules of this process, wherever the child stands."""
    return os.pathsep.join(path for path in sys.path if path)


def python_environment() -> dict[str, str]:
    """For a Python process that imports what this one would import."""
    return {**os.environ, "PYTHONPATH": python_path()}
