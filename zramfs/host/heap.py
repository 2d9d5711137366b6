# SPDX-License-Identifier: Apache-2.0
"""The heap of this process: large blocks go back to the system when they are freed."""
from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
# The default of glibc at the start of a process. From the first freed block on it raises its threshold to the
# size of that block, up to 32 MiB, and later ones come from the heaps. Those keep what is freed, because
# their memory is locked (safety.py): after a run of zstd 9 that was 1.2 MiB, and after the training of a
# dictionary 3 MiB. Setting the threshold ends its rise.
_LARGE = 128 << 10


def give_large_blocks_back() -> None:
    """Blocks of 128 KiB and more get a mapping of their own from here on, which ends when they are freed.
    musl does so by itself."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
