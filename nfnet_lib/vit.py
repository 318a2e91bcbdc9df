"""Vision Transformers with the shapes of google-research/big_vision (`models/vit.py`): the baselines of the paper's Figure 1.

How this differs from big_vision, none of it in the numbers:
- Blocks are stacked on a leading axis and scanned, as in `nfnet.py`; projections are plain [D, D] matrices.
- The patch embedding is a matrix product over flattened patches; pixels beyond the last whole patch are not read.
- A learned position grid of another size than the image's is resampled where it is applied, linearly with the corner
  positions aligned (big_vision does the same once, when it loads a checkpoint).
- Initial values are normal with the standard deviations of big_vision's uniform ones. Dropout, where wanted, acts before
  the head alone; stochastic depth on whole residual branches, its rate growing linearly with depth.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from nfnet_lib.kept import ENCODER_KEPT
from nfnet_lib.nfnet import WHOLE, Linear, Part, draws, parameter, signal_figures
from nfnet_lib.remat import on_this_backend, rematerialised, scan_recomputing
from nfnet_lib.variants import ViTVariant

NORM_EPS = 1e-6


class LayerNorm(nnx.Module):
    """Zero mean and unit variance over the channels of each token, in float32, then a scale and a bias."""

    def __init__(self, width: int):
        self.scale, self.bias = parameter((width,), mean=1.0), parameter((width,))

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + NORM_EPS)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head attention of `queries` over `x`, softmax in float32.

    Between projections tokens come last: N fills the lanes of a TPU, where the channels of a head would not (LOG.md).
    """

    def __init__(self, width: int, heads: int):
        for name in ("query", "key", "value", "out"):
            setattr(self, name, Linear(width, width, std=width**-0.5))
        self.heads = heads

    def __call__(self, queries: Float[Array, "B M D"], x: Float[Array, "B N D"]) -> Float[Array, "B M D"]:
        projected = self.project("query", queries), self.project("key", x), self.project("value", x)
        return self.join(self.attend(*projected))

    def project(self, name: str, x: Float[Array, "B N D"]) -> Float[Array, "B H C N"]:
        """Queries, keys or values by head."""
        w, b = self._weights(name, x.dtype)
        return jnp.einsum("bni,ihc->bhcn", x, w.reshape(len(w), self.heads, -1)) + b.reshape(self.heads, -1, 1)

    def attend(
        self, query: Float[Array, "B H C M"], key: Float[Array, "B H C N"], value: Float[Array, "B H C N"]
    ) -> Float[Array, "B H C M"]:  # fmt: skip
        """The mean of the values, weighted, for each query."""
        scores = jnp.einsum("bhcm,bhcn->bhmn", query * query.shape[2] ** -0.5, key).astype(jnp.float32)
        return jnp.einsum("bhmn,bhcn->bhcm", jax.nn.softmax(scores).astype(value.dtype), value)

    def join(self, x: Float[Array, "B H C M"]) -> Float[Array, "B M D"]:
        """The projection of all heads' together."""
        w, b = self._weights("out", x.dtype)
        return jnp.einsum("bhcm,hco->bmo", x, w.reshape(self.heads, -1, w.shape[-1])) + b

    def _weights(self, name: str, dtype) -> tuple[Float[Array, "D D"], Float[Array, " D"]]:
        linear = getattr(self, name)
        return linear.w[...].astype(dtype), linear.b[...].astype(dtype)


class MLP(nnx.Module):
    """Dense, GELU (tanh form), dense."""

    def __init__(self, width: int, hidden: int):
        std = (2 / (width + hidden)) ** 0.5
        self.dense0, self.dense1 = Linear(width, hidden, std=std), Linear(hidden, width, std=std)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return self.contract(self.expand(x))

    def expand(self, x: Float[Array, "B N D"]) -> Float[Array, "B N M"]:
        return self.dense0(x)

    def contract(self, x: Float[Array, "B N M"]) -> Float[Array, "B N D"]:
        return self.dense1(jax.nn.gelu(x))


