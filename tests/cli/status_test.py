# SPDX-License-Identifier: Apache-2.0
"""zramfs status and zramfs control on real devices."""
from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import failure, rows, state_of
from tests.support.kernel_zram import KernelZram, kernel_zram
from tests.support.whole import MIB, ZRAMFS, Device, device, loop, opened, run, zramfs
from zramfs import __version__
from zramfs.cli.status import COLUMNS, DEFAULT, Row, print_devices
from zramfs.text.sizes import format_size

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run directories of this test alone, so that a list of all devices is a list of its own."""
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Device]:
    """16 pages of noise, 8 of text, 4 of zeros."""
    with device(tmp_path / "device", 8 * MIB, "--mem-limit", "3M") as made:
        with opened(made.disk) as fd:
            os.pwrite(fd, os.urandom(16 * 4096) + (b"some text " * 4096)[: 8 * 4096] + bytes(4 * 4096), 0)
        yield made


def test_status_looks_like_zramctl(filled: Device) -> None:
    name = state_of(filled.directory).name
    headings, row = zramfs("status").stdout.splitlines()
    assert headings.split() == DEFAULT
    stat = filled.mm_stat()
    assert row.split()[:4] == [name, "lz4", "8M", "112K"]
    assert row.split()[6:] == ["2"]
    # Numbers are under the right end of their headings.
    for heading in ("DISKSIZE", "DATA", "STREAMS"):
        end = headings.index(heading) + len(heading)
        assert row[end - 1] != " "
        assert row[end : end + 1] in (" ", "")
    shown = rows("--bytes", "-o", "DATA,COMPR,TOTAL,MEM-LIMIT,MEM-USED,ZERO-PAGES,MIGRATED,DISKSIZE")
    assert shown == [
        {
            "data": stat["orig_data_size"],
            "compr": stat["compr_data_size"],
            "total": stat["mem_used_total"],
            "mem-limit": stat["mem_limit"],
            "mem-used": stat["mem_used_max"],
            "zero-pages": stat["same_pages"],
            "migrated": stat["pages_compacted"],
            "disksize": 8 * MIB,
        }
    ]
    assert (stat["orig_data_size"], stat["same_pages"], stat["mem_limit"]) == (28 * 4096, 4, 3 * MIB)
    assert 16 * 4096 < stat["compr_data_size"] < 17 * 4096


@pytest.fixture
def zram() -> Iterator[KernelZram]:
    with kernel_zram() as made:
        yield made


def lines(text: str) -> list[str]:
    """zramctl fills the last column with blanks."""
    return [line.rstrip() for line in text.splitlines()]


@pytest.mark.requires("zram", "zramctl")
def test_a_kernel_device_looks_as_in_zramctl(zram: KernelZram, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same attributes, the same table."""
    zram.write("mem_limit", b"123M")
    zram.write("disksize", b"1300M")
    with opened(zram.disk) as fd:
        os.pwrite(fd, bytes(MIB) + os.urandom(40 * 4096) + (b"some text " * 4096)[: 8 * 4096], 0)
        os.fsync(fd)
    row = Row(str(zram.disk), zram.directory, None, None, files={
        f"zram/{name}": zram.read(name) for name in ("disksize", "comp_algorithm", "mm_stat")
    })
    everything = run("zramctl", "--output-all", "--raw", zram.disk).stdout.splitlines()[0].split()
    assert set(everything) <= COLUMNS.keys()
    for columns in (DEFAULT, everything, ["NAME", "ZERO-PAGES", "MIGRATED"]):
        for in_bytes, raw, show_headings in itertools.product((False, True), repeat=3):
            words = ["-b"] * in_bytes + ["--raw"] * raw + ["-n"] * (not show_headings)
            theirs = run("zramctl", *words, "-o", ",".join(columns), zram.disk).stdout
            print_devices([row], columns, in_bytes=in_bytes, raw=raw, show_headings=show_headings)
            assert lines(capsys.readouterr().out) == lines(theirs)
    default = run("zramctl", zram.disk).stdout
    assert lines(default) == lines(run("zramctl", "-o", ",".join(DEFAULT), zram.disk).stdout)


@pytest.mark.requires("zram", "zramctl")
def test_sizes_are_rounded_as_in_zramctl(zram: KernelZram) -> None:
    for size in (4096, 1044480, 1 << 20, 1126400, 1994752, 10432512, 104755200, 1047527424):
        zram.write("disksize", str(size).encode())
        shown = run("zramctl", "-n", "--raw", "-o", "DISKSIZE", zram.disk).stdout.strip()
        assert shown == format_size(size)
        zram.reset()


@pytest.mark.requires("zram", "zramctl", "loop", "swap")
def test_swap_is_shown_as_in_zramctl(zram: KernelZram, tmp_path: Path) -> None:
    zram.write("disksize", b"1M")
    with device(tmp_path / "z", MIB) as made, loop(made.disk, "--sector-size", "4096") as ours:
        shown = []
        for area, *status in ((zram.disk, "zramctl", zram.disk), (ours, *ZRAMFS, "status")):
            run("mkswap", area)
            run("swapon", area)
            try:
                shown.append(run(*status, "-n", "--raw", "-o", "MOUNTPOINT", env=dict(os.environ)).stdout)
            finally:
                run("swapoff", area)
        assert shown == ["[SWAP]\n"] * 2
        assert rows("-o", "swap-used,swap-prio") == [{"swap-used": None, "swap-prio": None}]


