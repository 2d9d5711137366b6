# SPDX-License-Identifier: Apache-2.0
"""Saves and restores of a store without a device around it."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zramfs.codecs.codec import Codec
from zramfs.image.layout import Head, SavedAlgorithm
from zramfs.image.reader import ImageReader
from zramfs.image.writer import ImageWriter
from zramfs.store.restoring import RestoreRun
from zramfs.store.saving import SaveRun
from zramfs.store.store import Store

SLICE = 200_000  # ns: short, so that much happens between two
ID = bytes(range(16))


def head_of(store: Store, run: SaveRun) -> Head:
    algorithms = tuple(c and SavedAlgorithm(c.algo, c.level, c.dictionary) for c in store.codecs)
    return Head(ID, run.disksize, run.pages, 1_700_000_000, algorithms, run.chunks(), "test")


@contextmanager
def saving(store: Store, path: Path) -> Iterator[Callable[[], SaveRun]]:
    """The instant is the entry. What is given does the rest, and can be called once; then `path` is there."""
    run, writer = SaveRun(store), ImageWriter(path)

    def rest() -> SaveRun:
        while run.scan(SLICE):
            pass
        writer.head(head_of(store, run))
        while not run.done:
            if run.fill(SLICE):
                writer.part(*run.take())
        writer.commit()
        return run

    try:
        run.start()
        yield rest
    finally:
        run.finish()
        writer.close()


def save(store: Store, path: Path) -> None:
    with saving(store, path) as rest:
        rest()


def restored(path: Path, **how: object) -> tuple[Store, list[tuple[int, int]], list[str]]:
    """A store made of an image, its lost pages, and what of the image was damaged."""
    with ImageReader(path) as image:
        store = Store(image.head.disksize, **how)
        try:
            algorithms = image.head.algorithms
            codecs = [each and Codec(each.name, each.level, each.dictionary) for each in algorithms]
            run = RestoreRun(store, codecs, image.head.chunks)
            try:
                for directory, data in image.parts():
                    try:
                        run.put(directory, data)
                    except ValueError as error:
                        image.damage.append(str(error))
                lost = run.lose_rest()
            finally:
                run.finish()
            store.check(3 if not lost else 2)
        except BaseException:
            store.close()
            raise
    return store, lost, image.damage


def content(path: Path, **how: object) -> bytes:
    """Of a device that is made of an image without damage."""
    store, lost, damage = restored(path, **how)
    try:
        assert (lost, damage) == ([], [])
        return store.read(0, store.disksize)
    finally:
        store.close()


def readable(store: Store) -> dict[int, bytes]:
    """The pages that can be read, by number."""
    found = {}
    for page in range(store.disksize // 4096):
        try:
            found[page] = store.read(page * 4096, 4096)
        except OSError as error:
            assert os.strerror(error.errno or 0) == "Input/output error"
    return found


def is_written_in(place: Path) -> bool:
    """Whether a process writes an image in this directory, and has begun."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link).startswith(f"{place}/#") and os.stat(link).st_size:
                return True
    return False
