# SPDX-License-Identifier: Apache-2.0
"""The process of one device: mounts the lane and the tree, serves them, and takes both down again.

The device ends when its lane does, on a signal, and when a user unmounts it. Everything else is started
again (helper_tasks.py, tree_server.py), because the end of this process is the end of the data.
"""
from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from allocator.background import prepare_thread
from zramfs.device.device import Device
from zramfs.errors import ZramfsError
from zramfs.host import stacks
from zramfs.host.haste import make_haste
from zramfs.host.log import log_to_stderr
from zramfs.host.readable import wait_until_readable
from zramfs.host.work_thread import run_in_thread
from zramfs.lane.lane import Lane
from zramfs.model.config import DeviceConfig
from zramfs.model.kernel_pages import expect_kernel_pages
from zramfs.tree.files import tree_of
from zramfs.tree.watch import watch_errors

from .helper_tasks import HelperTasks
from .keeper_line import Inherited, KeeperLine
from .log_file import watch_log
from .own_mount import OwnMount
from .service import Notifier
from .stop_signals import StopSignals
from .succession import Succession
from .tree_server import TreeServer

log = logging.getLogger(__package__)
T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ANSWER_TIMEOUT = 30.0  # seconds for the first answer of a mount that was just made
# Longer than most gaps between the requests of one client; 50 and 200 measured the same at depth 1 to 16.
POLL_US = 100
END_TIMEOUT = 10.0  # seconds for the lane's threads to end after their unmount
# What fails while the device is to end may work a moment later, as a fork does when other processes have
# ended. So it is tried again after each of these, half a minute together, and then the order has to be given
# again.
END_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # seconds

RESTART_PAUSE = 1.0  # seconds
ENDS = 3  # tries to take everything down, where the loop breaks in it
# Exit statuses, beside 0.
CUT_OFF, FAILED = 1, 2
MayEnd = Callable[[bool], None]


def serve_device(
    config: DeviceConfig, on_ready: Callable[[], None], teardown: Callable[[], None] | None = None,
    may_end: MayEnd | None = None, notifier: Notifier | None = None, line: KeeperLine | None = None,
    inherited: Inherited | None = None, announce: Callable[[], None] = lambda: None,
    put_back: Callable[[], bool] | None = None,
) -> int:
    """Serves one device until SIGTERM, SIGINT, SIGHUP, or until its tree or its lane is unmounted.

    on_ready is called once, when `disk` and the tree answer; teardown once at the end, while both
    still do, to undo what was built on them. may_end is called before each end that can be refused, with True
    for a signal and False for an unmounted tree: whatever it raises is logged, and the device goes on, with
    a new tree if that was lost. All run in a thread. An exception of on_ready ends the device, as soon as
    may_end lets it, and is raised again; one of teardown is logged. notifier: tells a service manager. line:
    to the keeper, which has another process take over when this one dies. inherited: what a predecessor left;
    when that can't be taken over, an exception says why, and all stays as it is. announce: called after
    on_ready, when the device would outlive this process. put_back undoes may_end where the device goes on
    because it could not be saved; True: a file system is mounted.

    Returns 0 after an orderly end; CUT_OFF if something had to be cut off from its users; FAILED if the lane
    had broken, or a step of the end failed. Raises ZramfsError (or on_ready's exception) when the start
    fails. Whatever happens, no mount is left. SIGUSR1 writes the stacks of all threads to stderr. To be
    called in the main thread of a process that serves nothing else: pyfuse3 has one tree.
    """
    log_to_stderr()
    expect_kernel_pages()
    with StopSignals(*STOP_SIGNALS).taken() as signals, stacks.written_on(signal.SIGUSR1) as write_stacks:
        daemon = _Daemon(
            config, on_ready, teardown, may_end, notifier, signals, line, inherited, announce, put_back)
        daemon.write_stacks = write_stacks
        while True:
            try:
                return trio.run(daemon.run)
            except BaseException as error:
                if not daemon.can_go_on(error):
                    raise
                failure = type(error).__name__
            # The lane's threads need no interpreter. What steers them is made anew, with the data as it is.
            with contextlib.suppress(MemoryError):
                log.error("%s: the daemon's loop broke (%s) and is started again", config.name, failure)
            time.sleep(RESTART_PAUSE)


