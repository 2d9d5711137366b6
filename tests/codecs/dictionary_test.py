# SPDX-License-Identifier: Apache-2.0
"""Codecs with a dictionary: the lz4 and zstandard packages as judges, both ways; one prepared
dictionary for many contexts; damaged and hostile ones."""
import ctypes
import errno
import json
import random
from functools import partial
from pathlib import Path

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import alloc_hook
from tests.support.codec_calls import (
    PAGE,
    PAGES,
    RANDOM,
    call,
    codec_compress,
    codec_ctx_free,
    codec_ctx_new,
    codec_decompress,
    codec_t,
)
from tests.support.page_kinds import prose
from tests.support.side_by_side import together
from zramfs.codecs.codec import MAX_DICTIONARY, Codec

# Records of one kind, in 64 pages: what a dictionary is made for.
RNG = random.Random(7)
RECORDS = [
    b"".join(b'{"user": %d, "name": "%s", "state": "active", "groups": ["wheel", "users"]}\n'
             % (RNG.randrange(10**6), RNG.randbytes(4).hex().encode()) for _ in range(60))[:PAGE]
    for _ in range(64)
]
RAW = b"".join(RECORDS[:4])
TRAINED = zstandard.train_dictionary(8192, RECORDS[:48]).as_bytes()
LEVELS = {"lz4": (1, 8, 65537), "lz4hc": tuple(range(1, 13)), "zstd": tuple(n for n in range(-7, 23) if n)}
SPECS = [(algo, level) for algo, levels in LEVELS.items() for level in levels]
LENGTHS = (1, 7, 8, 100, PAGE, 65535, 65536, 65537, MAX_DICTIONARY)


@pytest.mark.parametrize("algo, level", SPECS)
def test_every_level_with_every_kind_of_dictionary(algo: str, level: int) -> None:
    for dictionary in (RAW, TRAINED, RANDOM[:5], PAGES["program"] * 40):
        codec, plain = Codec(algo, level, dictionary), Codec(algo, level)
        assert codec.dictionary == dictionary and plain.dictionary is None
        for page in (*PAGES.values(), RECORDS[60], RECORDS[61][:1000], b""):
            packed = codec.compress(page)
            assert codec.decompress(packed, len(page)) == page
            assert codec.compress(page) == packed, "a page leaves something behind for the next"
            assert codec.compress(page, len(packed)) == packed
            assert codec.compress(page, len(packed) - 1) is None
            assert codec.compress(page) == packed, "a page that did not fit does"
    without = packed_size(Codec(algo, level))
    for dictionary in (RAW, TRAINED):
        # The fastest levels look at few places, and need not find what is in the dictionary.
        assert packed_size(Codec(algo, level, dictionary)) < without or level > 100 or level < 0


def packed_size(codec: Codec) -> int:
    return sum(len(codec.compress(page)) for page in RECORDS[48:])


@pytest.mark.parametrize("algo", ["lz4", "lz4hc", "zstd"])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_of_a_dictionary(algo: str, length: int) -> None:
    dictionary = (random.Random(length).randbytes(max(0, length - len(RAW))) + RAW)[-length:]
    codec = Codec(algo, None, dictionary)
    for page in (RECORDS[60], PAGES["text"], RANDOM):
        assert codec.decompress(codec.compress(page), PAGE) == page
    assert repr(codec) == f"Codec({algo!r}, {codec.level}, <{length} bytes>)"


@pytest.mark.parametrize("algo, level", [s for s in SPECS if s[0] != "zstd"])
@pytest.mark.parametrize("dictionary", [RAW, PAGES["program"] * 40], ids=["short", "long"])
def test_lz4_package_reads_ours_and_we_read_its(algo: str, level: int, dictionary: bytes) -> None:
    codec = Codec(algo, level, dictionary)
    mode = {"mode": "fast", "acceleration": level} if algo == "lz4" else {
        "mode": "high_compression", "compression": level}
    for page in (*PAGES.values(), *RECORDS[60:]):
        packed = codec.compress(page)
        # The package takes 64 KiB at most, which is as far back as a match goes.
        assert lz4.block.decompress(packed, uncompressed_size=PAGE, dict=dictionary[-65536:]) == page
        theirs = lz4.block.compress(page, store_size=False, dict=dictionary[-65536:], **mode)
        assert codec.decompress(theirs, PAGE) == page


