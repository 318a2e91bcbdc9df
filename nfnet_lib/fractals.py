"""Labelled images without a download: iterated function systems in the manner of FractalDB (arXiv 2101.08515).

A class is a system of 2 to 5 contractive affine maps. Their singular values are sampled directly, under the constraint
that the sum of s1 + 2 s2 over n maps lies in [(5 + n) / 2, (6 + n) / 2] (arXiv 2110.03091): looser systems are blobs,
tighter ones dust. An instance of it jitters the maps and varies pose, colours and background, without which nearest
neighbours in pixel space would solve the task.

An image is a pure function of (seed, class, instance), and the numpy code below is its definition. It uses only
operations that IEEE 754 rounds correctly (+ - * / and comparisons; angles come from a rounded table; sums run in a
fixed order), so the bits depend neither on the CPU nor on what else is in the batch.
"""

import operator

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from nfnet_lib.sampler import random_bits, uniforms

VERSION = 1  # of the images; bump it, and the golden hashes, when any pixel changes
HELDOUT_INSTANCE = 2**31  # training instances lie below, held-out ones from here on
MAX_MAPS = 5
BURN_IN = 6  # chaos-game steps from a fixed point before points are drawn
DRAWN = 24  # steps drawn; the number of particles sets the number of points
MAX_SINGULAR = 0.9  # times the largest jitter below 1, so every instance contracts
MIN_FILLED = 0.15  # of a 32 x 32 grid over the attractor's bounding square; sparser systems are resampled
ATTEMPTS = 64
MAX_TURN = 0.1  # of a full turn, between the extremes: 18 degrees either way
ZOOM = (0.75, 1.15)  # side of the attractor's bounding square / side of the canvas
SHIFT = 0.08  # of the canvas, either way
BACK_VALUE = 0.35  # of the background's brightest corner (HSV); fractals have 0.6 to 1
FRONT_SATURATION = 0.6  # at most
CHUNK = 32  # images rendered together: fits the second-level cache

_ANGLES = 2 * np.pi * np.arange(4096) / 4096
_COS, _SIN = np.round(np.cos(_ANGLES), 6), np.round(np.sin(_ANGLES), 6)  # rounded: libm's last bit differs by machine


