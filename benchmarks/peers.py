# SPDX-License-Identifier: Apache-2.0
"""The peers: each a path that takes direct I/O, made on entering and taken down on leaving.

zramfs   our daemon, started and stopped by its command line
zram     a kernel zram device of our own (hot_add ... hot_remove), never one that was there before
nbdkit   nbdkit's memory plugin with allocator=zstd, its NBD export made a file by nbdfuse
empty    benchmarks/empty_fuse.c: answers and stores nothing
"""
from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tools import HERE, BenchmarkError, LeftOutError, built, command, need, undisturbed, wait_until
from zramfs.host import loops
from zramfs.host.fusermount import MountError, is_mounted, mount_file, unmount
from zramfs.lifecycle import rundir

KINDS = ("zramfs", "zram", "nbdkit", "empty")
# In the order in which they are shown. The kernel's is a block device by itself.
NAMES = ("zramfs-file", "zramfs-loop", "zram", "nbdkit-file", "nbdkit-loop", "empty-file", "empty-loop")
# As many as zramfs has by default.
EMPTY_THREADS = 2
ZRAM_CONTROL = Path("/sys/class/zram-control")
# util-linux and udev look at a new device and keep it open for a moment; mounts see unmount_soon().
REMOVE_SECONDS = 10.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Server:
    """What a peer's storage is served by. path: the file or block device, with direct I/O;
    pids: its processes, none for the kernel's own; sysfs: of kernel zram only; tree: of zramfs only."""

    kind: str
    path: Path
    pids: tuple[int, ...] = ()
    sysfs: Path | None = None
    tree: Path | None = None


@dataclass(frozen=True)
class Peer:
    """A server as it is measured: name is one of NAMES, path its file, or a loop device on it."""

    name: str
    server: Server
    path: Path

    @property
    def mount(self) -> str:
        """"file", "loop" or "device"."""
        return self.name.partition("-")[2] or "device"


def kind_of(name: str) -> str:
    return name.partition("-")[0]


@contextlib.contextmanager
def serve(kind: str, size: int, algo: str) -> Iterator[Server]:
    """A server of `size` bytes. Raises LeftOutError when this machine cannot have it."""
    with tempfile.TemporaryDirectory(prefix=f"zramfs-benchmark-{kind}-",
                                     ignore_cleanup_errors=True) as scratch:
        makers: dict[str, Callable[[], contextlib.AbstractContextManager[Server]]] = {
            "zramfs": lambda: zramfs(Path(scratch), size, algo),
            "zram": lambda: zram(size, algo),
            "nbdkit": lambda: nbdkit(Path(scratch), size),
            "empty": lambda: empty(Path(scratch), size),
        }
        with makers[kind]() as server:
            yield server


@contextlib.contextmanager
def zramfs(scratch: Path, size: int, algo: str, *options: object) -> Iterator[Server]:
    """A zramfs device in `scratch`, through the command line of the interpreter that runs this. options: of
    `zramfs create`."""
    directory = (scratch / "z").resolve()
    directory.mkdir()
    cli("create", directory, "--size", size, "--algo", algo, *options)
    try:
        found = rundir.find(str(directory))
        state = found.read() if found else None
        if state is None:
            raise BenchmarkError(f"`zramfs create {directory}` succeeded, but left no state of its device")
        yield Server("zramfs", Path(state.disk), (state.pid,), tree=directory)
    finally:
        cli("stop", directory)


def cli(*words: object, seconds: float = 60) -> None:
    """zramfs WORDS, with the zramfs of this checkout whatever is installed: it is what is measured."""
    command([sys.executable, "-m", "zramfs.cli", *map(str, words)], seconds, PYTHONPATH=str(HERE.parent))


@contextlib.contextmanager
def zram(size: int, algo: str) -> Iterator[Server]:
    """A kernel zram device with the same algorithm; levels are ours alone, the kernel has its default."""
    if os.getuid():
        raise LeftOutError("only root can add a kernel zram device")
    if not (ZRAM_CONTROL / "hot_add").exists():
        raise LeftOutError("this kernel has no zram, or its module is not loaded (modprobe zram)")
    number = (ZRAM_CONTROL / "hot_add").read_text().strip()
    sysfs = Path(f"/sys/block/zram{number}")
    try:
        wanted = algo.partition(":")[0]
        offered = (sysfs / "comp_algorithm").read_text().replace("[", "").replace("]", "").split()
        if wanted not in offered:
            raise LeftOutError(f"this kernel's zram offers {' '.join(offered)}, not {wanted}")
        (sysfs / "comp_algorithm").write_text(wanted)
        (sysfs / "disksize").write_text(str(size))
        device = Path(f"/dev/zram{number}")
        wait_until(device.is_block_device, f"no node {device} (is devtmpfs mounted on /dev?)")
        yield Server("zram", device, sysfs=sysfs)
    finally:
        wait_until(lambda: _removed(number), f"zram{number} is still in use and was not removed",
                   REMOVE_SECONDS)