@pytest.mark.parametrize("level", LEVELS["zstd"])
@pytest.mark.parametrize("dictionary", [RAW, TRAINED], ids=["raw", "trained"])
def test_zstandard_package_reads_ours_and_we_read_its(level: int, dictionary: bytes) -> None:
    codec = Codec("zstd", level, dictionary)
    magicless = zstandard.FORMAT_ZSTD1_MAGICLESS
    judge = zstandard.ZstdCompressionDict(dictionary)
    compressor = zstandard.ZstdCompressor(
        dict_data=judge, compression_params=zstandard.ZstdCompressionParameters.from_level(
            level, source_size=PAGE, dict_size=len(dictionary), format=magicless, write_content_size=False,
            write_checksum=False, write_dict_id=False))
    decompressor = zstandard.ZstdDecompressor(dict_data=judge, format=magicless)
    sizes = [0, 0]
    for page in (*PAGES.values(), *RECORDS[60:]):
        ours, theirs = codec.compress(page), compressor.compress(page)
        assert decompressor.decompress(ours, max_output_size=PAGE) == page
        assert codec.decompress(theirs, PAGE) == page
        sizes[0] += len(ours)
        sizes[1] += len(theirs)
    assert sizes[0] < 1.05 * sizes[1]


def test_what_a_dictionary_wrote_needs_it() -> None:
    for algo in LEVELS:
        packed = Codec(algo, None, RAW).compress(RECORDS[60])
        for other in (None, TRAINED, RAW[:5]):
            try:
                assert Codec(algo, None, other).decompress(packed, PAGE) != RECORDS[60]
            except OSError as error:
                assert error.errno == errno.EIO


@pytest.mark.parametrize("algo, dictionary, sentence", [
    ("lz4", b"", f"a dictionary has 1 to {MAX_DICTIONARY} bytes, not 0"),
    ("zstd", bytes(MAX_DICTIONARY + 1),
     f"a dictionary has 1 to {MAX_DICTIONARY} bytes, not {MAX_DICTIONARY + 1}"),
    ("none", RAW, "none takes no dictionary"),
    ("zstd", TRAINED[:40], "these 40 bytes begin like a dictionary of zstd, and are damaged"),
    ("zstd", TRAINED[:8] + b"\xff" * 500, "these 508 bytes begin like a dictionary of zstd, and are damaged"),
])
def test_dictionaries_that_are_refused(algo: str, dictionary: bytes, sentence: str) -> None:
    with pytest.raises(ValueError) as failure:
        Codec(algo, None, dictionary)
    assert str(failure.value) == sentence


@settings(max_examples=150, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, len(TRAINED) - 1), st.integers(1, 255)),
                      min_size=1, max_size=8),
       keep=st.integers(8, len(TRAINED)))
def test_a_damaged_dictionary_is_refused_or_works(edits: list[tuple[int, int]], keep: int) -> None:
    damaged = bytearray(TRAINED)
    for at, flip in edits:
        damaged[at] ^= flip
    try:
        codec = Codec("zstd", 3, bytes(damaged[:keep]))
    except ValueError:
        return
    for page in (RECORDS[60], RANDOM):
        assert codec.decompress(codec.compress(page), PAGE) == page


@pytest.mark.parametrize("algo", ["lz4", "lz4hc", "zstd"])
def test_hostile_input_stays_within_bounds(algo: str) -> None:
    codec = Codec(algo, None, RAW)
    ctx = codec_ctx_new(shared(codec), 1)
    good = codec.compress(RECORDS[60])
    rng = random.Random(3)
    try:
        for _ in range(3000):
            bad = bytearray(good)
            for _ in range(rng.randrange(1, 5)):
                bad[rng.randrange(len(bad))] ^= rng.randrange(1, 256)
            cap = rng.choice((PAGE, rng.randrange(PAGE)))
            got, written = call(codec_decompress, ctx, bytes(bad[:rng.randrange(len(bad)) + 1]), cap)
            assert got == -errno.EIO or 0 <= got == len(written) <= cap
        assert call(codec_decompress, ctx, good, PAGE) == (PAGE, RECORDS[60])
    finally:
        codec_ctx_free(ctx)


