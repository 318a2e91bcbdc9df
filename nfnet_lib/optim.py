"""The paper's optimizer: adaptive gradient clipping, coupled weight decay, Nesterov momentum; warm-up and cosine; EMA.

And AdamW, for the Vision Transformers that it is compared with.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Num, PyTree

from nfnet_lib.agc import adaptive_gradient_clip


def decay_mask(params: PyTree) -> PyTree:
    """True for the parameters that weight decay acts on: weights, not gains, biases and positions (experiment_nfnets.py)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: str(path[-1].key) == "w", params)


def make_optimizer(
    learning_rate: float | int | optax.Schedule | None = None,
    *,
    momentum: float | int = 0.9,
    weight_decay: float | int = 0.0,
    agc_clip: float = 0.01,
    agc_eps: float = 1e-3,
) -> optax.GradientTransformation:
    """Clip (AGC, not the head weight), add weight_decay * weights, Nesterov momentum, times -learning_rate.

    The order of the released SGD_AGC (nfnets/optim.py). learning_rate None leaves the last factor to the caller: the
    train step multiplies by `warmup_cosine`, so that one compiled step serves any learning rate and length.
    """
    steps = [
        adaptive_gradient_clip(agc_clip, agc_eps),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.trace(momentum, nesterov=True),
    ]
    if learning_rate is not None:
        steps.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*steps)


def make_adamw(
    *, b1: float | int = 0.9, b2: float | int = 0.999, weight_decay: float | int = 0.0, grad_clip: float | int = 1.0
) -> optax.GradientTransformation:
    """Clip the gradient's global norm to grad_clip, Adam, add weight_decay * weights; times -learning_rate by the caller.

    Weight decay is decoupled from the moments but multiplied by the learning rate (arXiv 1711.05101 as in optax).
    """
    return optax.chain(
        optax.clip_by_global_norm(grad_clip),
        optax.scale_by_adam(b1=b1, b2=b2),
        optax.add_decayed_weights(weight_decay, decay_mask),
    )


def warmup_cosine(
    step: Num[Array, ""] | int, peak_lr: Num[Array, ""] | float, warmup_steps: Num[Array, ""] | int,
    total_steps: Num[Array, ""] | int,
) -> Float[Array, ""]:  # fmt: skip
    """Learning rate of update `step` (from 0): linear from 0 over warmup_steps, then a cosine to 0 at total_steps.

    The horizon is the run's own length (arXiv 2310.16764 section 2): a run is not a prefix of a longer one.
    """
    step, warmup, total = (jnp.asarray(x, jnp.float32) for x in (step, warmup_steps, total_steps))
    rising = step / jnp.maximum(warmup, 1)
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1), 0, 1)
    return peak_lr * jnp.where(step < warmup, rising, 0.5 * (1 + jnp.cos(jnp.pi * progress)))


def update_ema(ema: PyTree, params: PyTree, step: Array, decay: float) -> PyTree:
    """Moving average after update number `step` (from 0); the decay grows as (1 + t) / (10 + t) up to `decay`."""
    t = jnp.asarray(step, jnp.float32)
    rate = jnp.minimum(decay, (1 + t) / (10 + t))
    return jax.tree.map(lambda e, p: e * rate + p * (1 - rate), ema, params)
