"""Softmax cross-entropy and top-k hits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def softmax_cross_entropy(
    logits: Float[Array, "B K"], labels: Int[Array, " B"], label_smoothing: float = 0.0
) -> Float[Array, " B"]:
    """Loss of each example in nats; label_smoothing spreads that share of the target evenly over all K classes."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    target = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    return -(1 - label_smoothing) * target - label_smoothing * jnp.mean(log_probabilities, axis=-1)


def in_top(logits: Float[Array, "B K"], labels: Int[Array, " B"], k: int) -> Bool[Array, " B"]:
    """Whether fewer than k classes score at least as high as the label's; a tie counts against the model."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    return jnp.sum(logits >= own, axis=-1) <= k
