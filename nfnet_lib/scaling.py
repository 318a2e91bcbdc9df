"""Scaling laws from run records: best learning rates, the compute-optimal frontier, power laws and their uncertainty.

The paper (arXiv 2310.16764, Figures 2 and 3) tunes the learning rate for each (variant, epoch budget) cell, plots the
held-out loss of each cell's best run against compute, and observes a line on log-log axes along the lower edge. The
steps here are the same, each a function of a table: runs -> `best_per_cell` -> `frontier` -> `fit_power_law` (these
two in `power_law`, importable from here); `frontier_analysis` chains them. Laws of size and data, with an interval for every
parameter, are in `law_fits`; `study_laws` fits them to a study.

Each run must have a schedule of its own length (a cosine cut short is no run of a smaller budget), and each optimum
must be interior to its learning-rate grid, or the frontier bends for a reason that is not scale: `lr_is_interior`
tells.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nfnet_lib.config import PretrainConfig
from nfnet_lib.law_fits import LawFit, fit_law
from nfnet_lib.power_law import (
    ExponentInterval,
    PowerLaw,
    bootstrap_exponent,
    fit_power_law,
    fit_power_law_with_floor,
    frontier,
)
from nfnet_lib.records import counted
from nfnet_lib.variants import SMALL, get_variant

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ExponentInterval",
    "FrontierResult",
    "LawFit",
    "PowerLaw",
    "best_lr_trend",
    "best_per_cell",
    "best_variant_ranges",
    "bootstrap_exponent",
    "finetune_table",
    "fit_law",
    "fit_power_law",
    "fit_power_law_with_floor",
    "frontier",
    "frontier_analysis",
    "variant_order",
]

_VITS = ("Ti", "S", "B", "L", "So400m", "g", "G")
CELL = ("variant", "epoch_budget")
# In what runs of one cell may differ: the rate, the seed, and what changes how a run is made but not what comes out.
_NOT_RECIPE = {*CELL, "kind", "peak_lr", "seed", "data_dir", "sharding", "remat", "unroll", "loader_workers", "on_bad",
               "max_bad_fraction", "checkpoints", "log_points"}  # fmt: skip
_RECIPE = tuple(name for name in PretrainConfig.model_fields if name not in _NOT_RECIPE)
_PER_CELL = ("num_params", "forward_macs", "images_seen", "tpu_v4_core_hours", "core_hours", "seconds")


def _require(df: "pd.DataFrame", columns: Sequence[str], what: str) -> None:
    if missing := [name for name in columns if name not in df]:
        raise ValueError(f"{what} lacks column(s) {', '.join(missing)}; it has {', '.join(map(str, df.columns))}")


def variant_order(names: Iterable[str]) -> list[str]:
    """Distinct names from small to large: F0, F1, ..., F3, F3+, F7, F7+ (F0-pico, ..., F0-mini, F0), ViTs, then others."""

    def key(name: str) -> tuple:
        match = re.match(r"F(\d+)(\+?)(-[a-z]+)?", name)
        if match:
            width = SMALL.index(match[3]) if match[3] in SMALL else len(SMALL)
            return (0, int(match[1]), match[2], width, name)
        size = name.split("/")[0]
        return (1, _VITS.index(size), "", 0, name) if size in _VITS else (2, 0, "", 0, name)

    return sorted(set(names), key=key)


def family_of(variant: str) -> str:
    """Of a variant; "other" of one that is not known here."""
    try:
        return get_variant(variant).family
    except ValueError:
        return "other"


def cell_names(cells: "pd.DataFrame") -> str:
    """The cells of a table in words."""
    return ", ".join(f"{row.variant} at {counted(row.epoch_budget, 'epoch')}" for row in cells.itertuples())


def pretraining(df: "pd.DataFrame") -> "pd.DataFrame":
    """The runs of pre-training: all, where no column `kind` says otherwise."""
    return df[df["kind"] == "pretrain"] if "kind" in df else df


def best_per_cell(df: "pd.DataFrame", loss: str = "heldout_loss", compute: str = "train_flops") -> "pd.DataFrame":
    """The best learning rate of each (variant, epoch_budget) cell, one row a cell, sorted by variant and epochs.

    Runs that differ in nothing but their seed are averaged first; a run whose loss is not finite has diverged and
    counts as worse than every other. Runs of kind "finetune" are ignored.

    Args:
        df: one row a run, with columns variant, epoch_budget, peak_lr, `compute` and `loss`.

    Returns columns variant, epoch_budget, best_lr, `loss`, `compute`, lrs (tuple of the tried, ascending), num_seeds
    (at the best), lr_is_interior (a lower and a higher rate were tried and were no better), interpolated_lr (vertex
    of the parabola of the loss in log2 of the rate through the best and its two neighbours; NaN unless interior with
    finite losses), and where `df` has them num_params, forward_macs, images_seen, tpu_v4_core_hours, core_hours,
    seconds. A cell in which every run diverged has best_lr and `loss` NaN.
    """
    import pandas as pd

    runs = pretraining(df)
    _require(runs, [*CELL, "peak_lr", loss, compute], "df")
    if runs.empty:
        raise ValueError(f"df has 0 pre-training runs of {len(df)} rows; nothing to choose from")
    _refuse_what_is_no_run(runs, compute, loss)
    extra = [name for name in _PER_CELL if name in runs and name != compute]
    rows = []
    for (variant, epochs), cell in runs.groupby(list(CELL), sort=True):
        by_lr = losses_by_rate(cell, loss)
        losses, lrs = by_lr.to_numpy(), by_lr.index.to_numpy(dtype=float)
        best = int(np.argmin(losses))
        interior = bool(np.isfinite(losses[best]) and 0 < best < len(lrs) - 1)
        chosen = cell[cell["peak_lr"] == lrs[best]]
        num_seeds = chosen["seed"].nunique() if "seed" in chosen else len(chosen)
        row = {"variant": variant, "epoch_budget": epochs, "best_lr": lrs[best], loss: losses[best],
               compute: chosen[compute].mean(), "lrs": tuple(lrs.tolist()), "num_seeds": int(num_seeds),
               "lr_is_interior": interior, "interpolated_lr": np.nan}  # fmt: skip
        if not np.isfinite(losses[best]):
            row |= {"best_lr": np.nan, loss: np.nan}
        elif interior:
            row["interpolated_lr"] = _parabola_vertex(lrs[best - 1 : best + 2], losses[best - 1 : best + 2])
        rows.append(row | {name: chosen[name].mean() for name in extra})
    return _by_variant(pd.DataFrame(rows), "epoch_budget")


def losses_by_rate(runs: "pd.DataFrame", loss: str = "heldout_loss") -> "pd.Series":
    """Mean loss over the seeds of each peak_lr, ascending; infinite where a run diverged, whose loss is not finite."""
    return runs.groupby("peak_lr")[loss].agg(lambda own: own.mean() if np.isfinite(own).all() else np.inf).astype(float)


def _refuse_what_is_no_run(runs: "pd.DataFrame", compute: str, loss: str) -> None:
    """ValueError for keys and computes that are missing or not positive, losses that no run has, and runs of one cell
    that differ in more than their rate and seed."""
    import pandas as pd

    if runs["variant"].isna().any():
        raise ValueError(f"variant is missing in {int(runs['variant'].isna().sum())} of {len(runs)} pre-training runs")
    for name in ("epoch_budget", "peak_lr", compute, loss):
        if not pd.api.types.is_numeric_dtype(runs[name]):
            raise ValueError(f"{name} must hold numbers, but holds {runs[name].iloc[0]!r}")
        values = runs[name].to_numpy(float, na_value=np.nan)
        wrong = values <= 0 if name == loss else ~(np.isfinite(values) & (values > 0))  # a run that diverged has no loss
        if wrong.any():
            raise ValueError(f"{name} must be above 0, but is {values[wrong][0]} in {wrong.sum()} of {len(runs)} runs")
    recipe = [name for name in _RECIPE if name in runs]
    for (variant, epochs), same in runs.groupby(list(CELL)) if recipe else ():
        if different := [name for name in recipe if len(same) > 1 and same[name].nunique(dropna=False) > 1]:
            values = ", ".join(map(str, same[different[0]].unique()))
            raise ValueError(f"{different[0]}: {values} in runs of {variant} at {counted(epochs, 'epoch')};"
                             " runs of one cell may differ in their rate and seed only")  # fmt: skip


def _by_variant(table: "pd.DataFrame", *then: str) -> "pd.DataFrame":
    """Rows sorted by variant, small to large, then by the columns `then`."""
    rank = {name: position for position, name in enumerate(variant_order(table["variant"]))}
    by = ["variant", *then]
    return table.sort_values(
        by, key=lambda c: c.map(rank) if c.name == "variant" else c, ignore_index=True, kind="stable"
    )


def _parabola_vertex(lrs: np.ndarray, losses: np.ndarray) -> float:
    """Minimum of the parabola through three (log2 lr, loss) points of which the middle one is lowest; else NaN."""
    if not np.isfinite(losses).all():
        return np.nan
    x = np.log2(lrs / lrs[1])
    left, right = (losses[0] - losses[1]) / x[0], (losses[2] - losses[1]) / x[2]
    curvature = (right - left) / (x[2] - x[0])
    if curvature <= 0:
        return float(lrs[1])  # three equal losses
    slope = left - curvature * x[0]
    return float(lrs[1] * 2 ** (-slope / (2 * curvature)))


def best_lr_trend(cells: "pd.DataFrame", lr: str = "best_lr", size: str = "num_params") -> "pd.DataFrame":
    """How the best learning rate moves with epochs and model size: least-squares slopes of log2(lr).

    Args:
        cells: table of `best_per_cell`; lr: its column to follow, best_lr or interpolated_lr; size: its column of size.

    Returns one row a variant (slope_epochs: doublings of the rate per doubling of the epochs, NaN with one budget) and,
    with two variants or more and the column `size`, a last row "all" with slope_epochs and slope_size fitted jointly; of
    several families a row each ("all NFNets"), since their optimizers' rates can't be compared.
    Columns: variant, num_cells, num_edge (optima at the edge of their grid), lr_shortest, lr_longest, slope_epochs,
    slope_size.
    """
    import pandas as pd

    _require(cells, [*CELL, lr, "lr_is_interior"], "cells")
    cells = cells[np.isfinite(cells[lr])]
    if cells.empty:
        raise ValueError(f"cells has 0 rows with a finite {lr}; nothing to fit")

    def row(name: str, part: "pd.DataFrame", with_size: bool) -> dict:
        part = part.sort_values("epoch_budget", kind="stable")
        predictors = [np.log2(part["epoch_budget"].to_numpy(dtype=float))]
        if with_size:
            predictors.append(np.log2(part[size].to_numpy(dtype=float)))
        design = np.column_stack([np.ones(len(part)), *predictors])
        slopes = np.full(2, np.nan)
        if np.linalg.matrix_rank(design) == design.shape[1]:
            target = np.log2(part[lr].to_numpy(dtype=float))
            slopes[: len(predictors)] = np.linalg.lstsq(design, target, rcond=None)[0][1:]
        return {"variant": name, "num_cells": len(part), "num_edge": int((~part["lr_is_interior"]).sum()),
                "lr_shortest": part[lr].iloc[0], "lr_longest": part[lr].iloc[-1],
                "slope_epochs": slopes[0], "slope_size": slopes[1]}  # fmt: skip

    rows = [row(name, cells[cells["variant"] == name], with_size=False) for name in variant_order(cells["variant"])]
    families = cells["variant"].map(family_of)
    for family, part in cells.groupby(families, sort=True) if size in cells else ():
        if part["variant"].nunique() > 1:
            rows.append(row("all" if families.nunique() == 1 else f"all {family}s", part, with_size=True))
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class FrontierResult:
    """What Figure 2 shows, as tables and numbers; `sentences` says it in words.

    cells: one row a (variant, epoch_budget) cell, as `best_per_cell`, plus on_frontier and in_fit (bool), by compute.
    law: power law through the frontier points in_fit; floored: the same with a floor >= 0, None below 4 points.
    interval: bootstrap of the law's exponent, None where too few cells allow one; `notes` then says why.
    ranges: compute ranges in which one variant is best (`best_variant_ranges`).
    compute, loss: the columns used; decades: powers of ten of compute that the frontier points in_fit span.
    """

    cells: "pd.DataFrame"
    law: PowerLaw
    floored: PowerLaw | None
    interval: ExponentInterval | None
    ranges: "pd.DataFrame"
    compute: str
    loss: str
    decades: float
    notes: tuple[str, ...] = ()

    @property
    def points(self) -> "pd.DataFrame":
        """The cells on the frontier, cheapest first."""
        return self.cells[self.cells["on_frontier"]]

    def sentences(self) -> list[str]:
        """The findings in words, every number of them taken from this result."""
        cells, points = self.cells, self.points
        result = [
            f"{len(points)} of {counted(len(cells), 'cell')} are compute-optimal, from {points[self.loss].iloc[0]:.4g} nats at "
            f"{points[self.compute].iloc[0]:.3g} to {points[self.loss].iloc[-1]:.4g} at "
            f"{points[self.compute].iloc[-1]:.3g} {UNITS.get(self.compute, self.compute)}.",
            "Power law: " + self.law.sentence(),
        ]
        if self.interval:
            result.append(f"Bootstrap over cells: exponent {self.interval.median:.4f}, 90 % interval "
                          f"{self.interval.low:.4f} to {self.interval.high:.4f} "
                          f"({self.interval.used} of {self.interval.resamples} resamples).")  # fmt: skip
        if self.floored:
            result.append("With a floor: " + self.floored.sentence())
        for row in self.ranges.itertuples():
            end = {"crossing": "then another variant's curve falls below", "end of runs": "where its runs end",
                   "cheaper runs": "then it is no better than cheaper runs"}[row.ends_by]  # fmt: skip
            result.append(f"{row.variant} is best from {row.compute_from:.3g} to {row.compute_to:.3g}, {end}.")
        edge = cells[~cells["lr_is_interior"]] if "lr_is_interior" in cells else cells[:0]
        if len(edge):
            result.append(f"The best learning rate lies at the edge of its grid in {len(edge)} of {len(cells)} cells "
                          f"({cell_names(edge)}): their losses are upper bounds.")  # fmt: skip
        return result + list(self.notes)


UNITS = {"train_flops": "training FLOPs", "tpu_v4_core_hours": "TPU-v4 core-hours", "core_hours": "core-hours",
          "seconds": "seconds"}  # fmt: skip


def frontier_analysis(
    df: "pd.DataFrame", compute: str = "train_flops", loss: str = "heldout_loss", skip: int = 0, resamples: int = 2000,
    seed: int = 0,
) -> FrontierResult:  # fmt: skip
    """From runs (or the cells of `best_per_cell`) to the frontier, its power law, and who is best where.

    Args:
        skip: cheapest frontier points to leave out of the fits: the smallest budgets lie above the line.

    Raises ValueError where fewer than 2 frontier points remain for the fit.
    """
    if resamples < 1 or skip < 0:
        name, value, least = ("skip", skip, 0) if skip < 0 else ("resamples", resamples, 1)
        raise ValueError(f"{name}: {value}; allowed: {least} or more")
    cells = df if "best_lr" in df else best_per_cell(df, loss=loss, compute=compute)
    _require(cells, [*CELL, compute, loss], "df")
    notes = []
    lost = cells[~np.isfinite(cells[loss])]
    if len(lost):
        notes.append(f"Every run diverged in {counted(len(lost), 'cell')}, left out: {cell_names(lost)}.")
    cells = cells[np.isfinite(cells[loss])].sort_values([compute, loss], kind="stable", ignore_index=True)
    on_frontier = frontier(cells[compute].to_numpy(dtype=float), cells[loss].to_numpy(dtype=float))
    if (found := int(on_frontier.sum())) - skip < 2:
        raise ValueError(f"{found} of {len(cells)} cells {'is' if found == 1 else 'are'} compute-optimal; a law needs 2"
                         + (f" and skip={skip} more" if skip else ""))  # fmt: skip
    cells = cells.assign(on_frontier=on_frontier, in_fit=on_frontier & (np.cumsum(on_frontier) > skip))
    fitted = cells[cells["in_fit"]]
    xy = fitted[compute].to_numpy(dtype=float), fitted[loss].to_numpy(dtype=float)
    alone, interval = cells.groupby("variant").size() == 1, None
    try:
        if alone.all():
            raise ValueError("every variant has a single cell, which every resample would keep")
        interval = bootstrap_exponent(cells, resamples, seed, compute=compute, loss=loss, skip=skip)
    except ValueError as error:
        notes.append(f"No bootstrap interval: {error}.")
    if interval and alone.any():
        notes.append(
            "Some variants have a single cell, which every resample keeps: the bootstrap interval is too narrow."
        )
    law = fit_power_law(*xy)
    return FrontierResult(cells, law, fit_power_law_with_floor(*xy) if len(fitted) >= 4 else None, interval,
                          best_variant_ranges(cells, compute, loss), compute, loss,
                          float(np.log10(law.compute_range[1] / law.compute_range[0])), tuple(notes))  # fmt: skip


def best_variant_ranges(
    cells: "pd.DataFrame", compute: str = "train_flops", loss: str = "heldout_loss", grid: int = 4000
) -> "pd.DataFrame":
    """Compute ranges in which one variant's curve lies lowest, and lower than any curve at less compute, cheapest first.

    Each variant's curve joins its cells by straight lines on log-log axes and is not extrapolated. Columns: variant,
    compute_from, compute_to, ends_by: "crossing" (another curve passes below, located to 1/`grid` of the whole range),
    "cheaper runs" (the curve rises above a loss that was had for less) or "end of runs" (no statement about scale: this
    variant was not trained longer).
    """
    import pandas as pd

    x = np.log(cells[compute].to_numpy(dtype=float))
    where = np.unique(np.concatenate([np.linspace(x.min(), x.max(), grid), x]))
    names = variant_order(cells["variant"])
    curves = np.full((len(names), len(where)), np.inf)
    for row, name in enumerate(names):
        part = cells[cells["variant"] == name].sort_values([compute, loss]).drop_duplicates(compute)
        log_c, log_l = np.log(part[compute].to_numpy(dtype=float)), np.log(part[loss].to_numpy(dtype=float))
        curves[row] = np.interp(where, log_c, log_l, left=np.inf, right=np.inf)
    lowest = curves.min(axis=0)
    best = np.where(np.isfinite(lowest) & (lowest <= np.minimum.accumulate(lowest)), curves.argmin(axis=0), -1)
    starts = np.flatnonzero(np.concatenate([[True], best[1:] != best[:-1]]))
    rows = []
    for start, stop in zip(starts, [*starts[1:], len(where)], strict=True):
        if best[start] >= 0:
            goes_on = stop < len(where) and np.isfinite(curves[best[start], stop])
            ends_by = "end of runs" if not goes_on else "crossing" if best[stop] >= 0 else "cheaper runs"
            rows.append({"variant": names[best[start]], "compute_from": np.exp(where[start]),
                         "compute_to": np.exp(where[stop - 1]), "ends_by": ends_by})  # fmt: skip
    return pd.DataFrame(rows)


def finetune_table(df: "pd.DataFrame", top1: str = "heldout_top1", compute: str = "train_flops") -> "pd.DataFrame":
    """Fine-tuning runs joined to the pre-training runs that they start from, by variant and pre-training compute.

    Args:
        df: runs of both kinds (`records.collect`); a fine-tuning run names its origin in pretrained_run.
        top1: column of the accuracy to report, a fraction; "heldout_top1_ema" for averaged parameters.

    Columns: variant, epoch_budget (of pre-training), pretrain_compute (column `compute` of the pre-training run),
    pretrain_heldout_loss, top1_error_percent, augmult (views of each image in a batch), repeated_augmentation
    (augmult > 1), rho (SAM), finetune_compute, run_id, pretrained_run. No fine-tuning run gives an empty table.
    Raises ValueError for accuracies outside [0, 1], origins that are not in `df` or are there more than once.
    """
    _require(df, ["run_id", "kind", "variant", top1, compute, "heldout_loss"], "df")
    tuned, origins = df[df["kind"] == "finetune"], df[df["kind"] == "pretrain"]
    if "compared_as" in tuned:  # the runs of a comparison of recipes have a figure of their own
        tuned = tuned[tuned["compared_as"].fillna("") == ""]
    if len(tuned):
        _require(df, ["pretrained_run"], "df")
        tuned = tuned[tuned["pretrained_run"].fillna("") != ""]  # runs from weight files have no pre-training to stand beside
    tuned = tuned.reindex(columns=[*df.columns, *({"augmult", "rho", "pretrained_run"} - set(df.columns))])
    if len(bad := tuned[~tuned[top1].between(0, 1)]):
        raise ValueError(
            f"{top1} must be a fraction in [0, 1], but is {bad[top1].iloc[0]} in run {bad['run_id'].iloc[0]}"
        )
    wanted = origins[origins["run_id"].isin(tuned["pretrained_run"])]
    if lost := sorted(set(tuned["pretrained_run"].astype(str)) - set(wanted["run_id"])):
        raise ValueError(f"pretrained_run names {len(lost)} run(s) that are not in the table: {', '.join(lost[:5])}")
    if len(twice := wanted.loc[wanted["run_id"].duplicated(), "run_id"]):
        raise ValueError(f"pretrained_run is ambiguous: run_id {twice.iloc[0]} occurs more than once")
    origin = wanted.set_index("run_id")
    augmult = tuned["augmult"].astype("Int64").fillna(1).astype("int64")
    result = tuned.assign(
        epoch_budget=tuned["pretrained_run"].map(origin["epoch_budget"]),
        pretrain_compute=tuned["pretrained_run"].map(origin[compute]),
        pretrain_heldout_loss=tuned["pretrained_run"].map(origin["heldout_loss"]),
        top1_error_percent=100 * (1 - tuned[top1]),
        augmult=augmult,
        repeated_augmentation=augmult > 1,
        finetune_compute=tuned[compute],
    )
    columns = ["variant", "epoch_budget", "pretrain_compute", "pretrain_heldout_loss", "top1_error_percent", "augmult",
               "repeated_augmentation", "rho", "finetune_compute", "run_id", "pretrained_run"]  # fmt: skip
    return _by_variant(result[columns], "pretrain_compute", "augmult", "run_id")
