# SPDX-License-Identifier: Apache-2.0
"""Another version of zramfs beside this one: a copy of its files with another number, and with changes."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

_SOURCES = shutil.ignore_patterns("*.pyx", "*.pxd", "*.pyi", "*.c", "*.h", "__pycache__", "*.so")
_MAIN = "import sys; sys.path.insert(0, {!r}); from zramfs.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Version:
    """release: its number. place: what has its packages."""

    release: str
    place: Path

    @classmethod
    def copy(cls, place: Path, release: str = "9.9.9") -> Version:
        for package in ("zramfs", "allocator"):
            shutil.copytree(ROOT / package, place / package, ignore=_SOURCES)
            for compiled in (ROOT / package).rglob("*.so"):
                (place / compiled.relative_to(ROOT)).symlink_to(compiled)
        made = cls(release, place)
        made.change("zramfs/__init__.py", '__version__ = "', f'__version__ = "{release}"  # "')
        return made

    def change(self, file: str, old: str, new: str) -> None:
        """Puts `new` in the place of `old`, which must stand there once."""
        path = self.place / file
        text = path.read_text()
        assert text.count(old) == 1, (file, old)
        path.write_text(text.replace(old, new))

    @property
    def keeper(self) -> Path:
        return self.place / "zramfs/keeper/zramfs-keeper"

    def words(self) -> list[str]:
        """Of its command line."""
        return [sys.executable, "-I", "-c", _MAIN.format(str(self.place))]

    def start(self, *words: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.words(), *map(str, words)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", env=dict(os.environ))

    def run(self, *words: object, timeout: float = 90) -> subprocess.CompletedProcess[str]:
        return finish(self.start(*words), timeout)


def finish(process: subprocess.Popen[str], timeout: float = 90) -> subprocess.CompletedProcess[str]:
    """What it has said, and its status. Raises subprocess.TimeoutExpired, and has ended it then."""
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
