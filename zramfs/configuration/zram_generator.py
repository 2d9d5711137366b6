# SPDX-License-Identifier: Apache-2.0
"""Reads the configuration of systemd's zram-generator, as zram-generator.conf(5) and its source at
7855941 (version 1.2.1) say.

    {/usr/lib,/usr/local/lib,/etc,/run}/systemd/zram-generator.conf         the last that is there, alone
    {/usr/lib,/usr/local/lib,/etc,/run}/systemd/zram-generator.conf.d/*.conf  by name; the last of a name
The main file comes first, and later lines override earlier ones. A link to /dev/null hides a file.
"""
from __future__ import annotations

import os
import re
from pathlib import Path

from . import files
from .expression import evaluate_expression
from .files import Complaint, Entry
from .foreign import ForeignDevice, put_algorithms
from .keys import ALIASES, SWAP_OPTIONS

TOOL = "zram-generator"
BASES = ("usr/lib", "usr/local/lib", "etc", "run")
MAIN = "systemd/zram-generator.conf"
_SECTION = re.compile(r"zram[0-9]{1,20}", re.ASCII)
# Its INI reader takes a colon for an equals sign, too.
_SETTING = re.compile(r"(?P<key>[^=:\s][^=:]*?)\s*[=:]\s*(?P<value>.*)", re.DOTALL)
_FRACTION = re.compile(r"\+?(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)", re.ASCII)
# Of the mount: what mkdir and chmod do of themselves here, by our key.
_BY_KEY = {"X-mount.mode": "mode", "X-mount.owner": "owner", "X-mount.group": "group"}
_SIZES = ("zram-size", "zram-resident-limit")
_FRACTIONS = ("zram-fraction", "max-zram-size")
_KNOWN = {
    "host-memory-limit", *_SIZES, *_FRACTIONS, "compression-algorithm", "writeback-device", "swap-priority",
    "mount-point", "fs-type", "options",
}


def find_files(top: Path, complaints: list[Complaint]) -> list[Path]:
    """In the order in which they are read."""
    by_name: dict[str, Path] = {}
    for directory in (top / base / f"{MAIN}.d" for base in BASES):
        try:
            names = files.list_trusted(directory)
        except FileNotFoundError:
            continue
        except OSError as error:
            complaints.append(Complaint(directory, None, None, error.strerror or str(error)))
            continue
        by_name.update({name: directory / name for name in names if name.endswith(files.SUFFIX)})
    main = [place for base in reversed(BASES) if os.path.exists(place := top / base / MAIN)]
    return [*main[:1], *(by_name[name] for name in sorted(by_name))]


def read_devices(top: Path, complaints: list[Complaint]) -> list[ForeignDevice]:
    """All devices that it would make, by name. complaints: about what belongs to none of them. An error
    there means that something was not read, which may have said more about any device."""
    reader = _Reader(complaints)
    for file in find_files(top, complaints):
        text = files.read_text(file, complaints)
        if text is not None:
            reader.read(file, text)
    switch = _kernel_switch(top)
    if switch is True and "zram0" not in reader.devices:
        reader.devices["zram0"] = ForeignDevice("zram0", TOOL, [top / "proc/cmdline"])
    elif switch is False and reader.devices:
        complaints.append(Complaint(
            top / "proc/cmdline", None, "systemd.zram", "it is 0 here, so zram-generator makes no device of "
            "its configuration; zramfs would", is_error=False))
    for name, device in reader.devices.items():
        _translate(device, reader.entries.get(name, {}), reader.variables)
    return [reader.devices[name] for name in sorted(reader.devices)]


def _kernel_switch(top: Path) -> bool | None:
    """What systemd.zram= of the kernel's command line says; the last word counts."""
    try:
        words = (top / "proc/cmdline").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return None
    meaning = {"": True, **{f"={word}": value for value, texts in (
        (True, ("1", "yes", "true", "on")), (False, ("0", "no", "false", "off"))) for word in texts}}
    found = [meaning.get(word.removeprefix("systemd.zram")) for word in words
             if word.startswith("systemd.zram")]
    return next((value for value in reversed(found) if value is not None), None)


class _Reader:
    """Sorts the lines of all files by device. entries: the last line of each key, by device. variables: those
    that programs would set."""

    def __init__(self, complaints: list[Complaint]) -> None:
        self.complaints = complaints
        self.devices: dict[str, ForeignDevice] = {}
        self.entries: dict[str, dict[str, Entry]] = {}
        self.variables: set[str] = set()

    def read(self, file: Path, text: str) -> None:
        for section, line, entry in files.parse_entries(file, text, self.complaints, _SETTING):
            if section is None:
                assert entry is not None
                self._note_global(entry)
            elif not _SECTION.fullmatch(section):
                if entry is None:
                    self.complaints.append(Complaint(
                        file, line, None, f"[{section}] is left out: zram-generator makes no device of it "
                        "either", is_error=False))
            else:
                device = self.devices.setdefault(section, ForeignDevice(section, TOOL))
                device.note_file(file)
                if entry is not None:
                    self.entries.setdefault(section, {})[ALIASES.get(entry.key, entry.key)] = entry

    def _note_global(self, entry: Entry) -> None:
        if entry.key.startswith("set!"):
            self.variables.add(entry.key.removeprefix("set!"))
            sentence = "is left out: zramfs runs no program for a configuration"
        else:
            sentence = "is left out: it stands before the first [zramN]"
        self.complaints.append(entry.complain(sentence, is_error=False))


