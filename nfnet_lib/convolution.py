"""Convolutions as the backend likes them, scaled weight standardisation, and pooling: functions of arrays.

On CPU convolutions are matrix products: XLA's CPU backend runs the gradients of its own convolution many times slower where
that is grouped or inside a loop, as SAM's two passes are. On TPU the stem's maps are packed (`packed_weights`).
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_BACKEND: contextvars.ContextVar[str] = contextvars.ContextVar("backend", default="")


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


def standardise_weight(w: Float[Array, "H W I O"], gain: Float[Array, " O"]) -> Float[Array, "H W I O"]:
    """Scaled weight standardisation: each output unit's fan-in gets mean 0 and variance gain^2 / fan_in.

    The variance is floored so that variance * fan_in >= 1e-4 (nfnets/base.py WSConv2D).
    """
    flat = w.astype(jnp.float32).reshape(-1, w.shape[-1])
    centred = flat - _column_sums(flat) / len(flat)
    scale = jax.lax.rsqrt(jnp.maximum(_column_sums(centred**2), 1e-4)) * gain
    return (centred * scale).reshape(w.shape)


def standardised(params: dict) -> dict:
    """The parameters with the weights of every convolution standardised, stacked ones each by itself; float32."""
    if "gain" in params:
        function = standardise_weight if params["w"].ndim == 4 else jax.vmap(standardise_weight)
        return params | {"w": function(params["w"], params["gain"])}
    return {name: standardised(value) if isinstance(value, dict) else value for name, value in params.items()}


def narrowed(weights: dict, dtype) -> dict:
    """`standardised` weights in the type that they are used in: all of more than one axis but the head's."""
    return {
        name: value if name == "head" else narrowed(value, dtype) if isinstance(value, dict)
        else value.astype(dtype) if name == "w" else value
        for name, value in weights.items()
    }  # fmt: skip


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


def packed_weights(w: Float[Array, "K K I O"], stride: int, before: int, after: int) -> Float[Array, "K2 K2 I2 O2"]:
    """Weights of the same convolution between packed maps: of `before` x `before` input pixels to a position, and `after`.

    A position's channels are its pixels' channels in reading order. With before = 1 the input is not packed and the stride is
    stride * after; otherwise before must be stride * after, and the stride is 1. The padding is `packed_padding`.
    """
    size = len(w)
    start = max(size - stride, 0) // 2  # padding before the first pixel, of SAME on even maps
    low, high = packed_padding(size, stride, before, after)
    cells = low + high + (stride * after // before if before == 1 else 1)
    place = np.zeros((cells, before, after, size), np.float32)
    for pixel in range(after):
        for tap in range(size):
            at = pixel * stride + tap - start + low * before
            place[at // before, at % before, pixel, tap] = 1
    place = jnp.asarray(place, w.dtype)
    w = jnp.einsum("apmt,bqnu,tuio->abpqimno", place, place, w)
    return w.reshape(cells, cells, before**2 * w.shape[4], after**2 * w.shape[7])


def packed_padding(size: int, stride: int, before: int, after: int) -> tuple[int, int]:
    """Zero positions in front of and behind a map for `packed_weights`."""
    start = max(size - stride, 0) // 2
    end = (after - 1) * stride + size - 1 - start  # the last pixel read
    return -(-start // before), max(end // before - (stride * after // before - 1), 0)


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
