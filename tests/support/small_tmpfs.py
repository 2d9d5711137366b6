# SPDX-License-Identifier: Apache-2.0
"""A tmpfs that is too small holds a pool's memory file, so that the system refuses pages for real."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support import native
from tests.support.apart import apart

ON_TMPFS = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
int memfd_create(const char *name, unsigned flags)
{
	return open(getenv("SMALL_TMPFS"), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
}
"""



def on_a_small_tmpfs(tmp_path: Path, script: str) -> list[int]:
    """The numbers that a script prints whose memory file lies in a tmpfs of 20 MiB."""
    source = tmp_path / "on_tmpfs.c"
    source.write_text(ON_TMPFS)
    library = native.compiled(source, tmp_path / "on_tmpfs.so", "-shared", "-fPIC")
    place = tmp_path / "small"
    place.mkdir()
    run = subprocess.run(
        apart("sh", "-c",
              'mount -t tmpfs -o size=20M small "$SMALL_TMPFS" && LD_PRELOAD="$LIBRARY" exec "$@"', "sh",
              sys.executable, "-c", script, Path(__file__).parents[2]),
        env={**os.environ, "SMALL_TMPFS": str(place), "LIBRARY": str(library)},
        capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL,
    )
    assert run.returncode != -signal.SIGBUS, "the kernel's refusal ended the process"
    assert run.returncode == 0, run.stderr
    return [int(word) for word in run.stdout.split()]
