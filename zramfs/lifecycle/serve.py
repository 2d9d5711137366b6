# SPDX-License-Identifier: Apache-2.0
"""The process of a device: the first one, and each that takes over from one that died."""
from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from zramfs import __version__
from zramfs.errors import ZramfsError
from zramfs.host import limits, locks, mounts, process, safety
from zramfs.host.haste import make_haste
from zramfs.host.log import log_to_stderr
from zramfs.lifecycle.stop import clean_up, may_end, teardown
from zramfs.model.config import DeviceConfig

from . import remount, rundir
from .rundir import Rundir

if TYPE_CHECKING:
    from zramfs.daemon.keeper_line import Inherited, KeeperLine, LineSettings, MappedMemory, Place, Spare
    from zramfs.daemon.service import Notifier

log = logging.getLogger(__name__)

ORPHAN_PAUSE = 0.05  # seconds; a daemon without a keeper starts another one within a tenth of that


class _Forked(BaseException):
    """Raised in a process that was just forked, up to where it begins to wait: each generation would keep the
    stack of the one before it, and the three hundredth would have none left."""

    def __init__(self, place: Place, config: DeviceConfig) -> None:
        self.place = place
        self.config = config


def _load_daemon() -> ModuleType:
    """It brings trio and pyfuse3, which only the daemon needs. Nothing of it is garbage, as in zramfs.cli."""
    gc.disable()
    try:
        from zramfs.daemon import daemon

        return daemon
    finally:
        gc.freeze()
        gc.enable()


def serve(
    new: Rundir, config: DeviceConfig, *, build: Callable[[], None] = lambda: None,
    announce: Callable[[], None] = lambda: None, notifier: Notifier | None = None,
) -> int:
    """Serves the claimed device. The caller's process becomes its keeper, and this returns in a child of it,
    when the device has ended: see daemon.serve_device(). build: makes what stands on `disk`. To be
    called while the process has one thread."""
    daemon = _load_daemon()
    from zramfs.daemon.keeper_line import KeeperLine

    safety.enter_keeper()
    line = KeeperLine.fork(_line_settings(new, config))
    status = daemon.FAILED
    try:
        _enter(new, config)
        if place := _fork_standby(config, line):
            _stand_by(new, place, config)
        new.update(partial(_pids, line))

        def ready() -> None:
            _become_resident(config)
            if _note_tree(new, config).kind == "device":
                new.update(phase="ready")
            build()

        status = daemon.serve_device(
            config, ready, partial(teardown, new), _end_asker(new), notifier=notifier, line=line,
            announce=announce, put_back=partial(remount.put_back, new))
        return status
    finally:
        _clean_up(new, status == daemon.FAILED)


def serve_stored(new: Rundir, fds: dict[str, int]) -> int | None:
    """Takes over what a service manager has kept of processes that all died. As serve(); None, and the
    descriptors are closed, when there is nothing to take over."""
    from zramfs.daemon.keeper_line import Inherited, KeeperLine, Kept
    from zramfs.daemon.papers import unpacked_config

    needed = {"connection", "page", "papers", "memory"}
    kept = Kept(**fds) if needed <= fds.keys() <= needed | {"backing"} else None
    inherited = Inherited.of(kept.fds()) if kept else None
    if inherited is None or not inherited.papers or not new.path.is_dir():
        for fd in fds.values():
            os.close(fd)
        return None
    config = unpacked_config(inherited.papers["config"])
    safety.enter_keeper()
    line = KeeperLine.fork(_line_settings(new, config))
    _make_safe(new, config)
    try:
        return _take_over(new, inherited, line)
    except _Forked as forked:
        _stand_by(new, forked.place, forked.config)


def successor_command(new: Rundir) -> list[str]:
    """Starts a process that takes over, or stands by, with the libraries of this one."""
    return [*_python("from zramfs.lifecycle.serve import succeed; succeed()"), os.fspath(new.path)]


def trial_command() -> list[str]:
    """Loads all that a successor loads, and ends."""
    return _python("from zramfs.daemon import daemon, keeper_line, layouts")