def _removed(number: str) -> bool:
    try:
        (ZRAM_CONTROL / "hot_remove").write_text(number)
    except OSError:
        return not Path(f"/sys/block/zram{number}").exists()
    return True


@contextlib.contextmanager
def nbdkit(scratch: Path, size: int) -> Iterator[Server]:
    """nbdkit and nbdfuse by a Unix socket: the form in which nbdfuse uses several connections."""
    nbdkit_path, nbdfuse_path = need("nbdkit", "nbdkit"), need("nbdfuse", "libnbd-bin")
    need("fusermount3", "fuse3")
    if "zstd=yes" not in command([nbdkit_path, "memory", "--dump-plugin"]):
        raise LeftOutError("this nbdkit is built without zstd")
    socket, folder = scratch / "socket", scratch / "nbd"
    folder.mkdir()
    disk = folder / "disk"
    with process([nbdkit_path, "--foreground", "--unix", str(socket), "memory", f"size={size}",
                  "allocator=zstd"]) as storage:
        wait_until(lambda: socket.exists() or ended(storage), "nbdkit made no socket")
        alive(storage)
        with process([nbdfuse_path, str(disk), f"nbd+unix:///?socket={socket}"]) as bridge:
            try:
                wait_until(lambda: disk.exists() or ended(bridge), "nbdfuse made no file")
                alive(bridge)
                yield Server("nbdkit", disk, (storage.pid, bridge.pid))
            finally:
                if is_mounted(folder):
                    unmount_soon(folder)


@contextlib.contextmanager
def empty(scratch: Path, size: int) -> Iterator[Server]:
    """Our empty server on a file of its own."""
    need("fusermount3", "fuse3")
    program = built("empty_fuse")
    disk = (scratch / "disk").resolve()
    disk.touch()
    with undisturbed():
        fd = mount_file(disk, options={"fsname": "empty_fuse"})
    try:
        with process([str(program), str(fd), str(size), str(EMPTY_THREADS)], pass_fds=(fd,)) as server:
            # Only the server may hold the connection: if it dies, I/O fails instead of hanging.
            os.close(fd)
            fd = -1
            try:
                # The kernel asks for the attributes, and waits until the server is there to answer.
                if disk.stat().st_size != size:
                    raise BenchmarkError(f"{disk} should have {size} bytes, not {disk.stat().st_size}")
                alive(server)
                yield Server("empty", disk, (server.pid,))
            finally:
                unmount_soon(disk)
    finally:
        if fd >= 0:
            os.close(fd)
            unmount_soon(disk)


def unmount_soon(point: Path) -> None:
    """Unmount, with patience: the kernel lets go of the file behind a loop device, and of the files of a
    load that was interrupted, a moment after the device or the process is seen to be gone."""
    end = time.monotonic() + REMOVE_SECONDS
    while True:
        try:
            with undisturbed():
                return unmount(point)
        except MountError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
        time.sleep(0.05)


@contextlib.contextmanager
def loop(disk: Path) -> Iterator[Path]:
    """A loop device with direct I/O and 4096-byte sectors on a server's file."""
    need("losetup", "mount")
    if os.getuid():
        raise LeftOutError("only root can set up a loop device")
    with undisturbed():
        device = loops.attach(disk)
    # Held open, it stays attached for us even if another program detaches loop devices it did not make.
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Path(device)
    finally:
        os.close(fd)
        with undisturbed():
            loops.detach(device, disk)


@contextlib.contextmanager
def process(words: Sequence[str], pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A server of ours: a session of its own keeps the terminal's Ctrl-C away from it. On leaving it is
    asked to end, and killed if it does not."""
    child = subprocess.Popen(words, pass_fds=pass_fds, start_new_session=True, stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        assert child.stderr is not None
        child.stderr.close()


def ended(child: subprocess.Popen[bytes]) -> bool:
    return child.poll() is not None


def alive(child: subprocess.Popen[bytes]) -> None:
    """Raise BenchmarkError with the process' last words if it has ended."""
    if ended(child):
        assert child.stderr is not None
        words = " ".join(str(word) for word in child.args)  # type: ignore[union-attr]
        said = child.stderr.read().decode(errors="replace").strip()
        raise BenchmarkError(f"`{words}` ended with status {child.returncode}: {said or '(it said nothing)'}")
