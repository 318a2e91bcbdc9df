"""One function per figure, from a table to a matplotlib Figure; none shows, saves or changes a global setting.

Every variant keeps its colour, marker and line style in all figures (`variant_style`); marker and style alone tell
variants apart on a grey print. Curves are labelled at their ends where there is room, not in a legend.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nfnet_lib import paper
from nfnet_lib.plot_style import (
    LINES,
    figure_function,
    label_point,
    log_axis,
    new_figure,
    plain_ticks,
    save_figure,
    sparse_ticks,
    variant_style,
)  # fmt: skip
from nfnet_lib.scaling import FrontierResult, variant_order

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "architectures",
    "families",
    "figure1",
    "figure1_published",
    "figure1_side_by_side",
    "figure2",
    "figure3",
    "learning_curves",
    "parameters_and_macs",
    "save_figure",
    "signal_propagation",
    "variant_style",
]

LAPTOP = "laptop scale"
_INK, _FAINT = "0.2", "0.75"
_AXIS = {
    "train_flops": "training compute (FLOPs)",
    "tpu_v4_core_hours": "training compute (TPU-v4 core-hours)",
    "core_hours": "training compute (core-hours of the device used)",
    "seconds": "training time (s)",
    "heldout_loss": "held-out loss (nats per image)",
}


def _require(table: "pd.DataFrame", columns: tuple[str, ...], what: str) -> None:
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"{what} lacks column(s) {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")


def _hours_axis(axes: Axes) -> None:
    """Second axis on top of training FLOPs: the core-hours of TPU v4 they would take at the paper's utilisation."""
    top = axes.secondary_xaxis("top", functions=(paper.tpu_v4_core_hours, paper.train_flops_of_core_hours))
    top.set_xlabel(f"TPU-v4 core-hours (formula, at {paper.PAPER_UTILISATION:.1%} of peak)", fontsize=10, color="0.35")
    top.tick_params(labelsize=10, colors="0.35")
    low, high = axes.get_xlim()
    if high / low < 12:
        plain_ticks(top.xaxis)
        top.xaxis.set_major_formatter(ticker.FuncFormatter(lambda hours, _: f"{hours:.3g}"))
    elif high / low < 100:
        sparse_ticks(top.xaxis)


@figure_function
def figure2(result: FrontierResult, note: str | None = LAPTOP) -> Figure:
    """Held-out loss against training compute: a curve a variant, the compute-optimal frontier and its power law."""
    figure, axes = new_figure(note=note)
    compute, loss, law = result.compute, result.loss, result.law
    everything = result.cells
    log_axis(axes.xaxis, everything[compute], room=(0.06, 0.16))
    log_axis(axes.yaxis, everything[loss], room=(0.06, 0.06))
    points = result.points
    axes.plot(points[compute], points[loss], color=_FAINT, linewidth=9, alpha=0.5, solid_capstyle="round", zorder=1,
              label="compute-optimal frontier")  # fmt: skip
    for name in variant_order(everything["variant"]):
        part = everything[everything["variant"] == name].sort_values(compute)
        style = variant_style(name)
        axes.plot(part[compute], part[loss], **style, markersize=6.5, linewidth=1.8, markeredgecolor="white", gid=name,
                  markeredgewidth=0.6, zorder=3)  # fmt: skip
        label_point(axes, name, part[compute].iloc[-1], part[loss].iloc[-1], style["color"])
    where = np.geomspace(*law.compute_range, 100)
    text = rf"power law: loss $\propto$ compute$^{{-{law.exponent:.4f}}}$"
    if result.interval:
        text += f"\n(90 % interval {result.interval.low:.4f} to {result.interval.high:.4f})"
    axes.plot(where, law.predict(where), color="black", linewidth=1.4, linestyle=(0, (4, 3)), zorder=4, label=text)
    axes.set(xlabel=_AXIS.get(compute, compute), ylabel=_AXIS.get(loss, loss))
    axes.legend(loc="lower left")
    if compute == "train_flops":
        _hours_axis(axes)
    return figure


