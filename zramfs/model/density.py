# SPDX-License-Identifier: Apache-2.0
"""How readily a device becomes denser by itself, as the command line, configuration and control write it.
device/density.py does what it says."""
from __future__ import annotations

import re
from dataclasses import dataclass

from zramfs.text.kernel_numbers import printable

MODES = ("off", "auto", "max")
DEFAULT_SHARE = 5  # % of one core
EXPECTED = "off, auto, auto share=1% to share=100%, or max"


@dataclass(frozen=True, slots=True)
class Density:
    """mode: one of MODES. share: % of one core that `auto` may take; `max` takes what it needs."""

    mode: str = "off"
    share: int = DEFAULT_SHARE

    def __str__(self) -> str:
        with_share = self.mode == "auto" and self.share != DEFAULT_SHARE
        return f"{self.mode} share={self.share}%" if with_share else self.mode


OFF, AUTO = Density("off"), Density("auto")


def parse_density(text: str) -> Density:
    """ValueError with a sentence."""
    match = re.fullmatch(r"(off|auto|max)|auto\s+share=([1-9][0-9]?|100)%?", text)
    if match is None:
        raise ValueError(f"expected {EXPECTED}; got {printable(text.encode())}")
    return Density(match[1]) if match[1] else Density("auto", int(match[2]))