def _python(code: str) -> list[str]:
    return [sys.executable, "-I", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]


def succeed() -> NoReturn:
    """The process that the keeper has started: waits for its turn, and takes over."""
    from zramfs.daemon import daemon  # noqa: F401 (everything is loaded before the turn comes)
    from zramfs.daemon.keeper_line import Place

    log_to_stderr()
    _stand_by(Rundir(Path(sys.argv[1])), Place.of_keeper(), None)


def _stand_by(new: Rundir, place: Place, config: DeviceConfig | None) -> NoReturn:
    """config: None in a process that has not made its settings yet."""
    status: int | None = None
    try:
        while status is None:
            try:
                status = _wait_and_take_over(new, place, config)
            except _Forked as forked:
                place, config = forked.place, forked.config
    except BaseException as error:
        log.error("taking over %s failed: %s", new.path, error, exc_info=error)
    finally:
        logging.shutdown()
        os._exit(1 if status is None else status)


def _wait_and_take_over(new: Rundir, place: Place, config: DeviceConfig | None) -> int:
    """The status to end with. Raises _Forked in another process."""
    from zramfs.daemon.keeper_line import Inherited, KeeperLine, Kept, MappedMemory
    from zramfs.daemon.papers import unpacked_config

    mapped = MappedMemory()
    spare: Spare | None = None

    def prepare(kept: list[int]) -> None:
        nonlocal config
        if config is None:
            papers = Inherited.of(kept).papers
            _expect_readable(papers)
            config = unpacked_config(papers["config"])
            _make_safe(new, config)

    def look(kept: list[int]) -> None:
        nonlocal spare
        if not kept:  # it waits beside the standby of another version, which has its place
            return
        make_haste(False)
        assert config is not None  # prepare() comes first
        if spare is None and _may_fork(config):
            spare = _fork_spare(place, config, mapped)
        mapped.look(Kept(*kept).memory)
        make_haste(True)

    if config is not None and _is_locked(config):
        _make_safe(new, config)  # a fork inherits all settings but the locks
    make_haste(True)
    turn = place.wait_turn(prepare, look)
    fds, keeper = turn or place.orphaned()
    if not fds or turn is None and not _is_last(new, keeper.pid):
        return 0
    inherited = Inherited.of(fds)
    if not inherited.papers:  # it has ended in order
        return 0
    inherited.mapped = mapped
    config = config or unpacked_config(inherited.papers["config"])
    return _take_over(new, inherited, KeeperLine(keeper, _line_settings(new, config)), spare)


def _may_fork(config: DeviceConfig) -> bool:
    """A fork makes this process need memory where it writes to its own: not for swap, which has to give some
    just then. One that is locked would be there twice at once."""
    return not _is_locked(config)


def _is_locked(config: DeviceConfig) -> bool:
    return config.lock or config.reserve > 0


def _fork_spare(place: Place, config: DeviceConfig, mapped: MappedMemory) -> Spare | None:
    """Here and not in the pause: a fork takes 3 ms of CPU time, and 20 to 120 ms on a machine with 14 busy
    programs on two CPUs."""
    from zramfs.daemon.keeper_line import Place

    try:
        forked = place.fork_spare()
    except OSError:  # the next look tries again
        return None
    if isinstance(forked, Place):
        mapped.drop()  # it is the parent's, and there are no page tables for it here
        raise _Forked(forked, config)
    return forked


def _expect_readable(papers: dict[str, Any]) -> None:
    """Of a predecessor that may be of another version, since its keeper starts whatever is installed by then.
    Raises ZramfsError."""
    from zramfs.daemon.layouts import refusal

    if reason := refusal(papers.get("layouts", {})):
        raise ZramfsError(errno.EOPNOTSUPP, reason)


