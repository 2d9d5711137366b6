# SPDX-License-Identifier: Apache-2.0
"""The process of one device: mounts the lane and the tree, serves them, and takes both down again."""
from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyfuse3
import trio

from allocator.reserve import prepare_thread
from zramfs.device.device import Device
from zramfs.errors import ZramfsError
from zramfs.host import fusermount, in_use, mounts, stacks
from zramfs.host.log import log_to_stderr
from zramfs.lane.lane import Lane
from zramfs.model.config import DeviceConfig
from zramfs.tree.files import build
from zramfs.tree.tree import Tree
from zramfs.tree.watch import watch_errors

from .log_file import watch_log
from .service import Notifier

log = logging.getLogger(__package__)
T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ANSWER_TIMEOUT = 10.0  # seconds for the first answer of a mount that was just made
# A reader that has just been answered needs a moment to close its file.
UNMOUNT_TRIES = 5
UNMOUNT_PAUSE = 0.1
# Longer than most gaps between the requests of one client; 50 and 200 measured the same at depth 1 to 16.
POLL_US = 100
END_TIMEOUT = 10.0  # seconds for the lane's threads and the tree's loop to end after their unmount


def serve(
    config: DeviceConfig, on_ready: Callable[[], None], teardown: Callable[[], None] | None = None,
    may_end: Callable[[], None] | None = None, notifier: Notifier | None = None,
) -> int:
    """Serves one device until SIGTERM, SIGINT, SIGHUP, or until its tree or its lane is unmounted.

    on_ready is called once, when `disk` and the tree answer; teardown once at the end, while both
    still do, to undo what was built on them. may_end is called before each end that can be refused (a
    signal, the loss of the tree): a ZramfsError of it is logged, and the device goes on. All run in a
    thread. An exception of on_ready ends the device and is raised again; one of teardown is logged.
    notifier: tells a service manager.

    Returns 0 after an orderly end; 1 if something had to be cut off from its users, or if teardown
    failed, or the lane had broken. Raises ZramfsError (or on_ready's exception) when the start
    fails. Whatever happens, no mount is left. SIGUSR1 writes the stacks of all threads to stderr.

    To be called in the main thread of a process that serves nothing else: pyfuse3 has one tree.
    """
    log_to_stderr()
    with stacks.written_on(signal.SIGUSR1):
        return trio.run(_Daemon(config, on_ready, teardown, may_end, notifier).run)


