# SPDX-License-Identifier: Apache-2.0
"""The process that acts on the mounted file system of a device for the device's daemon.

The daemon must not: a call that waits for the file system's I/O waits for the daemon itself, and if that is
killed meanwhile, the call never ends and keeps the device open for ever. Without this process the daemon
only counts.

Requests are lines of JSON on stdin, each is answered by one on stdout:
    {"do": "take", "mountpoint": ..., "device": "/dev/loop0", "fstype": "ext4", "frozen": false}
                                     frozen: by a warden that died
    {"do": "allow", "bytes": N}      leaves about N bytes to the users; null = all
    {"do": "wait", "bytes": N}       about N written bytes may wait in the page cache; null = any
    {"do": "look"}
    {"do": "sync"}                   what was deleted is discarded, soon after the answer
    {"do": "freeze"}, {"do": "thaw"} freezing goes on after the answer
    {"do": "let_go"}                 the file system stays, and so does what others have frozen
An answer has free, withheld, frozen ("no", "freezing", "yes" or a sentence why not), or error and errno.
It ends, and gives everything back, when stdin ends or nobody has the file system mounted any more. Where
stdin ends without let_go, the device ends too, or is dead. Then it thaws the file system whoever has frozen
it: on xfs and btrfs giving back waits for that, and the unmount would wait for this process. It holds the
file system by a mount that stands nowhere, so that `umount` does not find it busy.
"""
from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import sys
import threading
from typing import Any

from . import bdi, mounts, withheld

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_SYS_OPEN_TREE, _OPEN_TREE_CLONE = 428, 1  # the number is the same on all architectures but alpha
_AT_FDCWD = -100
# Seconds for a warden whose daemon has died. It is told when the daemon's memory is unmapped, which takes
# 0.4 s a GiB on busy CPUs. Its thaw waits for whoever is inside a write while it freezes.
CLAIM_TIMEOUT = 10.0


def open_apart(mountpoint: str) -> int:
    """An open directory: the root of the file system on `mountpoint`, through a mount of its own that stands
    nowhere. Raises OSError: ENOSYS before Linux 5.2."""
    libc = ctypes.CDLL(None, use_errno=True)
    tree = libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(mountpoint), _OPEN_TREE_CLONE | os.O_CLOEXEC)
    if tree < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{mountpoint} cannot be mounted apart: {os.strerror(number)}")
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
    finally:
        os.close(tree)


