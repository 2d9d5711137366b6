# SPDX-License-Identifier: Apache-2.0
"""What the packages offer is what they say: `__all__`, its documentation, and the type stubs."""
import ast
import dataclasses
import doctest
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import allocator
from tests.support.paths import ROOT

STUBS = sorted((*ROOT.glob("allocator/*.pyi"), *ROOT.glob("zramfs/*/*.pyi")))


def dotted(source: Path) -> str:
    return ".".join(source.relative_to(ROOT).with_suffix("").parts)


def public(names: object) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def test_all_names_what_the_package_offers() -> None:
    names = public(vars(allocator))
    offered = {name for name in names if not isinstance(getattr(allocator, name), ModuleType)}
    assert allocator.__all__ == sorted(offered)


def test_every_offered_name_is_documented() -> None:
    for name in allocator.__all__:
        value = getattr(allocator, name)
        # The statistics have a comment with the unit at every field instead.
        assert value.__doc__ if not dataclasses.is_dataclass(value) else name.endswith("Stats"), name


def test_the_example_in_the_documentation_works() -> None:
    result = doctest.testmod(allocator)
    assert result.attempted >= 5 and result.failed == 0


def test_every_module_for_python_has_a_stub() -> None:
    """A compiled module without classes or functions for Python needs none."""
    stubbed = {path.with_suffix(".pyx") for path in STUBS}
    for source in (*ROOT.glob("allocator/*.pyx"), *ROOT.glob("zramfs/*/*.pyx")):
        module = importlib.import_module(dotted(source))
        own = {name for name in public(vars(module)) if of_module(module, name)}
        assert (source in stubbed) == bool(own), f"{source.name} offers {own or 'nothing'}"


def of_module(module: ModuleType, name: str) -> bool:
    """Defined there, and not imported."""
    value = getattr(module, name)
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def arguments(function: ast.FunctionDef) -> list[str]:
    """Names, "*" before keywords, and defaults as source text."""
    found = []
    positional = function.args.posonlyargs + function.args.args
    defaults = [None] * (len(positional) - len(function.args.defaults)) + function.args.defaults
    pairs = [*zip(positional, defaults, strict=True)]
    found += [arg.arg + (f"={ast.unparse(default)}" if default else "") for arg, default in pairs]
    if function.args.kwonlyargs:
        found.append("*")
    found += [
        arg.arg + (f"={ast.unparse(default)}" if default else "")
        for arg, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    ]
    return found


def compiled_arguments(function: object) -> list[str]:
    found = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        found.append(parameter.name + default)
    return found


@pytest.mark.parametrize("stub", STUBS, ids=dotted)
def test_stub_is_the_compiled_module(stub: Path) -> None:
    module = importlib.import_module(dotted(stub))
    body = ast.parse(stub.read_text()).body
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    constants = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    own = {name for name in public(vars(module)) if of_module(module, name)}
    assert {*classes, *functions} == own
    assert constants == {name for name in public(vars(module)) if name.isupper()}
    for name, node in functions.items():
        assert arguments(node) == compiled_arguments(getattr(module, name))
    for name, node in classes.items():
        compiled = getattr(module, name)
        methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        attributes = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
        assert public({*methods, *attributes}) == public(vars(compiled)), name
        for method, item in methods.items():
            if not method.startswith("_") and not item.decorator_list:
                assert arguments(item) == compiled_arguments(getattr(compiled, method)), f"{name}.{method}"
