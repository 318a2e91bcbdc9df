"""RandAugment's operations against Pillow's, MixUp and CutMix against their definitions."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from nfnet_lib import randaugment as ra
from nfnet_lib.augment import Augmentation, mixed

SHEAR = (1, 0.291, -0.291 / 2, 0, 1, 0)  # Pillow counts from the pixels' edges, TensorFlow and we from their centres


@pytest.fixture(scope="module")
def image():
    from sklearn.datasets import load_sample_image

    pixels = load_sample_image("china.jpg")[100:196, 200:330]
    return (pixels * 0.9 + 15).astype(np.uint8)  # away from both ends, so that stretching changes it


def pillow(image, function, *arguments):
    return np.asarray(function(Image.fromarray(image), *arguments))


@pytest.mark.parametrize(
    "ours,theirs",
    [
        (lambda i: ra.auto_contrast(i), lambda i: pillow(i, ImageOps.autocontrast)),
        (lambda i: ra.equalize(i), lambda i: pillow(i, ImageOps.equalize)),
        (lambda i: ra.posterize(i, 3), lambda i: pillow(i, ImageOps.posterize, 3)),
        (lambda i: ra.solarize(i, 90), lambda i: pillow(i, ImageOps.solarize, 90)),
        (lambda i: ra.OPERATIONS["Invert"](i, 1.0, 1.0, (0.0, 0.0)), lambda i: pillow(i, ImageOps.invert)),
        (lambda i: ra.brightness(i, 1.7), lambda i: pillow(i, lambda p: ImageEnhance.Brightness(p).enhance(1.7))),
        (lambda i: ra.color(i, 0.4), lambda i: pillow(i, lambda p: ImageEnhance.Color(p).enhance(0.4))),
        (lambda i: ra.contrast(i, 1.6), lambda i: pillow(i, lambda p: ImageEnhance.Contrast(p).enhance(1.6))),
        (lambda i: ra.sharpness(i, 1.9), lambda i: pillow(i, lambda p: ImageEnhance.Sharpness(p).enhance(1.9))),
        (
            lambda i: ra.OPERATIONS["ShearX"](i, 0.97, 1.0, (0.0, 0.0)),
            lambda i: pillow(i, lambda p: p.transform(p.size, Image.AFFINE, SHEAR, fillcolor=ra.GREY)),
        ),
        (
            lambda i: ra.OPERATIONS["TranslateY"](i, 0.5, -1.0, (0.0, 0.0)),
            lambda i: pillow(i, lambda p: p.transform(p.size, Image.AFFINE, (1, 0, 0, 0, 1, -25), fillcolor=ra.GREY)),
        ),
        (lambda i: ra.rotate(i, 21.0), lambda i: pillow(i, lambda p: p.rotate(21, fillcolor=ra.GREY))),
    ],
    ids=["AutoContrast", "Equalize", "Posterize", "Solarize", "Invert", "Brightness", "Color", "Contrast", "Sharpness",
         "ShearX", "TranslateY", "Rotate"],
)  # fmt: skip
def test_operations_are_pillows(image, ours, theirs, request):
    """Photometric ones within a rounding; geometric ones, which pick the nearest pixel, but for ties and edges."""
    difference = np.abs(ours(image).astype(int) - theirs(image))
    geometric = request.node.callspec.id in ("ShearX", "TranslateY", "Rotate")
    if geometric:
        assert (difference.max(axis=-1) > 0).mean() < 0.06
    else:
        assert difference.max() <= 2 and difference.mean() < 0.5


def test_solarize_add_and_cutout(image):
    out = ra.solarize_add(image, 40)
    np.testing.assert_array_equal(out, np.where(image < 128, np.minimum(image.astype(int) + 40, 255), image))
    grey = ra.cutout(np.zeros((50, 60, 3), np.uint8), 5, (0.5, 0.0))
    assert (grey == 128).all(axis=-1).sum() == 10 * 5, "half of the square lies beyond the left edge"


def test_every_operation_changes_the_image_and_keeps_its_form(image):
    assert len(ra.OPERATIONS) == 16
    for name, operation in ra.OPERATIONS.items():
        before = image.copy()
        out = operation(image, 0.9, -1.0, (0.4, 0.6))
        assert out.shape == image.shape and out.dtype == np.uint8 and (out != image).any(), name
        np.testing.assert_array_equal(image, before, err_msg=f"{name} must not write to its input")
        operation(np.zeros((1, 1, 3), np.uint8), 1.5, 1.0, (0.0, 0.0))


def test_layers_apply_in_order_and_none_is_the_identity(image):
    assert ra.rand_augment(image, [], 0, 10) is image
    at = list(ra.OPERATIONS).index("Invert") / 16 + 1e-9
    np.testing.assert_array_equal(ra.rand_augment(image, [at, 0.3, 0.1, 0.1], 1, 10), 255 - image)
    np.testing.assert_array_equal(ra.rand_augment(image, [at, 0.3, 0.1, 0.1] * 2, 2, 10), image)


def test_mixup_and_cutmix_by_definition(image):
    other = np.ascontiguousarray(image[::-1])
    rng = np.random.default_rng(0)
    shares = []
    for draws in rng.random((300, 3)).tolist():
        out, share = mixed(image, other, draws, Augmentation(8, mixup_alpha=0.2), 1)
        np.testing.assert_allclose(out, share * image + (1 - share) * other.astype(float), atol=0.51)
        shares.append(share)
        out, share = mixed(image, other, draws, Augmentation(8, cutmix=True), 0)
        own = (out == image).all(axis=-1)
        assert own.mean() >= share - 1e-9 and ((out == other).all(axis=-1) | own).all()
    assert abs(np.mean(shares) - 0.5) < 0.06 and abs(np.var(shares) - 0.25 / 1.4) < 0.03, "Beta(0.2, 0.2)"
    both = Augmentation(8, mixup_alpha=0.2, cutmix=True)
    kinds = [(mixed(image, other, [0.4, 0.5, 0.5], both, pair)[0] == other).all(axis=-1).any() for pair in range(4)]
    assert kinds == [kinds[0], True, kinds[0], True], "every second pair is cut"


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"resolution": 0}, "resolution=0"),
        ({"resolution": 8, "min_area": 0}, "min_area=0"),
        ({"resolution": 8, "mixup_alpha": -1}, "mixup_alpha=-1"),
        ({"resolution": 8, "randaugment_layers": -2}, "randaugment_layers=-2"),
    ],
)
def test_bad_augmentation(arguments, words):
    with pytest.raises(ValueError, match=words):
        Augmentation(**arguments)
