# SPDX-License-Identifier: Apache-2.0
"""docs/zramfs.schema.json against what the commands print with --json."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from click.testing import CliRunner

from tests.support.page_kinds import PAGE, noise, prose
from tests.support.paths import ROOT
from tests.support.whole import MIB, Device, device, opened, zramfs
from zramfs.cli import zramfs as group
from zramfs.cli.log import parse_log

SCHEMA = json.loads((ROOT / "docs/zramfs.schema.json").read_text())
COMMANDS = ("status", "doctor", "check-config", "density", "train", "control", "log")


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def valid(command: str, text: str) -> Any:
    """The value, which the schema takes."""
    validator = jsonschema.Draft202012Validator(
        {**SCHEMA, "$ref": f"#/$defs/{command}"}, format_checker=jsonschema.FormatChecker())
    value = json.loads(text)
    validator.validate(value)
    return value


def printed(command: str, *words: object, code: int = 0) -> Any:
    done = zramfs(command, *words, "--json", check=False)
    assert done.returncode == code, done
    return valid(command, done.stdout)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Device]:
    with device(tmp_path / "device", 16 * MIB, "--name", "z", "--recomp-algo", "zstd") as found:
        yield found


def test_every_command_with_json_is_in_the_schema_and_on_the_page() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with_json = {name for name, command in group.commands.items() if not command.hidden and any(
        isinstance(each, click.Option) and "--json" in each.opts for each in command.params)}
    assert with_json == set(COMMANDS)
    page = (ROOT / "docs/json.md").read_text()
    assert set(re.findall(r"^\| `zramfs ([\w-]+)", page, re.MULTILINE)) == set(COMMANDS)
    assert set(COMMANDS) <= SCHEMA["$defs"].keys()


def test_every_object_of_the_schema_is_closed_so_that_a_test_sees_what_is_new() -> None:
    def objects(part: Any) -> Iterator[dict]:
        if isinstance(part, dict):
            if part.get("type") == "object":
                yield part
            for value in part.values():
                yield from objects(value)
        elif isinstance(part, list):
            for value in part:
                yield from objects(value)

    found = list(objects(SCHEMA["$defs"]))
    assert len(found) > 10
    for each in found:
        assert "additionalProperties" in each
        if "properties" in each:
            assert set(each["required"]) == set(each["properties"]), each


@pytest.mark.requires("fuse")
def test_status_and_doctor(made: Device) -> None:
    for words in ([], ["--output-all"], ["--output-all", "--bytes"]):
        [row] = printed("status", *words)["zramfs"]
        assert row["name"] == "z"
    assert printed("doctor")["able"] is True


@pytest.mark.requires("fuse")
def test_status_with_details_and_density(made: Device) -> None:
    assert printed("density", "z")["is_worth"] is False
    with opened(made.disk) as fd:
        os.pwrite(fd, b"".join(prose(number % 40) for number in range(512)) + bytes(PAGE), 0)
    got = printed("density", "z", "--sample", "1M")
    assert got["is_worth"] and got["after"]["memory"] < got["memory"] and got["sample"]["pages"] == 256
    zramfs("control", "z", "share idle=all", "units idle=all")
    [contents] = printed("status", "z", "--details")["contents"]
    pages = {each["kind"]: each["pages"] for each in contents["kinds"]}
    assert contents["name"] == "z" and pages["same"] == 1 and sum(pages.values()) == 513
    memory = sum(each["bytes"] for each in contents["kinds"]) + contents["rest"]
    assert memory == made.mm_stat()["mem_used_total"]
    steps = {each["step"]: each for each in contents["steps"]}
    assert steps["share"]["bytes_saved"] > 0 and steps["share"]["pages"] == pages["shared"]


@pytest.mark.requires("fuse")
def test_control_has_the_state_after_the_commands_and_the_last_error(made: Device) -> None:
    got = printed("control", "z", "mem_limit=3M")
    assert (got["name"], got["directory"], got["last_error"]) == ("z", str(made.directory), None)
    [limit] = [each["value"] for each in got["metrics"] if each["name"] == "mem_limit_bytes"]
    assert limit == 3 * MIB and "limit 3M" in got["state"]["memory"]
    rows = made.read("control").partition("\n\n")[0].splitlines()
    assert len(got["state"]) == len(rows) - 1  # the last error stands by itself
    failed = zramfs("control", "z", "nonsense", "--json", check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "unknown command 'nonsense'" in printed("control", "z")["last_error"]


@pytest.mark.requires("fuse")
def test_the_log_has_an_entry_for_a_command_that_was_refused(made: Device) -> None:
    zramfs("control", "z", "nonsense", check=False)
    got = printed("log", "z")
    assert got["device"] == "z"
    [entry] = [each for each in got["entries"] if "nonsense" in each["message"]]
    assert entry["level"] in ("INFO", "WARNING") and entry["time"].count(":") == 3
    assert printed("log", made.directory, "--lines", "1")["entries"] == got["entries"][-1:]
    assert printed("log", "z", "--lines", "0")["entries"] == []
    assert entry["message"] in zramfs("log", "z").stdout


def test_a_log_is_cut_into_entries_with_their_traces() -> None:
    text = ("fuse: said by a library\nTwo lines\n"
            "2026-11-29 03:31:10,123 ERROR zramfs.daemon: it failed\n"
            "Traceback (most recent call last):\n  x\n"
            "2026-13-29 03:31:10,123 INFO zramfs: no such month\n")
    got = parse_log(text)
    valid("log", json.dumps({"device": "z", "entries": got}))
    assert [each["message"] for each in got] == [
        "fuse: said by a library\nTwo lines", "it failed\nTraceback (most recent call last):\n  x",
        "no such month"]
    assert [each["level"] for each in got] == [None, "ERROR", "INFO"]
    assert got[1]["time"].startswith("2026-11-29T03:31:10.123") and got[2]["time"] is None
    assert parse_log("") == []


@pytest.mark.requires("fuse")
def test_train_says_what_was_won_and_what_was_not_written(made: Device, tmp_path: Path) -> None:
    pytest.importorskip("zstandard", reason="zstandard is not installed (pip install zramfs[train])")
    with opened(made.disk) as fd:
        os.pwrite(fd, b"".join(
            f"INSERT INTO visits VALUES ({n}, 'of the same kind');\n".encode() * 80 for n in range(400))
            [: 400 * 4096], 0)
    got = printed("train", "z", "--output", tmp_path / "d", "--size", "4K")
    assert got["output"] == str(tmp_path / "d") and got["size"] == (tmp_path / "d").stat().st_size
    assert got["won"] == pytest.approx(1 - got["with_it"]["nbytes"] / got["without"]["nbytes"])
    with opened(made.disk) as fd:
        os.pwrite(fd, b"".join(noise(n) for n in range(2000)), 0)
    lost = printed("train", "z", "--output", tmp_path / "lost", "--size", "4K", code=1)
    assert lost["output"] is None and not (tmp_path / "lost").exists()


def test_check_config_in_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for case in sorted((ROOT / "tests/configuration/cases").iterdir()):
        monkeypatch.setenv("ZRAMFS_ROOT", str(case))
        said = CliRunner().invoke(group, ["check-config"], standalone_mode=False)
        got = valid("check-config", CliRunner().invoke(
            group, ["check-config", "--json"], standalone_mode=False).stdout)
        assert got["sound"] == (said.return_value == 0), case.name
        everything = [*got["complaints"], *(each for one in got["devices"] for each in one["complaints"])]
        assert len(everything) == len(said.stderr.splitlines()), case.name
        assert [f"{one['name']}  (" for one in got["devices"]] == re.findall(
            r"^(?=\S)(\S+  \()", said.stdout, re.MULTILINE)


def test_check_config_says_every_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    place = tmp_path / "etc/zramfs"
    place.mkdir(parents=True)
    for name, text in {
        "disk": "mount-point=/m\nfs-type=xfs\nzram-size=400\noptions=noatime,discard\nmode=1777\nowner=3\n"
                "compression-algorithm=lz4 zstd(level=9,dict=/d)\npolicy=recompress idle=10min\nkeep-free=7\n"
                "keep=/i\nkeep-every=15min",
        "plain": "directory=/d\nzram-size=1\nallow-other=yes\nmode=0640\nwipe=yes\nlock=yes",
        "swap": "zram-size=4\nswap-priority=-1\nmin-free=9\noptions=\nhost-memory-limit=1",
        "wrong": "zram-size=x",
    }.items():
        (place / f"{name}.conf").write_text(text)
    got = printed("check-config", code=1)
    by_name = {each["name"]: each["settings"] for each in got["devices"]}
    assert not got["sound"] and by_name["wrong"] is None
    disk, plain, swap = (by_name[name] for name in ("disk", "plain", "swap"))
    assert disk["file_system"] == {"type": "xfs", "options": "noatime,discard"}
    assert (disk["mode"], disk["owner"], disk["keep_free"], disk["size"]) == ("1777", 3, 7 * MIB, 400 * MIB)
    assert disk["algorithms"][1] == {"name": "zstd", "level": 9, "dictionary": "/d"}
    assert (disk["keep"], disk["keep_every"], plain["keep"]) == ("/i", 900, None)
    assert disk["policies"] == ["recompress idle=10min"]
    assert (plain["place"], plain["mode"], plain["wipe"], plain["lock"], plain["allow_other"]) == (
        "/d", "0640", True, True, True)
    assert swap["swap"] == {"priority": -1, "discard": "none", "reserve": 16 * MIB, "min_free": 9 * MIB}
    assert "more than host-memory-limit = 1" in swap["skip"]
