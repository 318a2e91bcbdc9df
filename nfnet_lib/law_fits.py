"""Loss laws in several forms, fitted robustly, with an interval for every parameter: NumPy and SciPy on plain arrays.

    power    L = A C^-a
    floor    L = A C^-a + E
    shifted  L = A (C + d)^-a + E                (Zhai et al., arXiv 2106.04560, with their names E = a (C + d)^-b + c)
    surface  L = A N^-alpha + B D^-beta + E      (Hoffmann et al., arXiv 2203.15556, approach 3)

All are sums of terms that are linear in A, B and E. So the search starts by variable projection: over a grid of exponents (and
d) the coefficients follow from non-negative least squares; the best few of the grid are polished together. What is minimised
is the sum, not the mean, of Huber's loss of log residuals: with the mean Hoffmann's own optimiser stopped early, and the
published exponents were off (arXiv 2404.10102). Huber's delta is first Hoffmann's 1e-3, then 1.345 robust deviations of the
residuals, which wastes 5 % of what Gaussian scatter tells, and not the third that next to no delta does. A floor below zero is
not allowed.

Intervals come from a pairs bootstrap: points are drawn with replacement within each group (a model's runs), and refitted from
the grid anew, so that a draw can leave a floor or an exponent of zero; draws are widened about the fit for its own degrees of
freedom and those of the groups. At a floor of zero, the edge of what is allowed, no bootstrap is exact (Andrews 2000,
Econometrica 68:399): there the 90 % intervals of a small study covered exponents in 73 to 93 % and the floor in 77 to 80 % of
repeats (LOG.md).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

DELTA = 1e-3  # Huber's, on log residuals, of a first fit (arXiv 2203.15556, section D.2)
EFFICIENT = 1.345  # Huber's delta in standard deviations at which 95 % of a Gaussian sample's information is used
LEVELS = (0.05, 0.95)
LARGEST_EXPONENT = 2.0  # of Hoffmann's grid of starts; beyond, a power tells one value of its input from all others, no more
SMALLEST_EXPONENT = 0.01  # below, a tenfold input changes its term by 2 %: next to no dependence
_EXPONENTS = np.geomspace(0.02, LARGEST_EXPONENT, 14)
_STARTS = 6
_TINY = 1e-6  # of the lowest loss: a coefficient that counts as 0


class TooFew(ValueError):
    """Too few points, or different values of an input, for the law."""


class Form(NamedTuple):
    """inputs: what the loss depends on. powers: (coefficient, input, exponent, shift or "") of each term; then the floor."""

    name: str
    inputs: tuple[str, ...]
    powers: tuple[tuple[str, str, str, str], ...]
    floor: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names in the order of a fit's vector: coefficients, floor, exponents, shifts."""
        columns = list(zip(*self.powers, strict=True))
        return (*columns[0], *(("E",) if self.floor else ()), *columns[2], *filter(None, columns[3]))


FORMS = {
    form.name: form
    for form in (
        Form("power", ("compute",), (("A", "compute", "a", ""),), False),
        Form("floor", ("compute",), (("A", "compute", "a", ""),), True),
        Form("shifted", ("compute",), (("A", "compute", "a", "d"),), True),
        Form("surface", ("size", "data"), (("A", "size", "alpha", ""), ("B", "data", "beta", "")), True),
    )
}


