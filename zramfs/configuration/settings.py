# SPDX-License-Identifier: Apache-2.0
"""What the configuration files say: the devices that their settings make together."""
from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zramfs.lifecycle import ramdisk, swap
from zramfs.lifecycle.ramdisk import FileSystem
from zramfs.lifecycle.start import OnTop
from zramfs.lifecycle.swap import Swap
from zramfs.model.config import DEFAULT_ALGO, DEFAULT_RESERVE, MAX_DISKSIZE, Algorithm, DeviceConfig
from zramfs.model.density import DEFAULTS
from zramfs.model.policy import Policy, Units, Writeback
from zramfs.text.sizes import format_size
from zramfs.text.sizes import total_ram as host_ram

from . import files
from .expression import evaluate_expression
from .files import Complaint, Entry
from .keys import ALIASES, KEYS, OBSOLETE, SWAP_OPTIONS
from .places import trouble_with_places

MIB = 1 << 20
PAGE = 4096
DEFAULT_SIZE = "min(ram / 2, 4096)"
DEFAULT_FS = "ext4"
NO_DEVICE = "default"  # a section of zram-generator.conf whose name does not begin with zram
# zram-generator warns above this ratio: only zeros compress that well.
IMPROBABLE_RATIO = 32


@dataclass(frozen=True)
class Settings:
    """One device. skip: why this machine does without it, None if it is wanted. place: its directory, None
    for swap. on_top: the file system or the swap area on it, None for a plain device."""

    name: str
    config: DeviceConfig
    on_top: OnTop = None
    place: Path | None = None
    skip: str | None = None

    @property
    def kind(self) -> str:
        match self.on_top:
            case Swap():
                return "swap"
            case FileSystem():
                return "ramdisk"
        return "device"


@dataclass
class ConfiguredDevice:
    """What is known of a name. entries: the last line of each key. settings: None if there is an error among
    the complaints about it."""

    name: str
    files: list[Path] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    settings: Settings | None = None
    complaints: list[Complaint] = field(default_factory=list)


@dataclass
class Configuration:
    """complaints: about files and sections that belong to no device."""

    devices: dict[str, ConfiguredDevice]
    complaints: list[Complaint]

    @property
    def errors(self) -> list[Complaint]:
        lists = [self.complaints, *(device.complaints for device in self.devices.values())]
        return [each for complaints in lists for each in complaints if each.is_error]


# ---- from files to devices -------------------------------------------------------------------------
def load_configuration(top: Path | None = None, ram: int | None = None) -> Configuration:
    """Everything that is configured below `top` (None: files.root()). ram in bytes, None = this
    machine's. Whatever is wrong is a complaint; nothing is raised."""
    top = files.root() if top is None else top
    found = files.find_files(top)
    collector = _Collector(list(found.complaints))
    for name, file in found.main.items():
        collector.read(file, name)
    for file in found.shared:
        collector.read(file, None)
    for name, own in found.own.items():
        for file in own:
            collector.read(file, name, adds=True)
    return collector.configuration(total_ram(top) if ram is None else ram)


def load_file(file: Path, ram: int | None = None) -> Configuration:
    """What one file says, wherever it lies. A file in a directory conf.d is about several devices, any other
    about the one that it is named after."""
    collector = _Collector([])
    shared = file.parent.name == files.SHARED
    own = file.parent.name.removesuffix(f"{files.SUFFIX}.d")
    name = own if own != file.parent.name else file.name.removesuffix(files.SUFFIX)
    collector.read(file, None if shared else name)
    return collector.configuration(total_ram(files.root()) if ram is None else ram)


def load_text(file: Path, text: str, ram: int) -> Configuration:
    """What a file of one device would say with this text. Nothing is read."""
    collector = _Collector([])
    name = file.name.removesuffix(files.SUFFIX)
    collector.take(file, text, name)
    return collector.configuration(ram)


def total_ram(top: Path) -> int:
    """MemTotal in bytes: of `top`, so that a test or an image can bring its own, else this machine's."""
    own = top / "proc/meminfo"
    return host_ram(own if own.exists() else Path("/proc/meminfo"))


