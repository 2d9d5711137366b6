# SPDX-License-Identifier: Apache-2.0
"""The picture of a pool: its pageblocks, its free memory by order, its size classes by fullness.

One scale of colour means the same everywhere in a picture: the more a pageblock holds, the more it stands
out from the ground. On white, yellow is sparse and dark blue is full; on a dark ground it is the other way
round. The scale is cividis, whose lightness changes evenly, so that it reads in grey and with any colour
vision. What is not on the scale has a mark of its own.
"""
from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, Rectangle

from zramfs.model.contents import KINDS, REST
from zramfs.text.sizes import format_size

from .sample import FRAME, ORDERS, PAGEBLOCK, PAGEBLOCK_FRAMES, Sample, moment

DPI = 120
MIB = 1 << 20
# Cells of a row, the fewest first: 32 are 64 MiB of pool, so rows begin at round numbers.
MAP_COLUMNS = (32, 64, 128)
MAP_ROWS = 64  # beyond 128 x 64 cells (16 GiB) each stands for several pageblocks
MAP_INCHES = 6.0  # height at most
LEAST_MIB = 0.1  # the end of an axis when there is nothing to show
LEAST_CLASSES = 16
# Fullness groups of zsmalloc drawn as one: index of the last, and what it is called.
BANDS = ((1, "≤ 20 %"), (3, "≤ 40 %"), (5, "≤ 60 %"), (7, "≤ 80 %"), (9, "≤ 99 %"), (10, "full"))
BALLOON = "#d55e00"
# Kinds of pages, in the colours of Okabe and Ito, which also those can tell apart who see few.
KIND_COLOURS = {
    "hot": "#d55e00", "huge": "#cc79a7", "recompressed": "#e69f00", "units": "#009e73", "shared": "#56b4e9",
    "same": "#0072b2", "written_back": "#f0e442", REST: "#999999",
}
CONTENTS_INCHES = (1.0, 0.55)  # of the chart, and of the bars of each sample


@dataclass(frozen=True)
class Ink:
    """Colours: of the ground and what is written on it, of lines, of the samples before and after."""

    ground: str
    text: str
    rule: str
    before: str
    after: str
    is_dark: bool

    def settings(self) -> dict[Any, str]:
        """matplotlib's, for everything that is not coloured one by one."""
        grounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
        texts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        return {**dict.fromkeys(grounds, self.ground), **dict.fromkeys(texts, self.text),
                "grid.color": self.rule}

    def fullness(self) -> Colormap:
        """The scale from empty to full. The part that is nearest to the ground is left to what is not on
        it."""
        cividis = matplotlib.colormaps["cividis"]
        steps = [0.15 + 0.0085 * i if self.is_dark else 1 - i / 100 for i in range(101)]
        return LinearSegmentedColormap.from_list("fullness", [cividis(step) for step in steps])

    def band(self, last: int) -> tuple[float, float, float, float]:
        """The colour of the fullness groups up to the one with this index."""
        return self.fullness()((last + 0.5) / (BANDS[-1][0] + 0.5))


LIGHT = Ink("#ffffff", "#000000", "#b0b0b0", "#e69f00", "#0072b2", False)
DARK = Ink("#14171c", "#e4e6ea", "#5c636e", "#e69f00", "#56b4e9", True)


@dataclass(frozen=True)
class Form:
    """What a picture is for. narrow: a phone, where each part stands below the one before. has_header: the
    device and its figures stand above, as in a picture that is looked at alone."""

    ink: Ink = LIGHT
    narrow: bool = False
    has_header: bool = True

    def widths(self, samples: int) -> tuple[float, int]:
        """Inches of the picture, and how many parts of a kind stand beside each other."""
        if self.narrow:
            # A screen of 400 px shows 12 px letters then, since it is about as wide as that.
            return 4.6, 1
        return (11.0 if samples == 1 else 16.0), samples


ALONE = Form()


