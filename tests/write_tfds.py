"""Writes a small image-classification set with TFDS's own builder and ArrayRecord writer: python write_tfds.py DIR.

The images are given as encoded bytes, for which TFDS needs no TensorFlow.
"""

import io
import sys

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class TinyShapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Noise in three colours."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(12), "test": self._generate_examples(6)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(count)
        for i in range(count):
            pixels = (rng.integers(0, 80, (20, 24, 3)) + 150 * np.eye(3)[i % 3]).astype(np.uint8)
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG" if i % 2 else "JPEG")
            yield i, {"image": stream.getvalue(), "label": i % 3}


if __name__ == "__main__":
    TinyShapes(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
