# SPDX-License-Identifier: Apache-2.0
"""The size of a device: the room that its store is made with, and what a change of size is."""
from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any

from zramfs.errors import ZramfsError
from zramfs.model.config import MAX_DISKSIZE
from zramfs.store.resize import resize, room_to_grow
from zramfs.store.store import MAX_PAGEBLOCKS, SPARE_PAGEBLOCKS, Store
from zramfs.text.sizes import format_size

if TYPE_CHECKING:
    from zramfs.lane.lane import Lane

log = logging.getLogger(__package__)

# A device can become so many times as large as it was made, and in any case so large. Room costs address
# space alone, eight times as much: half a TiB of the 128 TiB of a process for the least.
GROWTH = 16
LEAST_ROOM = 64 << 30
PAGEBLOCK = 2 << 20


def room_for(size: int) -> int:
    """Bytes that a device of `size` bytes may grow to."""
    return min(max(size * GROWTH, LEAST_ROOM), MAX_DISKSIZE)


def most_memory(store: Store) -> int:
    """Bytes that the pool of a device of this size can ever have, its room to grow left out: what a balloon
    can keep from it."""
    blocks = -(-8 * store.disksize // PAGEBLOCK) + SPARE_PAGEBLOCKS
    return min(blocks, MAX_PAGEBLOCKS) * PAGEBLOCK


def make_store(size: int, *, reserve: int, **arguments: Any) -> Store:
    """With room to grow where the system gives the address space (`ulimit -v`, `ulimit -f`). A device with a
    reserve has all tables resident, and keeps its size. Raises what Store raises."""
    if not reserve:
        try:
            return Store(size, grows_to=room_for(size), **arguments)
        except MemoryError:
            log.info("no address space for room to grow, so this device keeps its size")
    return Store(size, reserve=reserve, **arguments)


def change_size(store: Store, lane: Lane, size: int, *, discard: bool) -> None:
    """Gives the device `size` bytes, rounded up to 2 MiB, and tells the kernel. discard: pages behind the end
    are dropped.

    Raises ZramfsError, with the device as it was: EINVAL for a size outside 1 to its room, ENOTEMPTY for
    pages behind the end, ENOMEM.
    """
    before = store.disksize
    most = room_to_grow(store)
    if not 1 <= size <= most:
        raise ZramfsError(
            errno.EINVAL,
            f"expected a size of 1 to {most} bytes ({format_size(most)}, what this device was made with room "
            f"for), got {size}")
    try:
        after = resize(store, size, discard=discard)
    except MemoryError as error:
        raise ZramfsError(errno.ENOMEM, str(error)) from None
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise ZramfsError(
            errno.ENOTEMPTY, f"{error.strerror}: discard them first, or write resize={size} discard, which "
            "drops them") from None
    if after == before:
        return
    try:
        lane.notify_resize(after > before)
    except OSError as error:
        # Its attributes end by themselves after a second.
        log.warning("the kernel learns of the new size a little later: %s", error)
