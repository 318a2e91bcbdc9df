"""Frontier, power-law fits and their bootstrap: the arithmetic under `scaling`, on plain arrays.

Errors are sums, never means, so that no optimiser stops early on their scale.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

if TYPE_CHECKING:
    import pandas as pd


_LARGEST_SHARE = 1 - 1e-6  # of the lowest loss that a floor may be


def frontier(compute: Float[np.ndarray, " N"], loss: Float[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Which points are compute-optimal: no other point reaches a loss as low with as little compute.

    Of exactly equal points the first counts. Points that are not finite are never on the frontier.
    """
    compute, loss = np.asarray(compute, float), np.asarray(loss, float)
    order = np.lexsort((loss, compute))
    usable = np.isfinite(compute) & np.isfinite(loss)
    result = np.zeros(len(compute), bool)
    result[order] = _below_all_before(np.where(usable, loss, np.inf)[order])
    return result


def _below_all_before(losses: Float[np.ndarray, "*B N"]) -> Bool[np.ndarray, "*B N"]:
    """True where a loss is below all earlier ones of its row; rows are sorted by (compute, loss), inf = absent."""
    before = np.minimum.accumulate(losses, axis=-1)
    start = np.full((*losses.shape[:-1], 1), np.inf)
    return losses < np.concatenate([start, before[..., :-1]], axis=-1)


@dataclass(frozen=True)
class PowerLaw:
    """loss = coefficient * compute ** -exponent + floor, fitted to `num_points` points.

    `r_squared` is taken on log(loss). For a fit with a floor, `floor_interval` holds the floors whose sum of squared
    residuals does not differ from the best at 10 % significance (profile F test), and `floor_is_weak` says that it
    holds 0 or spans more than half of the way from 0 to the lowest loss, so the data do not tell floor from exponent.
    """

    coefficient: float
    exponent: float
    r_squared: float
    num_points: int
    compute_range: tuple[float, float]
    loss_range: tuple[float, float]
    floor: float = 0.0
    floor_interval: tuple[float, float] | None = None
    floor_is_weak: bool = False

    def predict(self, compute):
        """Loss at `compute` (number or array, in the unit of the fit)."""
        return self.floor + self.coefficient * np.asarray(compute, float) ** -self.exponent

    def sentence(self) -> str:
        """The fit in one sentence."""
        decades = np.log10(self.compute_range[1] / self.compute_range[0])
        law = f"loss = {self.coefficient:.4g} * compute^{-self.exponent:.4f}"
        if self.floor_interval is not None:
            low, high = self.floor_interval
            law += f" + {self.floor:.3g} (floor between {low:.3g} and {high:.3g}"
            law += ", weakly identified)" if self.floor_is_weak else ")"
        quality = "exact, being two points" if self.num_points == 2 else f"R^2 = {self.r_squared:.4f} on log-log axes"
        return f"{law}, from {self.num_points} points over {decades:.2f} decades of compute ({quality})."