@pytest.mark.parametrize("words", [
    ["-a", "lz4"], ["-f"], ["-p", "level=3"], ["-r"], ["-s", "1G"], ["-t", "2"], ["--reset"], ["--size=1G"],
])
def test_what_else_zramctl_does_is_pointed_to(words: list[str]) -> None:
    said = failure("status", *words, code=2)
    assert "`zramfs status` only shows; " in said and said.count("`zramfs ") == 2


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_its_version_is_told_as_zramctls(word: str) -> None:
    assert zramfs("status", word).stdout == zramfs("--version").stdout == f"zramfs {__version__}\n"


def test_status_formats(filled: Device) -> None:
    name = state_of(filled.directory).name
    shown = rows("-o", "name,comp-ratio,disksize,mountpoint,pid,state")
    stat = filled.mm_stat()
    assert shown == [
        {
            "name": name,
            "comp-ratio": round(stat["orig_data_size"] / stat["mem_used_total"], 4),
            "disksize": "8M",
            "mountpoint": None,
            "pid": state_of(filled.directory).pid,
            "state": "ready",
        }
    ]
    assert list(rows()[0]) == [name.lower() for name in DEFAULT]
    plus = zramfs("status", filled.directory, "--output", "+PID,STATE", "--raw").stdout.splitlines()
    assert plus[0].split(" ") == [*DEFAULT, "PID", "STATE"]
    raw = zramfs("status", name, "-n", "--raw", "-o", "NAME,DISKSIZE,ZERO-PAGES,DIRECTORY").stdout
    assert raw == f"{name} 8M 4 {filled.directory}\n".replace("\\", "\\x5c")
    ratio = zramfs("status", "-n", "-o", "COMP-RATIO").stdout
    assert ratio == f"{stat['orig_data_size'] / stat['mem_used_total']:10.4f}\n"


def test_status_of_all_columns(filled: Device) -> None:
    [shown] = rows("--output-all", "-b")
    assert list(shown) == [name.lower() for name in COLUMNS]
    assert 0 < shown["longest"] < 60 and shown["state"] == "ready"
    text = zramfs("status", "-n", "--raw", "-o", "LONGEST").stdout
    assert re.fullmatch(r"[0-9.]+\\x20(us|ms|s)\n", text)
    # On a busy machine the look itself may be the longest by now.
    for _ in range(20):
        [before] = rows("-b", "-o", "longest")
        [number] = zramfs("status", "-nb", "-o", "longest").stdout.split()
        if float(number) == before["longest"]:
            break
    assert float(number) == before["longest"]


def test_status_of_several_devices_in_the_order_in_which_they_are_named(tmp_path: Path) -> None:
    with device(tmp_path / "a", MIB, "--name", "one"), device(tmp_path / "b", 2 * MIB), device(
            tmp_path / "c", 3 * MIB):
        names = [[row["directory"] for row in rows("-o", "directory", *words)]
                 for words in ([], [tmp_path / "c", "one"], ["one", tmp_path / "a", tmp_path / "b"])]
        a, b, c = (str(tmp_path / name) for name in "abc")
        assert [sorted(names[0]), *names[1:]] == [[a, b, c], [c, a], [a, b]]
        assert "none is called two" in failure("status", "one", "two")


def test_the_columns_of_huge_recompressed_and_written_back_pages(tmp_path: Path) -> None:
    (tmp_path / "backing").touch(0o600)
    os.truncate(tmp_path / "backing", 4 * MIB)
    words = ["--recomp-algo", "zstd:9", "--writeback", tmp_path / "backing"]
    with device(tmp_path / "device", 8 * MIB, *words) as made:
        columns = ["huge-pages", "recompressed", "written-back", "resident"]
        with opened(made.disk) as fd:
            os.pwrite(fd, os.urandom(16 * 4096) + b"".join(
                os.urandom(1500) + bytes(2596) for _ in range(8)), 0)
        [before] = rows("-b", "-o", ",".join(columns))
        assert (before["huge-pages"], before["recompressed"], before["written-back"]) == (16, 0, 0)
        assert before["resident"] % 4096 == 0 and before["resident"] >= made.mm_stat()["mem_used_total"]
        with opened(made.disk) as fd:
            text = b"".join(f"{n} and {n * n}, ".encode() for n in range(9000))
            os.pwrite(fd, text[: 24 * 4096], 32 * 4096)
        zramfs("control", made.directory, "recompress", "writeback type=huge")
        [after] = rows("-b", "-o", ",".join(columns))
        assert after["written-back"] == 16 * 4096 and after["huge-pages"] == 0
        won = re.search(r'recompress_pages_total\{.*result="won".*\} (\d+)', made.read("metrics"))
        assert won and after["recompressed"] == int(won[1]) > 0
        table = zramfs("status", "-o", "WRITTEN-BACK,RECOMPRESSED").stdout.splitlines()
        assert table[1].split() == ["64K", won[1]]


def test_status_of_nothing(base: Path) -> None:
    assert rows() == []
    assert zramfs("status").stdout == ""


def test_status_survives_a_reader_that_leaves(filled: Device) -> None:
    done = run("sh", "-c", '"$@" status | true', "sh", *ZRAMFS)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_control_sends_commands_and_shows_the_state(filled: Device) -> None:
    done = zramfs("control", filled.directory, "mem_limit=1G", "compact")
    assert (done.stdout, done.stderr) == ("", "")
    assert filled.mm_stat()["mem_limit"] == 1 << 30
    assert zramfs("control", filled.directory).stdout == filled.read("control")


def test_control_gives_the_reason_and_stops_there(filled: Device) -> None:
    said = failure("control", filled.directory, "mem_limit=2G", "frobnicate", "mem_limit=3G")
    assert said.startswith("zramfs: frobnicate: ")
    assert "unknown command" in said
    assert filled.mm_stat()["mem_limit"] == 2 << 30
