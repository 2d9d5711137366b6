# SPDX-License-Identifier: Apache-2.0
"""What the configuration files say: the devices that their settings make together."""
from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zramfs.host import signatures
from zramfs.lifecycle import mount_points, ramdisk, swap
from zramfs.lifecycle.ramdisk import FileSystem
from zramfs.lifecycle.start import OnTop
from zramfs.lifecycle.swap import Swap
from zramfs.model.config import DEFAULT_ALGO, DEFAULT_RESERVE, MAX_DISKSIZE, Algorithm, DeviceConfig
from zramfs.model.policy import Policy, Writeback

from . import files
from .expression import evaluate
from .files import Complaint, Setting
from .keys import ALIASES, KEYS, OBSOLETE, SWAP_OPTIONS

MIB = 1 << 20
DEFAULT_SIZE = "min(ram / 2, 4096)"
DEFAULT_FS = "ext4"
# zram-generator warns from there: nothing but zeros compresses that well.
IMPROBABLE_RATIO = 32


@dataclass(frozen=True)
class Settings:
    """One device. skip: why this machine is to go without it, None = it is wanted. place: the directory that
    it is known by, None for swap. on_top: the file system or the swap area on it, None for a plain device."""

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
class Device:
    """What is known of a name; settings None if there is an error among the complaints about it."""

    name: str
    files: list[Path] = field(default_factory=list)
    settings: Settings | None = None
    complaints: list[Complaint] = field(default_factory=list)


@dataclass
class Configuration:
    """complaints: about files and sections that belong to no device."""

    devices: dict[str, Device]
    complaints: list[Complaint]

    @property
    def errors(self) -> list[Complaint]:
        lists = [self.complaints, *(device.complaints for device in self.devices.values())]
        return [each for complaints in lists for each in complaints if each.is_error]


# ---- from files to devices -------------------------------------------------------------------------
def load(top: Path | None = None, ram: int | None = None) -> Configuration:
    """Everything that is configured below `top` (None: conffiles.root()). ram in bytes, None = this
    machine's. Whatever is wrong is a complaint; nothing is raised."""
    top = files.root() if top is None else top
    found = files.find(top)
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
    """What one file says, wherever it stands: in conf.d of several devices, else of the one that it is
    named after."""
    collector = _Collector([])
    shared = file.parent.name == files.SHARED
    own = file.parent.name.removesuffix(f"{files.SUFFIX}.d")
    name = own if own != file.parent.name else file.name.removesuffix(files.SUFFIX)
    collector.read(file, None if shared else name)
    return collector.configuration(total_ram(files.root()) if ram is None else ram)


def total_ram(top: Path) -> int:
    """MemTotal in bytes: of `top`, so that a test or an image can bring its own, else this machine's."""
    from zramfs.text import sizes

    own = top / "proc/meminfo"
    return sizes.total_ram(own if own.exists() else Path("/proc/meminfo"))


