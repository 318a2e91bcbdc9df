"""Sharpness-aware minimisation (arXiv 2010.01412) as one pure gradient function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

LossFunction = Callable[[PyTree, Any, Key[Array, ""]], tuple[Array, Any]]


def sam_gradient(
    loss_fn: LossFunction, params: PyTree, batch: Any, key: Key[Array, ""], rho: float | int, *,
    ascent_fraction: float | int = 1.0, axis_name: str | None = None, synchronised: bool = False,
) -> tuple[tuple[Array, Any], PyTree]:  # fmt: skip
    """((clean loss, clean aux), gradient at params + rho * g / ||g||), where g is the gradient at params.

    loss_fn(params, batch, key) -> (scalar loss, aux). The norm is over all parameters together. The passes' dropout keys
    differ. rho = 0 is the plain gradient, computed once; a zero gradient perturbs nothing.

    ascent_fraction: g comes from the first such share of the batch's rows, and the clean loss with it; 0.2 gave the same
    quality at 1.2 to 1.4 times the cost of a plain step (arXiv 2102.06171, A.4). The rows must be among those of the second
    pass: another batch destroys the benefit (ibid.).

    axis_name: of a `jax.shard_map` in which this runs, batch being the device's own. Each device then perturbs by its own g
    (m-SAM, as the 2021 recipe; better than synchronised, ibid. and arXiv 2010.01412, section 4.1) or, if synchronised, by the
    mean; gradient and loss are means over the axis, aux is the device's own. ValueError for what is out of range.
    """
    if rho < 0:
        raise ValueError(f"rho: {rho} is negative; allowed: 0 or more")
    if not 0 < ascent_fraction <= 1:
        raise ValueError(f"ascent_fraction: {ascent_fraction} is not in (0, 1]")
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def mean(tree: PyTree) -> PyTree:
        """Over the axis, in float32 whatever the gradient's own type (experiment_nfnets.py)."""
        if axis_name is None:
            return tree
        return jax.tree.map(lambda x: jax.lax.pmean(x.astype(jnp.float32), axis_name), tree)

    if axis_name is not None:  # or the gradient of what all devices share would be summed over them at once
        params = jax.tree.map(lambda p: jax.lax.pcast(p, axis_name, to="varying"), params)

    def perturbed(grads: PyTree) -> PyTree:
        grads = mean(grads) if synchronised else grads
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
        scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
        return jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), params, grads)

    if rho == 0:
        (loss, aux), grads = gradient(params, batch, key)
    elif ascent_fraction < 1:
        ascent_key, descent_key = jax.random.split(key)
        part = jax.tree.map(lambda x: x[: max(1, round(ascent_fraction * len(x)))], batch)
        (loss, aux), grads = gradient(params, part, ascent_key)
        _, grads = gradient(perturbed(grads), batch, descent_key)
    else:  # a loop over the two passes, so that the gradient is compiled once

        def one_pass(carry, key):
            value, grads = gradient(carry[0], batch, key)
            return (perturbed(grads), grads), value

        start = (params, jax.tree.map(jnp.zeros_like, params))
        (_, grads), values = jax.lax.scan(one_pass, start, jax.random.split(key))
        loss, aux = jax.tree.map(lambda value: value[0], values)
    return (mean(loss), aux), mean(grads)
