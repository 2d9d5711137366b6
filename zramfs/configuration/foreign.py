# SPDX-License-Identifier: Apache-2.0
"""What zram-generator and zram-tools configure, in our own keys: the part that both readers share.

The files come from elsewhere and are hostile: a value is taken only if it is understood, and nothing in a
file is run. What has no counterpart here is a complaint: a warning where something close is taken instead, an
error where the device would be another one; then it is left out.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zramfs.codecs.spec import PRIORITIES, expect_level
from zramfs.model.config import DEFAULT_ALGO, SECONDARY

from .files import Complaint, Entry
from .keys import KEYS, REPLACED

# Algorithms of zram that zramfs has not, and what comes closest: deflate is dense, 842 is fast.
STAND_INS = {**REPLACED, "deflate": "zstd", "842": "lz4"}


@dataclass
class ForeignDevice:
    """A device that another tool makes. lines: our key and value of what goes into NAME.conf. origins: by our
    key, the line that it comes from."""

    name: str
    tool: str
    files: list[Path] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)
    origins: dict[str, Entry] = field(default_factory=dict)
    complaints: list[Complaint] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return not any(each.is_error for each in self.complaints)

    def note_file(self, file: Path) -> None:
        if file not in self.files:
            self.files.append(file)

    def put(self, key: str, value: str, origin: Entry) -> None:
        self.lines[key], self.origins[key] = value, origin

    def warn(self, entry: Entry, sentence: str) -> None:
        self.complaints.append(entry.complain(sentence, is_error=False))

    def refuse(self, entry: Entry, sentence: str) -> None:
        self.complaints.append(entry.complain(sentence))

    def text(self) -> str:
        """The file NAME.conf. No value can add a line: the readers let no control character pass, and no
        backslash, which would join two lines."""
        sources = ", ".join(map(str, self.files))
        lines = [f"# Made by `zramfs import` from {sources} ({self.tool}).",
                 *(f"{key} = {self.lines[key]}".rstrip() for key in KEYS if key in self.lines)]
        return "\n".join(lines) + "\n"


def put_algorithms(device: ForeignDevice, entry: Entry) -> None:
    """compression-algorithm: names with parameters in parentheses, the first for what is written. A name that
    the kernel does not know is passed by there, and its default stays."""
    found: list[str] = []
    for number, word in enumerate(entry.value.split()):
        name, _, inside = word.partition("(")
        if not name:
            device.warn(entry, f"{word} is left out: zram-generator writes it nowhere either; here "
                               "`policy = recompress idle=10min` has idle pages recompressed")
            continue
        algorithm = _algorithm(device, entry, name, inside.removesuffix(")"))
        if algorithm is None and number == 0:
            algorithm = DEFAULT_ALGO
        if algorithm is not None and algorithm not in found:
            found.append(algorithm)
    if len(found) > PRIORITIES:
        device.warn(entry, f"only the first {PRIORITIES} of {len(found)} algorithms are taken")
    if found:
        device.put("compression-algorithm", " ".join(found[:PRIORITIES]), entry)


def _algorithm(device: ForeignDevice, entry: Entry, name: str, inside: str) -> str | None:
    """As our files have it; None for one that nobody knows."""
    if name in STAND_INS:
        lost = f", without ({inside})" if inside else ""
        device.warn(entry, f"there is no {name} here, so {STAND_INS[name]} is taken{lost}")
        return STAND_INS[name]
    if name not in SECONDARY:
        device.warn(entry, f"{name!r} is left out: expected one of {', '.join(SECONDARY)}")
        return None
    parameters = list(_parameters(device, entry, name, inside))
    return f"{name}({','.join(parameters)})" if parameters else name


def _parameters(device: ForeignDevice, entry: Entry, name: str, inside: str) -> Iterator[str]:
    """level= and dict=; the kernel has more, and refuses what it cannot use."""
    for part in filter(None, inside.split(",")):
        key, _, value = part.partition("=")
        reason = "expected level=NUMBER or dict=/PATH"
        if key == "level" and value.lstrip("-").isdecimal() and len(value) < 10:
            try:
                expect_level(name, int(value))
            except ValueError as error:
                reason = str(error)
            else:
                yield f"level={int(value)}"
                continue
        elif key == "dict" and value.startswith("/") and not set(value) & set("() "):
            yield part
            continue
        device.warn(entry, f"{part!r} of {name} is left out: {reason}")
