# SPDX-License-Identifier: Apache-2.0
"""Bringing devices up: the order of the steps, and the way back from each."""
from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from zramfs.errors import ZramfsError
from zramfs.host import detach, limits, loops, mounts, process, safety, watermark
from zramfs.host.log import log_to_stderr
from zramfs.lifecycle.stop import Say, clean_up, end_daemon, may_end, take_down_top, teardown
from zramfs.model.config import DeviceConfig

from . import ramdisk, rundir, swap
from .ramdisk import FileSystem
from .rundir import Rundir
from .swap import Swap

if TYPE_CHECKING:
    from zramfs.daemon.service import Notifier

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

OnTop = FileSystem | Swap | None


def start_device(new: Rundir, config: DeviceConfig, on_top: OnTop = None, say: Say | None = None) -> None:
    """Brings the claimed device up, and the file system or the swap area on top of it.

    Returns when all of it is ready. On any failure, and on SIGINT, SIGTERM and SIGHUP, nothing is
    left. To be called while the process has one thread. Raises ZramfsError; SystemExit on a signal.
    """
    for number in _SIGNALS:
        signal.signal(number, _leave)
    try:
        detach.run(lambda on_ready: _serve(new, config, on_ready), new.log)
        _build(new, on_top, say)
        # A signal that comes now is too late: the device is there, and the exit status must say so.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    except BaseException:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _abandon(new)
        raise


def serve_in_foreground(new: Rundir, config: DeviceConfig, say: Say, on_top: OnTop = None) -> None:
    """Serves the claimed device in this very process until it ends, and tells a service manager about
    it that wants to know. Raises ZramfsError."""
    from zramfs.daemon.service import Notifier  # brings trio


    def on_ready() -> None:
        _build(new, on_top, say)
        if state := new.read():
            say(f"{state.where} is ready")

    if _serve(new, config, on_ready, Notifier.from_environment()):
        raise ZramfsError(errno.EIO, "the device did not end in order; what happened is in the lines above")


def _leave(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _build(new: Rundir, wanted: OnTop, say: Say | None) -> None:
    """Each step stands in the state or in the kernel's tables before the next, for take_down_top()."""
    if say and (state := new.read()):
        for note in state.notes:
            say(f"note: {note}")
    if wanted is None:
        return
    device = loops.attach(new.disk)
    attached = loops.sequence(device)
    if isinstance(wanted, FileSystem):
        new.update(loop=device, attached=attached, fs=wanted.type, options=wanted.options)
        ramdisk.make_file_system(wanted.type, device, wanted.label, wanted.mkfs)
        ramdisk.mount(wanted, device)
        ramdisk.govern(new.tree)
    else:
        new.update(loop=device, attached=attached)
        if (raised := _raise_watermark(new, wanted)) and say:
            say(f"note: {raised}")
        swap.make(device)
        swap.on(device, wanted)
    new.update(phase="ready")


def _raise_watermark(new: Rundir, wanted: Swap) -> str | None:
    try:
        return watermark.raise_to(
            new.path, watermark.needed() if wanted.min_free is None else wanted.min_free)
    except ZramfsError as error:
        if not wanted.force:
            raise
        return str(error)


def _abandon(new: Rundir) -> None:
    """Takes down what is there of a device that did not come up. The failure that led here is the
    one to report, so whatever fails in here is left for `stop`."""
    with contextlib.suppress(OSError):
        state = new.read()
        if state is not None and state.alive() and state.pid != os.getpid():
            take_down_top(new, state)
            end_daemon(state)
        with rundir.locked(new.path.parent):
            clean_up(new, state)


def _load_daemon() -> ModuleType:
    """It brings trio and pyfuse3, which only the daemon needs. Nothing of it is garbage, as in zramfs.cli."""
    gc.disable()
    try:
        from zramfs.daemon import daemon

        return daemon
    finally:
        gc.freeze()
        gc.enable()


def _serve(
    new: Rundir, config: DeviceConfig, on_ready: Callable[[], None], notifier: Notifier | None = None
) -> int:
    daemon = _load_daemon()

    def ready() -> None:
        if config.reserve:
            safety.populate()
        elif refusal := safety.lock_private():
            log.info("the memory of the server is not locked, and can be swapped out: %s", refusal)
        tree = mounts.mount_at(config.directory)
        state = new.update(tree_dev=tree.dev if tree else None)
        if state.kind == "device":
            new.update(phase="ready")
        on_ready()

    rundir.keep(new)
    new.update(pid=os.getpid(), pid_start=process.process_start(os.getpid()))
    status = daemon.FAILED
    try:
        limits.lift_file_size()
        state = new.read()
        if state and state.kind == "swap" and not config.reserve and not config.forced:
            raise ZramfsError(
                errno.EINVAL, "swap needs a reserve of ready memory: expected at least 2M, got 0")
        # Now that all code is loaded, and before there are threads and a store.
        log_to_stderr()
        kind = state.kind if state else "device"
        new.update(notes=safety.enter(kind, force=config.forced, lock=config.lock))
        status = daemon.serve_device(
            config, ready, lambda: teardown(new), lambda is_order: may_end(new, is_order=is_order), notifier)
        return status
    finally:
        with rundir.locked(new.path.parent):
            state = new.read()
            # The reason of a start that fails is told to whoever started it.
            failed = status == daemon.FAILED and state is not None and state.phase == "ready"
            clean_up(new, state, keep_log=failed)