class EncoderBlock(nnx.Module):
    """x + attention(norm(x)), then + MLP(norm of that): a chain of STEPS.

    A step takes the block's input [B, N, D], the outputs of the step before, and mask [2, B, 1, 1]: 1 keeps and 0 drops a
    branch of an example (stochastic depth), or None.
    """

    def __init__(self, width: int, mlp: int, heads: int):
        self.norm0, self.norm1 = LayerNorm(width), LayerNorm(width)
        self.attention, self.mlp = Attention(width, heads), MLP(width, mlp)

    def __call__(self, x: Float[Array, "B N D"], mask: Float[Array, "2 B 1 1"] | None) -> Float[Array, "B N D"]:
        before = None
        for step in STEPS:
            before = getattr(self, step)(x, before, mask)
        return before

    def project(self, x, before, mask) -> dict[str, Float[Array, "B H C N"]]:
        y = self.norm0(x)
        return {name: self.attention.project(name, y) for name in ("query", "key", "value")}

    def attend(self, x, before, mask) -> dict[str, Float[Array, "B H C N"]]:
        return {"attended": self.attention.attend(**before)}

    def join(self, x, before, mask) -> dict[str, Float[Array, "B N D"]]:
        y = self.attention.join(before["attended"])
        return {"joined": x + (y if mask is None else y * mask[0])}

    def expand(self, x, before, mask) -> dict[str, Float[Array, "B N *"]]:
        return before | {"hidden": self.mlp.expand(self.norm1(before["joined"]))}

    def leave(self, x, before, mask) -> Float[Array, "B N D"]:
        y = self.mlp.contract(before["hidden"])
        return before["joined"] + (y if mask is None else y * mask[1])


STEPS = ("project", "attend", "join", "expand", "leave")  # of a block


def _run_step(graphdef, name: str, params, x, before, mask):
    """A step of a block: `scan_recomputing`'s."""
    return getattr(nnx.merge(graphdef, params), name)(x, before, mask)


class AttentionPool(nnx.Module):
    """One learned query over all tokens, then a residual MLP (arXiv 2106.04560 section 3.2; big_vision's MAPHead)."""

    def __init__(self, width: int, mlp: int, heads: int):
        self.probe = parameter((1, 1, width), std=width**-0.5)
        self.attention, self.norm, self.mlp = Attention(width, heads), LayerNorm(width), MLP(width, mlp)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = self.attention(probe, x)
        return (x + self.mlp(self.norm(x)))[:, 0]


