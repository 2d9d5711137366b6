# SPDX-License-Identifier: Apache-2.0
"""zramfs status and zramfs control on real devices."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import failure, rows, state_of
from kernel_zram import kernel_zram
from whole import MIB, ZRAMFS, Device, device, opened, run, zramfs

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run directories of this test alone, so that a list of all devices is a list of its own."""
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


ZRAMCTL = "NAME ALGORITHM DISKSIZE DATA COMPR TOTAL STREAMS MOUNTPOINT"


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
    assert headings.split() == ZRAMCTL.split()
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


@pytest.mark.requires("zram", "zramctl")
def test_status_has_the_headings_of_the_real_zramctl() -> None:
    with kernel_zram() as zram:
        zram.write("disksize", b"1M")
        theirs = run("zramctl").stdout.splitlines()[0].split()
        everything = run("zramctl", "--output-all").stdout.splitlines()[0].split()
    assert theirs == ZRAMCTL.split()
    assert rows("-o", ",".join(everything)) == []


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
    assert list(rows()[0]) == ZRAMCTL.lower().split()
    plus = zramfs("status", filled.directory, "--output", "+PID,STATE", "--raw").stdout.splitlines()
    assert plus[0].split(" ") == [*ZRAMCTL.split(), "PID", "STATE"]
    raw = zramfs("status", name, "-nr", "-o", "NAME,DISKSIZE,ZERO-PAGES,DIRECTORY").stdout
    assert raw == f"{name} 8M 4 {filled.directory}\n".replace("\\", "\\x5c")
    ratio = zramfs("status", "-n", "-o", "COMP-RATIO").stdout
    assert ratio == f"{stat['orig_data_size'] / stat['mem_used_total']:.4f}\n"


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
