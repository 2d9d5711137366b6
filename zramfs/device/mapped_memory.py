# SPDX-License-Identifier: Apache-2.0
"""The memory file of a device in a process that waits to take it over: mapped, with page tables for what is
stored, so that recovery has no page faults. It reads nothing, and changes nothing."""
from __future__ import annotations

import contextlib

from allocator.arena import Arena
from zramfs.store.record import is_kept


class MappedMemory:
    def __init__(self) -> None:
        self._arena: Arena | None = None

    def look(self, memory: int) -> None:
        """To be called again and again, since more is stored meanwhile. Without effect where no memory is
        left for page tables, or another process makes the file anew."""
        with contextlib.suppress(ValueError, MemoryError, OSError):
            if self._arena is not None and not self._arena.current:
                self.drop()
            if self._arena is None and is_kept(memory):
                self._arena = Arena.adopt(memory)
            if self._arena is not None:
                self._arena.map_resident()

    def take(self, memory: int) -> Arena | int:
        """What Store.adopt() takes. It belongs to the caller."""
        arena, self._arena = self._arena, None
        if arena is not None and not arena.current:
            arena.leave()
            return memory
        return memory if arena is None else arena

    def drop(self) -> None:
        arena, self._arena = self._arena, None
        if arena is not None:
            arena.leave()
