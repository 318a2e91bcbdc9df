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

FORMS = ("patches", "lax", "pointwise")  # of a convolution: patches times a matrix; XLA's own; the latter but for 1x1 ones

_BACKEND: contextvars.ContextVar[str] = contextvars.ContextVar("backend", default="")
_FORM: contextvars.ContextVar[str] = contextvars.ContextVar("form", default="")


@contextlib.contextmanager
def for_backend(name: str) -> Iterator[None]:
    """Trace what is within for "cpu", "gpu" or "tpu", though it may be compiled on another: the forms of operations differ."""
    token = _BACKEND.set(name)
    try:
        yield
    finally:
        _BACKEND.reset(token)


@contextlib.contextmanager
def using(form: str) -> Iterator[None]:
    """Trace what is within with convolutions of this form, whatever the backend. ValueError for one not in FORMS."""
    if form not in FORMS:
        raise ValueError(f"form: {form!r}; allowed: {', '.join(FORMS)}")
    token = _FORM.set(form)
    try:
        yield
    finally:
        _FORM.reset(token)


def backend() -> str:
    """Of `for_backend`, or else jax's own."""
    return _BACKEND.get() or jax.default_backend()


def standardise_weight(w: Float[Array, "*D H W I O"], gain: Float[Array, "*D O"]) -> Float[Array, "*D H W I O"]:
    """Scaled weight standardisation: each output unit's fan-in gets mean 0 and variance gain^2 / fan_in.

    The variance is floored so that variance * fan_in >= 1e-4 (nfnets/base.py WSConv2D). D: blocks, each by itself.
    """
    flat = w.astype(jnp.float32).reshape(*w.shape[:-4], -1, w.shape[-1])
    return _standardise(flat, gain[..., None, :]).reshape(w.shape)


@jax.custom_vjp
def _standardise(w: Float[Array, "*D F O"], gain: Float[Array, "*D 1 O"]) -> Float[Array, "*D F O"]:
    return _standardise_forward(w, gain)[0]


def _standardise_forward(w, gain):
    mean = _fan_in_sums(w) / w.shape[-2]
    squares = _fan_in_sums((w - mean) ** 2)
    scale = jax.lax.rsqrt(jnp.maximum(squares, 1e-4))
    return (w - mean) * (scale * gain), (w, gain, mean, squares, scale)


def _standardise_backward(residuals, slope):
    """In closed form: autodiff's passes over all weights are twice as many (LOG.md)."""
    w, gain, mean, squares, scale = residuals
    along = _fan_in_sums(slope * (w - mean)) * scale
    shrink = jnp.where(squares > 1e-4, along * scale * scale, 0)  # nothing where the variance is at its floor
    return (scale * gain) * (slope - _fan_in_sums(slope) / w.shape[-2]) - (w - mean) * (gain * shrink), along


_standardise.defvjp(_standardise_forward, _standardise_backward)


def standardised(params: dict) -> dict:
    """The parameters with the weights of every convolution standardised, stacked ones each by itself; float32."""
    if "gain" in params:
        return params | {"w": standardise_weight(params["w"], params["gain"])}
    return {name: standardised(value) if isinstance(value, dict) else value for name, value in params.items()}


def narrowed(weights: dict, dtype) -> dict:
    """`standardised` weights in the type that they are used in: all of more than one axis but the head's."""
    return {
        name: value if name == "head" else narrowed(value, dtype) if isinstance(value, dict)
        else value.astype(dtype) if name == "w" else value
        for name, value in weights.items()
    }  # fmt: skip


