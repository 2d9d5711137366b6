# SPDX-License-Identifier: Apache-2.0
"""What a device is started with. Plain values, decided by the command line or the configuration."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .density import OFF, Density
from .policy import Policy

ALGORITHMS = ("lz4", "lz4hc", "zstd", "none")
SECONDARY = ALGORITHMS[:-1]  # those that recompression may use
DEFAULT_ALGO = "lz4"
NAME_LIMIT = 128  # as in the kernel: the name of an algorithm is shorter
# 2^36 pages, in bytes: their slot table alone would fill 512 GiB of memory.
MAX_DISKSIZE = 1 << 48
RESIZE_STEP = 2 << 20  # bytes: what a size that is changed is rounded up to a multiple of
DEFAULT_THREADS = 2
# What a machine of 351 MB needed beside the rest; with none it hung (see docs/operations.md).
DEFAULT_RESERVE = 16 << 20
# More threads than this never helped on one connection, and each keeps buffers of 1 MiB.
MAX_THREADS = 64
NOWHERE = Path()  # a device that was described and has no place yet
DEFAULT_PROACTIVENESS = 20  # as vm.compaction_proactiveness


@dataclass(frozen=True)
class Algorithm:
    """level None = the algorithm's own default; dictionary: a file under an absolute path."""

    name: str
    level: int | None = None
    dictionary: Path | None = None


@dataclass(frozen=True)
class DeviceConfig:
    """One device, as the command line, a mount option or a configuration file asks for it. Paths are absolute
    and resolved; sizes are bytes.

    directory    where the tree (control, zram/, ...) is mounted
    rundir       private directory with `disk` (regular file the lane is mounted on), state.json, log
    size         of the device, rounded up to 4096 by the store; 0 = not set up yet
    algorithms   by priority: the first compresses what is written, up to three more recompress
    access_times whether the time of each page's last access is kept, for `idle` by age
    policies     at most one of a kind; they have access times kept
    density      how readily it becomes denser by itself; it has access times kept
    mem_limit    of the pool, 0 = none
    threads      of the lane, at least 1
    name         shown as the file system's source in /proc/mounts
    reserve      memory kept ready for writes, rounded up to 2 MiB; above 0 the process is also locked in
                 memory and set up for swap (safety.py); 0 = none of that
    forced       go on without a setting that swap needs, and over what the write-back file or device holds
    allow_other  other users may use the mounts (FUSE's option of that name)
    keep_free    of the host's memory: the pool does not grow while less is available; 0 = it grows anyway,
                 None = the default (device/host_memory.py), which is 0 for a device with a reserve
    lock         all memory of the device is locked, so that none of it is swapped out
    proactiveness  of compaction, 0 to 100
    standby      a second process waits to take over at once when the daemon dies; what has a reserve always
                 has one
    writeback    block device or regular file for write-back; None = none
    wipe         what was discarded, overwritten or moved is zeroed, in memory and on the backing store
    restore      image that the device is filled from when it starts; None = none
    keep         image that the device is saved into when it ends; None = none. If restore is the same file, a
                 damaged one is refused
    keep_every   seconds after which it is saved again and again; 0 = only at the end
    mode, owner, group  of `disk`; None = 0600 and the user who starts the device
    """

    directory: Path = NOWHERE
    rundir: Path = NOWHERE
    name: str = "zramfs"
    size: int = 0
    algorithms: tuple[Algorithm, ...] = (Algorithm(DEFAULT_ALGO),)
    access_times: bool = False
    policies: tuple[Policy, ...] = ()
    density: Density = OFF
    mem_limit: int = 0
    threads: int = DEFAULT_THREADS
    reserve: int = 0
    forced: bool = False
    allow_other: bool = False
    keep_free: int | None = None
    lock: bool = False
    proactiveness: int = DEFAULT_PROACTIVENESS
    writeback: Path | None = None
    wipe: bool = False
    restore: Path | None = None
    keep: Path | None = None
    keep_every: int = 0
    mode: int | None = None
    owner: int | None = None
    group: int | None = None
    standby: bool = False

    @property
    def primary(self) -> Algorithm:
        return self.algorithms[0]

    @property
    def secondary(self) -> tuple[Algorithm, ...]:
        return self.algorithms[1:]

    def at(self, directory: Path, rundir: Path, name: str) -> DeviceConfig:
        """The same device, in its place."""
        return replace(self, directory=directory, rundir=rundir, name=name)
