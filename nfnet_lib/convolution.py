"""Convolutions as the backend likes them, scaled weight standardisation, and pooling: functions of arrays.

XLA's CPU backend is fast at ordinary convolutions only: it runs grouped ones, and their gradients inside a loop as SAM's two
passes are, many times slower. So there they are one ordinary convolution a group, and so are their gradients, or else, where
groups are narrow or maps small, products of patches with matrices. On TPU the stem's maps are packed (`packed_weights`).
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Of a convolution: one a group; patches times a matrix; XLA's own, which may be grouped; the last but for 1x1 ones.
FORMS = ("split", "patches", "lax", "pointwise")

FLOOR = 1e-4  # of an output unit's variance times its fan-in (nfnets/base.py WSConv2D)
LARGE = 2**20  # bytes of weights that a core's cache does not hold beside all else

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

    The variance is floored so that variance * fan_in >= FLOOR. D: blocks, each by itself.
    """
    flat = w.astype(jnp.float32).reshape(*w.shape[:-4], -1, w.shape[-1])
    return _standardise(flat, gain[..., None, :]).reshape(w.shape)


@jax.custom_vjp
def _standardise(w: Float[Array, "*D F O"], gain: Float[Array, "*D 1 O"]) -> Float[Array, "*D F O"]:
    return _standardise_forward(w, gain)[0]


def _standardise_forward(w, gain):
    mean, squares = _moments(w)
    scale = jax.lax.rsqrt(jnp.maximum(squares, FLOOR))
    return (w - mean) * (scale * gain), (w, gain, mean, squares, scale)


def _moments(w: Float[Array, "*D F O"]) -> tuple[Float[Array, "*D 1 O"], Float[Array, "*D 1 O"]]:
    """Mean over the fan-in, and the sum of squared deviations from it."""
    mean = _fan_in_sums(w) / w.shape[-2]
    return mean, _fan_in_sums((w - mean) ** 2)


