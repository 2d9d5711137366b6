# SPDX-License-Identifier: Apache-2.0
"""zramfs density and zramfs status --details: what they say, and what they refuse."""
from __future__ import annotations

import dataclasses
import errno
import os
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.support.commands import failure
from tests.support.mixed_pages import mixed
from tests.support.whole import MIB, device, opened, zramfs
from zramfs.cli.contents import json_of, parse_contents, print_contents
from zramfs.cli.density import as_values, density, parse_estimate, sentences
from zramfs.errors import ZramfsError
from zramfs.model.contents import KINDS, STEPS
from zramfs.model.estimate import Estimate
from zramfs.tree.memory_files import format_estimate

FOUND = Estimate(
    data=8 << 30, memory=3 << 30, after=2 << 30, saved=1 << 30, error=10 << 20, cpu_ns=240 * 10**9,
    groups=131072, sampled_groups=1024, sampled_pages=16000, unit_pages=12000, shared_pages=800,
    own_ns=2 * 10**9, taken_at=1_800_000_000)


def test_the_sentences_say_the_cost_and_the_sample() -> None:
    cost, sample = sentences(FOUND)
    assert cost == ("It would take 4 min of CPU. 75 % of the pages would be in units (zstd 9), and 5 % would "
                    "share an object.")
    assert sample == "Tried on 62.5M of data in 1024 of 131072 groups of 16 pages, chosen by lot."
    short = dataclasses.replace(FOUND, cpu_ns=1_540_000_000, groups=1024, error=0)
    cost, sample = sentences(short)
    assert "take 1.5 s of CPU" in cost and sample == "Tried on 62.5M of data in all groups of 16 pages."


@pytest.mark.parametrize("change", [
    {"saved": 0}, {"saved": 60 << 20}, {"saved": 30 << 20, "error": 0, "memory": 2 << 30}, {"saved": 1 << 30,
     "error": 600 << 20}])
def test_a_win_that_is_no_more_than_the_error_or_a_fiftieth_is_none(change: dict[str, int]) -> None:
    found = dataclasses.replace(FOUND, **change)
    assert not found.is_worth
    assert sentences(found)[0] == "There is nothing to win: the pages would take as much as they do."
    assert as_values(found)["is_worth"] is False


def test_an_empty_device_has_a_sentence_of_its_own() -> None:
    empty = Estimate(*[0] * len(Estimate.__slots__))
    assert sentences(empty) == ["There is nothing on the device that takes memory."]
    assert as_values(empty)["ratio"] is as_values(empty)["after"]["ratio"] is None


def test_the_file_is_read_back_as_it_was_written() -> None:
    assert parse_estimate(format_estimate(FOUND), Path("/mnt/z0")) == FOUND
    assert format_estimate(None) == ""
    for text in ("", "memory x\n", format_estimate(FOUND).replace("cpu_ns", "cpu"), "a b c\n"):
        with pytest.raises(ZramfsError, match="memory/estimate does not read") as caught:
            parse_estimate(text, Path("/mnt/z0"))
        assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize("size", ["1023K", "2G", "0", "much"])
def test_a_sample_out_of_its_range_is_a_wrong_call(size: str) -> None:
    done = CliRunner().invoke(density, ["/nowhere", "--sample", size], standalone_mode=False)
    assert isinstance(done.exception, click.BadParameter)


def contents_text() -> str:
    lines = [f"{kind}_{what} {10 * n + (what == 'bytes')}" for n, kind in enumerate(KINDS) for what in
             ("pages", "bytes")]
    return "\n".join([*lines, "rest_bytes 100", *(
        f"step_{step}_{what} {7 * n}" for n, step in enumerate(STEPS)
        for what in ("pages", "bytes_saved", "cpu_ms"))]) + "\n"


def test_details_show_the_kinds_with_pages_their_sum_and_the_steps_that_were_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = parse_contents(contents_text(), "/mnt/z0")
    print_contents("z0", found, True)
    blank, name, head, *rows = capsys.readouterr().out.splitlines()
    assert (blank, name, head.split()) == ("", "z0", ["KIND", "PAGES", "DATA", "MEMORY", "RATIO"])
    assert [row.split()[0] for row in rows] == [
        *list(KINDS)[1:], "rest", "all", "STEP", "dictionaries", "share", "units"]
    pages, memory = sum(10 * n for n in range(7)), sum(10 * n + 1 for n in range(1, 7)) + 100
    ratio = f"{pages * 4096 / memory:.2f}"
    assert rows[7].split() == ["all", str(pages), str(pages * 4096), str(memory), ratio]
    assert parse_contents("", "/mnt/z0") is None
    for text in ("hot_pages x\n", "hot_pages\n", contents_text().replace("rest", "best"), "hot_pages 1 2\n"):
        with pytest.raises(ZramfsError, match="^/mnt/z0/memory/contents does not read") as caught:
            parse_contents(text, "/mnt/z0")
        assert caught.value.errno == errno.EBADMSG
    old = "".join(f"{line}\n" for line in contents_text().splitlines() if "dictionaries" not in line)
    steps = parse_contents(old, "/mnt/z0")["steps"]
    assert [each["step"] for each in steps] == ["recompress", "share", "units"]
    assert json_of({"a": None, "b": found}) == [
        {"name": "a", "kinds": None, "rest": None, "steps": None}, {"name": "b", **found}]


@pytest.mark.requires("fuse")
@pytest.mark.timeout(120)
def test_density_says_what_the_steps_then_make_of_a_device_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    with (device(tmp_path / "z", 8 * MIB, "--recomp-algo", "zstd:9") as made, opened(made.disk) as fd):
        os.pwrite(fd, mixed(1024, 3), 0)
        shown = zramfs("density", made.directory).stdout.splitlines()
        assert shown[0].split() == ["DATA", "MEMORY", "RATIO"]
        assert [row.split()[0] for row in shown[1:3]] == ["now", "then"]
        assert len(shown) == 5 and "of CPU" in shown[3]
        before, after = (float(re.findall(r"\d+\.\d\d", row)[-1]) for row in shown[1:3])
        assert "step_units_pages 0\n" in made.read("memory/contents"), "nothing was changed"
        zramfs("control", made.directory, "recompress", "share idle=all", "units idle=all level=9",
               "compact objects")
        stat = made.mm_stat()
        assert before < after == pytest.approx(stat["orig_data_size"] / stat["mem_used_total"], rel=0.1)
        again = zramfs("density", made.directory).stdout
        assert "There is nothing to win" in again and "then" not in again
        details = zramfs("status", "--details", made.directory).stdout
        assert re.search(r"^units +\d+ .* compressed together", details, re.MULTILINE)
    assert "none" in failure("density", tmp_path / "none")
