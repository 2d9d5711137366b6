# SPDX-License-Identifier: Apache-2.0
"""The one size of the kernel's pages that zramfs works with."""
from __future__ import annotations

import errno
import os

from zramfs.errors import ZramfsError

PAGE = 4096


def other_pages() -> str | None:
    """What is wrong with the kernel's pages; None if nothing is. Kernels of arm64 and ppc64 may have pages of
    16 or 64 KiB: holes of 4 KiB could not be punched there, and a request of 256 pages is more than the lane
    reads at once."""
    size = os.sysconf("SC_PAGESIZE")
    if size == PAGE:
        return None
    return f"this kernel has pages of {size >> 10} KiB"


def expect_kernel_pages() -> None:
    """Raises ZramfsError(EOPNOTSUPP) on a kernel with other pages."""
    if found := other_pages():
        raise ZramfsError(
            errno.EOPNOTSUPP, f"{found}, and zramfs needs pages of 4 KiB: boot a kernel that has them")
