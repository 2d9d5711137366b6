# SPDX-License-Identifier: Apache-2.0
"""Statistics of a device: frozen, with units in the field comments."""
from __future__ import annotations

from dataclasses import dataclass, field

from zramfs.model.density import DEFAULT_SHARE
from zramfs.model.policy import Policy

# Requests are counted by what they do, in the order of the block layer's `stat` file, and by the time
# they take: up to each of these bounds in ns, and above the last one.
OPERATIONS = ("read", "write", "discard")
BUCKET_BOUNDS = tuple(1024 << i for i in range(25))


@dataclass(frozen=True, slots=True)
class Latency:
    """How long requests took. counts has one number more than BUCKET_BOUNDS."""

    counts: tuple[int, ...]
    ns: int  # of all together

    @property
    def count(self) -> int:
        return sum(self.counts)

    def __sub__(self, before: Latency) -> Latency:
        counts = (now - then for now, then in zip(self.counts, before.counts, strict=True))
        return Latency(tuple(counts), self.ns - before.ns)


NO_LATENCY = Latency((0,) * (len(BUCKET_BOUNDS) + 1), 0)


@dataclass(frozen=True, slots=True)
class LaneStats:
    """What a lane has done. The first 12 fields are those of the block layer's `stat` file (sectors
    of 512 bytes, ms), where in_flight counts requests being served, not those in the kernel's queue."""

    read_ios: int
    read_sectors: int
    read_ms: int
    write_ios: int
    write_sectors: int
    write_ms: int
    in_flight: int
    io_ms: int  # with at least one request being served
    queue_ms: int  # of all requests together
    discard_ios: int
    discard_sectors: int
    discard_ms: int
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
    refused_sizes: int  # truncations to more than the size of the device
    busy_truncations: int  # truncations to 0 that were refused because others had it open


@dataclass(frozen=True, slots=True)
class StoreStats:
    # the columns of the kernel's mm_stat, in its order
    orig_data_size: int  # bytes stored, same-filled pages included
    compr_data_size: int  # bytes of their objects, same-filled pages not
    mem_used_total: int  # bytes of pool pages
    mem_limit: int  # bytes, 0 = none
    mem_used_max: int  # bytes, peak of mem_used_total
    same_pages: int  # pages
    pages_compacted: int  # pool pages freed by object compaction since creation
    huge_pages: int  # pages stored raw, now
    huge_pages_since: int  # and since creation
    recompressed_pages: int  # single pages that a secondary algorithm has compressed, now
    recompressed_bytes: int  # of their objects; a part of compr_data_size
    # io_stat
    failed_reads: int  # pages
    failed_writes: int  # pages
    notify_free: int  # pages discarded or zeroed whole, stored or not
    # the arena under the pool
    resident: int  # bytes of pageblocks in use and in reserve
    pageblocks_in_use: int
    pageblocks_total: int
    bytes_returned: int  # given back to the OS since creation
    frames_used: int
    frames_free: int
    reserve: int  # bytes of resident pageblocks that wait for use
    reserve_target: int  # bytes, 0 = none are kept
    reserve_misses: int  # allocations that found the reserve empty: a write waited, up to 0.1 s
    corrupt: int  # locations that named no object: 0 in a sound pool
    written_back: int  # pages on the backing store, now
    units: int  # of several pages compressed as one, now
    unit_pages: int  # pages in them
    unit_dead: int  # places in them whose page was overwritten, discarded or used again
    unit_bytes: int  # of compressed data, dead places too; a part of compr_data_size
    units_unpacked: int  # times that a unit was unpacked for a read
    shared_pages: int  # pages with equal contents that share objects, now
    shared_objects: int  # those objects
    shared_bytes: int  # of them, in compressed data; a part of compr_data_size
    recoveries: int  # times that a process took the store over from one that was killed
    pages_lost: int  # by all of them: 0 unless the memory file was damaged


@dataclass(frozen=True, slots=True)
class RecoveryStats:
    """Of the adoption of a store that a killed process has left."""

    ns: int  # nanoseconds that it took
    pages: int  # stored, same-filled and written-back ones included
    objects: int
    locks: int  # pages that were in use at the kill
    lost: int  # pages that could not be saved: reading them is EIO until they are written again
    objects_freed: int  # of writes and moves that were not complete, or of pages that had just gone
    zspages_freed: int  # without an object
    zspages_damaged: int  # 0 unless the memory file was damaged
    frames_freed: int  # of 4 KiB, which no zspage had
    pageblocks_freed: int  # given back to the OS


EMPTY = StoreStats(*[0] * len(StoreStats.__slots__))


@dataclass(frozen=True, slots=True)
class BallastStats:
    """Of the memory that a server of swap holds to give it to a kernel that is stuck."""

    held: int = 0  # bytes
    target: int = 0  # bytes
    released: int = 0  # pieces of 2 MiB, given away so far


