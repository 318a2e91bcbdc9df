"""One training step and one evaluation step: pure functions, compiled and sharded elsewhere (train.py)."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt8

from nfnet_lib.augment import MEAN_RGB, STDDEV_RGB
from nfnet_lib.convolution import backend
from nfnet_lib.loader import Examples
from nfnet_lib.losses import in_top, sigmoid_cross_entropy, softmax_cross_entropy
from nfnet_lib.models import Model, Params
from nfnet_lib.nfnet import WHOLE
from nfnet_lib.optim import update_ema, warmup_cosine
from nfnet_lib.sam import sam_gradient
from nfnet_lib.sharding import DATA, replicated

CALIBRATION_BINS = 15


class TrainState(NamedTuple):
    """step: updates made. ema: the moving average of params, or None."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None


class Schedule(NamedTuple):
    """What differs between runs that share one compiled step: data, not constants of the program."""

    peak_lr: Float[Array, ""]
    warmup_steps: Int[Array, ""]
    total_steps: Int[Array, ""]


def normalise(images: UInt8[Array, "B H W 3"], pixels: str = "imagenet") -> Float[Array, "B H W 3"]:
    """Bytes to zero mean and unit variance by ImageNet's channel statistics; pixels "unit": to [-1, 1] (big_vision)."""
    if pixels == "unit":
        return images.astype(jnp.float32) / 127.5 - 1
    return (images.astype(jnp.float32) - jnp.asarray(MEAN_RGB)) / jnp.asarray(STDDEV_RGB)


def init_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    ema: bool,
    head_bias: float | int = 0.0,
) -> TrainState:
    """Step 0. head_bias: where the biases of the head start."""
    params = model.init(key)
    params["head"]["b"] = params["head"]["b"] + head_bias
    return TrainState(jnp.int32(0), params, optimizer.init(params), jax.tree.map(jnp.copy, params) if ema else None)


