"""How every figure looks: theme, colours and markers of the variants, log axes, labels that do not overlap, saving."""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import pandas as pd

_MARKERS = ["o", "s", "^", "D", "X", "v", "P", "p", "h", "*"]
LINES = ["-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2))]
_COLORS = (0, 1, 2, 3, 5, 4, 9, 7, 6)  # of seaborn's colorblind palette, without its pale yellow
# The paper's six get the most distinct looks; no two ViTs share a colour, nor do narrow networks and the paper's first four.
VARIANT_LOOKS = (
    *("F0", "F1", "F3", "F3+", "F7", "F7+", "F2", "F4", "F5", "F6"), *("Ti", "S", "B", "L", "So400m", "g", "G"),
    *("F1+", "F2+", "F4+", "F5+", "F6+", "F0-pico", "F0-micro", "F0-nano"),
)


def variant_style(name: str) -> dict:
    """Colour, marker and line style of a variant, the same in every figure; other networks get one by their name."""
    import seaborn as sns

    base = name if name in VARIANT_LOOKS else re.sub(r"(/\d+)?(-[a-z]+)?$", "", name)
    index = VARIANT_LOOKS.index(base) if base in VARIANT_LOOKS else sum(map(ord, base))
    color = sns.color_palette("colorblind")[_COLORS[index % len(_COLORS)]]
    return {"color": color, "marker": _MARKERS[index % len(_MARKERS)], "linestyle": LINES[index % len(LINES)]}


def figure_function(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a figure function under the house theme, settle its labels, and leave global settings as they were."""

    @functools.wraps(function)
    def styled(*args, **kwargs) -> Figure:
        import seaborn as sns

        theme = sns.axes_style("ticks") | sns.plotting_context("notebook")
        theme |= {
            "axes.grid": True,
            "grid.color": "0.92",
            "grid.linewidth": 0.8,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "legend.frameon": False,
            "legend.fontsize": 10,
            "axes.edgecolor": "0.4",
        }
        with mpl.rc_context(theme):
            figure = function(*args, **kwargs)
            for axes in figure.axes:
                _separate([text for text in axes.texts if text.get_gid() == "label"], axes)
            figure.draw_without_rendering()  # ticks are made when first drawn, with the settings of that moment
        return figure

    return styled


def new_figure(columns: int = 1, rows: int = 1, size: tuple = (8, 5.5), note: str | None = None, **kwargs):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **kwargs)
    plt.close(figure)  # hand it to the caller alone: pyplot keeps no reference and a notebook shows it once
    if note:
        figure.supxlabel(note, x=0.995, ha="right", fontsize=9, color="0.45", style="italic")
    return figure, axes


def _halo(width: int = 3):
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground="white")]


def label_point(axes: Axes, text: str, x, y, color, offset: tuple = (9, 0)) -> None:
    """Text beside a point, moved apart from its like when the figure is done."""
    note = axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", color=color, va="center", fontsize=11,
                         ha="left" if offset[0] >= 0 else "right", fontweight="bold", path_effects=_halo(),
                         annotation_clip=False)  # fmt: skip
    note.set_gid("label")


def _separate(labels: list, axes: Axes, steps: int = 60) -> None:
    """Push labels off each other and off the markers of the lines, up or down, a little at a time."""
    if not labels:
        return
    axes.figure.draw_without_rendering()
    marked = [line for line in axes.lines if line.get_marker() not in ("", " ", "None", None) and len(line.get_xdata())]
    marks = np.concatenate([axes.transData.transform(line.get_xydata()) for line in marked] or [np.empty((0, 2))])
    for _ in range(steps):
        boxes = [label.get_window_extent().padded(1.0) for label in labels]
        moved = False
        for label, box in zip(labels, boxes, strict=True):
            for x, y in marks:
                if box.x0 - 5 < x < box.x1 + 5 and box.y0 - 5 < y < box.y1 + 5:
                    label.xyann = (label.xyann[0], label.xyann[1] + (1.5 if y <= (box.y0 + box.y1) / 2 else -1.5))
                    moved = True
        for i, upper in enumerate(labels):
            for j in range(i):
                if boxes[i].overlaps(boxes[j]):
                    up, down = (upper, labels[j]) if boxes[i].y0 >= boxes[j].y0 else (labels[j], upper)
                    for label, shift in ((up, 1.5), (down, -1.5)):
                        x, y = label.xyann
                        label.xyann = (x, y + shift)
                    moved = True
        if not moved:
            return


def log_axis(axis, values, room: tuple = (0.04, 0.04)) -> None:
    """Log scale around `values` with plain tick labels where they span little, powers of ten where they span much.

    Linear where one of them is 0, as an error may be.
    """
    axes, name = axis.axes, axis.axis_name
    values = np.asarray([value for value in values if np.isfinite(value) and value >= 0], dtype=float)
    if (values == 0).any():
        high = values.max() or 1.0
        getattr(axes, f"set_{name}lim")(-high * room[0], high * (1 + room[1]))
        plain_ticks(axis)
        return
    getattr(axes, f"set_{name}scale")("log")
    if not len(values):
        return
    low, high = values.min(), values.max()
    if high < 1.02 * low:  # a single point, in the middle
        low, high = low / 1.3, high * 1.3
    span = np.log(high / low)
    low, high = low * np.exp(-span * room[0]), high * np.exp(span * room[1])
    getattr(axes, f"set_{name}lim")(low, high)
    if high / low < 12:
        plain_ticks(axis)
    elif 1e-3 < low and high < 1e4:  # numbers that are read without a power of ten
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(ticker.NullLocator())
    elif high / low < 100:
        sparse_ticks(axis)


def sparse_ticks(axis) -> None:
    """1 and 3 times powers of ten: matplotlib would label every second minor tick, one over the other."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axis.set_major_formatter(ticker.LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(np.inf, np.inf)))
    axis.set_minor_formatter(ticker.NullFormatter())


def plain_ticks(axis, most: int = 6) -> None:
    axis.set_major_locator(ticker.MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(ticker.ScalarFormatter(useMathText=True))  # one common power of ten at the axis's end
    axis.set_minor_locator(ticker.NullLocator())


def save_figure(
    fig: Figure, path_stem: str | os.PathLike, table: "pd.DataFrame | None" = None, caption: str = ""
) -> list[Path]:
    """Write `path_stem`.svg and .png, .csv of the table drawn and .txt of the caption where given; returns the paths.

    The caption is in the pictures' metadata as well. Equal figures give equal bytes: no dates, fixed identifiers in the SVG.
    """
    stem = Path(path_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + ending) for ending in (".svg", ".png")]
    with mpl.rc_context({"svg.hashsalt": "nfnet_lib", "svg.fonttype": "path"}):
        described = {"Description": caption} if caption else {}
        fig.savefig(paths[0], metadata={"Date": None, "Creator": None} | described)
        fig.savefig(paths[1], dpi=150, metadata={"Software": None} | described)
    if caption:
        paths.append(stem.with_name(stem.name + ".txt"))
        paths[-1].write_text(caption + "\n", encoding="utf-8")
    if table is not None:
        from nfnet_lib.records import results_csv

        paths.append(stem.with_name(stem.name + ".csv"))
        results_csv(table, paths[-1])
    return paths
