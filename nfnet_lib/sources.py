"""Sources of labelled images by name: `fractals`, `digits`, `tfds:NAME`.

A source has a length, `[i]` and `batch(ids)`; nothing more is asked of it. TensorFlow is never imported here: TFDS data
is read as ArrayRecord files, its images as the bytes that were stored.
"""

import difflib
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Int32, Int64, UInt8

from nfnet_lib.fractals import HELDOUT_INSTANCE, FractalGenerator
from nfnet_lib.fractals import VERSION as FRACTALS_VERSION

KNOWN = ("fractals", "digits", "tfds:NAME")
SPLITS = ("train", "heldout")
DIGITS_HELDOUT = 360  # of scikit-learn's 1,797, the same ones for ever
FRACTALS_HELDOUT = 2**20  # more than any study evaluates


@runtime_checkable
class Source(Protocol):
    """Images and labels by index. fingerprint: of the content, not of where it lies."""

    name: str
    num_classes: int
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], int]: ...

    def batch(self, ids: Int64[np.ndarray, " n"]) -> tuple[object, Int32[np.ndarray, " n"]]:
        """Images ([n, H, W, 3], or a list where sizes differ) and labels."""
        ...


def fingerprint(**parts: object) -> str:
    """32 hex digits of everything that decides the content."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class ArraySource:
    """Images [N, H, W, 3] and labels [N] in memory."""

    def __init__(self, name: str, num_classes: int, fingerprint: str, images: np.ndarray, labels: np.ndarray):
        self.name, self.num_classes, self.fingerprint = name, num_classes, fingerprint
        self.images, self.labels = images, labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], int]:
        return self.images[index], int(self.labels[index])

    def batch(self, ids: Int64[np.ndarray, " n"]) -> tuple[UInt8[np.ndarray, "n H W 3"], Int32[np.ndarray, " n"]]:
        return self.images[ids], self.labels[ids]


class FractalSource:
    """Rendered on demand: example i is instance i // num_classes of class i % num_classes."""

    def __init__(self, split: str, num_examples: int, num_classes: int, image_size: int, seed: int, hue_spread: float):
        self.name, self.num_classes, self._length = "fractals", num_classes, num_examples
        self._generator = FractalGenerator(num_classes, image_size, seed, hue_spread)
        self._first = 0 if split == "train" else HELDOUT_INSTANCE
        self.fingerprint = fingerprint(
            name="fractals", version=FRACTALS_VERSION, split=split, n=num_examples, classes=num_classes,
            size=image_size, seed=seed, hue_spread=hue_spread,
        )  # fmt: skip

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], int]:
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} of {self._length} examples")
        images, labels = self.batch(np.array([index]))
        return images[0], int(labels[0])

    def batch(self, ids: Int64[np.ndarray, " n"]) -> tuple[UInt8[np.ndarray, "n H W 3"], Int32[np.ndarray, " n"]]:
        classes = ids % self.num_classes
        return self._generator.render(classes, self._first + ids // self.num_classes), classes.astype(np.int32)


class TFDSSource:
    """A prepared TFDS image-classification set, read through its data source with images left encoded."""

    def __init__(self, name: str, folder: Path, split: str, num_examples: int | None):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        if not {"image", "label"} <= set(builder.info.features):
            raise ValueError(f"dataset: {name!r} has features {sorted(builder.info.features)}: needs image and label")
        splits = builder.info.splits
        heldout = "validation" if "validation" in splits else "test"
        wanted = "train" if split == "train" else heldout
        if wanted not in splits:
            raise ValueError(f"dataset: {name!r} has no split {wanted!r}: {', '.join(splits)}")
        self.name, self.num_classes = name, builder.info.features["label"].num_classes
        self._data = builder.as_data_source(split=wanted, decoders={"image": tfds.decode.SkipDecoding()})
        self._length = _checked_length(name, split, num_examples, len(self._data))
        self.fingerprint = fingerprint(
            name=name, version=str(builder.info.version), split=wanted, n=self._length,
            shards=list(splits[wanted].shard_lengths),
        )  # fmt: skip

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], int]:
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} of {self._length} examples")
        example = self._data[index]
        label = int(example["label"])
        if not 0 <= label < self.num_classes:
            raise ValueError(f"example {index} of {self.name}: label {label} is not in 0 to {self.num_classes - 1}")
        return decode_image(example["image"], f"example {index} of {self.name}"), label

    def batch(self, ids: Int64[np.ndarray, " n"]) -> tuple[list[np.ndarray], Int32[np.ndarray, " n"]]:
        examples = [self[i] for i in ids.tolist()]
        return [image for image, _ in examples], np.array([label for _, label in examples], np.int32)


