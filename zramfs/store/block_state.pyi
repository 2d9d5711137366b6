# SPDX-License-Identifier: Apache-2.0
from .store import Store

def lines(store: Store, slot: int, room: int) -> tuple[bytes, int]: ...
