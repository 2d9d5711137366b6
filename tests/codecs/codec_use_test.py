# SPDX-License-Identifier: Apache-2.0
"""How the codecs are held: levels and lengths out of range, the sentences of parse, threads, and
what is allocated when."""
import ctypes
import errno
import json
from functools import partial

import pytest

from tests.support import alloc_hook
from tests.support.codec_calls import (
    C_NUMBERS,
    FEW,
    PAGE,
    PAGES,
    SPECS,
    codec_compress,
    codec_decompress,
    codec_init,
    codec_t,
    context,
)
from tests.support.side_by_side import together
from zramfs.codecs.codec import MAX_INPUT, Codec, parse
from zramfs.model.config import ALGORITHMS, NAME_LIMIT

# --- limits of the C interface and of the Python one -----------------------------------------

def test_codec_init_takes_what_the_table_says() -> None:
    ranges = {"none": (0, 0), "lz4": (1, 65537), "lz4hc": (1, 12), "zstd": (-7, 22)}
    for name, (lowest, highest) in ranges.items():
        for level in (lowest, highest):
            c = codec_t(-5, -5)
            assert codec_init(c, C_NUMBERS[name], level) == 0
            assert (c.algo, c.level) == (C_NUMBERS[name], level)
            assert (Codec(name, level).algo, Codec(name, level).level) == (name, level)
    for algo, level in [(-1, 1), (4, 1), (0, 1), (0, -1), (1, 0), (1, 65538), (1, -1),
                        (2, 0), (2, 13), (3, -8), (3, 0), (3, 23), (3, 2**31 - 1), (3, -(2**31))]:
        c = codec_t(-5, -5)
        assert codec_init(c, algo, level) == -errno.EINVAL, (algo, level)
        assert (c.algo, c.level) == (-5, -5)


@pytest.mark.parametrize("spec", ["none", *FEW])
def test_lengths_out_of_range_touch_nothing(spec: str) -> None:
    with context(spec) as ctx:
        for n, cap in [(MAX_INPUT + 1, 8192), (-1, 8192), (PAGE, 0), (PAGE, -1), (-(2**31), 2**31 - 1)]:
            assert codec_compress(ctx, None, n, None, cap) == 0, (n, cap)
        for n, cap in [(0, PAGE), (-1, PAGE), (5, -1), (-(2**31), PAGE)]:
            assert codec_decompress(ctx, None, n, None, cap) == -errno.EIO, (n, cap)


def test_algorithms_are_in_the_kernels_order() -> None:
    assert ALGORITHMS == ("lz4", "lz4hc", "zstd", "none")
    assert [(c.algo, c.level) for c in map(parse, ALGORITHMS)] == [
        ("lz4", 1), ("lz4hc", 9), ("zstd", 3), ("none", 0)]


@pytest.mark.parametrize("spec, level", [
    ("zstd:9", 9), ("zstd:-3", -3), ("zstd:+3", 3), ("lz4:65537", 65537), ("lz4hc:012", 12), ("none:0", 0)])
def test_parse_reads_a_level(spec: str, level: int) -> None:
    codec = parse(spec)
    assert (codec.algo, codec.level) == (spec.partition(":")[0], level)
    assert repr(codec) == f"Codec({codec.algo!r}, {level})"


CHOICE = "choose one of lz4, lz4hc, zstd, none"
ZSTD_LEVELS = "the level of zstd is a whole number from -7 to 22 except 0, not "


@pytest.mark.parametrize("spec, sentence", [
    ("", f"unknown compressor '': {CHOICE}"),
    (":3", f"unknown compressor '': {CHOICE}"),
    ("lzo-rle", f"unknown compressor 'lzo-rle': {CHOICE}"),
    ("LZ4", f"unknown compressor 'LZ4': {CHOICE}"),
    ("lz4\n", f"unknown compressor 'lz4\\n': {CHOICE}"),
    ("x" * 127, f"unknown compressor '{'x' * 127}': {CHOICE}"),
    ("x" * 128, "the name of a compressor is shorter than 128 characters; 'xxxxxxxxxxxxxxxxxxxx'... has 128"),
    ("zstd:", ZSTD_LEVELS + "''"),
    ("zstd:fast", ZSTD_LEVELS + "'fast'"),
    ("zstd:3:4", ZSTD_LEVELS + "'3:4'"),
    ("zstd: 3", ZSTD_LEVELS + "' 3'"),
    ("zstd:1_0", ZSTD_LEVELS + "'1_0'"),
    ("zstd:\u0663", ZSTD_LEVELS + "'\u0663'"),
    ("zstd:3\n", ZSTD_LEVELS + "'3\\n'"),
    ("zstd:0", ZSTD_LEVELS + "0"),
    ("zstd:-8", ZSTD_LEVELS + "-8"),
    ("zstd:23", ZSTD_LEVELS + "23"),
    ("lz4:0", "the level of lz4 is a whole number from 1 to 65537, not 0"),
    ("lz4:4294967297", "the level of lz4 is a whole number from 1 to 65537, not '4294967297'"),
    ("lz4hc:13", "the level of lz4hc is a whole number from 1 to 12, not 13"),
    ("none:1", "the level of none is 0 or left out, not 1"),
])
def test_parse_says_what_was_expected(spec: str, sentence: str) -> None:
    with pytest.raises(ValueError) as e:
        parse(spec)
    assert str(e.value) == sentence