def train_step(
    state: TrainState, examples: Examples, schedule: Schedule, key: Key[Array, ""], *, model: Model,
    optimizer: optax.GradientTransformation, loss: str, label_smoothing: float, rho: float, ascent_fraction: float,
    ema_decay: float, mesh: Mesh | None = None, per_device: bool = False, placed: Params | None = None,
) -> tuple[TrainState, dict[str, Array]]:  # fmt: skip
    """The state after one update, and {"loss", "lr", "grad_norm"} of it: the mean over the examples of weight 1.

    key: of the run; the step is folded in here. loss: "softmax" or "sigmoid". mesh: the devices among which the examples are
    split; None or one device: no more to say. per_device: with SAM each perturbs by its own part's gradient (m-SAM) and draws
    its own dropout; otherwise the numbers are those of one device. placed: shardings of the parameters.
    """
    spread = mesh is not None and mesh.size > 1
    sam = rho > 0
    axis_name = DATA if spread and (per_device or not sam) else None

    def loss_fn(weights, examples, key, part):
        with jax.named_scope("input"):
            images = normalise(examples.images)
        if sam:
            logits = model.apply(weights, images, train=True, key=key)
        else:
            logits = model.apply_standardised(weights, images, train=True, key=key, part=part)
        with jax.named_scope("loss"):
            each = example_loss(logits, examples, loss, label_smoothing)
        weight = jnp.sum(examples.weights)
        if axis_name is not None:  # a mean over all examples is the mean over devices of what each has of the sum
            weight = jax.lax.pmean(weight, axis_name)
        return jnp.sum(each * examples.weights) / jnp.where(weight > 0, weight, 1), None

    def gradient(weights, examples, key):
        part = WHOLE
        if axis_name is not None:
            part = (jax.lax.axis_index(axis_name), mesh.size)
            key = jax.random.fold_in(key, part[0]) if sam else key
        own_loss = functools.partial(loss_fn, part=part)
        return sam_gradient(own_loss, weights, examples, key, rho, ascent_fraction=ascent_fraction, axis_name=axis_name)

    if axis_name is not None:
        own, shared = PartitionSpec(axis_name), PartitionSpec()
        gradient = jax.shard_map(gradient, mesh=mesh, in_specs=(shared, own, shared), out_specs=shared)
    weights, pull = state.params, None
    if not sam:  # weights are standardised once a step and where they lie; SAM's second pass has others
        weights, pull = jax.vjp(model.standardised, state.params)
        weights = model.narrowed(weights)
        if placed is not None:
            weights = jax.lax.with_sharding_constraint(weights, placed)
    if spread:  # gathered here where the state is split, or XLA may split the model's channels
        weights = jax.lax.with_sharding_constraint(weights, replicated(mesh))
        weights = jax.tree.map(_laid_out, weights) if backend() == "tpu" else weights
    (value, _), grads = gradient(weights, examples, jax.random.fold_in(key, state.step))
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    if placed is not None:
        grads = jax.lax.with_sharding_constraint(grads, placed)
    if pull is not None:
        (grads,) = pull(grads)
    lr = warmup_cosine(state.step, *schedule)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        ema = update_ema(state.ema, params, state.step, ema_decay) if state.ema is not None else None
    metrics = {"loss": value, "lr": lr, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def _laid_out(w: Array) -> Array:
    """Stacked matrices, and weights of grouped 3x3 convolutions, laid out in memory as the loop over blocks wants them.

    As they are gathered from the devices a block's part may be strided or not a whole number of tiles: ViT-g/14 pays a quarter
    for that, F7 4% (LOG.md).
    """
    if w.ndim == 3:
        return with_layout_constraint(w, Layout(major_to_minor=(0, 1, 2)))
    grouped = w.ndim == 5 and w.shape[1] > 1 and w.shape[3] < w.shape[4]
    return with_layout_constraint(w, Layout(major_to_minor=(0, 1, 2, 4, 3))) if grouped else w


def eval_step(
    params: Params, examples: Examples, *, model: Model, loss: str = "softmax", pixels: str = "imagenet"
) -> dict[str, Array]:
    """Weighted sums over the batch: loss in nats, top-1 and top-5 hits, and the weight itself (0 for padding); labelled: the
    weight of examples with a label, which alone can be hits. A sigmoid loss has others, too.

    calibration [CALIBRATION_BINS]: of the examples in each bin of the top class's probability, the sum of that probability
    minus the hits; the expected calibration error is the sum of its magnitudes over that of the weights
    (Guo et al., arXiv 1706.04599). pixels: of `normalise`.
    """
    logits = model.apply(params, normalise(examples.images, pixels))
    labelled = jnp.any(examples.label_weights > 0, axis=-1)
    each = {
        "loss": example_loss(logits, examples, loss, 0.0),
        "labelled": labelled.astype(examples.weights.dtype),
        "top1": in_top(logits, examples.labels, 1, examples.label_weights),
        "top5": in_top(logits, examples.labels, 5, examples.label_weights),
        "examples": jnp.ones_like(examples.weights),
    }
    sums = {name: jnp.sum(value * examples.weights) for name, value in each.items()}
    confidence = jnp.max(jax.nn.softmax(logits) if loss == "softmax" else jax.nn.sigmoid(logits), axis=-1)
    bins = jnp.minimum(jnp.floor(confidence * CALIBRATION_BINS), CALIBRATION_BINS - 1)
    member = bins[:, None] == jnp.arange(CALIBRATION_BINS)
    return sums | {"calibration": ((confidence - each["top1"]) * examples.weights * labelled) @ member}


def means_of(sums: Mapping[str, Any]) -> dict[str, float]:
    """loss, top1, top5 and ece of sums of `eval_step` over a set: the loss of all examples, the others of those with labels."""
    labelled = max(float(sums["labelled"]), 1.0)
    means = {name: float(sums[name]) / labelled for name in ("top1", "top5")}
    return {"loss": float(sums["loss"] / sums["examples"])} | means | {"ece": float(abs(sums["calibration"]).sum()) / labelled}


def example_loss(
    logits: Float[Array, "B K"], examples: Examples, loss: str, label_smoothing: float | int
) -> Float[Array, " B"]:
    """Loss of each example in nats, "softmax" (with label smoothing) or "sigmoid"."""
    if loss == "sigmoid":
        return sigmoid_cross_entropy(logits, examples.labels, examples.label_weights)
    return softmax_cross_entropy(logits, examples.labels, label_smoothing, examples.label_weights)
