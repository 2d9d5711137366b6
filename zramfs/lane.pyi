# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

from .stats import Latency
from .store import Store

@dataclass(frozen=True, slots=True)
class LaneStats:
    """What a lane has done. The first 14 fields are those of the block layer's `stat` file (sectors
    of 512 bytes, ms), where in_flight counts requests in hand, not those in the kernel's queue."""

    read_ios: int
    read_sectors: int
    read_ms: int
    write_ios: int
    write_sectors: int
    write_ms: int
    in_flight: int
    io_ms: int  # with at least one request in hand
    queue_ms: int  # of all requests together
    discard_ios: int
    discard_sectors: int
    discard_ms: int
    flush_ios: int
    flush_ms: int
    protocol_errors: int  # requests that did not hold together
    longest_us: int  # the longest request
    reply_errors: int  # replies that the kernel refused for an unexpected reason
    unlocked_bytes: int  # of the threads' memory, that could not be locked
    helped_pieces: int  # of 32 KiB, of large requests, done by another thread than the request's
    protocol_minor: int  # FUSE 7.N agreed on with the kernel, 0 before its INIT
    can_resend: bool  # the kernel can send unanswered requests again (Linux 6.9)
    latency: tuple[Latency, ...]  # of each of OPERATIONS, from taking a request up to its reply
    put_off: int  # requests that waited for the backing store in a slow thread
    waited: int  # and in a thread of the lane, because too many were put off

class Lane:
    threads: int
    def __init__(self, fd: int, *, threads: int = 2, poll_us: int = 0) -> None: ...
    def start(self) -> None: ...
    def join(self, timeout: float | None = None) -> bool: ...
    def abort(self) -> None: ...
    def set_store(self, store: Store | None) -> None: ...
    def claim(self) -> bool: ...
    def release_claim(self) -> None: ...
    def notify_size(self) -> None: ...
    def stats(self) -> LaneStats: ...
    @property
    def alive(self) -> bool: ...
    @property
    def open_count(self) -> int: ...
    @property
    def done_fd(self) -> int: ...
    @property
    def error(self) -> str | None: ...
