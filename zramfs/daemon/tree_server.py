# SPDX-License-Identifier: Apache-2.0
"""Serves the tree by pyfuse3, and mounts it again when that breaks.

The tree is what people look at and steer by; the data does not depend on it. So nothing that goes wrong in
here ends the device. pyfuse3 loses a request where it finds no memory for it, and the caller would wait
without end, even after SIGKILL. Closing the connection is the one way to answer it. The tree holds no state
but modes and owners, and these stay, so a new mount has everything that the old one had.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sys
from collections.abc import Callable, Iterator

import pyfuse3
import trio

from zramfs.errors import ZramfsError
from zramfs.host.work_thread import run_in_thread
from zramfs.tree.tree import Directory, Tree

from .helper_tasks import FIRST_PAUSE, LONGEST_PAUSE
from .own_mount import OwnMount

log = logging.getLogger(__package__)

END_TIMEOUT = 10.0  # seconds for the loop to end after the unmount
LOOK_INTERVAL = 1.0  # seconds between two looks whether a request was lost


class TreeServer:
    """device: its name, for the log. on_mount: called in a thread after each mount. One at a time in
    a process: pyfuse3 has one session."""

    def __init__(
        self, device: str, mount: OwnMount, root: Directory, on_mount: Callable[[], None] = lambda: None
    ) -> None:
        self.mount = mount
        self._on_mount = on_mount
        self._device = device
        self._root = root
        self._tree: Tree | None = None  # None: there is no session of pyfuse3
        self._loop_over = trio.Event()
        self._loop_over.set()
        self._is_ending = False
        self._least_fd = 0
        self._lost = False  # set by the hook, in whatever state the interpreter is

    async def start(self) -> None:
        """Mounts the tree and opens a session for it. Raises MountError."""
        mounted = await self.mount.mount()
        # A number that no session had before: trio may still take the old one for waited for (readable.py).
        fd = fcntl.fcntl(mounted, fcntl.F_DUPFD_CLOEXEC, self._least_fd)
        os.close(mounted)
        self._least_fd = fd + 1
        # pyfuse3 waits for a request, then reads it while it holds the GIL. If the caller is killed
        # in between there is nothing to read, and in blocking mode the whole interpreter stands
        # still until the next request (seen 5 times in 40 kills of a busy client). See _run_loop.
        os.set_blocking(fd, False)
        try:
            tree = Tree(self._root)
            pyfuse3.init(tree, f"/dev/fd/{fd}", set())
        except BaseException:
            os.close(fd)
            raise
        self._tree = tree
        await run_in_thread(self._on_mount)

    def resume(self) -> None:
        """The trio loop in which the session ran is gone; serve() opens a new one."""
        self._loop_over = trio.Event()
        self._loop_over.set()
        self._close_session()

    async def serve(self) -> None:
        """Returns when somebody has unmounted the tree, or after end(). May be called again after renew()."""
        pause = FIRST_PAUSE
        with self._lost_requests_noticed():
            while not self._is_ending:
                if self._tree is None:
                    await self.renew()
                began = trio.current_time()
                is_sound = await self._run_loop()
                if is_sound and not self._lost or self._is_ending:
                    continue
                if not self.mount.is_there() and not self.mount.is_covered():
                    return
                # A session that breaks at once is no better than the next one.
                pause = min(2 * pause, LONGEST_PAUSE) if trio.current_time() - began < pause else FIRST_PAUSE
                if pause > FIRST_PAUSE:
                    self._close_session()  # nobody is to wait for an answer meanwhile
                    await trio.sleep(pause)
                await self.renew()

    async def renew(self) -> None:
        """Ends what is left of the session, so that whoever waits for it gets an error, and mounts the tree
        again, as soon as that is possible."""
        pause = FIRST_PAUSE
        while not self._is_ending:
            try:
                self._close_session()
                if self.mount.is_covered():
                    raise ZramfsError(errno.EBUSY, f"something is mounted over {self.mount.path}")
                if self.mount.is_there():
                    await self.mount.detach()
                await self.start()
            except (OSError, MemoryError, RuntimeError) as error:
                if pause == FIRST_PAUSE:
                    with contextlib.suppress(Exception):
                        log.error("%s: the tree is gone and cannot be mounted again yet: %s; disk is served, "
                                  "and the next try is in %g s", self._device, error, pause)
            else:
                log.warning("%s: the tree is mounted again; whoever had files open there has to open them "
                            "again", self._device)
                return
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def end(self) -> None:
        """After the unmount. Whoever still uses the tree gets an error instead of no answer."""
        self._is_ending = True
        if self._tree is None:
            return
        with trio.move_on_after(END_TIMEOUT):
            # The loop ends by itself, unless the mount was only detached.
            pyfuse3.terminate()
            await self._loop_over.wait()
        if not self._loop_over.is_set():
            log.error("%s: an operation of the tree has not ended within %g s; it is given up",
                      self._device, END_TIMEOUT)
            self._tree.abandon_operations()
            return  # its reply needs the session, which ends with the process
        self._close_session()

    async def _run_loop(self) -> bool:
        """Until the session is over. False if the session is broken, and has to be closed.

        On a request that was withdrawn before it was read the loop ends with EAGAIN, and for want of memory
        with ENOMEM before it reads one. Then it can go on: operations under way are shielded
        (tree.with_boundary), so each of them is answered.
        """
        self._loop_over = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_loop_when_lost)
                await pyfuse3.main()
                nursery.cancel_scope.cancel()
        except Exception as error:
            causes = {getattr(cause, "errno", None) for cause in leaf_errors(error)}
            if causes == {errno.EAGAIN}:
                return True
            if causes == {errno.ENOMEM}:
                await trio.sleep(FIRST_PAUSE)
                return True
            if causes != {errno.ECONNABORTED}:
                with contextlib.suppress(Exception):
                    log.error("%s: the loop of the tree broke: %s: %s", self._device, type(error).__name__,
                              error, exc_info=None if _is_want_of_memory(error) else error)
        finally:
            self._loop_over.set()
        return False

    async def _end_loop_when_lost(self) -> None:
        while not self._lost:
            await trio.sleep(LOOK_INTERVAL)
        pyfuse3.terminate()

    @contextlib.contextmanager
    def _lost_requests_noticed(self) -> Iterator[None]:
        """pyfuse3 begins a request in C functions that cannot raise: what fails there goes to the hook, and
        the request stays without an answer."""
        before = sys.unraisablehook

        def notice(unraisable: sys.UnraisableHookArgs) -> None:
            try:
                self._lost |= "pyfuse3" in str(unraisable.object)
            except MemoryError:
                self._lost = True
            before(unraisable)

        sys.unraisablehook = notice
        try:
            yield
        finally:
            sys.unraisablehook = before

    def _close_session(self) -> None:
        if self._tree is not None:
            self._tree = None
            self._lost = False
            pyfuse3.close(unmount=False)


def leaf_errors(error: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group of groups, or the one that is none."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaf_errors(inner)
    else:
        yield error


def _is_want_of_memory(error: BaseException) -> bool:
    return all(isinstance(each, MemoryError) for each in leaf_errors(error))
