# SPDX-License-Identifier: Apache-2.0
"""A file that is replaced in one step, also in a directory that belongs to somebody else."""
from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from tests.support.whole import wait_until
from zramfs.errors import ZramfsError
from zramfs.host.whole_file import replace_file

NOBODY = 65534


def test_a_reader_finds_the_old_text_or_the_new_one_and_never_a_part(tmp_path: Path) -> None:
    file = tmp_path / "x.prom"
    texts = [bytes([letter]) * 100_000 for letter in b"ab"]
    replace_file(file, texts[0], 0o644)
    over, seen = threading.Event(), set()

    def read() -> None:
        while not over.is_set():
            seen.add(file.read_bytes())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        wait_until(lambda: seen, "it reads")
        for number in range(200):
            replace_file(file, texts[number % 2], 0o644)
    finally:
        over.set()
        thread.join()
    assert seen <= set(texts) and seen
    assert os.listdir(tmp_path) == ["x.prom"]


@pytest.mark.requires("root")
def test_a_link_of_the_owner_of_the_directory_leads_nowhere(tmp_path: Path) -> None:
    """As node_exporter's user could make it in its own directory, into which root writes."""
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    place = tmp_path / "place"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    (place / f".x.prom.{os.getpid()}").symlink_to(secret)
    replace_file(place / "x.prom", b"new", 0o644)
    assert secret.read_text() == "untouched" and (place / "x.prom").read_bytes() == b"new"
    seen = (place / "x.prom").lstat()
    assert (stat.S_IMODE(seen.st_mode), seen.st_uid) == (0o644, os.geteuid())
    (place / "link.prom").symlink_to(secret)
    with pytest.raises(ZramfsError, match="which root does not follow"):
        replace_file(place / "link.prom", b"new", 0o644)
    assert secret.read_text() == "untouched"
    assert sorted(os.listdir(place)) == ["link.prom", "x.prom"]


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "directory.prom").mkdir()
    os.mkfifo(tmp_path / "pipe.prom")
    for name in ("directory.prom", "pipe.prom"):
        with pytest.raises(ZramfsError, match="to be a regular file"):
            replace_file(tmp_path / name, b"new", 0o644)
    assert sorted(os.listdir(tmp_path)) == ["directory.prom", "pipe.prom"]