@figure_function
def figure3(cells: "pd.DataFrame", note: str | None = LAPTOP) -> Figure:
    """Best learning rate against epochs, a curve a variant (`scaling.best_per_cell`); hollow: edge of the tried grid.

    Curves are drawn slightly apart, so that equal rates remain visible; the grey ticks are the rates tried.
    """
    _require(cells, ("variant", "epoch_budget", "best_lr", "lrs", "lr_is_interior"), "cells")
    cells = cells[np.isfinite(cells["best_lr"])]
    figure, axes = new_figure(note=note, size=(8, 5))
    names = variant_order(cells["variant"])
    offsets = 0.13 * (np.arange(len(names)) - (len(names) - 1) / 2) / max(len(names) / 4, 1)
    tried = sorted({lr for lrs in cells["lrs"] for lr in lrs})
    for lr in tried:
        axes.axhline(lr, color="0.88", linewidth=8 if len(tried) < 12 else 2, zorder=0)
    axes.plot([], [], color="0.88", linewidth=8, label="learning rates tried")
    for name, offset in zip(names, offsets, strict=True):
        part, style = cells[cells["variant"] == name].sort_values("epoch_budget"), variant_style(name)
        height = part["best_lr"] * 2.0**offset
        axes.plot(
            part["epoch_budget"], height, color=style["color"], linestyle=style["linestyle"], linewidth=1.8, gid=name
        )
        for inside in (True, False):
            some = (part["lr_is_interior"] == inside).to_numpy()
            axes.plot(part["epoch_budget"][some], height[some], linestyle="", marker=style["marker"], markersize=8,
                      markerfacecolor=style["color"] if inside else "white", markeredgecolor=style["color"],
                      markeredgewidth=1.6, zorder=3)  # fmt: skip
        label_point(axes, name, part["epoch_budget"].iloc[-1], height.iloc[-1], style["color"])
    if not cells["lr_is_interior"].all():
        axes.plot([], [], linestyle="", marker="o", markerfacecolor="white", markeredgecolor=_INK, markeredgewidth=1.6,
                  label="best at the edge of its grid")  # fmt: skip
    epochs = sorted(cells["epoch_budget"].unique())
    for axis, values in ((axes.xaxis, epochs), (axes.yaxis, tried)):
        getattr(axes, f"set_{axis.axis_name}scale")("log", base=2)
        axis.set_major_locator(ticker.FixedLocator(values))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.set_minor_locator(ticker.NullLocator())
    if len(cells):
        axes.set_xlim(epochs[0] / 1.25, epochs[-1] * max((epochs[-1] / epochs[0]) ** 0.2, 1.4))
        axes.set_ylim(tried[0] / 1.6, tried[-1] * 1.3)
    axes.grid(False)
    axes.set(xlabel="epoch budget (passes over the data)", ylabel="best peak learning rate")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return figure


def _draw_finetuned(axes: Axes, table: "pd.DataFrame") -> None:
    _require(table, ("variant", "pretrain_compute", "top1_error_percent", "repeated_augmentation"), "finetuned")
    log_axis(axes.xaxis, table["pretrain_compute"], room=(0.06, 0.24))
    log_axis(axes.yaxis, table["top1_error_percent"], room=(0.08, 0.08))
    for name in variant_order(table["variant"]):
        part, style = table[table["variant"] == name], variant_style(name)
        for repeated in (False, True):
            some = part[part["repeated_augmentation"] == repeated].sort_values("pretrain_compute")
            axes.plot(
                some["pretrain_compute"],
                some["top1_error_percent"],
                **style,
                markersize=8,
                linewidth=1.4,
                gid=name,
                markerfacecolor=style["color"] if repeated else "white",
                markeredgewidth=1.6,
                alpha=1.0 if repeated else 0.75,
            )
        last = part.sort_values(["pretrain_compute", "top1_error_percent"], ascending=[True, False]).iloc[-1]
        label_point(axes, name, last["pretrain_compute"], last["top1_error_percent"], style["color"])
    _fill_legend(axes, table["repeated_augmentation"])
    axes.set(xlabel="pre-training compute (FLOPs)", ylabel="top-1 error after fine-tuning (%)")


