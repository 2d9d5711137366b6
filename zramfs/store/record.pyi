# SPDX-License-Identifier: Apache-2.0
from typing import Final

LAYOUTS: Final[dict[str, int]]

def is_kept(fd: int) -> bool: ...
