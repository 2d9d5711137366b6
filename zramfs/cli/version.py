# SPDX-License-Identifier: Apache-2.0
"""The option --version, of zramfs and of those commands that others have too."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from zramfs import __version__

C = TypeVar("C", bound=Callable[..., Any])


def version(command: C, **more: Any) -> C:
    """-V and --version; more: what else click.option() knows."""
    return click.version_option(
        __version__, "-V", "--version", prog_name="zramfs", message="%(prog)s %(version)s", **more)(command)
