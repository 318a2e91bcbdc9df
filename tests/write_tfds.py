"""Writes small image-classification sets with TFDS's own builder and ArrayRecord writer: python write_tfds.py DIR.

The images are given as encoded bytes, for which TFDS needs no TensorFlow.
"""

import io
import sys

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def picture(rng, colour, form):
    """Encoded noise of some size about one of three colours."""
    side = rng.integers(20, 40, 2)
    pixels = (rng.integers(0, 80, (*side, 3)) + 150 * np.eye(3)[colour]).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


class TinyShapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Noise in three colours."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(120), "test": self._generate_examples(30)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(count)
        for i in range(count):
            yield i, {"image": picture(rng, i % 3, "PNG" if i % 2 else "JPEG"), "label": i % 3}


class TinyObjects(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Several labels an image, with confidences, in the form of open_images_v4."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=["red", "green", "blue", "never"])
        objects = tfds.features.Sequence({"label": label, "confidence": np.int32})
        features = {"image": tfds.features.Image(), "objects": objects, "objects_trainable": objects}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(40), "validation": self._generate_examples(20)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(count)
        for i in range(count):
            objects = [{"label": i % 3, "confidence": 6}, {"label": (i + 1) % 3, "confidence": 10}][: 1 + i % 2]
            objects.append({"label": 3, "confidence": 0})  # verified to be absent
            yield i, {"image": picture(rng, i % 3, "JPEG"), "objects": [], "objects_trainable": objects}


if __name__ == "__main__":
    for builder in (TinyShapes, TinyObjects):
        builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
