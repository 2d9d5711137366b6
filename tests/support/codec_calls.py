# SPDX-License-Identifier: Apache-2.0
"""For the tests of the codecs: the pages they share, and the C interface, called as the store
calls it, through the functions that the module exports."""
import ctypes
import mmap
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zramfs.codecs import codec
from zramfs.codecs.codec import parse

PAGE = 4096
LZ4 = [f"lz4:{n}" for n in (1, 2, 8, 64, 65537)]
LZ4HC = [f"lz4hc:{n}" for n in range(1, 13)]
ZSTD = [f"zstd:{n}" for n in range(-7, 23) if n != 0]
SPECS = LZ4 + LZ4HC + ZSTD
FEW = ["lz4", "lz4:64", "lz4hc:3", "lz4hc:12", "zstd:-7", "zstd:1", "zstd:3", "zstd:19"]


def real_page(path: str, at: int = 5 * PAGE) -> bytes:
    with open(path, "rb") as f:
        f.seek(at)
        data = f.read(PAGE)
    assert len(data) == PAGE
    return data


RANDOM = random.Random(20).randbytes(PAGE)
PAGES = {
    "zeros": bytes(PAGE),
    "period 3": b"abc" * (PAGE // 3) + b"a",
    "counters": b"".join(struct.pack("<Q", 3 * n) for n in range(PAGE // 8)),
    "half random": RANDOM[: PAGE // 2] + bytes(PAGE // 2),
    "few bits": bytes(b & 0x11 for b in RANDOM),
    "text": real_page(random.__file__),
    "program": real_page(codec.__file__),
    "random": RANDOM,
}


# --- the C interface -------------------------------------------------------------------------

class codec_t(ctypes.Structure):
    _fields_ = [("algo", ctypes.c_int), ("level", ctypes.c_int), ("dictionary", ctypes.c_void_p)]


def exported(name: str, result: object, *arguments: object) -> Callable:
    capsule = codec.__pyx_capi__[name]
    ctypes.pythonapi.PyCapsule_GetName.restype = ctypes.c_char_p
    ctypes.pythonapi.PyCapsule_GetName.argtypes = [ctypes.py_object]
    ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
    ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    signature = ctypes.pythonapi.PyCapsule_GetName(capsule)
    return ctypes.CFUNCTYPE(result, *arguments)(ctypes.pythonapi.PyCapsule_GetPointer(capsule, signature))


INT, POINTER = ctypes.c_int, ctypes.c_void_p
codec_init = exported("codec_init", INT, ctypes.POINTER(codec_t), INT, INT)
codec_ctx_new = exported("codec_ctx_new", POINTER, ctypes.POINTER(codec_t), INT)
codec_ctx_free = exported("codec_ctx_free", None, POINTER)
codec_compress = exported("codec_compress", INT, POINTER, POINTER, INT, POINTER, INT)
codec_decompress = exported("codec_decompress", INT, POINTER, POINTER, INT, POINTER, INT)
C_NUMBERS = {"none": 0, "lz4": 1, "lz4hc": 2, "zstd": 3}


@contextmanager
def context(spec: str) -> Iterator[int]:
    c, codec = codec_t(), parse(spec)
    assert codec_init(c, C_NUMBERS[codec.algo], codec.level) == 0
    ctx = codec_ctx_new(c, 1)
    assert ctx and ctx % PAGE == 0
    try:
        yield ctx
    finally:
        codec_ctx_free(ctx)


class Fence:
    """Memory that ends in front of a page nobody may touch: reading past a source put here is
    a fault, not luck."""

    SIZE = 4 * PAGE

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, self.SIZE + PAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [POINTER, ctypes.c_size_t, INT]
        assert libc.mprotect(self.base + self.SIZE, PAGE, 0) == 0, os.strerror(ctypes.get_errno())

    def put(self, data: bytes) -> int:
        self.map[self.SIZE - len(data) : self.SIZE] = data
        return self.base + self.SIZE - len(data)


FENCE = Fence()
GUARD = bytes(range(128, 192))


def call(function: Callable, ctx: int, data: bytes, cap: int) -> tuple[int, bytes]:
    """The result and the bytes it wrote, from between two guards."""
    out = ctypes.create_string_buffer(GUARD + bytes(max(cap, 0)) + GUARD, max(cap, 0) + 2 * len(GUARD))
    got = function(ctx, FENCE.put(data), len(data), ctypes.addressof(out) + len(GUARD), cap)
    assert out.raw[: len(GUARD)] == GUARD, "written in front of the output"
    assert out.raw[len(out) - len(GUARD) :] == GUARD, "written past cap"
    return got, out.raw[len(GUARD) : len(GUARD) + max(got, 0)]