class LawFit(NamedTuple):
    """A fitted law. parameters: natural values by name; draws: the bootstrap's, [resamples, parameters], maybe none.

    residuals: log(predicted) - log(loss). leverage: 0 to 1, how far the law follows each point. ranges: (lowest, highest) of
    each input. loss_range: of the losses fitted.
    """

    form: Form
    parameters: dict[str, float]
    draws: Float[np.ndarray, "R P"]
    residuals: Float[np.ndarray, " N"]
    leverage: Float[np.ndarray, " N"]
    r_squared: float
    ranges: dict[str, tuple[float, float]]
    loss_range: tuple[float, float]

    def predict(self, **inputs) -> np.ndarray:
        """Loss at these inputs (numbers or arrays), in the fit's units. ValueError for inputs that are not positive."""
        return np.asarray(_natural_loss(self.form, np.array([*self.parameters.values()])[None], inputs)[0])

    def predict_interval(self, **inputs) -> tuple[np.ndarray, np.ndarray]:
        """90 % interval of the law's value there: of the curve, not of a run, whose own scatter is in `residuals`."""
        low, high = np.quantile(self.predict_draws(**inputs), LEVELS, axis=0)
        return np.asarray(low), np.asarray(high)

    def predict_draws(self, **inputs) -> np.ndarray:
        """Loss by each draw of the bootstrap, [resamples, ...]. ValueError for a fit without."""
        self.need_draws()
        return _natural_loss(self.form, self.draws, inputs)

    def interval(self, name: str) -> tuple[float, float]:
        """90 % interval of a parameter."""
        self.need_draws()
        if name not in self.form.parameters:
            raise ValueError(f"name: {name!r}; the {self.form.name} law has {', '.join(self.form.parameters)}")
        low, high = np.quantile(self.draws[:, self.form.parameters.index(name)], LEVELS)
        return float(low), float(high)

    def weak(self) -> dict[str, str]:
        """{parameter: why} of those that the data hardly determine."""
        found, inputs = {}, {power[2]: power[1] for power in self.form.powers}
        for name in self.form.parameters if len(self.draws) else ():
            low, high = self.interval(name)
            steep = name in inputs and max(self.parameters[name], high) > 0.99 * LARGEST_EXPONENT
            flat = name in inputs and min(self.parameters[name], low) < SMALLEST_EXPONENT
            if steep and flat:
                found[name] = "any exponent fits as well"
            elif steep:
                found[name] = "its interval reaches the largest exponent allowed"
            elif flat:
                found[name] = f"a loss that does not depend on {inputs[name]} fits as well"
            elif name == "E":
                lowest = self.loss_range[0]
                if low <= 0.01 * lowest:
                    found[name] = "a floor of zero fits as well"
                elif high - low > 0.5 * lowest:
                    found[name] = "its interval is wider than half of the lowest loss"
            elif high > (2 if name in inputs else 3) * max(low, 1e-300):
                found[name] = f"known to a factor of {high / max(low, 1e-300):.3g} only"
        return found

    def sentence(self) -> str:
        """The law, with intervals, and in words what is weakly identified."""
        texts = []
        for name, value in self.parameters.items():
            text = f"{name} = {value:.4g}"
            if len(self.draws):
                text += " ({:.4g} to {:.4g})".format(*self.interval(name))
            texts.append(text)
        weak = "; ".join(f"{name} is weakly identified: {why}" for name, why in self.weak().items())
        return f"{', '.join(texts)}; R^2 = {self.r_squared:.4f} on log axes" + (f"; {weak}" if weak else "") + "."

    def need_draws(self) -> None:
        """ValueError for a fit without."""
        if not len(self.draws):
            raise ValueError("resamples: this law was fitted with 0; an interval needs more")


