"""RandAugment (Cubuk et al., arXiv 1909.13719) on uint8 images in OpenCV and NumPy, as the 2021 recipe had it.

The 16 operations, their ranges and the grey fill are those of the released pipeline (deepmind-research,
nfnets/autoaugment.py): each layer picks one operation evenly and applies it, always (the probability that the released code
draws is never used). Randomness comes as addressed uniforms, so a view is the same on any topology. Layers x magnitude of
the released ImageNet runs: 4 x 5 (F0), 4 x 10 (F1, F2), 4 x 15 (F3 and up) (nfnets/experiment_nfnets.py).

Differences: lengths in pixels shrink with images of under 192 px, which the released runs never had; contrast turns
towards the mean grey, as Pillow and the paper have it (the released code takes the mean of the histogram's counts); the
sign of a geometric operation and all draws are ours.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from jaxtyping import UInt8

DRAWS_PER_LAYER = 4  # operation, sign, and the cutout's row and column
GREY = (128, 128, 128)  # what geometric operations show beyond the image's edge
MAX_MAGNITUDE = 10.0  # at which the ranges below are reached; larger magnitudes go beyond

Image = UInt8[np.ndarray, "H W 3"]


def rand_augment(image: Image, draws: Sequence[float], layers: int, magnitude: float | int) -> Image:
    """`image` after `layers` random operations; draws: layers x DRAWS_PER_LAYER uniforms in [0, 1)."""
    operations = list(OPERATIONS.values())
    for layer in range(layers):
        choice, sign, row, column = draws[layer * DRAWS_PER_LAYER : (layer + 1) * DRAWS_PER_LAYER]
        operation = operations[int(choice * len(operations))]
        image = operation(image, magnitude / MAX_MAGNITUDE, -1.0 if sign < 0.5 else 1.0, (row, column))
    return image


def _table(image: Image, table: np.ndarray) -> Image:
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))


def _blend(other: np.ndarray, image: Image, factor: float | int) -> Image:
    """other + factor (image - other), clipped; factor 1 is the image."""
    return cv2.addWeighted(image, factor, np.ascontiguousarray(other), 1 - factor, 0)


def _grey(image: Image) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _affine(image: Image, matrix: Sequence[Sequence[float | int]]) -> Image:
    """Each output pixel (x, y) takes the nearest input pixel at matrix @ (x, y, 1)."""
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    size = (image.shape[1], image.shape[0])
    return cv2.warpAffine(image, np.array(matrix, np.float64), size, flags=flags, borderValue=GREY)


def auto_contrast(image: Image) -> Image:
    """Each channel stretched to the full range."""
    tables = []
    for channel in range(3):
        low, high = int(image[..., channel].min()), int(image[..., channel].max())
        scale = 255 / (high - low) if high > low else 1.0
        tables.append((np.arange(256) - (low if high > low else 0)) * scale)
    return _table(image, np.stack(tables, axis=-1)[None])


def equalize(image: Image) -> Image:
    """Each channel's histogram made flat, by Pillow's rule: the last non-empty bin does not count to the step."""
    tables = []
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        filled = counts[counts > 0]
        step = (int(counts.sum()) - int(filled[-1])) // 255
        below = np.cumsum(counts) - counts
        tables.append((step // 2 + below) // step if step else np.arange(256))
    return _table(image, np.stack(tables, axis=-1)[None])


def posterize(image: Image, bits: int) -> Image:
    """Only the `bits` upper bits of each byte (0: black)."""
    return image & np.uint8(256 - 2 ** (8 - bits) if bits else 0)


def solarize(image: Image, threshold: int) -> Image:
    """Bytes from the threshold on are inverted."""
    values = np.arange(256)
    return _table(image, np.where(values < threshold, values, 255 - values))


def solarize_add(image: Image, addition: int, threshold: int = 128) -> Image:
    """Bytes below the threshold are made brighter."""
    values = np.arange(256)
    return _table(image, np.where(values < threshold, values + addition, values))


def color(image: Image, factor: float | int) -> Image:
    """0: grey; 1: the image; above: more saturated."""
    return _blend(cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), image, factor)


def contrast(image: Image, factor: float | int) -> Image:
    """0: the mean grey; 1: the image."""
    return _blend(np.full_like(image, int(_grey(image).mean() + 0.5)), image, factor)


def brightness(image: Image, factor: float | int) -> Image:
    """0: black; 1: the image."""
    return _table(image, np.arange(256) * factor)


def sharpness(image: Image, factor: float | int) -> Image:
    """0: smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, edges apart; 1: the image; above: sharper."""
    smooth = image.copy()
    if min(image.shape[:2]) > 2:
        kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
        smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def rotate(image: Image, degrees: float | int) -> Image:
    """About the centre, counter-clockwise."""
    height, width = image.shape[:2]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x, y = (width - 1) / 2, (height - 1) / 2
    return _affine(image, [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def cutout(image: Image, half: int, centre: tuple[float, float]) -> Image:
    """A grey square of side 2 x half about a centre (fractions of height and width), cut off at the edges."""
    row, column = int(centre[0] * image.shape[0]), int(centre[1] * image.shape[1])
    out = image.copy()
    out[max(row - half, 0) : row + half, max(column - half, 0) : column + half] = GREY
    return out


def _enhancement(function: Callable[[Image, float], Image]):
    return lambda image, level, sign, centre: function(image, level * 1.8 + 0.1)


def _pixels(length: float | int, side: int) -> float:
    """A length of the released recipe, shorter for images smaller than any that it was made for."""
    return length * min(1.0, side / 192)


# Level 1 is magnitude 10.
OPERATIONS: dict[str, Callable[[Image, float, float, tuple[float, float]], Image]] = {
    "AutoContrast": lambda image, level, sign, centre: auto_contrast(image),
    "Equalize": lambda image, level, sign, centre: equalize(image),
    "Invert": lambda image, level, sign, centre: 255 - image,
    "Rotate": lambda image, level, sign, centre: rotate(image, sign * 30 * level),
    "Posterize": lambda image, level, sign, centre: posterize(image, min(int(level * 4), 8)),
    "Solarize": lambda image, level, sign, centre: solarize(image, int(level * 256)),
    "Color": _enhancement(color),
    "Contrast": _enhancement(contrast),
    "Brightness": _enhancement(brightness),
    "Sharpness": _enhancement(sharpness),
    "ShearX": lambda image, level, sign, centre: _affine(image, [[1, sign * 0.3 * level, 0], [0, 1, 0]]),
    "ShearY": lambda image, level, sign, centre: _affine(image, [[1, 0, 0], [sign * 0.3 * level, 1, 0]]),
    "TranslateX": lambda image, level, sign, centre: _affine(
        image, [[1, 0, sign * level * _pixels(100, image.shape[1])], [0, 1, 0]]
    ),
    "TranslateY": lambda image, level, sign, centre: _affine(
        image, [[1, 0, 0], [0, 1, sign * level * _pixels(100, image.shape[0])]]
    ),
    "Cutout": lambda image, level, sign, centre: cutout(image, int(level * _pixels(40, min(image.shape[:2]))), centre),
    "SolarizeAdd": lambda image, level, sign, centre: solarize_add(image, int(level * 110)),
}
