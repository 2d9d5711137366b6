# SPDX-License-Identifier: Apache-2.0
"""The command line where its caller left it little: no output, another locale, limits, a short PATH."""
from __future__ import annotations

import errno
import importlib
import os
import resource
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import nothing_left
from tests.support.whole import ZRAMFS, run, zramfs
from zramfs import cli
from zramfs.errors import ZramfsError
from zramfs.host import mounts

pytestmark = [pytest.mark.requires("fuse"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def shell(text: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of the shell, in which $Z is the command zramfs; words are $1 and so on."""
    script = text.replace("$Z", shlex.join(ZRAMFS))
    return run("sh", "-c", script, "sh", *words, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_descriptors_keep_nobody_from_a_device(tmp_path: Path, base: Path, closed: str) -> None:
    place = tmp_path / "device"
    for line in (f'$Z create "$1" --size 1M {closed}', f'$Z stop "$1" {closed}'):
        done = shell(line, place)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    nothing_left(place, base)


def test_output_that_nobody_can_get_is_a_failure_with_one_sentence(tmp_path: Path) -> None:
    place = tmp_path / "device"
    zramfs("create", place, "--size", "1M")
    try:
        done = shell("$Z status >&-")
        assert (done.returncode, done.stderr) == (1, "zramfs: the standard output is closed\n")
    finally:
        zramfs("stop", place)


def test_a_reader_that_has_left_is_told_nothing() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        for words in (["status", "--help"], ["help", "control"], ["--version"]):
            done = subprocess.run(
                [*ZRAMFS, *words], stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60)
            assert (done.returncode, done.stderr) == (1, ""), words
    finally:
        os.close(write_end)


def test_a_broken_pipe_of_a_daemon_is_told_with_its_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a daemon whose helper has ended."""
    def fail(directory: str) -> Path:
        raise ZramfsError(errno.EPIPE, "the helper has ended")

    control = importlib.import_module("zramfs.cli.control")
    monkeypatch.setattr(control, "tree", fail)
    assert cli.main(["control", "/x"]) == 1
    assert capsys.readouterr().err == "zramfs: the helper has ended\n"


LOCALES = [
    {"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {"LC_ALL": "C.UTF-8"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},  # as in an 8-bit locale
]


@pytest.mark.parametrize("made_in", LOCALES, ids=str)
def test_a_path_with_an_umlaut_is_the_same_in_every_locale(
    tmp_path: Path, base: Path, made_in: dict[str, str]
) -> None:
    place = tmp_path / "für"
    assert shell('$Z create "$1" --size 1M', place, **made_in).returncode == 0
    assert mounts.mount_at(place) is not None
    for other in LOCALES:
        done = shell("$Z status --noheadings --output DIRECTORY,STATE", **other)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{place} ready\n", "")
    done = shell('$Z stop "$1"', place, **LOCALES[-1])
    assert (done.returncode, done.stderr) == (0, "")
    nothing_left(place, base)


def test_a_limit_on_the_size_of_files_is_named_and_nothing_is_left(tmp_path: Path, base: Path) -> None:
    place = tmp_path / "device"
    done = run(*ZRAMFS, "create", place, "--size", "1M", check=False, env=dict(os.environ), preexec_fn=_limit)
    if done.returncode == 0:  # root with CAP_SYS_RESOURCE takes the limit away
        zramfs("stop", place)
    else:
        assert done.stderr == (
            "zramfs: files may have at most 102400 bytes here (ulimit -f), and a device keeps its data in a "
            "memory file that is longer: expected `ulimit -f unlimited`\n")
    assert not place.exists()
    nothing_left(place, base)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (102400, 102400))


@pytest.mark.requires("root", "loop", "ext4")
@pytest.mark.parametrize("path", ["/usr/bin:/bin", "/nonexistent"])
def test_programs_are_found_where_path_leaves_them_out(tmp_path: Path, base: Path, path: str) -> None:
    """As cron and su have it: without the sbin directories."""
    place = tmp_path / "disk"
    environment = {**os.environ, "PATH": path}
    for words in (["ramdisk", place, "--size", "16M"], ["stop", place]):
        done = run(*ZRAMFS, *words, check=False, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
    nothing_left(place, base)
