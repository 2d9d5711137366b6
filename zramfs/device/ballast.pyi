# SPDX-License-Identifier: Apache-2.0
import os

from zramfs.lane.lane import Lane
from zramfs.model.stats import BallastStats

class Ballast:
    """Holds 8 MiB for a lane, resident and locked as far as this process may, until close().

    zoneinfo: the kernel's account of memory. Raises OSError if it cannot be read, or for want of memory,
    descriptors or a thread. The ballast is full when the constructor returns.
    """

    def __init__(self, lane: Lane, zoneinfo: str | os.PathLike[str] = "/proc/zoneinfo") -> None: ...
    @property
    def stats(self) -> BallastStats: ...
    def close(self) -> None:
        """Ends the thread, and gives all back."""
