# SPDX-License-Identifier: Apache-2.0
"""How readily a device becomes denser by itself, as the command line, configuration and control write it.
device/density.py does what it says."""
from __future__ import annotations

import re
from dataclasses import dataclass

from zramfs.text.kernel_numbers import printable

DEFAULT_SHARE = 5  # % of one core
MODES = ("off", "auto", "max")
LEVELS = {"auto": 3, "max": 9}  # of zstd, for units, and for single pages if nobody has chosen an algorithm
EXPECTED = "off, max, auto, or auto with the share of a core that it may take, auto:1% to auto:100%"


@dataclass(frozen=True, slots=True)
class Density:
    """mode: one of MODES. share: % of one core that `auto` may take. `max` takes what it needs."""

    mode: str = "off"
    share: int = DEFAULT_SHARE

    def __str__(self) -> str:
        has_share = self.mode == "auto" and self.share != DEFAULT_SHARE
        return f"{self.mode}:{self.share}%" if has_share else self.mode


OFF, AUTO = Density("off"), Density("auto")
# By the kind of device. A plain one stays comparable to zram.
DEFAULTS = {"device": OFF, "ramdisk": AUTO, "swap": AUTO}


def parse_density(text: str) -> Density:
    """ValueError with a sentence. A share may be written without its %, which means something else in a unit
    of systemd."""
    match = re.fullmatch(r"(off|auto|max)|auto:([1-9][0-9]?|100)%?", text)
    if match is None:
        raise ValueError(f"expected {EXPECTED}; got {printable(text.encode())}")
    return Density(match[1]) if match[1] else Density("auto", int(match[2]))
