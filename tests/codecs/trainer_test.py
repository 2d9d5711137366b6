# SPDX-License-Identifier: Apache-2.0
"""The trainer: what its dictionaries are worth, what it refuses, and its memory."""
from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.page_kinds import PAGE, noise, prose, record
from tests.support.paths import python_environment
from zramfs.codecs.codec import MAX_DICTIONARY, Codec
from zramfs.codecs.trainer import train

N = 512


def nbytes(codec: Codec, pages: list[bytes]) -> int:
    return sum(len(codec.compress(page) or page) for page in pages)


@pytest.mark.parametrize("level", [3, 9])
def test_pages_that_were_not_in_the_sample_become_smaller_where_they_have_much_in_common(level: int) -> None:
    made = train(b"".join(map(record, range(N))), 32 << 10, level)
    assert 256 <= len(made) <= 32 << 10
    others = [record(seed) for seed in range(N, N + 50)]
    codec = Codec("zstd", level, made)
    assert nbytes(codec, others) < 0.7 * nbytes(Codec("zstd", level), others)
    assert all(codec.decompress(codec.compress(page), PAGE) == page for page in others)


def test_the_same_pages_make_the_same_dictionary() -> None:
    sample = b"".join(map(prose, range(100)))
    assert train(sample, 16 << 10, 3) == train(sample, 16 << 10, 3)


@pytest.mark.parametrize("sample, size, words", [
    (b"", 4096, "whole pages"), (bytes(PAGE + 1), 4096, "whole pages"), (bytes(2 * PAGE), 255, "256 to"),
    (bytes(2 * PAGE), MAX_DICTIONARY + 1, "256 to"), (noise(1), 64 << 10, "no dictionary of"),
])
def test_what_makes_no_dictionary_is_a_value_error(sample: bytes, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(sample, size, 3)


MEMORY = """
import resource
import random
from zramfs.codecs.trainer import train

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

sample = b"".join(random.randbytes(2048).hex().encode() for _ in range(1024))
before, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(2):
    train(sample, 64 << 10, 3)
print(resident() - before, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10)
"""


@pytest.mark.requires("unsanitized")
def test_it_takes_4_mib_beside_the_sample_and_gives_them_back() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], env=python_environment(), capture_output=True,
                          text=True, timeout=60, check=True)
    left, most = map(int, done.stdout.split())
    assert most <= 4 << 20 and left <= 1 << 20