def _fill_legend(axes: Axes, repeated) -> None:
    for value, fill, text in ((False, "white", "one view of each image"), (True, _INK, "repeated augmentation")):
        if (np.asarray(repeated, dtype=bool) == value).any():
            axes.plot([], [], linestyle="", marker="o", markersize=8, markerfacecolor=fill, markeredgecolor=_INK,
                      markeredgewidth=1.6, label=text)  # fmt: skip
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def _draw_published(axes: Axes, points: "pd.DataFrame") -> None:
    _require(points, ("model", "family", "tpu_v4_core_hours", "top1_error_percent", "repeated_augmentation"), "points")
    log_axis(axes.xaxis, points["tpu_v4_core_hours"], room=(0.45, 0.35))
    log_axis(axes.yaxis, points["top1_error_percent"], room=(0.35, 0.15))
    for point in points.itertuples():
        ours = point.family == "NFNet"
        color, marker = (
            (variant_style(point.model)["color"], variant_style(point.model)["marker"]) if ours else (_INK, "s")
        )
        axes.plot(point.tpu_v4_core_hours, point.top1_error_percent, linestyle="", marker=marker, markersize=10,
                  markerfacecolor=color if point.repeated_augmentation else "white", markeredgecolor=color,
                  markeredgewidth=1.8, gid=point.model, zorder=3)  # fmt: skip
        # ConvNets to the left, transformers to the right: the points that matter most lie close together
        label_point(axes, f"{point.family}-{point.model}", point.tpu_v4_core_hours, point.top1_error_percent, color,
               offset=(-11, 0) if ours else (11, 0))  # fmt: skip
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda hours, _: f"{hours / 1e3:g}k"))
    _fill_legend(axes, points["repeated_augmentation"])
    axes.set(xlabel="pre-training compute (TPU-v4 core-hours)", ylabel="ImageNet top-1 error after fine-tuning (%)")


@figure_function
def figure1(finetuned: "pd.DataFrame", note: str | None = LAPTOP) -> Figure:
    """Top-1 error after fine-tuning against pre-training compute (`scaling.finetune_table`); filled: repeated views."""
    figure, axes = new_figure(note=note)
    _draw_finetuned(axes, finetuned)
    _hours_axis(axes)
    return figure


@figure_function
def figure1_published(points: "pd.DataFrame", note: str | None = None) -> Figure:
    """The printed points of the paper's Figure 1 (`paper.figure1_points`) on its log-log axes."""
    figure, axes = new_figure(note=note)
    _draw_published(axes, points)
    return figure


@figure_function
def figure1_side_by_side(ours: "pd.DataFrame", published: "pd.DataFrame", note: str | None = LAPTOP) -> Figure:
    """Our fine-tuned networks and the paper's printed points, each on its own axes: the data sets are not the same."""
    figure, (left, right) = new_figure(columns=2, size=(13, 5.5))
    _draw_finetuned(left, ours)
    _draw_published(right, published)
    left.set_title(f"ours ({note})" if note else "ours", loc="left")
    right.set_title("published (arXiv 2310.16764 and its references)", loc="left")
    return figure