def decode_image(encoded: bytes | np.ndarray, where: str) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of JPEG bytes (strictly: damage is an error), or of what Pillow reads; ValueError names `where`."""
    if isinstance(encoded, np.ndarray):  # SkipDecoding leaves raw tensors as arrays
        return np.broadcast_to(encoded, (*encoded.shape[:2], 3)) if encoded.shape[-1] == 1 else encoded
    try:
        if encoded[:2] == b"\xff\xd8":
            import simplejpeg

            return simplejpeg.decode_jpeg(encoded, "RGB", strict=True)
        from PIL import Image

        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:
        raise ValueError(f"{where}: not a readable image: {error}") from error


def load_source(
    name: str, split: str, *, num_examples: int | None = None, num_classes: int | None = None,
    image_size: int | None = None, seed: int = 0, hue_spread: float = 1.0, data_dir: str | os.PathLike | None = None,
) -> Source:  # fmt: skip
    """The source called `name`, its "train" or "heldout" split, its first `num_examples` (default: all).

    num_classes, image_size, seed, hue_spread: of `fractals` (default 64 classes, 40 px; num_examples must be given); image_size
    also of `digits`. data_dir: where TFDS data was prepared (default: TFDS_DATA_DIR, or TFDS's own default). ValueError
    names what is wrong, with near names.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    if name == "fractals":
        length = _checked_length(name, split, num_examples, FRACTALS_HELDOUT if split == "heldout" else 2**31)
        return FractalSource(split, length, num_classes or 64, image_size or 40, seed, hue_spread)
    if name == "digits":
        return _digits(split, num_examples, image_size or 40)
    if name.startswith("tfds:") and len(name) > 5:
        return _tfds(name, split, num_examples, data_dir)
    near = difflib.get_close_matches(name, KNOWN, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"dataset: unknown {name!r}; {hint}known: {', '.join(KNOWN)}")


def _digits(split: str, num_examples: int | None, image_size: int) -> ArraySource:
    """scikit-learn's handwritten digits (UCI optical recognition, 8 x 8 grey), enlarged to RGB, in a fixed split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.argsort([hashlib.blake2b(f"digits{i}".encode(), digest_size=8).digest() for i in range(1797)])
    chosen = order[:-DIGITS_HELDOUT] if split == "train" else order[-DIGITS_HELDOUT:]
    chosen = chosen[: _checked_length("digits", split, num_examples, len(chosen))]
    grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = np.stack([cv2.resize(i, (image_size, image_size), interpolation=cv2.INTER_CUBIC) for i in grey])
    mark = fingerprint(name="digits", version=1, split=split, n=len(chosen), size=image_size)
    return ArraySource("digits", 10, mark, np.repeat(images[..., None], 3, axis=-1), digits.target[chosen])


def _tfds(name: str, split: str, num_examples: int | None, data_dir: str | os.PathLike | None) -> TFDSSource:
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()
    wanted = name.removeprefix("tfds:")
    folders = {}
    if root.is_dir():
        for info in sorted(root.glob("*/**/dataset_info.json")):
            folders["/".join(info.parent.relative_to(root).parts[:-1])] = info.parent  # the newest version wins
    if wanted not in folders:
        near = difflib.get_close_matches(wanted, folders, n=3, cutoff=0.3) or sorted(folders)[:5]
        prepared = f"prepared there: {', '.join(near)}" if near else "nothing is prepared there"
        raise ValueError(
            f"dataset: {name!r} is not prepared in {root}; {prepared}. With the [tfds-build] extra, prepare it by "
            f"`tfds build {wanted} --data_dir DIR --file_format array_record`" + _near_builders(wanted)
        )
    return TFDSSource(name, folders[wanted], split, num_examples)


def _near_builders(wanted: str) -> str:
    import tensorflow_datasets as tfds

    builders = tfds.list_builders(with_community_datasets=False)
    base = wanted.split("/")[0]
    near = difflib.get_close_matches(base, builders, n=3, cutoff=0.5)
    return "" if base in builders or not near else f"; TFDS knows {', '.join(near)}"


def _checked_length(name: str, split: str, wanted: int | None, available: int) -> int:
    if wanted is None:
        if name == "fractals":
            raise ValueError("num_examples: fractals have no end; say how many")
        return available
    if not 1 <= wanted <= available:
        raise ValueError(
            f"dataset: {name!r} has {available} {split} examples, {wanted} were asked for; allowed: 1 to {available}"
        )
    return wanted


def cached(source: Source, cache_dir: str | os.PathLike) -> Source:
    """`source` in memory, its rendered images kept in cache_dir for the next run; damaged files are made again.

    Only for sources that render images of one size (fractals); others are returned as they are.
    """
    if not isinstance(source, FractalSource):
        return source
    path = Path(cache_dir) / f"{source.fingerprint}.npz"
    try:
        with np.load(path) as file:
            images, labels, digest = file["images"], file["labels"], str(file["digest"])
        if digest != _digest(images, labels):
            raise ValueError("checksum differs")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        images, labels = source.batch(np.arange(len(source), dtype=np.int64))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.savez(file, images=images, labels=labels, digest=_digest(images, labels))
        partial.replace(path)
    return ArraySource(source.name, source.num_classes, source.fingerprint, images, labels)


def _digest(images: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.blake2b(images.tobytes() + labels.tobytes(), digest_size=16).hexdigest()
