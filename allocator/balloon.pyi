# SPDX-License-Identifier: Apache-2.0
from typing import Self

from typing_extensions import disjoint_base

from .arena import Arena
from .stats import BalloonStats

@disjoint_base
class Balloon:
    """Takes frames out of an arena so that the host has their memory, and gives them back.

    Any thread may call it, and the arena's users go on meanwhile. In an arena that was recovered it begins
    with the frames and the target that the last balloon had. Raises ValueError for an arena that has a
    balloon already: it takes one at a time.
    """

    @property
    def arena(self) -> Arena: ...
    @property
    def target(self) -> int:
        """Pages that the balloon shall hold."""

    def __new__(cls, arena: Arena) -> Self: ...

    def set_target(self, pages: int) -> None:
        """The number of pages of 4096 bytes that the balloon shall hold; adjust() works towards it. Raises
        ValueError for more than the arena has."""

    def adjust(self, most: int, room: int | None = None) -> int:
        """One step of at most `most` pages towards the target. room: how many frames it may take at most,
        None = no such bound. The number of pages by which the balloon grew; negative if it shrank."""

    def stats(self) -> BalloonStats:
        """BalloonStats of this moment."""