class _Daemon:
    def __init__(
        self, config: DeviceConfig, on_ready: Callable[[], None], teardown: Callable[[], None] | None,
        may_end: Callable[[], None] | None, notifier: Notifier | None,
    ) -> None:
        self.config = config
        self.notifier = notifier
        self.disk = config.rundir / "disk"
        self.on_ready = on_ready
        self.teardown = teardown
        self.may_end = may_end
        self.lane: Lane | None = None
        self.device: Device | None = None
        self.mounts: dict[Path, mounts.Mount | None] = {}
        self.tree_served = False
        self.tree_ended = trio.Event()
        self.stopping = trio.Event()
        self.ready = False
        self.reason = ""
        self.status = 0

    async def run(self) -> int:
        failure: Exception | None = None
        # From here on a signal that asks for the end is kept until somebody reads it: none can
        # end the process between a mount and its unmount.
        with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
            async with trio.open_nursery() as nursery:
                try:
                    await self.start_lane()
                    await self.mount_tree()
                    for task, *arguments in (
                        (self.watch_signals, signals), (self.serve_tree,), (self.watch_lane,),
                        (watch_errors, self.device), (watch_log, self.config.rundir / "log"),
                        *((task,) for task in self.device.background_tasks()),
                    ):
                        nursery.start_soon(self.guard, task, *arguments)
                    await self.become_ready()
                    if self.notifier:
                        nursery.start_soon(self.guard, self.notifier.watch, self.device, self.disk)
                    await self.stopping.wait()
                    log.info("%s: ending: %s", self.config.name, self.reason)
                except Exception as error:
                    failure = error
                finally:
                    with trio.CancelScope(shield=True):
                        await self.shut_down()
                    nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return self.status

    async def guard(self, task: Callable, *arguments: object) -> None:
        try:
            await task(*arguments)
        except Exception:
            self.status = 1
            log.exception("%s: unexpected end of a task", self.config.name)
            self.stop(f"{task.__name__} failed")

    async def start_lane(self) -> None:
        config = self.config
        self.disk.touch(mode=0o600)
        options = {"fsname": f"zramfs-disk:{config.name}", "subtype": "zramfs-disk", **self.mount_options()}
        fd = await self.mount(self.disk, options)
        try:
            lane = Lane(fd, threads=config.threads, poll_us=poll_us())
        except BaseException:
            os.close(fd)
            raise
        self.device = Device(config, lane)
        await self.device.start()
        lane.start()
        self.lane = lane

    async def mount_tree(self) -> None:
        options = {"fsname": self.config.name, "subtype": "zramfs", **self.mount_options()}
        fd = await self.mount(self.config.directory, options)
        # pyfuse3 waits for a request, then reads it while it holds the GIL. If the caller is killed
        # in between there is nothing to read, and in blocking mode the whole interpreter stands
        # still until the next request (seen 5 times in 40 kills of a busy client). See serve_tree.
        os.set_blocking(fd, False)
        try:
            pyfuse3.init(Tree(build(self.device, self.disk)), f"/dev/fd/{fd}", set())
        except BaseException:
            os.close(fd)
            raise
        self.tree_served = True

    async def mount(self, path: Path, options: dict[str, str | bool]) -> int:
        fd = await in_thread(partial(fusermount.mount_file, path, options=options))
        self.mounts[path] = mounts.mount_at(path)
        return fd

    def place_of(self, path: Path) -> Path | None:
        """Where ours is that was mounted on `path`, which somebody may have renamed; None when it is gone, or
        something else is mounted over it."""
        ours = self.mounts.get(path)
        found = next(
            (each for each in mounts.mounts() if ours and (each.id, each.dev) == (ours.id, ours.dev)), None)
        return found.mountpoint if found and mounts.mount_at(found.mountpoint) == found else None

    def mounted(self, path: Path) -> bool:
        return self.place_of(path) is not None

    def expect_gone(self, path: Path) -> None:
        """What was mounted over ours is somebody else's, and keeps ours where it is."""
        over = mounts.mount_at(path)
        if over is not None and self.mounts.get(path) in mounts.mounts():
            self.status = 1
            log.warning(
                "%s: %s stays mounted, because %s is mounted over it; umount that, then this",
                self.config.name, path, over.fstype,
            )

    def mount_options(self) -> dict[str, str | bool]:
        return {"default_permissions": True, "allow_other": self.config.allow_other}

    async def become_ready(self) -> None:
        """Returns when everybody knows that the device is ready. Raises what makes the start fail."""
        for path in (self.disk, self.config.directory / "control"):
            await self.expect_answer(path)
        if self.stopping.is_set():
            raise ZramfsError(errno.EINTR, f"the device had to end before it was ready: {self.reason}")
        await in_thread(self.set_owner)
        await in_thread(self.tell_ready)
        self.ready = True
        if self.notifier:
            await self.notifier.tell("READY=1")
        log.info("%s: ready at %s", self.config.name, self.config.directory)

    def tell_ready(self) -> None:
        # A server of swap makes all its memory resident in there, and its stack must not grow afterwards.
        prepare_thread()
        self.on_ready()

    def set_owner(self) -> None:
        """Of `disk`. The lane answers it, so it cannot be done before."""
        config = self.config
        if config.owner is not None or config.group is not None:
            os.chown(self.disk, *(-1 if each is None else each for each in (config.owner, config.group)))
        if config.mode is not None:
            os.chmod(self.disk, config.mode)

    async def expect_answer(self, path: Path) -> None:
        try:
            with trio.fail_after(ANSWER_TIMEOUT):
                await trio.to_thread.run_sync(os.stat, path, abandon_on_cancel=True)
        except trio.TooSlowError:
            reason = f"no answer for {ANSWER_TIMEOUT:g} s"
        except OSError as error:
            reason = error.strerror
        else:
            return
        raise ZramfsError(
            errno.EIO, f"{path} was mounted, but cannot be used: {self.lane.error or self.reason or reason}"
        )

    def stop(self, reason: str) -> None:
        if not self.stopping.is_set():
            self.reason = reason
            self.stopping.set()

    async def ask_to_end(self, reason: str) -> None:
        """Ends the device, unless may_end refuses."""
        if self.may_end and self.ready and not self.stopping.is_set():
            try:
                await in_thread(self.may_end)
            except ZramfsError as error:
                log.warning("%s: %s, but the device goes on: %s", self.config.name, reason, error)
                return
        self.stop(reason)

    async def watch_signals(self, signals) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if self.stopping.is_set():
                log.info("%s: %s: ending already", self.config.name, name)
            await self.ask_to_end(name)

    async def watch_lane(self) -> None:
        await trio.lowlevel.wait_readable(self.lane.done_fd)
        if not self.lane.error and not self.mounted(self.disk):
            self.stop(f"{self.disk} was unmounted")
        elif not self.stopping.is_set():
            self.status = 1
            self.stop(f"the lane has ended: {self.lane.error or 'somebody aborted its connection'}")

    async def serve_tree(self) -> None:
        """Runs pyfuse3's loop until the tree is unmounted or shut_down() ends it.

        On a request that was withdrawn before it was read the loop ends with EAGAIN, and is started
        again: requests in hand are shielded (tree.boundary), so each of them is answered.
        """
        try:
            while await self.pyfuse3_loop():
                pass
            self.tree_ended.set()
            await self.ask_to_end(f"{self.config.directory} was unmounted")
        finally:
            self.tree_ended.set()

    async def pyfuse3_loop(self) -> bool:
        """True if the loop should go on."""
        try:
            await pyfuse3.main()
        except Exception as error:
            causes = list(leaves(error))
            if all(isinstance(cause, OSError) and cause.errno == errno.EAGAIN for cause in causes):
                return True
            if not all(isinstance(cause, OSError) and cause.errno == errno.ECONNABORTED for cause in causes):
                self.status = 1
                log.error("%s: the loop of the tree broke", self.config.name, exc_info=error)
        return False

    async def shut_down(self) -> None:
        """Takes down whatever stands. Nothing that goes wrong in a step keeps the next from its work."""
        if self.notifier:
            await self.notifier.tell("STOPPING=1", f"STATUS=ending: {self.reason or 'the start failed'}")
        if self.device:
            self.device.end_jobs()  # whoever waits for one is answered, and can let go of the tree
        if self.teardown and self.lane:
            await self.attempt("undoing what was built on disk", in_thread, self.teardown)
        await self.attempt("unmounting the tree", self.unmount, self.config.directory)
        if self.tree_served:
            await self.attempt("ending the tree", self.end_tree)
        cut_off = await self.attempt("unmounting disk", self.unmount, self.disk)
        if self.lane:
            await self.attempt("ending the lane", self.end_lane, cut_off is not False)

    async def attempt(self, what: str, step: Callable[..., Awaitable[T]], *arguments: object) -> T | None:
        """What the step returns; None, and a line in the log, if it fails."""
        try:
            return await step(*arguments)
        except Exception as error:
            self.status = 1
            # An error with a sentence of its own needs no trace.
            trace = not isinstance(error, ZramfsError)
            log.error("%s: %s failed: %s", self.config.name, what, error, exc_info=trace)
            return None

    async def end_tree(self) -> None:
        with trio.move_on_after(END_TIMEOUT):
            # The loop ends by itself, unless the mount was only detached.
            pyfuse3.terminate()
            await self.tree_ended.wait()
        # Closes the connection: who still uses the tree gets an error instead of no answer.
        pyfuse3.close(unmount=False)

    async def unmount(self, path: Path) -> bool:
        """True if it was in use, and could only be detached from the directories."""
        for _ in range(UNMOUNT_TRIES):
            place = self.place_of(path)
            if place is None:
                self.expect_gone(path)
                return False
            try:
                await in_thread(partial(fusermount.unmount, place))
                return False
            except OSError as error:
                reason = error
            await trio.sleep(UNMOUNT_PAUSE)
        self.status = 1
        users = await in_thread(partial(in_use.users_of, [place]))
        log.warning(
            "%s: %s could not be unmounted (%s); it is cut off from its users, who get I/O errors from here "
            "on: %s",
            self.config.name, place, reason, "; ".join(users) or "nobody that is to be seen from here",
        )
        try:
            await in_thread(partial(fusermount.unmount, place, lazy=True))
        except OSError as error:
            log.error("%s: %s could not even be detached: %s", self.config.name, place, error)
        return True

    async def end_lane(self, abort: bool) -> None:
        """abort: do not wait for its users."""
        if abort or not await in_thread(partial(self.lane.join, END_TIMEOUT)):
            # abort() returns when what is in hand is answered.
            await in_thread(self.lane.abort)
        await in_thread(self.lane.join)
        await self.device.close()


def poll_us() -> int:
    """On a single CPU whoever looks for a request keeps its sender from running."""
    return POLL_US if len(os.sched_getaffinity(0)) > 1 else 0


def leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


async def in_thread(work: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(work)
