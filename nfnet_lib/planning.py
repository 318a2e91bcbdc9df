"""What a budget buys: planned runs with the loss that a fitted law predicts, and the compute-optimal one among them."""

import html
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from nfnet_lib.calibration import plan_table, rounded
from nfnet_lib.flops import num_params
from nfnet_lib.plot_style import figure_function, label_point, log_axis, new_figure, variant_style
from nfnet_lib.records import counted
from nfnet_lib.scaling import FrontierResult
from nfnet_lib.variants import get_variant

if TYPE_CHECKING:
    import pandas as pd

TOPOLOGIES = (
    "v4:2x2x1", "v4:2x2x2", "v4:2x2x4", "v4:2x4x4", "v4:4x4x4", "v4:4x4x8", "v4:4x8x8", "v3:4x4", "v5e:4x4", "v5p:4x4x4",
    "v6e:4x4",
)  # fmt: skip
FARTHEST = 1.0  # decades of compute over which a law's prediction is shown


def with_losses(plans: "pd.DataFrame", result: FrontierResult) -> "pd.DataFrame":
    """`calibration.plan_table` with predicted_loss by a study's power law, and the decades from its fitted range to each run.

    NaN for runs more than FARTHEST decades away; a law says nothing of other data than it was fitted on, either. result: of
    `scaling.frontier_analysis` in training FLOPs.
    """
    low, high = result.law.compute_range
    away = np.log10(np.maximum(low / plans["train_flops"], plans["train_flops"] / high).clip(lower=1))
    losses = np.where(away > FARTHEST, np.nan, result.law.predict(plans["train_flops"]))
    return plans.assign(predicted_loss=losses, decades_away=away)


def compute_optimal(result: FrontierResult, train_flops: float | int) -> tuple[float, float]:
    """(parameters, images seen) of the compute-optimal run of these FLOPs, by log-log lines through a study's frontier.

    ValueError where the frontier has fewer than 2 cells.
    """
    points = result.points
    if len(points) < 2:
        raise ValueError(f"result: its frontier has {len(points)} cell; a line needs 2")
    log_compute = np.log(points["train_flops"])
    fits = (np.polyfit(log_compute, np.log(points[name]), 1) for name in ("num_params", "images_seen"))
    params, images = (float(np.exp(np.polyval(fit, np.log(train_flops)))) for fit in fits)
    return params, images


def best_within(
    plans: "pd.DataFrame", core_hours: float | int, result: FrontierResult | None = None
) -> "pd.Series | None":
    """The planned run to choose for a budget: among those that fit the slice and the budget, of the largest compute.

    With a study's frontier, among those of at least half of that compute the one whose size is nearest (in log) to what the
    frontier's lines say. None where nothing fits. Without a compiled figure the floor's core-hours count.
    """
    hours = plans["core_hours"].fillna(plans["floor_core_hours"])
    able = plans[plans["fits"] & (hours <= core_hours)]
    if able.empty:
        return None
    largest = able["train_flops"].max()
    if result is None:
        return able.loc[able["train_flops"].idxmax()]
    near = able[able["train_flops"] >= largest / 2].sort_values("train_flops", ascending=False)  # of two of a size the dearer
    sizes = near["variant"].map(lambda name: num_params(get_variant(name), 1000))
    return near.loc[np.log(sizes / compute_optimal(result, largest)[0]).abs().idxmin()]


def choice_sentence(plans: "pd.DataFrame", core_hours: float | int, result: FrontierResult | None = None) -> str:
    """`best_within` in words, with how far it lies from what the law was fitted on."""
    best = best_within(plans, core_hours, result)
    if best is None:
        return f"No planned run fits {core_hours:,g} core-hours and the slice."
    hours = best["floor_core_hours"] if np.isnan(best["core_hours"]) else best["core_hours"]
    text = f"{core_hours:,g} core-hours buy {best['variant']} for {counted(best['epoch_budget'], 'epoch')}: {rounded(hours)}"
    text += " core-hours" + (" at the floor, which no run reaches" if np.isnan(best["core_hours"]) else ", calibrated")
    if result is None:
        return text + "."
    row = with_losses(best.to_frame().T.infer_objects(), result).iloc[0]
    away = f"{row['decades_away']:.1f} decades of compute away from the runs that the law was fitted on"
    if np.isnan(row["predicted_loss"]):
        return f"{text}; no loss is predicted, {away}."
    return f"{text}; the law predicts {row['predicted_loss']:.3g} nats" + (
        f", {away}." if row["decades_away"] > 0 else "."
    )


