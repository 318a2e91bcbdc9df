"""Losses of one label, several, or a mixture of labels an example, and top-k hits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def softmax_cross_entropy(
    logits: Float[Array, "B K"],
    labels: Int[Array, " B *L"],
    label_smoothing: float | int = 0.0,
    label_weights: Float[Array, "B L"] | None = None,
) -> Float[Array, " B"]:
    """Loss of each example in nats; label_smoothing spreads that share of the target evenly over all K classes.

    labels [B], or [B, L] with label_weights: the target gives labels[b, l] the probability label_weights[b, l].
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    target = _weighted(log_probabilities, labels, label_weights)
    return -(1 - label_smoothing) * target - label_smoothing * jnp.mean(log_probabilities, axis=-1)


def sigmoid_cross_entropy(
    logits: Float[Array, "B K"], labels: Int[Array, " B *L"], label_weights: Float[Array, "B L"] | None = None
) -> Float[Array, " B"]:
    """Sum over all K classes of the binary loss of each, in nats (big_vision's sigmoid_xent).

    Arguments as in `softmax_cross_entropy`; the target of a class that is not among an example's labels is 0.
    """
    logits = logits.astype(jnp.float32)
    return jnp.sum(jax.nn.softplus(logits), axis=-1) - _weighted(logits, labels, label_weights)


def _weighted(scores, labels, label_weights):
    """Sum of each example's scores at its labels."""
    if labels.ndim == 1:
        labels = labels[:, None]
    own = jnp.take_along_axis(scores, labels, axis=-1)
    return jnp.sum(own if label_weights is None else own * label_weights, axis=-1)


def in_top(
    logits: Float[Array, "B K"], labels: Int[Array, " B *L"], k: int, label_weights: Float[Array, "B L"] | None = None
) -> Bool[Array, " B"]:
    """Whether fewer than k classes score at least as high as the label's; a tie counts against the model.

    Of several labels with a weight above 0, one suffices.
    """
    if labels.ndim == 1:
        labels = labels[:, None]
    own = jnp.take_along_axis(logits, labels, axis=-1)
    hits = jnp.sum(~(logits[:, None, :] < own[:, :, None]), axis=-1) <= k
    hits &= ~jnp.isnan(own)  # of scores that are no numbers none is a hit, of however few
    return jnp.any(hits if label_weights is None else hits & (label_weights > 0), axis=-1)
