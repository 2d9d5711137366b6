# SPDX-License-Identifier: Apache-2.0
"""The allocator as a library: the example of docs/api.md, what objects say of themselves, `with`, and the
stubs, which have the docstrings of the compiled modules."""
from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import allocator
from allocator import Arena, Balloon, Migration, Pool, Reserve

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"
STUBS = sorted(ROOT.glob("allocator/*.pyi"))

# What every module of Cython has, and modules that have nothing for Python.
ALLOWED = r"""
allocator\.\w+\.__(reduce|setstate)_cython__
allocator\.\w+\.__(test|pyx_capi)__
allocator\.(buddy|isolation|migrate|populate|recovery|zscompact|zsmalloc|zsmovable)
"""


def test_the_example_of_the_page_runs_as_it_stands() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted >= 15 and result.failed == 0


def test_the_page_names_what_the_package_offers() -> None:
    text = PAGE.read_text()
    assert {name for name in allocator.__all__ if f"`{name}`" not in text} == set()


def test_objects_say_what_they_are() -> None:
    arena = Arena(0, 8)
    reserve, pool, balloon, migration = Reserve(arena, 5 << 20), Pool(arena), Balloon(arena), Migration(arena)
    assert repr(reserve) == "<Reserve of 3 pageblocks, target 3>"
    reserve.close()
    pool.malloc(7, bytes(range(250)) * 4)
    balloon.set_target(3)
    balloon.adjust(2)
    migration.run()
    assert repr(pool) == "<Pool of 1 objects in 1 pages, 1 zspages>"
    assert repr(balloon) == "<Balloon of 2 pages, target 3>"
    assert repr(migration) == "<Migration: 1 runs, 0 frames moved, 0 pageblocks emptied>"
    assert repr(arena) == "<Arena of 8 pageblocks: 1 in use, 3 frames used, 509 free>"
    arena.close()
    assert repr(arena) == "<Arena, closed>"
    assert repr(pool) == "<Pool, closed>"
    assert repr(reserve) == "<Reserve, closed>"
    assert repr(balloon) == "<Balloon, its arena is closed>"
    assert repr(migration) == "<Migration, its arena is closed>"


def test_with_closes_what_it_has_opened() -> None:
    with Arena(0, 8) as arena, Reserve(arena, 1) as reserve:
        assert isinstance(arena, Arena) and isinstance(reserve, Reserve)
        assert arena.stats().reserve == 2 << 20
        frame = arena.alloc()
    assert (repr(arena), repr(reserve)) == ("<Arena, closed>", "<Reserve, closed>")
    with pytest.raises(ValueError, match="closed"):
        arena.free(frame)
    with pytest.raises(ValueError, match="closed"), arena:
        raise AssertionError("a closed arena was opened")
    with pytest.raises(ZeroDivisionError), Arena(0, 1) as arena:
        arena.alloc(1 // 0)
    assert repr(arena) == "<Arena, closed>"


def test_an_arena_is_not_closed_under_the_thread_of_its_reserve() -> None:
    arena = Arena(0, 8)
    reserve = Reserve(arena, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="close the reserve first"):
            arena.close()
    arena.free(arena.alloc())
    reserve.close()
    arena.close()


def test_a_pool_of_a_closed_arena_answers_with_a_value_error() -> None:
    arena = Arena(0, 8)
    pool = Pool(arena)
    arena.close()
    for call in (pool.stats, pool.classes, pool.compact, lambda: pool.set_limit(1), lambda: pool.huge_size,
                 lambda: pool.malloc(1, b"x")):
        with pytest.raises(ValueError, match="closed"):
            call()


def documented(module: str, body: list[ast.stmt]) -> dict[str, str]:
    """Names of the functions, classes and methods in a stub -> docstring."""
    found = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            if not node.name.startswith("__") and not getattr(node, "decorator_list", None) or isinstance(
                    node, ast.ClassDef):
                found[f"{module}.{node.name}"] = ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef):
                found |= documented(f"{module}.{node.name}", node.body)
    return found


def compiled_docstring(name: str) -> str:
    """Without the line with the signature that Cython writes before it."""
    _, module, *rest = name.split(".")
    value: object = importlib.import_module(f"allocator.{module}")
    for attribute in rest:
        value = getattr(value, attribute)
    text = value.__doc__ or ""
    first, _, after = text.partition("\n")
    signed = first.startswith((f"{rest[-1]}(", f"{rest[0]}.", f"{rest[0]}("))
    return inspect.cleandoc(after if signed else text)


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.stem)
def test_a_stub_has_the_docstrings_of_its_module(stub: Path) -> None:
    found = documented(f"allocator.{stub.stem}", ast.parse(stub.read_text()).body)
    assert found
    for name, text in found.items():
        assert text, f"{name} is not documented in {stub.name}"
        assert text == compiled_docstring(name), name


@pytest.mark.requires("unsanitized")  # the checker starts compilers of its own
def test_stubtest_finds_the_stubs_true(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    allowed = tmp_path / "allowed"
    allowed.write_text(ALLOWED)
    run = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "allocator", "--allowlist", allowed, "--concise"],
        cwd=ROOT, env={**os.environ, "MYPY_CACHE_DIR": str(tmp_path / "cache")}, capture_output=True,
        text=True, timeout=200,
    )
    assert run.returncode == 0, run.stdout + run.stderr
