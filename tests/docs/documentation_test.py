# SPDX-License-Identifier: Apache-2.0
"""The pages for people as a whole: links, the first lines of README, numbers of scenarios, the plot."""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = next(parent for parent in Path(__file__).resolve().parents if (parent / "pyproject.toml").exists())
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def prose(page: Path) -> str:
    """Without blocks of code, in which brackets are no links and # is no heading."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link to a heading may name, as GitHub makes it: letters, digits, - and _ of the heading."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in titles}


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            wrong.append(target)
    assert wrong == []


def test_the_index_has_every_page_of_docs() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)/]+)\)", index))
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"} <= linked


def test_readme_opens_with_the_demo_and_the_tests() -> None:
    top = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    commands = re.findall(r"^sudo (scripts/\w+)", top.split("```")[1], re.MULTILINE)
    assert commands == ["scripts/demo", "scripts/test"]
    assert all((ROOT / command).stat().st_mode & 0o111 for command in commands)


def test_the_scenarios_of_concurrency_are_numbered_in_order_and_the_index_counts_them() -> None:
    text = (ROOT / "docs/concurrency.md").read_text(encoding="utf-8")
    found = re.findall(r"^(?:\*\*S(\d+)\. |\| S(\d+) \|)", text, re.MULTILINE)
    numbers = [int(bold or row) for bold, row in found]
    assert numbers == list(range(1, len(numbers) + 1)) and numbers
    assert f"{len(numbers)} numbered scenarios" in (ROOT / "docs/README.md").read_text(encoding="utf-8")
    parts = re.findall(r"^\* \[.*\): S(\d+) to S(\d+)$", text, re.MULTILINE)
    told = [number for first, last in parts for number in range(int(first), int(last) + 1)]
    assert told == numbers


def test_the_plot_of_the_results_is_drawn_from_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install zramfs[bench])")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from benchmarks import results_plot

    text = (ROOT / "benchmarks/results.md").read_text(encoding="utf-8")
    rows = results_plot.rows(text)
    # The table says the quotient itself, in its sixth column.
    cells = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| (half|real) ", line)]
    assert [f"{row.data} {row.name}" for row in rows] == [cell[0].strip() for cell in cells]
    assert len(rows) == 16
    for row, cell in zip(rows, cells, strict=True):
        assert row.values[1] == pytest.approx(float(cell[5]), abs=0.0051), row.name
    results_plot.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected a table"):
        results_plot.rows("no table")


def test_the_picture_of_density_is_drawn_from_the_results_that_the_table_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install zramfs[bench])")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from benchmarks import density_plot

    results = json.loads((ROOT / "benchmarks/density.json").read_text(encoding="utf-8"))
    panels = density_plot.panels(results)
    text = (ROOT / "benchmarks/results.md").read_text(encoding="utf-8")
    text = text.partition("\n## Density\n")[2].partition("\n## ")[0]
    assert [line for line in text.splitlines() if line.startswith("|")] == density_plot.table(panels)
    bars = {bar.way: bar for bar in panels["text"]}
    assert bars["zram lz4"].capacity == 1 < bars["zramfs, units zstd:9"].capacity
    density_plot.draw(panels, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected results"):
        density_plot.panels({"density": []})
    with pytest.raises(ValueError, match="expected zram lz4 among the ways of text, found zramfs lz4"):
        density_plot.panels({"density": [{"way": "zramfs lz4", "data": "text", "share": 0.3}]})
