# SPDX-License-Identifier: Apache-2.0
"""Python in a process where calls of the compiled core are counted, or fail or wait on demand."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.native import compiled
from tests.support.paths import SUPPORT, python_environment


def run(script: str, directory: Path, *arguments: str, source: str = "alloc_count.c") -> str:
    """Stdout of a script, whose sys.argv[1] is the preloaded library that is made of `source`."""
    if "san" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("a sanitizer has the heap's functions already")
    hook = compiled(
        SUPPORT / source, (directory / source).with_suffix(".so"), "-shared", "-fPIC", "-ldl")
    child = subprocess.run(
        [sys.executable, "-c", script, str(hook), *arguments],
        env={**python_environment(), "LD_PRELOAD": str(hook)},
        capture_output=True, text=True, timeout=60,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout
