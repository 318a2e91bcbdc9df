"""Captions of the figures, every number of them from the table that the figure draws."""

from typing import TYPE_CHECKING

import numpy as np

from nfnet_lib.records import counted
from nfnet_lib.scaling import UNITS, FrontierResult, variant_order
from nfnet_lib.study_laws import StudyLaws

if TYPE_CHECKING:
    import pandas as pd


def figure1(finetuned: "pd.DataFrame") -> str:
    """Of `plots.figure1`: the table of `scaling.finetune_table`."""
    if finetuned.empty:
        return "No run has been fine-tuned."
    best = finetuned.loc[finetuned["top1_error_percent"].idxmin()]
    runs, names = counted(len(finetuned), "run"), ", ".join(variant_order(finetuned["variant"]))
    repeated, epochs = int(finetuned["repeated_augmentation"].sum()), counted(best["epoch_budget"], "epoch")
    return (
        f"Top-1 error after fine-tuning against pre-training compute: {runs} of {names}, {repeated}"
        f" of them with repeated augmentation (filled). Lowest: {best['top1_error_percent']:.3g} %, {best['variant']}"
        f" pre-trained for {epochs}, {'with' if best['repeated_augmentation'] else 'without'} it."
    )


def figure2(result: FrontierResult) -> str:
    """Of `plots.figure2`."""
    cells, points, law = result.cells, result.points, result.law
    between = ""
    if result.interval:
        between = f" (90 % interval {result.interval.low:.3f} to {result.interval.high:.3f})"
    left_out = len(points) - law.num_points
    through = f"the {law.num_points} of them that cost most" if left_out else "these"
    variants = counted(cells["variant"].nunique(), "variant")
    return (
        f"Held-out loss against compute: {counted(len(cells), 'cell')} of {variants}, each at its best learning rate, and the"
        f" {len(points)} that no cheaper one beats (grey band). Dashed: power law through {through} over {result.decades:.2f}"
        f" decades of {UNITS.get(result.compute, result.compute)}, exponent {law.exponent:.3f}{between},"
        + (f" R^2 {law.r_squared:.3f} on log-log axes." if law.num_points > 2 else " exact: a line through two points.")
    )


def figure3(cells: "pd.DataFrame") -> str:
    """Of `plots.figure3`: the table of `scaling.best_per_cell`."""
    cells = cells[np.isfinite(cells["best_lr"])]
    if cells.empty:
        return "Every run diverged: there is no best learning rate."
    inside = int(cells["lr_is_interior"].sum())
    shortest, longest = (cells[cells["epoch_budget"] == end(cells["epoch_budget"])] for end in (min, max))
    first, last = (counted(part["epoch_budget"].iloc[0], "epoch") for part in (shortest, longest))
    further = f", {_range(longest['best_lr'])} at {last}" if last != first else ""
    return (
        f"Best learning rate of each cell against epochs: {_range(shortest['best_lr'])} at {first}{further}."
        f" {inside} of {len(cells)} {'has' if inside == 1 else 'have'} a worse rate tried on either side; hollow marks lie at"
        " the edge of what was tried."
    )


def size_and_data(laws: StudyLaws) -> str:
    """Of `law_plots.size_and_data`."""
    strange = int(laws.cells["outlier"].sum())
    return (
        f"Held-out loss against training views: {counted(len(laws.cells), 'cell')} and the law of size and data with its 90 %"
        f" interval, dashed beyond the runs; alpha {_of(laws, 'alpha')}, beta {_of(laws, 'beta')}, floor {_of(laws, 'E')};"
        f" R^2 {laws.surface.r_squared:.3f}. {strange or 'No'} {'cell is' if strange <= 1 else 'cells are'} left unexplained"
        " by the law of the others."
    )


def published_curves(curves: "pd.DataFrame", laws: "pd.DataFrame") -> str:
    """Of `law_plots.published_curves`: the tables of `public_curves.few_shot_curves` and `.curve_laws`."""
    missed, best = laws["held_out_error_percent"].dropna(), laws.loc[laws["E"].idxmin()]
    text = (
        f"Published data, not ours ({', '.join(curves['source'].unique())}, {', '.join(curves['licence'].unique())}): ImageNet"
        f" 10-shot error of {len(laws)} network{'s' if len(laws) > 1 else ''} against JFT examples seen. Lines: A (C + d)^-a"
        f" + E, of each curve by itself ({_range(laws['fitted_rows'])} rows); R^2 on log axes {laws['r_squared'].min():.4f} to"
        f" {laws['r_squared'].max():.4f}; lowest floor {best['E']:.1f} %, {best['model']}."
    )
    if missed.empty:
        return text
    return text + (
        f" Hollow: rows held out, up to {laws['reach'].max():.1f} times further; there the laws are off by"
        f" {missed.min():+.1f} to {missed.max():+.1f} % of the error on average."
    )


def _of(laws: StudyLaws, name: str) -> str:
    text = "{:.3g} ({:.3g} to {:.3g}".format(laws.surface.parameters[name], *laws.surface.interval(name))
    return text + (", weakly identified)" if name in laws.surface.weak() else ")")


def _range(values) -> str:
    low, high = values.min(), values.max()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