def fit_law(
    form: str, loss: Float[np.ndarray, " N"], groups: Sequence | np.ndarray | None = None, *, resamples: int = 0, seed: int = 0,
    delta: float | None = None, **inputs: np.ndarray,
) -> LawFit:  # fmt: skip
    """Fit the law called `form`; inputs by name, `compute` or `size` and `data`.

    groups: of each point, the model that it is of; resamples are drawn within each (None: from all). delta: Huber's, None for
    that of the module's head; infinite is least squares. ValueError for an unknown form or input, values that have no
    logarithm; TooFew, which is one, for fewer than one point more than there are parameters, and for an input with too few
    different values to tell its exponent from the floor.
    """
    if form not in FORMS:
        raise ValueError(f"form: {form!r}; allowed: {', '.join(FORMS)}")
    shape = FORMS[form]
    if set(inputs) != set(shape.inputs):
        raise ValueError(f"inputs: {', '.join(inputs) or 'none'}; the {form} law takes {', '.join(shape.inputs)}")
    if delta is not None and not delta > 0:
        raise ValueError(f"delta: {delta}; allowed: above 0, or None")
    if resamples < 0:
        raise ValueError(f"resamples: {resamples}; allowed: 0 or more")
    values = {name: _positive(name, inputs[name]) for name in shape.inputs}
    loss = _positive("loss", loss)
    for name, value in (values | ({} if groups is None else {"groups": np.asarray(groups)})).items():
        if value.shape != loss.shape:
            raise ValueError(f"{name} has shape {value.shape} but loss {loss.shape}")
    if len(loss) <= len(shape.parameters):
        raise TooFew(f"points: {len(loss)}; the {form} law needs {len(shape.parameters) + 1} or more")
    for _, name, _, shift in shape.powers:
        found, needed = len(np.unique(values[name])), 2 + bool(shift) + shape.floor
        if found < needed:
            raise TooFew(f"{name}: {found} different value(s); the {form} law needs {needed} or more to tell its exponent")
    # Inputs in units of their geometric means: else coefficients and exponents move together.
    middles = {name: float(np.exp(np.log(value).mean())) for name, value in values.items()}
    scaled = {name: value / middles[name] for name, value in values.items()}
    first = DELTA if delta is None else delta
    once = np.ones((1, len(loss)))
    starts = _grid_fits(shape, scaled, loss, once)[0][:, 0]
    near = _huber(_log_loss(shape, starts, scaled)[0] - np.log(loss), first).sum(1)
    starts = starts[np.argsort(near, kind="stable")[:_STARTS]]
    thetas, costs = _polish(shape, scaled, np.log(loss), once.repeat(len(starts), 0), starts, first)
    if delta is None:
        delta = _efficient_delta(_log_loss(shape, thetas[np.argmin(costs)][None], scaled)[0][0] - np.log(loss), shape)
        thetas, costs = _polish(shape, scaled, np.log(loss), once.repeat(len(thetas), 0), thetas, delta)
    best = thetas[np.argmin(costs)]
    draws = np.empty((0, len(shape.parameters)))
    if resamples:
        weights = _resampled(len(loss), groups, resamples, np.random.default_rng(seed))
        fits, near = _grid_fits(shape, scaled, loss, weights)
        inside = np.where((fits[..., : len(shape.powers) + shape.floor] > np.log(2 * _TINY * loss.min())).all(-1), near, np.inf)
        rows = np.arange(resamples)
        begins = [np.repeat(best[None], resamples, axis=0), fits[near.argmin(0), rows], fits[inside.argmin(0), rows]]
        runs = [_polish(shape, scaled, np.log(loss), weights, begin, delta) for begin in begins]
        drawn = np.stack([theta for theta, _ in runs])[np.argmin([cost for _, cost in runs], axis=0), rows]
        # Of a coefficient that vanishes in one of the two the difference of logarithms is any number.
        drawn += (_widening(len(loss), len(best), groups) - 1) * np.clip(drawn - best, -1, 1)
        draws = _natural(shape, np.minimum(drawn, _highest(shape)), middles)
    (predicted,), (jacobian,) = _log_loss(shape, best[None], scaled)
    residuals, spread = predicted - np.log(loss), np.log(loss) - np.log(loss).mean()
    leverage = np.einsum("np,pn->n", jacobian, np.linalg.pinv(jacobian)).clip(0, 1)
    return LawFit(
        shape, dict(zip(shape.parameters, map(float, _natural(shape, best[None], middles)[0]), strict=True)), draws,
        residuals, leverage, float(1 - np.sum(residuals**2) / np.sum(spread**2)) if np.ptp(loss) else float("nan"),
        {name: (float(value.min()), float(value.max())) for name, value in values.items()},
        (float(loss.min()), float(loss.max())),
    )  # fmt: skip


def _efficient_delta(residuals: np.ndarray, form: Form) -> float:
    freedom = len(residuals) / (len(residuals) - len(form.parameters))
    deviation = 1.4826 * np.median(np.abs(residuals)) * np.sqrt(freedom)
    return max(EFFICIENT * float(deviation), 1e-9)


def _positive(name: str, values) -> np.ndarray:
    try:
        values = np.asarray(values, float)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must hold numbers, but holds {values!r:.60}") from None
    if values.ndim != 1:
        raise ValueError(f"{name} must have one dimension, but has shape {values.shape}")
    if bad := [float(value) for value in values.ravel() if not (np.isfinite(value) and value > 0)]:
        raise ValueError(f"{name} must be finite and positive for a fit on log axes, but holds {bad[:5]}")
    return values


def _resampled(count: int, groups, resamples: int, generator: np.random.Generator) -> Float[np.ndarray, "R N"]:
    """How often each resample holds each point."""
    labels = np.zeros(count, int) if groups is None else np.unique(np.asarray(groups, str), return_inverse=True)[1]
    weights = np.zeros((resamples, count))
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        weights[:, members] = generator.multinomial(
            len(members), np.full(len(members), 1 / len(members)), size=resamples
        )
    return weights


