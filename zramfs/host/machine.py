# SPDX-License-Identifier: Apache-2.0
"""What the machine's files say about it: /proc, /sys, /dev, /etc. Reads and decides nothing."""
from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from .package_managers import advise_install

# Those that RAM disks and swap use, with their numbers in <linux/capability.h>.
CAPABILITIES = {"CAP_IPC_LOCK": 14, "CAP_SYS_ADMIN": 21, "CAP_SYS_RESOURCE": 24}


@dataclass(frozen=True)
class Machine:
    """root: the directory in which /proc, /sys and the rest are. path: as PATH, for programs."""

    root: Path = Path("/")
    path: str = ""

    def at(self, path: str | Path) -> Path:
        return self.root / str(path).lstrip("/")

    def has(self, path: str | Path) -> bool:
        """False also for what stands in a directory that may not be entered."""
        return os.path.exists(self.at(path))

    def text(self, path: str | Path) -> str | None:
        """The content of a file without the newline at its end; None if it cannot be read."""
        try:
            return self.at(path).read_text(encoding="utf-8", errors="replace").rstrip("\n")
        except OSError:
            return None

    def number(self, path: str | Path) -> int | None:
        """What a file of one whole number says; None if there is none."""
        text = self.text(path)
        return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None

    def program(self, name: str) -> Path | None:
        """Where PATH, or a system directory, has a program of this name."""
        for directory in [*self.path.split(os.pathsep), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]:
            found = self.at(directory) / name
            # Not Path.is_file(), which raises for a directory in PATH that may not be entered.
            if directory and os.path.isfile(found) and os.access(found, os.X_OK):
                return found
        return None

    def install(self, *packages: str, again: bool = False) -> str:
        """The command that installs packages, which Debian calls so. again: they are there, and broken."""
        return advise_install(self.program, *packages, again=again)

    @property
    def uid(self) -> int:
        """The effective one of this process."""
        return int(self._status("Uid", "0 0").split()[1])

    @property
    def gains_rights(self) -> bool:
        """False if set-user-ID programs run without the rights of their owner here."""
        return self._status("NoNewPrivs", "0") != "1"

    def capable(self, name: str) -> bool:
        return bool(int(self._status("CapEff", "0"), 16) >> CAPABILITIES[name] & 1)

    def limit(self, name: str) -> int | None:
        """The soft limit of that name in /proc/self/limits; None = unlimited."""
        found = re.search(rf"^{re.escape(name)} +(\S+)", self.text("/proc/self/limits") or "", re.MULTILINE)
        return int(found[1]) if found and found[1] != "unlimited" else None

    @property
    def kernel(self) -> tuple[int, int]:
        found = re.match(r"(\d+)\.(\d+)", self.text("/proc/sys/kernel/osrelease") or "")
        return (int(found[1]), int(found[2])) if found else (0, 0)

    def file_systems(self) -> set[str]:
        """The names that mount -t takes without loading a module."""
        return {line.split("\t")[-1] for line in (self.text("/proc/filesystems") or "").splitlines()}

    def in_user_namespace(self) -> bool:
        """True if root here is somebody else outside."""
        return (self.text("/proc/self/uid_map") or "0 0 4294967295").split() != ["0", "0", "4294967295"]

    def may_open_device(self, path: str) -> str | None:
        """Why a device cannot be opened for reading and writing; None if it can."""
        try:
            if not stat.S_ISCHR(self.at(path).stat().st_mode):
                return "it is not a character device"
            os.close(os.open(self.at(path), os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return error.strerror
        return None

    def _status(self, name: str, otherwise: str) -> str:
        """otherwise: for a kernel older than the field."""
        found = re.search(rf"^{name}:\s*(.*)$", self.text("/proc/self/status") or "", re.MULTILINE)
        return found[1] if found else otherwise
