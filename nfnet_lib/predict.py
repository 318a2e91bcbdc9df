"""A picture in, the likeliest classes out, with any weights that `weights.load_weights` reads."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from nfnet_lib import models
from nfnet_lib.augment import default_margin, eval_views
from nfnet_lib.compiler import options
from nfnet_lib.config import ConfigError, config_from_params
from nfnet_lib.decode import FORMATS, decode_image
from nfnet_lib.records import SUMMARY, read_summary
from nfnet_lib.step import normalise
from nfnet_lib.weights import load_weights

LARGEST = 4096  # pixels, of a run as well (config.py)


def predict(
    image: str | os.PathLike | np.ndarray, weights: str | os.PathLike,
    labels: str | os.PathLike | None = None, *, resolution: int | None = None, top: int | None = None,
):  # fmt: skip
    """The likeliest classes of a picture (a file, or its pixels): a DataFrame of class, label, probability.

    top: how many, by default 5, or all of fewer.

    weights: see `weights.load_weights`. labels: a file of class names (see `read_labels`). resolution: in pixels, by
    default that at which the variant is tested (of a run of ours, its eval_resolution; of a ViT file, its own). The view is
    that of evaluation (`augment.eval_views`), with a run's eval_margin, or 32 px from 128 px on. Of a run with a sigmoid loss
    each class has a probability of its own. FileNotFoundError, WeightsError or ConfigError for what can't be read or does not
    fit.
    """
    import pandas as pd

    pixels = image if isinstance(image, np.ndarray) else read_image(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ConfigError(f"image: pixels are {pixels.dtype} {list(pixels.shape)}; expected uint8 [H, W, 3]")
    model, params, prepared = _loaded(weights, resolution)
    names = read_labels(labels, model.num_classes) if labels else [""] * model.num_classes
    top = min(5, model.num_classes) if top is None else top
    if not 1 <= top <= model.num_classes:
        raise ConfigError(f"top: {top} is out of range; allowed: 1 to {model.num_classes}, the classes of the weights")
    logits = _logits(model.variant.name, model.num_classes, tuple(sorted(model.settings.items())))
    probability = jax.nn.softmax if loss_of(weights) == "softmax" else jax.nn.sigmoid
    probabilities = np.asarray(probability(logits(params, prepared([pixels]))[0]))
    best = np.argsort(-probabilities, kind="stable")[:top]
    return pd.DataFrame(
        {"class": best, "label": [names[i] for i in best], "probability": probabilities[best].astype(float)}
    )


@functools.lru_cache(maxsize=4)
def _logits(name: str, num_classes: int, settings: tuple):
    """Compiled once for all pictures that a process looks at."""
    return jax.jit(models.create(name, num_classes, **dict(settings)).apply, compiler_options=options(soon=True))


def embedder(weights: str | os.PathLike, resolution: int | None = None):
    """A function from a list of pictures, [H, W, 3] each, to their pooled features, float32 [n, C], of length 1."""
    model, params, prepared = _loaded(weights, resolution)

    @jax.jit
    def features(params, inputs):
        pooled = model.apply_with_features(params, inputs)[1]["features"]
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)

    return lambda pictures: np.asarray(features(params, prepared(pictures)))


def _loaded(weights: str | os.PathLike, resolution: int | None):
    """(model, its parameters, a function from pictures to its inputs at `resolution`, by default that of its test)."""
    variant, params = load_weights(weights)
    model = models.create(variant)
    if resolution is None:
        tested = variant.settings.get("image_size", model.variant.test_px)
        resolution = _config_of_run(weights).get("eval_resolution", tested)
    multiple = model.variant.resolution_multiple
    if not multiple <= resolution <= LARGEST or resolution % multiple:
        raise ConfigError(f"resolution: {resolution} is not a multiple of {multiple} up to {LARGEST}, which {variant} needs")

    margin = eval_margin(weights, resolution)

    def prepared(pictures):
        views = jnp.asarray(eval_views(pictures, resolution, margin, model.variant.squash))
        return normalise(views, variant.pixels)

    return model, params, prepared


def _config_of_run(weights: str | os.PathLike) -> dict[str, Any]:
    """The parameters of a finished run of ours; {} of weights in a file."""
    return read_summary(weights)["config"] if (Path(weights) / SUMMARY).is_file() else {}


def eval_margin(weights: str | os.PathLike, resolution: int) -> int:
    """Pixels by which a picture is resized beyond its crop of this resolution: a run's own, in proportion, or the default."""
    config = _config_of_run(weights)
    if (margin := config.get("eval_margin", -1)) < 0:
        return default_margin(resolution)
    return round(margin * resolution / config["eval_resolution"])


def loss_of(weights: str | os.PathLike) -> str:
    """That by which weights were trained, "softmax" or "sigmoid": a run's own, of files "softmax"."""
    return _config_of_run(weights).get("loss", "softmax")


def example_picture(
    weights: str | os.PathLike, picture: str | os.PathLike | None = None
) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
    """(pixels, what they are) of `picture`, or of one that suits the weights: a run's first held-out example.

    For a weight file it is scikit-learn's photograph of a flower.
    """
    from nfnet_lib.data import load_sources

    if picture is not None:
        return read_image(picture), Path(picture).name
    if not Path(weights).is_dir():
        from sklearn.datasets import load_sample_image

        return load_sample_image("flower.jpg"), "scikit-learn's flower.jpg"
    config = config_from_params(read_summary(weights)["config"])
    pixels, label = load_sources(config)[1][0]
    return pixels, f"held-out example of {config.dataset}, class {label}"


def read_image(path: str | os.PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels as training reads them, turned upright as the camera says (EXIF). ConfigError for what is no picture."""
    from PIL import ExifTags, Image, ImageOps

    if not Path(path).is_file():
        raise FileNotFoundError(f"image: {path} does not exist")
    try:
        upright = Image.fromarray(decode_image(Path(path).read_bytes()))
        with Image.open(path, formats=FORMATS) as image:  # Pillow has readers of more, some run programs
            upright.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
        return np.asarray(ImageOps.exif_transpose(upright))
    except Exception as error:  # Pillow's readers raise many kinds
        raise ConfigError(f"image: {path} is not a readable picture: {error}") from None


def read_labels(path: str | os.PathLike, num_classes: int) -> list[str]:
    """Class names: one a line, or JSON, a list or {"0": name}; a name may be a [WordNet id, name] pair.

    ConfigError unless there are num_classes of them.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"labels: {path} can't be read: {error}") from None
    if text.lstrip()[:1] in ("{", "["):
        try:
            content = json.loads(text)
            values = [content[str(i)] for i in range(len(content))] if isinstance(content, dict) else content
        except (ValueError, KeyError) as error:
            raise ConfigError(f"labels: {path} is no JSON list or mapping from 0, 1, ...: {error}") from None
        names = [str(value[-1] if isinstance(value, list) and value else value) for value in values]
    else:
        names = text.splitlines()
    if len(names) != num_classes:
        raise ConfigError(f"labels: {path} has {len(names)} names; the weights have {num_classes} classes")
    return names
