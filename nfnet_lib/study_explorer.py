"""The explorer of a study: choose variants, epochs and learning rates, drag a budget, compare two runs (08_explore)."""

import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nfnet_lib.optimum import FrontierLines
from nfnet_lib.plot_style import figure_function, label_point, log_axis, new_figure, variant_style
from nfnet_lib.power_law import frontier
from nfnet_lib.records import counted, read_metrics
from nfnet_lib.scaling import best_per_cell, finetune_table, variant_order

if TYPE_CHECKING:
    import pandas as pd

BEST = "the best of each cell"
VIEWS = ("Loss and compute", "Best learning rates", "Fine-tuning", "Two runs")
_SIZE, _DPI = (8, 4.6), 80
_SHOWN_OF_RUN = (
    "run_id",
    "kind",
    "variant",
    "epoch_budget",
    "peak_lr",
    "heldout_loss",
    "heldout_top1",
    "train_flops",
    "seconds",
)


class Explorer:
    """Widgets over a study's records (`report.open_study`); `widget` is what a notebook shows.

    records: one row a run. study_dir: where their metrics are, if they are anywhere. ValueError for no pre-training run.
    """

    def __init__(self, records: "pd.DataFrame", study_dir: Path | None = None):
        import ipywidgets as widgets

        runs = records[records["kind"] == "pretrain"]
        if runs.empty:
            raise ValueError(f"records: none of {len(records)} runs is of pre-training")
        self._records, self._runs, self._dir = records, runs, study_dir
        self._tuned = finetune_table(records)
        self._by_rate = {BEST: best_per_cell(runs)}  # cells with the best rate, or with one rate alone
        self._lines: tuple = (None, None)
        variants, budgets = variant_order(runs["variant"]), sorted(runs["epoch_budget"].unique())
        low, high = runs["train_flops"].min(), runs["train_flops"].max()
        options = [(f"{budget:g}", budget) for budget in budgets]
        rates = [BEST, *(f"{lr:g}" for lr in sorted(runs["peak_lr"].unique()))]
        names = [
            f"{row.variant}, {counted(row.epoch_budget, 'epoch')}, peak_lr {row.peak_lr:g} ({row.run_id})"
            for row in records.itertuples()
        ]
        labelled = list(zip(names, records["run_id"], strict=True))
        wide = widgets.Layout(width="98%")
        self.view = widgets.ToggleButtons(options=VIEWS, style={"button_width": "auto"})
        self.variants = widgets.SelectMultiple(
            options=variants, value=variants, rows=min(8, len(variants)), description="variants"
        )
        self.epochs = widgets.SelectionRangeSlider(
            options=options, index=(0, len(options) - 1), description="epochs", continuous_update=False
        )
        self.lr = widgets.Dropdown(options=rates, description="peak_lr")
        self.budget = widgets.FloatLogSlider(
            value=float(high), base=10, min=float(np.log10(low)), max=float(np.log10(high)) + 1, step=0.02,
            description="budget", readout_format=".2e", continuous_update=False,
        )  # fmt: skip
        best = runs.sort_values("heldout_loss")["run_id"].tolist()
        self.first = widgets.Dropdown(options=labelled, value=best[0], description="one run", layout=wide)
        self.second = widgets.Dropdown(
            options=labelled, value=best[min(1, len(best) - 1)], description="another", layout=wide
        )
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        self.text = widgets.HTML()
        side_by_side = widgets.Layout(flex_flow="row wrap")  # below each other on a phone
        chosen = widgets.HBox([self.variants, widgets.VBox([self.epochs, self.lr, self.budget])], layout=side_by_side)
        self._pair = widgets.VBox([self.first, self.second])
        self.widget = widgets.VBox([self.view, chosen, self._pair, self.picture, self.text])
        for control in (self.view, self.variants, self.epochs, self.lr, self.budget, self.first, self.second):
            control.observe(self.show, "value")
        self.show()

    def show(self, *_) -> None:
        """Draw what the controls ask for; what can't be drawn is said instead."""
        self._pair.layout.display = "" if self.view.value == VIEWS[3] else "none"
        try:
            figure, text = self._views()[self.view.value]()
            self.picture.value, self.picture.layout.display = _png(figure), ""
            self.text.value = text
        except ValueError as error:
            self.picture.layout.display = "none"
            self.text.value = f"<p>{html.escape(str(error))}</p>"

    def _views(self) -> dict[str, Callable[[], tuple[Figure, str]]]:
        return dict(zip(VIEWS, (self._loss, self._rates, self._tuning, self._two), strict=True))

    def cells(self) -> "pd.DataFrame":
        """The cells that the controls choose."""
        low, high = self.epochs.value
        rate = self.lr.value
        if rate not in self._by_rate:
            self._by_rate[rate] = best_per_cell(self._runs[np.isclose(self._runs["peak_lr"], float(rate))])
        cells = self._by_rate[rate]
        cells = cells[cells["variant"].isin(self.variants.value) & cells["epoch_budget"].between(low, high)]
        if cells.empty:
            raise ValueError("no run of these variants, epochs and learning rates")
        return cells

    def _loss(self) -> tuple[Figure, str]:
        cells, compute = self.cells(), self.budget.value
        chosen = (self.lr.value, tuple(self.variants.value), self.epochs.value)
        try:
            if self._lines[0] != chosen:  # a budget that is dragged changes nothing of the fit
                self._lines = chosen, FrontierLines(cells)
            lines = self._lines[1]
        except ValueError as error:
            return loss_figure(cells, None, compute), f"<p>No prediction: {html.escape(str(error))}.</p>"
        return loss_figure(cells, lines, compute), f"<p>{html.escape(lines.at(compute).sentence())}</p>"

    def _rates(self) -> tuple[Figure, str]:
        cells = self.cells()
        edge = cells[~cells["lr_is_interior"]]
        text = f"{len(cells)} cells; in {len(edge)} of them the best rate is at the edge of those tried"
        return rate_figure(cells), f"<p>{text} (marked with a star).</p>"

    def _tuning(self) -> tuple[Figure, str]:
        low, high = self.epochs.value
        table = self._tuned
        table = table[table["variant"].isin(self.variants.value) & table["epoch_budget"].between(low, high)]
        if table.empty:
            raise ValueError("no fine-tuned run of these variants and epochs")
        best = table.loc[table["top1_error_percent"].idxmin()]
        text = f"Best: {best['variant']} after {counted(best['epoch_budget'], 'epoch')},"
        text += f" {best['top1_error_percent']:.2f} % top-1 error"
        return tuned_figure(table), f"<p>{html.escape(text)}, augmult {best['augmult']}.</p>"

    def _two(self) -> tuple[Figure, str]:
        both = self._records.set_index("run_id").loc[[self.first.value, self.second.value]]
        names = [f"{letter}: {row.variant}, {counted(row.epoch_budget, 'epoch')}, peak_lr {row.peak_lr:g}"
                 for letter, row in zip("AB", both.itertuples(), strict=True)]  # fmt: skip
        table = both.reset_index().T
        differs = table.iloc[:, 0].astype(str) != table.iloc[:, 1].astype(str)
        table = table[differs | table.index.isin(_SHOWN_OF_RUN)]
        table = table[~table.index.str.match(r"(config_hash|path|started_at|finished_at|cell_id)")]
        table.columns = ["A", "B"]
        curves = [self._metrics(path) for path in both["path"]]
        shown = table.to_html(float_format="{:.5g}".format, na_rep="")
        if any(curve is None for curve in curves):
            return two_bars(both, names), "<p>Their curves are not on this machine.</p>" + shown
        return two_curves(dict(zip(names, curves, strict=True))), shown

    def _metrics(self, path: str) -> "pd.DataFrame | None":
        folder = None if self._dir is None else self._dir / path
        return read_metrics(folder) if folder is not None and (folder / "metrics.jsonl").exists() else None


