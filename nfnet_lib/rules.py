"""The paper's rules of thumb as functions of a study's cells (`scaling.best_per_cell`), each with its uncertainty.

- Model size and epochs should grow together, at about the same rate (arXiv 2310.16764, section 2, Figure 2): `growth`.
- More than one epoch is optimal from some budget on (above about 5,000 core-hours in the paper): `repeats_from`.
- The best learning rate falls slowly with epochs and with size (Figure 3): `monotone_lr`.
- So a rate is found in two trials from smaller cells' best (section 2: "a small number of trials"): `propose_lr`, `two_trials`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nfnet_lib.scaling import (
    CELL,
    _require,
    best_per_cell,
    family_of,
    frontier,
    losses_by_rate,
    pretraining,
    variant_order,
)

if TYPE_CHECKING:
    import pandas as pd

SIZE = "forward_macs"
TRIAL_COLUMNS = ("variant", "epoch_budget", "best_lr", "proposed", "tried", "found", "excess")


class Growth(NamedTuple):
    """Exponents with which optimal size and epochs grow with compute, each (estimate, low, high) of a 90 % interval.

    difference: size minus epochs. used: resamples, of those drawn, in which there was a frontier to follow.
    """

    size: tuple[float, float, float]
    epochs: tuple[float, float, float]
    difference: tuple[float, float, float]
    used: int

    def sentence(self) -> str:
        """The paper's rule, as these runs bear it out."""
        numbers = [round(value, 2) + 0.0 for value in (*self.size, *self.epochs)]  # no minus before 0.00
        text = "optimal size goes as compute^{:.2f} ({:.2f} to {:.2f}), epochs as compute^{:.2f} ({:.2f} to {:.2f})".format(
            *numbers
        )
        _, low, high = self.difference
        if low <= 0 <= high:
            return f"{text}: at rates that these runs do not tell apart."
        return f"{text}: {'size' if low > 0 else 'epochs'} faster."


def growth(
    cells: "pd.DataFrame", compute: str = "train_flops", loss: str = "heldout_loss", size: str = SIZE, *,
    resamples: int = 1000, seed: int = 0,
) -> Growth:  # fmt: skip
    """Slopes of log(size) and log(epochs) against log(compute) along the frontier; cells are drawn within each variant.

    ValueError for a single size or budget among all cells, of whose growth nothing can be said, for fewer than 3 cells on the
    frontier, or too few resamples with a frontier of 2 computes.
    """
    _require(cells, [*CELL, compute, loss, size], "cells")
    cells = cells[np.isfinite(cells[loss])].sort_values([compute, loss], kind="stable", ignore_index=True)
    columns = [cells[name].to_numpy(float) for name in (compute, loss, size, "epoch_budget")]
    if (found := int(frontier(*columns[:2]).sum())) < 3:
        raise ValueError(f"cells: {found} on the frontier; a rate of growth needs 3 or more")
    for name in (size, "epoch_budget"):
        if cells[name].nunique() < 2:
            raise ValueError(f"cells: a single {name}; a rate of growth needs 2 or more")
    groups, generator = list(cells.groupby("variant", sort=True).indices.values()), np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        rows = np.sort(np.concatenate([generator.choice(members, len(members)) for members in groups]))
        slopes = _frontier_slopes(*(column[rows] for column in columns))
        if slopes is not None:
            draws.append(slopes)
    if len(draws) < resamples / 2:
        raise ValueError(f"cells: only {len(draws)} of {resamples} resamples have a frontier to follow; train more cells")
    best, drawn = _frontier_slopes(*columns), np.array(draws)
    low, high = np.quantile(np.column_stack([drawn, drawn[:, 0] - drawn[:, 1]]), [0.05, 0.95], axis=0)
    values = (*best, best[0] - best[1])
    return Growth(*((float(v), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)), len(draws))


def _frontier_slopes(compute, loss, size, epochs) -> tuple[float, float] | None:
    kept = frontier(compute, loss)
    x = np.log(compute[kept])
    if len(x) < 2 or np.ptp(x) == 0:
        return None
    return tuple(float(np.polyfit(x, np.log(values[kept]), 1)[0]) for values in (size, epochs))


def repeats_from(
    cells: "pd.DataFrame", compute: str = "train_flops", loss: str = "heldout_loss"
) -> tuple[float, float] | None:
    """Between which two computes the frontier passes to more than one epoch for good; None where it does not, or where no cell
    has an epoch or less.

    The first number is that of the last frontier cell of at most one epoch (0 if there is none), the second that of the first
    cell after it.
    """
    points = cells[frontier(cells[compute].to_numpy(float), cells[loss].to_numpy(float))].sort_values(compute)
    if points.empty:
        return None
    once = (points["epoch_budget"] <= 1).to_numpy()
    if once[-1] or not (cells["epoch_budget"] <= 1).any():
        return None
    at = points[compute].to_numpy(float)
    last = np.flatnonzero(once)
    return (float(at[last[-1]]), float(at[last[-1] + 1])) if len(last) else (0.0, float(at[0]))