class Warden:
    def __init__(self) -> None:
        self._directory = self._claim = -1
        self._device = ""
        self._dev = ""
        self._space: withheld.Withheld | None = None
        self._frozen = "no"
        self._freezing: threading.Thread | None = None
        self._wanted = 0
        self._busy = False  # True while the thread below is at work
        self._want = threading.Event()
        self._withholding: threading.Thread | None = None
        self._ending = False
        self._stays = False
        self._syncing: threading.Thread | None = None

    def take(self, mountpoint: str, device: str, fstype: str, *, frozen: bool) -> dict[str, object]:
        mount = next((each for each in mounts.mounts()
                      if each.source == device and str(each.mountpoint) == mountpoint), None)
        if mount is None:
            raise OSError(errno.ENOENT, f"{device} is not mounted on {mountpoint} any more")
        self._claim = bdi.claim(device, CLAIM_TIMEOUT)
        self._directory = open_apart(mountpoint)
        self._device, self._dev = device, mount.dev
        if frozen:
            with contextlib.suppress(OSError):  # it may be thawed already
                fcntl.ioctl(self._directory, _FITHAW, 0)
        self._space = withheld.of(fstype, self._directory, device)
        if not self._space.quick:
            self._withholding = threading.Thread(target=self._keep_withholding, daemon=True)
            self._withholding.start()
        return self.look()

    def look(self) -> dict[str, object]:
        assert self._space is not None
        return {"frozen": self._frozen, "free": self._space.free(), "withheld": self._space.withheld(),
                "quick": self._space.quick, "prompt": self._space.prompt}

    def allow(self, nbytes: int | None) -> dict[str, object]:
        assert self._space is not None
        # While blocks change hands free() is not to be trusted.
        if not self._busy and (self._frozen == "no" or self._space.works_frozen):
            # Reckoned before it waits: what is written meanwhile comes out of what the users were left.
            wanted = 0 if nbytes is None else max(0, self._space.free() - nbytes)
            if self._space.quick:
                self._space.withhold(wanted)
            elif wanted != self._space.withheld():
                self._wanted, self._busy = wanted, True
                self._want.set()
        return self.look()

    def _keep_withholding(self) -> None:
        """In a thread of its own, where that may take long."""
        assert self._space is not None
        while True:
            self._want.wait()
            self._want.clear()
            if self._ending:
                return
            try:
                self._space.withhold(self._wanted)
            except OSError as error:
                print(f"warden: {self._device}: free blocks: {error}", file=sys.stderr, flush=True)
            self._busy = False

    def wait(self, nbytes: int | None) -> dict[str, object]:
        if nbytes is None:
            bdi.release(self._device)
        else:
            bdi.bound(self._device, nbytes)
        return {"frozen": self._frozen, "wait": bdi.waiting(self._device)}

    def sync(self) -> dict[str, object]:
        """Begins it, in a thread of its own: meanwhile there may be a reason to freeze."""
        if self._frozen == "no" and (self._syncing is None or not self._syncing.is_alive()):
            self._syncing = threading.Thread(target=self._sync, daemon=True)
            self._syncing.start()
        return self.look()

    def _sync(self) -> None:
        # An error of a write is that write's, and told to whoever asks for its file.
        with contextlib.suppress(OSError):
            withheld.sync(self._directory)

    def freeze(self) -> dict[str, object]:
        """Waits in a thread of its own for whoever is inside a write."""
        if self._frozen in ("no", "freezing") and self._freezing is None:
            self._frozen = "freezing"
            self._freezing = threading.Thread(target=self._freeze, daemon=True)
            self._freezing.start()
        return {"frozen": self._frozen}

    def _freeze(self) -> None:
        try:
            fcntl.ioctl(self._directory, _FIFREEZE, 0)
            self._frozen = "yes"
        except OSError as error:
            self._frozen = error.strerror or str(error)

    def thaw(self) -> dict[str, object]:
        """Without effect on what somebody else has frozen."""
        if self._freezing is not None:
            self._freezing.join()
            self._freezing = None
        if self._frozen == "yes":
            fcntl.ioctl(self._directory, _FITHAW, 0)
        self._frozen = "no"
        return {"frozen": self._frozen}

    def let_go(self) -> dict[str, object]:
        self._stays = True
        return {"frozen": self._frozen}

    def _thaw_whoever_froze(self) -> None:
        if self._directory >= 0 and not self._stays:
            with contextlib.suppress(OSError):  # it is not frozen
                fcntl.ioctl(self._directory, _FITHAW, 0)

    def mounted(self) -> bool:
        return not self._dev or any(mount.dev == self._dev for mount in mounts.mounts())

    def release(self) -> None:
        for step in (self.thaw, self._thaw_whoever_froze, lambda: bdi.release(self._device),
                     self._let_next_take, self._close):
            try:
                step()
            except OSError as error:
                print(f"warden: {self._device}: {error}", file=sys.stderr, flush=True)

    def _let_next_take(self) -> None:
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1

    def _close(self) -> None:
        if self._withholding is not None:
            self._ending = True
            self._want.set()
            self._withholding.join()
        if self._space is not None:
            self._space.close()
        if self._directory >= 0:
            # Here, and not at the end of the interpreter: somebody may wait for the end of the file system.
            os.close(self._directory)
            self._directory = -1

    def answer(self, line: str) -> dict[str, object]:
        request: dict[str, Any] = json.loads(line)
        try:
            match request["do"]:
                case "take":
                    return self.take(request["mountpoint"], request["device"], request["fstype"],
                                     frozen=request["frozen"])
                case "allow":
                    return self.allow(request["bytes"])
                case "wait":
                    return self.wait(request["bytes"])
                case "look" | "sync" | "freeze" | "thaw" | "let_go" as name:
                    return getattr(self, name)()
            raise OSError(errno.EINVAL, f"unknown request {line!r}")
        except OSError as error:
            return {"errno": error.errno or errno.EIO, "error": error.strerror or str(error)}


def main() -> None:
    # The daemon gets these too, and ends when it has taken the file system down; then so does this.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(-10)  # little work, which must not wait for that of others
    warden = Warden()
    with open("/proc/self/mountinfo", "rb") as table:
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(table, select.POLLPRI | select.POLLERR)
        pending = b""
        while warden.mounted():
            if not any(fd == 0 for fd, _ in poll.poll()):
                continue
            data = os.read(0, 65536)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            try:
                for line in lines:
                    answer = warden.answer(line.decode("utf-8", "surrogateescape"))
                    os.write(1, json.dumps(answer).encode() + b"\n")
            except BrokenPipeError:  # the daemon was killed; the next one has a warden of its own
                break
    warden.release()


if __name__ == "__main__":
    main()