def _fan_in_sums(x: Float[Array, "*D F O"]) -> Float[Array, "*D 1 O"]:
    """Sums over the fan-in. On CPU first of eight equal parts, where there are, which XLA fuses with what makes x, then as a
    product with ones: of x as a whole it would write down what it sums, and its reductions are slower (LOG.md)."""
    *lead, fan_in, outputs = x.shape
    if backend() != "cpu":
        return x.sum(-2, keepdims=True)
    count = next(count for count in (8, 9, 3, 1) if fan_in % count == 0)
    parts = x.reshape(*lead, count, -1, outputs)
    return jnp.ones((*lead, 1, fan_in // count), x.dtype) @ sum(parts[..., i, :, :] for i in range(count))


def convolve(
    x: Float[Array, "B H W I"], w: Float[Array, "KH KW IG O"], stride: int, groups: int
) -> Float[Array, "B H2 W2 O"]:
    """SAME convolution, NHWC by HWIO, in the form of `using`, or else "patches" on CPU and "lax" elsewhere."""
    form = _FORM.get() or ("patches" if backend() == "cpu" else "lax")
    if form != "lax" and w.shape[:2] == (1, 1) and stride == 1:
        return x @ w[0, 0]
    if form == "patches":
        return rows_convolve(x, w) if stride == groups == 1 else patches_convolve(x, w, stride, groups)
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


def patches_convolve(
    x: Float[Array, "B H W I"], w: Float[Array, "KH KW IG O"], stride: int, groups: int
) -> Float[Array, "B H2 W2 O"]:
    """The same convolution: the input shifted by each kernel tap, side by side as patches, times the weights of each group.

    Taps that would read nothing but padding (a 3x3 kernel on a 1x1 image has one real tap) are left out. Groups come first
    before there are patches: to reorder those would be to copy nine times as much.
    """
    batch, height, width, channels = x.shape
    outputs = w.shape[-1]
    rows, top, bottom = _taps(height, w.shape[0], stride)
    columns, left, right = _taps(width, w.shape[1], stride)
    out_h, out_w = -(-height // stride), -(-width // stride)
    x = x.reshape(batch, height, width, groups, channels // groups).transpose(3, 0, 1, 2, 4)
    x = jnp.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right), (0, 0)))
    last_row, last_column = (out_h - 1) * stride + 1, (out_w - 1) * stride + 1
    shifted = [
        x[:, :, row : row + last_row : stride, column : column + last_column : stride]
        for _, row in rows
        for _, column in columns
    ]
    patches = jnp.concatenate(shifted, -1).reshape(groups, batch * out_h * out_w, -1)
    w = w[rows[0][0] : rows[-1][0] + 1, columns[0][0] : columns[-1][0] + 1]
    w = w.reshape(-1, groups, outputs // groups).transpose(1, 0, 2)  # [G, T*I/G, O/G]
    out = patches @ w  # [G, B*H2*W2, O/G]
    return out.reshape(groups, batch, out_h, out_w, -1).transpose(1, 2, 3, 0, 4).reshape(batch, out_h, out_w, outputs)


def rows_convolve(x: Float[Array, "B H W I"], w: Float[Array, "KH KW I O"]) -> Float[Array, "B H W O"]:
    """The same convolution with stride 1 and one group: patches of one row, times the weights of all rows of the kernel.

    What they make of each row of the map is then added, shifted: a third of the patches is written. To lay all taps side by
    side took longer than their product (LOG.md).
    """
    batch, height, width, _ = x.shape
    rows, top, bottom = _taps(height, w.shape[0], 1)
    columns, left, right = _taps(width, w.shape[1], 1)
    x = jnp.pad(x.transpose(1, 0, 2, 3), ((top, bottom), (0, 0), (left, right), (0, 0)))  # rows first: shifts are whole slices
    patches = jnp.concatenate([x[:, :, column : column + width] for _, column in columns], -1)
    w = w[rows[0][0] : rows[-1][0] + 1, columns[0][0] : columns[-1][0] + 1]
    w = w.reshape(len(rows), -1, w.shape[-1]).transpose(1, 0, 2)  # [T*I, rows, O]
    out = patches.reshape(-1, len(w)) @ w.reshape(len(w), -1)
    taps = jnp.split(out.reshape(len(patches), batch, width, -1), len(rows), -1)
    return sum(tap[row : row + height] for tap, (_, row) in zip(taps, rows, strict=True)).transpose(1, 0, 2, 3)


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
