# SPDX-License-Identifier: Apache-2.0
"""zramfs top on real devices: in a terminal of 80 x 24, and where there is none."""
from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pyte
import pytest

from tests.support.child import stopped
from tests.support.commands import failure, kill_daemon, state_of
from tests.support.whole import MIB, ZRAMFS, Device, device, opened, run, zramfs

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]
SECONDS = 60  # for whatever a screen is waited for


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run directories of this test alone."""
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def writing(made: Device) -> Iterator[None]:
    """4 KiB writes, one after the other, meanwhile."""
    over = threading.Event()

    def work() -> None:
        with opened(made.disk) as fd:
            while not over.wait(0.002):
                os.pwrite(fd, os.urandom(2048).ljust(4096, b"z"), 4096 * int.from_bytes(os.urandom(1)))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Terminal:
    """`zramfs top` with a terminal of its own, and what is to be seen there."""

    def __init__(self, *words: object, columns: int = 80, lines: int = 24) -> None:
        self._master, self.slave = pty.openpty()
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.resize(columns, lines)
        self.modes = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [*ZRAMFS, "top", *map(str, words)], stdin=self.slave, stdout=self.slave, stderr=self.slave,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def see(self, pattern: str, seconds: float = SECONDS) -> re.Match[str]:
        """Waits until `pattern` is on the screen."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            left = end - time.monotonic()
            if left <= 0 or not self._take(left):
                pytest.fail(f"no {pattern!r} on the screen in time:\n{self.text}")
        return found

    def _take(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        chunk = os.read(self._master, 65536)
        self.raw += chunk
        self._stream.feed(chunk)
        return True

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def end(self, how: Callable[[], None]) -> int:
        """Its exit status after how(), with the terminal as it was before."""
        how()
        end = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            self._take(0.05)
        status = self.process.wait(SECONDS)
        while self._take(0):
            pass
        assert termios.tcgetattr(self.slave) == self.modes
        assert self.raw.rindex(b"\x1b[?1049l") > self.raw.rindex(b"\x1b[?1049h"), "the other screen is left"
        assert self.raw.rindex(b"\x1b[?25h") > self.raw.rindex(b"\x1b[?25l"), "the cursor is back"
        assert b"Traceback" not in self.raw
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self.slave)


@contextmanager
def top(*words: object, **how: int) -> Iterator[Terminal]:
    terminal = Terminal(*words, **how)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Device]:
    with device(tmp_path / "z", 16 * MIB, "--mem-limit", "8M") as made:
        yield made


def test_a_screen_of_80_by_24(made: Device) -> None:
    with top(made.directory, "--interval", "0.2") as terminal, writing(made):
        terminal.see(r"\nwrite +[1-9][\d.]* +[\d.]+ ")
        terminal.see(r"<= [\d.]+ us [█▏]")
        for line, words in ((0, state_of(made.directory).name[-6:]), (0, "ready"), (1, "lz4   size 16M"),
                            (3, "requests"), (8, "time they took"), (8, "I/O "), (9, "ratio "),
                            (10, "memory "), (11, "compaction"), (18, "full up to"), (22, "errors none"),
                            (23, "q quits")):
            # Waited for: what is there may be half of a new screen.
            terminal.see(rf"^(?:.*\n){{{line}}}.*{re.escape(words)}")
        terminal.see(r"of 8M \(\d+ %\)")
        terminal.resize(120, 40)
        terminal.process.send_signal(signal.SIGWINCH)
        terminal.see(r"^(?:.*\n){8}I/O .* ratio .* memory (?:.*\n)+.*class  objects(?:.*\n)+every .* q quits")
        assert terminal.end(lambda: terminal.press(b"q")) == 0


def test_it_lives_through_what_becomes_of_a_device(tmp_path: Path, made: Device) -> None:
    state = state_of(made.directory)
    with top(made.directory, "-i", "0.2") as terminal:
        terminal.see(r"ready\n")
        with stopped(state.pid, 60):
            terminal.see(r"no answer for \d+ s")
            terminal.see("lz4   size 16M")  # as it was
        terminal.see(r"ready\n")
        made.write("zram/reset", "1")
        terminal.see("not set up: it has no size yet")
        made.write("zram/disksize", "4M")
        terminal.see("size 4M")
        kill_daemon(state)
        terminal.see(r"The daemon is dead, and its data is lost\. `zramfs stop\s+/")
        zramfs("stop", made.directory)
        zramfs("create", made.directory, "--size", "2M")
        terminal.see(r"ready\nlz4   size 2M")
        assert terminal.end(lambda: terminal.press(b"\x03")) == 0


def test_devices_come_and_are_chosen(tmp_path: Path) -> None:
    with top("-i", "0.2") as terminal:
        terminal.see("No zramfs device of yours is there")
        with device(tmp_path / "first", MIB), device(tmp_path / "second", 2 * MIB):
            terminal.see(r"> .*-first .*ready")
            terminal.see(r"  .*-second .*ready")
            terminal.see("size 1M")
            terminal.press(b"\x1b[B")
            terminal.see(r"> .*-second .*ready")
            terminal.see("size 2M")
            terminal.press(b"k")
            terminal.see("size 1M")
            assert terminal.end(lambda: terminal.process.send_signal(signal.SIGTERM)) == 128 + signal.SIGTERM


