# SPDX-License-Identifier: Apache-2.0
"""Every attribute by the kernel's rules (drivers/block/zram of 7.1), in three states: before the device
has a size, with one, and while somebody has disk open.

tests/machine/differential_test.py compares everything that the zram of the machine's kernel has. This file
is about the rest, which few kernels have as a whole: algorithms with parameters, recompression, idle marks,
write-back.
"""
from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.unmounted import OK, PAGE, Ours, device

STATES = ("before", "with a size", "open")
BAD = {"EINVAL"}
# With a size the kernel refuses at once or after the text has been read; either is right.
BUSY_OR_BAD = {"EBUSY", "EINVAL", "ERANGE"}


@dataclass(frozen=True)
class Rule:
    """texts: each is a write of its own, to a new device. before, after: what becomes of it, OK or the
    errnos of which it must be one; after: with a size. setup: what was written first; {} is a place for
    files, with `store` of 1 MiB and `empty`."""

    name: str
    texts: tuple[str, ...]
    before: str | set[str]
    after: str | set[str]
    setup: tuple[tuple[str, str], ...] = field(default=())


SECOND = (("recomp_algorithm", "algo=zstd priority=1"),)
STORE = (("backing_dev", "{}/store"),)
NO_BUDGET = (*STORE, ("writeback_limit_enable", "1"))

