# SPDX-License-Identifier: Apache-2.0
"""Several algorithms from the command line and from mount(8)'s options, to the pages on the device."""
from __future__ import annotations

from pathlib import Path

import click
import pytest

from tests.support.page_kinds import prose
from tests.support.whole import MIB, device, opened, zramfs
from zramfs.cli.mount import parse_options
from zramfs.model.config import Algorithm

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]

PAGE = 4096


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))


def test_create_train_recompress(tmp_path: Path) -> None:
    """The way of somebody who wants it smaller: learn from one device, make the next with that."""
    pages = [prose(n)[: PAGE // 2] + prose(7)[: PAGE // 2] for n in range(400)]
    dictionary = tmp_path / "pages.dict"

    def fill(path: Path) -> None:
        with open(path, "r+b", buffering=0) as disk:
            assert disk.write(b"".join(pages)) == len(pages) * PAGE

    with device(tmp_path / "first", 16 * MIB) as first:
        fill(first.disk)
        said = zramfs("train", first.directory, "--output", dictionary, "--size", "16K").stdout
        assert "pages to train on" in said and "less" in said
    with device(tmp_path / "second", 16 * MIB, "--recomp-algo", "lz4hc:12",
                "--recomp-algo", f"zstd:9:dict={dictionary}", "--access-times") as second:
        fill(second.disk)
        before = second.mm_stat()
        assert second.read("zram/recomp_algorithm") == "#1: lz4 [lz4hc] zstd \n#2: lz4 lz4hc [zstd] \n"
        zramfs("control", second.directory, "idle=all", "recompress type=idle priority=2")
        after = second.mm_stat()
        assert after["compr_data_size"] < 0.5 * before["compr_data_size"]
        assert second.disk.read_bytes()[: len(pages) * PAGE] == b"".join(pages)
        assert "dictionary" not in zramfs("status", second.directory).stderr
        assert "(EINVAL)" in zramfs("control", second.directory, "recompress priority=3", check=False).stderr


def test_a_dictionary_that_is_not_there_is_a_start_that_fails(tmp_path: Path) -> None:
    for spec, reason in (("zstd:dict=/nonexistent", "No such file"),
                         (f"zstd:dict={tmp_path}", "regular file")):
        (tmp_path / "dev").mkdir(exist_ok=True)
        done = zramfs("create", tmp_path / "dev", "--size", "1M", "--algo", spec, check=False)
        assert done.returncode == 1 and reason in done.stderr, done.stderr


@pytest.mark.parametrize("words, reason", [
    (("--algo", "zstd:dict=x"), "absolute path"), (("--recomp-algo", "none"), "makes nothing smaller"),
    (("--recomp-algo", "zstd:77"), "the level of zstd"),
])
def test_wrong_options(tmp_path: Path, words: tuple[str, ...], reason: str) -> None:
    done = zramfs("create", tmp_path / "dev", *words, check=False)
    assert done.returncode == 2 and reason in done.stderr


def test_four_secondary_algorithms_are_one_too_many(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    done = zramfs("create", tmp_path / "dev", *["--recomp-algo", "zstd"] * 4, check=False)
    assert done.returncode == 1 and "at most 3 secondary algorithms" in done.stderr


def test_mount_options() -> None:
    wanted, top = parse_options("size=1G,algo=lz4,recomp_algo=lz4hc,recomp_algo=zstd:9,access_times,wipe,rw")
    assert top is None
    assert wanted.secondary == (Algorithm("lz4hc", 9), Algorithm("zstd", 9))
    assert wanted.access_times and wanted.wipe
    with pytest.raises(click.UsageError, match="makes nothing smaller"):
        parse_options("recomp_algo=none")


def test_a_device_in_use_is_recompressed(tmp_path: Path) -> None:
    with device(tmp_path / "dev", 16 * MIB, "--recomp-algo", "zstd") as made, opened(made.disk):
        with open(made.disk, "r+b", buffering=0) as disk:
            disk.write(prose(1) * 100)
        made.write("zram/recompress", "")
        assert made.read("zram/block_state").count("r") == 100
