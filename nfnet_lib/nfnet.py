"""NFNet: normaliser-free residual networks (Brock et al. 2021, arXiv 2102.06171; google-deepmind/deepmind-research nfnets/).

How this differs from the release, none of it in the numbers:
- The blocks of a stage after its first are one module whose parameters are stacked on a leading axis and applied by
  `jax.lax.scan`: one compiled body a stage, so compile time hardly grows with depth. `unroll` unrolls that scan;
  the parameter layout stays the same.
- Flax NNX defines the modules and nothing else; parameters live in a nested dict outside them (see `models.py`). A module
  only says how each parameter is drawn (`parameter`): `models.Model.init` draws all of them at once.
- "+" variants: the first stage's bottleneck is as published (192 channels), the released code's (128) is a setting.
- Convolutions are computed as the backend likes them (`convolution.py`): same parameters, same results to rounding.
- All weights are standardised at once, before the network, so that many devices can share that work (`step.py`); on a CPU
  each where it is used, while it is in the cache, or, large ones and without gradients, after the product
  (`convolution.standardised_convolve`, LOG.md).
- A block's squeeze-excite takes the mean of its last convolution's input, which is the mean of its output, convolved; so gate,
  gain and shortcut are applied where that convolution is computed, and its own output is never written.
- Weight standardisation and the head run in float32 whatever the activations' type.
- Squeeze-excite uses ReLU as the code does, not GELU as the paper's text says; stochastic depth does not rescale by
  the keep rate, as in the code (the residual branch's gain is learned).
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from nfnet_lib.convolution import average_pool, backend, convolve, packed_padding, packed_weights, standardised_convolve
from nfnet_lib.kept import KEPT, by_stage
from nfnet_lib.remat import gradients_together, on_this_backend, rematerialised, scan_recomputing
from nfnet_lib.variants import ALPHA, STAGE_STRIDES, Variant

GELU_SCALE = 1.7015043497085571  # makes gelu variance-preserving on unit Gaussians (nfnets/base.py nonlinearities)
GELU_LINEAR = math.sqrt(2 / math.pi)  # of tanh's argument
GELU_CUBIC = 0.044715 * GELU_LINEAR


@jax.custom_jvp
def activation(x: Float[Array, "..."], beta: float | Float[Array, ""] = 1.0) -> Float[Array, "..."]:
    """beta times GELU (tanh form) scaled to preserve variance. No derivative is known for beta."""
    half = jnp.asarray(beta * (GELU_SCALE / 2), x.dtype)
    return x * (half + half * jnp.tanh(x * (GELU_LINEAR + GELU_CUBIC * (x * x))))


@activation.defjvp
def _activation_jvp(primals, tangents):
    """The derivative in closed form: autodiff's has twice as many operations, and it is these that a fused convolution
    waits for (LOG.md)."""
    x, beta = primals
    half, square = jnp.asarray(beta * (GELU_SCALE / 2), x.dtype), x * x
    tanh = jnp.tanh(x * (GELU_LINEAR + GELU_CUBIC * square))
    share = half + half * tanh
    slope = share + (1 - tanh * tanh) * (x * (half * GELU_LINEAR + (half * 3 * GELU_CUBIC) * square))
    return x * share, tangents[0] * slope


Part = tuple[int | Array, int]  # (which, of how many) equal parts of a batch these images are
WHOLE = (0, 1)


def draws(key: Key[Array, ""], keep, shape: tuple[int, ...], axis: int, part: Part) -> Array:
    """Bernoulli draws for the examples along an axis: those that these examples get in the whole batch, wherever they are."""
    index, count = part
    size = shape[axis]
    everywhere = jax.random.bernoulli(key, keep, (*shape[:axis], size * count, *shape[axis + 1 :]))
    return jax.lax.dynamic_slice_in_dim(everywhere, index * size, size, axis) if count > 1 else everywhere


def parameter(shape: tuple[int, ...], *, std: float = 0.0, mean: float = 0.0) -> nnx.Param:
    """A float32 parameter whose initial values are normal with this mean and standard deviation, written on it."""
    return nnx.Param(jnp.full(shape, mean, jnp.float32), std=std, mean=mean)


def standardised_before() -> bool:
    """Whether the network is given standardised weights, rather than standardising each where it is used."""
    return backend() != "cpu"


class ScaledWSConv(nnx.Module):
    """Convolution, SAME padding, with a bias for each output channel; `standardised_before` says where its weights are made."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1):
        shape = (kernel, kernel, inputs // groups, outputs)
        self.w = parameter(shape, std=math.prod(shape[:-1]) ** -0.5)
        self.gain = parameter((outputs,), mean=1.0)
        self.bias = parameter((outputs,))
        self.stride, self.groups = stride, groups

    def weights(self, dtype) -> Float[Array, "K K IG O"]:
        """As they are given, which is standardised (`standardised_before`), in this type."""
        return self.w[...].astype(dtype)

    def products(self, *xs: Float[Array, "B _ _ I"]) -> tuple[Float[Array, "B _ _ O"], ...]:
        """Each of xs convolved with the weights, which are standardised once for all; no bias."""
        if standardised_before():
            w = self.weights(xs[0].dtype)
            return tuple(convolve(x, w, self.stride, self.groups) for x in xs)
        return standardised_convolve(xs, self.w[...], self.gain[...], self.stride, self.groups)

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H2 W2 O"]:
        return self.products(x)[0] + self.bias[...].astype(x.dtype)

    def by_group(self, x: Float[Array, "B H W I"], groups: int) -> Float[Array, "B H W G O"]:
        """A 1x1 convolution whose output's channels lie in groups."""
        w, bias = self.weights(x.dtype), self.bias[...].astype(x.dtype)
        out = jnp.einsum("bhwi,igo->bhwgo", x, w.reshape(w.shape[2], groups, -1))
        return out + bias.reshape(groups, -1)

    def packed(self, x: Float[Array, "B H W I"], before: int, after: int) -> Float[Array, "B H2 W2 O2"]:
        """The same between packed maps (`packed_weights`)."""
        w = packed_weights(self.weights(x.dtype), self.stride, before, after)
        stride = self.stride * after if before == 1 else 1
        padding = packed_padding(len(self.w[...]), self.stride, before, after)
        out = jax.lax.conv_general_dilated(
            x, w, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return out + jnp.tile(self.bias[...].astype(x.dtype), after**2)


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

    def __call__(self, pooled: Float[Array, "B C"]) -> Float[Array, "B C"]:
        return jax.nn.sigmoid(self.linear_1(jax.nn.relu(self.linear(pooled))))


class Block(nnx.Module):
    """x -> shortcut(x) + alpha * skip_gain * branch(act(x) * beta); the branch is 1x1, 3x3, 3x3, 1x1, squeeze-excite.

    A transition block (first of a stage) has a 1x1 shortcut convolution on the activated input, after 2x2 average
    pooling where it strides. skip_gain starts at 0 (SkipInit), so a fresh network is its shortcut path.
    """

    def __init__(
        self, inputs: int, outputs: int, bottleneck: int, *, groups: int, stride: int, transition: bool
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

    def __call__(
        self, x: Float[Array, "B H W I"], beta: float | Float[Array, ""], drop_mask: Float[Array, "B 1 1 1"] | None,
        signals: bool = False,
    ) -> tuple[Float[Array, "B H2 W2 O"], Float[Array, "3"] | None]:  # fmt: skip
        """The block's output and, with signals, its `signal_figures`.

        drop_mask: 1 keeps and 0 drops the branch of an example (stochastic depth), or None.
        """
        out, shortcut = self.enter(x, beta)
        out = self.middle(checkpoint_name(out, "entry"))
        out = checkpoint_name(self.last(checkpoint_name(out, "middle")), "last")
        pooled = checkpoint_name(self.pooled(out), "pooled")
        x = self.leave(shortcut, out, pooled, drop_mask)
        if not signals:
            return x, None
        (branch,) = self.conv2.products(activation(out))
        gate = self.gate(branch.mean((1, 2)))[:, None, None]
        branch = (branch + self.conv2.bias[...].astype(out.dtype)) * gate
        return x, signal_figures(x, jnp.mean(jnp.var(branch, axis=(0, 1, 2))))

    def enter(self, x: Float[Array, "B H W I"], beta: float | Float[Array, ""]) -> tuple[Array, Array]:
        """The first convolution's output, [B, H, W, N] or, on TPU, by groups [B, H, W, G, N / G], and the shortcut."""
        out = activation(x, beta)
        if self.transition:
            x = self.conv_shortcut(average_pool(out) if self.stride > 1 else out)
        if backend() == "tpu" and self.conv1.groups > 1:  # laid out by groups, or the grouped convolution copies it (LOG.md)
            return self.conv0.by_group(out, self.conv1.groups), x
        return self.conv0(out), x

    def middle(self, out: Float[Array, "B H W *N"]) -> Float[Array, "B H2 W2 N"]:
        out = activation(out)
        return self.conv1(out.reshape(*out.shape[:3], -1))

    def last(self, out: Float[Array, "B H2 W2 N"]) -> Float[Array, "B H2 W2 N"]:
        return self.conv1b(activation(out))

    def pooled(self, out: Float[Array, "B H2 W2 N"]) -> Float[Array, "B N"]:
        """Spatial mean of the input of the last 1x1 convolution."""
        return activation(out).mean((1, 2))

    def gate(self, mean: Float[Array, "B O"]) -> Float[Array, "B O"]:
        """What squeeze-excite multiplies the branch with. mean: over the last convolution's positions, without its bias."""
        return self.squeeze_excite(mean + self.conv2.bias[...].astype(mean.dtype)) * 2

    def leave(
        self, shortcut: Float[Array, "B H2 W2 O"], out: Float[Array, "B H2 W2 N"], pooled: Float[Array, "B N"],
        drop_mask: Float[Array, "B 1 1 1"] | None,
    ) -> Float[Array, "B H2 W2 O"]:  # fmt: skip
        """The branch's last convolution, gated, on top of the shortcut: one pass over the map, all factors in one.

        The mean of a 1x1 convolution is that of its input, convolved.
        """
        if standardised_before():
            w = self.conv2.weights(out.dtype)
            if backend() == "tpu":
                shortcut, w = gradients_together(shortcut, w)
            branch, mean = convolve(activation(out), w, 1, 1), pooled @ w[0, 0]
        else:
            branch, mean = self.conv2.products(activation(out), pooled[:, None, None])
            mean = mean[:, 0, 0]
        scale = self.gate(mean) * (ALPHA * self.skip_gain[...]).astype(out.dtype)
        if drop_mask is not None:
            scale = scale * drop_mask[:, 0, 0].astype(out.dtype)
        scale = scale[:, None, None]
        return shortcut + branch * scale + self.conv2.bias[...].astype(out.dtype) * scale


class Stage(nnx.Module):
    """A transition block, then `depth - 1` equal blocks whose parameters are stacked and scanned.

    betas: the reciprocal of the expected standard deviation at each block's input. The variance grows by alpha^2 a
    block and is reset by the shortcut convolution of each transition (arXiv 2102.06171 section 3).
    """

    def __init__(
        self, inputs: int, outputs: int, bottleneck: int, depth: int, *,
        groups: int, stride: int, first_beta: float,
    ):  # fmt: skip
        self.first = Block(inputs, outputs, bottleneck, groups=groups, stride=stride, transition=True)
        if depth > 1:
            block = Block(outputs, outputs, bottleneck, groups=groups, stride=1, transition=False)
            graphdef, state = nnx.split(block)
            stacked = jax.tree.map(lambda p: jnp.broadcast_to(p, (depth - 1, *p.shape)), state)
            self.rest = nnx.merge(graphdef, stacked)
        self.depth = depth
        self.betas = (first_beta, *((1 + ALPHA**2 * i) ** -0.5 for i in range(1, depth)))

    @property
    def final_beta(self) -> float:
        """The beta of the next stage's transition block."""
        return (1 + ALPHA**2 * self.depth) ** -0.5

    def __call__(
        self, x: Float[Array, "B H W I"], drop_masks: Float[Array, "D B 1 1 1"] | None, *, unroll: int, remat: str,
        signals: bool = False,
    ) -> tuple[Float[Array, "B H2 W2 O"], Float[Array, "D 3"] | None]:  # fmt: skip
        """Output and, with signals, the figures of each block. unroll, remat: of `models.create`."""
        graphdef, state = nnx.split(self.first)
        first = rematerialised(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs, signals), remat)
        x, figures = first(state, x, jnp.float32(self.betas[0]), None if drop_masks is None else drop_masks[0])
        if self.depth == 1:
            return x, figures[None] if signals else None
        graphdef, state = nnx.split(self.rest)
        betas, masks = jnp.asarray(self.betas[1:], jnp.float32), None if drop_masks is None else drop_masks[1:]
        unroll = min(unroll, self.depth - 1)
        remat = on_this_backend(remat)
        if remat in KEPT and not signals:
            steps = tuple(functools.partial(_run_step, graphdef, name) for name in STEPS)
            return scan_recomputing(steps, KEPT[remat], unroll, state, x, (betas, masks)), None
        rest = rematerialised(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs, signals), remat)
        scanned = (state, betas, masks)
        x, others = jax.lax.scan(lambda x, own: rest(own[0], x, *own[1:]), x, scanned, unroll=unroll)
        return x, jnp.concatenate([figures[None], others]) if signals else None


STEPS = ("enter", "middle", "last", "leave")  # of a block


def _run_step(graphdef, name: str, params, x, before, beta, mask):
    """A step of a block: `scan_recomputing`'s."""
    block = nnx.merge(graphdef, params)
    if name == "enter":
        return {"entry": block.enter(x, beta)[0]}
    if name == "middle":
        return {"middle": block.middle(before["entry"])}
    if name == "last":
        out = block.last(before["middle"])
        return {"last": out, "pooled": block.pooled(out)}
    return block.leave(x, before["last"], before["pooled"], mask)


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
        dtype=jnp.float32, unroll: int = 1, remat: str = "none",
    ):  # fmt: skip
        stem_outputs = (*variant.stem, variant.width[0] // 2)
        inputs = (3, *stem_outputs)
        self.stem = nnx.Dict(
            {f"conv{i}": ScaledWSConv(inputs[i], stem_outputs[i], 3, stride=(2, 1, 1, 2)[i]) for i in range(4)}
        )
        channels, beta = stem_outputs[-1], 1.0
        for index, (width, depth, stride) in enumerate(zip(variant.width, variant.depth, STAGE_STRIDES, strict=True)):
            stage = Stage(
                channels, width, variant.bottleneck(index, bottleneck_rule), depth,
                groups=variant.groups(index), stride=stride, first_beta=beta,
            )  # fmt: skip
            setattr(self, f"stage{index}", stage)
            channels, beta = width, stage.final_beta
        self.final_conv = ScaledWSConv(channels, 2 * channels, 1)
        self.head = Linear(2 * channels, num_classes, std=0.01)
        self.drop_rate, self.stochdepth_rate, self.dtype = drop_rate, stochdepth_rate, dtype
        self.variant, self.bottleneck_rule, self.unroll, self.remat = variant, bottleneck_rule, unroll, remat

    def plan_stages(self, images: int, height: int, width: int) -> list[tuple[int, str]]:
        """(unroll, remat) of each stage for so many images of this size."""
        if self.remat != "by_stage":
            return [(self.unroll, self.remat)] * len(STAGE_STRIDES)
        chosen = by_stage(self.variant, images, height, width, self.bottleneck_rule)
        whole = [kept == "none" and backend() == "tpu" for kept in chosen]
        return [
            (depth if unrolled else self.unroll, kept)
            for depth, unrolled, kept in zip(self.variant.depth, whole, chosen, strict=True)
        ]

    def run_stem(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B H2 W2 C"]:
        """Four convolutions, packed where that fills the lanes of a TPU: their 16 to 64 channels are less than 128."""
        packs = (1, 2, 2, 2, 1) if backend() == "tpu" and x.shape[1] % 4 == 0 and x.shape[2] % 4 == 0 else (1,) * 5
        for index in range(4):
            conv = self.stem[f"conv{index}"]
            x = conv(x) if packs[index] == packs[index + 1] == 1 else conv.packed(x, *packs[index : index + 2])
            if index < 3:
                x = activation(x)
        return x

    def __call__(
        self, images: Float[Array, "B H W 3"], *, train: bool = False, key: Key[Array, ""] | None = None,
        signals: bool = False, part: Part = WHOLE,
    ) -> tuple[Float[Array, "B K"], dict]:  # fmt: skip
        """Logits in float32, and {"features": pooled [B, C]}; with signals also {"signals": [blocks, 3]}.

        train=True turns on stochastic depth and dropout, which need `key` where their rates are not 0. part: of `draws`.
        """
        random = train and (self.drop_rate > 0 or self.stochdepth_rate > 0)
        if random and key is None:
            raise ValueError("key: train=True with stochastic depth or dropout needs a jax.random.key")
        depth_key, drop_key = jax.random.split(key) if random else (None, None)
        with jax.named_scope("stem"):
            x = self.run_stem(images.astype(self.dtype))
        masks = None
        stages = [getattr(self, f"stage{index}") for index in range(len(STAGE_STRIDES))]
        blocks = sum(stage.depth for stage in stages)
        if random and self.stochdepth_rate > 0:  # the rate grows linearly with depth (nfnets/nfnet.py)
            keep = 1 - self.stochdepth_rate * jnp.arange(blocks) / blocks
            masks = draws(depth_key, keep[:, None], (blocks, len(images)), 1, part)
            masks = masks.astype(self.dtype)[:, :, None, None, None]
        figures, start = [], 0
        for index, (stage, (unroll, remat)) in enumerate(zip(stages, self.plan_stages(*images.shape[:3]), strict=True)):
            own_masks = None if masks is None else masks[start : start + stage.depth]
            with jax.named_scope(f"stage{index}"):
                x, own = stage(x, own_masks, unroll=unroll, remat=remat, signals=signals)
            figures.append(own)
            start += stage.depth
        with jax.named_scope("head"):
            features = activation(self.final_conv(x)).astype(jnp.float32).mean((1, 2))
            out = features
            if random and self.drop_rate > 0:
                mask = draws(drop_key, 1 - self.drop_rate, out.shape, 0, part)
                out = jnp.where(mask, out / (1 - self.drop_rate), 0)
            logits = self.head(out)
        return logits, {"features": features} | ({"signals": jnp.concatenate(figures)} if signals else {})
