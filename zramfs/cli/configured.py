# SPDX-License-Identifier: Apache-2.0
"""zramfs up, zramfs down, zramfs check-config, and what systemd's generator calls"""
from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click

from zramfs.configuration import apply, backing_file, generator, settings
from zramfs.configuration.as_json import configuration_values
from zramfs.configuration.settings import Configuration, ConfiguredDevice
from zramfs.errors import ZramfsError

from . import completion
from .output import print_object, say


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=completion.configured)
@click.option("--foreground", is_flag=True, help="Stay attached until the device ends; takes one NAME.")
def up(names: tuple[str, ...], foreground: bool) -> int:
    """Bring up the devices that are configured in /etc/zramfs, or those with these NAMEs.

    One that is up already is left as it is. When one fails the others are brought up all the same,
    and the exit status is 1.
    """
    if foreground and len(names) != 1:
        raise click.UsageError("--foreground takes the NAME of one device")
    configuration = settings.load_configuration()
    if not names:
        _print(configuration.complaints)
    return _each(
        _outside_in(_chosen(configuration, names)),
        lambda device: apply.bring_up(_expect_sound(device), say, foreground=foreground),
    )


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=completion.configured)
def down(names: tuple[str, ...]) -> int:
    """End the devices that are configured in /etc/zramfs, or those with these NAMEs: their data is gone.

    One that is down already is no failure. One that is in use stays up; the exit status is 1 then.
    """
    configuration = settings.load_configuration()
    # A device whose configuration has been taken away must still go down.
    left = [ConfiguredDevice(name) for name in names
            if name not in configuration.devices and apply.is_there(name)]
    listed = [name for name in names if all(name != each.name for each in left)]
    chosen = [] if left and not listed else _chosen(configuration, listed)

    def work(device: ConfiguredDevice) -> None:
        if apply.bring_down(device.name, say):
            say(f"{device.name} is down")
        elif names:
            say(f"note: {device.name} is down already")

    return _each([*left, *reversed(_outside_in(chosen))], work)


@click.command("check-config")
@click.argument("what", nargs=-1, metavar="[NAME|FILE]...", shell_complete=completion.configured_or_files)
@click.option("-J", "--json", "as_json", is_flag=True, help="As JSON, with what is wrong.")
def check_config(what: tuple[str, ...], as_json: bool) -> int:
    """Say what the configuration means, or that of the devices NAME, or what each FILE says alone.

    A FILE is told from a NAME by a / or the ending .conf. What is wrong goes to stderr, with file,
    line and key; the exit status is 1 if anything is. Changes nothing.
    """
    files = [Path(word) for word in what if "/" in word or word.endswith(".conf")]
    names = [word for word in what if Path(word) not in files]
    chosen: list[ConfiguredDevice] = []
    others: list[settings.Complaint] = []
    if names or not files:
        configuration = settings.load_configuration()
        chosen = _chosen(configuration, names)
        others = [] if names else configuration.complaints
        if not (as_json or names or chosen or others):
            print("nothing is configured: no /etc/zramfs/NAME.conf, and no section in /etc/zramfs/conf.d")
    for file in files:
        alone = settings.load_file(file)
        chosen += alone.devices.values()
        others = [*others, *alone.complaints]
    for device in chosen:
        backing_file.examine_backing_file(device)
    if as_json:
        print_object(configuration_values(chosen, others))
    else:
        _explain(chosen, others)
    complaints = [*others, *(each for device in chosen for each in device.complaints)]
    return int(any(each.is_error for each in complaints))


@click.command("systemd-generator", hidden=True)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("others", nargs=-1)
def systemd_generator(directory: Path, others: tuple[str, ...]) -> None:
    """What systemd calls at boot: write units for the configured devices into DIRECTORY."""
    generator.write_units(settings.load_configuration(), directory, say)


def _chosen(configuration: Configuration, names: Iterable[str]) -> list[ConfiguredDevice]:
    """All, or the named ones. Raises ZramfsError."""
    names = list(names)
    for name in names:
        if name not in configuration.devices:
            there = ", ".join(configuration.devices) or "nothing"
            raise ZramfsError(
                errno.ENOENT, f"no device is configured under the name {name}; configured: {there}"
            )
    return [configuration.devices[name] for name in dict.fromkeys(names or configuration.devices)]


def _outside_in(devices: Iterable[ConfiguredDevice]) -> list[ConfiguredDevice]:
    """A directory before those inside it."""
    return sorted(devices, key=lambda each: str(each.settings and each.settings.place or ""))


def _each(devices: Iterable[ConfiguredDevice], work: Callable[[ConfiguredDevice], None]) -> int:
    """1 if it failed for one of them."""
    status = 0
    for device in devices:
        try:
            work(device)
        except OSError as error:
            status = 1
            where = f"{error.filename}: " if error.filename else ""
            say(f"{device.name}: {where}{error.strerror or error}")
    return status


def _expect_sound(device: ConfiguredDevice) -> settings.Settings:
    backing_file.examine_backing_file(device)
    _print(device.complaints)
    if device.settings is None:
        raise ZramfsError(errno.EINVAL, "its configuration is wrong (above), so it is left down")
    return device.settings


def _explain(devices: Iterable[ConfiguredDevice], others: Iterable[settings.Complaint]) -> None:
    _print(others)
    for device in devices:
        _print(device.complaints)
        print(f"{device.name}  ({', '.join(map(str, device.files))})")
        wanted = device.settings
        for line in apply.describe_settings(wanted) if wanted else ["wrong, so it would not be set up"]:
            print(f"    {line}")
        sys.stdout.flush()


def _print(complaints: Iterable[settings.Complaint]) -> None:
    for each in complaints:
        print(each, file=sys.stderr, flush=True)