@figure_function
def families(cells: "pd.DataFrame", compute: str = "train_flops", note: str | None = LAPTOP) -> Figure:
    """Top-1 error against training compute (`families.family_cells`): colour and line tell the family, marker the variant.

    The thick line of a family is its compute-optimal frontier.
    """
    import seaborn as sns

    _require(cells, ("family", "variant", compute, "top1_error_percent", "standard_error", "on_frontier"), "cells")
    figure, axes = new_figure(note=note)
    log_axis(axes.xaxis, cells[compute], room=(0.06, 0.2))
    log_axis(axes.yaxis, cells["top1_error_percent"], room=(0.08, 0.08))
    colors = dict(zip(("NFNet", "ViT"), sns.color_palette("colorblind"), strict=False))
    lines = {"NFNet": "-", "ViT": (0, (5, 1.5))}
    for family, rows in cells.groupby("family"):
        color = colors.get(family, _INK)
        best = rows[rows["on_frontier"]].sort_values(compute)
        axes.plot(best[compute], best["top1_error_percent"], color=color, linewidth=8, alpha=0.22, zorder=1,
                  solid_capstyle="round", label=f"{family}s: compute-optimal")  # fmt: skip
        for name in variant_order(rows["variant"]):
            part = rows[rows["variant"] == name].sort_values(compute)
            axes.errorbar(part[compute], part["top1_error_percent"], part["standard_error"], color=color, gid=name,
                          marker=variant_style(name)["marker"], linestyle=lines.get(family, ":"), markersize=7,
                          linewidth=1.4, elinewidth=1, markeredgecolor="white", zorder=3)  # fmt: skip
            label_point(axes, name, part[compute].iloc[-1], part["top1_error_percent"].iloc[-1], color)
    axes.set(xlabel=_AXIS.get(compute, compute), ylabel="held-out top-1 error (%)")
    axes.legend(loc="lower left")
    if compute == "train_flops":
        _hours_axis(axes)
    return figure


@figure_function
def learning_curves(metrics_by_run: Mapping[str, "pd.DataFrame"], note: str | None = LAPTOP) -> Figure:
    """Training loss and learning rate against the step, for {name of run: `records.read_metrics`}.

    Held-out evaluations between the steps, where a run made any, are rings on its curve.
    """
    import seaborn as sns

    figure, (upper, lower) = new_figure(rows=2, size=(8, 6), sharex=True, height_ratios=[3, 1], note=note)
    many = len(metrics_by_run) > len(LINES)
    colors = sns.color_palette("viridis" if many else "colorblind", max(len(metrics_by_run), 1))
    for index, (name, metrics) in enumerate(metrics_by_run.items()):
        _require(metrics, ("step",), f"metrics of run {name!r}")
        style = {"color": colors[index], "linestyle": "-" if many else LINES[index], "gid": name, "linewidth": 1.6}
        for axes, column in ((upper, "loss"), (lower, "lr")):
            if column in metrics:
                shown = metrics.dropna(subset=[column])
                axes.plot(shown["step"], shown[column], **style, marker="o" if len(shown) == 1 else "", label=name)
        for column, what in (("heldout_loss", "held out"), ("selection_loss", "for selection")):
            if column in metrics:
                shown = metrics.dropna(subset=[column])
                upper.plot(shown["step"], shown[column], "o", color=colors[index], mfc="white", label=f"{name}, {what}")
    upper.set(ylabel="loss (nats per image)")
    lower.set(xlabel="step", ylabel="learning rate")
    if upper.lines:
        upper.legend(
            ncols=2 if many else 1, fontsize=9, **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if many else {})
        )
    return figure


@figure_function
def signal_propagation(table: "pd.DataFrame", note: str | None = None) -> Figure:
    """Signal propagation at initialisation (Brock et al., arXiv 2101.08692): three statistics of each block's output.

    Args:
        table: one row a block, in depth order: block, stage, mean_squared (average over channels of the squared channel
            mean), variance (average channel variance), branch_variance (variance at the end of the residual branch).
    """
    panels = (("mean_squared", "average channel\nsquared mean"), ("variance", "average channel\nvariance"),
              ("branch_variance", "residual branch\nvariance"))  # fmt: skip
    _require(table, ("block", "stage", *(column for column, _ in panels)), "table")
    style = variant_style("F0")
    figure, all_axes = new_figure(rows=3, size=(8, 7), sharex=True, note=note)
    stages = table.groupby("stage", sort=False)["block"].agg(["min", "max"])
    for axes, (column, text) in zip(all_axes, panels, strict=True):
        axes.plot(
            table["block"], table[column], color=style["color"], marker="o", markersize=4.5, linewidth=1.6, gid=column
        )
        for start in stages["min"].iloc[1:]:
            axes.axvline(start - 0.5, color="0.6", linewidth=1, linestyle=(0, (3, 3)))
        axes.set_ylabel(text)
        axes.set_ylim(0, 1.12 * max(np.nanmax(table[column]), 1e-6))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    for stage, (first, last) in stages.iterrows():
        all_axes[0].annotate(
            f"stage {stage}",
            ((first + last) / 2, 1.02),
            xycoords=("data", "axes fraction"),
            fontsize=9.5,
            ha="center",
            color="0.35",
        )
    all_axes[-1].set_xlabel("residual block, in order of depth")
    figure.align_ylabels()
    return figure