def explorer(study_dir: str = "") -> "Explorer":
    """The explorer of a study: a folder, relative to the checkout; "" as in `report.open_study`."""
    from nfnet_lib import PROJECT
    from nfnet_lib.report import open_study

    records, _ = open_study(study_dir)
    return Explorer(records, PROJECT / (study_dir or "outputs/laptop"))


def _png(figure: Figure) -> bytes:
    figure.set_layout_engine("none")  # figure_function has laid it out
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _figure() -> tuple:
    figure, axes = new_figure(size=_SIZE)
    figure.set_dpi(_DPI)
    return figure, axes


@figure_function
def loss_figure(cells: "pd.DataFrame", lines: FrontierLines | None, compute: float | None) -> Figure:
    """Held-out loss against compute, a curve a variant; the frontier's line with its interval, and a budget on it."""
    figure, axes = _figure()
    log_axis(axes.xaxis, [*cells["train_flops"], *([compute] if compute else [])], room=(0.05, 0.12))
    predicted = lines.losses(np.array([compute]))[0] if lines is not None and compute else np.empty(0)
    log_axis(axes.yaxis, [*cells["heldout_loss"], *predicted], room=(0.3, 0.06))
    for name in variant_order(cells["variant"]):
        part = cells[cells["variant"] == name].sort_values("train_flops")
        style = variant_style(name)
        axes.plot(part["train_flops"], part["heldout_loss"], **style, markersize=5, linewidth=1.5)
        label_point(axes, name, part["train_flops"].iloc[-1], part["heldout_loss"].iloc[-1], style["color"])
    kept = cells[frontier(cells["train_flops"].to_numpy(float), cells["heldout_loss"].to_numpy(float))]
    axes.plot(kept["train_flops"], kept["heldout_loss"], "o", markersize=11, markerfacecolor="none", color="0.35")
    if lines is not None:
        where = np.geomspace(lines.range[0], max(lines.range[1], compute or 0), 60)
        best, low, high = lines.losses(where)
        axes.fill_between(where, low, high, color="0.6", alpha=0.3, linewidth=0)
        axes.plot(where, best, color="black", linewidth=1.2, linestyle=(0, (4, 3)))
        if compute:
            axes.plot([compute], predicted, marker="*", markersize=16, color="black")
    if compute:
        axes.axvline(compute, color="0.4", linewidth=1, linestyle=(0, (1, 2)))
    axes.set(xlabel="training compute (FLOPs)", ylabel="held-out loss (nats per image)")
    return figure


