"""NFNet: normaliser-free residual networks (Brock et al. 2021, arXiv 2102.06171; google-deepmind/deepmind-research nfnets/).

How this differs from the release, none of it in the numbers:
- The blocks of a stage after its first are one module whose parameters are stacked on a leading axis and applied by
  `jax.lax.scan`: one compiled body a stage, so compile time hardly grows with depth. `unroll` unrolls that scan;
  the parameter layout stays the same.
- Flax NNX defines the modules and nothing else; parameters live in a nested dict outside them (see `models.py`). A module
  only says how each parameter is drawn (`parameter`): `models.Model.init` draws all of them at once.
- "+" variants: the first stage's bottleneck is as published (192 channels), the released code's (128) is a setting.
- On CPU convolutions are computed as matrix products: XLA's CPU backend runs the gradients of its own convolution many
  times slower where that is grouped or inside a loop, as SAM's two passes are. Same parameters, same results to rounding.
- Weight standardisation and the head run in float32 whatever the activations' type.
- Squeeze-excite uses ReLU as the code does, not GELU as the paper's text says; stochastic depth does not rescale by
  the keep rate, as in the code (the residual branch's gain is learned).
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from nfnet_lib.variants import ALPHA, STAGE_STRIDES, STEM_CHANNELS, Variant

REMAT = ("none", "activations", "convs", "full")
_BACKEND: contextvars.ContextVar[str] = contextvars.ContextVar("backend", default="")

GELU_SCALE = 1.7015043497085571  # makes gelu variance-preserving on unit Gaussians (nfnets/base.py nonlinearities)


@contextlib.contextmanager
def for_backend(name: str) -> Iterator[None]:
    """Trace what is within for "cpu", "gpu" or "tpu", though it may be compiled on another: the forms of operations differ."""
    token = _BACKEND.set(name)
    try:
        yield
    finally:
        _BACKEND.reset(token)


def backend() -> str:
    """Of `for_backend`, or else jax's own."""
    return _BACKEND.get() or jax.default_backend()