@dataclass(frozen=True, slots=True)
class GovernorStats:
    """Of what keeps the file system on a device within the pool's limit. Sizes in bytes."""

    state: str = "off"  # or "on", "braked" or "frozen"
    mountpoint: str = ""
    fstype: str = ""
    room: int | None = None  # what the pool may still take, below 0 past the limit; None = no limit
    reserve: int = 0  # what it may take beyond that
    over: int = 0  # what it has taken of the reserve
    ratio: float = 1.0  # by which the room is reckoned in blocks
    allowed: int | None = None  # free blocks that the users were left at the last look; None = all
    free: int = 0  # blocks in nobody's files, at the last look
    withheld: int = 0  # of these, out of the users' reach
    freezes: int = 0
    last_error: str | None = None


@dataclass(frozen=True, slots=True)
class RecompressionStats:
    """What recompression has done: pages, but for the bytes. tried = won + kept + no_room + busy."""

    tried: int = 0  # pages compressed with a secondary algorithm
    won: int = 0  # that became smaller
    bytes_saved: int = 0  # of compressed data, by them
    kept: int = 0  # that did not, and stay as they are
    incompressible: int = 0  # of those, marked so that they are not tried again
    no_room: int = 0  # for whose new object the pool had no memory
    busy: int = 0  # used while they were being compressed, and left alone
    cpu_ns: int = field(default=0, compare=False)

    def __add__(self, other: RecompressionStats) -> RecompressionStats:
        return RecompressionStats(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class UnitMakingStats:
    """What the making of units has done: groups of 16 pages, but for pages and bytes."""

    groups: int = 0  # looked at closely, because something may be won there
    made: int = 0  # that have a new unit
    pages: int = 0  # that joined one
    bytes_saved: int = 0  # of memory, by the size classes of the objects
    kept: int = 0  # for which nothing smaller was found
    dissolved: int = 0  # whose last page became a single page
    no_room: int = 0  # for whose new objects the pool had no memory
    busy: int = 0  # pages used while their unit was being made: they stayed single pages
    tried: int = 0  # pages of the groups that were looked at closely
    packed: int = 0  # of these, pages in the units that were made, or made single
    cpu_ns: int = field(default=0, compare=False)

    def __add__(self, other: UnitMakingStats) -> UnitMakingStats:
        return UnitMakingStats(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class BackUpkeepStats:
    """What the upkeep of units on the backing store has done, in pages."""

    units: int = 0  # worn ones, of which pages came back to memory
    pages: int = 0  # that did
    busy: int = 0  # used or discarded meanwhile
    failed: int = 0  # that could not be read
    no_room: int = 0  # times that a pass ended because the pool had no room
    cpu_ns: int = field(default=0, compare=False)

    def __add__(self, other: BackUpkeepStats) -> BackUpkeepStats:
        return BackUpkeepStats(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class SharingStats:
    """What the search for pages with equal contents has done, in pages, but for bytes."""

    looked: int = 0  # that were compared with others by their sums
    joined: int = 0  # that share an object now, and did not before, or another one
    made: int = 0  # objects that were made to be shared
    bytes_saved: int = 0  # of memory, by the size classes of the objects
    unequal: int = 0  # whose sum was another page's, but not their bytes, or whose partner had changed
    alone: int = 0  # that were the last of their object and got one of their own again
    no_room: int = 0  # for whose object the pool had no memory
    busy: int = 0  # used or discarded meanwhile: they stayed as they were
    table_bytes: int = 0  # that the table of sums may take at this moment
    cpu_ns: int = field(default=0, compare=False)

    def __add__(self, other: SharingStats) -> SharingStats:
        """The table is that of the later one."""
        sums = {name: getattr(self, name) + getattr(other, name)
                for name in self.__slots__ if name != "table_bytes"}
        return SharingStats(**sums, table_bytes=other.table_bytes)


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """A dictionary of the device's own, in use."""

    number: int  # the highest is the newest; 1 for the first that was taken, or after all were dropped
    priority: int  # of the secondary algorithm that uses it, 1 to 3
    level: int  # of zstd
    size: int  # bytes of the dictionary itself
    memory: int  # bytes that it costs in all: also its tables, and a workspace for each thread
    pages: int  # made with it, when they were last counted, as each round does
    won: int  # bytes that these pages take less than without it, by what it won on those that judged it


@dataclass(frozen=True, slots=True)
class DictionaryStats:
    """The dictionaries that a device has trained on its own pages."""

    generations: tuple[GenerationStats, ...] = ()  # oldest first
    trained: int = 0
    taken: int = 0
    rejected: int = 0  # would win less than twice what they cost
    dropped: int = 0  # that no page needed any more
    cpu_seconds: float = 0.0  # to sample, train and judge; recompression counts with the others
    verdict: str | None = None  # the last one, in words


@dataclass(frozen=True, slots=True)
class BackingStats:
    """Of a backing store, in blocks of 4 KiB, since it was opened."""

    blocks: int  # its size
    used: int  # that hold a page or a part of one, now
    stale: int  # free, but the file still holds their space, now
    reads: int
    writes: int
    read_errors: int  # reads that failed, or found something else than had been written
    write_errors: int  # writes that failed; their pages stayed in memory
    unit_left: int  # pages in units there that were overwritten or discarded; until its last one has gone, a
    # unit keeps its blocks


NO_BACKING = BackingStats(*[0] * len(BackingStats.__slots__))


@dataclass(frozen=True, slots=True)
class WritebackStats:
    """What write-back has done: runs, and pages."""

    runs: int = 0
    pages: int = 0  # written back
    passed: int = 0  # selected, and used before they were written: they stayed in memory
    failed: int = 0  # that stayed in memory because a write failed

    def __add__(self, other: WritebackStats) -> WritebackStats:
        return WritebackStats(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


DEFAULT_BATCH = 32  # as the kernel's


@dataclass(frozen=True)
class BackingSettings:
    """path None: there is none. limit: blocks of 4 KiB that may still be written, if limit_enable."""

    path: str | None = None
    limit: int = 0
    limit_enable: bool = False
    batch_size: int = DEFAULT_BATCH
    compressed: bool = False


FULLNESS_GROUPS = ("10%", "20%", "30%", "40%", "50%", "60%", "70%", "80%", "90%", "99%", "100%")


@dataclass(frozen=True, slots=True)
class CompactorStats:
    proactiveness: int  # 0 to 100
    threshold: float  # work starts when more than this share of the pageblocks could be won
    winnable: float  # share of the pageblocks in use that compaction could give back, now
    runs: int  # rounds of work that the task has begun
    slices: int
    ns: int  # nanoseconds spent in slices


@dataclass(frozen=True)
class SaveStats:
    """path, pages, taken, kept, lost, written: of the save that runs, or of the last one. kept: pages that
    were overwritten before their turn; lost: that could not be read. written: bytes. saved_at: seconds since
    1970 of the last one that succeeded."""

    is_running: bool = False
    path: str = ""
    pages: int = 0
    taken: int = 0
    kept: int = 0
    lost: int = 0
    written: int = 0
    saves: int = 0
    failures: int = 0
    last_error: str | None = None  # of the last one, None if it succeeded
    saved_at: int | None = None


@dataclass(frozen=True)
class RestoreStats:
    """The image that a device was filled from. created: seconds since 1970. lost: of its pages. damage: what
    of it was not as it was written."""

    path: str
    created: int
    pages: int
    lost: int
    damage: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskStats:
    """A task of the daemon beside the lane, which is started again when it fails."""

    name: str
    failures: int = 0
    last_error: str | None = None  # kind and text of the last failure


@dataclass(frozen=True)
class Progress:
    """pages: recompressed to a smaller size, or written back. bytes: saved, or written. tried: pages."""

    tried: int = 0
    pages: int = 0
    bytes: int = 0

    def __add__(self, other: Progress) -> Progress:
        return Progress(self.tried + other.tried, self.pages + other.pages, self.bytes + other.bytes)

    def __sub__(self, before: Progress) -> Progress:
        return Progress(self.tried - before.tried, self.pages - before.pages, self.bytes - before.bytes)


@dataclass(frozen=True)
class PolicyStats:
    """policy None: off. done: since the device was set up. today: bytes written in the last 24 hours."""

    kind: str
    policy: Policy | None = None
    rounds: int = 0
    done: Progress = Progress()
    today: int = 0
    last_error: str | None = None


@dataclass(frozen=True, slots=True)
class StepStats:
    """What a step of density has done since the device was set up. pages: that it looked at closely. bytes:
    saved. cpu_seconds: of the thread that did it."""

    rounds: int = 0
    pages: int = 0
    bytes: int = 0
    cpu_seconds: float = 0.0

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats(self.rounds + other.rounds, self.pages + other.pages, self.bytes + other.bytes,
                         self.cpu_seconds + other.cpu_seconds)

    def __sub__(self, before: StepStats) -> StepStats:
        return StepStats(self.rounds - before.rounds, self.pages - before.pages, self.bytes - before.bytes,
                         self.cpu_seconds - before.cpu_seconds)


DENSITY_STEPS = ("recompress", "dictionaries", "share", "units")  # in the order in which a round takes them


@dataclass(frozen=True, slots=True)
class DensityStats:
    """mode: off, auto or max. share: % of one core that auto may take. steps: by the names of DENSITY_STEPS.
    is_resting: nothing is due, and nothing will be until pages are written or grow old. lacks: what this
    device can't have, as a sentence; None if it has all. last_error: of the last pass of each step, None if
    they were right."""

    mode: str = "off"
    share: int = DEFAULT_SHARE
    steps: dict[str, StepStats] = field(default_factory=lambda: dict.fromkeys(DENSITY_STEPS, StepStats()))
    is_resting: bool = False
    lacks: str | None = None
    last_error: str | None = None