@figure_function
def rate_figure(cells: "pd.DataFrame") -> Figure:
    """The best learning rate of each cell as a map of variants and epochs; a star where it is at the edge of those tried."""
    figure, axes = _figure()
    names, budgets = variant_order(cells["variant"]), sorted(cells["epoch_budget"].unique())
    grid = cells.pivot_table(index="variant", columns="epoch_budget", values="best_lr").reindex(
        index=names, columns=budgets
    )
    picture = axes.imshow(np.log2(grid.to_numpy(float)), aspect="auto", cmap="cividis")
    edge = set(cells.loc[~cells["lr_is_interior"], ["variant", "epoch_budget"]].itertuples(index=False, name=None))
    middle = np.nanmean(picture.get_clim())
    if grid.size <= 80:
        for (row, column), value in np.ndenumerate(grid.to_numpy(float)):
            if np.isfinite(value):
                star = "*" if (names[row], budgets[column]) in edge else ""
                color = "white" if np.log2(value) < middle else "black"
                axes.text(column, row, f"{value:g}{star}", ha="center", va="center", color=color, fontsize=10)
    step = max(1, len(budgets) // 12)
    axes.set_xticks(range(0, len(budgets), step), [f"{b:g}" for b in budgets[::step]])
    axes.set_yticks(range(len(names)), names)
    axes.grid(False)
    axes.set(xlabel="epochs")
    figure.colorbar(picture, ax=axes, label="log2 of the best peak_lr")
    return figure


@figure_function
def tuned_figure(table: "pd.DataFrame") -> Figure:
    """Fine-tuned top-1 error against pre-training compute; filled: with repeated augmentation, as in Figure 1."""
    figure, axes = _figure()
    log_axis(axes.xaxis, table["pretrain_compute"], room=(0.06, 0.14))
    log_axis(axes.yaxis, table["top1_error_percent"], room=(0.08, 0.08))
    for name in variant_order(table["variant"]):
        style = variant_style(name)
        part = table[table["variant"] == name].sort_values("pretrain_compute")
        for repeated, own in part.groupby("repeated_augmentation"):
            face = style["color"] if repeated else "white"
            look = {"marker": style["marker"], "markersize": 9, "color": style["color"], "markerfacecolor": face}
            axes.plot(own["pretrain_compute"], own["top1_error_percent"], linestyle="none", **look)
        last = part.iloc[-1]
        label_point(axes, name, last["pretrain_compute"], last["top1_error_percent"], style["color"])
    axes.set(xlabel="pre-training compute (FLOPs)", ylabel="fine-tuned top-1 error (%)")
    return figure


@figure_function
def two_curves(metrics: "dict[str, pd.DataFrame]") -> Figure:
    """Training loss of two runs by epochs of compute."""
    figure, axes = _figure()
    for (name, table), style in zip(metrics.items(), ("-", (0, (4, 2))), strict=True):
        axes.plot(table["epoch"], table["loss"], linestyle=style, linewidth=1.6, label=name)
    axes.set(xlabel="epochs", ylabel="training loss (nats per image)")
    axes.legend()
    return figure


@figure_function
def two_bars(both: "pd.DataFrame", names: list[str]) -> Figure:
    """Held-out loss of two runs, where there are no curves to lay over each other."""
    figure, axes = _figure()
    axes.barh([1, 0], both["heldout_loss"], color=["0.3", "0.65"], height=0.6)
    axes.set_yticks([1, 0], names)
    axes.set(xlabel="held-out loss (nats per image)")
    return figure