class _Collector:
    """Sorts the settings of all files by device; the later one of a key wins."""

    def __init__(self, complaints: list[Complaint]) -> None:
        self.complaints = complaints
        self.devices: dict[str, ConfiguredDevice] = {}

    def read(self, file: Path, owner: str | None, *, adds: bool = False) -> None:
        """owner: the device that the file is about; None: its sections say. adds: to a device that
        another file must have named."""
        found: list[Complaint] = []
        text = files.read_text(file, found)
        if text is None and not found:
            return  # masked
        if owner is None:
            self.complaints += found
        elif not self._is_allowed(file, owner, adds):
            return
        else:
            self._device(owner, file).complaints += found
        if text is not None:
            self._sort(file, text, owner)

    def take(self, file: Path, text: str, owner: str) -> None:
        """As read(), of a text that is at hand."""
        if self._is_allowed(file, owner, adds=False):
            self._device(owner, file)
            self._sort(file, text, owner)

    def _is_allowed(self, file: Path, name: str, adds: bool) -> bool:
        if not files.NAME.fullmatch(name) or len(name) > files.MAX_NAME:
            sentence = (f"expected a name of at most {files.MAX_NAME} letters, digits and _ . -, "
                        f"got {name!r}")
            self.complaints.append(Complaint(file, None, None, sentence))
            return False
        if adds and name not in self.devices:
            sentence = f"nothing is configured under the name {name}, so this adds to nothing"
            self.complaints.append(Complaint(file, None, None, sentence, is_error=False))
            return False
        return True

    def _device(self, name: str, file: Path) -> ConfiguredDevice:
        device = self.devices.setdefault(name, ConfiguredDevice(name))
        if file not in device.files:
            device.files.append(file)
        return device

    def _sort(self, file: Path, text: str, owner: str | None) -> None:
        about = self.complaints if owner is None else self.devices[owner].complaints
        for section, line, entry in files.parse_entries(file, text, about):
            name = owner if section is None else section
            if name is None:
                assert entry is not None
                hint = "; programs are not run for a configuration" if entry.key.startswith("set!") else ""
                about.append(entry.complain(f"expected a heading [NAME] before the first setting{hint}"))
            elif owner is not None and name != owner:
                if entry is None:
                    about.append(Complaint(
                        file, line, None, f"expected settings of {owner} only, got [{name}]; conf.d takes any"
                    ))
            elif entry is None:
                if owner is None and self._is_allowed_section(file, line, name):
                    self._device(name, file)
            elif name in self.devices:
                self._put(self.devices[name], entry)

    def _is_allowed_section(self, file: Path, line: int, name: str) -> bool:
        if name == NO_DEVICE and name not in self.devices:
            sentence = (f"[{name}] is left out: zram-generator makes no device of it either; write the "
                        "settings under the heading of each device")
            self.complaints.append(Complaint(file, line, None, sentence, is_error=False))
            return False
        if files.NAME.fullmatch(name) and len(name) <= files.MAX_NAME:
            return True
        sentence = f"expected the name of a device, of letters, digits and _ . -, got [{name}]"
        self.complaints.append(Complaint(file, line, None, sentence))
        return False

    def _put(self, device: ConfiguredDevice, entry: Entry) -> None:
        key = ALIASES.get(entry.key, entry.key)
        if key in OBSOLETE:
            device.complaints.append(entry.complain(f"this key is obsolete; {OBSOLETE[key]}"))
        elif key == "policy":
            self._put_policy(device, entry)
        elif key in KEYS:
            device.entries[key] = entry
        else:
            # zram-generator, and systemd, go on without it, and so can a file for a later version of us.
            close = difflib.get_close_matches(key, KEYS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            device.complaints.append(entry.complain(f"unknown key, left out{hint}", is_error=False))

    def _put_policy(self, device: ConfiguredDevice, entry: Entry) -> None:
        """There is one of each kind. An empty value removes them all."""
        entries = device.entries
        if entry.value:
            entries[f"{_POLICY}{entry.value.split()[0]}"] = entry
        for key in [key for key in entries if key.startswith(_POLICY) and not entry.value]:
            del entries[key]

    def configuration(self, ram: int) -> Configuration:
        for device in self.devices.values():
            _settle(device, ram)
        _expect_own_places(self.devices.values())
        return Configuration(dict(sorted(self.devices.items())), self.complaints)


def _lacking(policy: Policy, values: dict[str, Any]) -> str | None:
    """What a policy needs beside it, if that is not there."""
    if isinstance(policy, Writeback):
        return None if "writeback-device" in values else "write-back needs a writeback-device"
    if isinstance(policy, Units):
        return "units keep what is discarded, which wipe=yes promises not to" if values.get("wipe") else None
    names = [each.name for each in values.get("compression-algorithm", ())[1:]]
    if not names:
        return "recompression needs a second algorithm in compression-algorithm"
    if policy.algo not in (None, *names):
        return f"expected one of the algorithms behind the first, {', '.join(names)}, got algo={policy.algo}"
    return None


_POLICY = "policy "  # and its kind: where the values keep it


def _parse(device: ConfiguredDevice) -> tuple[dict[str, Any], dict[str, Policy]]:
    """The values of the device's entries, and its policies, by key; complaints about what cannot be read."""
    values: dict[str, Any] = {}
    policies: dict[str, Policy] = {}
    for key, entry in device.entries.items():
        # An empty value restores the default. Only options may be empty themselves.
        if not entry.value and key != "options":
            continue
        known = KEYS[key.split()[0]]
        try:
            value = known.parse(entry.value)
        except ValueError as error:
            device.complaints.append(entry.complain(str(error)))
            continue
        if sentence := known.warning(entry.value):
            device.complaints.append(entry.complain(sentence, is_error=False))
        if not key.startswith(_POLICY):
            values[key] = value
        elif value is not None:
            policies[key] = value
    return values, policies


def _settle(device: ConfiguredDevice, ram: int) -> None:
    """Makes the device's settings of its entries, unless something is wrong with them."""
    entries = device.entries
    values, policies = _parse(device)
    for key, policy in policies.items():
        if trouble := _lacking(policy, values):
            device.complaints.append(entries[key].complain(trouble))
    kind = _kind(device, values)
    for key in [key for key in values if kind not in KEYS[key].kinds]:
        del values[key]
        sentence = f"means nothing for a {_KIND_NAMES[kind]}"
        device.complaints.append(entries[key].complain(sentence, is_error=False))
    _expect_discard(device, values, kind)
    size, limit, reserve, min_free, keep_free = (
        _size(device, entries.get(key), values.get(key, default), ram) for key, default in (
            ("zram-size", DEFAULT_SIZE), ("zram-resident-limit", "0"),
            ("reserve", str(DEFAULT_RESERVE // MIB)), ("min-free", "0"), ("keep-free", "0"),
        )
    )
    _expect_size(device, values, kind, size)
    if kind == "swap":
        _expect_safe_swap(device, values, reserve)
    for key, trouble in trouble_with_places(values, kind):
        device.complaints.append(entries[key].complain(trouble))
    device.complaints.sort(key=lambda each: (device.files.index(each.file), each.line or 0))
    if any(each.is_error for each in device.complaints):
        return
    config = DeviceConfig(
        size=size, mem_limit=limit, policies=tuple(policies.values()),
        keep_free=keep_free if "keep-free" in values else None, density=values.get("density", DEFAULTS[kind]),
        **{name: values[key] for name, key in _PLAIN.items() if key in values},
    )
    if kind == "swap":
        config = replace(config, reserve=reserve)
    elif kind == "device":
        config = replace(config, **_rights(values))
    place = values.get("mount-point") or values.get("directory")
    on_top = _on_top(kind, values, min_free if "min-free" in values else None)
    device.settings = Settings(device.name, config, on_top, place, _reason_to_skip(values, size, ram // MIB))


def _on_top(kind: str, values: dict[str, Any], min_free: int | None) -> OnTop:
    options = values.get("options", ramdisk.DEFAULT_OPTIONS)
    match kind:
        case "swap":
            priority = values.get("swap-priority", swap.DEFAULT_PRIORITY)
            return Swap(priority, SWAP_OPTIONS[options], min_free)
        case "ramdisk":
            fs = values.get("fs-type", DEFAULT_FS)
            return FileSystem(fs, values["mount-point"], options, **_rights(values))
    return None


def _rights(values: dict[str, Any]) -> dict[str, Any]:
    """Of `disk`, or of the file system on it."""
    return {key: values[key] for key in ("mode", "owner", "group") if key in values}


def _reason_to_skip(values: dict[str, Any], size: int, mib: int) -> str | None:
    """Why a machine with this many MiB of RAM does without the device."""
    host = values.get("host-memory-limit")
    if host is not None and mib > host:
        return f"the machine has {mib} MiB of RAM, more than host-memory-limit = {host}"
    if size == 0:
        return f"zram-size = {values.get('zram-size', DEFAULT_SIZE)} is 0 with {mib} MiB of RAM"
    return None


def _expect_size(device: ConfiguredDevice, values: dict[str, Any], kind: str, size: int) -> None:
    """size: bytes; 0 is no device, or has been complained about."""
    sentence = None
    if any(each.key == "fs-type" and each.is_error for each in device.complaints):
        return
    if kind == "swap" and 0 < size < swap.MIN_SIZE:
        sentence = f"swap needs at least {format_size(swap.MIN_SIZE)}"
    elif kind == "ramdisk" and size:
        sentence = ramdisk.trouble_with_size(values.get("fs-type", DEFAULT_FS), size)
    elif kind == "device" and 0 < size < PAGE:
        sentence = f"a device needs at least {PAGE} bytes"
    if sentence:
        # The default of a small machine may be too small as well; then no line says the size.
        line = device.entries.get("zram-size") or next(iter(device.entries.values()), None)
        text = f"{sentence}, got {size} bytes; sizes are in MiB (4096 is 4 GiB)"
        device.complaints.append(
            line.complain(text) if line else Complaint(device.files[0], None, "zram-size", text))


def _expect_discard(device: ConfiguredDevice, values: dict[str, Any], kind: str) -> None:
    """Without discard the device never learns that data is not needed any more."""
    if "options" not in values or kind == "device":
        return
    words = values["options"].split(",")
    wrong = kind == "swap" and values["options"] not in SWAP_OPTIONS
    if not wrong and not any(word.partition("=")[0] == "discard" for word in words):
        what = "pages that programs free" if kind == "swap" else "deleted files"
        device.complaints.append(device.entries["options"].complain(
            f"without discard the memory of {what} is not given back", is_error=False))


def _expect_safe_swap(device: ConfiguredDevice, values: dict[str, Any], reserve: int) -> None:
    if values.get("options", "") not in SWAP_OPTIONS:
        expected = ", ".join(filter(None, SWAP_OPTIONS))
        sentence = f"expected one of {expected} or nothing for swap, got {values['options']!r}"
        device.complaints.append(device.entries["options"].complain(sentence))
    # An expression without a value gives 0 as well, and there is a complaint about it already.
    if reserve == 0 and not any(each.key == "reserve" for each in device.complaints if each.is_error):
        sentence = "swap needs a reserve of ready memory: expected more than 0 MiB, got 0"
        device.complaints.append(device.entries["reserve"].complain(sentence))
    first, *_ = values.get("compression-algorithm") or (Algorithm(DEFAULT_ALGO),)
    if trouble := swap.trouble_with(first):
        device.complaints.append(device.entries["compression-algorithm"].complain(trouble))


_KIND_NAMES = {"swap": "swap device", "ramdisk": "RAM disk", "device": "plain device"}
# Values that go into DeviceConfig as they are.
_PLAIN = {
    "algorithms": "compression-algorithm", "writeback": "writeback-device", "threads": "threads",
    "proactiveness": "proactiveness", "allow_other": "allow-other", "wipe": "wipe",
    "lock": "lock", "standby": "standby", "keep": "keep", "keep_every": "keep-every",
}


def _kind(device: ConfiguredDevice, values: dict[str, Any]) -> str:
    fs = values.get("fs-type")
    if "directory" in values:
        for other in ("mount-point", "fs-type"):
            if other in values:
                device.complaints.append(device.entries[other].complain(
                    "expected either directory, for a plain device, or mount-point, for a file system"
                ))
        return "device"
    if "mount-point" in values:
        if fs == "swap":
            sentence = "swap has no mount-point: leave one out"
            device.complaints.append(device.entries["fs-type"].complain(sentence))
        return "ramdisk"
    if fs not in (None, "swap"):
        sentence = f"a file system {fs} needs a mount-point"
        device.complaints.append(device.entries["fs-type"].complain(sentence))
        return "ramdisk"
    return "swap"


def _size(device: ConfiguredDevice, entry: Entry | None, expression: str, ram: int) -> int:
    """Bytes. entry: where the expression stands; None for a default, which is never wrong."""
    try:
        mib = evaluate_expression(expression, {"ram": float(ram // MIB)})
        if mib < 0:
            raise ValueError(f"expected a size of at least 0 MiB, got {mib:g}")
        if mib * MIB > MAX_DISKSIZE:
            raise ValueError(
                f"expected at most {MAX_DISKSIZE // MIB} MiB, got {mib:.0f}; sizes are in MiB (4096 is 4 GiB)"
            )
    except ValueError as error:
        assert entry is not None
        device.complaints.append(entry.complain(str(error)))
        return 0
    if entry is not None and mib > IMPROBABLE_RATIO * (ram // MIB):
        device.complaints.append(entry.complain(
            f"{mib:.0f} MiB are more than {IMPROBABLE_RATIO} times the machine's {ram // MIB}; sizes are in "
            "MiB", is_error=False,
        ))
    return int(mib * MIB)


def _expect_own_places(devices: Iterable[ConfiguredDevice]) -> None:
    """Two devices cannot have one directory; the later one, by name, is the wrong one."""
    taken: dict[Path, str] = {}
    for device in sorted(devices, key=lambda each: each.name):
        place = device.settings.place if device.settings else None
        if place is None:
            continue
        if place in taken:
            key = "mount-point" if device.settings.kind == "ramdisk" else "directory"
            device.complaints.append(device.entries[key].complain(
                f"expected a directory of its own, but {place} is that of {taken[place]}"
            ))
            device.settings = None
        else:
            taken[place] = device.name