class FractalGenerator:
    """Renders instances of `num_classes` fractal classes as RGB images of `image_size` pixels a side.

    Class c is the same for every `num_classes` above it. Thread-safe.

    hue_spread: width, in turns of the colour circle, of the hues that a class's fractals take. 1: colour says nothing
    of the class. Smaller: colour is a cue that is learned before shape, as the easy cues of photographs are.

    Raises ValueError for values out of range.
    """

    def __init__(self, num_classes: int, image_size: int, seed: int = 0, hue_spread: float = 1.0):
        self.num_classes, self.image_size, self.seed = map(operator.index, (num_classes, image_size, seed))
        if not 1 <= num_classes <= 2**24:
            raise ValueError(f"num_classes={num_classes}: expected 1 to {2**24}")
        if not 0 <= hue_spread <= 1:
            raise ValueError(f"hue_spread={hue_spread}: expected 0 to 1 turn")
        self.hue_spread = hue_spread
        if not 8 <= image_size <= 512:
            raise ValueError(f"image_size={image_size}: expected 8 to 512 pixels")
        self._ready = np.zeros(num_classes, bool)
        self._maps = np.zeros(
            (num_classes, MAX_MAPS, 6), np.float64
        )  # a b c d e f: (x, y) -> (ax + by + e, cx + dy + f)
        self._table = np.zeros(
            (num_classes, 256), np.uint8
        )  # random byte -> map, so probabilities are multiples of 1/256
        self._counts = np.zeros(num_classes, np.int64)

    def render(self, classes: Int[np.ndarray, " n"], instances: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n H W 3"]:
        """The images of (class, instance) pairs, uint8 [n, image_size, image_size, 3]."""
        classes, instances = np.asarray(classes, np.int64), np.asarray(instances, np.int64)
        if classes.shape != instances.shape:
            raise ValueError(f"classes has shape {classes.shape}, instances {instances.shape}: expected the same")
        if classes.size and not (0 <= classes.min() and classes.max() < self.num_classes):
            raise ValueError(f"classes from {classes.min()} to {classes.max()}: expected 0 to {self.num_classes - 1}")
        self._prepare(np.unique(classes[~self._ready[classes]]))
        images = np.empty((len(classes), self.image_size, self.image_size, 3), np.uint8)
        for i in range(0, len(classes), CHUNK):
            images[i : i + CHUNK] = self._render(classes[i : i + CHUNK], instances[i : i + CHUNK])
        return images

    def _prepare(self, classes: Int[np.ndarray, " c"]) -> None:
        """Samples the systems of classes not seen before; degenerate ones again, with the attempt as part of the address."""
        for attempt in range(ATTEMPTS):
            if not classes.size:
                return
            maps, counts, table = sample_systems(self.seed, classes, attempt)
            maps, good = _normalise(self.seed, classes, maps, counts, table)
            good |= attempt == ATTEMPTS - 1
            done = classes[good]
            self._maps[done], self._table[done], self._counts[done] = maps[good], table[good], counts[good]
            self._ready[done] = True  # last, so that other threads never see half a system
            classes = classes[~good]

    def _render(self, classes: Int[np.ndarray, " n"], instances: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n H W 3"]:
        size, batch = self.image_size, len(classes)
        u = uniforms(self.seed, instances, classes, 32 + 2 * MAX_MAPS, "fractal-instance").astype(np.float32)
        maps = self._maps[classes].astype(np.float32)
        maps[:, :, :4] *= (0.9 + 0.2 * u[:, 32 : 32 + MAX_MAPS, None]).astype(np.float32)
        maps[:, :, 4:] *= (0.85 + 0.3 * u[:, 32 + MAX_MAPS :, None]).astype(np.float32)
        maps = _pose(maps, u, size)
        particles = max(32, size * size // 8)
        bits = random_bits("fractal-points", self.seed, _cross(instances, particles), np.repeat(classes, particles), 4)
        x, y, colour = _chaos_game(maps, self._counts[classes], self._table[classes], bits.reshape(batch, particles, 4))

        # One cell of margin collects what falls outside the canvas.
        wide = size + 2
        np.clip(x, -1, size, out=x)
        np.clip(y, -1, size, out=y)
        cell = ((y + np.float32(1)).astype(np.int32) * wide + (x + np.float32(1)).astype(np.int32)).astype(np.int64)
        cell += (np.arange(batch) * wide * wide)[:, None]
        cells = batch * wide * wide
        hits = np.bincount(cell.ravel(), minlength=cells)
        total = np.bincount(cell.ravel(), weights=colour.ravel(), minlength=cells)
        hits = hits.reshape(batch, wide, wide)[:, 1:-1, 1:-1].astype(np.float32)
        total = total.reshape(batch, wide, wide)[:, 1:-1, 1:-1].astype(np.float32)
        if self.hue_spread < 1:
            mean = uniforms(self.seed, classes, 0, 1, "fractal-hue").astype(np.float32)[:, 0]
            u[:, 20] = mean + np.float32(self.hue_spread) * (u[:, 20] - np.float32(0.5))
            u[:, 21:23] *= np.float32(self.hue_spread)
        return _paint(hits, total / np.maximum(hits, 1), u)


def sample_systems(
    seed: int, classes: Int[np.ndarray, " c"], attempt: int
) -> tuple[Float[np.ndarray, "c M 6"], Int[np.ndarray, " c"], UInt8[np.ndarray, "c 256"]]:
    """Candidate systems: maps (a b c d e f; those beyond a class's number are never chosen), numbers of maps, byte tables."""
    u = uniforms(seed, classes, attempt, 2 + 7 * MAX_MAPS, "fractal-class")
    counts = 2 + (u[:, 0] * (MAX_MAPS - 1)).astype(np.int64)
    used = np.arange(MAX_MAPS) < counts[:, None]
    v = u[:, 2:].reshape(-1, MAX_MAPS, 7)

    # Singular values s1 >= s2 with the given sum of s1 + 2 s2: scale random ones towards 0 or towards 1 as needed.
    s1, s2 = np.maximum(v[..., 0], v[..., 1]), np.minimum(v[..., 0], v[..., 1])
    sums = np.cumsum(np.where(used, s1 + 2 * s2, 0), axis=1)[:, -1]
    target = (5 + counts + u[:, 1]) / 2
    down = np.minimum(1, target / sums)[:, None]
    up = np.minimum(1, (3 * counts - target) / (3 * counts - sums))[:, None]
    s1, s2 = (np.minimum(MAX_SINGULAR, 1 - (1 - s * down) * np.where(down < 1, 1, up)) for s in (s1, s2))
    s2 = np.where(v[..., 2] < 0.5, s2, -s2)  # half of the maps mirror

    (c1, d1), (c2, d2) = _turn(v[..., 3]), _turn(v[..., 4])  # maps = rotation diag(s1, s2) rotation
    linear = [c1 * s1 * c2 - d1 * s2 * d2, -c1 * s1 * d2 - d1 * s2 * c2]
    linear += [d1 * s1 * c2 + c1 * s2 * d2, -d1 * s1 * d2 + c1 * s2 * c2]
    maps = np.stack([*linear, 2 * v[..., 5] - 1, 2 * v[..., 6] - 1], axis=-1)

    weight = np.where(used, np.maximum(np.abs(s1 * s2), 0.02), 0)  # ~ |det|: points spread evenly over the attractor
    edges = np.cumsum(weight, axis=1)
    edges = np.floor(256 * edges / edges[:, -1:])
    table = (np.arange(256)[None, :, None] >= edges[:, None, :]).sum(axis=2)
    return maps, counts, np.minimum(table, counts[:, None] - 1).astype(np.uint8)


def _normalise(
    seed: int,
    classes: Int[np.ndarray, " c"],
    maps: Float[np.ndarray, "c M 6"],
    counts: Int[np.ndarray, " c"],
    table: UInt8[np.ndarray, "c 256"],
) -> tuple[Float[np.ndarray, "c M 6"], Bool[np.ndarray, " c"]]:
    """The systems moved so that their attractors' bounding squares become [-1, 1]^2, and which of them fill enough of it."""
    particles, grid = 128, 32
    bits = random_bits("fractal-bounds", seed, _cross(classes, particles), 0, 4).reshape(-1, particles, 4)
    x, y, _ = _chaos_game(maps.astype(np.float32), counts, table, bits)
    low = np.stack([x.min(axis=1), y.min(axis=1)], axis=1).astype(np.float64)
    high = np.stack([x.max(axis=1), y.max(axis=1)], axis=1).astype(np.float64)
    centre, half = (low + high) / 2, np.maximum((high - low).max(axis=1), 1e-6) / 2
    one = np.ones(len(classes))
    maps = _conjugate(maps, np.stack([one / half, 0 * one, 0 * one, one / half], 1), -centre / half[:, None])
    x, y = (((p - c[:, None]) / half[:, None] + 1) * (grid / 2) for p, c in ((x, centre[:, 0]), (y, centre[:, 1])))
    cell = np.clip(y, 0, grid - 1).astype(np.int64) * grid + np.clip(x, 0, grid - 1).astype(np.int64)
    cell += np.arange(len(classes))[:, None] * grid * grid
    filled = np.bincount(cell.ravel(), minlength=len(classes) * grid * grid).reshape(len(classes), -1) > 0
    return maps, filled.sum(axis=1) >= MIN_FILLED * grid * grid


def _chaos_game(
    maps: Float[np.ndarray, "n M 6"],
    counts: Int[np.ndarray, " n"],
    table: UInt8[np.ndarray, "n 256"],
    bits: Int[np.ndarray, "n P 4"] | np.ndarray,
) -> tuple[Float[np.ndarray, "n Q"], Float[np.ndarray, "n Q"], Float[np.ndarray, "n Q"]]:
    """P particles walk in parallel, each step by a random map; coordinates and colour of the Q = DRAWN * P points drawn.

    They start at fixed points, which lie on the attractor. A point's colour in [0, 1] averages its maps' numbers
    with halving weights, as in fractal flames.
    """
    batch, particles, _ = bits.shape
    a, b, c, d, e, f = np.moveaxis(maps, -1, 0)
    det = (1 - a) * (1 - d) - b * c
    origin = np.arange(particles) % counts[:, None] + np.arange(batch)[:, None] * MAX_MAPS
    x = (((1 - d) * e + b * f) / det).ravel()[origin]
    y = (((1 - a) * f + c * e) / det).ravel()[origin]
    choices = np.ascontiguousarray(bits.astype("<u8").view(np.uint8)[..., : BURN_IN + DRAWN].transpose(2, 0, 1))
    choices = table.ravel()[choices + np.arange(0, 256 * batch, 256)[:, None]] + origin[:, :1]  # indices into all maps
    a, b, c, d, e, f = (np.ascontiguousarray(m).ravel() for m in (a, b, c, d, e, f))
    tint = (np.arange(MAX_MAPS, dtype=np.float32) / np.maximum(counts[:, None] - 1, 1)).astype(np.float32).ravel()
    colour = np.full_like(x, 0.5)
    drawn = np.empty((3, batch, DRAWN, particles), np.float32)
    for step, chosen in enumerate(choices):
        x, y = a[chosen] * x + b[chosen] * y + e[chosen], c[chosen] * x + d[chosen] * y + f[chosen]
        colour = (colour + tint[chosen]) * np.float32(0.5)
        if step >= BURN_IN:
            drawn[0, :, step - BURN_IN], drawn[1, :, step - BURN_IN], drawn[2, :, step - BURN_IN] = x, y, colour
    return tuple(drawn.reshape(3, batch, -1))


def _pose(maps: Float[np.ndarray, "n M 6"], u: Float[np.ndarray, "n k"], size: int) -> Float[np.ndarray, "n M 6"]:
    """The systems in pixel coordinates of one canvas each: rotated, mirrored, zoomed and shifted at random."""
    turn = (u[:, 0] - np.float32(0.5)) * np.float32(MAX_TURN)
    cos, sin = _turn(turn - np.floor(turn))
    zoom = (ZOOM[0] + (ZOOM[1] - ZOOM[0]) * u[:, 1]) * size / 2
    mirror_x, mirror_y = np.where(u[:, 2] < 0.5, 1, -1), np.where(u[:, 3] < 0.5, 1, -1)
    linear = np.stack([cos * zoom * mirror_x, -sin * zoom * mirror_y, sin * zoom * mirror_x, cos * zoom * mirror_y], 1)
    shift = size * (0.5 + SHIFT * (2 * u[:, 4:6].astype(np.float64) - 1))
    return _conjugate(maps.astype(np.float64), linear.astype(np.float64), shift).astype(np.float32)


def _conjugate(
    maps: Float[np.ndarray, "n M 6"], linear: Float[np.ndarray, "n 4"], shift: Float[np.ndarray, "n 2"]
) -> Float[np.ndarray, "n M 6"]:
    """The systems whose attractors are the images of these ones under z -> P z + q: A -> P A P^-1, t -> P t + q - A' q."""
    p, q, r, s = np.moveaxis(linear[:, None, :], -1, 0)
    a, b, c, d, e, f = np.moveaxis(maps, -1, 0)
    det = p * s - q * r
    pa, pb, pc, pd = p * a + q * c, p * b + q * d, r * a + s * c, r * b + s * d
    a, b, c, d = (pa * s - pb * r) / det, (pb * p - pa * q) / det, (pc * s - pd * r) / det, (pd * p - pc * q) / det
    x, y = shift[:, None, 0], shift[:, None, 1]
    return np.stack([a, b, c, d, p * e + q * f + x - (a * x + b * y), r * e + s * f + y - (c * x + d * y)], axis=-1)


def _paint(
    hits: Float[np.ndarray, "n H W"], colour: Float[np.ndarray, "n H W"], u: Float[np.ndarray, "n k"]
) -> UInt8[np.ndarray, "n H W 3"]:
    """Two-coloured fractal over a smooth two-dimensional gradient; random hues, and a difference in brightness."""
    size = hits.shape[1]
    opacity = hits / (hits + (1 + 5 * u[:, 6])[:, None, None])
    corners = _rgb(u[:, 14:15] + 0.4 * u[:, 16:20], 0.8 * u[:, 15:16], BACK_VALUE * u[:, 8:12])  # [n, 4, 3]
    front = _rgb(u[:, 20:21] + 0.5 * u[:, 21:23], FRONT_SATURATION * u[:, 23:25], 1 - 0.4 * u[:, 12:14])  # [n, 2, 3]
    ramp = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    ramp = ramp * ramp * (3 - 2 * ramp)
    image = np.empty((len(hits), size, size, 3), np.uint8)
    for channel in range(3):
        k = corners[:, :, channel, None]
        left, right = k[:, 0] + (k[:, 1] - k[:, 0]) * ramp, k[:, 2] + (k[:, 3] - k[:, 2]) * ramp  # [n, H]
        plane = left[:, :, None] + (right - left)[:, :, None] * ramp
        first, second = front[:, 0, channel, None, None], front[:, 1, channel, None, None]
        plane += opacity * (first + (second - first) * colour - plane)
        image[..., channel] = plane * np.float32(255) + np.float32(0.5)
    return image


def _rgb(
    hue: Float[np.ndarray, "n k"], saturation: Float[np.ndarray, " n #k"], value: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, "n k 3"]:
    """HSV to RGB, all in [0, 1]; hue in turns, of any size."""
    sector = (6 * hue[..., None] + np.array([5, 3, 1], np.float32)) % 6
    depth = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return (value[..., None] * (1 - saturation[..., None] * depth)).astype(np.float32)


def _turn(fraction: Float[np.ndarray, "..."]) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Cosine and sine of a fraction in [0, 1) of a full turn."""
    index = (fraction * len(_COS)).astype(np.int64)
    return _COS[index], _SIN[index]


def _cross(positions: Int[np.ndarray, " n"], particles: int) -> Int[np.ndarray, " m"]:
    """One address for each (position, particle)."""
    return (positions[:, None] * 2**16 + np.arange(particles)).ravel()