def test_the_name_limit_is_the_kernels() -> None:
    assert NAME_LIMIT == 128


@pytest.mark.parametrize("level", [2**31, 2**32 + 1, -(2**63), 10**30])
def test_a_level_wider_than_an_int(level: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 65537, not {level}$"):
        Codec("lz4", level)


def test_arguments_of_the_python_class() -> None:
    codec, page = parse("lz4"), PAGES["text"]
    z = codec.compress(page)
    for view in (bytearray(page), memoryview(page)):
        assert codec.compress(view) == z
    assert codec.decompress(memoryview(z), PAGE) == page
    with pytest.raises(ValueError, match=f"data is at most {MAX_INPUT} bytes, not {MAX_INPUT + 1}"):
        codec.compress(bytes(MAX_INPUT + 1))
    with pytest.raises(ValueError, match="0 or more, not -1"):
        codec.compress(page, -1)
    for size in (-1, MAX_INPUT + 1, 2**40):
        with pytest.raises(ValueError, match=f"size is 0 to {MAX_INPUT} bytes, not {size}"):
            codec.decompress(z, size)
    for bad in ("text", None, 7):
        with pytest.raises(TypeError):
            codec.compress(bad)
        with pytest.raises(TypeError):
            codec.decompress(bad, PAGE)
    with pytest.raises(TypeError):
        parse(None)


# --- threads and memory ----------------------------------------------------------------------

@pytest.mark.parametrize("spec", ["lz4", "lz4hc", "zstd:1", "zstd:3"])
def test_many_threads_each_with_its_own_context(spec: str) -> None:
    expected = [(page, parse(spec).compress(page)) for page in PAGES.values()]

    def work(k: int) -> None:
        with context(spec) as ctx:
            out, back = ctypes.create_string_buffer(5000), ctypes.create_string_buffer(PAGE)
            for i in range(120):
                page, z = expected[(i + k) % len(expected)]
                n = codec_compress(ctx, page, PAGE, out, 5000)
                assert out.raw[:n] == z
                assert codec_decompress(ctx, out, n, back, PAGE) == PAGE
                assert back.raw == page

    together(*(partial(work, k) for k in range(12)))


def test_threads_take_turns_on_one_codec() -> None:
    """At a level that takes half a millisecond a page, so that they do meet."""
    codec = parse("zstd:22")
    expected = [(page, parse("zstd:22").compress(page)) for page in PAGES.values()]

    def work(k: int) -> None:
        for i in range(40):
            page, z = expected[(i + k) % len(expected)]
            assert codec.compress(page) == z
            assert codec.decompress(z, PAGE) == page

    together(*(partial(work, k) for k in range(8)))


COUNT_ALLOCATIONS = """
import ctypes, json, sys
from zramfs.codecs.codec import parse
hook = ctypes.CDLL(sys.argv[1])
value = lambda name: ctypes.c_ulong.in_dll(hook, name).value
fail = ctypes.c_int.in_dll(hook, "alloc_fail")
pages = [bytes.fromhex(p) for p in json.loads(sys.argv[2])]

def count():
    return [value("alloc_calls"), value("alloc_frees"), value("alloc_bytes")]

def use(codec):
    for page in pages:
        z = codec.compress(page)
        assert codec.compress(page, len(z) - 1) is None
        assert codec.decompress(z, 4096) == page
        for bad in (z[:-1], z[: len(z) // 2]):
            try:
                codec.decompress(bad, 4096)
            except OSError:
                continue
            raise AssertionError("truncated input accepted")

report = {}
for spec in sys.argv[3:]:
    at = [count()]
    codec = parse(spec)
    at.append(count())
    use(codec)
    at.append(count())
    fail.value = 1
    try:
        parse(spec)
        refused = False
    except MemoryError:
        refused = True
    short = codec.compress(pages[0])
    fail.value = 0
    use(codec)
    at.append(count())
    del codec
    at.append(count())
    steps = [[b - a for a, b in zip(x, y)] for x, y in zip(at, at[1:])]
    report[spec] = [steps[0], steps[1], steps[3], refused, short is None]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def allocations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """For every algorithm and level, [calls, frees, bytes] of the heap when a context is made,
    when it works, and when it goes; and what happens when the heap gives nothing."""
    pages = json.dumps([PAGES["text"].hex(), PAGES["random"].hex()])
    done = alloc_hook.run(COUNT_ALLOCATIONS, tmp_path_factory.mktemp("hook"), pages, *SPECS)
    return json.loads(done)


@pytest.mark.parametrize("spec", SPECS)
def test_one_allocation_a_context_and_none_a_page(allocations: dict[str, list], spec: str) -> None:
    made, worked, gone, refused, short = allocations[spec]
    assert made[:2] == [1, 0] and made[2] % PAGE == 0 and made[2] < 2 << 20, made
    assert gone == [0, 1, 0]
    assert refused
    if spec in ("lz4hc:10", "lz4hc:11", "lz4hc:12"):
        # liblz4's optimal parser has its table from malloc, unless a build of it says otherwise.
        calls, frees, size = worked
        assert calls == frees <= 4 and size <= 4 * (66 << 10)
        assert short == (calls > 0), "without memory the page is incompressible"
    else:
        assert worked == [0, 0, 0]
        assert not short
