# SPDX-License-Identifier: Apache-2.0
"""Limits of this process that a device cannot live with."""
from __future__ import annotations

import contextlib
import errno
import resource

from zramfs.errors import ZramfsError


def lift_file_size() -> None:
    """Takes the limit on the size of files away (ulimit -f): the pool is a memory file, sparse, and many
    times as long as the memory that it takes. Raises ZramfsError(EFBIG) where it cannot be taken away."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return
    for limits in ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), (hard, hard)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            break
    left, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if left != resource.RLIM_INFINITY:
        raise ZramfsError(
            errno.EFBIG,
            f"files may have at most {left} bytes here (ulimit -f), and a device keeps its data in a memory "
            "file that is longer: expected `ulimit -f unlimited`")
