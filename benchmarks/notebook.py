# SPDX-License-Identifier: Apache-2.0
"""Runs a notebook and keeps what its cells say and draw in it, without Jupyter.

    scripts/notebook [FILE]        docs/allocator.ipynb by default; --check changes nothing and ends with 1
                                   if a cell says something else than the notebook has

A cell is Python. What it prints, and the value of its last line, are its output. A matplotlib Figure becomes
a picture. Any reader of notebooks shows the file, and Jupyter runs it too.
"""
from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DEFAULT = Path(__file__).resolve().parents[1] / "docs/allocator.ipynb"
DPI = 70  # two pictures of 8 inches: about 30 KB in the file

Outputs = list[dict[str, Any]]


def run_cells(notebook: dict[str, Any]) -> list[Outputs]:
    """The outputs of each code cell, in order. Whatever a cell raises comes out."""
    names: dict[str, Any] = {"__name__": "__main__"}
    return [_run("".join(cell["source"]), names)
            for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _run(source: str, names: dict[str, Any]) -> Outputs:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(tree, "<cell>", "exec", dont_inherit=True), names)
        code = compile(ast.Expression(last.value), "<cell>", "eval", dont_inherit=True) if last else "None"
        value = eval(code, names)
    outputs: Outputs = []
    if text := said.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        outputs.append({"output_type": "display_data", "metadata": {}, "data": _shown(value)})
    return outputs


def _shown(value: object) -> dict[str, Any]:
    if not isinstance(value, Figure):
        return {"text/plain": repr(value).splitlines(keepends=True)}
    picture = io.BytesIO()
    value.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    return {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}


def texts(outputs: list[Outputs]) -> list[str]:
    """What each cell says, without its pictures, whose bytes depend on the version of matplotlib."""
    return ["".join("".join(each.get("text") or each["data"]["text/plain"]) for each in cell)
            for cell in outputs]


def kept(notebook: dict[str, Any]) -> list[Outputs]:
    """The outputs that stand in a notebook."""
    return [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/notebook", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--check", action="store_true", help="compare with what the notebook has")
    chosen = parser.parse_args()
    notebook = json.loads(chosen.file.read_text(encoding="utf-8"))
    found = run_cells(notebook)
    if chosen.check:
        pairs = zip(texts(found), texts(kept(notebook)), strict=True)
        differing = [number for number, (new, old) in enumerate(pairs, 1) if new != old]
        print(f"cells that say something else: {differing}" if differing else f"{len(found)} cells agree")
        return 1 if differing else 0
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(cells, found, strict=True), 1):
        cell["outputs"] = outputs
        cell["execution_count"] = number
    chosen.file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0