def _widening(count: int, parameters: int, groups) -> float:
    """By how much a bootstrap's draws are too narrow: residuals are smaller than errors by the parameters fitted to them, and
    draws within small groups vary less than new points would (Davison and Hinkley 1997, section 2.3 and 6.2)."""
    own = count / (1 if groups is None else len(np.unique(np.asarray(groups, str))))
    return float(np.sqrt(count / (count - parameters) * (own / (own - 1) if own > 1 else 1)))


# A fit's vector holds logarithms of coefficients, floor, exponents and shifts, all positive, in scaled inputs.


def _log_loss(form: Form, theta: np.ndarray, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(log loss [R, N], its derivative by theta [R, N, P])."""
    place = {name: index for index, name in enumerate(form.parameters)}
    count = len(next(iter(inputs.values())))
    logs, slopes = [], []
    for coefficient, name, exponent, shift in form.powers:
        power = np.exp(theta[:, place[exponent], None])
        own = np.zeros((len(theta), count, len(place)))
        moved = inputs[name] + (np.exp(theta[:, place[shift], None]) if shift else 0.0)
        logs.append(theta[:, place[coefficient], None] - power * np.log(moved))
        own[..., place[coefficient]] = 1
        own[..., place[exponent]] = -power * np.log(moved)
        if shift:
            own[..., place[shift]] = -power * np.exp(theta[:, place[shift], None]) / moved
        slopes.append(own)
    if form.floor:
        logs.append(np.broadcast_to(theta[:, place["E"], None], (len(theta), count)))
        own = np.zeros((len(theta), count, len(place)))
        own[..., place["E"]] = 1
        slopes.append(own)
    stacked = np.stack(np.broadcast_arrays(*logs))
    top = stacked.max(0)
    parts = np.exp(stacked - top)
    total = parts.sum(0)
    return top + np.log(total), sum((part / total)[..., None] * slope for part, slope in zip(parts, slopes, strict=True))


def _grid_fits(
    form: Form, inputs: Mapping[str, np.ndarray], loss: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """At every point of a grid of exponents and shifts the coefficients, not negative, that variable projection finds for each
    row of weights [R, N], by least squares of relative errors: (theta [G, R, P], cost [G, R])."""
    shifts = [np.geomspace(1e-3, 1e3, 13) * inputs[name].min() if shift else [0.0] for _, name, _, shift in form.powers]
    axes = [axis for pair in zip([_EXPONENTS] * len(form.powers), shifts, strict=True) for axis in pair]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    columns = [
        (inputs[name] + shift[:, None]) ** -exponent[:, None]
        for (_, name, _, _), exponent, shift in zip(form.powers, grid[:, ::2].T, grid[:, 1::2].T, strict=True)
    ]
    basis = np.stack([*columns, *([np.ones_like(columns[0])] if form.floor else [])], -1) / loss[:, None]
    coefficients, costs = _projected(basis, weights)
    kept = [1 + 2 * index for index, power in enumerate(form.powers) if power[3]]
    fixed = grid[:, None, [*range(0, len(axes), 2), *kept]].repeat(len(weights), 1)
    return np.log(np.concatenate([np.maximum(coefficients, _TINY * loss.min()), fixed], axis=-1)), costs


def _projected(basis: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative least squares of 1 = basis [G, N, K] @ coefficients for each row of weights [R, N], by trying every set of
    coefficients that are not 0: (coefficients [G, R, K], cost [G, R])."""
    gram, hits = np.einsum("rn,gnk,gnl->grkl", weights, basis, basis, optimize=True), np.matmul(weights, basis)
    best, total = np.zeros(hits.shape), weights.sum(1)
    cost = np.broadcast_to(total, hits.shape[:2]).copy()
    count = basis.shape[-1]
    for chosen in itertools.chain(*(itertools.combinations(range(count), size) for size in range(1, count + 1))):
        part = np.array(chosen)
        own = gram[..., part[:, None], part]
        ridge = 1e-12 * np.einsum("grkk->gr", own)[..., None, None] * np.eye(len(part))
        found = np.linalg.solve(own + ridge, hits[..., part, None])[..., 0]
        value = total - (found * hits[..., part]).sum(-1)
        better = (found >= 0).all(-1) & (value < cost)
        cost[better] = value[better]
        chosen_only = np.zeros(hits.shape)
        chosen_only[..., part] = found
        best[better] = chosen_only[better]
    return best, cost


def _huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def _polish(
    form: Form, inputs: Mapping[str, np.ndarray], log_loss: np.ndarray, weights: np.ndarray, theta: np.ndarray,
    delta: float, rounds: int = 300,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Reweighted Levenberg-Marquardt from each row of theta under each row of weights, all at once: (theta, cost)."""
    theta, damping = theta.copy(), np.full(len(theta), 1e-3)
    highest = _highest(form)
    predicted, jacobian = _log_loss(form, theta, inputs)
    cost = (weights * _huber(predicted - log_loss, delta)).sum(1)
    active, small = np.ones(len(theta), bool), np.zeros(len(theta), int)
    for _ in range(rounds):
        rows = np.flatnonzero(active)
        if not len(rows):
            break
        residual = predicted[rows] - log_loss
        weight = weights[rows] * np.minimum(1, delta / np.maximum(np.abs(residual), 1e-300))
        j = jacobian[rows]
        curvature = np.einsum("rnp,rn,rnq->rpq", j, weight, j)
        slope = np.einsum("rnp,rn->rp", j, weight * residual)
        diagonal = np.einsum("rpp->rp", curvature)
        floor = 1e-12 * np.maximum(diagonal.max(1, keepdims=True), 1e-300)
        system = curvature + np.einsum("rp,pq->rpq", damping[rows, None] * diagonal + floor, np.eye(theta.shape[1]))
        step = np.clip(np.linalg.solve(system, -slope[..., None])[..., 0], -2, 2)
        tried = np.minimum(theta[rows] + step, highest)
        new_predicted, new_jacobian = _log_loss(form, tried, inputs)
        new_cost = (weights[rows] * _huber(new_predicted - log_loss, delta)).sum(1)
        better = new_cost < cost[rows]
        gained = rows[better]
        small[rows] += np.where(cost[rows] - new_cost < 1e-9 * cost[rows], 1, -small[rows])
        theta[gained], cost[gained] = tried[better], new_cost[better]
        predicted[gained], jacobian[gained] = new_predicted[better], new_jacobian[better]
        damping[rows] = np.where(better, np.maximum(damping[rows] / 4, 1e-10), damping[rows] * 5)
        active[rows] = (small[rows] < 8) & (damping[rows] < 1e8)
    return theta, cost


def _highest(form: Form) -> np.ndarray:
    """What a fit's vector may be at most."""
    highest = np.full(len(form.parameters), np.inf)
    highest[[form.parameters.index(power[2]) for power in form.powers]] = np.log(LARGEST_EXPONENT)
    return highest


def _natural(form: Form, theta: np.ndarray, middles: Mapping[str, float]) -> np.ndarray:
    """Parameters in the inputs' own units, from logarithms in scaled ones; a floor that is next to nothing is 0."""
    values = np.exp(theta)
    place = {name: index for index, name in enumerate(form.parameters)}
    if form.floor:
        floor = values[:, place["E"]]
        values[:, place["E"]] = np.where(floor > 1e-6 * values[:, : len(form.powers)].max(1), floor, 0.0)
    for coefficient, name, exponent, shift in form.powers:
        with np.errstate(over="ignore"):
            values[:, place[coefficient]] *= middles[name] ** values[:, place[exponent]]
        if shift:
            values[:, place[shift]] *= middles[name]
    return values


def _natural_loss(form: Form, values: np.ndarray, inputs: Mapping) -> np.ndarray:
    """Loss [R, ...] of natural parameters [R, P]."""
    arrays = dict(zip(inputs, np.broadcast_arrays(*(np.asarray(value, float) for value in inputs.values())), strict=True))
    if set(arrays) != set(form.inputs):
        raise ValueError(f"inputs: {', '.join(arrays) or 'none'}; the {form.name} law takes {', '.join(form.inputs)}")
    for name, value in arrays.items():
        if not (np.isfinite(value) & (value > 0)).all():
            raise ValueError(f"{name} must be finite and positive, but holds {value[~(np.isfinite(value) & (value > 0))][:5]}")
    place = {name: index for index, name in enumerate(form.parameters)}
    shape = (len(values),) + (1,) * next(iter(arrays.values())).ndim

    def column(name: str) -> np.ndarray:
        return values[:, place[name]].reshape(shape)

    total = column("E") if form.floor else 0.0
    for coefficient, name, exponent, shift in form.powers:
        moved = arrays[name] + (column(shift) if shift else 0.0)
        total = total + column(coefficient) * moved ** -column(exponent)
    return np.asarray(total)
