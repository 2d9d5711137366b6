# SPDX-License-Identifier: Apache-2.0
"""TAB in bash, zsh and fish, on a terminal, with the scripts that are shipped."""
from __future__ import annotations

import os
import pty
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from tests.support.capabilities import require
from tests.support.paths import ROOT, python_path
from tests.support.whole import MIB, device
from zramfs.cli import completion
from zramfs.cli import zramfs as group
from zramfs.cli.status import COLUMNS
from zramfs.device.commands import COMMANDS

SCRIPTS = ROOT / "completions"
TAB = "\t"
SECONDS = 60.0
# How a shell is started without anybody's settings, and takes the script as its installation would.
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "bind 'set bell-style none'; . {scripts}/zramfs"),
    "zsh": (
        ["zsh", "-f", "-i"],
        "unsetopt beep prompt_cr prompt_sp; fpath=({scripts} $fpath); autoload -Uz compinit; compinit -u -D",
    ),
    "fish": (["fish", "--no-config", "-i"], "source {scripts}/zramfs.fish"),
}


class Terminal:
    """A shell on a terminal of its own. `zramfs` there is ours when it is asked for completions, and
    else writes its arguments down instead of doing anything."""

    def __init__(self, shell: str, home: Path) -> None:
        command, setup = SHELLS[shell]
        self.told = home / "told"
        program = home / "bin/zramfs"
        program.parent.mkdir()
        ours = shlex.join([sys.executable, "-m", "zramfs.cli"])
        program.write_text(
            f'#!/bin/sh\n[ -z "$_ZRAMFS_COMPLETE" ] || exec {ours} "$@"\n'
            f'printf "%s\\n" "$@" >{self.told}.new && mv {self.told}.new {self.told}\n'
        )
        program.chmod(0o755)
        environment = {
            **os.environ,
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home),
            "XDG_DATA_HOME": str(home),
            "TERM": "dumb",
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": python_path(),
        }
        self.seen = ""
        self.fd, end = pty.openpty()
        # fish does not start on a terminal that is not its controlling one.
        self.shell = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=end, stdout=end, stderr=end, env=environment, cwd=home
        )
        os.close(end)
        # The text as typed has quotes in it, so only its output can match.
        self.type(f"{setup.format(scripts=SCRIPTS)}; echo rea''dy\n")
        try:
            self.expect(lambda: "ready" in self.seen, "the shell has started")
        except BaseException:
            self.end()
            raise

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def expect(self, condition, what: str) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"not within {SECONDS:g} s: {what}; on the terminal:\n{self.seen}"
            if select.select([self.fd], [], [], 0.02)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")

    def arguments(self, line: str) -> list[str]:
        """What zramfs gets as arguments after somebody types `line`, TABs in it, and Enter."""
        self.told.unlink(missing_ok=True)
        self.type(f"{line}\n")
        self.expect(self.told.exists, line)
        return self.told.read_text().splitlines()

    def end(self) -> None:
        self.shell.kill()
        self.shell.wait(SECONDS)
        os.close(self.fd)


@pytest.fixture(params=SHELLS)
def terminal(request: pytest.FixtureRequest, tmp_path: Path):
    require(request.param)
    terminal = Terminal(request.param, tmp_path)
    try:
        yield terminal
    finally:
        terminal.end()


@pytest.mark.requires("fuse")
def test_tab_completes_commands_options_columns_and_devices(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert terminal.arguments(f"zramfs stat{TAB} -o NAME,DA{TAB}") == ["status", "-o", "NAME,DATA"]
    assert terminal.arguments(f"zramfs ram{TAB} --fs xf{TAB} --mem{TAB} 1G") == [
        "ramdisk",
        "--fs",
        "xfs",
        "--mem-limit",
        "1G",
    ]
    (tmp_path / "a-directory").mkdir()
    assert terminal.arguments(f"zramfs create a-dir{TAB} --algo zs{TAB}")[1:] in (
        ["a-directory/", "--algo", "zstd"],
        ["a-directory", "--algo", "zstd"],
    )
    with device(tmp_path / "z0", MIB):
        place = str(tmp_path / "z0")
        assert terminal.arguments(f"zramfs stop {place[:-1]}{TAB}") == ["stop", place]
        # No blank comes after a command that wants a value.
        assert terminal.arguments(f"zramfs control {place} mem_l{TAB}2G compact=obj{TAB}") == [
            "control",
            place,
            "mem_limit=2G",
            "compact=objects",
        ]


def offered(complete: completion.Complete, incomplete: str) -> list[str]:
    return [item.value for item in complete(None, None, incomplete)]  # type: ignore[arg-type]


def test_a_list_is_completed_at_its_end_without_what_is_in_it() -> None:
    complete = completion.list_of(COLUMNS)
    assert offered(complete, "") == list(COLUMNS)
    assert offered(complete, "mem-u") == ["MEM-USED"]
    assert offered(complete, "+MEM-U") == ["+MEM-USED"]
    assert offered(complete, "NAME,+") == []
    rest = offered(complete, "+name,DATA,")
    assert rest == [f"+name,DATA,{name}" for name in COLUMNS if name not in ("NAME", "DATA")]


def test_every_command_of_control_is_offered() -> None:
    lines = offered(completion.commands, "")
    assert {line.partition("=")[0] for line in lines} == set(COMMANDS)
    for name, command in COMMANDS.items():
        assert (name in lines) == (command.argument is None or command.optional)
    assert offered(completion.commands, "compact=o") == ["compact=objects"]


def test_devices_are_offered_by_name_only_when_one_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    with device(tmp_path / "z0", MIB):
        place = str(tmp_path / "z0")
        name = os.listdir(tmp_path / "run")[0]
        assert offered(completion.devices, "") == [place]
        assert offered(completion.devices, name[:5]) == [name]
        assert [item.type for item in completion.devices(None, None, "./z")] == ["dir"]  # type: ignore[arg-type]


def test_every_argument_of_every_command_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for names that are new."""
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    (tmp_path / "etc/zramfs").mkdir(parents=True)
    (tmp_path / "etc/zramfs/fast.conf").write_text("")
    whole = click.Context(group)
    for name, command in group.commands.items():
        context = click.Context(command, parent=whole)
        for parameter in command.params:
            if isinstance(parameter, click.Argument) and not command.hidden and name != "swap":
                assert parameter.shell_complete(context, ""), f"{name} {parameter.name}"


def test_configured_devices_are_offered_and_then_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    (tmp_path / "etc/zramfs").mkdir(parents=True)
    (tmp_path / "etc/zramfs/fast.conf").write_text("[fast]\n")
    assert offered(completion.configured, "") == ["fast"]
    assert offered(completion.configured_or_files, "f") == ["fast"]
    assert [item.type for item in completion.configured_or_files(None, None, "./x")] == ["file"]  # type: ignore[arg-type]
