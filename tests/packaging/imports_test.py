# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: each package only those below it, as docs/design.md says.

Every import and cimport line counts, in functions and under TYPE_CHECKING too. A new package or a new arrow
means a line in the table here, and a sentence in docs/design.md that says why.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = next(above for above in Path(__file__).parents if (above / "pyproject.toml").exists())
FOR_ALL = {"errors", "text", "model"}
# package: what it may import besides FOR_ALL. A name with a dot is that one module.
MAY_IMPORT = {
    "cli": {"doctor", "configuration", "views", "lifecycle", "host", "codecs", "device.commands"},
    "doctor": {"configuration", "lifecycle", "host"},
    "configuration": {"lifecycle", "codecs", "host"},
    "lifecycle": {"daemon", "image", "host"},
    "daemon": {"tree", "device", "lane", "keeper", "host", "allocator.background"},
    "tree": {"device", "allocator.stats"},
    "device": {"store", "lane", "codecs", "image", "host", "allocator"},
    "image": {"host"},
    "lane": {"store", "allocator.prim"},
    "store": {"codecs", "allocator"},
    "codecs": {"allocator.prim"},
    "views": {"host"},
    "host": set(),
    "keeper": set(),
    "model": {"allocator.stats"},
    "text": set(),
}
_FROM = re.compile(r"\s*from\s+([\w.]+)\s+c?import\s+(.*)")
_PLAIN = re.compile(r"\s*c?import\s+([\w.]+)")


def sources() -> list[Path]:
    found = [path for path in (ROOT / "zramfs").rglob("*") if path.suffix in (".py", ".pyi", ".pyx", ".pxd")]
    found += [path for path in (ROOT / "allocator").glob("*.p*") if path.suffix != ".pyc"]
    return sorted(found)


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts == ("zramfs", "__main__.py"):  # the program, which runs the command line
        return "cli"
    return parts[1].partition(".")[0] if parts[0] == "zramfs" else "allocator"


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and the absolute name of each module of ours that a file imports."""
    here = list(path.relative_to(ROOT).parts[:-1])
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if found := _FROM.match(line):
            module, names = found[1], found[2]
            if module.startswith("."):
                dots = len(module) - len(module.lstrip("."))
                module = ".".join([*here[:len(here) - dots + 1], *filter(None, [module.lstrip(".")])])
            words = [word.split()[0] for word in re.sub(r"[()]|#.*", "", names).split(",") if word.strip()]
            # `from zramfs.host import mounts` names a module, as `from zramfs.host.mounts import x` does.
            inner = [f"{module}.{word}" for word in words if (ROOT / f"{module}.{word}".replace(".", "/")
                     ).with_suffix(".py").exists()]
            for name in inner or [module]:
                yield number, name
        elif found := _PLAIN.match(line):
            yield number, found[1]


def is_allowed(package: str, name: str) -> bool:
    top, _, rest = name.partition(".")
    if top == "allocator":
        allowed, module = MAY_IMPORT.get(package, set()), name
        return package == "allocator" or "allocator" in allowed or module in allowed
    if top != "zramfs":
        return True
    target = rest.partition(".")[0]
    if package == "allocator":
        return False
    if target in ("", "__version__") or target == package or target in FOR_ALL and package not in FOR_ALL:
        return True
    if package in FOR_ALL:
        return target in {"text": set(), "model": {"text"}, "errors": set()}[package] | {"errors"}
    return target in MAY_IMPORT[package] or rest in MAY_IMPORT[package]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_package_may(path: Path) -> None:
    package = package_of(path)
    for number, name in imports(path):
        assert is_allowed(package, name), (
            f"{path.relative_to(ROOT)}:{number} imports {name}, but {package} may import only "
            f"{', '.join(sorted(MAY_IMPORT.get(package, set()) | FOR_ALL))}: move what it needs down, or "
            "pass it in")


def test_the_table_has_no_circle_and_no_package_that_is_gone() -> None:
    packages = {path.name for path in (ROOT / "zramfs").iterdir() if (path / "__init__.py").exists()}
    assert set(MAY_IMPORT) == packages
    below = {package: {name.partition(".")[0] for name in names} for package, names in MAY_IMPORT.items()}
    list(TopologicalSorter(below).static_order())


def test_no_two_modules_import_each_other() -> None:
    """Also within a package; what is only for types does not run, and does not count."""
    arrows: dict[str, set[str]] = {}
    for path in sources():
        if path.suffix in (".pyi", ".pxd"):
            continue
        runs = re.sub(r"^if TYPE_CHECKING:\n(?:[ \t]+.*\n|\n)+", "", path.read_text(), flags=re.M)
        lines = set(runs.splitlines())
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        text = path.read_text().splitlines()
        arrows[name] = {target for number, target in imports(path)
                        if text[number - 1] in lines and target.split(".")[0] in ("zramfs", "allocator")}
    known = {name: {target for target in targets if target in arrows} for name, targets in arrows.items()}
    list(TopologicalSorter(known).static_order())
