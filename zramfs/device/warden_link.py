# SPDX-License-Identifier: Apache-2.0
# Order of the trio locks: governor.py. WardenLink's own is the innermost.
"""The daemon's end of the line to its warden (host/warden.py)."""
from __future__ import annotations

import contextlib
import errno
import json
import subprocess
import sys
from typing import Any

import trio

from zramfs.errors import ZramfsError
from zramfs.host.process import WARDEN

# The warden's answer waits for a file system that may wait for its device; a start takes 0.1 s.
TIMEOUT = 30.0


class WardenLink:
    """One request at a time."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._lock = trio.Lock()
        self._pending = b""

    @classmethod
    async def start(cls) -> WardenLink:
        """Raises ZramfsError."""
        command = [sys.executable, "-m", WARDEN]
        try:
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            raise ZramfsError(
                error.errno or errno.EIO,
                f"`{' '.join(command)}` could not be started: {error.strerror}") from None
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, what: str, **arguments: object) -> dict[str, Any]:
        """Raises ZramfsError: what the warden could not do; EPIPE when it has ended, ETIMEDOUT."""
        request = json.dumps({"do": what, **arguments}).encode() + b"\n"
        async with self._lock:
            try:
                with trio.fail_after(TIMEOUT):
                    await self._process.stdin.send_all(request)
                    answer = json.loads(await self._line())
            except trio.TooSlowError:
                # A late answer would be taken for that to the next request.
                self._process.kill()
                raise ZramfsError(
                    errno.ETIMEDOUT, f"the warden did not {what} within {TIMEOUT:g} s") from None
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise ZramfsError(errno.EPIPE, "the warden has ended") from None
        if "error" in answer:
            raise ZramfsError(answer["errno"], answer["error"])
        return answer

    async def _line(self) -> bytes:
        while b"\n" not in self._pending:
            data = await self._process.stdout.receive_some(65536)
            if not data:
                raise trio.BrokenResourceError("end of file")
            self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    async def ended(self) -> None:
        """Returns when the warden has ended, which it does when nobody has the file system mounted."""
        await self._process.wait()

    def kill(self) -> None:
        self._process.kill()

    async def close(self, *, ends: bool = False) -> None:
        """Has the warden give everything back and end. ends: the device ends with it, so a file system that
        others have frozen is thawed."""
        with trio.CancelScope(shield=True):
            if not ends:
                with contextlib.suppress(ZramfsError):  # it has ended
                    await self.ask("let_go")
            await self._process.stdin.aclose()
            with trio.move_on_after(TIMEOUT):
                await self._process.wait()
            await self._process.stdout.aclose()