def _points(compute, loss, least: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        compute, loss = np.asarray(compute, float), np.asarray(loss, float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"compute and loss must hold numbers: {error}") from None
    if compute.shape != loss.shape:
        raise ValueError(f"compute has shape {compute.shape} but loss {loss.shape}")
    for name, values in (("compute", compute), ("loss", loss)):
        if bad := [float(value) for value in values if not (np.isfinite(value) and value > 0)]:
            raise ValueError(f"{name} must be finite and positive for a fit on log axes, but holds {bad[:5]}")
    if (found := len(np.unique(compute))) < least:
        raise ValueError(f"a fit needs at least {least} points of different compute, got {found}")
    return compute, loss


def _log_log_fit(log_c, log_l, weights):
    """Weighted least squares log_l = a - b * log_c along the last axis; returns a, b (NaN if compute is constant)."""
    total = weights.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_c, mean_l = (
            (weights * log_c).sum(-1, keepdims=True) / total,
            (weights * log_l).sum(-1, keepdims=True) / total,
        )
        spread = (weights * (log_c - mean_c) ** 2).sum(-1)
        slope = (weights * (log_c - mean_c) * (log_l - mean_l)).sum(-1) / spread
    return mean_l[..., 0] - slope * mean_c[..., 0], -slope


def _r_squared(log_loss: np.ndarray, residuals: np.ndarray) -> float:
    total = np.sum((log_loss - log_loss.mean()) ** 2)
    return float(1 - np.sum(residuals**2) / total) if total > 1e-20 else float("nan")


def fit_power_law(compute: Float[np.ndarray, " N"], loss: Float[np.ndarray, " N"]) -> PowerLaw:
    """Straight line on log-log axes by least squares. Raises ValueError below 2 points of different compute."""
    compute, loss = _points(compute, loss, least=2)
    log_c, log_l = np.log(compute), np.log(loss)
    intercept, exponent = _log_log_fit(log_c, log_l, np.ones_like(log_c))
    r_squared = _r_squared(log_l, log_l - intercept + exponent * log_c)
    ranges = (float(compute.min()), float(compute.max())), (float(loss.min()), float(loss.max()))
    return PowerLaw(float(np.exp(intercept)), float(exponent), r_squared, len(compute), *ranges)


def fit_power_law_with_floor(compute: Float[np.ndarray, " N"], loss: Float[np.ndarray, " N"]) -> PowerLaw:
    """loss = floor + coefficient * compute ** -exponent with floor >= 0, exponent >= 0, least squares on log(loss).

    Multi-start; the floor's interval ends where the other two parameters, refitted at a fixed floor, leave a sum of squares too
    large for the F test. With the small range of losses that a sweep spans, the floor is often weakly identified
    (`PowerLaw.floor_is_weak`): report it beside the pure power law, not instead. Raises ValueError below 4 points of
    different compute.
    """
    from scipy.optimize import brentq, least_squares
    from scipy.stats import f as f_distribution

    compute, loss = _points(compute, loss, least=4)
    middle, lowest, log_l = np.exp(np.log(compute).mean()), loss.min(), np.log(loss)
    log_c = np.log(compute / middle)  # centred, so that coefficient and exponent decouple

    def residuals(p):  # floor as a share of the lowest loss, log coefficient, exponent
        return np.log(p[0] * lowest + np.exp(p[1] - p[2] * log_c)) - log_l

    tight = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14, "max_nfev": 500}

    def line(share):  # log coefficient and exponent without the floor, to start from
        a, b = _log_log_fit(log_c, np.log(loss - share * lowest), np.ones_like(log_c))
        return [a, max(b, 1e-6)]

    def solve(start_share):
        bounds = ([0.0, -np.inf, 0], [_LARGEST_SHARE, np.inf, np.inf])
        return least_squares(residuals, [start_share, *line(start_share)], bounds=bounds, **tight)

    def excess(share):  # of the sum of squares at a fixed floor, above what the F test allows
        fit = least_squares(lambda p: residuals([share, *p]), line(share), bounds=([-np.inf, 0], np.inf), **tight)
        return fit.cost - limit

    best = min((solve(share) for share in (0.01, 0.3, 0.6, 0.8, 0.9, 0.97)), key=lambda fit: fit.cost)
    # Rounding floors the cost of an exact fit; without it the interval of noiseless data would depend on the last bits.
    degrees = len(compute) - 3
    limit = max(best.cost, 1e-20) * (1 + f_distribution.ppf(0.9, 1, degrees) / degrees)
    share, log_a, exponent = best.x
    low = brentq(excess, 0.0, share, xtol=1e-9) if excess(0.0) > 0 else 0.0
    high = brentq(excess, share, _LARGEST_SHARE, xtol=1e-9) if excess(_LARGEST_SHARE) > 0 else 1.0
    interval = (float(lowest * low), float(lowest * high))
    ranges = (float(compute.min()), float(compute.max())), (float(lowest), float(loss.max()))
    return PowerLaw(
        float(np.exp(log_a) * middle**exponent),
        float(exponent),
        _r_squared(log_l, best.fun),
        len(compute),
        *ranges,
        floor=float(share * lowest),
        floor_interval=interval,
        floor_is_weak=bool(interval[0] <= 0.01 * lowest or interval[1] - interval[0] > 0.5 * lowest),
    )


@dataclass(frozen=True)
class ExponentInterval:
    """5 % and 95 % quantiles and median of the bootstrapped exponent; `used` of `resamples` had a frontier to fit."""

    low: float
    median: float
    high: float
    used: int
    resamples: int


def bootstrap_exponent(
    df: "pd.DataFrame", n: int = 2000, seed: int = 0, by: str | None = "variant", compute: str = "train_flops",
    loss: str = "heldout_loss", skip: int = 0,
) -> ExponentInterval:  # fmt: skip
    """Pairs bootstrap of the frontier's exponent: draw cells with replacement, find their frontier, fit, `n` times.

    Cells are drawn within each value of column `by`, so that every resample has as many cells of each variant as the
    data (None: from all cells). A cell drawn k times weighs k. A variant with a single cell always keeps it: with few
    cells a variant the interval is too narrow. Raises ValueError where fewer than half of the resamples can be fitted.

    Args:
        df: one row a cell (`best_per_cell`); skip: as in `frontier_analysis`.
    """
    if missing := [name for name in (compute, loss, *([by] if by else [])) if name not in df]:
        raise ValueError(f"df lacks column(s) {', '.join(missing)}; it has {', '.join(map(str, df.columns))}")
    if n < 1:
        raise ValueError(f"n: {n} resamples; allowed: 1 or more")
    _points(df[compute], df[loss], least=2)
    df = df.sort_values([compute, loss], kind="stable", ignore_index=True)
    generator = np.random.default_rng(seed)
    counts = np.zeros((n, len(df)))
    groups = df.groupby(by, sort=True).indices.values() if by else [np.arange(len(df))]
    for members in groups:
        counts[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), size=n)
    losses = df[loss].to_numpy(dtype=float)
    on_frontier = _below_all_before(np.where(counts > 0, losses, np.inf))
    on_frontier &= np.cumsum(on_frontier, axis=1) > skip
    _, exponents = _log_log_fit(np.log(df[compute].to_numpy(dtype=float)), np.log(losses), counts * on_frontier)
    exponents = exponents[(on_frontier.sum(axis=1) >= 2) & np.isfinite(exponents)]
    if len(exponents) < n / 2:
        raise ValueError(
            f"only {len(exponents)} of {n} resamples of {len(df)} cells have 2 frontier points (skip={skip}); "
            "train more cells"
        )
    low, median, high = np.quantile(exponents, [0.05, 0.5, 0.95])
    return ExponentInterval(float(low), float(median), float(high), len(exponents), n)
