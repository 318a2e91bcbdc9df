"""What a compute budget buys by a study's frontier: loss, size and epochs of the compute-optimal run, with intervals."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nfnet_lib.power_law import frontier
from nfnet_lib.scaling import CELL, UNITS, _require

if TYPE_CHECKING:
    import pandas as pd

FOLLOWED = ("heldout_loss", "num_params", "epoch_budget")


class Optimum(NamedTuple):
    """The compute-optimal run of `compute`: each of FOLLOWED as (estimate, low, high) of a 90 % interval.

    decades_away: how far the study's runs are from that compute, negative where it is below theirs; 0 among them. unit: of
    compute.
    """

    compute: float
    heldout_loss: tuple[float, float, float]
    num_params: tuple[float, float, float]
    epoch_budget: tuple[float, float, float]
    decades_away: float
    unit: str = "training FLOPs"

    def sentence(self) -> str:
        """The prediction in words."""
        loss, params, epochs = self.heldout_loss, self.num_params, self.epoch_budget
        text = (
            f"{self.compute:.3g} {self.unit}: held-out loss {loss[0]:.3f} (90 % interval {loss[1]:.3f} to {loss[2]:.3f}), by"
            f" a model of {params[0]:.2g} parameters ({params[1]:.2g} to {params[2]:.2g}) for {epochs[0]:.2g} epochs"
            f" ({epochs[1]:.2g} to {epochs[2]:.2g})"
        )
        if abs(self.decades_away) < 0.05:
            return f"{text}."
        where = "beyond" if self.decades_away > 0 else "below"
        return f"{text}; {abs(self.decades_away):.1f} decades {where} the study's runs."


class FrontierLines:
    """Straight lines on log-log axes through a study's frontier, and those of resamples of its cells; range: of its compute.

    cells: of `scaling.best_per_cell`; a resample draws cells with replacement within each variant. The intervals are those of
    the lines, without the scatter of a single run. ValueError where fewer than 2 cells are on the frontier.
    """

    def __init__(self, cells: "pd.DataFrame", compute: str = "train_flops", resamples: int = 300, seed: int = 0):
        _require(cells, [*CELL, compute, *FOLLOWED], "cells")
        cells = cells[np.isfinite(cells["heldout_loss"])]
        columns = [cells[name].to_numpy(float) for name in (compute, *FOLLOWED)]
        own = _lines(*columns)
        if own is None:
            raise ValueError(f"cells: fewer than 2 of {len(cells)} are on the frontier; a line needs 2")
        generator, names = np.random.default_rng(seed), cells["variant"].to_numpy()
        groups = [np.flatnonzero(names == name) for name in dict.fromkeys(names)]
        draws = []
        for _ in range(resamples):
            rows = np.concatenate([generator.choice(members, len(members)) for members in groups])
            if (lines := _lines(*(column[rows] for column in columns))) is not None:
                draws.append(lines)
        self.range, self._unit = (float(columns[0].min()), float(columns[0].max())), UNITS.get(compute, compute)
        self._own, self._draws = own, np.array([own, *draws])

    def at(self, compute: float | int) -> Optimum:
        """The compute-optimal run of so much compute. ValueError unless that is a positive number."""
        if not (np.isfinite(compute) and compute > 0):
            raise ValueError(f"compute: {compute}; allowed: finite and above 0")
        drawn = np.exp(self._draws[..., 0] * np.log(compute) + self._draws[..., 1])
        low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
        best = np.exp(self._own[:, 0] * np.log(compute) + self._own[:, 1])
        triples = [(float(b), float(x), float(y)) for b, x, y in zip(best, low, high, strict=True)]
        away = np.log10(compute / np.clip(compute, *self.range))
        return Optimum(float(compute), *triples, float(away), self._unit)

    def losses(self, compute: np.ndarray) -> np.ndarray:
        """[3, N]: loss at each compute, and the ends of its interval."""
        drawn = np.exp(self._draws[:, :1, 0] * np.log(compute) + self._draws[:, :1, 1])
        return np.stack([drawn[0], *np.quantile(drawn, [0.05, 0.95], axis=0)])


def _lines(compute, *values) -> np.ndarray | None:
    """[len(values), 2]: slope and intercept of log(value) in log(compute) along the frontier of the first value."""
    kept = frontier(compute, values[0])
    x = np.log(compute[kept])
    if len(x) < 2 or np.ptp(x) == 0:
        return None
    return np.polyfit(x, np.log(np.stack([value[kept] for value in values], axis=1)), 1).T
