# SPDX-License-Identifier: Apache-2.0
"""What open files of the tree may keep: bounded for a user, and in all."""
from __future__ import annotations

import errno
import os
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyfuse3 import FUSEError

from tests.support.served import served_device
from zramfs.errors import ZramfsError
from zramfs.tree.contents import BYTES, BYTES_A_USER, HANDLES, HANDLES_A_USER, Contents
from zramfs.tree.tree import Directory, File, Tree

MIB = 1 << 20
OWNER, NOBODY = 1000, 65534


@dataclass(frozen=True)
class Caller:
    uid: int


def code_of(call, *arguments) -> int | None:
    try:
        call(*arguments)
    except ZramfsError as error:
        return error.errno
    return None


def test_handles_are_bounded_for_each_user_and_in_all() -> None:
    contents = Contents(OWNER)
    for user in range(2000, 2000 + HANDLES // HANDLES_A_USER):
        for _ in range(HANDLES_A_USER):
            contents.admit(user)
        assert code_of(contents.admit, user) == errno.EMFILE
    assert code_of(contents.admit, NOBODY) == errno.EMFILE
    # Others must not keep the owner and root out.
    assert code_of(contents.admit, OWNER) is code_of(contents.admit, 0) is None
    contents.dismiss(2000)
    assert code_of(contents.admit, NOBODY) is None


def test_copies_are_bounded_for_each_user_and_in_all() -> None:
    contents = Contents(OWNER)
    size = 30_000
    kept = {}
    for user in range(2000, 2000 + BYTES // BYTES_A_USER + 1):
        while code_of(lambda user=user: kept.setdefault(user, []).append(
                contents.keep("metrics", os.urandom(size), user))) is None:
            pass
        assert sum(len(each.data) for each in kept.get(user, [])) <= BYTES_A_USER
    assert sum(len(each.data) for copies in kept.values() for each in copies) <= BYTES
    assert code_of(contents.keep, "metrics", b"x" * size, NOBODY) == errno.ENOMEM
    assert code_of(contents.keep, "metrics", b"x" * size, OWNER) is None
    for user, copies in kept.items():
        for each in copies:
            contents.drop(each, user)
    assert code_of(contents.keep, "metrics", b"x" * size, NOBODY) is None


def test_equal_copies_are_one() -> None:
    contents = Contents(OWNER)
    held = [contents.keep("mm_stat", b"equal" * 20_000, NOBODY) for _ in range(1000)]
    assert len({id(each) for each in held}) == 1
    for each in held:
        contents.drop(each, NOBODY)
    assert contents.keep("mm_stat", b"equal" * 20_000, NOBODY) is not held[0]


async def test_a_reader_sees_one_content_however_it_reads_and_keeps_none_at_the_end() -> None:
    made = iter([b"first " * 10, b"second" * 10, b"third " * 10])
    root = Directory(name="", mode=0o755, children=[File(name="f", mode=0o444, read=lambda: next(made))])
    tree = Tree(root)
    fh = (await tree.open(2, os.O_RDONLY, Caller(NOBODY))).fh
    assert await tree.read(fh, 0, 7) + await tree.read(fh, 7, 100) == b"first " * 10
    assert await tree.read(fh, 60, 100) == b""
    assert await tree.read(fh, 0, 100) == b"second" * 10
    assert await tree.read(fh, 60, 100) == b""
    assert await tree.read(fh, 0, 7) == b"third t"
    await tree.release(fh)
    assert not tree._handles and not tree._contents._bytes and not tree._contents._handles


async def test_who_opens_too_many_is_told_and_others_go_on() -> None:
    tree = Tree(Directory(name="", mode=0o755, children=[
        File(name="f", mode=0o444, read=lambda: os.urandom(BYTES_A_USER // 4))]))
    handles = [(await tree.open(2, os.O_RDONLY, Caller(NOBODY))).fh for _ in range(HANDLES_A_USER)]
    with pytest.raises(FUSEError, match=os.strerror(errno.EMFILE)):
        await tree.open(2, os.O_RDONLY, Caller(NOBODY))
    for fh in handles[:4]:
        assert len(await tree.read(fh, 0, 100)) == 100
    with pytest.raises(FUSEError, match=os.strerror(errno.ENOMEM)):
        await tree.read(handles[4], 0, 100)
    # With room for all of it, nothing has to be kept.
    assert len(await tree.read(handles[4], 0, BYTES_A_USER)) == BYTES_A_USER // 4
    other = (await tree.open(2, os.O_RDONLY, Caller(2000))).fh
    assert len(await tree.read(other, 0, 100)) == 100


def hold_open(path: Path, number: int) -> tuple[int, int, int]:
    """In a child process of nobody's: how many opens and short reads succeed, and the errno of the next. The
    child keeps them until its stdin, the last of these, is closed: (opens, errno, descriptor)."""
    told, tell = os.pipe()
    wait, let_go = os.pipe()
    if os.fork() == 0:
        try:
            os.close(let_go)
            resource.setrlimit(resource.RLIMIT_NOFILE, (number + 100, number + 100))
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            opened, code = 0, 0
            try:
                while opened < number:
                    os.read(os.open(path, os.O_RDONLY), 10)
                    opened += 1
            except OSError as error:
                code = error.errno
            os.write(tell, f"{opened} {code}".encode())
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(tell)
    os.close(wait)
    opened, code = os.read(told, 100).split()
    os.close(told)
    return int(opened), int(code), let_go


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024


@pytest.mark.requires("root", "fuse")
def test_15_000_half_read_files_of_nobody_cost_less_than_8_mib(home: Path) -> None:
    """They cost 462 MiB when each handle had its copy."""
    with served_device(home / "dev", size=MIB, allow_other=True) as child:
        (home / "dev").chmod(0o755)
        child.read("metrics")
        before = resident(child.pid)
        opened, code, let_go = hold_open(child.directory / "metrics", 15_000)
        assert code in (errno.EMFILE, errno.ENOMEM) and opened > 20
        assert resident(child.pid) - before < 8 * MIB
        assert child.read("metrics").endswith("# EOF\n")
        with open(child.directory / "metrics", "rb", buffering=0) as other:
            assert len(other.read(100)) == 100
        os.close(let_go)
        os.wait()
        assert child.stop() == 0, child.log
