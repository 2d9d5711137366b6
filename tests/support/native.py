# SPDX-License-Identifier: Apache-2.0
"""Compiles the tests' own users of the allocator's C interface, probe.pyx and crowd.pyx, and files in C."""
from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from allocator import arena
from tests.support.paths import ROOT, SUPPORT
from tests.support.whole import tool_environment

NAMES = ("probe", "crowd")

_SETUP = """
import sys
from Cython.Build import cythonize
from setuptools import Extension, setup
checkout, sanitize, *names = sys.argv[1:]
flags = ["-fsanitize=" + sanitize, "-fno-omit-frame-pointer"] if sanitize else []
setup(
    name="native", packages=[], script_args=["-q", "build_ext", "--inplace"],
    ext_modules=cythonize(
        [Extension(
            name, [name + ".pyx"], extra_link_args=flags,
            include_dirs=[checkout + place for place in ("/allocator", "/zramfs/store", "/zramfs/lane")],
            extra_compile_args=["-std=gnu11", "-O1", "-g", "-pthread", "-D_GNU_SOURCE", "-Wall", "-Wextra",
                                "-Werror", "-Wno-unused-function", "-Wno-unused-parameter",
                                "-Wno-missing-field-initializers", "-fno-strict-aliasing", *flags],
        ) for name in names],
        language_level=3, include_path=[checkout], quiet=True, nthreads=0,
        compiler_directives={"boundscheck": False, "wraparound": False, "cdivision": True},
    ),
)
"""


def compiled(source: Path, target: Path, *flags: str) -> Path:
    """`target`, made of one file in C."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "no C compiler, though the extensions were built with one"
    # A sanitizer that is preloaded into this process is not for the compiler.
    subprocess.run(
        [compiler, "-O2", "-Wall", *flags, "-o", target, source], env=tool_environment(), check=True,
        timeout=60,
    )
    return target


def _sanitizer() -> str:
    """Of the allocator under test, so that what is compiled here is watched in the same way."""
    program = Path(arena.__file__).read_bytes()
    found = [kinds for kinds, symbol in (("address,undefined", b"__asan_init"), ("thread", b"__tsan_init"))
             if symbol in program]
    return found[0] if found else ""


@functools.cache
def _built() -> Path:
    sources = [SUPPORT / f"{name}.pyx" for name in NAMES]
    used = [*sources, *sorted(ROOT.glob("allocator/*.pxd")), *sorted(ROOT.glob("allocator/*.h"))]
    key = hashlib.sha256(f"{sys.version} {_sanitizer()} {_SETUP}".encode())
    for path in used:
        key.update(path.read_bytes())
    # Takes about 6 s: kept for the next run, until anything that goes into it changes.
    kept = ROOT / "build" / "native" / key.hexdigest()[:16]
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    # The shares of scripts/test come here at once: one of them builds, and the others find it.
    with open(kept.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            _build(sources, kept)
    return kept


def _build(sources: Iterable[Path], kept: Path) -> None:
    place = Path(tempfile.mkdtemp(prefix="native-"))
    for path in sources:
        shutil.copy(path, place)
    done = subprocess.run(
        [sys.executable, "-c", _SETUP, ROOT, _sanitizer(), *NAMES], cwd=place, env=tool_environment(),
        timeout=100, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    assert done.returncode == 0, f"probe.pyx or crowd.pyx does not compile:\n{done.stdout[-4000:]}"
    # A directory that is there is whole, whenever this process is killed.
    shutil.copytree(place, kept.with_suffix(f".{os.getpid()}")).rename(kept)


@functools.cache
def load(name: str) -> ModuleType:
    """The compiled module, one of NAMES."""
    (path,) = _built().glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