def _translate(device: ForeignDevice, raw: dict[str, Entry], variables: set[str]) -> None:
    entries = {key: plain for key, entry in raw.items() if (plain := _unquoted(device, entry))}
    for key in [key for key in entries if key not in _KNOWN]:
        device.warn(entries.pop(key), "unknown key, left out; zram-generator ignores it too")
    if any(key in entries for key in _FRACTIONS):
        _put_fraction(device, entries)
    for key in _SIZES:
        if entry := entries.get(key):
            _put_size(device, entry, variables)
    if entry := entries.get("compression-algorithm"):
        put_algorithms(device, entry)
    for key in ("host-memory-limit", "writeback-device"):
        if entry := entries.get(key):
            device.put(key, entry.value, entry)
    if "mount-point" in entries:
        _put_file_system(device, entries)
    elif (fs := entries.get("fs-type")) and fs.value != "swap":
        device.refuse(fs, f"a device with {fs.value} that is mounted nowhere has no counterpart: write a "
                          "mount-point for a RAM disk, or make a plain device by hand (directory = ...)")
    else:
        _put_swap(device, entries)


def _unquoted(device: ForeignDevice, entry: Entry) -> Entry | None:
    """None, after a complaint, for a value that means something else to its reader of INI files."""
    value = entry.value
    if value[:1] in ('"', "'"):
        if len(value) < 2 or value[-1] != value[0] or value[0] in value[1:-1]:
            device.refuse(entry, f"expected one pair of quotes around the value, got {value}")
            return None
        value = value[1:-1]
    if "\\" in value:
        device.refuse(entry, f"expected a value without a backslash, got {value}")
        return None
    if not value and entry.key != "options":
        device.refuse(entry, "expected a value; zram-generator refuses an empty one, too")
        return None
    return Entry(entry.file, entry.line, entry.key, value)


def _put_fraction(device: ForeignDevice, entries: dict[str, Entry]) -> None:
    """The obsolete keys, which override zram-size. Without max-zram-size there is no limit (its source; the
    manual page says 4096)."""
    fraction, most = entries.get("zram-fraction"), entries.get("max-zram-size")
    number = _FRACTION.fullmatch(fraction.value) if fraction else None
    if fraction and not number:
        device.refuse(fraction, f"expected a number such as 0.5, got {fraction.value!r}")
        return
    size = f"int({number['number'] if number else '0.5'} * ram)"
    if most and most.value != "none":
        if not re.fullmatch(r"[0-9]{1,12}", most.value):
            device.refuse(most, f"expected a whole number of MiB or none, got {most.value!r}")
            return
        size = f"min({size}, {most.value})"
    given = fraction or most
    assert given is not None
    device.warn(given, f"it is obsolete; zram-size = {size} says the same")
    if old := entries.pop("zram-size", None):
        device.warn(old, f"{given.key} overrides it")
    device.put("zram-size", size, given)


def _put_size(device: ForeignDevice, entry: Entry, variables: set[str]) -> None:
    try:
        evaluate_expression(entry.value, {"ram": 4096.0})
    except ValueError as error:
        used = sorted(set(re.findall(r"[A-Za-z_]\w*", entry.value)) & variables)
        hint = f"; {', '.join(used)} comes from a program: write its value instead" if used else ""
        device.refuse(entry, f"{error}{hint}")
        return
    device.put(entry.key, entry.value, entry)


def _words(entry: Entry | None) -> list[str]:
    """Options without those that say nothing."""
    text = "discard" if entry is None else entry.value
    return [word for part in text.split(",") if (word := part.strip()) and word != "defaults"]


def _put_swap(device: ForeignDevice, entries: dict[str, Entry]) -> None:
    if priority := entries.get("swap-priority"):
        device.put("swap-priority", priority.value, priority)
    entry = entries.get("options")
    words = _words(entry)
    known = [word for word in words if word in SWAP_OPTIONS]
    for word in words:
        if word not in known and entry:
            reason = ": swap-priority says it" if word.startswith("pri=") else ""
            device.warn(entry, f"the option {word} is left out{reason}")
    if entry and not known:
        device.warn(entry, "zram learns of freed pages without discard; here they need it, so discard stays")
    if entry and known and known[-1] != "discard":
        device.put("options", known[-1], entry)


def _put_file_system(device: ForeignDevice, entries: dict[str, Entry]) -> None:
    place, fs = entries["mount-point"], entries.get("fs-type")
    device.put("mount-point", place.value, place)
    kind = fs.value if fs else "ext2"
    if kind == "swap":
        assert fs is not None
        device.refuse(fs, "swap has no mount-point; zram-generator cannot mount it either")
        return
    if kind not in ("ext4", "xfs", "btrfs"):
        said = "" if fs else ", its default,"
        device.warn(fs or place, f"there is no {kind}{said} here, so ext4 is taken, without a journal")
        kind = "ext4"
    device.put("fs-type", kind, fs or place)
    if priority := entries.get("swap-priority"):
        device.warn(priority, "means nothing for a file system")
    entry = entries.get("options")
    kept = []
    for word in _words(entry):
        name, _, value = word.partition("=")
        if entry and name in _BY_KEY and value:
            device.put(_BY_KEY[name], value, entry)
        elif not word.startswith("X-mount.mkdir"):
            kept.append(word)
    if entry:
        device.put("options", ",".join(kept), entry)