def test_many_devices_a_dead_one_keys_and_a_terminal_that_changes_its_size(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(device(tmp_path / f"d{n}", (n + 1) * MIB)) for n in range(6)]
        with opened(made[4].disk) as fd:
            os.pwrite(fd, os.urandom(200 * 4096), 0)
        kill_daemon(state_of(made[0].directory))
        with top("-i", "0.2") as terminal:
            terminal.see(r"-d0 .* dead")
            terminal.see("No figures have come from it yet|The daemon is dead")
            terminal.press(b"d")
            terminal.see(r"device .* data v .*\n> +\S*-d4 ")
            terminal.see(r"\S+-d4 on .*\nlz4   size 5M   data 800K")
            for columns, lines, seen in (
                (120, 40, rf"on .* limit .*\n(?:.*\n)+.*{made[4].directory} (?:.*\n)+I/O .* ratio .* memory"),
                (200, 50, r"on .* rMiB/s .*\n(?:.*\n)*> +\S+-d4 +\S+/d4 (?:.*\n)+.*class  objects"),
                (60, 14, r"read/s .*\n(?:.*\n)*> +\S+-d4 .*\n(?:.*\n)+errors none"),
                (80, 24, r"read/s .*\n(?:.*\n)*\S+-d4 on .*\nlz4 (?:.*\n)+time they took.* I/O .*\n.* ratio"),
            ):
                terminal.resize(columns, lines)
                terminal.process.send_signal(signal.SIGWINCH)
                terminal.see(rf"^ +device +{seen}(?:.*\n)*every 0\.2 s   q quits")
                assert len(terminal.screen.display) == lines
            terminal.press(b"?")
            terminal.see(r"^keys *\n(?:.*\n)+red +90 % of its limit")
            terminal.press(b"?")
            terminal.press(b"g")
            terminal.see(r"discard .*\n(?:.*\n)?I/O .*\n(?:.*\n)+ratio .*\n(?:.*\n)+memory ")
            assert terminal.end(lambda: terminal.press(b"q")) == 0


def test_stopped_and_continued(made: Device) -> None:
    with top(made.directory, "-i", "0.2") as terminal:
        terminal.see("ready")
        terminal.press(b"\x1a")
        end = time.monotonic() + SECONDS
        while "T" not in Path(f"/proc/{terminal.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]:
            assert time.monotonic() < end
            terminal._take(0.02)
        assert termios.tcgetattr(terminal.slave) == terminal.modes
        terminal.screen.reset()
        terminal.process.send_signal(signal.SIGCONT)
        terminal.see("ready")
        assert terminal.end(lambda: terminal.press(b"q")) == 0


def test_no_colour(made: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = rb"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d)[;m]"
    with top(made.directory, "--count", "2", "-i", "0.1") as terminal:
        assert terminal.end(lambda: None) == 0
        assert re.search(colours, terminal.raw)
    monkeypatch.setenv("NO_COLOR", "1")
    with top(made.directory, "--count", "2", "-i", "0.1") as terminal:
        assert terminal.end(lambda: None) == 0
        assert b"ready" in terminal.raw and not re.search(colours, terminal.raw)


def test_lines_where_there_is_no_terminal(made: Device) -> None:
    with writing(made):
        for _ in range(20):  # a busy machine may let the writer wait for longer than an interval
            done = zramfs("top", made.directory, "--interval", "0.3", "--count", "3")
            heading, *lines = done.stdout.splitlines()
            if all(line.split()[2] != "0" for line in lines):
                break
    assert done.stderr == "" and len(lines) == 3
    assert heading.split() == [
        "time", "read/s", "write/s", "rMiB/s", "wMiB/s", "r99%", "w99%", "data", "memory", "ratio", "errors"
    ]
    for line in lines:
        assert len(line) == len(heading)
        clock, reads, writes, _, _, _, slow, data, memory, ratio, errors = line.split()
        assert abs(datetime.fromisoformat(clock).timestamp() - time.time()) < 60
        assert reads == "0" and 0 < float(writes) < 1000
        assert re.fullmatch(r"[\d.]+(us|ms)", slow) and re.fullmatch(r"[\d.]+[KM]", data) and errors == "0"
        assert float(ratio) > 1


def test_lines_on_a_dumb_terminal(made: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with top(made.directory, "--interval", "0.1", "--count", "2") as terminal:
        assert terminal.process.wait(SECONDS) == 0
        while terminal._take(0.1):
            pass
        assert b"\x1b" not in terminal.raw and terminal.raw.count(b"\n") == 3


def test_a_reader_that_leaves(made: Device) -> None:
    done = run("sh", "-c", '"$@" top -i 0.1 | head -n 2', "sh", *ZRAMFS, env=dict(os.environ))
    assert (done.stderr, done.stdout.count("\n")) == ("", 2)


def test_lines_of_a_device_that_dies(made: Device) -> None:
    state = state_of(made.directory)
    process = subprocess.Popen(
        [*ZRAMFS, "top", made.directory, "-i", "0.1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert "time" in process.stdout.readline()
        assert "ratio" not in process.stdout.readline()
        kill_daemon(state)
        for line in process.stdout:
            if f"{state.name}: The daemon is dead" in line:
                break
            assert "Traceback" not in line
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
        assert "Traceback" not in process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_what_is_refused(tmp_path: Path) -> None:
    assert f"no zramfs device of yours is on {tmp_path}" in failure("top", tmp_path)
    for words in (["--interval", "0"], ["--interval", "fast"], ["--count", "0"]):
        assert "Invalid value" in failure("top", *words, code=2)
