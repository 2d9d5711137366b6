# SPDX-License-Identifier: Apache-2.0
"""The command line. Nothing here imports trio, pyfuse3 or rich before a command needs it."""
from __future__ import annotations

import copy
import difflib
import errno
import io
import os
import sys
from collections.abc import Sequence

import click

from zramfs.errors import ZramfsError

from .abort import abort
from .configured import check_config, down, systemd_generator, up
from .control import control
from .create import create, ramdisk
from .doctor import doctor
from .help import help_command
from .import_config import import_config
from .log import log
from .metrics import metrics
from .mount import is_mount_call, mount
from .options import version
from .output import say
from .report import report
from .resize import resize
from .status import status
from .stop import stop
from .swap import swap
from .top import top
from .train import train

# What a login shell would have. mount(8) starts its helpers without PATH.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# How the scripts in completions/ ask; click takes the name from that of the program.
_COMPLETE = "_ZRAMFS_COMPLETE"

_SENTENCE = 500  # characters: more than the first sentence of any help has

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT; 143 and 129 are those of SIGTERM and SIGHUP


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a device's life, not of the alphabet."""
        return list(self.commands)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        # click cuts its own short help off in the middle of a sentence; a given one is wrapped.
        cmd.short_help = cmd.get_short_help_str(limit=_SENTENCE)
        super().add_command(cmd, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            visible = [name for name, command in self.commands.items() if not command.hidden]
            close = difflib.get_close_matches(args[0], visible, 1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(visible)}"
            raise click.UsageError(f"no such command: {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="As root also: mount -t fuse.zramfs NAME DIR -o size=1G,... and in /etc/fstab. See zramfs(1).",
)
@version
def zramfs() -> None:
    """Compressed block devices in RAM, each served as one FUSE file."""


for command in (
    create, ramdisk, swap, resize, stop, abort, up, down, check_config, import_config, status, top, metrics,
    report, train, control, log, doctor, help_command, systemd_generator,
):
    zramfs.add_command(command)

# Users of other tools type this. It is status, and the list of commands does not show it.
_list = copy.copy(status)
_list.hidden = True
zramfs.add_command(_list, "list")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 for a failure (its sentence is on stderr), 2 for a call that is wrong."""
    _open_standard_files()
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("PATH", _PATH)
    if _COMPLETE in os.environ:
        zramfs.main(words, prog_name="zramfs")  # answers the shell and ends the process
    try:
        if is_mount_call(words, zramfs.commands):
            mount(words)
            return 0
        result = zramfs.main(words, prog_name="zramfs", standalone_mode=False)
        # Here, because an error of the flush at the interpreter's end cannot be caught.
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE if isinstance(error, click.UsageError) else EXIT_FAILURE
    except SystemExit as error:
        say("interrupted")
        return error.code if isinstance(error.code, int) else EXIT_INTERRUPTED
    except (click.Abort, KeyboardInterrupt):
        say("interrupted")
        return EXIT_INTERRUPTED
    except ZramfsError as error:
        say(str(error))
        return EXIT_FAILURE
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EBADF):
            # The reader of our output has what it wants (| head). Python would complain at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if error.errno == errno.EBADF:
                say("the standard output is closed")
            return EXIT_FAILURE
        where = f"{error.filename}: " if error.filename else ""
        say(f"{where}{error.strerror or error}")
        return EXIT_FAILURE
