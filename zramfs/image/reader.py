# SPDX-License-Identifier: Apache-2.0
"""Reads an image, which may be cut off, damaged, or made by an enemy."""
from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import safe_paths
from zramfs.text.sizes import PAGE

from . import layout
from .layout import Head


class ImageReader:
    """An open image. head: the first that is whole. damage: sentences about what is not as it was written,
    which grow while the parts are read.

    Raises ZramfsError: EINVAL for what is no image that this version reads, with the reason; ENOENT and what
    else open(2) says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damage: list[str] = []
        self._fd = _open(path)
        try:
            self._size = os.fstat(self._fd).st_size
            self._end = self._size  # of the parts
            self.head, self._begin = self._find_head()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, offset: int, length: int) -> bytes:
        """Fewer bytes at the end of the file. Raises OSError."""
        pieces = []
        while length > 0 and (piece := os.pread(self._fd, length, offset)):
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return b"".join(pieces)

    def _find_head(self) -> tuple[Head, int]:
        """The head, and where the parts begin."""
        end = max(0, self._size // PAGE * PAGE - PAGE)
        trailer = layout.unpack_trailer(self._read(end, PAGE))
        if trailer is None or self._size % PAGE or not PAGE <= trailer[1] <= end:
            self.damage.append("its end is missing")
            trailer = None
        else:
            self._end = trailer[1]
        try:
            head, begin = self._head_at(0)
        except ValueError as error:
            if trailer is None:
                raise self._refused(str(error)) from None
            with contextlib.suppress(ValueError):
                head, length = self._head_at(trailer[1])
                if head.id == trailer[0]:
                    self.damage.append(str(error))
                    return head, min(length - trailer[1], self._end)
            raise self._refused(str(error)) from None
        if trailer is not None and trailer[0] != head.id:
            self.damage.append("its end is that of another image")
            self._end = self._size
        return head, begin

    def _refused(self, why: str) -> ZramfsError:
        return ZramfsError(errno.EINVAL, f"{self.path} cannot be restored: {why}")

    def _head_at(self, offset: int) -> tuple[Head, int]:
        """A whole head, and where it ends. Raises ValueError."""
        header = layout.unpack_header(self._read(offset, PAGE))
        at = offset + PAGE
        end = at + layout.padded(header.algorithms_length) + layout.padded(header.chunks_length)
        if end > self._size:
            raise ValueError("its header is longer than the file")
        algorithms = self._read(at, header.algorithms_length)
        at += layout.padded(header.algorithms_length)
        chunks = self._read(at, header.chunks_length)
        if layout.checksum(header.id, algorithms) != header.algorithms_sum:
            raise ValueError("the list of its algorithms is damaged")
        if layout.checksum(header.id, chunks) != header.chunks_sum:
            raise ValueError("the list of its pages is damaged")
        return Head(header.id, header.disksize, header.pages, header.created,
                    layout.unpack_algorithms(algorithms), chunks, header.writer), end

    def parts(self) -> Iterator[tuple[bytes, bytes]]:
        """Directory and data of each part that is whole. What is between them goes into damage. Raises
        OSError."""
        number, at, lost_from = self.head.id, self._begin, -1
        while at < self._end:
            header = self._header_at(at)
            if header is None:
                lost_from = at if lost_from < 0 else lost_from
                at = self._next_data(at + PAGE)
                continue
            self._note_gap(lost_from, at)
            lost_from = -1
            body = self._bytes_or_none(at + layout.PART_HEADER, 8 * header.count + header.data_length)
            directory, data = (body or b"")[:8 * header.count], (body or b"")[8 * header.count:]
            if body is not None and layout.checksum(number, body) == header.sum:
                yield directory, data
                at += header.length
            else:
                # Its length may not be trusted.
                self.damage.append(f"part {header.index} with {header.count} pages, at byte {at}, is damaged")
                at = self._next_header(at + PAGE)
        self._note_gap(lost_from, at)

    def _bytes_or_none(self, offset: int, length: int) -> bytes | None:
        """None where the file ends before, or the disk does not give it."""
        try:
            found = self._read(offset, length)
        except OSError as error:
            self.damage.append(f"{length} bytes at {offset} cannot be read: {error.strerror}")
            return None
        return found if len(found) == length else None

    def _header_at(self, offset: int) -> layout.PartHeader | None:
        with contextlib.suppress(OSError):
            return layout.unpack_part_header(self._read(offset, layout.PART_HEADER), self.head.id)
        return None

    def _next_header(self, at: int) -> int:
        while at < self._end and self._header_at(at) is None:
            at = self._next_data(at + PAGE)
        return at

    def _next_data(self, at: int) -> int:
        """Where the next header can be: behind a hole, which may be as long as an enemy likes."""
        try:
            return os.lseek(self._fd, at, os.SEEK_DATA) // PAGE * PAGE if at < self._end else at
        except OSError as error:
            return self._end if error.errno == errno.ENXIO else at

    def _note_gap(self, begin: int, end: int) -> None:
        if begin >= 0:
            self.damage.append(f"bytes {begin} to {min(end, self._size) - 1} are damaged")


def _open(path: Path) -> int:
    try:
        # A FIFO is opened without waiting, and then refused.
        fd = safe_paths.open_path(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except ZramfsError:
        raise
    except OSError as error:
        raise ZramfsError(error.errno or errno.EIO, f"{path} cannot be restored: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ZramfsError(errno.EINVAL, f"{path} cannot be restored: it is not a regular file")
    return fd