RULES = (
    Rule("algorithm_params", ("level=1", "level=4\n", "algo=lz4 level=4", "algo=lz4 priority=0", "level=+3",
                              "priority=0 level=2", "unknown=1", "level=\"3\"", "\"level=3\"", "  level=3  ",
                              "deflate.winbits=12", "level=0", "level=-5"), OK, {"EBUSY"}),
    Rule("algorithm_params", ("level", "level=", "level=x", "level=0x10", "level=1.5", "level = 3", "=3",
                              "priority=4", "priority=-1", "priority=256", "priority=x", "priority=1",
                              "algo", "algo=", "algo=zstd", "algo=nosuch", "algo=lz4 priority=1",
                              "dict=/nonexistent/file", "dict=relative", "dict=/", "dict=/dev/null", "dict=",
                              "level=3 level=x", "deflate.winbits=x"), BAD, BUSY_OR_BAD),
    Rule("algorithm_params", ("level=99999999999", "level=2147483648", "level=-2147483649",
                              "priority=99999999999"), {"ERANGE"}, BUSY_OR_BAD),
    Rule("algorithm_params", ("algo=zstd level=5", "priority=1 level=5", "algo=zstd priority=1 level=-3"),
         OK, {"EBUSY"}, SECOND),
    Rule("algorithm_params", ("algo=zstd priority=0", "algo=zstd priority=2", "algo=lz4 priority=1",
                              "priority=2 level=5", "algo=lz4hc"), BAD, BUSY_OR_BAD, SECOND),
    Rule("recomp_algorithm", ("algo=zstd", "algo=zstd\n", "algo=lz4hc priority=3", "priority=2 algo=lz4",
                              "unknown=x algo=zstd"), OK, {"EBUSY"}),
    Rule("recomp_algorithm", ("priority=1", "algo=", "algo", "zstd", "algo=nosuch", "algo=zstd priority=0",
                              "algo=zstd priority=4", "algo=zstd priority=-1", "algo=zstd priority=x"),
         BAD, BUSY_OR_BAD),
    Rule("recomp_algorithm", ("algo=zstd priority=99999999999",), {"ERANGE"}, BUSY_OR_BAD),
    Rule("recompress", ("type=idle", "type=huge", "type=huge_idle", "type=huge_idle\n",
                        "unknown=1", "max_pages=5", "max_pages=0", "threshold=3000", "threshold=3624",
                        "priority=1", "algo=zstd", "algo=zstd priority=1",
                        "type=idle threshold=100 max_pages=9 priority=1"),
         BAD, OK, SECOND),
    Rule("recompress", ("type", "type=", "type=bogus", "type=all", "type=idle,huge", "threshold=3625",
                        "threshold=4096", "threshold=x", "threshold=-1", "max_pages=x", "max_pages=-1",
                        "priority=0", "priority=2", "priority=4", "priority=x",
                        "algo=lz4hc", "algo=nosuch", "algo=zstd priority=2", "junk"), BAD, BAD, SECOND),
    Rule("recompress", ("type=idle", "priority=1", "algo=zstd", "type=huge"), BAD, BAD),
    Rule("compact", ("1", "anything"), BAD, OK),
    Rule("idle", ("all", "all\n"), BAD, OK),
    # Ages want access times, which are off.
    Rule("idle", ("0", "5", "junk", "al", "all ", "allx", "-1", "\n"), BAD, BAD),
    Rule("backing_dev", ("{}/store", "{}/store\n"), OK, {"EBUSY"}),
    Rule("backing_dev", ("{}/nothing",), {"ENOENT"}, {"EBUSY"}),
    Rule("backing_dev", ("/dev/null",), {"ENOTBLK"}, {"EBUSY"}),
    Rule("backing_dev", ("{}/empty",), BAD, {"EBUSY"}),
    Rule("backing_dev", ("{}",), {"EISDIR", "ENOTBLK"}, {"EBUSY"}),
    Rule("writeback", ("idle", "huge", "type=idle", "junk", "page_index=0"), BAD, {"ENODEV"}),
    Rule("writeback", ("idle", "idle\n", "huge", "huge_idle", "incompressible", "type=idle", "type=huge",
                       "type=huge_idle", "type=incompressible", "page_index=0", "page_index=63",
                       "page_indexes=0-63", "page_indexes=5-5", "page_index=1 page_indexes=2-4 page_index=9"),
         BAD, OK, STORE),
    Rule("writeback", ("junk", "type=junk", "type=", "page_index=x", "page_index=", "page_index=-1",
                       "page_indexes=5", "page_indexes=x-5", "page_indexes=1-x", "page_indexes=-"),
         BAD, BAD, STORE),
    Rule("writeback", ("page_index=64", "page_indexes=0-64", "page_indexes=5-1", "page_indexes=64-65"),
         BAD, {"ERANGE"}, STORE),
    Rule("writeback", ("huge", "page_index=0"), BAD, {"EIO"}, NO_BUDGET),
    Rule("writeback_limit", ("0", "100\n", "+5", "18446744073709551615"), OK, OK),
    Rule("writeback_limit", ("x", "-1", "1k", "0x10", "1 2", "18446744073709551616", "\n"), BAD, BAD),
    Rule("writeback_limit_enable", ("0", "1", "1\n"), OK, OK),
    Rule("writeback_limit_enable", ("x", "-1", "y", "\n"), BAD, BAD),
    Rule("writeback_batch_size", ("1", "32\n", "1000"), OK, OK),
    Rule("writeback_batch_size", ("0", "x", "-1", "4294967296", "\n"), BAD, BAD),
    Rule("compressed_writeback", ("0", "1", "y", "n", "Y", "N", "on", "off", "ON", "yes", "no\n"),
         OK, {"EBUSY"}),
    Rule("compressed_writeback", ("2", "x", "o", "\n"), BAD, BUSY_OR_BAD),
    Rule("disksize", ("256K", "0x40000", "262144junk"), OK, {"EBUSY"}),
    Rule("disksize", ("0", "junk", "-1"), BAD, BAD),
    Rule("mem_limit", ("0", "1M", "K"), OK, OK),
    Rule("mem_limit", ("junk", "-1", "\n"), BAD, BAD),
    Rule("mem_used_max", ("0", "0\n"), OK, OK),
    Rule("mem_used_max", ("1", "x", "\n"), BAD, BAD),
    Rule("comp_algorithm", ("lz4", "lz4hc", "zstd\n"), OK, {"EBUSY"}),
    Rule("comp_algorithm", ("nosuch", "zstd:3", " lz4", "\n"), BAD, BUSY_OR_BAD),
    Rule("reset", ("0", "x", "-1", "\n"), BAD, BAD),
    Rule("reset", ("65536", "99999999999"), {"ERANGE"}, {"ERANGE"}),
)
async def in_state(ours: Ours, state: str, setup: tuple[tuple[str, str], ...], place: Path) -> None:
    await ours.done(*((f"zram/{name}", text.replace("{}", str(place))) for name, text in setup))
    if state != STATES[0]:
        await ours.done(("zram/disksize", "256K"))
        ours.store.write(0, b"text " * 5000 + os.urandom(8 * PAGE))
    ours.lane.open_count = int(state == STATES[2])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "store").write_bytes(bytes(1 << 20))
    (tmp_path / "empty").touch()
    return tmp_path


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name} {rule.texts[0]!r}")
async def test_writes_end_as_the_kernel_has_them(rule: Rule, state: str, place: Path) -> None:
    expected = rule.before if state == STATES[0] else rule.after
    if rule.name == "disksize" and state == STATES[2] and expected != BAD:
        expected = {"EBUSY"}
    wrong = {}
    for text in rule.texts:
        async with device(place) as ours:
            await in_state(ours, state, rule.setup, place)
            got = await ours.write(f"zram/{rule.name}", text.replace("{}", str(place)))
        if got not in ({expected} if expected == OK else expected):
            wrong[text] = got
    assert not wrong, f"expected {expected}"


def test_every_attribute_that_takes_writes_has_rules(tmp_path: Path) -> None:
    writable = {path.removeprefix("zram/") for path, file in Ours(tmp_path).files.items()
                if file.write and path.startswith("zram/")}
    assert writable == {rule.name for rule in RULES}
