"""Figures of fine-tuning and evaluation: ways of fine-tuning side by side, test resolutions, and which cell is best."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from nfnet_lib.comparison import PLAIN, arm_table
from nfnet_lib.plot_style import LINES, figure_function, log_axis, new_figure
from nfnet_lib.plots import LAPTOP
from nfnet_lib.scaling import variant_order

if TYPE_CHECKING:
    import pandas as pd

_MARKERS = ("o", "s", "^", "D", "X", "v")


@figure_function
def arms(runs: "pd.DataFrame", note: str | None = LAPTOP) -> Figure:
    """Top-1 error of each way of fine-tuning (`comparison.run_arms`): rings are seeds, bars the mean and its 95% interval."""
    from scipy.stats import t

    table = arm_table(runs)
    figure, axes = new_figure(size=(8, 0.62 * len(table) + 1.4), note=note)
    axes.set_title(f"{runs['variant'].iloc[0]} fine-tuned on {runs['dataset'].iloc[0]}", loc="left", fontsize=11)
    rows = np.arange(len(table))[::-1]
    plain = table.loc[table["arm"] == PLAIN, "mean"].iloc[0]
    axes.axvline(plain, color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    for row, arm in zip(rows, table.itertuples(), strict=True):
        errors = runs.loc[runs["arm"] == arm.arm, "top1_error_percent"]
        axes.plot(errors, np.full(len(errors), row - 0.16), "o", mfc="white", mec="0.45", markersize=7, gid=arm.arm)
        half = t.ppf(0.975, arm.seeds - 1) * arm.standard_error if arm.seeds > 1 else 0
        axes.errorbar(arm.mean, row + 0.08, xerr=half, fmt="o", color="C0" if arm.arm != PLAIN else "0.2", markersize=8,
                      capsize=4, elinewidth=1.6)  # fmt: skip
        axes.annotate(f"{arm.mean:.2f}%", (arm.mean, row + 0.08), xytext=(0, 8), textcoords="offset points", ha="center",
                      fontsize=9.5)  # fmt: skip
    axes.set_yticks(rows, table["arm"])
    axes.set_ylim(-0.6, len(table) - 0.3)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    axes.grid(axis="y", visible=False)
    epochs = runs.groupby("arm")["epoch_budget"].first()
    steps = "" if epochs.nunique() == 1 else f"; {epochs.max():.3g} epochs, with SAM {epochs.min():.3g}"
    axes.set(xlabel=f"held-out top-1 error (%), equal compute{steps}")
    return figure


@figure_function
def resolution_sweep(table: "pd.DataFrame", trained_at: int | None = None, note: str | None = LAPTOP) -> Figure:
    """Top-1 error against test resolution (`evaluate.evaluate_weights`), a line a data set; bands are 1.96 standard errors."""
    figure, axes = new_figure(note=note)
    for index, (name, rows) in enumerate(table.groupby("dataset", sort=False)):
        rows = rows.sort_values("resolution")
        error = 100 * (1 - rows["top1"])
        half = 196 * np.sqrt(rows["top1"] * (1 - rows["top1"]) / rows["examples"])
        color = f"C{index}"
        axes.fill_between(rows["resolution"], error - half, error + half, color=color, alpha=0.15, linewidth=0)
        axes.plot(rows["resolution"], error, marker=_MARKERS[index % len(_MARKERS)], linestyle=LINES[index % len(LINES)],
                  color=color, label=name, gid=name)  # fmt: skip
    if trained_at is not None:
        axes.axvline(trained_at, color="0.5", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("trained at", (trained_at, 1), xycoords=("data", "axes fraction"), xytext=(4, -4),
                      textcoords="offset points", va="top", fontsize=9.5, color="0.4")  # fmt: skip
    axes.set_xticks(sorted(table["resolution"].unique()))
    axes.set(xlabel="test resolution (pixels)", ylabel="top-1 error (%)")
    axes.legend(loc="best")
    return figure


@figure_function
def best_by_budget(table: "pd.DataFrame", cells: "pd.DataFrame", note: str | None = LAPTOP) -> Figure:
    """Size and epochs of the best cell at each compute budget, by held-out loss and by fine-tuned error (ranking.py)."""
    figure, (upper, lower) = new_figure(rows=2, size=(8, 6.4), sharex=True, note=note)
    names = variant_order(cells["variant"])
    for axes, column in ((upper, "params"), (lower, "epochs")):
        for by, marker, size, color, fill in (("loss", "s", 11, "0.3", "white"), ("error", "o", 6, "C3", "C3")):
            axes.plot(table["budget"], table[f"{by}_{column}"], marker=marker, markersize=size, color=color, mfc=fill,
                      linestyle="-" if by == "error" else (0, (4, 2)), linewidth=1.4, gid=f"{by} {column}",
                      label="fine-tuned error" if by == "error" else "held-out loss")  # fmt: skip
    log_axis(upper.xaxis, cells["pretrain_compute"])
    sizes = cells.groupby("variant")["num_params"].first()
    upper.set_yscale("log")
    upper.set_yticks([sizes[name] for name in names], names)
    lower.set_yscale("log", base=2)
    lower.set_yticks(sorted(cells["epoch_budget"].unique()))
    for axes in (upper, lower):
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    lower.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    upper.set(ylabel="variant of the best cell")
    lower.set(ylabel="its epochs", xlabel="pre-training compute budget (FLOPs)")
    upper.legend(title="best by", loc="upper left")
    return figure
