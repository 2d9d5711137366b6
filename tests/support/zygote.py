# SPDX-License-Identifier: Apache-2.0
"""A process that has zramfs loaded and forks for each command of the command line.

Of the processor time of `zramfs create` and its daemon, nine tenths go into loading modules. Here they are
loaded once. A command gets what exec would give it: words, environment, directory, umask, standard files,
process group, signals as at the start of a program, and buffers of its own; it ends as the interpreter does.
It differs in this: its parent is the zygote, /proc has the zygote's command line, and its memory begins with
all modules, shared. So the tests of these things, of swap under load, and of the command line as a program
run the program itself: see FRESH in conftest.py.

The zygote ends with the process that started it, whose socket it reads.
"""
from __future__ import annotations

import array
import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from tests.support import leftovers
from tests.support.paths import python_environment

_LIMIT = 1 << 17  # bytes of a request: an environment of more than 100 KiB is sent nowhere here
# What a started interpreter and libc have made of these cannot be changed any more.
_AT_START = ("LANG", "LC_", "LD_", "PYTHON", "MALLOC", "GLIBC")


def _start_variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items()
            if name.startswith(_AT_START) and name != "PYTHONPATH"}


class Zygote:
    def __init__(self) -> None:
        self._variables = _start_variables(os.environ)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=python_environment(), cwd="/")
        leftovers.SPARED.add(self._process.pid)

    def serves(self, environment: Mapping[str, str]) -> bool:
        """Whether a command in this environment would see what it sees in a process of its own."""
        return _start_variables(environment) == self._variables and self._process.poll() is None

    def run(self, words: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """As subprocess.run() with captured text, without input. Raises subprocess.TimeoutExpired."""
        command = ["zramfs", *words]
        mask = os.umask(0)
        os.umask(mask)
        request = {"words": words, "environment": dict(os.environ), "directory": os.getcwd(), "umask": mask}
        # Surrogates stand for bytes of paths that are no UTF-8.
        text = json.dumps(request).encode()
        answer, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pipes = [os.pipe(), os.pipe()]
        try:
            with theirs, open(os.devnull, "rb") as null:
                descriptors = [theirs.fileno(), null.fileno(), *(write for _, write in pipes)]
                self._socket.sendmsg(
                    [text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])
        finally:
            for _, write in pipes:
                os.close(write)
        with answer:
            return _gather(command, answer, [read for read, _ in pipes], timeout)

    def end(self) -> None:
        self._socket.close()
        self._process.wait(60)


def _gather(
    command: list[str], answer: socket.socket, pipes: list[int], timeout: float
) -> subprocess.CompletedProcess[str]:
    """What the command says, to the end of both pipes, and how it ends."""
    end = time.monotonic() + timeout
    said: dict[int, list[bytes]] = {pipe: [] for pipe in pipes}
    pid, code = 0, None
    poll = select.poll()
    for each in (answer.fileno(), *pipes):
        poll.register(each, select.POLLIN)
    left = {answer.fileno(), *pipes}
    try:
        while left:
            if not (ready := poll.poll(max(0.0, end - time.monotonic()) * 1000)):
                if pid:
                    os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, timeout)
            for each, _ in ready:
                if each in said:
                    chunk = os.read(each, 1 << 16)
                    said[each].append(chunk)
                    over = not chunk
                else:
                    message = answer.recv(100)
                    assert message, f"the zygote ended before {command}"
                    pid, code = json.loads(message)
                    over = code is not None
                if over:
                    poll.unregister(each)
                    left.discard(each)
    finally:
        for pipe in pipes:
            os.close(pipe)
    out, err = (b"".join(said[pipe]).decode(errors="replace") for pipe in pipes)
    return subprocess.CompletedProcess(command, code, out, err)


fresh = False  # whether the present test runs the program itself; conftest.py says so
_zygote: Zygote | None = None
_lock = threading.Lock()


def zygote() -> Zygote | None:
    """That of this process, started at the first call; None where the program itself is to run. Not under a
    sanitizer either, whose threads may not come from a fork."""
    global _zygote
    if fresh or "LD_PRELOAD" in os.environ:
        return None
    with _lock:
        if _zygote is None:
            _zygote = Zygote()
    return _zygote if _zygote.serves(os.environ) else None


def end() -> None:
    global _zygote
    if _zygote is not None:
        _zygote.end()
        _zygote = None


# ---- the zygote's side ---------------------------------------------------------------------------------

def _load() -> None:
    """All that a command or its daemon may want; nothing of it starts a thread."""
    import importlib

    from zramfs import cli
    from zramfs.daemon import daemon, service  # noqa: F401

    for module, _ in cli._COMMANDS.values():
        importlib.import_module(f"zramfs.cli.{module}")
    for module in ("rich.live", "rich.table", "prometheus_client.openmetrics.parser", "subprocess", "shutil"):
        importlib.import_module(module)


def _become(request: dict, descriptors: list[int]) -> int:
    """In the child: what exec would have made of it, and then the command. Its exit status."""
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    os.umask(request["umask"])
    sys.argv = ["zramfs", *request["words"]]
    # An interpreter looks at its files once, and these are others.
    how = {"encoding": sys.stdout.encoding, "closefd": False}
    sys.stdin = os.fdopen(0, errors=sys.stdin.errors, **how)
    sys.stdout = os.fdopen(1, "w", errors=sys.stdout.errors, **how)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors=sys.stderr.errors, **how)

    from zramfs.cli import main

    try:
        sys.exit(main())
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # As at the end of an interpreter.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code


def _fork(request: dict, descriptors: list[int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = _become(request, descriptors)
    finally:
        os._exit(code)


def serve(requests: socket.socket) -> None:
    import gc

    gc.disable()
    _load()
    gc.freeze()  # or each child's first search for garbage would copy all that is shared
    gc.enable()
    awoken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, whose end is ours
    answers: dict[int, int] = {}
    while True:
        ready = select.select([requests, awoken], [], [])[0]
        if requests in ready:
            text, ancillary, _, _ = requests.recvmsg(_LIMIT, socket.CMSG_SPACE(4 * 4))
            if not text:
                return
            descriptors = array.array("i")
            descriptors.frombytes(ancillary[0][2])
            answer, *standard = descriptors
            pid = _fork(json.loads(text), standard)
            answers[pid] = answer
            os.write(answer, json.dumps([pid, None]).encode())
            for each in standard:
                os.close(each)
        if awoken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(awoken, 4096)
            _tell_ends(answers)


def _tell_ends(answers: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            answer = answers.pop(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(answer, json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode())
            os.close(answer)


if __name__ == "__main__":
    # A run of tests may have a thousand descriptors open, and select() ends at 1024. This one is low.
    with socket.socket(fileno=os.dup(int(sys.argv[1]))) as requests:
        os.close(int(sys.argv[1]))
        serve(requests)
