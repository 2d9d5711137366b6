# SPDX-License-Identifier: Apache-2.0
"""One FUSE mount of the daemon: the lane's on `disk`, or the tree's on its directory.

It is told from whatever else is mounted at its path, before or after it, and taken down in steps: five
tries, then it is cut off from its users, who are named in the log.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from zramfs.host import fusermount, in_use, mounts
from zramfs.host.work_thread import run_in_thread

log = logging.getLogger(__package__)

# A reader that has just been answered needs a moment to close its file.
UNMOUNT_TRIES = 5
UNMOUNT_PAUSE = 0.1  # seconds


class OwnMount:
    """device: its name, for the log. failed: True once something could not be undone in order."""

    def __init__(self, device: str, path: Path, options: dict[str, str | bool]) -> None:
        self.path = path
        self.failed = False
        self._device = device
        self._options = options
        self._found: mounts.Mount | None = None

    async def mount(self) -> int:
        """Returns the descriptor of /dev/fuse. Raises MountError."""
        fd = await run_in_thread(partial(fusermount.mount_file, self.path, options=self._options))
        self._found = mounts.mount_at(self.path)
        return fd

    def adopt(self, found: Sequence[int | str] | None) -> None:
        """What a predecessor has mounted: kept() of its OwnMount, or, if that is gone, what looks like ours
        at the path, since the predecessor may have died just after a mount. It may be nothing."""
        top = mounts.mount_at(self.path)
        self._found = next((each for each in self._own() if found and [each.id, each.dev] == list(found)),
                           top if top in self._own() else None)

    def _own(self) -> list[mounts.Mount]:
        """What bears the name of ours. The kernel gives both numbers of a mount that is gone to the next one,
        which is another device's."""
        name = (self._options["fsname"], f"fuse.{self._options['subtype']}")
        return [each for each in mounts.mounts() if (each.source, each.fstype) == name]

    def kept(self) -> tuple[int, str] | None:
        """What names the mount, for adopt() in another process."""
        return (self._found.id, self._found.dev) if self._found else None

    def place(self) -> Path | None:
        """Where ours is, since somebody may have renamed a directory on the way to it; None if it is gone, or
        something else is mounted over it."""
        found = self._in_table()
        return found.mountpoint if found and mounts.mount_at(found.mountpoint) == found else None

    def _in_table(self) -> mounts.Mount | None:
        ours = self._found
        return next(
            (each for each in self._own() if ours and (each.id, each.dev) == (ours.id, ours.dev)), None)

    def is_there(self) -> bool:
        """Whether what is mounted there is ours, and not what it stood on, or came after it."""
        return self.place() is not None

    def is_covered(self) -> bool:
        """Whether ours is there below somebody else's mount, which keeps it where it is."""
        return not self.is_there() and self._in_table() is not None

    async def detach(self) -> None:
        """Takes it out of the directories; users keep what they have open. Raises OSError."""
        await run_in_thread(partial(fusermount.unmount, self.place() or self.path, lazy=True))

    async def take_down(self) -> bool:
        """True if it was in use, and could only be detached from the directories. Raises no OSError."""
        for _ in range(UNMOUNT_TRIES):
            place = self.place()
            if place is None:
                self._report_cover()
                return False
            try:
                await run_in_thread(partial(fusermount.unmount, place))
                return False
            except OSError as error:
                reason = error
            await trio.sleep(UNMOUNT_PAUSE)
        self.failed = True
        users = await run_in_thread(partial(in_use.users_of, [place or self.path]))
        log.warning(
            "%s: %s could not be unmounted (%s); it is cut off from its users, who get I/O errors from here "
            "on: %s",
            self._device, place, reason, "; ".join(users) or "nobody that is to be seen from here",
        )
        try:
            await self.detach()
        except OSError as error:
            log.error("%s: %s could not even be detached: %s", self._device, self.path, error)
        return True

    def _report_cover(self) -> None:
        if self.is_covered():
            self.failed = True
            over = mounts.mount_at(self.path)
            log.warning(
                "%s: %s stays mounted, because %s is mounted over it; umount that, then this",
                self._device, self.path, over.fstype if over else "something",
            )
