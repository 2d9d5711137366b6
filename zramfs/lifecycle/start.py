# SPDX-License-Identifier: Apache-2.0
"""Bringing devices up: the order of the steps, and the way back from each."""
from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
from typing import NoReturn

from zramfs.errors import ZramfsError
from zramfs.host import detach, loops, watermark
from zramfs.lifecycle.stop import Say, clean_up, end_daemon, take_down_top
from zramfs.model.config import DeviceConfig

from . import images, ramdisk, rundir, swap
from .ramdisk import FileSystem
from .rundir import Rundir
from .serve import serve, serve_stored
from .swap import Swap

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
        timeout = detach.READY_TIMEOUT + images.time_to_restore(config)
        detach.run(lambda on_ready: serve(new, config, announce=on_ready), new.log, timeout)
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

    _expect_order(serve(new, config, build=on_ready, notifier=Notifier.from_environment()))


def resume_in_foreground(old: Rundir) -> bool:
    """Goes on with a device all of whose processes were killed, from what the service manager has kept of it,
    until it ends. False if that is nothing. Raises ZramfsError."""
    from zramfs.daemon.service import stored_descriptors  # brings trio

    status = serve_stored(old, stored_descriptors())
    _expect_order(status or 0)
    return status is not None


def _expect_order(status: int) -> None:
    if status:
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
        if not wanted.is_there:
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