def shared(codec: Codec) -> object:
    """The codec_t inside a Codec: behind the object's head and its table of methods."""
    where = id(codec) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
    return ctypes.cast(where, ctypes.POINTER(codec_t))


@pytest.mark.parametrize("algo, level", [("lz4", 1), ("lz4hc", 9), ("zstd", 1), ("zstd", 19)])
def test_many_contexts_share_one_dictionary(algo: str, level: int) -> None:
    codec = Codec(algo, level, TRAINED)
    expected = [(page, codec.compress(page)) for page in RECORDS[48:]]

    def work(k: int) -> None:
        ctx = codec_ctx_new(shared(codec), 1)
        out, back = ctypes.create_string_buffer(5000), ctypes.create_string_buffer(PAGE)
        try:
            for i in range(80):
                page, packed = expected[(i + k) % len(expected)]
                n = codec_compress(ctx, page, PAGE, out, 5000)
                assert out.raw[:n] == packed
                assert codec_decompress(ctx, out, n, back, PAGE) == PAGE
                assert back.raw == page
        finally:
            codec_ctx_free(ctx)

    together(*(partial(work, k) for k in range(8)))


@pytest.mark.parametrize("algo, level", [("lz4", 1), ("lz4hc", 9), ("zstd", 19)])
@pytest.mark.parametrize("dictionary", [None, RAW], ids=["plain", "dictionary"])
def test_a_context_that_only_decompresses(algo: str, level: int, dictionary: bytes | None) -> None:
    codec = Codec(algo, level, dictionary)
    packed = codec.compress(RECORDS[60])
    ctx = codec_ctx_new(shared(codec), 0)
    try:
        assert call(codec_decompress, ctx, packed, PAGE) == (PAGE, RECORDS[60])
        assert call(codec_compress, ctx, RECORDS[60], PAGE) == (0, b"")
    finally:
        codec_ctx_free(ctx)


COUNT = """
import ctypes, json, sys
from zramfs.codecs.codec import Codec
import tests.codecs.dictionary_test as t
hook = ctypes.CDLL(sys.argv[1])
count = lambda: [ctypes.c_ulong.in_dll(hook, name).value for name in ("alloc_calls", "alloc_frees")]
fail_at = ctypes.c_int.in_dll(hook, "alloc_fail_at")
found = []
for algo, level in (("lz4", 1), ("lz4hc", 9), ("zstd", -5), ("zstd", 3), ("zstd", 19)):
    for dictionary in (t.RAW, t.TRAINED):
        before = count()
        codec = Codec(algo, level, dictionary)
        made = count()
        for page in (*t.PAGES.values(), *t.RECORDS[60:]):
            assert codec.decompress(codec.compress(page), 4096) == page
        worked = count()
        del codec
        gone = count()
        refused = []
        for nth in (1, 2):
            fail_at.value = nth
            try:
                Codec(algo, level, dictionary)
            except MemoryError as error:
                refused.append(str(error))
        found.append([made[0] - before[0], worked[0] - made[0], gone[1] - made[1], refused])
print(json.dumps(found))
"""


def test_two_allocations_and_none_a_page(tmp_path: Path) -> None:
    """The dictionary and the context; when either is refused, nothing is left."""
    for made, worked, freed, refused in json.loads(alloc_hook.run(COUNT, tmp_path)):
        assert (made, worked, freed) == (2, 0, 2)
        assert len(refused) == 2 and "dictionary of" in refused[0] and "context" in refused[1]


@pytest.mark.parametrize("algo", ["zstd", "lz4"])
def test_a_codec_that_only_decompresses_reads_what_another_has_made(algo: str) -> None:
    dictionary, page = prose(1) + prose(2), prose(1)[:2000] + prose(3)[:2096]
    packed = Codec(algo, None, dictionary).compress(page)
    reader = Codec(algo, None, dictionary, only_decompresses=True)
    assert packed is not None and reader.decompress(packed, len(page)) == page
    assert reader.dictionary == dictionary
    if algo == "zstd":
        with pytest.raises(ValueError, match="made only to decompress"):
            reader.compress(page)