def _standardise_backward(residuals, slope):
    """In closed form: autodiff's passes over all weights are twice as many (LOG.md)."""
    w, gain, mean, squares, scale = residuals
    along = _fan_in_sums(slope * (w - mean)) * scale
    shrink = jnp.where(squares > FLOOR, along * scale * scale, 0)  # nothing where the variance is at its floor
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
    *lead, fan_in, _ = x.shape
    if backend() != "cpu":
        return x.sum(-2, keepdims=True)
    count = next(count for count in (8, 9, 3, 1) if fan_in % count == 0)
    parts = jax.lax.split(x, [fan_in // count] * count, axis=x.ndim - 2)
    return jnp.ones((*lead, 1, fan_in // count), x.dtype) @ sum(parts)


def standardised_convolve(
    xs: tuple[Float[Array, "B _ _ I"], ...], w: Float[Array, "KH KW IG O"], gain: Float[Array, " O"], stride: int, groups: int
) -> tuple[Float[Array, "B _ _ O"], ...]:
    """`convolve` of each x, the first the largest, with `standardise_weight` of w in x's type.

    Large float32 weights of small maps are standardised after the product, but for gradients and where a form is set.
    """
    x = xs[0]
    if w.nbytes >= LARGE and w.size > x.size and x.dtype == w.dtype and not _FORM.get():
        return _convolve_and_standardise(xs, w, gain, stride, groups)
    return _standardise_and_convolve(xs, w, gain, stride, groups)


def _standardise_and_convolve(xs, w, gain, stride, groups):
    with jax.named_scope("weights"):
        w = standardise_weight(w, gain).astype(xs[0].dtype)
    return tuple(convolve(x, w, stride, groups) for x in xs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _convolve_and_standardise(xs, w, gain, stride, groups):
    """(x * w - (x * 1) mean) scale: w is read, but not written again.

    Rounding grows with a unit's mean over its deviation; gradients sum to 0 over the fan-in, so training leaves the mean alone.
    """
    with jax.named_scope("weights"):
        mean, squares = _moments(w.reshape(-1, w.shape[-1]))
        scale = jax.lax.rsqrt(jnp.maximum(squares, FLOOR)) * gain
    ones = jnp.ones((*w.shape[:2], 1, groups), w.dtype)
    outs = []
    for x in xs:
        out = convolve(x, w, stride, groups)
        sums = patches_convolve(x.reshape(*x.shape[:3], groups, -1).sum(-1), ones, stride, groups)
        shift = sums[..., None] * mean.reshape(groups, -1)
        outs.append((out - shift.reshape(out.shape)) * scale[0])
    return tuple(outs)


# Gradients read standardised weights; without them they are no sooner there (LOG.md).
_convolve_and_standardise.defvjp(
    lambda xs, w, gain, *static: jax.vjp(lambda *inputs: _standardise_and_convolve(*inputs, *static), xs, w, gain),
    lambda stride, groups, pull, slopes: pull(slopes),
)


def convolve(
    x: Float[Array, "B H W I"], w: Float[Array, "KH KW IG O"], stride: int, groups: int
) -> Float[Array, "B H2 W2 O"]:
    """SAME convolution, NHWC by HWIO, in the form of `using`, or else the fastest on CPU (LOG.md) and "lax" elsewhere."""
    form = _FORM.get() or (_form_on_cpu(x.shape, w.shape[2], groups) if backend() == "cpu" else "lax")
    if form != "lax" and w.shape[:2] == (1, 1) and stride == 1:
        return x @ w[0, 0]
    if form == "split":
        return split_convolve(x, w, stride, groups)
    if form == "patches":
        return patches_convolve(x, w, stride, groups)
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=_LAYOUT, feature_group_count=groups
    )


_LAYOUT = ("NHWC", "HWIO", "NHWC")


def _form_on_cpu(size: tuple[int, ...], inputs: int, groups: int) -> str:
    """The form that was measured to be faster (LOG.md). size: [B, H, W, I] of the input; inputs: of one group."""
    if groups == 1:
        return "split" if inputs >= 16 else "patches"
    return "split" if inputs >= 32 and size[1] * size[2] > 16 else "patches"


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


def split_convolve(
    x: Float[Array, "B H W I"], w: Float[Array, "KH KW IG O"], stride: int, groups: int
) -> Float[Array, "B H2 W2 O"]:
    """The same convolution: an ordinary one for each group, whose gradients are ordinary convolutions, too."""
    w, padding = _used(x, w, stride)
    parts = zip(jnp.split(x, groups, -1), jnp.split(w, groups, -1), strict=True)
    return jnp.concatenate([_ordinary(x, w, stride, padding) for x, w in parts], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _ordinary(x: Float[Array, "B H W I"], w: Float[Array, "KH KW I O"], stride: int, padding) -> Float[Array, "B H2 W2 O"]:
    """XLA's convolution of one group, with gradients of its own. padding: as of `_used`."""
    return jax.lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=_LAYOUT)


def _ordinary_forward(x, w, stride, padding):
    return _ordinary(x, w, stride, padding), (x, w)


def _ordinary_backward(stride, padding, residuals, slope):
    """The gradient of the weights sums over images and positions. As a convolution: rows of the map are its rows, each kernel
    column's input channels its columns, and the pixels of a row, of all images, its channels; its kernel is the slope."""
    x, w = residuals
    (kernel_height, kernel_width), (batch, height, _, inputs) = w.shape[:2], x.shape
    if stride == 1:
        around = [(size - 1 - low, size - 1 - high) for size, (low, high) in zip(w.shape, padding, strict=False)]
        to_x = _ordinary(slope, w[::-1, ::-1].swapaxes(2, 3), 1, around)
    else:  # an ordinary one would read a slope with zeros between its pixels
        to_x = jax.vjp(lambda x: _patches_times(x, w, stride, 1, padding), x)[1](slope)[0]
    _, rows, width, outputs = slope.shape
    x = jnp.pad(x.transpose(1, 3, 2, 0), ((0, 0), (0, 0), padding[1], (0, 0)))  # [H, I, W, B]
    last = (width - 1) * stride + 1
    x = jnp.stack([x[:, :, tap : tap + last : stride] for tap in range(kernel_width)], 1)
    to_w = jax.lax.conv_general_dilated(
        x.reshape(1, height, kernel_width * inputs, width * batch),
        slope.transpose(1, 2, 0, 3).reshape(rows, 1, width * batch, outputs),
        (1, 1), (padding[0], (0, 0)), rhs_dilation=(stride, 1), dimension_numbers=_LAYOUT,
    )  # fmt: skip
    return to_x, to_w[0, :kernel_height].reshape(w.shape)


_ordinary.defvjp(_ordinary_forward, _ordinary_backward)


def patches_convolve(
    x: Float[Array, "B H W I"], w: Float[Array, "KH KW IG O"], stride: int, groups: int
) -> Float[Array, "B H2 W2 O"]:
    """The same convolution: the input shifted by each kernel tap, side by side as patches, times the weights of each group."""
    w, padding = _used(x, w, stride)
    return _patches_times(x, w, stride, groups, padding)


def _patches_times(x: Float[Array, "B H W I"], w: Float[Array, "KH KW IG O"], stride: int, groups: int, padding):
    """Groups come first before there are patches: to reorder those would be to copy nine times as much."""
    (kernel_height, kernel_width), (batch, height, width, channels) = w.shape[:2], x.shape
    out_h, out_w = -(-height // stride), -(-width // stride)
    x = x.reshape(batch, height, width, groups, channels // groups).transpose(3, 0, 1, 2, 4)
    x = jnp.pad(x, ((0, 0), (0, 0), *padding, (0, 0)))
    last_row, last_column = (out_h - 1) * stride + 1, (out_w - 1) * stride + 1
    shifted = [
        x[:, :, row : row + last_row : stride, column : column + last_column : stride]
        for row in range(kernel_height)
        for column in range(kernel_width)
    ]
    patches = jnp.concatenate(shifted, -1).reshape(groups, batch * out_h * out_w, -1)
    w = w.reshape(-1, groups, w.shape[3] // groups).transpose(1, 0, 2)  # [G, T*I/G, O/G]
    out = patches @ w  # [G, B*H2*W2, O/G]
    return out.reshape(groups, batch, out_h, out_w, -1).transpose(1, 2, 3, 0, 4).reshape(batch, out_h, out_w, -1)


def _used(x: Float[Array, "B H W I"], w: Float[Array, "KH KW IG O"], stride: int) -> tuple[Array, tuple]:
    """The kernel's taps that read a pixel under SAME padding, and the padding, low and high of both axes, that they need.

    A 3x3 kernel on a 1x1 image has one: the others would read nothing but padding.
    """
    taps, padding = [], []
    for size, kernel in zip(x.shape[1:3], w.shape, strict=False):
        out = -(-size // stride)
        before = max((out - 1) * stride + kernel - size, 0) // 2
        used = [tap for tap in range(kernel) if any(0 <= tap - before + i * stride < size for i in range(out))]
        taps.append(slice(used[0], used[-1] + 1))
        padding.append((before - used[0], max((out - 1) * stride + used[-1] - before + 1 - size, 0)))
    return w[*taps], tuple(padding)


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
