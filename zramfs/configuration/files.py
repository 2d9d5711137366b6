# SPDX-License-Identifier: Apache-2.0
"""Configuration files: where they are, what makes them trustworthy, and their lines.

    /etc/zramfs/NAME.conf            the device NAME
    /etc/zramfs/conf.d/*.conf        any devices, each in a section [NAME]
    /etc/zramfs/NAME.conf.d/*.conf   more of the device NAME
and the same below /usr/share/zramfs, for packages; a file in /etc hides the one of that name there.
Later ones override earlier ones, in this order, and within a directory by name.

The syntax is that of systemd.syntax(7), which zram-generator.conf has too. configparser does not fit: it
knows no line numbers, joins lines by indentation, and takes a colon for an equals sign.
"""
from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DIRECTORIES = ("usr/share/zramfs", "etc/zramfs")
SHARED = "conf.d"
SUFFIX = ".conf"
# What people write has a few dozen lines. These keep a hostile file from taking memory or time.
MAX_FILE = 64 << 10
MAX_FILES = 256
MAX_NAME = 64

# As a part of unit names, run directories and messages it stands for itself, without escapes.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_SECTION = re.compile(r"\[(?P<name>[^\[\]]*)\]")
SETTING = re.compile(r"(?P<key>[^=\s][^=]*?)\s*=\s*(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class Complaint:
    """line: from 1, or None if it is about the file as a whole. key: None if it is about no key."""

    file: Path
    line: int | None
    key: str | None
    sentence: str
    is_error: bool = True

    def __str__(self) -> str:
        where = str(self.file) if self.line is None else f"{self.file}:{self.line}"
        key = f"{self.key}: " if self.key else ""
        return f"{where}: {'' if self.is_error else 'warning: '}{key}{self.sentence}"


@dataclass(frozen=True)
class Entry:
    """One line KEY = VALUE."""

    file: Path
    line: int
    key: str
    value: str

    def complain(self, sentence: str, *, is_error: bool = True) -> Complaint:
        return Complaint(self.file, self.line, self.key, sentence, is_error)


@dataclass(frozen=True)
class Files:
    """main: of each device that has one; shared: conf.d; own: NAME.conf.d. All in reading order.
    complaints: about directories that were left out."""

    main: dict[str, Path]
    shared: list[Path]
    own: dict[str, list[Path]]
    complaints: list[Complaint]


def root() -> Path:
    """ZRAMFS_ROOT, or /: what /etc, /usr/share and /proc/meminfo are looked for in."""
    return Path(os.path.abspath(os.environ.get("ZRAMFS_ROOT") or "/"))


def find_files(top: Path) -> Files:
    """All configuration files below `top`; nothing is read yet."""
    found: dict[str, dict[str, Path]] = {"": {}}
    complaints = []
    for base in (top / part for part in DIRECTORIES):
        try:
            subdirectories = list_trusted(base)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                complaints.append(Complaint(base, None, None, _reason(error)))
            continue
        found[""].update(_files(base, subdirectories))
        for name in subdirectories:
            if name != SHARED and not name.endswith(f"{SUFFIX}.d"):
                continue
            try:
                found.setdefault(name, {}).update(_files(base / name, list_trusted(base / name)))
            except OSError as error:
                complaints.append(Complaint(base / name, None, None, _reason(error)))
    shared = found.pop(SHARED, {})
    main = found.pop("")
    return Files(
        main={name.removesuffix(SUFFIX): main[name] for name in sorted(main)},
        shared=[shared[name] for name in sorted(shared)],
        own={name.removesuffix(f"{SUFFIX}.d"): [files[each] for each in sorted(files)]
             for name, files in found.items()},
        complaints=complaints,
    )


def list_trusted(directory: Path) -> list[str]:
    """The names in a directory that only root can change, sorted. Raises OSError: not there, not to be
    trusted, too full."""
    seen = os.stat(directory)
    if not stat.S_ISDIR(seen.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "expected a directory")
    if trouble := _distrust(seen):
        raise PermissionError(errno.EPERM, f"expected a directory that only root can change, but {trouble}")
    names = [name for name in os.listdir(directory) if not name.startswith(".") and name.isprintable()]
    if len(names) > MAX_FILES:
        raise OSError(errno.EOVERFLOW, f"expected at most {MAX_FILES} files, found {len(names)}")
    return sorted(names)


def _files(directory: Path, names: list[str]) -> dict[str, Path]:
    return {name: directory / name for name in names if name.endswith(SUFFIX) and name != SUFFIX}


def _distrust(seen: os.stat_result) -> str | None:
    """Why a user other than root and the one who runs this could have written it; None if none could."""
    if seen.st_uid not in (0, os.geteuid()):
        return f"it belongs to uid {seen.st_uid}"
    if seen.st_mode & 0o022:
        return f"its mode is {stat.S_IMODE(seen.st_mode):04o}, so others can write to it"
    return None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def read_text(file: Path, complaints: list[Complaint]) -> str | None:
    """The text of a file; None if it is masked by a link to /dev/null, or was complained about."""
    try:
        # O_NONBLOCK: a FIFO would wait for a writer.
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        complaints.append(Complaint(file, None, None, f"cannot be read: {error.strerror}"))
        return None
    try:
        seen = os.fstat(fd)
        if stat.S_ISCHR(seen.st_mode) and seen.st_rdev == os.makedev(1, 3):
            return None
        if not stat.S_ISREG(seen.st_mode):
            complaints.append(Complaint(file, None, None, "expected a regular file, or a link to /dev/null"))
            return None
        if trouble := _distrust(seen):
            sentence = f"expected a file that only root can change, but {trouble}; it is left out"
            complaints.append(Complaint(file, None, None, sentence))
            return None
        with contextlib.closing(os.fdopen(os.dup(fd), "rb")) as content:
            data = content.read(MAX_FILE + 1)
    except OSError as error:
        complaints.append(Complaint(file, None, None, f"cannot be read: {error.strerror}"))
        return None
    finally:
        os.close(fd)
    if len(data) > MAX_FILE:
        complaints.append(Complaint(file, None, None, f"expected a file of at most {MAX_FILE} bytes"))
        return None
    return _text(file, data, complaints)


def _text(file: Path, data: bytes, complaints: list[Complaint]) -> str | None:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        broken = data[: error.start].count(b"\n") + 1
        sentence = f"expected UTF-8, got the byte {data[error.start]:#04x}"
        complaints.append(Complaint(file, broken, None, sentence))
        return None
    for number, line in enumerate(text.split("\n"), 1):
        for character in line.rstrip("\r"):
            if character != "\t" and not character.isprintable():
                sentence = f"expected text, got the control character {character!r}"
                complaints.append(Complaint(file, number, None, sentence))
                return None
    return text


def parse_entries(
    file: Path, text: str, complaints: list[Complaint], setting: re.Pattern[str] = SETTING
) -> Iterator[tuple[str | None, int, Entry | None]]:
    """(section, line, entry) of each entry; the section None before the first heading, the
    entry None for a heading. Other lines are complained about and left out. setting: what an entry looks
    like, with the groups key and value."""
    section: str | None = None
    for number, line in _lines(text):
        if line.startswith("["):
            match = _SECTION.fullmatch(line)
            section = match["name"].strip() if match else ""
            if not match:
                complaints.append(Complaint(file, number, None, f"expected a heading [NAME], got {line!r}"))
                continue
            yield section, number, None
        elif match := setting.fullmatch(line):
            yield section, number, Entry(file, number, match["key"], match["value"])
        else:
            complaints.append(Complaint(file, number, None, f"expected KEY = VALUE, got {line!r}"))


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered, without comments and blank lines; a line that ends with a backslash goes on in the next."""
    begun = 0
    parts: list[str] = []
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip()
        if line.startswith(("#", ";")) or (not line and not parts):
            continue
        begun = begun if parts else number
        parts.append(line.removesuffix("\\").rstrip())
        if not line.endswith("\\"):
            if joined := " ".join(filter(None, parts)):
                yield begun, joined
            parts = []
    if joined := " ".join(filter(None, parts)):
        yield begun, joined