@figure_function
def costs(plans: "pd.DataFrame", core_hours: float | int | None = None, note: str | None = None) -> Figure:
    """Core-hours of each planned run by epochs, a line a variant: calibrated, with its range, else the floor (dashed).

    note: below the figure; by default what lines and shades mean.
    """
    if note is None:
        note = "lines: calibrated, shaded its range"
        note += "; dashed: the floor, nothing like it was compiled" if plans["core_hours"].isna().any() else ""
    figure, axes = new_figure(note=note)
    for name, rows in plans.groupby("variant", sort=False):
        style = variant_style(name)
        known = rows["core_hours"].notna().all()
        hours = rows["core_hours"] if known else rows["floor_core_hours"]
        axes.plot(rows["epoch_budget"], hours, marker="o", color=style["color"], gid=name,
                  linestyle="-" if known else (0, (4, 2)))  # fmt: skip
        if known:
            axes.fill_between(
                rows["epoch_budget"], rows["low"], rows["high"], color=style["color"], alpha=0.13, linewidth=0
            )
        label_point(axes, name, rows["epoch_budget"].iloc[-1], hours.iloc[-1], style["color"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(plans["epoch_budget"].unique()), [f"{b:g}" for b in sorted(plans["epoch_budget"].unique())])
    log_axis(axes.yaxis, plans[["floor_core_hours", "high"]].stack())
    if core_hours is not None:
        axes.axhline(core_hours, color="0.4", linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate("budget", (0, core_hours), xycoords=("axes fraction", "data"), xytext=(4, 3),
                      textcoords="offset points", fontsize=9.5, color="0.4", annotation_clip=True)  # fmt: skip
    axes.set(xlabel="epochs", ylabel="TPU core-hours of a run")
    return figure


def explorer(result: FrontierResult | None, **start):
    """A widget: choose variants, epochs, slice, batch, price and budget; see cost, fit, predicted loss and the choice.

    start: where its controls begin, by the names of `calibration.plan_table`'s parameters, and core_hours.
    """
    import ipywidgets as widgets

    from nfnet_lib.config import ConfigError
    from nfnet_lib.variants import SMALL, VARIANTS, get_variant

    start = start | {"variants": [get_variant(name).name for name in start["variants"]]}
    full = [name for name in VARIANTS if not name.endswith(SMALL) or name in start["variants"]]
    controls = {
        "variants": widgets.SelectMultiple(options=full, value=start["variants"], rows=8, description="variants"),
        "epochs": widgets.Text(", ".join(f"{e:g}" for e in start["epochs"]), description="epochs"),
        "examples": widgets.FloatText(start["examples"], description="examples"),
        "global_batch": widgets.IntText(start["global_batch"], description="batch"),
        "topology": widgets.Combobox(options=TOPOLOGIES, value=start["topology"], description="slice"),
        "num_classes": widgets.IntText(start["num_classes"], description="classes"),
        "price": widgets.FloatText(start["price"], description="$/chip-hour"),
        "core_hours": widgets.FloatText(start["core_hours"], description="core-hours"),
    }
    shown = widgets.HTML()

    def show(*_) -> None:
        values = {name: control.value for name, control in controls.items()}
        try:
            budget, epochs = values.pop("core_hours"), [float(e) for e in values.pop("epochs").split(",") if e.strip()]
            plans = plan_table(list(values.pop("variants")), epochs, **{**values, "price": values["price"] or None})
            shown.value = f"<p>{choice_sentence(plans, budget, result)}</p>" + readable(plans, result).to_html(
                index=False
            )
        except (ConfigError, ValueError) as error:
            shown.value = f"<p><b>{html.escape(str(error))}</b></p>"

    for control in controls.values():
        control.continuous_update = False
        control.observe(show, "value")
    show()
    columns = [control for name, control in controls.items() if name != "variants"]
    return widgets.VBox([widgets.HBox([controls["variants"], widgets.VBox(columns)]), shown])


def readable(plans: "pd.DataFrame", result: FrontierResult | None = None) -> "pd.DataFrame":
    """The table for people: rounded, with units in the columns' names."""
    table = plans if result is None else with_losses(plans, result)
    names = {
        "variant": "variant", "epoch_budget": "epochs", "steps": "steps", "memory_gib": "GiB a device", "fits": "fits",
        "floor_core_hours": "core-hours, floor", "core_hours": "calibrated", "low": "low", "high": "high", "days": "days",
        "dollars": "$", "predicted_loss": "predicted loss", "decades_away": "decades from the fit",
    }  # fmt: skip
    table = table[[name for name in names if name in table]].rename(columns=names)
    for name in table.select_dtypes("number"):
        table[name] = [float(f"{value:.3g}") if name != "steps" else value for value in table[name]]
    return table