def draw_pool(
    after: Sample, before: Sample | None = None, titles: tuple[str, str] = ("before", "after"),
    form: Form = ALONE,
) -> bytes:
    """A PNG of one sample, or of two beside each other."""
    samples = [after] if before is None else [before, after]
    names = [""] if before is None else list(titles)
    columns, rows, blocks_a_cell = _grid(max(len(sample.pageblocks) for sample in samples))
    width, beside = form.widths(len(samples))
    cell = min((width / beside - 1.3) / columns, MAP_INCHES / rows)
    panels = 3.6 * (1 if not form.narrow else 1 + len(samples))
    heights = [max(0.5, cell * rows) * (len(samples) // beside) + 1.15, panels]
    has_contents = any(sample.kinds for sample in samples)
    if has_contents:
        heights.insert(0, CONTENTS_INCHES[0] + CONTENTS_INCHES[1] * len(samples) * (2 if form.narrow else 1))
    if form.has_header:
        heights.insert(0, 1.2)
    with warnings.catch_warnings(), matplotlib.rc_context(form.ink.settings()):
        # A name in a script that the font lacks is drawn as boxes; that is not worth a word on stderr.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure = Figure(figsize=(width, sum(heights)), dpi=DPI, layout="constrained")
        parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        if form.has_header:
            _header(parts.pop(0), samples, names)
        if has_contents:
            _contents(parts.pop(0), samples, names, form)
        _maps(parts[0], samples, names, (columns, rows, blocks_a_cell), form)
        _panels(parts[1], samples, names, form)
        page = io.BytesIO()
        figure.savefig(page, format="png", metadata={"Software": "zramfs"})
    return page.getvalue()


def words(sample: Sample) -> list[str]:
    """The sample in three lines of text."""
    s = sample.mm_stat
    ratio = f"ratio {sample.ratio:.2f}" if sample.ratio else "no ratio yet"
    share = sample.whole_share
    whole = "" if share is None else f", {100 * share:.1f} % of it in whole pageblocks"
    balloon = f", {format_size(sample.balloon['size'])} in the balloon" if sample.balloon.get("size") else ""
    return [
        f"{moment(sample)}, {sample.algorithm}, size {format_size(sample.disksize)}",
        f"data {format_size(s['orig_data_size'])}, compressed {format_size(s['compr_data_size'])}, "
        f"in {format_size(s['mem_used_total'])} of pool memory: {ratio}",
        f"{format_size(sample.resident)} resident in {sample.in_use} pageblocks{balloon}; "
        f"{format_size(sample.free)} free{whole}",
    ]


def _header(figure: SubFigure, samples: Sequence[Sample], names: Sequence[str]) -> None:
    last = samples[-1]
    _say(figure, 0.012, 0.9, f"{last.name} on {last.directory}", size=14, weight="bold")
    for i, (sample, name) in enumerate(zip(samples, names, strict=True)):
        lines = words(sample)
        if name:
            lines[0] = f"{name}: {lines[0]}"
        _say(figure, 0.012 + i * 0.5, 0.58, "\n".join(lines), size=9.5, linespacing=1.35)


def _say(figure: SubFigure, x: float, y: float, text: str, **style: Any) -> None:
    # A path may hold bytes that are no text, and a $ that is no formula.
    figure.text(x, y, text.encode(errors="replace").decode(), va="top", parse_math=False, **style)


# ---- what lies where ---------------------------------------------------------------------------------
def _contents(figure: SubFigure, samples: Sequence[Sample], names: Sequence[str], form: Form) -> None:
    """For each sample a bar of its data and one of the memory that it takes, in pieces by kind."""
    axis = figure.subplots()
    shown = [kind for kind in (*KINDS, REST) if any(kind in sample.kinds for sample in samples)]
    labels = []
    for i, (sample, name) in enumerate(zip(samples, names, strict=True)):
        ends = [0.0, 0.0]
        labels += [f"{word} ({name})" if name else word for word in ("data", "memory")]
        for kind in shown:
            pages, nbytes = sample.kinds.get(kind, (0, 0))
            sizes = [pages * FRAME / MIB, nbytes / MIB]
            axis.barh([2 * i, 2 * i + 1], sizes, 0.8, left=ends, color=KIND_COLOURS[kind],
                      edgecolor=form.ink.ground, linewidth=0.5)
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    axis.set_yticks(range(len(labels)), labels, fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xlim(0, max(LEAST_MIB, axis.get_xlim()[1]))
    axis.set_xlabel("MiB", fontsize=8.5)
    axis.set_title("What lies where", loc="left", fontsize=10.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(
        handles=[_mark(KIND_COLOURS[kind], kind.replace("_", " "), form.ink.ground) for kind in shown],
        loc="outside lower center" if form.narrow else "outside right upper",
        ncols=3 if form.narrow else 1, fontsize=8, frameon=False, handletextpad=0.4,
    )


# ---- pageblocks -------------------------------------------------------------------------------------
def _grid(blocks: int) -> tuple[int, int, int]:
    """Columns and rows of a map, and pageblocks that a cell stands for."""
    per_cell = 1
    while blocks > per_cell * MAP_COLUMNS[-1] * MAP_ROWS:
        per_cell *= 2
    cells = -(-blocks // per_cell)
    columns = next((n for n in MAP_COLUMNS if cells <= n * n // 2), MAP_COLUMNS[-1])
    return columns, max(1, -(-cells // columns)), per_cell


def _maps(
    figure: SubFigure, samples: Sequence[Sample], names: Sequence[str], grid: tuple[int, int, int],
    form: Form,
) -> None:
    axes = _beside(figure, len(samples), form)
    for axis, sample, name in zip(axes, samples, names, strict=True):
        _map(axis, sample, grid, form.ink)
        stands_for = "2 MiB" if grid[2] == 1 else f"{2 * grid[2]} MiB"
        title = f"Pageblocks, {stands_for} a cell" + (f" ({name})" if name else "")
        axis.set_title(title, loc="left", fontsize=10.5)
    scale = figure.colorbar(
        ScalarMappable(Normalize(0, 100), form.ink.fullness()), ax=axes, orientation="horizontal",
        shrink=0.46 if form.narrow else 0.28 if len(samples) > 1 else 0.42, aspect=28, pad=0.02,
        anchor=(0.0, 1.0),
    )
    scale.set_label("share of the pageblock in use (%)", fontsize=8.5)
    scale.ax.tick_params(labelsize=8)
    ground = form.ink.ground
    figure.legend(
        handles=[
            _mark(ground, "given back to the OS", "#808080"), _mark(BALLOON, "in the balloon", ground),
        ],
        loc="lower right", ncols=1 if form.narrow else 2, fontsize=8.5, frameon=False, handletextpad=0.4,
    )


def _beside(figure: SubFigure, number: int, form: Form, **how: Any) -> list[Axes]:
    """So many parts beside each other, or below each other in a narrow form."""
    shape = (number, 1) if form.narrow else (1, number)
    return list(figure.subplots(*shape, squeeze=False, **({} if form.narrow else how)).flat)


def _map(axis: Axes, sample: Sample, grid: tuple[int, int, int], ink: Ink) -> None:
    columns, rows, per_cell = grid
    axis.set_xlim(0, columns)
    axis.set_ylim(rows, 0)
    axis.set_aspect("equal", anchor="NW")
    axis.spines[:].set_visible(False)
    axis.set_xticks([])
    step = max(1, rows // 8)
    starts = range(0, rows, step)
    offsets = [format_size(row * columns * per_cell * PAGEBLOCK) for row in starts]
    axis.set_yticks([row + 0.5 for row in starts], offsets)
    axis.tick_params(left=False, labelsize=8)
    if not sample.pageblocks:
        axis.text(0, rows / 2, "no memory was needed yet", va="center", fontsize=9.5)
    cells = [sample.pageblocks[i:i + per_cell] for i in range(0, len(sample.pageblocks), per_cell)]
    colours = ink.fullness()
    frames, inner, shades, balloons = [], [], [], []
    for i, cell in enumerate(cells):
        # A gap between neighbours, so that they can be counted.
        left, bottom, side = i % columns + 0.05, i // columns + 0.95, 0.9
        resident = [block for block in cell if block.resident]
        height = side * len(resident) / len(cell)
        frames.append(Rectangle((left, bottom), side, -side))
        if resident:
            inner.append(Rectangle((left, bottom), side, -height))
            # The balloon's frames are used, but hold nothing and have a mark of their own.
            used = sum(block.used - block.balloon for block in resident)
            shades.append(colours(used / len(resident) / PAGEBLOCK_FRAMES))
        share = sum(block.balloon for block in cell) / len(cell) / PAGEBLOCK_FRAMES
        if share:
            # The area of the mark is the balloon's share of the cell.
            half = side * math.sqrt(share) / 2
            balloons.append(Rectangle((left + side / 2 - half, bottom - side / 2 - half), 2 * half, 2 * half))
    layers = ((frames, ink.ground, ink.rule), (inner, shades, "none"), (balloons, BALLOON, ink.ground))
    for patches, fill, edge in layers:
        layer = PatchCollection(patches, facecolors=fill, edgecolors=edge, linewidths=0.5)
        # Drawn where they stand: moved to whole pixels, small cells would differ in size.
        layer.set_snap(False)
        axis.add_collection(layer)


def _mark(colour: Any, label: str, edge: str) -> Patch:
    return Patch(facecolor=colour, edgecolor=edge, label=label, linewidth=0.8)


# ---- free memory by order, size classes by fullness ------------------------------------------------
def _panels(figure: SubFigure, samples: Sequence[Sample], names: Sequence[str], form: Form) -> None:
    ratios = [1.0] + [1.6 / len(samples) ** 0.5] * len(samples)
    axes = _beside(figure, 1 + len(samples), form, width_ratios=ratios)
    _orders(axes[0], samples, names, form.ink)
    sizes = sorted({c.size for sample in samples for c in sample.classes if any(c.zspages)})
    for axis, sample, name in zip(axes[1:], samples, names, strict=True):
        _classes(axis, sample, sizes, form.ink)
        axis.set_title("Size classes by fullness" + (f" ({name})" if name else ""), loc="left", fontsize=10.5)
    # Room above the highest bar for the legend, and one scale for both.
    top = 1.3 * max(LEAST_MIB, *(axis.get_ylim()[1] for axis in axes[1:]))
    for axis in axes[1:]:
        axis.set_ylim(0, top)
    axes[-1].legend(
        handles=[_mark(form.ink.band(last), label, form.ink.ground) for last, label in BANDS],
        title="how full the zspages are", fontsize=8, title_fontsize=8, loc="upper right",
        ncols=3 if form.narrow else len(BANDS) // len(samples), frameon=False,
        columnspacing=1.0, handletextpad=0.4,
    )


def _orders(axis: Axes, samples: Sequence[Sample], names: Sequence[str], ink: Ink) -> None:
    width = 0.84 / len(samples)
    for i, (sample, name) in enumerate(zip(samples, names, strict=True)):
        colour = ink.after if i == len(samples) - 1 else ink.before
        sizes = [(blocks << order) * FRAME / MIB for order, blocks in enumerate(sample.orders)]
        places = [order + (i - (len(samples) - 1) / 2) * width for order in range(len(sizes))]
        bars = axis.bar(places, sizes, width * 0.95, color=colour, label=name or None)
        counts = [str(blocks) if blocks else "" for blocks in sample.orders]
        axis.bar_label(bars, counts, fontsize=7, rotation=90 if len(samples) > 1 else 0, padding=2)
    axis.set_xticks(range(ORDERS), [format_size(FRAME << order) for order in range(ORDERS)], fontsize=8)
    # Room for the numbers on the bars.
    axis.set_ylim(0, 1.15 * max(LEAST_MIB, axis.get_ylim()[1]))
    axis.set_xlabel("size of a block (2M: a whole pageblock, given back)", fontsize=8.5)
    axis.set_ylabel("free memory (MiB), number of blocks", fontsize=8.5)
    axis.set_title("Free memory by order", loc="left", fontsize=10.5)
    _plain(axis)
    if len(samples) > 1:
        axis.legend(fontsize=8.5, loc="upper left", frameon=False)


def _classes(axis: Axes, sample: Sample, sizes: Sequence[int], ink: Ink) -> None:
    """Pool memory of each size class in use, stacked by how full its zspages are."""
    known = {c.size: c for c in sample.classes}
    below = [0.0] * len(sizes)
    first = 0
    for last, _ in BANDS:
        heights = []
        for size in sizes:
            c = known.get(size)
            zspages = sum(c.zspages[first:last + 1]) if c else 0
            heights.append(zspages * (c.pages_per_zspage if c else 0) * FRAME / MIB)
        axis.bar(range(len(sizes)), heights, 0.9, bottom=below, color=ink.band(last), edgecolor=ink.ground,
                 linewidth=0.2)
        below = [under + height for under, height in zip(below, heights, strict=True)]
        first = last + 1
    step = max(1, math.ceil(len(sizes) / 16))
    labels = [str(size) for size in sizes[::step]]
    axis.set_xticks(range(0, len(sizes), step), labels, fontsize=8, rotation=45, ha="right",
                    rotation_mode="anchor")
    axis.set_xlabel("size of the class (bytes)", fontsize=8.5)
    axis.set_ylabel("pool memory (MiB)", fontsize=8.5)
    # Few classes are bars all the same, not walls.
    axis.set_xlim(-0.7, max(len(sizes), LEAST_CLASSES) - 0.3)
    _plain(axis)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
