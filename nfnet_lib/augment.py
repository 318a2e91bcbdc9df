"""Host-side views of decoded images: random resized crops for training, centre crops for evaluation (NumPy and OpenCV).

uint8 in and out: a quarter of float32's bytes to the device, which applies MEAN and STD there. OpenCV releases the GIL.
"""

import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from scipy.special import betaincinv

MEAN_RGB = (0.485 * 255, 0.456 * 255, 0.406 * 255)  # ImageNet's, in units of uint8; (x - MEAN_RGB) / STDDEV_RGB
STDDEV_RGB = (0.229 * 255, 0.224 * 255, 0.225 * 255)
DRAWS_PER_VIEW = 5  # area, aspect ratio, row, column, flip
DRAWS_PER_MIX = 3  # share, row, column
ASPECT = (3 / 4, 4 / 3)  # width / height of a training crop
SMALL = 64  # pixels; views of laptop studies, which always average when they shrink
LONGEST = 8  # times the short side: what evaluation looks at of a longer picture
MIN_AREA = 0.08  # of the image, of a training crop ("inception-style", Szegedy et al. 2015)

Image = UInt8[np.ndarray, "H W 3"]
Images = UInt8[np.ndarray, "n H W 3"] | Sequence[np.ndarray]  # one array, or a list of [H, W, 3] of any sizes


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training views are made, in this order: crop, mirror, MixUp or CutMix, RandAugment (as arXiv 2102.06171, A.1, did).

    resolution: side in pixels. min_area: smallest share of the image that a crop covers. mixup_alpha: MixUp of pairs with
    weights from Beta(alpha, alpha), 0 for none. cutmix: CutMix with an even weight. With both, every second pair gets
    MixUp and the others CutMix. ValueError for what is out of range.
    """

    resolution: int
    flip: bool = True
    min_area: float | int = MIN_AREA
    mixup_alpha: float | int = 0.0
    cutmix: bool = False
    randaugment_layers: int = 0
    randaugment_magnitude: float | int = 10.0

    def __post_init__(self):
        if self.resolution < 1:
            raise ValueError(f"resolution={self.resolution}: expected at least 1 pixel")
        if not 0 < self.min_area <= 1:
            raise ValueError(f"min_area={self.min_area}: expected above 0 and at most 1")
        for name in ("mixup_alpha", "randaugment_layers", "randaugment_magnitude"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0")

    @property
    def mixes(self) -> bool:
        """Whether views are mixed in pairs."""
        return self.cutmix or self.mixup_alpha > 0


def train_views(
    images: Images, uniforms: Float[np.ndarray, "n k"], size: int, flip: bool = True, min_area: float | int = MIN_AREA
) -> UInt8[np.ndarray, "n size size 3"]:
    """One random view of each image: a crop of random area and aspect ratio resized to size x size, and perhaps mirrored.

    `uniforms` [n, >= DRAWS_PER_VIEW] in [0, 1) decides everything (see `sampler.uniforms`). The crop covers a share of the
    image's area uniform in [min_area, 1]; its log aspect ratio is uniform, clipped so that the crop fits the image (no
    rejection loop, so that the number of draws is constant). `flip=False` for images whose mirror means something else.
    """
    augmentation = Augmentation(size, flip, min_area)
    if len(uniforms) != len(images) or uniforms.shape[1] < DRAWS_PER_VIEW:
        raise ValueError(f"uniforms has shape {uniforms.shape}: expected ({len(images)}, >= {DRAWS_PER_VIEW})")
    views = np.empty((len(images), size, size, 3), np.uint8)
    for view, image, draws in zip(views, images, uniforms.tolist(), strict=True):
        train_view(image, draws, augmentation, view)
    return views


def train_view(
    image: Image, draws: Sequence[float], augmentation: Augmentation, out: UInt8[np.ndarray, "size size 3"]
) -> None:
    """Write the crop, perhaps mirrored, of one image to `out`; draws as in `train_views`."""
    top, left, height, width = crop_box(image.shape[0], image.shape[1], draws, augmentation.min_area)
    _resize(image[top : top + height, left : left + width], out)
    if augmentation.flip and draws[4] < 0.5:
        cv2.flip(out, 1, dst=out)


def mixed(
    image: Image, other: Image, draws: Sequence[float], augmentation: Augmentation, pair: int
) -> tuple[Image, float]:
    """(`image` mixed with `other` of the same size, the share that is `image`'s); pair: number of the pair in the stream.

    draws: DRAWS_PER_MIX uniforms. MixUp: arXiv 1710.09412; CutMix: a box of `image` about an even centre over `other`, its
    share being what the edges leave of it (deepmind-research, nfnets/dataset.py).
    """
    if augmentation.mixup_alpha and not (augmentation.cutmix and pair % 2):
        share = float(betaincinv(augmentation.mixup_alpha, augmentation.mixup_alpha, draws[0]))
        return cv2.addWeighted(image, share, other, 1 - share, 0), share
    height, width = image.shape[:2]
    side = math.sqrt(1 - draws[0])
    half_height, half_width = int(side * height) // 2, int(side * width) // 2
    row, column = int(draws[1] * height), int(draws[2] * width)
    box = np.s_[max(row - half_height, 0) : row + half_height, max(column - half_width, 0) : column + half_width]
    out = other.copy()
    out[box] = image[box]
    return out, image[box].size / image.size


def crop_box(height: int, width: int, draws: Sequence[float], min_area: float | int) -> tuple[int, int, int, int]:
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


def eval_views(images: Images, size: int, margin: int = 0, squash: bool = True) -> UInt8[np.ndarray, "n size size 3"]:
    """The deterministic view: the picture at size + margin (bicubic), of which the central size x size is cut.

    squash: both sides to that, whatever the picture's shape, as NFNets are evaluated: with a margin of 32 the released code's
    `resize_crop_32` (nfnets/dataset.py; timm's crop_mode "squash"). Or else the short side, as ViTs are (big_vision's
    resize_small and central_crop). `variants` say which.
    """
    if size < 1 or margin < 0:
        raise ValueError(f"size={size}, margin={margin}: expected size >= 1 and margin >= 0 pixels")
    views = np.empty((len(images), size, size, 3), np.uint8)
    for view, image in zip(views, images, strict=True):
        height = width = size + margin
        if not squash:
            image = _centre(image)
            scale = (size + margin) / min(image.shape[:2])
            height, width = (max(size + margin, round(scale * side)) for side in image.shape[:2])
        resized = np.empty((height, width, 3), np.uint8)
        _resize(image, resized, enlarge=cv2.INTER_CUBIC)
        top, left = (height - size) // 2, (width - size) // 2
        view[:] = resized[top : top + size, left : left + size]
    return views


def _centre(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The middle of pictures so long that to enlarge all of them would take gigabytes."""
    height, width = image.shape[:2]
    most = LONGEST * min(height, width)
    top, left = max(height - most, 0) // 2, max(width - most, 0) // 2
    return image[top : height - top, left : width - left]


def default_margin(size: int) -> int:
    """Pixels by which evaluation resizes beyond its crop: the released 32 from 128 px on, an eighth of small images."""
    return 32 if size >= 128 else size // 8


def _resize(image: np.ndarray, out: np.ndarray, enlarge: int = cv2.INTER_LINEAR) -> None:
    """Area averaging when shrinking to under SMALL pixels or to less than half, `enlarge` otherwise.

    OpenCV's other filters alias; between half and full size that is slight, the released pipeline did so too (bicubic,
    nfnets/dataset.py), and averaging would take as long as decoding.
    """
    if image.shape == out.shape:
        out[:] = image
        return
    shrink = math.sqrt(image.shape[0] * image.shape[1] / (out.shape[0] * out.shape[1]))
    average = shrink > (1 if min(out.shape[:2]) < SMALL else 2)
    cv2.resize(image, out.shape[1::-1], dst=out, interpolation=cv2.INTER_AREA if average else enlarge)
