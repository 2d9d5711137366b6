# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing (atheris) of what reads a stranger's bytes.

    python tests/support/fuzz.py TARGET [OPTION]... CORPUS

OPTION: of libFuzzer, such as -runs=10000, -seed=1, -max_total_time=60. CORPUS is a directory, which receives
the inputs with which the target begins. When something happens that no caller expects, the run ends with a
trace and leaves the input in a file crash-...
"""
from __future__ import annotations

import contextlib
import errno
import math
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["zramfs"]):
    from zramfs.codecs import codec
    from zramfs.configuration import expression, importing, settings, zram_tools
    from zramfs.device import commands
    from zramfs.errors import ZramfsError
    from zramfs.text import kernel_numbers, key_values, sizes
    from zramfs.tree import attributes

PAGE = 4096
NUMBER_ERRORS = {errno.EINVAL, errno.ERANGE}


def numbers(data: bytes) -> None:
    value, used = kernel_numbers.memparse(data)
    assert 0 <= value <= kernel_numbers.U64_MAX and 0 <= used <= len(data)
    assert kernel_numbers.memparse(data[:used]) == (value, used)
    assert kernel_numbers.page_align(value) % PAGE == 0
    try:
        value = kernel_numbers.kstrtoull(data, 65535)
        assert 0 <= value <= 65535
    except ZramfsError as error:
        assert error.errno in NUMBER_ERRORS and error.sentence.encode()


def size(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        assert 0 <= sizes.parse_size(text, ram=1 << 32) < 1 << 63
    except ValueError as error:
        assert str(error)


def attribute(data: bytes) -> None:
    """What an attribute makes of a write is a command that `control` knows."""
    chosen = WRITABLE[data[0] % len(WRITABLE)] if data else WRITABLE[0]
    try:
        line = chosen.parse(data[1:])
        commands.parse(line)
    except ZramfsError as error:
        assert errno.errorcode[error.errno] and error.sentence.encode()


def command(data: bytes) -> None:
    try:
        for line in commands.lines(data):
            found, value = commands.parse(line)
            assert commands.COMMANDS[found.name] is found and isinstance(value, str)
    except ZramfsError as error:
        assert error.errno in (errno.EINVAL, errno.E2BIG) and error.sentence.encode()


def keys(data: bytes) -> None:
    text = key_values.text_of(data)
    try:
        for key, value in key_values.pairs(text):
            assert key and value
            with contextlib.suppress(ZramfsError):
                assert -8 <= key_values.number(key, value, -8, 8) <= 8
    except ZramfsError as error:
        assert error.errno in NUMBER_ERRORS and error.sentence.encode()


def size_expression(data: bytes) -> None:
    try:
        assert math.isfinite(expression.evaluate_expression(data.decode("utf-8", "replace"), {"ram": 8192.0}))
    except ValueError as error:
        assert str(error)


def configuration(data: bytes) -> None:
    """Whatever is in the file, what is wrong is a complaint, and a device is whole or has none."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "z0.conf"
        file.write_bytes(data)
        found = settings.load_file(file, ram=8 << 30)
    for device in found.devices.values():
        assert device.settings or any(complaint.is_error for complaint in device.complaints)
        assert all(str(complaint) for complaint in device.complaints)


def foreign_configuration(data: bytes) -> None:
    """As both tools would have it: every device that is sound has a file that says the same again."""
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory)
        for name in ("etc/systemd/zram-generator.conf", zram_tools.FILE):
            (top / name).parent.mkdir(parents=True)
            (top / name).write_bytes(data)
        plan = importing.make_plan(top, importing.TOOLS, ram=8 << 30)
        for device in plan.sound:
            made = settings.load_text(importing.target(top, device), device.text(), 8 << 30)
            assert made.devices[device.name].entries.keys() == device.lines.keys()
            assert made.devices[device.name].settings and not made.errors


# Compiled code tells atheris nothing of its coverage: what is nearly right is made here.

def compressed(data: bytes) -> None:
    """Edited bytes of a compressed page: some page, or EIO; and the codec still works."""
    codec, good = PACKED[data[0] % len(PACKED)] if data else PACKED[0]
    bad = edited(good, data[1:])
    for wanted in (PAGE, len(data)):
        try:
            assert len(codec.decompress(bad, wanted)) == wanted
        except OSError as error:
            assert error.errno == errno.EIO
    assert codec.decompress(good, PAGE) == TEXT


