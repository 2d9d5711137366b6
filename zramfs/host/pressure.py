# SPDX-License-Identifier: Apache-2.0
"""How short the machine's memory is."""
from __future__ import annotations

import re
from pathlib import Path


def memory_stall(file: Path = Path("/proc/pressure/memory")) -> float:
    """Share of the last ten seconds in which some task waited for memory, in %; 0 where the kernel does not
    say (CONFIG_PSI, psi=1)."""
    try:
        match = re.search(r"^some avg10=([0-9.]{1,16})", file.read_text(), re.MULTILINE)
        return float(match[1]) if match else 0.0
    except (OSError, ValueError):
        return 0.0


def available_share(meminfo: Path = Path("/proc/meminfo")) -> float:
    """MemAvailable as a share of MemTotal, 0 to 1; 0 where that is not said."""
    try:
        text = meminfo.read_text()
    except (OSError, ValueError):
        return 0.0
    found = dict(re.findall(r"^(MemTotal|MemAvailable): +([0-9]{1,16}) kB$", text, re.MULTILINE))
    total = int(found.get("MemTotal", 0))
    return int(found.get("MemAvailable", 0)) / total if total else 0.0