def monotone_lr(cells: "pd.DataFrame", lr: str = "best_lr") -> "pd.DataFrame":
    """The cells with fitted_lr, which never rises with epochs within a variant, and steps_off: log2 of the best rate over it.

    Isotonic regression on log2 of the rate: the monotone curve with the least sum of squares.
    """
    import pandas as pd
    from sklearn.isotonic import IsotonicRegression

    _require(cells, [*CELL, lr], "cells")
    parts = []
    for name in variant_order(cells["variant"]):
        part = cells[(cells["variant"] == name) & np.isfinite(cells[lr])].sort_values("epoch_budget")
        if len(part):
            epochs, target = np.log2(part["epoch_budget"].to_numpy(float)), np.log2(part[lr].to_numpy(float))
            fitted = IsotonicRegression(increasing=False).fit(epochs, target).predict(epochs)
            parts.append(part.assign(fitted_lr=2**fitted, steps_off=target - fitted))
    if not parts:
        raise ValueError(f"cells: 0 of {len(cells)} have a finite {lr}; nothing to fit")
    return pd.concat(parts, ignore_index=True)


def propose_lr(
    known: "pd.DataFrame", size: float | int, epochs: float | int, grid: Sequence[float], size_column: str = SIZE
) -> tuple[float, float]:
    """The two rates of `grid` to try for a cell, from the best of smaller ones: (first, second).

    First the rate that the nearest known cell (in doublings of size and epochs) was best at, moved by the slopes of log2(rate)
    that the known cells have, none taken as rising; second the neighbour on the side where the unrounded rate lies, and the
    lower one where it lies on neither: the best rate falls with both. ValueError for no known cell or fewer than 2 rates.
    """
    grid = sorted(float(lr) for lr in grid)
    known = known[np.isfinite(known["best_lr"])]
    if known.empty or len(grid) < 2:
        raise ValueError(f"known: {len(known)} cells, grid: {len(grid)} rates; allowed: at least 1 and 2")
    where = np.log2(known[[size_column, "epoch_budget"]].to_numpy(float))
    target, here = np.log2(known["best_lr"].to_numpy(float)), np.log2([size, epochs])
    slopes = np.zeros(2)
    for axis in np.flatnonzero(np.ptp(where, axis=0) > 0):
        design = np.column_stack([np.ones(len(where)), where[:, np.ptp(where, axis=0) > 0]])
        if np.linalg.matrix_rank(design) == design.shape[1]:
            order = np.flatnonzero(np.ptp(where, axis=0) > 0).tolist().index(axis)
            slopes[axis] = min(0.0, np.linalg.lstsq(design, target, rcond=None)[0][1 + order])
    nearest = np.abs(where - here).sum(1).argmin()
    wanted = target[nearest] + slopes @ (here - where[nearest])
    logs = np.log2(grid)
    first = int(np.abs(logs - wanted).argmin())
    step = 1 if wanted > logs[first] + 1e-9 else -1
    second = first + step if 0 <= first + step < len(grid) else first - step
    return grid[first], grid[second]


def two_trials(runs: "pd.DataFrame", loss: str = "heldout_loss", size_column: str = SIZE) -> "pd.DataFrame":
    """How the two-trial rule would have done on a tuned study: a row a cell, from the cheapest that has a cheaper one.

    Columns: variant, epoch_budget, best_lr (of all tried), proposed (two rates), tried (those of them that the study ran),
    found (the best rate is among them), excess (loss of the better proposed one over the best's, relative; infinite where each
    of them that was run diverged, NaN where neither was run). A cell's proposals come from cells and rates of its family. Cells
    in which every rate diverged, or none but the proposed ones was tried, are left out. ValueError for runs at a single rate.
    """
    import pandas as pd

    cells = best_per_cell(runs, loss=loss).dropna(subset="best_lr").sort_values("train_flops", ignore_index=True)
    _require(cells, [size_column], "runs")
    own = pretraining(runs)
    if (found := own["peak_lr"].nunique()) < 2:
        raise ValueError(f"runs: {found} learning rate; the rule of two trials needs 2 or more")
    rows = []
    for _, alike in cells.groupby(cells["variant"].map(family_of)):  # in the order of their compute
        grid = sorted(own.loc[own["variant"].isin(alike["variant"]), "peak_lr"].unique())
        for place in range(1, len(alike)) if len(grid) > 1 else ():
            cell = alike.iloc[place]
            proposed = propose_lr(alike.iloc[:place], cell[size_column], cell["epoch_budget"], grid, size_column)
            here = own[(own["variant"] == cell["variant"]) & (own["epoch_budget"] == cell["epoch_budget"])]
            if set(here["peak_lr"]) <= set(proposed):
                continue
            losses = losses_by_rate(here[here["peak_lr"].isin(proposed)], loss)
            rows.append({"variant": cell["variant"], "epoch_budget": cell["epoch_budget"], "best_lr": cell["best_lr"],
                         "proposed": proposed, "tried": tuple(losses.index), "found": cell["best_lr"] in proposed,
                         "excess": losses.min() / cell[loss] - 1 if len(losses) else np.nan})  # fmt: skip
    return pd.DataFrame(rows, columns=TRIAL_COLUMNS)
