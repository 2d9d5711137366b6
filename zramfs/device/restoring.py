# SPDX-License-Identifier: Apache-2.0
"""A device that is filled from an image when it starts."""
from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zramfs.codecs.codec import Codec
from zramfs.errors import ZramfsError
from zramfs.image.reader import ImageReader
from zramfs.model.stats import RestoreStats
from zramfs.store import secondary
from zramfs.store.restoring import RestoreRun
from zramfs.text.sizes import PAGE, format_size

if TYPE_CHECKING:
    from zramfs.image.layout import SavedAlgorithm
    from zramfs.store.store import Store

log = logging.getLogger(__package__)

MOST_NAMED = 20  # ranges of lost pages in the log, each with a line


def restore_image(store: Store, path: Path, *, whole: bool) -> RestoreStats:
    """Fills a new store. whole: a damaged image is refused. Blocks; holds no lock.

    Raises ZramfsError: EINVAL for what is no image that this version reads, or one of a larger device; EIO
    for a damaged one if it has to be whole; ENOSPC when its pages do not fit into the device's memory.
    """
    with ImageReader(path) as image:
        if image.head.disksize > store.disksize:
            raise ZramfsError(
                errno.EINVAL, f"{path} has {format_size(image.head.disksize)}, and the device only "
                f"{format_size(store.disksize)}: expected a device at least as large")
        codecs = _codecs(image.head.algorithms)
        added = _take_dictionaries(store, codecs)
        run = _begin(store, image, codecs)
        try:
            lost = _fill(run, image)
        except OSError as error:
            raise ZramfsError(
                error.errno or errno.EIO, f"{path} cannot be restored: {error.strerror}") from None
        finally:
            run.finish()
        for priority in added:
            secondary.drop_secondary(store, priority)  # unless a page needs it
        stats = RestoreStats(
            str(path), image.head.created, run.pages, sum(last - first + 1 for first, last in lost),
            tuple(image.damage))
        if whole and (stats.lost or stats.damage):
            raise ZramfsError(
                errno.EIO, f"{path} is damaged ({_damage(stats, lost)}), and is left as it is: move it away "
                "to begin with an empty RAM disk, or look at what is left with `zramfs create --restore "
                "FILE DIR`")
        _report(stats, lost)
    return stats


def _take_dictionaries(store: Store, codecs: Sequence[Codec | None]) -> list[int]:
    """Secondary algorithms of the image with a dictionary that the device does not have, at priorities that
    are free: its pages stay as small as they are. Which priorities. ZramfsError(ENOMEM)."""
    have = {codec.dictionary for codec in store.codecs if codec}
    free = [priority for priority, codec in enumerate(store.codecs) if codec is None]
    added = []
    for codec in codecs[1:]:
        if codec and codec.dictionary and codec.dictionary not in have and free:
            try:
                secondary.set_secondary(store, free[0], codec)
            except MemoryError as error:
                raise ZramfsError(errno.ENOMEM, str(error)) from None
            have.add(codec.dictionary)
            added.append(free.pop(0))
    return added


def _begin(store: Store, image: ImageReader, codecs: Sequence[Codec | None]) -> RestoreRun:
    try:
        return RestoreRun(store, codecs, image.head.chunks)
    except ValueError as error:
        raise ZramfsError(errno.EINVAL, f"{image.path} cannot be restored: {error}") from None
    except MemoryError as error:
        raise ZramfsError(errno.ENOMEM, str(error)) from None


def _codecs(algorithms: Sequence[SavedAlgorithm | None]) -> list[Codec | None]:
    return [Codec(each.name, each.level, each.dictionary) if each else None for each in algorithms]


def _fill(run: RestoreRun, image: ImageReader) -> list[tuple[int, int]]:
    """The lost pages, first and last of each range."""
    for directory, data in image.parts():
        try:
            run.put(directory, data)
        except ValueError as error:
            image.damage.append(str(error))
    return run.lose_rest()


def _damage(stats: RestoreStats, lost: Sequence[tuple[int, int]]) -> str:
    named = ", ".join(_named(each) for each in lost[:3]) + (" ..." if len(lost) > 3 else "")
    pages = f"{stats.lost} of {stats.pages} pages are lost: {named}" if lost else "no page is lost"
    return "; ".join([*stats.damage[:3], pages])


def _named(pages: tuple[int, int]) -> str:
    first, last = pages
    return f"page {first}" if first == last else f"pages {first} to {last}"


def _report(stats: RestoreStats, lost: Sequence[tuple[int, int]]) -> None:
    log.info("%d pages restored from %s", stats.pages - stats.lost, stats.path)
    for sentence in stats.damage[:MOST_NAMED]:
        log.warning("%s: %s", stats.path, sentence)
    for each in lost[:MOST_NAMED]:
        log.warning("%s: lost: %s (bytes %d to %d); reading there is an I/O error until it is written",
                    stats.path, _named(each), each[0] * PAGE, each[1] * PAGE + PAGE - 1)
    if len(lost) > MOST_NAMED:
        log.warning("%s: and %d more ranges of lost pages", stats.path, len(lost) - MOST_NAMED)