def activation(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU (tanh form) scaled to preserve variance."""
    return jax.nn.gelu(x) * GELU_SCALE


# The same, of which the backward pass keeps the input alone: XLA fuses its recomputation with what it is multiplied with.
lean_activation = jax.checkpoint(activation, prevent_cse=False)


def standardise_weight(w: Float[Array, "H W I O"], gain: Float[Array, " O"]) -> Float[Array, "H W I O"]:
    """Scaled weight standardisation: each output unit's fan-in gets mean 0 and variance gain^2 / fan_in.

    The variance is floored so that variance * fan_in >= 1e-4 (nfnets/base.py WSConv2D).
    """
    flat = w.astype(jnp.float32).reshape(-1, w.shape[-1])
    centred = flat - _column_sums(flat) / len(flat)
    scale = jax.lax.rsqrt(jnp.maximum(_column_sums(centred**2), 1e-4)) * gain
    return (centred * scale).reshape(w.shape)


def _column_sums(x: Float[Array, "I O"]) -> Float[Array, " O"]:
    """Sums over the first axis; on CPU as a matrix product, which XLA runs faster than its reductions (LOG.md)."""
    return jnp.ones(len(x)) @ x if backend() == "cpu" else x.sum(0)


def convolve(
    x: Float[Array, "B H W I"], w: Float[Array, "KH KW IG O"], stride: int, groups: int
) -> Float[Array, "B H2 W2 O"]:
    """SAME convolution, NHWC by HWIO; on CPU as a matrix product (see the module's head)."""
    if backend() == "cpu":
        if w.shape[:2] == (1, 1) and stride == 1:
            return x @ w[0, 0]
        return grouped_matmul_convolve(x, w, stride, groups)
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def grouped_matmul_convolve(
    x: Float[Array, "B H W I"], w: Float[Array, "KH KW IG O"], stride: int, groups: int
) -> Float[Array, "B H2 W2 O"]:
    """The same convolution: the input shifted by each kernel tap, stacked to patches, times the weights of each group.

    Taps that would read nothing but padding (a 3x3 kernel on a 1x1 image has one real tap) are left out.
    """
    batch, height, width, channels = x.shape
    outputs = w.shape[-1]
    rows, top, bottom = _taps(height, w.shape[0], stride)
    columns, left, right = _taps(width, w.shape[1], stride)
    out_h, out_w = -(-height // stride), -(-width // stride)
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    shifted = [
        x[:, row : row + (out_h - 1) * stride + 1 : stride, column : column + (out_w - 1) * stride + 1 : stride]
        for _, row in rows
        for _, column in columns
    ]
    w = jnp.stack([w[i, j] for i, _ in rows for j, _ in columns])  # [T, I/G, O]
    patches = jnp.stack(shifted, axis=3).reshape(batch * out_h * out_w, len(shifted), groups, channels // groups)
    patches = patches.transpose(2, 0, 1, 3).reshape(groups, batch * out_h * out_w, -1)
    w = w.reshape(-1, groups, outputs // groups).transpose(1, 0, 2)
    out = jax.lax.batch_matmul(patches, w)  # [G, B*H2*W2, O/G]
    return out.transpose(1, 0, 2).reshape(batch, out_h, out_w, outputs)


def _taps(size: int, kernel: int, stride: int) -> tuple[list[tuple[int, int]], int, int]:
    """The kernel taps that read a pixel under SAME padding, as (tap, its start in the padded input); padding needed."""
    out = -(-size // stride)
    before = max((out - 1) * stride + kernel - size, 0) // 2
    last = (out - 1) * stride
    starts = {tap: tap - before for tap in range(kernel)}
    used = {tap: at for tap, at in starts.items() if any(0 <= at + i * stride < size for i in range(out))}
    low, high = max(0, -min(used.values())), max(0, max(used.values()) + last + 1 - size)
    return [(tap, at + low) for tap, at in used.items()], low, high


def parameter(shape: tuple[int, ...], *, std: float = 0.0, mean: float = 0.0) -> nnx.Param:
    """A float32 parameter whose initial values are normal with this mean and standard deviation, written on it."""
    return nnx.Param(jnp.full(shape, mean, jnp.float32), std=std, mean=mean)


class ScaledWSConv(nnx.Module):
    """Convolution with scaled weight standardisation, a gain and a bias for each output channel; SAME padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1):
        shape = (kernel, kernel, inputs // groups, outputs)
        self.w = parameter(shape, std=math.prod(shape[:-1]) ** -0.5)
        self.gain = parameter((outputs,), mean=1.0)
        self.bias = parameter((outputs,))
        self.stride, self.groups = stride, groups

    def __call__(
        self, x: Float[Array, "B H W I"], w: Float[Array, "KH KW IG O"] | None = None
    ) -> Float[Array, "B H2 W2 O"]:
        """w: the standardised weights, where they have been computed before."""
        if w is None:
            w = self.standardised(x.dtype)
        out = convolve(x, w, self.stride, self.groups) + self.bias[...].astype(x.dtype)
        return checkpoint_name(out, "conv")

    def standardised(self, dtype) -> Float[Array, "*D KH KW IG O"]:
        """Standardised weights; of stacked parameters, each by itself."""
        function = standardise_weight if self.w.ndim == 4 else jax.vmap(standardise_weight)
        return function(self.w[...], self.gain[...]).astype(dtype)


class Linear(nnx.Module):
    """Dense layer with bias; weights [I, O], drawn with standard deviation `std`, by default I**-0.5."""

    def __init__(self, inputs: int, outputs: int, *, std: float | None = None):
        self.w = parameter((inputs, outputs), std=inputs**-0.5 if std is None else std)
        self.b = parameter((outputs,))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return x @ self.w[...].astype(x.dtype) + self.b[...].astype(x.dtype)


class SqueezeExcite(nnx.Module):
    """Channel gates in (0, 1) from the spatial mean; hidden width half the channels, ReLU (nfnets/base.py)."""

    def __init__(self, channels: int):
        self.linear = Linear(channels, channels // 2)
        self.linear_1 = Linear(channels // 2, channels)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 C"]:
        hidden = jax.nn.relu(self.linear(x.mean((1, 2))))
        return jax.nn.sigmoid(self.linear_1(hidden))[:, None, None, :]


class Block(nnx.Module):
    """x -> shortcut(x) + alpha * skip_gain * branch(act(x) * beta); the branch is 1x1, 3x3, 3x3, 1x1, squeeze-excite.

    A transition block (first of a stage) has a 1x1 shortcut convolution on the activated input, after 2x2 average
    pooling where it strides. skip_gain starts at 0 (SkipInit), so a fresh network is its shortcut path.
    """

    def __init__(
        self, inputs: int, outputs: int, bottleneck: int, *, groups: int, stride: int, transition: bool, lean: bool
    ):  # fmt: skip
        self.conv0 = ScaledWSConv(inputs, bottleneck, 1)
        self.conv1 = ScaledWSConv(bottleneck, bottleneck, 3, stride=stride, groups=groups)
        self.conv1b = ScaledWSConv(bottleneck, bottleneck, 3, groups=groups)
        self.conv2 = ScaledWSConv(bottleneck, outputs, 1)
        if transition:
            self.conv_shortcut = ScaledWSConv(inputs, outputs, 1)
        self.squeeze_excite = SqueezeExcite(outputs)
        self.skip_gain = parameter(())
        self.stride, self.transition = stride, transition
        self.activation = lean_activation if lean else activation

    def __call__(
        self, x: Float[Array, "B H W I"], beta: float | Float[Array, ""], drop_mask: Float[Array, "B 1 1 1"] | None,
        weights: dict[str, Array] | None = None, signals: bool = False,
    ) -> tuple[Float[Array, "B H2 W2 O"], Float[Array, "3"] | None]:  # fmt: skip
        """The block's output and, with signals, its `signal_figures`.

        drop_mask: 1 keeps and 0 drops the branch of an example (stochastic depth), or None. weights: standardised weights of
        its convolutions by name, where they have been computed before.
        """
        weights = weights or {}
        out = self.activation(x) * jnp.asarray(beta, x.dtype)
        shortcut = x
        if self.transition:
            shortcut = self.conv_shortcut(average_pool(out) if self.stride > 1 else out)
        out = self.conv0(out, weights.get("conv0"))
        out = self.conv1(self.activation(out), weights.get("conv1"))
        out = self.conv1b(self.activation(out), weights.get("conv1b"))
        out = self.conv2(self.activation(out), weights.get("conv2"))
        branch = out * self.squeeze_excite(out) * 2
        out = branch
        if drop_mask is not None:
            out = out * drop_mask.astype(out.dtype)
        x = shortcut + out * (ALPHA * self.skip_gain[...]).astype(out.dtype)
        return x, signal_figures(x, jnp.mean(jnp.var(branch, axis=(0, 1, 2)))) if signals else None


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """2x2 mean with stride 2; at an odd edge the mean is over the pixels that exist (SAME, padding not counted).

    On CPU not lax.reduce_window: jax 0.10.2 gives wrong sums for it on 1x1 images in large batches. Elsewhere that is faster
    than a reshape and a sum, whose gradient is a broadcast of its own.
    """
    batch, height, width, channels = x.shape
    if backend() == "cpu":
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        total = x.reshape(batch, x.shape[1] // 2, 2, x.shape[2] // 2, 2, channels).sum((2, 4))
    else:
        zero = np.zeros((), x.dtype)
        total = jax.lax.reduce_window(x, zero, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    rows, columns = (np.minimum(2, n - 2 * np.arange(-(-n // 2))) for n in (height, width))
    return total / jnp.asarray(rows[:, None, None] * columns[:, None], x.dtype)


class Stage(nnx.Module):
    """A transition block, then `depth - 1` equal blocks whose parameters are stacked and scanned.

    betas: the reciprocal of the expected standard deviation at each block's input. The variance grows by alpha^2 a
    block and is reset by the shortcut convolution of each transition (arXiv 2102.06171 section 3).
    """

    def __init__(
        self, inputs: int, outputs: int, bottleneck: int, depth: int, *,
        groups: int, stride: int, first_beta: float, unroll: int, remat: str, hoist: bool | None,
    ):  # fmt: skip
        lean = remat == "activations"
        self.first = Block(inputs, outputs, bottleneck, groups=groups, stride=stride, transition=True, lean=lean)
        if depth > 1:
            block = Block(outputs, outputs, bottleneck, groups=groups, stride=1, transition=False, lean=lean)
            graphdef, state = nnx.split(block)
            stacked = jax.tree.map(lambda p: jnp.broadcast_to(p, (depth - 1, *p.shape)), state)
            self.rest = nnx.merge(graphdef, stacked)
        self.depth, self.unroll, self.remat, self.hoist = depth, unroll, remat, hoist
        self.betas = (first_beta, *((1 + ALPHA**2 * i) ** -0.5 for i in range(1, depth)))

    @property
    def final_beta(self) -> float:
        """The beta of the next stage's transition block."""
        return (1 + ALPHA**2 * self.depth) ** -0.5

    def __call__(
        self, x: Float[Array, "B H W I"], drop_masks: Float[Array, "D B 1 1 1"] | None, signals: bool = False
    ) -> tuple[Float[Array, "B H2 W2 O"], Float[Array, "D 3"] | None]:
        """Output and, with signals, the figures of each block."""

        def run(module: nnx.Module):
            """(function of the module's parameters and a block's inputs, those parameters)"""
            graphdef, state = nnx.split(module)

            def block(state, x, beta, mask, weights):
                return nnx.merge(graphdef, state)(x, beta, mask, weights, signals)

            return rematerialised(block, self.remat), state

        first, state = run(self.first)
        x, figures = first(state, x, jnp.float32(self.betas[0]), None if drop_masks is None else drop_masks[0], None)
        if self.depth == 1:
            return x, figures[None] if signals else None
        rest, state = run(self.rest)
        weights = None
        if self.hoist if self.hoist is not None else backend() != "cpu":
            names = ("conv0", "conv1", "conv1b", "conv2")
            weights = {name: getattr(self.rest, name).standardised(x.dtype) for name in names}

        def body(x, scanned):
            state, beta, mask, weights = scanned
            return rest(state, x, beta, mask, weights)

        scanned = (state, jnp.asarray(self.betas[1:]), None if drop_masks is None else drop_masks[1:], weights)
        x, others = jax.lax.scan(body, x, scanned, unroll=min(self.unroll, self.depth - 1))
        return x, jnp.concatenate([figures[None], others]) if signals else None


def rematerialised(function, remat: str):
    """`function`, of which the backward pass computes again what `remat` does not keep."""
    if remat in ("none", "activations"):
        return function
    policy = jax.checkpoint_policies.save_only_these_names("conv") if remat == "convs" else None
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def signal_figures(x: Float[Array, "... C"], branch_variance: Float[Array, ""]) -> Float[Array, "3"]:
    """[mean over channels of the squared channel mean, mean channel variance, residual branch variance], float32.

    The three lines of a signal propagation plot (Brock et al. 2021a, arXiv 2101.08692 section 3).
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axis=axes)
    return jnp.stack([jnp.mean(mean**2), jnp.mean(jnp.var(x, axis=axes)), branch_variance.astype(jnp.float32)])


class NFNet(nnx.Module):
    """Stem, four stages, final 1x1 convolution to twice the width, mean pooling, dropout, linear head."""

    def __init__(
        self, variant: Variant, num_classes: int, *,
        stochdepth_rate: float = 0.0, drop_rate: float = 0.0, bottleneck_rule: str = "published",
        dtype=jnp.float32, unroll: int = 1, remat: str = "none", hoist: bool | None = None,
    ):  # fmt: skip
        stem_outputs = (*STEM_CHANNELS, variant.width[0] // 2)
        inputs = (3, *stem_outputs)
        self.stem = nnx.Dict(
            {f"conv{i}": ScaledWSConv(inputs[i], stem_outputs[i], 3, stride=(2, 1, 1, 2)[i]) for i in range(4)}
        )
        channels, beta = stem_outputs[-1], 1.0
        for index, (width, depth, stride) in enumerate(zip(variant.width, variant.depth, STAGE_STRIDES, strict=True)):
            stage = Stage(
                channels, width, variant.bottleneck(index, bottleneck_rule), depth,
                groups=variant.groups(index), stride=stride, first_beta=beta, unroll=unroll, remat=remat, hoist=hoist,
            )  # fmt: skip
            setattr(self, f"stage{index}", stage)
            channels, beta = width, stage.final_beta
        self.final_conv = ScaledWSConv(channels, 2 * channels, 1)
        self.head = Linear(2 * channels, num_classes, std=0.01)
        self.drop_rate, self.stochdepth_rate, self.dtype = drop_rate, stochdepth_rate, dtype

    def __call__(
        self, images: Float[Array, "B H W 3"], *, train: bool = False, key: Key[Array, ""] | None = None,
        signals: bool = False,
    ) -> tuple[Float[Array, "B K"], dict]:  # fmt: skip
        """Logits in float32, and {"features": pooled [B, C]}; with signals also {"signals": [blocks, 3]}.

        train=True turns on stochastic depth and dropout, which need `key` where their rates are not 0.
        """
        random = train and (self.drop_rate > 0 or self.stochdepth_rate > 0)
        if random and key is None:
            raise ValueError("key: train=True with stochastic depth or dropout needs a jax.random.key")
        depth_key, drop_key = jax.random.split(key) if random else (None, None)
        x = images.astype(self.dtype)
        for index in range(4):
            x = self.stem[f"conv{index}"](x)
            if index < 3:
                x = activation(x)
        masks = None
        stages = [getattr(self, f"stage{index}") for index in range(len(STAGE_STRIDES))]
        blocks = sum(stage.depth for stage in stages)
        if random and self.stochdepth_rate > 0:  # the rate grows linearly with depth (nfnets/nfnet.py)
            keep = 1 - self.stochdepth_rate * jnp.arange(blocks) / blocks
            masks = jax.random.bernoulli(depth_key, keep[:, None], (blocks, len(images)))
            masks = masks.astype(self.dtype)[:, :, None, None, None]
        figures, start = [], 0
        for stage in stages:
            x, own = stage(x, None if masks is None else masks[start : start + stage.depth], signals)
            figures.append(own)
            start += stage.depth
        features = activation(self.final_conv(x)).astype(jnp.float32).mean((1, 2))
        out = features
        if random and self.drop_rate > 0:
            mask = jax.random.bernoulli(drop_key, 1 - self.drop_rate, out.shape)
            out = jnp.where(mask, out / (1 - self.drop_rate), 0)
        return self.head(out), {"features": features} | ({"signals": jnp.concatenate(figures)} if signals else {})
