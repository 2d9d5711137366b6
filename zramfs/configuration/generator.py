# SPDX-License-Identifier: Apache-2.0
"""systemd.generator(7): from /etc/zramfs to units that are started at boot.

One file there is enough: for each device a link in local-fs.target.wants or swap.target.wants to its
unit, and a drop-in that orders it by its mount point and its write-back device.
"""
from __future__ import annotations

import os
from pathlib import Path

from zramfs.host.paths import escape, resolve
from zramfs.lifecycle.stop import Say

from .settings import Configuration, ConfiguredDevice

UNITS = Path("/usr/lib/systemd/system")
DROP_IN = "50-zramfs-generator.conf"


def write_units(configuration: Configuration, directory: Path, say: Say) -> None:
    """Writes into `directory`, systemd's for generated units. Raises OSError.

    A device whose configuration is wrong is started too, so that its failure is seen where people
    look for it (`systemctl --failed`), with file, line and reason in its log.
    """
    for complaint in configuration.complaints:
        say(str(complaint))
    for device in configuration.devices.values():
        if device.settings is not None and device.settings.skip is not None:
            say(f"note: {device.name} is left out: {device.settings.skip}")
            continue
        swap = device.settings is not None and device.settings.kind == "swap"
        template = "zramfs-swap@" if swap else "zramfs@"
        unit = f"{template}{device.name}.service"
        wants = directory / ("swap.target.wants" if swap else "local-fs.target.wants")
        wants.mkdir(parents=True, exist_ok=True)
        os.symlink(UNITS / f"{template}.service", wants / unit)
        drop_in = directory / f"{unit}.d" / DROP_IN
        drop_in.parent.mkdir(exist_ok=True)
        drop_in.write_text(_drop_in(device), encoding="utf-8")


def _drop_in(device: ConfiguredDevice) -> str:
    lines = ["# Made by zramfs-generator; `systemctl daemon-reload` makes it anew.", "[Unit]",
             f"SourcePath={_plain(device.files[0])}"]
    settings = device.settings
    if settings is not None and settings.place is not None:
        place = resolve(settings.place)
        # Not the place itself, which this unit mounts.
        lines.append(f"RequiresMountsFor={_word(place.parent)}")
        if settings.kind == "ramdisk":
            lines.append(f"Before={_plain(escape(place))}.mount")
    if settings is not None and settings.config.keep is not None:
        lines.append(f"RequiresMountsFor={_word(settings.config.keep.parent)}")
    if settings is not None and (backing := settings.config.writeback) is not None:
        if backing.is_relative_to("/dev"):
            unit = f"{_plain(escape(backing))}.device"
            lines += [f"BindsTo={unit}", f"After={unit}"]
        else:
            lines.append(f"RequiresMountsFor={_word(backing.parent)}")
    return "\n".join(lines) + "\n"


def _plain(text: Path | str) -> str:
    """For a value that systemd takes as it is, but for specifiers. No line can be added by it: neither
    names of files nor values hold control characters (conffiles)."""
    return str(text).replace("%", "%%")


def _word(path: Path) -> str:
    """For a list of words: quoted, a backslash before what means something inside quotes."""
    text = _plain(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
