"""Figures of the laws that `study_laws` fits, and of laws of published curves, which never share axes with ours."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from nfnet_lib.law_fits import LawFit
from nfnet_lib.plot_style import LINES, figure_function, label_point, log_axis, new_figure, variant_style
from nfnet_lib.plots import LAPTOP
from nfnet_lib.scaling import variant_order
from nfnet_lib.study_laws import StudyLaws

if TYPE_CHECKING:
    import pandas as pd


@figure_function
def size_and_data(laws: StudyLaws, beyond: float | int = 4, note: str | None = LAPTOP) -> Figure:
    """Held-out loss against views, a colour a variant: the runs, the law of size and data, and its 90 % interval.

    beyond: how many times past the most views the law is drawn, dashed there: it is a prediction.
    """
    figure, axes = new_figure(note=note)
    cells = laws.cells
    views = cells["images_seen"].to_numpy(float)
    log_axis(axes.xaxis, np.append(views, beyond * views.max()), room=(0.06, 0.16))
    everywhere = laws.surface.predict(size=cells["forward_macs"].max(), data=beyond * views.max())
    log_axis(axes.yaxis, np.append(cells[laws.loss], everywhere), room=(0.14, 0.06))
    for name in variant_order(cells["variant"]):
        part, style = cells[cells["variant"] == name], variant_style(name)
        axes.plot(part["images_seen"], part[laws.loss], linestyle="", marker=style["marker"], color=style["color"],
                  markersize=7, markeredgecolor="white", markeredgewidth=0.6, zorder=3, gid=name)  # fmt: skip
        macs = part["forward_macs"].iloc[0]
        for low, high, line in ((views.min(), views.max(), "-"), (views.max(), beyond * views.max(), (0, (4, 3)))):
            where = np.geomspace(low, high, 60)
            axes.plot(where, laws.surface.predict(size=macs, data=where), color=style["color"], linestyle=line, linewidth=1.5)
        where = np.geomspace(views.min(), beyond * views.max(), 120)
        axes.fill_between(where, *laws.surface.predict_interval(size=macs, data=where), color=style["color"], alpha=0.1,
                          linewidth=0)  # fmt: skip
        label_point(axes, name, where[-1], float(laws.surface.predict(size=macs, data=where[-1])), style["color"])
    strange = cells[cells["outlier"]]
    if len(strange):
        axes.plot(strange["images_seen"], strange[laws.loss], linestyle="", marker="o", markersize=15, color="none",
                  markeredgecolor="black", markeredgewidth=1.2, label="not explained by the law of the others")  # fmt: skip
        axes.legend(loc="lower left")
    axes.set(xlabel="training views", ylabel="held-out loss (nats)")
    return figure


@figure_function
def published_curves(
    curves: "pd.DataFrame", fits: Mapping[str, LawFit], note: str | None = "published data, not ours"
) -> Figure:
    """Error against examples seen (`public_curves.few_shot_curves`) and each curve's own law (`.curve_fits`), dashed beyond it.

    Colour tells the family, marker and line the network; hollow: held out.
    """
    import seaborn as sns

    figure, axes = new_figure(note=note)
    log_axis(axes.xaxis, curves["examples_seen"], room=(0.03, 0.16))
    log_axis(axes.yaxis, curves["top1_error_percent"], room=(0.06, 0.04))
    colors = dict(zip(curves["family"].unique(), sns.color_palette("colorblind"), strict=False))
    for index, (name, rows) in enumerate(curves.groupby("model", sort=False)):
        color, fit = colors[rows["family"].iloc[0]], fits[name]
        for held_out, part in rows.groupby("held_out"):
            axes.plot(part["examples_seen"], part["top1_error_percent"], linestyle="", marker="os^DvP"[index % 6], markersize=4,
                      markerfacecolor="white" if held_out else color, markeredgecolor=color, markeredgewidth=0.8, zorder=3,
                      gid=name)  # fmt: skip
        last = fit.ranges["compute"][1]
        for low, high, line in ((fit.ranges["compute"][0], last, "-"), (last, rows["examples_seen"].max(), LINES[1])):
            where = np.geomspace(low, high, 100)
            axes.plot(where, fit.predict(compute=where), color=color, linestyle=line, linewidth=1.4)
        label_point(axes, name, rows["examples_seen"].iloc[-1], rows["top1_error_percent"].iloc[-1], color)
    for fill, text in (("0.2", "rows fitted"), ("white", "held out")):
        axes.plot([], [], linestyle="", marker="o", markersize=5, markerfacecolor=fill, markeredgecolor="0.2", label=text)
    axes.legend(loc="lower left")
    axes.set(xlabel="JFT examples seen in pre-training", ylabel="ImageNet 10-shot top-1 error (%)")
    return figure
