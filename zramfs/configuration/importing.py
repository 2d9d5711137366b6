# SPDX-License-Identifier: Apache-2.0
"""From the configuration of zram-generator and zram-tools to files of ours in /etc/zramfs."""
from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host.mounts import unescape

from . import files, settings, zram_generator, zram_tools
from .files import Complaint
from .foreign import ForeignDevice

TOOLS: dict[str, Callable[[Path, list[Complaint]], list[ForeignDevice]]] = {
    zram_generator.TOOL: zram_generator.read_devices,
    zram_tools.TOOL: zram_tools.read_devices,
}
_ZRAM = re.compile(r"/dev/zram[0-9]+")
_GENERATORS = ("etc/systemd", "usr/local/lib/systemd", "usr/lib/systemd", "lib/systemd")


@dataclass
class Plan:
    """devices: all that were found, sound or not. complaints: about what belongs to none."""

    devices: list[ForeignDevice]
    complaints: list[Complaint]

    @property
    def sound(self) -> list[ForeignDevice]:
        """Those that may be written. Where a file was not read none may: it may have said more about any."""
        if any(each.is_error for each in self.complaints):
            return []
        return [device for device in self.devices if device.is_sound]

    @property
    def is_complete(self) -> bool:
        return len(self.sound) == len(self.devices)


def target(top: Path, device: ForeignDevice) -> Path:
    return top / "etc/zramfs" / f"{device.name}{files.SUFFIX}"


def make_plan(top: Path, tools: Collection[str], ram: int | None = None) -> Plan:
    """What the tools have configured below `top`, judged as check-config would judge the files to be written.
    ram in bytes, None = this machine's. Nothing is raised."""
    plan = Plan([], [])
    for name in tools:
        plan.devices += TOOLS[name](top, plan.complaints)
    there = settings.load_configuration(top, ram)
    taken = {device.settings.place: name for name, device in there.devices.items() if device.settings
             and device.settings.place}
    for device in plan.devices:
        if device.is_sound:
            _judge(device, top, there, taken, settings.total_ram(top) if ram is None else ram)
    return plan


def _judge(
    device: ForeignDevice, top: Path, there: settings.Configuration, taken: dict[Path, str], ram: int
) -> None:
    """Adds what is wrong with the file that would be written, also beside the files that are there. taken:
    by directory, the device that has it."""
    file = target(top, device)
    made = settings.load_text(file, device.text(), ram).devices[device.name]
    device.complaints += [_at_its_origin(each, device) for each in made.complaints]
    old = there.devices.get(device.name)
    if others := [str(each) for each in (old.files if old else []) if each != file]:
        device.complaints.append(Complaint(
            file, None, None, f"{', '.join(others)} says something about {device.name}, too: take that out, "
            "or the device would be another one"))
    place = made.settings.place if made.settings else None
    if place is not None and taken.setdefault(place, device.name) != device.name:
        device.complaints.append(Complaint(
            file, None, None, f"expected a directory of its own, but {place} is that of {taken[place]}"))


def _at_its_origin(complaint: Complaint, device: ForeignDevice) -> Complaint:
    """Of the line that ours comes from: the file that is complained about may never be there."""
    origin = device.origins.get(complaint.key or "")
    if origin is None:
        return complaint
    return origin.complain(complaint.sentence, is_error=complaint.is_error)


def write_files(plan: Plan, top: Path, *, replace: bool) -> list[Path]:
    """Writes the file of each sound device, and returns what was written; one that is there with the very
    same text stays. Nothing is written if a file is there already, unless `replace`.

    Raises ZramfsError: EEXIST, EPERM for a directory that others can change; OSError. Then no file of this
    call is left, but one that `replace` has replaced stays replaced.
    """
    texts = {target(top, device): device.text() for device in plan.sound}
    directory = top / "etc/zramfs"
    os.makedirs(directory, 0o755, exist_ok=True)
    try:
        files.list_trusted(directory)
    except OSError as error:
        raise ZramfsError(error.errno or errno.EIO, f"{directory}: {error.strerror}") from None
    for file in [file for file, text in texts.items() if _holds(file, text)]:
        del texts[file]
    if not replace and (there := [str(file) for file in texts if os.path.lexists(file)]):
        raise ZramfsError(
            errno.EEXIST, f"{', '.join(there)} is there already, so nothing was written; --force replaces "
            "it, --dry-run shows by what")
    written: list[Path] = []
    try:
        for file, text in texts.items():
            _write(file, text, replace)
            written.append(file)
    except BaseException:
        for file in () if replace else written:
            file.unlink()
        raise
    return written


def _holds(file: Path, text: str) -> bool:
    complaints: list[Complaint] = []
    return os.path.lexists(file) and files.read_text(file, complaints) == text


def _write(file: Path, text: str, replace: bool) -> None:
    """In one step: a reader sees no file, the old one, or the whole new one. A name that begins with a dot is
    no configuration file."""
    new = file.with_name(f".{file.name}.new")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)  # of a call that was killed
    # 0644: everybody may look, as into the files it comes from, and completion does so.
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as out:
            os.fchmod(fd, 0o644)
            out.write(text)
            out.flush()
            os.fsync(fd)
        if replace:
            os.replace(new, file)
        else:
            os.link(new, file, follow_symlinks=False)  # fails where a file has come meanwhile
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)


# ---- the old service ------------------------------------------------------------------------------
def old_services(top: Path, plan: Plan) -> Iterator[str]:
    """What still makes, or uses, kernel zram devices, and how to end it."""
    used = [f"swap on {device}: `swapoff {device}`" for device in _first_words(top / "proc/swaps")]
    used += [f"{device} mounted on {place}: `umount {place}`"
             for device, place in _mounted(top / "proc/mounts")]
    for each in used:
        yield f"the kernel's zram is in use, {each} ends that"
    tools = {device.tool for device in plan.devices}
    generators = [top / base / "system-generators/zram-generator" for base in _GENERATORS]
    found = next((each for each in generators if os.path.lexists(each)), None)
    if zram_generator.TOOL in tools and found and os.path.realpath(found) != os.devnull:
        yield ("zram-generator makes its devices at each boot; to end that: `mkdir -p "
               "/etc/systemd/system-generators && ln -s /dev/null "
               "/etc/systemd/system-generators/zram-generator`, or remove its package")
    wants = [*top.glob("etc/systemd/system/*.wants/zramswap.service"), *top.glob("etc/rc[2345].d/S*zramswap")]
    if zram_tools.TOOL in tools and wants:
        yield "zramswap starts at each boot; `systemctl disable --now zramswap` ends that"


def _first_words(table: Path) -> list[str]:
    """Devices of zram in the first column."""
    words = [line.split(" ")[0].split("\t")[0] for line in _lines(table)]
    return [word for word in words if _ZRAM.fullmatch(word)]


def _mounted(table: Path) -> Iterator[tuple[str, str]]:
    for line in _lines(table):
        device, _, rest = line.partition(" ")
        if _ZRAM.fullmatch(device):
            yield device, unescape(rest.split(" ")[0])


def _lines(table: Path) -> list[str]:
    try:
        return table.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
