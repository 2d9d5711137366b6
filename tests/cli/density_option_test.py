# SPDX-License-Identifier: Apache-2.0
"""--density on the command line and among mount options, with the default of each kind of device."""
from __future__ import annotations

from pathlib import Path

import click
import pytest

from tests.support.whole import device, zramfs
from zramfs.cli.create import create, ramdisk
from zramfs.cli.mount import parse_options
from zramfs.cli.swap import swap
from zramfs.model.density import AUTO, OFF, Density

MIB = 1 << 20


@pytest.mark.parametrize(("command", "default"), [(create, OFF), (ramdisk, AUTO), (swap, AUTO)])
def test_each_command_has_the_default_of_its_kind(command: click.Command, default: Density) -> None:
    [option] = [each for each in command.params if each.name == "density"]
    context = click.Context(command)
    assert option.get_default(context) == str(default)
    offered = option.shell_complete(context, "")
    assert [each.value for each in offered] == ["off", "auto", "max"]
    for text, wanted in (("off", OFF), ("auto:10%", Density("auto", 10)), ("max", Density("max"))):
        assert option.type_cast_value(context, text) == wanted
    with pytest.raises(click.BadParameter, match="expected off, max, auto, or"):
        option.type_cast_value(context, "high")


@pytest.mark.parametrize(("text", "wanted"), [
    ("size=1G", OFF), ("size=1G,fs=ext4", AUTO), ("size=1G,fs=ext4,density=off", OFF),
    ("size=1G,density=auto:10%", Density("auto", 10)), ("density=max,size=1G,fs=xfs", Density("max")),
])
def test_mount_options(text: str, wanted: Density) -> None:
    assert parse_options(text)[0].density == wanted


@pytest.mark.parametrize("text", ["density", "density=", "density=high"])
def test_wrong_mount_options(text: str) -> None:
    with pytest.raises(click.UsageError, match="the mount option density"):
        parse_options(text)


@pytest.mark.requires("fuse")
def test_a_device_has_the_density_that_it_was_made_with(tmp_path: Path) -> None:
    with device(tmp_path / "dev", 16 * MIB, "--density", "auto:7") as made:
        assert "\ndensity      auto, with at most 7 % of a core; recompress: 0 pages" in made.read("control")
        assert "#1: lz4 lz4hc [zstd]" in made.read("zram/recomp_algorithm")
        made.write("control", "density=max")
        assert "\ndensity      max; recompress: " in made.read("control")
        assert zramfs("status", made.directory, "--output", "DENSITY", "--noheadings").stdout == "max\n"
        made.write("control", "density off")
        assert "\ndensity      off\n" in made.read("control")
