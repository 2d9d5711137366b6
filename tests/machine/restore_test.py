# SPDX-License-Identifier: Apache-2.0
"""An image with holes, restored over a device that is in use: the holes hold zeros afterwards, whatever wrote
the image, and a device that somebody else has open keeps what it holds."""
from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.whole import MIB, PAGE, Device, device, loop, run, tool_environment, wait_until
from zramfs.lifecycle import rundir

pytestmark = [pytest.mark.requires("fuse")]

SIZE = 32 * MIB
SMALL = 8 * MIB


@pytest.fixture(scope="module")
def z(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with device(tmp_path_factory.mktemp("restore") / "z", SIZE) as z:
        yield z


def make_image(path: Path, size: int) -> Path:
    """Data in every third 64 KiB and none at the end, as of a file system that was trimmed."""
    choose = random.Random(size)
    with path.open("wb") as file:
        for offset in range(0, size - MIB, 3 << 16):
            file.seek(offset)
            file.write(choose.randbytes(PAGE) * choose.randrange(1, 16))
        file.truncate(size)
    assert os.stat(path).st_blocks * 512 < size * 2 // 3
    return path


def fill(path: Path) -> None:
    """With data everywhere, as of a device that was used."""
    with path.open("r+b", buffering=0) as file:
        for n in range(SIZE // MIB):
            file.write(random.Random(n).randbytes(PAGE) * (MIB // PAGE))


def log_of(z: Device) -> str:
    found = rundir.find(str(z.directory))
    assert found is not None
    return found.log.read_text()


def digest(path: Path, size: int | None = None) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read() if size is None else file.read(size)).hexdigest()


def shell(command: str, *arguments: object) -> list[str]:
    return ["bash", "-c", command, "bash", *map(str, arguments)]


def with_cp(image: Path, disk: Path) -> list[str]:
    return ["cp", str(image), str(disk)]


def with_dd(image: Path, disk: Path) -> list[str]:
    return shell('dd if="$1" of="$2" bs=64k conv=sparse status=none', image, disk)


def with_lz4(image: Path, disk: Path) -> list[str]:
    return shell('lz4 -qf "$1" "$1.lz4" && lz4 -qdf "$1.lz4" "$2"', image, disk)


def with_zstd(image: Path, disk: Path) -> list[str]:
    return shell('zstd -qf "$1" -o "$1.zst" && zstd -qdf "$1.zst" -o "$2"', image, disk)


def with_tar(image: Path, disk: Path) -> list[str]:
    """As the name that the image has to have in an archive from which it is extracted."""
    return shell('tar -C "${1%/*}" --sparse --transform "s/.*/disk/" -cf "$1.tar" "${1##*/}" && '
                 'tar -C "${2%/*}" --overwrite --no-same-owner -xf "$1.tar" disk', image, disk)


def with_qemu_img(image: Path, disk: Path) -> list[str]:
    return shell('qemu-img convert -O qcow2 "$1" "$1.qcow2" && qemu-img convert -O raw "$1.qcow2" "$2"',
                 image, disk)


def with_rsync(image: Path, disk: Path) -> list[str]:
    # It takes a file of the same size and second for the same.
    return ["rsync", "--inplace", "--ignore-times", str(image), str(disk)]


TOOLS = {"cp": with_cp, "dd": with_dd, "lz4": with_lz4, "zstd": with_zstd, "tar": with_tar,
         "qemu-img": with_qemu_img, "rsync": with_rsync}
# Those that truncate first; rsync writes what differs, and the holes too.
TRUNCATING = [tool for tool in TOOLS if tool != "rsync"]


def restore(tool: str, image: Path, disk: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which(tool, path=tool_environment()["PATH"]) is None:
        pytest.skip(f"no {tool} here")
    # In the directory of a device `disk` is a link, which tar and rsync would replace.
    return run(*TOOLS[tool](image, disk.resolve()), check=False)


@pytest.mark.parametrize("tool", TOOLS)
def test_an_image_with_holes_is_restored_over_a_used_device(tool: str, z: Device, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", SIZE)
    for _ in range(3):  # one after the other: the file that was closed last is out of the way
        fill(z.disk)
        done = restore(tool, image, z.disk)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert digest(z.disk) == digest(image)
    assert z.disk.stat().st_size == SIZE


@pytest.mark.parametrize("tool", TOOLS)
def test_a_smaller_image_leaves_the_size_alone(tool: str, z: Device, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", SMALL)
    fill(z.disk)
    done = restore(tool, image, z.disk)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert z.disk.stat().st_size == SIZE
    assert digest(z.disk, SMALL) == digest(image)
    if tool in TRUNCATING:
        assert not any(z.disk.read_bytes()[SMALL:])


@pytest.mark.requires("loop")
@pytest.mark.parametrize("tool", TRUNCATING)
def test_nothing_is_restored_over_a_device_that_is_in_use(tool: str, z: Device, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", SIZE)
    fill(z.disk)
    before = digest(z.disk)
    with loop(z.disk):
        done = restore(tool, image, z.disk)
        assert done.returncode != 0 and done.stderr
        assert digest(z.disk) == before
        with pytest.raises(OSError, match="busy"):
            os.truncate(z.disk, 0)
    assert digest(z.disk) == before
    wait_until(lambda: "busy_truncations went from" in log_of(z), "the log says why", 10)


def test_dd_seek_changes_what_it_writes_and_nothing_else(z: Device, tmp_path: Path) -> None:
    fill(z.disk)
    expected = bytearray(z.disk.read_bytes())
    for block in (1, 5, SIZE // PAGE - 1):
        data = os.urandom(PAGE)
        (tmp_path / "block").write_bytes(data)
        done = run("dd", f"if={tmp_path}/block", f"of={z.disk}", f"bs={PAGE}", f"seek={block}", "status=none")
        assert done.stderr == ""
        expected[block * PAGE:(block + 1) * PAGE] = data
    assert z.disk.read_bytes() == expected


def test_an_image_that_is_too_large_is_refused_with_a_sentence(z: Device, tmp_path: Path) -> None:
    done = run("truncate", "-s", str(SIZE + PAGE), z.disk, check=False)
    assert done.returncode != 0 and "Invalid argument" in done.stderr
    wait_until(lambda: "truncations asked for more than the size" in log_of(z), "the log says why", 10)
