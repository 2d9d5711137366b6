# SPDX-License-Identifier: Apache-2.0
"""How what is missing is installed here: the words of apt-get, dnf, pacman and apk, and their names for the
packages. The callers know Debian's names."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Manager:
    """names: where they differ from Debian's."""

    program: str
    install: str
    reinstall: str
    names: dict[str, str] = field(default_factory=dict)


# By what a distribution has of itself; apt-get first, which others have only if somebody wants it.
MANAGERS = (
    Manager("apt-get", "apt-get install", "apt-get install --reinstall"),
    Manager("dnf", "dnf install", "dnf reinstall", {"mount": "util-linux"}),
    Manager("pacman", "pacman -S", "pacman -S", {
        "mount": "util-linux", "python3-matplotlib": "python-matplotlib",
        "python3-zstandard": "python-zstandard"}),
    Manager("apk", "apk add", "apk fix", {
        "mount": "util-linux", "python3-matplotlib": "py3-matplotlib", "python3-zstandard": "py3-zstandard"}),
)


def advise_install(find: Callable[[str], object], *packages: str, again: bool = False) -> str:
    """The command that installs packages, which Debian calls so. find: where a program is, None if it
    is not there. again: they are there, and broken."""
    found = next((each for each in MANAGERS if find(each.program) is not None), None)
    if found is None:
        return f"install {' and '.join(dict.fromkeys(packages))} (Debian's names)"
    names = dict.fromkeys(found.names.get(name, name) for name in packages)
    return f"{found.reinstall if again else found.install} {' '.join(names)}"