def _is_last(new: Rundir, keeper_pid: int) -> bool:
    """Whether the daemon dies as its keeper did. False once it has started another keeper, or has ended. Each
    of the two has the run directory locked."""
    while locks.holders(new.path):
        state = new.read()
        if state is None or state.keeper_pid not in (0, keeper_pid):
            return False
        time.sleep(ORPHAN_PAUSE)
    return new.path.is_dir()


def _take_over(new: Rundir, inherited: Inherited, line: KeeperLine, spare: Spare | None = None) -> int:
    """Raises _Forked in another process."""
    from zramfs.daemon import daemon
    from zramfs.daemon.papers import unpacked_config
    from zramfs.daemon.service import Notifier

    config = unpacked_config(inherited.papers["config"])
    rundir.keep(new)
    # For swap the keeper starts one later.
    if not config.reserve and not (spare and line.register_spare(spare)) and (
            place := _fork_standby(config, line)):
        inherited.mapped.drop()  # it is the parent's, and there are no page tables for it here
        raise _Forked(place, config)
    told = inherited.papers["notifier"]

    def ready() -> None:
        _become_resident(config)
        new.update(partial(_pids, line))

    status = daemon.serve_device(
        config, ready, partial(teardown, new), _end_asker(new), notifier=Notifier(*told) if told else None,
        line=line, inherited=inherited, put_back=partial(remount.put_back, new))
    _clean_up(new, status == daemon.FAILED)
    return status


def _own_pid() -> dict[str, Any]:
    """For the state, as the next two."""
    from zramfs.daemon.layouts import LAYOUTS

    return {"pid": os.getpid(), "pid_start": process.process_start(os.getpid()),
            "release": __version__, "layouts": LAYOUTS, "said_by": os.getpid()}


def _pids(line: KeeperLine) -> dict[str, Any]:
    keeper, standby = line.pids
    return {**_own_pid(), "keeper_pid": keeper, "standby_pid": standby}


def _line_settings(new: Rundir, config: DeviceConfig) -> LineSettings:
    from zramfs.daemon.keeper_line import LineSettings

    def note_pids(keeper: int, standby: int) -> None:
        new.update(keeper_pid=keeper, standby_pid=standby)

    return LineSettings(
        new.path, successor_command(new), _wants_standby(config), note_pids, partial(_note_tree, new, config))


def _wants_standby(config: DeviceConfig) -> bool:
    """What serves swap always has one."""
    return config.standby or config.reserve > 0


def _fork_standby(config: DeviceConfig, line: KeeperLine) -> Place | None:
    """Its place in the process that stands by, and None here."""
    return line.fork_standby() if _wants_standby(config) else None


def _enter(new: Rundir, config: DeviceConfig) -> None:
    """Raises ZramfsError."""
    rundir.keep(new)
    new.update(**_own_pid())
    limits.lift_file_size()
    state = new.read()
    if state and state.kind == "swap" and not config.reserve and not config.forced:
        raise ZramfsError(
            errno.EINVAL, "swap needs a reserve of ready memory: expected at least 2M, got 0")
    # Now that all code is loaded, and before there are threads and a store.
    log_to_stderr()
    new.update(notes=_make_safe(new, config))


def _make_safe(new: Rundir, config: DeviceConfig) -> list[str]:
    state = new.read()
    return safety.enter(state.kind if state else "device", force=config.forced, lock=config.lock)


def _become_resident(config: DeviceConfig) -> None:
    if config.reserve:
        safety.populate()
    elif refusal := safety.lock_private():
        log.info("the memory of the server is not locked, and can be swapped out: %s", refusal)


def _note_tree(new: Rundir, config: DeviceConfig) -> rundir.State:
    tree = mounts.mount_at(config.directory)
    return new.update(tree_dev=tree.dev if tree else None)


def _end_asker(new: Rundir) -> Callable[[bool], None]:
    return lambda is_order: may_end(new, is_order=is_order)


def _clean_up(new: Rundir, has_failed: bool) -> None:
    with rundir.locked(new.path.parent):
        state = new.read()
        # The reason of a start that fails is told to whoever started it.
        clean_up(new, state, keep_log=has_failed and state is not None and state.phase == "ready")