@figure_function
def architectures(names: Sequence[str], note: str | None = None) -> Figure:
    """Depth and width of variants: a row each, a bar for each block, as high as it has channels; shades tell stages."""
    from nfnet_lib.variants import ViTVariant, get_variant

    figure, rows = new_figure(rows=len(names), size=(8, 0.9 * len(names) + 0.6), sharex=True, squeeze=False, note=note)
    for (axes,), name in zip(rows, names, strict=True):
        variant, color = get_variant(name), variant_style(name)["color"]
        stages = [(variant.width, variant.depth)]
        if not isinstance(variant, ViTVariant):
            stages = list(zip(variant.width, variant.depth, strict=True))
        start = 0
        for stage, (width, depth) in enumerate(stages):
            axes.bar(np.arange(start, start + depth) + 0.5, width, width=0.86, color=color, gid=f"{name} {stage}",
                     alpha=0.35 + 0.65 * (stage + 1) / len(stages))  # fmt: skip
            start += depth
        widths = ", ".join(f"{width:,}" for width, _ in stages)
        axes.annotate(f"{start} blocks of {widths}", (start + 1, 0), fontsize=9, va="bottom", color="0.35")
        axes.set_ylabel(name, rotation=0, ha="right", va="center", color=color, fontweight="bold")
        axes.set_yticks([])
        axes.grid(False)
        axes.spines["left"].set_visible(False)
    rows[-1, 0].set_xlabel("block, in order of depth (height: channels)")
    return figure


@figure_function
def parameters_and_macs(table: "pd.DataFrame", note: str | None = None) -> Figure:
    """Multiply-accumulates against parameters, a point a variant, a line a family (`flops.size_table`)."""
    _require(table, ("variant", "family", "params_millions", "gmacs"), "table")
    figure, axes = new_figure(note=note)
    log_axis(axes.xaxis, table["params_millions"], room=(0.06, 0.1))
    log_axis(axes.yaxis, table["gmacs"], room=(0.06, 0.06))
    plus = table["variant"].str.contains("+", regex=False)
    groups = {
        "NFNet F": table[(table["family"] == "NFNet") & ~plus], "NFNet F+": table[(table["family"] == "NFNet") & plus],
        "ViT": table[table["family"] == "ViT"],
    }  # fmt: skip
    for (label, part), look in zip(groups.items(), ("F0", "F3+", "F7"), strict=True):
        style = variant_style(look)
        axes.plot(part["params_millions"], part["gmacs"], **style, markersize=7, linewidth=1.2, label=label, gid=label)
        for row in part.itertuples():  # the two lines of NFNets nearly coincide: names on either side, of three sizes
            if label == "ViT" or row.variant.rstrip("+") in ("F0", "F3", "F7"):
                offset = (9, -9) if label == "NFNet F" else (-9, 9)
                label_point(axes, row.variant, row.params_millions, row.gmacs, style["color"], offset=offset)
    axes.set(xlabel="parameters (millions, 1,000 classes)", ylabel="GMACs of one image, forward")
    axes.legend(loc="lower right")
    return figure


def contact_sheet(images: np.ndarray, note: str | None = None, columns: int = 12) -> Figure:
    """Images uint8 [N, H, W, 3] side by side, `columns` a row, as they are."""
    rows = -(-len(images) // columns)
    height, width = images.shape[1:3]
    sheet = np.full((rows * (height + 2), columns * (width + 2), 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 2), index % columns * (width + 2)
        sheet[top : top + height, left : left + width] = image
    figure, axes = new_figure(size=(9, 9 * sheet.shape[0] / sheet.shape[1] + 0.3), note=note)
    axes.imshow(sheet, interpolation="nearest")
    axes.set_axis_off()
    return figure
