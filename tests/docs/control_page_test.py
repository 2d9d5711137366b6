# SPDX-License-Identifier: Apache-2.0
"""docs/control.md against the code: its tables, its examples, and the errors it promises."""
from __future__ import annotations

import errno
import re
import stat
from pathlib import Path

import pytest

from tests.support.control_page import PAGE, errors, section, table
from tests.support.fakes import FakeLane
from tests.support.paths import ROOT
from zramfs.device.commands import COMMANDS
from zramfs.device.device import Device
from zramfs.model.config import DeviceConfig
from zramfs.tree import state
from zramfs.tree.attributes import ATTRIBUTES
from zramfs.tree.files import tree_of
from zramfs.tree.metric import COUNTER
from zramfs.tree.metric_table import TABLE
from zramfs.tree.tree import Directory, Link

# Writes that bring out every error, each to a device that has no size, has one, and is open.
INPUTS = [b"0", b"1", b"junk", b"", b"-1", b"65536", b"1E", b"4096", b"lz4", b"x" * 128,
          b"/dev/null", b"algo=lz4", b"algo=zstd priority=1", b"priority=99999999999", b"algo=" + b"x" * 128]
VALUES = ["", "=", "=0", "=1", "=junk", "=1E", "=4096", "=lz4", "=zstd:99", f"={1 << 60}",
          "=/dev/null", "=algo=lz4", "=algo=zstd priority=1", "=priority=99999999999", "=level=99",
          "=algo=" + "x" * 128]


def examples() -> list[str]:
    """Every command line of the examples."""
    return re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE)


@pytest.fixture
def device():
    return Device(DeviceConfig(directory=Path("/mnt/z0"), rundir=Path("/run/z0"), name="mnt-z0"), FakeLane())


def files(directory: Directory, above: str = "") -> dict[str, int | None]:
    """Path -> mode; None for a link."""
    found = {}
    for node in directory.children:
        if isinstance(node, Directory):
            found |= files(node, f"{above}{node.name}/")
        else:
            found[above + node.name] = None if isinstance(node, Link) else stat.S_IMODE(node.mode)
    return found


def test_every_file_of_the_tree_is_in_the_table_with_its_mode(device):
    documented = {cells[0].strip("`"): cells[1] for cells in table(PAGE)}
    assert documented.pop("zram/…") == "as the kernel"
    attributes = {f"zram/{a.name}" for a in ATTRIBUTES}
    expected = {path: mode for path, mode in files(tree_of(device, Path("/run/z0/disk"))).items()
                if path not in attributes}
    assert documented.keys() == expected.keys()
    for path, mode in expected.items():
        assert documented[path].split(",")[0] == ("link" if mode is None else f"{mode:04o}"), path


def test_the_table_of_attributes():
    rows = table(section("Attributes"))
    assert [row[0] for row in rows] == [f"`{a.name}`" for a in ATTRIBUTES]
    for (_, mode, read, write, _), a in zip(rows, ATTRIBUTES, strict=True):
        assert mode == f"{a.mode:04o}", a.name
        assert (bool(read), bool(write)) == (a.show is not None, a.parse is not None), a.name


@pytest.mark.parametrize("a", [a for a in ATTRIBUTES if a.parse], ids=lambda a: a.name)
async def test_an_attribute_fails_with_exactly_the_errors_of_the_table(a):
    [promised] = [errors(row[4]) for row in table(section("Attributes")) if row[0] == f"`{a.name}`"]
    assert await outcomes(lambda tree: tree[a.name].write, INPUTS) == promised


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
async def test_a_command_fails_with_exactly_the_errors_of_the_table(command):
    [promised] = [errors(row[2]) for row in table(section("Commands")) if row[0] == f"`{command.usage}`"]
    got = await outcomes(lambda tree: tree["control"].write,
                         [f"{command.name}{value}".encode() for value in VALUES])
    # That a value is wrong, or not wanted, is said for all of them below the table.
    assert got | {"EINVAL"} == promised | {"EINVAL"}


async def outcomes(choose, inputs: list[bytes]) -> set[str]:
    """The errors of all inputs on devices without a size, with one, and with an open disk."""
    found = set()
    for data in inputs:
        for size, opened in ((0, 0), (1 << 20, 0), (0, 1), (1 << 20, 1)):
            lane = FakeLane()
            device = Device(DeviceConfig(directory=Path("/mnt/z0"), rundir=Path("/run/z0"), size=size), lane)
            await device.start()
            lane.started, lane.open_count = True, opened
            root = tree_of(device, Path("/run/z0/disk"))
            zram = next(node for node in root.children if node.name == "zram")
            write = choose({node.name: node for node in (*root.children, *zram.children)})
            try:
                await write(data)
            except OSError as error:
                found.add(errno.errorcode[error.errno])
            lane.open_count = 0
    return found


def test_the_table_of_commands():
    rows = table(section("Commands"))
    assert [(row[0], row[1]) for row in rows] == [(f"`{c.usage}`", c.summary) for c in COMMANDS.values()]


def test_every_attribute_and_command_has_an_example():
    lines = "\n".join(examples())
    for a in ATTRIBUTES:
        assert re.search(rf"\b{a.name}\b", lines), a.name
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", lines), command


async def test_examples_show_what_the_code_prints(device):
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    command = "$ cat /mnt/z0/control\n"
    [shown] = [block.split(command)[1] for block in blocks if command in block]
    await device.command("disksize=4G")
    printed = state.control_text(device.stats())

    def names(text: str) -> list[str]:
        return [line[:12].rstrip() for line in text.split("\n\n")[0].splitlines()]

    assert names(shown) == names(printed)
    assert shown.split("\n\n", 1)[1] == printed.split("\n\n", 1)[1]
    assert "\n[lz4] lz4hc zstd none\n" in PAGE


def test_the_tables_of_columns_are_complete():
    for name in ("mm_stat", "io_stat"):
        columns = [row[0].split()[0] for row in table(section(name))]
        show = next(a.show for a in ATTRIBUTES if a.name == name)
        device = Device(DeviceConfig(directory=Path("/mnt/z0"), rundir=Path("/run/z0")), FakeLane())
        assert columns == [str(number + 1) for number in range(len(show(device.stats()).split()))]
    [example] = re.findall(r"^\$ cat mm_stat\n(.*)$", PAGE, re.MULTILINE)
    assert len(example.split()) == 9


def test_every_metric_is_in_the_table_of_metrics():
    """By its name, or by how the names of several begin: mem_…"""
    documented = [word for row in table(section("metrics")) for word in re.findall(r"`(\S+)`", row[0])]
    patterns = {re.escape(word).replace("…", ".*"): word for word in documented}
    names = {metric.name + ("_total" if metric.kind == COUNTER else "") for metric in TABLE}
    said = {pattern for name in names for pattern in patterns if re.fullmatch(pattern, name)}
    unsaid = {name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert (unsaid, patterns.keys() - said) == (set(), set())


def test_links_lead_somewhere():
    titles = {re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-")
              for title in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    for target in re.findall(r"\]\((.*?)\)", PAGE):
        if target.startswith("#"):
            assert target[1:] in titles, target
        else:
            assert (ROOT / "docs" / target.partition("#")[0]).exists(), target
