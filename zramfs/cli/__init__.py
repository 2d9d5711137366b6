# SPDX-License-Identifier: Apache-2.0
"""The command line. A command's module is imported when the command is wanted, and nothing imports trio,
pyfuse3 or rich before a command needs it."""
from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import io
import os
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from types import ModuleType
from typing import Any

import click

from zramfs.errors import ZramfsError

from .output import say
from .version import version

# What a login shell would have. mount(8) starts its helpers without PATH.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# How the scripts in completions/ ask; click takes the name from that of the program.
_COMPLETE = "_ZRAMFS_COMPLETE"

_SENTENCE = 500  # characters: more than the first sentence of any help has

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT; 143 and 129 are those of SIGTERM and SIGHUP


# Where each command is, in the order of a device's life.
_COMMANDS = {
    "create": ("create", "create"),
    "ramdisk": ("create", "ramdisk"),
    "swap": ("swap", "swap"),
    "resize": ("resize", "resize"),
    "save": ("save", "save"),
    "upgrade": ("upgrade", "upgrade"),
    "stop": ("stop", "stop"),
    "abort": ("abort", "abort"),
    "up": ("configured", "up"),
    "down": ("configured", "down"),
    "check-config": ("configured", "check_config"),
    "import": ("import_config", "import_config"),
    "status": ("status", "status"),
    "top": ("top", "top"),
    "metrics": ("metrics", "metrics"),
    "report": ("report", "report"),
    "density": ("density", "density"),
    "train": ("train", "train"),
    "control": ("control", "control"),
    "log": ("log", "log"),
    "doctor": ("doctor", "doctor"),
    "help": ("help", "help_command"),
    "systemd-generator": ("configured", "systemd_generator"),
    # Users of other tools type this. It is status, and the list of commands does not show it.
    "list": ("listing", "list_command"),
}


class _Commands(MutableMapping[str, click.Command]):
    """The commands by name; each is loaded when it is asked for: all of them take 0.1 s, one 0.03 s."""

    def __init__(self) -> None:
        self._loaded: dict[str, click.Command | None] = dict.fromkeys(_COMMANDS)

    def __getitem__(self, name: str) -> click.Command:
        command = self._loaded[name]
        if command is None:
            module, attribute = _COMMANDS[name]
            command = getattr(_load(f"{__name__}.{module}"), attribute)
            # click cuts its own short help off in the middle of a sentence; a given one is wrapped.
            command.short_help = command.get_short_help_str(limit=_SENTENCE)
            self._loaded[name] = command
        return command

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)


def _load(module: str) -> ModuleType:
    """What is loaded stays to the end, so no search for garbage looks through it: that took a tenth of the
    time of a short command."""
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


class _BrokenPipe(Exception):
    """EPIPE, which click must not see: it ends the program, whatever the sentence of the error is."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def _without_epipe() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise _BrokenPipe(error) from error
        raise


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a device's life, not of the alphabet."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            import difflib  # 1 ms, for a mistake alone

            visible = [name for name, command in self.commands.items() if not command.hidden]
            close = difflib.get_close_matches(args[0], visible, 1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(visible)}"
            raise click.UsageError(f"no such command: {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        with _without_epipe():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with _without_epipe():
            return super().invoke(ctx)


@click.group(
    cls=_Group,
    commands=_Commands(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="As root also: mount -t fuse.zramfs NAME DIR -o size=1G,... and in /etc/fstab. See zramfs(1).",
)
@version
def zramfs() -> None:
    """Compressed block devices in RAM, each served as one FUSE file."""


def _open_standard_files() -> None:
    """Fills what the caller has closed of the descriptors 0 to 2 (`>&-`): no file of ours may get one of
    them. What is written there fails, as it would without. Output takes any path, in whatever locale."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # Read-only, so that output fails with EBADF. The lowest free descriptor is this one.
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def _is_mount_call(words: Sequence[str]) -> bool:
    """NAME DIR -o OPTIONS. mount.fuse3 always puts rw or ro first, which no command of ours takes
    after -o; so NAME may even be the word of a command."""
    if len(words) < 2 or words[0].startswith("-"):
        return False
    if len(words) == 4 and words[2] == "-o" and words[3].split(",")[0] in ("rw", "ro"):
        return True
    return words[0] not in _COMMANDS and "-o" in words[2:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for a failure (its sentence is on stderr), 2 for a call that is wrong."""
    _open_standard_files()
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("PATH", _PATH)
    if _COMPLETE in os.environ:
        zramfs.main(words, prog_name="zramfs")  # answers the shell and ends the process
    try:
        if _is_mount_call(words):
            from .mount import mount

            mount(words)
            return 0
        result = zramfs.main(words, prog_name="zramfs", standalone_mode=False)
        # Here, because an error of the flush at the interpreter's end cannot be caught.
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE if isinstance(error, click.UsageError) else EXIT_FAILURE
    except _BrokenPipe as broken:
        return _failed(broken.error)
    except SystemExit as error:
        say("interrupted")
        return error.code if isinstance(error.code, int) else EXIT_INTERRUPTED
    except (click.Abort, KeyboardInterrupt):
        say("interrupted")
        return EXIT_INTERRUPTED
    except OSError as error:
        return _failed(error)


def _failed(error: OSError) -> int:
    """Says why a command has failed. Its exit status."""
    if isinstance(error, ZramfsError):
        say(str(error))
    elif error.errno in (errno.EPIPE, errno.EBADF):
        # The reader of our output has what it wants (| head). Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EBADF:
            say("the standard output is closed")
    else:
        where = f"{error.filename}: " if error.filename else ""
        say(f"{where}{error.strerror or error}")
    return EXIT_FAILURE
