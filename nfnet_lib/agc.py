"""Adaptive gradient clipping (arXiv 2102.06171 section 4.1), with units named rather than guessed from the rank.

optax.adaptive_grad_clip infers the unit of a parameter from its rank, which is silently wrong on parameters stacked
over blocks. Here a stacked parameter is clipped block by block.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Path = tuple[str, ...]


def is_stacked(path: Path) -> bool:
    """Whether the parameter at `path` of this library's models has a leading axis of blocks."""
    return "rest" in path or "blocks" in path


def is_head_weight(path: Path) -> bool:
    """Whether `path` is the classifier's weight, the one parameter that is not clipped."""
    return path == ("head", "w")


def adaptive_gradient_clip(
    clip: float = 0.01,
    eps: float = 1e-3,
    *,
    stacked: Callable[[Path], bool] = is_stacked,
    exclude: Callable[[Path], bool] = is_head_weight,
) -> optax.GradientTransformation:
    """Scale each unit's gradient down to norm clip * max(norm of its parameters, eps) where it is larger.

    The unit of a convolution (HWIO) and of a dense weight (IO) is an output channel; of a vector or scalar, the whole, also
    where a ViT's class token or probe, [1, 1, D], is one.
    stacked, exclude: functions of a parameter's path. Defaults: the paper's lambda 0.01 and epsilon 1e-3, head weight
    excluded (experiment_nfnets.py).
    """

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("params: adaptive_gradient_clip needs the parameters in update()")

        def one(path, grad, param):
            path = tuple(str(p.key) for p in path)
            if exclude(path):
                return grad
            first = int(stacked(path))
            vector = grad.ndim < first + 2 or (path[-1] != "w" and math.prod(grad.shape[first:-1]) == 1)
            return _clip(grad, param, clip, eps, tuple(range(first, grad.ndim - (not vector))))

        return jax.tree_util.tree_map_with_path(one, grads, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _clip(
    grad: Float[Array, "..."], param: Float[Array, "..."], clip: float, eps: float, axes: tuple[int, ...]
) -> Float[Array, "..."]:
    """axes: of a unit."""

    def norm(x):
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))

    largest = clip * jnp.maximum(norm(param), eps)
    size = norm(grad)
    return jnp.where(size > largest, grad * (largest / jnp.maximum(size, 1e-6)), grad)