def requests(data: bytes) -> None:
    """Edited messages to a lane, six bytes of edits each. All but those that nobody answers get one true
    reply, and the lane goes on."""
    from tests.support.wire import ARGUMENTS, FORGET_LIKE, Op, wired

    known = sorted(ARGUMENTS)
    with wired(4 * PAGE) as wire:
        for at in range(0, min(len(data), 240), 6):
            chosen, bent, *edits = data[at:at + 6].ljust(6, b"\0")
            opcode = known[chosen % len(known)] if bent & 8 else chosen
            body = edited(ARGUMENTS.get(opcode, bytes(24)), bytes(edits))
            claimed = struct.unpack("=I", bytes(edits))[0] if bent & 4 else None
            wire.send(opcode, body, nodeid=bent & 1 or 2, length=claimed)
            if opcode not in FORGET_LIKE:
                wire.receive()
        assert wire.call(Op.INIT, ARGUMENTS[Op.INIT], nodeid=0).error == 0
        assert len(wire.read(0, 4 * PAGE)) == 4 * PAGE
        wire.store.check(1)


def edited(data: bytes, edits: bytes) -> bytes:
    """Each two bytes of edits, a place and a change: a byte is changed, or all behind it cut or doubled."""
    found = bytearray(data)
    for place, change in zip(edits[::2], edits[1::2], strict=False):
        at = place * (len(found) + 255) // 256 % (len(found) + 1)
        if change == 0:
            del found[at:]
        elif change == 1:
            found = (found + found[at:])[:2 * PAGE]
        elif at < len(found):
            found[at] ^= change
    return bytes(found)


def beginnings(target: str) -> list[bytes]:
    """Inputs of the right form, which mutation has far to go to by itself."""
    match target:
        case "attribute":
            words = (b"4G", b"0x10K", b"1", b"lz4\n", b"algo=zstd level=3 priority=1",
                     b"type=huge_idle threshold=3000", b"page_index=1 page_indexes=1-4", b"/dev/null", b"all",
                     b"y")
            return [bytes([number]) + word for number in range(len(WRITABLE)) for word in words]
        case "command":
            return [f"{name}={value}".encode() for name in commands.COMMANDS for value in ("", "1", "lz4:1")]
        case "keys":
            return [b"algo=zstd dict=\"/a b\" level=-3", b"\"type=idle\" threshold=1\npage_index=5"]
        case "size_expression":
            return [b"min(ram / 2, 4096)", b"-2^2 + log(10, ram) % 7 * 4k || !(ram >= 1e3)"]
        case "configuration":
            return [b"[z0]\nzram-size = ram / 4\ncompression-algorithm = zstd(level=3) lz4 (type=idle)\n"
                    b"fs-type = ext4\nmount-point = /mnt/x\noptions = discard\nmode = 1777\n",
                    b"zram-resident-limit = 512\n# comment\nhost-memory-limit = none\nthreads = \\\n 5\n"]
        case "foreign_configuration":
            return [b"set!x = echo 1\n[zram0]\nzram-fraction = 0.5\nmax-zram-size = none\n"
                    b"swap-priority: -1\noptions = pri=3\n"
                    b"compression-algorithm = lzo-rle zstd(level=3,dict=/d) (type=idle)\n",
                    b"[zram1]\nmount-point = \"/m\"\nfs-type = ext2\noptions = rw,X-mount.mode=1777\n",
                    b"ALGO=\"zstd\" # c\nexport PERCENT='50'\nSIZE=$((1 << 9))\nPRIORITY=100\n"]
    return [b"4096", b"1.5G", b"50%"]


WRITABLE = [a for a in attributes.ATTRIBUTES if a.parse]
TEXT = b"".join(b"line %d of a text\n" % number for number in range(300))[:PAGE]
PACKED = [(codec, codec.compress(TEXT)) for codec in map(codec.parse, ("lz4", "lz4hc", "zstd:1", "zstd:19"))]
TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (
        numbers, size, attribute, command, keys, size_expression, configuration, foreign_configuration,
        compressed, requests,
    )
}


def main(words: list[str]) -> None:
    name, corpus = words[1], Path(words[-1])
    for number, data in enumerate(beginnings(name)):
        (corpus / f"beginning-{number}").write_bytes(data)
    atheris.Setup([words[0], *words[2:]], atheris.instrument_func(TARGETS[name]))
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