class _Daemon:
    def __init__(
        self, config: DeviceConfig, on_ready: Callable[[], None], teardown: Callable[[], None] | None,
        may_end: MayEnd | None, notifier: Notifier | None, signals: StopSignals, line: KeeperLine | None,
        inherited: Inherited | None, announce: Callable[[], None], put_back: Callable[[], bool] | None,
    ) -> None:
        self.announce = announce
        self.inherited = inherited
        self.config = config
        self.notifier = notifier
        self.signals = signals
        self.write_stacks: Callable[[], None] = lambda: None  # on a signal, from then on
        self.on_ready = on_ready
        self.teardown = teardown
        self.may_end = may_end
        self.put_back = put_back
        disk = {"fsname": f"zramfs-disk:{config.name}", "subtype": "zramfs-disk", **self.mount_options()}
        self.disk = OwnMount(config.name, config.rundir / "disk", disk)
        tree = {"fsname": config.name, "subtype": "zramfs", **self.mount_options()}
        self.tree_mount = OwnMount(config.name, config.directory, tree)
        self.succession = Succession(config, line, inherited, notifier, self.disk, self.tree_mount)
        self.tree: TreeServer | None = None
        self.lane: Lane | None = None
        self.device: Device | None = None
        self.stop_event = trio.Event()  # of the trio loop that runs
        self.is_stopping = False
        self.is_ready = False
        self.restarts = 0  # of the loop
        self.reason = ""
        self.status = 0

    async def run(self) -> int:
        """Once, and again after trio's loop broke."""
        failure: Exception | None = None
        self.stop_event = trio.Event()
        async with trio.open_nursery() as nursery:
            try:
                if self.is_ready:
                    self.resume(nursery)
                elif self.inherited:
                    await self.take_over(nursery, self.inherited)
                else:
                    await self.start(nursery)
                while not self.is_stopping:
                    await self.stop_event.wait()
                log.info("%s: ending: %s", self.config.name, self.reason)
            except Exception as error:
                # What could not be taken over stays for the next process that tries.
                if self.is_ready and not self.is_stopping or self.inherited and not self.is_ready:
                    raise
                failure = error
            with trio.CancelScope(shield=True):
                if failure is not None:
                    await self.wait_until_unused()
                await self.shut_down()
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return self.status or (CUT_OFF if self.disk.failed or self.tree_mount.failed else 0)

    def can_go_on(self, error: BaseException) -> bool:
        """Whether run() may be called again after it raised this: the device was ready, the data is there,
        and there is something left to do for it."""
        if isinstance(error, (KeyboardInterrupt, SystemExit)) or not self.is_ready:
            return False
        self.restarts += 1
        return not self.is_stopping or self.restarts <= ENDS

    async def start(self, nursery: trio.Nursery) -> None:
        self.take_signals()
        await self.start_lane()
        await self.start_tree()
        helpers = self.start_tasks(nursery)
        await self.become_ready()
        self.start_notifier(nursery, helpers)

    async def take_over(self, nursery: trio.Nursery, inherited: Inherited) -> None:
        """The lane first: whoever does I/O waits for it."""
        config, kept, saved = self.config, inherited.kept, inherited.papers
        lane = Lane(kept.connection, threads=config.threads, poll_us=poll_us(), page=kept.page, takeover=True)
        self.device = Device(config, lane, kept.memory)
        await self.device.take_over(saved["settings"], kept.backing, inherited.mapped)
        lane.start()
        took = (time.monotonic() - inherited.since) * 1e3
        make_haste(False)
        self.take_signals()
        self.lane = lane
        self.is_ready = True
        self.disk.adopt(saved["disk"])
        self.tree_mount.adopt(saved["tree"])
        self.succession.begin(self.device, True)
        log.info("%s: the lane serves again, %.1f ms after its turn came", config.name, took)
        if lane.blamed:
            log.error("%s: %d requests were being worked on at three deaths in a row: they are answered with "
                      "an I/O error", config.name, lane.blamed)
        # Its mount died with the predecessor; serving it begins with a new one.
        self.tree = self.new_tree()
        self.start_notifier(nursery, self.start_tasks(nursery))
        await run_in_thread(self.tell_ready)
        if self.notifier:
            await self.notifier.tell("READY=1")

    def resume(self, nursery: trio.Nursery) -> None:
        self.device.resume()
        self.tree.resume()
        if not self.is_stopping:
            self.start_notifier(nursery, self.start_tasks(nursery))

    def take_signals(self) -> None:
        self.signals.start()
        self.write_stacks()

    def start_notifier(self, nursery: trio.Nursery, helpers: HelperTasks) -> None:
        if self.notifier:
            nursery.start_soon(
                helpers.keep_running, "notifier", self.notifier.watch, self.device, self.disk.path)

    def start_tasks(self, nursery: trio.Nursery) -> HelperTasks:
        helpers = HelperTasks(self.config.name, self.device.task_stats)
        for name, task, *arguments in (
            ("signals", self.watch_signals), ("tree", self.serve_tree), ("lane watch", self.watch_lane),
            ("error watch", watch_errors, self.device), ("log", watch_log, self.config.rundir / "log"),
            *self.device.background_tasks().items(), *self.succession.tasks(),
        ):
            nursery.start_soon(helpers.keep_running, name, task, *arguments)
        return helpers

    async def start_lane(self) -> None:
        config = self.config
        self.disk.path.touch(mode=0o600)
        fd = await self.disk.mount()
        try:
            kept = self.succession.prepare(fd)
            lane = Lane(fd, threads=config.threads, poll_us=poll_us(), page=kept.page if kept else -1)
        except BaseException:
            os.close(fd)
            raise
        self.device = Device(config, lane, kept.memory if kept else None)
        await self.device.start()
        lane.start()
        self.lane = lane

    async def start_tree(self) -> None:
        tree = self.new_tree()
        await tree.start()
        self.tree = tree

    def new_tree(self) -> TreeServer:
        assert self.device is not None  # start_lane() or take_over() came first
        return TreeServer(
            self.config.name, self.tree_mount, tree_of(self.device, self.disk.path),
            self.succession.tree_mounted)

    def mount_options(self) -> dict[str, str | bool]:
        return {"default_permissions": True, "allow_other": self.config.allow_other}

    async def become_ready(self) -> None:
        """Returns when everybody knows that the device is ready. Raises what makes the start fail."""
        for path in (self.disk.path, self.config.directory / "control"):
            await self.expect_answer(path)
        if self.is_stopping:
            raise ZramfsError(errno.EINTR, f"the device had to end before it was ready: {self.reason}")
        await run_in_thread(self.set_owner)
        await run_in_thread(self.tell_ready)
        assert self.device is not None
        self.succession.begin(self.device, self.lane.stats().can_resend)
        await run_in_thread(self.announce)
        self.is_ready = True
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
            os.chown(self.disk.path, *(-1 if each is None else each for each in (config.owner, config.group)))
        if config.mode is not None:
            os.chmod(self.disk.path, config.mode)

    async def expect_answer(self, path: Path) -> None:
        try:
            with trio.fail_after(ANSWER_TIMEOUT):
                await trio.to_thread.run_sync(os.stat, path, abandon_on_cancel=True)
        except trio.TooSlowError:
            reason = f"no answer for {ANSWER_TIMEOUT:g} s"
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            return
        raise ZramfsError(
            errno.EIO, f"{path} was mounted, but cannot be used: {self.lane.error or self.reason or reason}"
        )

    def order_end(self, reason: str) -> None:
        if not self.is_stopping:
            self.reason = reason
            self.is_stopping = True
        self.stop_event.set()

    async def ask_to_end(self, reason: str, *, is_order: bool) -> None:
        """Ends the device, unless may_end refuses. What is not a refusal (a ZramfsError), but an accident on
        the way to one, is tried again."""
        if not self.may_end or not self.is_ready:
            self.order_end(reason)
            return
        for pause in (*END_PAUSES, None):
            if self.is_stopping:
                return
            try:
                await run_in_thread(partial(self.may_end, is_order))
                await self.keep_image()
            except Exception as error:
                is_refusal = isinstance(error, ZramfsError)
                again = None if is_refusal else pause
                self.report_refusal(reason, error, again)
                if again is None:
                    return
                await trio.sleep(again)
            else:
                self.order_end(reason)

    async def keep_image(self) -> None:
        """Raises ZramfsError where the device cannot be saved into the image that it keeps, and has to go
        on."""
        try:
            await self.device.kept_image.save()
        except ZramfsError:
            put_back = self.put_back or (lambda: False)
            if await run_in_thread(put_back):
                await self.device.governor.take()
            raise

    def report_refusal(self, reason: str, error: Exception, again: float | None) -> None:
        """Without memory this can fail, and the device goes on all the same."""
        what = str(error) if isinstance(error, ZramfsError) else f"{type(error).__name__}: {error}"
        then = "" if again is None else f"; the next try is in {again:g} s"
        with contextlib.suppress(Exception):
            log.warning("%s: %s, but the device goes on: %s%s", self.config.name, reason, what, then)

    async def watch_signals(self) -> None:
        while True:
            name = (await self.signals.next_signal()).name
            if self.is_stopping:
                log.info("%s: %s: ending already", self.config.name, name)
            await self.ask_to_end(name, is_order=True)

    async def watch_lane(self) -> None:
        await wait_until_readable(self.lane.done_fd)
        if not self.lane.error and not self.disk.is_there():
            self.order_end(f"{self.disk.path} was unmounted")
        elif not self.is_stopping:
            self.status = FAILED
            self.order_end(f"the lane has ended: {self.lane.error or 'somebody aborted its connection'}")

    async def serve_tree(self) -> None:
        while True:
            await self.tree.serve()
            if self.is_stopping:
                return
            await self.ask_to_end(f"{self.config.directory} was unmounted", is_order=False)
            if self.is_stopping:
                return
            await self.tree.renew()

    async def wait_until_unused(self) -> None:
        """The start has failed. What was built on `disk` until then may be in use already, as a swap area
        is."""
        pauses = itertools.chain(END_PAUSES, itertools.repeat(END_PAUSES[-1]))
        while self.may_end and self.lane and self.lane.alive:
            try:
                await run_in_thread(partial(self.may_end, True))
                return
            except Exception as error:
                pause = next(pauses)
                self.report_refusal("the start has failed", error, pause)
            await trio.sleep(pause)

    async def shut_down(self) -> None:
        """Takes down whatever stands. Nothing that goes wrong in a step keeps the next from its work."""
        if self.notifier:
            status = f"STATUS=ending: {self.reason or 'the start failed'}"
            await self.attempt("telling the service manager", self.notifier.tell, "STOPPING=1", status)
        self.succession.end()
        if self.device:
            self.device.end_jobs()  # whoever waits for one is answered, and can let go of the tree
            await self.attempt(
                "letting the file system go", partial(self.device.governor.let_go, ends=True))
        if self.teardown and self.lane:
            await self.attempt("undoing what was built on disk", self.undo_top)
        await self.attempt("unmounting the tree", self.tree_mount.take_down)
        if self.tree:
            await self.attempt("ending the tree", self.tree.end)
        cut_off = await self.attempt("unmounting disk", self.disk.take_down)
        if self.lane:
            await self.attempt("ending the lane", self.end_lane, cut_off is not False)

    async def undo_top(self) -> None:
        assert self.teardown is not None
        for pause in END_PAUSES:
            try:
                return await run_in_thread(self.teardown)
            except Exception as error:
                self.report_refusal("undoing what was built on disk failed", error, pause)
            await trio.sleep(pause)
        await run_in_thread(self.teardown)

    async def attempt(self, what: str, step: Callable[..., Awaitable[T]], *arguments: object) -> T | None:
        """What the step returns; None, and a line in the log, if it fails."""
        try:
            return await step(*arguments)
        except Exception as error:
            self.status = FAILED
            # An error with a sentence of its own, or of a machine that runs short, needs no trace.
            trace = not isinstance(error, (OSError, MemoryError))
            with contextlib.suppress(Exception):
                log.error("%s: %s failed: %s", self.config.name, what, error or "no memory", exc_info=trace)
            return None

    async def end_lane(self, abort: bool) -> None:
        """abort: do not wait for its users."""
        if abort or not await run_in_thread(partial(self.lane.join, END_TIMEOUT)):
            # abort() returns when all requests under way are answered.
            await run_in_thread(self.lane.abort)
        await run_in_thread(self.lane.join)
        await self.device.close()


def poll_us() -> int:
    """On a single CPU whoever looks for a request keeps its sender from running."""
    return POLL_US if len(os.sched_getaffinity(0)) > 1 else 0
