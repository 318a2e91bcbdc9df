"""How far a fitted law can be trusted, and what to run next: each a function of a law's form and of the points it is fitted to.

Points are arrays by name: the inputs of the form (`compute`, or `size` and `data`), `loss`, and `groups`, the model of each.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from nfnet_lib.law_fits import FORMS, LawFit, TooFew, fit_law

if TYPE_CHECKING:
    import pandas as pd

FALSE_ALARM = 0.01  # chance of calling any point of a sound study an outlier
_ROUNDING = 1e-6  # of log residuals: how near a fit comes to a law without noise

Points = Mapping[str, Any]


def leave_one_out(form: str, points: Points) -> Float[np.ndarray, " N"]:
    """log(predicted) - log(loss) of each point by the law that is fitted to all others; NaN where they are too few for one."""
    _check(form, points)
    everyone = np.arange(len(points["loss"]))
    return np.array([_error(form, points, everyone == index)[0] for index in everyone])


def extrapolation_error(form: str, points: Points, by: str = "compute") -> "pd.DataFrame":
    """The law fitted to what costs least, and asked for the rest: a row for each number of the largest points held out, as long
    as what is left allows a fit.

    by: what is large, a name in points. Columns: held_out, reach (how many times beyond the largest fitted), error_percent (of
    the predicted loss of the very largest point), worst_percent (of any held out).
    """
    import pandas as pd

    _check(form, points, by)
    order = np.argsort(np.asarray(points[by], float), kind="stable")
    needed = len(FORMS[form].parameters) + 1
    rows = []
    for count in range(1, len(order) - needed + 1):
        held = np.zeros(len(order), bool)
        held[order[-count:]] = True
        errors = np.expm1(_error(form, points, held))
        if np.isnan(errors).any():
            break
        size = np.asarray(points[by], float)
        largest = np.argmax(size[held])
        rows.append({"held_out": count, "reach": size.max() / size[~held].max(),
                     "error_percent": 100 * errors[largest], "worst_percent": 100 * np.abs(errors).max()})  # fmt: skip
    return pd.DataFrame(rows, columns=["held_out", "reach", "error_percent", "worst_percent"])


def outliers(form: str, points: Points) -> Bool[np.ndarray, " N"]:
    """Points whose deleted residual, studentised by leverage and median absolute deviation, is too large for FALSE_ALARM.

    Bonferroni's limit of Student's t for as many points (Cook and Weisberg 1982, section 2.2).
    The law of the others does not explain them. The paper says so of F7+ (section 2: examples under-sampled after pre-emption).
    """
    from scipy.stats import t as t_distribution

    _check(form, points)
    arrays = {name: np.asarray(points[name], float) for name in (*FORMS[form].inputs, "loss")}
    residuals = leave_one_out(form, points) * np.sqrt(1 - fit_law(form, **arrays).leverage)
    centred = residuals - np.nanmedian(residuals)
    limit = t_distribution.ppf(1 - FALSE_ALARM / (2 * len(centred)), len(centred) - len(FORMS[form].parameters) - 1)
    return np.abs(centred) > limit * max(1.4826 * np.nanmedian(np.abs(centred)), _ROUNDING)


def next_cell(fit: LawFit, candidates: Points, target: Mapping[str, float]) -> Float[np.ndarray, " N"]:
    """By how much (0 to 1) each candidate run would narrow the law's uncertainty at `target`: the share of its variance there
    that an observation with the fit's own scatter would explain, by the covariance of the bootstrap's draws.

    ValueError for a fit without draws.
    """
    if missing := [name for name in fit.form.inputs if name not in candidates or name not in target]:
        raise ValueError(f"candidates and target: {missing[0]} is missing; the {fit.form.name} law takes"
                         f" {', '.join(fit.form.inputs)}")  # fmt: skip
    inputs = {name: np.append(np.asarray(candidates[name], float), float(target[name])) for name in fit.form.inputs}
    logs = np.log(fit.predict_draws(**inputs))
    logs -= logs.mean(0)
    variance, covariance = (logs**2).mean(0), (logs[:, :-1] * logs[:, -1:]).mean(0)
    freedom = max(len(fit.residuals) - len(fit.form.parameters), 1)
    noise = float(np.sum(fit.residuals**2)) / freedom
    return covariance**2 / ((variance[:-1] + noise) * variance[-1])


def optimum(fit: LawFit, compute, flops_per_unit: float) -> dict[str, np.ndarray]:
    """Compute-optimal size and data of a `surface` law where compute = flops_per_unit * size * data; and that loss.

    size grows as compute^(beta / (alpha + beta)), data as compute^(alpha / (alpha + beta)) (arXiv 2203.15556, equation 4).
    """
    if fit.form.name != "surface":
        raise ValueError(f"fit: a {fit.form.name} law has no optimal size; allowed: surface")
    p, product = fit.parameters, np.asarray(compute, float) / flops_per_unit
    scale = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    size = scale * product ** (p["beta"] / (p["alpha"] + p["beta"]))
    return {"size": np.asarray(size), "data": np.asarray(product / size), "loss": fit.predict(size=size, data=product / size)}


def growth_exponents(fit: LawFit) -> dict[str, tuple[float, float, float]]:
    """{"size", "data"}: exponent with which the optimum grows with compute, and its 90 % interval; they add up to 1."""
    if fit.form.name != "surface":
        raise ValueError(f"fit: a {fit.form.name} law has no optimal size; allowed: surface")
    fit.need_draws()
    alpha, beta = (fit.draws[:, fit.form.parameters.index(name)] for name in ("alpha", "beta"))
    share = beta / (alpha + beta)
    low, high = np.quantile(share, (0.05, 0.95))
    best = fit.parameters["beta"] / (fit.parameters["alpha"] + fit.parameters["beta"])
    return {"size": (best, float(low), float(high)), "data": (1 - best, float(1 - high), float(1 - low))}


def isoflop_optimum(
    size: Float[np.ndarray, " N"], loss: Float[np.ndarray, " N"]
) -> float:
    """Size at the vertex of the parabola of loss in log(size), of runs of equal compute (arXiv 2203.15556, approach 2).

    Use with `isoflop_bias`. ValueError below 3 sizes, and where the parabola opens downwards or its vertex is not among them.
    """
    size, loss = np.asarray(size, float), np.asarray(loss, float)
    for name, values in (("size", size), ("loss", loss)):
        if bad := [float(value) for value in values if not (np.isfinite(value) and value > 0)]:
            raise ValueError(f"{name} must be finite and positive, but holds {bad[:5]}")
    x = np.log(size)
    if len(np.unique(x)) < 3:
        raise ValueError(f"size: {len(np.unique(x))} different; a parabola needs 3 or more")
    curvature, slope, _ = np.polyfit(x - x.mean(), loss, 2)
    if curvature <= 0:
        raise ValueError("loss: the parabola opens downwards; the sizes do not enclose an optimum")
    vertex = float(np.exp(x.mean() - slope / (2 * curvature)))
    if not size.min() <= vertex <= size.max():
        raise ValueError(f"size: the parabola's vertex, {vertex:.3g}, lies outside the sizes, {size.min():.3g} to"
                         f" {size.max():.3g}: they do not enclose an optimum")  # fmt: skip
    return vertex


def isoflop_bias(fit: LawFit, size: Float[np.ndarray, " N"], compute: float, flops_per_unit: float) -> float:
    """What the parabola makes of this `surface` law without any noise: its optimal size over the true one, at these sizes.

    Not 1 where the grid is wide or off-centre, or alpha differs from beta (arXiv 2603.22339): divide by it, or fit the surface.
    """
    size = np.asarray(size, float)
    loss = fit.predict(size=size, data=compute / flops_per_unit / size)
    return isoflop_optimum(size, loss) / float(optimum(fit, compute, flops_per_unit)["size"])


def _check(form: str, points: Points, *more: str) -> None:
    """ValueError for an unknown form, or points that lack what it needs."""
    if form not in FORMS:
        raise ValueError(f"form: {form!r}; allowed: {', '.join(FORMS)}")
    if missing := [name for name in (*FORMS[form].inputs, "loss", *more) if name not in points]:
        raise ValueError(f"points: {missing[0]} is missing; there are {', '.join(points)}")


def _error(form: str, points: Points, held: np.ndarray) -> np.ndarray:
    """log(predicted) - log(loss) of the points held out; NaN where the others are too few."""
    arrays = {name: np.asarray(points[name], float) for name in (*FORMS[form].inputs, "loss")}
    try:
        fit = fit_law(form, **{name: values[~held] for name, values in arrays.items()})
    except TooFew:
        return np.full(held.sum(), np.nan)
    return np.log(fit.predict(**{name: arrays[name][held] for name in fit.form.inputs})) - np.log(arrays["loss"][held])