class _Collector:
    """Sorts the settings of all files by device; the later one of a key wins."""

    def __init__(self, complaints: list[Complaint]) -> None:
        self.complaints = complaints
        self.devices: dict[str, Device] = {}
        self.values: dict[str, dict[str, Setting]] = {}

    def read(self, file: Path, owner: str | None, *, adds: bool = False) -> None:
        """owner: the device that the file is about; None: its sections say. adds: to a device that
        another file must have named."""
        found: list[Complaint] = []
        text = files.read(file, found)
        if text is None and not found:
            return  # masked
        if owner is None:
            self.complaints += found
        elif not self._allowed(file, owner, adds):
            return
        else:
            self._device(owner, file).complaints += found
        if text is not None:
            self._sort(file, text, owner)

    def _allowed(self, file: Path, name: str, adds: bool) -> bool:
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

    def _device(self, name: str, file: Path) -> Device:
        device = self.devices.setdefault(name, Device(name))
        if file not in device.files:
            device.files.append(file)
        self.values.setdefault(name, {})
        return device

    def _sort(self, file: Path, text: str, owner: str | None) -> None:
        about = self.complaints if owner is None else self.devices[owner].complaints
        for section, line, setting in files.settings(file, text, about):
            name = owner if section is None else section
            if name is None:
                assert setting is not None
                hint = "; programs are not run for a configuration" if setting.key.startswith("set!") else ""
                about.append(setting.complain(f"expected a heading [NAME] before the first setting{hint}"))
            elif owner is not None and name != owner:
                if setting is None:
                    about.append(Complaint(
                        file, line, None, f"expected settings of {owner} only, got [{name}]; conf.d takes any"
                    ))
            elif setting is None:
                if owner is None and self._allowed_section(file, line, name):
                    self._device(name, file)
            elif name in self.devices:
                self._put(self.devices[name], setting)

    def _allowed_section(self, file: Path, line: int, name: str) -> bool:
        if files.NAME.fullmatch(name) and len(name) <= files.MAX_NAME:
            return True
        sentence = f"expected the name of a device, of letters, digits and _ . -, got [{name}]"
        self.complaints.append(Complaint(file, line, None, sentence))
        return False

    def _put(self, device: Device, setting: Setting) -> None:
        key = ALIASES.get(setting.key, setting.key)
        if key in OBSOLETE:
            device.complaints.append(setting.complain(f"this key is obsolete; {OBSOLETE[key]}"))
        elif key == "policy":
            self._put_policy(device, setting)
        elif key in KEYS:
            self.values[device.name][key] = setting
        else:
            # zram-generator, and systemd, go on without it, and so can a file for a later version of us.
            close = difflib.get_close_matches(key, KEYS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            device.complaints.append(setting.complain(f"unknown key, left out{hint}", is_error=False))

    def _put_policy(self, device: Device, setting: Setting) -> None:
        """There is one of each kind, and nothing behind the = takes all away."""
        values = self.values[device.name]
        if setting.value:
            values[f"{_POLICY}{setting.value.split()[0]}"] = setting
        for key in [key for key in values if key.startswith(_POLICY) and not setting.value]:
            del values[key]

    def configuration(self, ram: int) -> Configuration:
        for device in self.devices.values():
            _settle(device, self.values[device.name], ram)
        _expect_own_places(self.devices.values(), self.values)
        return Configuration(dict(sorted(self.devices.items())), self.complaints)


def _lacking(policy: Policy, values: dict[str, Any]) -> str | None:
    """What a policy needs beside it, if that is not there."""
    if isinstance(policy, Writeback):
        return None if "writeback-device" in values else "write-back needs a writeback-device"
    names = [each.name for each in values.get("compression-algorithm", ())[1:]]
    if not names:
        return "recompression needs a second algorithm in compression-algorithm"
    if policy.algo not in (None, *names):
        return f"expected one of the algorithms behind the first, {', '.join(names)}, got algo={policy.algo}"
    return None


_POLICY = "policy "  # and its kind: where the values keep it


def _settle(device: Device, settings: dict[str, Setting], ram: int) -> None:
    """Makes the device's settings of the values, unless something is wrong with them."""
    values: dict[str, Any] = {}
    policies: dict[str, Policy] = {}
    for key, setting in settings.items():
        # Nothing behind the = is the default again, but for options, which may be none at all.
        if setting.value or key == "options":
            try:
                value = KEYS[key.split()[0]].parse(setting.value)
            except ValueError as error:
                device.complaints.append(setting.complain(str(error)))
            else:
                if not key.startswith(_POLICY):
                    values[key] = value
                elif value is not None:
                    policies[key] = value
    for key, policy in policies.items():
        if trouble := _lacking(policy, values):
            device.complaints.append(settings[key].complain(trouble))
    kind = _kind(device, values, settings)
    for key in [key for key in values if kind not in KEYS[key].kinds]:
        del values[key]
        sentence = f"means nothing for a {_KIND_NAMES[kind]}"
        device.complaints.append(settings[key].complain(sentence, is_error=False))
    mib = ram // MIB
    size, limit, reserve, min_free, keep_free = (
        _size(device, settings.get(key), values.get(key, default), ram) for key, default in (
            ("zram-size", DEFAULT_SIZE), ("zram-resident-limit", "0"),
            ("reserve", str(DEFAULT_RESERVE // MIB)), ("min-free", "0"), ("keep-free", "0"),
        )
    )
    if kind == "swap":
        _expect_safe_swap(device, values, settings, reserve)
    _expect_places(device, values, settings, kind)
    host = values.get("host-memory-limit")
    skip = None
    if host is not None and mib > host:
        skip = f"the machine has {mib} MiB of RAM, more than host-memory-limit = {host}"
    elif size == 0:
        skip = f"zram-size = {values.get('zram-size', DEFAULT_SIZE)} is 0 with {mib} MiB of RAM"
    device.complaints.sort(key=lambda each: (device.files.index(each.file), each.line or 0))
    if any(each.is_error for each in device.complaints):
        return
    config = DeviceConfig(
        size=size, mem_limit=limit, policies=tuple(policies.values()),
        keep_free=keep_free if "keep-free" in values else None,
        **{name: values[key] for name, key in _PLAIN.items() if key in values},
    )
    place = values.get("mount-point") or values.get("directory")
    on_top: OnTop = None
    rights = {key: values[key] for key in _RIGHTS if key in values}
    match kind:
        case "swap":
            config = replace(config, reserve=reserve)
            on_top = Swap(
                values.get("swap-priority", swap.DEFAULT_PRIORITY),
                SWAP_OPTIONS[values.get("options", ramdisk.DEFAULT_OPTIONS)],
                min_free if "min-free" in values else None)
        case "ramdisk":
            assert place is not None
            options = values.get("options", ramdisk.DEFAULT_OPTIONS)
            on_top = FileSystem(values.get("fs-type", DEFAULT_FS), place, options, **rights)
        case _:
            config = replace(config, **rights)
    device.settings = Settings(device.name, config, on_top, place, skip)


def _expect_places(
    device: Device, values: dict[str, Any], settings: dict[str, Setting], kind: str
) -> None:
    """What only the other keys, or the machine, tell of places."""
    place, mode = values.get("mount-point") or values.get("directory"), values.get("mode")
    if place and (trouble := mount_points.needs_mode(place, mode if kind == "ramdisk" else None)):
        key = "mount-point" if kind == "ramdisk" else "directory"
        device.complaints.append(settings[key].complain(trouble))
    if "writeback-device" in values and (held := _held_by(values["writeback-device"])):
        device.complaints.append(settings["writeback-device"].complain(
            f"expected a block device, or a file that is there for this alone; {values['writeback-device']} "
            f"holds {held}"))


def _held_by(path: Path) -> str | None:
    """Of files only: a device is looked at when it is taken. What cannot be read now may be there then."""
    try:
        return signatures.held_by(path) if path.is_file() else None
    except OSError:
        return None


def _expect_safe_swap(
    device: Device, values: dict[str, Any], settings: dict[str, Setting], reserve: int
) -> None:
    if values.get("options", "") not in SWAP_OPTIONS:
        expected = ", ".join(filter(None, SWAP_OPTIONS))
        sentence = f"expected one of {expected} or nothing for swap, got {values['options']!r}"
        device.complaints.append(settings["options"].complain(sentence))
    # What can't be evaluated is 0 too, and has been complained about.
    if reserve == 0 and not any(each.key == "reserve" for each in device.complaints if each.is_error):
        sentence = "swap needs a reserve of ready memory: expected more than 0 MiB, got 0"
        device.complaints.append(settings["reserve"].complain(sentence))
    first, *_ = values.get("compression-algorithm") or (Algorithm(DEFAULT_ALGO),)
    if trouble := swap.trouble_with(first):
        device.complaints.append(settings["compression-algorithm"].complain(trouble))


_KIND_NAMES = {"swap": "swap device", "ramdisk": "RAM disk", "device": "plain device"}
# Values that go into DeviceConfig as they are.
_PLAIN = {
    "algorithms": "compression-algorithm", "writeback": "writeback-device", "threads": "threads",
    "proactiveness": "proactiveness", "allow_other": "allow-other", "wipe": "wipe",
    "lock": "lock",
}
_RIGHTS = ("mode", "owner", "group")  # of `disk`, or of the file system on it


def _kind(device: Device, values: dict[str, Any], settings: dict[str, Setting]) -> str:
    fs = values.get("fs-type")
    if "directory" in values:
        for other in ("mount-point", "fs-type"):
            if other in values:
                device.complaints.append(settings[other].complain(
                    "expected either directory, for a plain device, or mount-point, for a file system"
                ))
        return "device"
    if "mount-point" in values:
        if fs == "swap":
            device.complaints.append(settings["fs-type"].complain("swap has no mount-point: leave one out"))
        return "ramdisk"
    if fs not in (None, "swap"):
        device.complaints.append(settings["fs-type"].complain(f"a file system {fs} needs a mount-point"))
        return "ramdisk"
    return "swap"


def _size(device: Device, setting: Setting | None, expression: str, ram: int) -> int:
    """Bytes. setting: where the expression stands; None for a default, which is never wrong."""
    try:
        mib = evaluate(expression, {"ram": float(ram // MIB)})
        if mib < 0:
            raise ValueError(f"expected a size of at least 0 MiB, got {mib:g}")
        if mib * MIB > MAX_DISKSIZE:
            raise ValueError(
                f"expected at most {MAX_DISKSIZE // MIB} MiB, got {mib:.0f}; sizes are in MiB (4096 is 4 GiB)"
            )
    except ValueError as error:
        assert setting is not None
        device.complaints.append(setting.complain(str(error)))
        return 0
    if setting is not None and mib > IMPROBABLE_RATIO * (ram // MIB):
        device.complaints.append(setting.complain(
            f"{mib:.0f} MiB are more than {IMPROBABLE_RATIO} times the machine's {ram // MIB}; sizes are in "
            "MiB", is_error=False,
        ))
    return int(mib * MIB)


def _expect_own_places(devices: Iterable[Device], values: dict[str, dict[str, Setting]]) -> None:
    """Two devices cannot have one directory; the later one, by name, is the wrong one."""
    taken: dict[Path, str] = {}
    for device in sorted(devices, key=lambda each: each.name):
        place = device.settings.place if device.settings else None
        if place is None:
            continue
        if place in taken:
            key = "mount-point" if device.settings.kind == "ramdisk" else "directory"
            device.complaints.append(values[device.name][key].complain(
                f"expected a directory of its own, but {place} is that of {taken[place]}"
            ))
            device.settings = None
        else:
            taken[place] = device.name
