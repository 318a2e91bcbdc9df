"""Host-side views of decoded images: random resized crops for training, centre crops for evaluation (NumPy and OpenCV).

uint8 in and out: a quarter of float32's bytes to the device, which applies MEAN and STD there. OpenCV releases the GIL.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8

MEAN_RGB = (0.485 * 255, 0.456 * 255, 0.406 * 255)  # ImageNet's, in units of uint8; (x - MEAN_RGB) / STDDEV_RGB
STDDEV_RGB = (0.229 * 255, 0.224 * 255, 0.225 * 255)
DRAWS_PER_VIEW = 5  # area, aspect ratio, row, column, flip
ASPECT = (3 / 4, 4 / 3)  # width / height of a training crop
MIN_AREA = 0.08  # of the image, of a training crop ("inception-style", Szegedy et al. 2015)

Images = UInt8[np.ndarray, "n H W 3"] | Sequence[np.ndarray]  # one array, or a list of [H, W, 3] of any sizes


def train_views(
    images: Images, uniforms: Float[np.ndarray, "n k"], size: int, flip: bool = True, min_area: float = MIN_AREA
) -> UInt8[np.ndarray, "n size size 3"]:
    """One random view of each image: a crop of random area and aspect ratio resized to size x size, and perhaps mirrored.

    `uniforms` [n, >= DRAWS_PER_VIEW] in [0, 1) decides everything (see `sampler.uniforms`). The crop covers a share of the
    image's area uniform in [min_area, 1]; its log aspect ratio is uniform, clipped so that the crop fits the image (no
    rejection loop, so that the number of draws is constant). `flip=False` for images whose mirror means something else.
    """
    if not 0 < min_area <= 1:
        raise ValueError(f"min_area={min_area}: expected above 0 and at most 1")
    if len(uniforms) != len(images) or uniforms.shape[1] < DRAWS_PER_VIEW:
        raise ValueError(f"uniforms has shape {uniforms.shape}: expected ({len(images)}, >= {DRAWS_PER_VIEW})")
    views = np.empty((len(images), size, size, 3), np.uint8)
    for view, image, draws in zip(views, images, uniforms.tolist(), strict=True):
        top, left, height, width = crop_box(image.shape[0], image.shape[1], draws, min_area)
        resized = _resize(image[top : top + height, left : left + width], size, size)
        view[:] = resized[:, ::-1] if flip and draws[4] < 0.5 else resized
    return views


def crop_box(height: int, width: int, draws: Sequence[float], min_area: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, in pixels and inside the image; draws as in `train_views`."""
    area = (min_area + (1 - min_area) * draws[0]) * height * width
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = math.exp(low + (high - low) * draws[1])
    # The crop fits if area / height^2 <= aspect <= width^2 / area; the interval is never empty.
    aspect = min(max(aspect, area / height**2), width**2 / area)
    crop_width = min(max(round(math.sqrt(area * aspect)), 1), width)
    crop_height = min(max(round(math.sqrt(area / aspect)), 1), height)
    top, left = int(draws[2] * (height - crop_height + 1)), int(draws[3] * (width - crop_width + 1))
    return top, left, crop_height, crop_width


def eval_views(images: Images, size: int, margin: int = 0) -> UInt8[np.ndarray, "n size size 3"]:
    """The deterministic view: short side to size + margin (bicubic), then the central size x size.

    With a margin of 32 this is the released code's `resize_crop_32` (nfnets/dataset.py).
    """
    if size < 1 or margin < 0:
        raise ValueError(f"size={size}, margin={margin}: expected size >= 1 and margin >= 0 pixels")
    views = np.empty((len(images), size, size, 3), np.uint8)
    for view, image in zip(views, images, strict=True):
        height, width = image.shape[:2]
        scale = (size + margin) / min(height, width)
        height, width = (max(size + margin, round(scale * side)) for side in (height, width))
        image = _resize(image, height, width, cv2.INTER_CUBIC)
        top, left = (height - size) // 2, (width - size) // 2
        view[:] = image[top : top + size, left : left + size]
    return views


def default_margin(size: int) -> int:
    """Pixels by which evaluation resizes beyond its crop: the released 32 from 128 px on, an eighth of small images."""
    return 32 if size >= 128 else size // 8


def _resize(image: np.ndarray, height: int, width: int, enlarge: int = cv2.INTER_LINEAR) -> np.ndarray:
    """Area averaging when shrinking (OpenCV's other filters alias), `enlarge` otherwise."""
    if image.shape[:2] == (height, width):
        return image
    shrink = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrink else enlarge)