class ViT(nnx.Module):
    """Patch embedding, position embedding, encoder blocks, norm, pooling, linear head (zero at the start)."""

    def __init__(
        self, variant: ViTVariant, num_classes: int, *, image_size: int | None = None,
        stochdepth_rate: float = 0.0, drop_rate: float = 0.0, dtype=jnp.float32, unroll: int = 1, remat: str = "none",
    ):  # fmt: skip
        width, patch = variant.width, variant.patch
        self.embedding = Linear(3 * patch**2, width)
        self.learned = variant.position == "learned"
        if self.learned:
            tokens = ((image_size or variant.train_px) // patch) ** 2
            self.pos_embedding = parameter((1, tokens, width), std=width**-0.5)
        graphdef, state = nnx.split(EncoderBlock(width, variant.mlp, variant.heads))
        stacked = jax.tree.map(lambda p: jnp.broadcast_to(p, (variant.depth, *p.shape)), state)
        self.blocks = nnx.merge(graphdef, stacked)
        self.norm = LayerNorm(width)
        self.pool_type = variant.pool
        if self.pool_type == "map":
            self.pool = AttentionPool(width, variant.mlp, variant.heads)
        if self.pool_type == "tok":
            self.cls = parameter((1, 1, width))
        self.head = Linear(width, num_classes, std=0.0)
        self.patch, self.depth, self.unroll, self.remat = patch, variant.depth, unroll, remat
        self.drop_rate, self.stochdepth_rate, self.dtype = drop_rate, stochdepth_rate, dtype

    def __call__(
        self, images: Float[Array, "B H W 3"], *, train: bool = False, key: Key[Array, ""] | None = None,
        signals: bool = False, part: Part = WHOLE,
    ) -> tuple[Float[Array, "B K"], dict]:  # fmt: skip
        """Logits in float32, and {"features": pooled [B, D]}, with signals also {"signals": [blocks, 3]}, as `nfnet.NFNet`."""
        random = train and (self.drop_rate > 0 or self.stochdepth_rate > 0)
        if random and key is None:
            raise ValueError("key: train=True with stochastic depth or dropout needs a jax.random.key")
        depth_key, drop_key = jax.random.split(key) if random else (None, None)
        batch, rows, columns = len(images), images.shape[1] // self.patch, images.shape[2] // self.patch
        x = images[:, : rows * self.patch, : columns * self.patch].astype(self.dtype)
        x = x.reshape(batch, rows, self.patch, columns, self.patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.embedding(x.reshape(batch, rows * columns, -1))
        if self.learned:
            positions = resample_positions(self.pos_embedding[...], rows, columns)
        else:
            positions = jnp.asarray(sincos_positions(rows, columns, x.shape[-1]))
        x = x + positions.astype(x.dtype)
        if self.pool_type == "tok":
            x = jnp.concatenate([jnp.broadcast_to(self.cls[...].astype(x.dtype), (batch, 1, x.shape[-1])), x], axis=1)

        masks = None
        if random and self.stochdepth_rate > 0:
            keep = 1 - self.stochdepth_rate * jnp.arange(self.depth) / self.depth
            masks = draws(depth_key, keep[:, None, None], (self.depth, 2, batch), 2, part)
            masks = masks.astype(self.dtype)[..., None, None]
        unroll = min(self.unroll, self.depth)
        graphdef, state = nnx.split(self.blocks)

        def block(state, x, mask):
            out = nnx.merge(graphdef, state)(x, mask)
            return out, signal_figures(out, jnp.mean(jnp.var(out - x, axis=(0, 1)))) if signals else None

        figures, remat = None, on_this_backend(self.remat)
        with jax.named_scope("blocks"):
            if remat in ("convs", "by_stage") and not signals:
                steps = tuple(functools.partial(_run_step, graphdef, name) for name in STEPS)
                x = scan_recomputing(steps, ENCODER_KEPT, unroll, state, x, (masks,))
            else:
                block = rematerialised(block, remat)
                x, figures = jax.lax.scan(lambda x, own: block(own[0], x, own[1]), x, (state, masks), unroll=unroll)
        x = self.norm(x)
        if self.pool_type == "map":
            x = self.pool(x)
        else:
            x = x.mean(1) if self.pool_type == "gap" else x[:, 0]
        features = x.astype(jnp.float32)
        out = features
        if random and self.drop_rate > 0:
            mask = draws(drop_key, 1 - self.drop_rate, out.shape, 0, part)
            out = jnp.where(mask, out / (1 - self.drop_rate), 0)
        return self.head(out), {"features": features} | ({"signals": figures} if signals else {})


def resample_positions(grid: Float[Array, "1 N D"], rows: int, columns: int) -> Float[Array, "1 M D"]:
    """A learned square grid of position embeddings for rows x columns patches: linear, corners on corners.

    As `resample_posemb` in big_vision's `models/vit.py` (scipy.ndimage.zoom of order 1).
    """
    side = round(grid.shape[1] ** 0.5)
    if (rows, columns) == (side, side):
        return grid
    square = grid.reshape(side, side, -1)
    out = jnp.einsum("ra,cb,abd->rcd", _interpolation(side, rows), _interpolation(side, columns), square)
    return out.reshape(1, rows * columns, -1)


def _interpolation(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix of linear interpolation from `old` to `new` equally spaced points with the same ends."""
    at = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old))).astype(np.float32)


def sincos_positions(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> Float[np.ndarray, "1 N D"]:
    """Fixed two-dimensional sine and cosine embedding (MoCo v3; big_vision `posemb_sincos_2d`). width: divisible by 4."""
    if width % 4:
        raise ValueError(f"width={width}: sine and cosine positions need a multiple of 4")
    y, x = np.mgrid[:rows, :columns]
    omega = temperature ** -(np.arange(width // 4) / (width // 4 - 1))
    y, x = np.outer(y.ravel(), omega), np.outer(x.ravel(), omega)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None].astype(np.float32)
