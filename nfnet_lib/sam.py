"""Sharpness-aware minimisation (arXiv 2010.01412) as one pure gradient function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

LossFunction = Callable[[PyTree, Any, Key[Array, ""]], tuple[Array, Any]]


def sam_gradient(
    loss_fn: LossFunction, params: PyTree, batch: Any, key: Key[Array, ""], rho: float | int
) -> tuple[tuple[Array, Any], PyTree]:
    """((clean loss, clean aux), gradient at params + rho * g / ||g||), where g is the gradient at params.

    loss_fn(params, batch, key) -> (scalar loss, aux). The norm is over all parameters together. Both passes see the
    same batch (another one destroys the benefit, arXiv 2102.06171 A.4); their dropout keys differ. rho = 0 is the
    plain gradient, computed once; a zero gradient perturbs nothing.
    """
    if rho < 0:
        raise ValueError(f"rho: {rho} is negative; allowed: 0 or more")
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if rho == 0:
        return gradient(params, batch, key)

    def one_pass(carry, key):
        point, _ = carry
        value, grads = gradient(point, batch, key)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))
        scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
        return (jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), params, grads), grads), value

    # A loop over the two passes, so that the gradient is compiled once.
    start = (params, jax.tree.map(jnp.zeros_like, params))
    (_, grads), values = jax.lax.scan(one_pass, start, jax.random.split(key))
    return jax.tree.map(lambda value: value[0], values), grads
