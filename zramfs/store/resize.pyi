# SPDX-License-Identifier: Apache-2.0
from typing import Final

from .store import Store

# Bytes: a size that is changed becomes a multiple of it.
STEP: Final[int]

def resize(store: Store, disksize: int, *, discard: bool = False) -> int: ...
def room_to_grow(store: Store) -> int: ...
