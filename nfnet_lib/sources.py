"""Sources of labelled images by name: `fractals`, `fractals-lt`, `digits`, `tfds:NAME`, `folder:DIR`, `webdataset:DIR`.

A source has a length and `[i]`; nothing more is asked of it, so that an array-record file or a list serves as well.
"""

import contextlib
import difflib
import hashlib
import os
import sys
import zipfile
from pathlib import Path
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Int32, Int64, UInt8

from nfnet_lib.encoded import FolderSource, WebDatasetSource, checked_length, digest, load_tfds
from nfnet_lib.fractals import HELDOUT_INSTANCE, FractalGenerator
from nfnet_lib.fractals import VERSION as FRACTALS_VERSION
from nfnet_lib.sampler import random_bits

KNOWN = ("fractals", "fractals-lt", "digits", "tfds:NAME", "folder:DIR", "webdataset:DIR")
SPLITS = ("train", "heldout")
DIGITS_HELDOUT = 360  # of scikit-learn's 1,797, the same ones for ever
FRACTALS_HELDOUT = 2**20  # more than any study evaluates
ZIPF_EXPONENT = 1.25  # of fractals-lt: above 1 the rare classes never run out, so that loss falls as a power (LOG.md)
FRACTALS = {"fractals": 0.0, "fractals-lt": ZIPF_EXPONENT}  # by name: of the classes' frequencies; 0: all alike
MAX_CACHED = 2**30  # bytes of rendered images worth keeping in memory


@runtime_checkable
class Source(Protocol):
    """Images and labels by index. fingerprint: of the content, not of where it lies.

    Optional: `batch(ids) -> (images, labels)` where making many together is cheaper, `labels_per_example` (default 1; `[i]`
    then gives a tuple of labels), `class_names`.
    """

    name: str
    num_classes: int
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], int | tuple[int, ...]]: ...


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
    """Rendered on demand: example i is instance i // num_classes of class i % num_classes.

    zipf_exponent: above 0, the classes have a long tail: example i is drawn from class k (from 0) with a probability
    proportional to (k + 1)**-zipf_exponent, and is an instance of its own.
    """

    def __init__(
        self, split: str, num_examples: int, num_classes: int, image_size: int, seed: int, hue_spread: float,
        zipf_exponent: float = 0.0,
    ):  # fmt: skip
        self.name, self.num_classes, self._length = "fractals", num_classes, num_examples
        self._seed, self._edges = seed, None
        tail: dict[str, float] = {}
        if zipf_exponent:
            self.name, tail = "fractals-lt", {"zipf_exponent": zipf_exponent}
            edges = np.cumsum(np.arange(1, num_classes + 1, dtype=np.float64) ** -zipf_exponent)
            # Of 32 bits: libm's last digits differ by machine.
            self._edges = np.round(edges[:-1] / edges[-1] * 2**32).astype(np.uint64)
        self.image_bytes = image_size * image_size * 3
        self._generator = FractalGenerator(num_classes, image_size, seed, hue_spread)
        self._first = 0 if split == "train" else HELDOUT_INSTANCE
        self.fingerprint = digest(
            name="fractals", version=FRACTALS_VERSION, split=split, n=num_examples, classes=num_classes,
            size=image_size, seed=seed, hue_spread=hue_spread, **tail,
        )  # fmt: skip

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], int]:
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} of {self._length} examples")
        images, labels = self.batch(np.array([index]))
        return images[0], int(labels[0])

    def batch(self, ids: Int64[np.ndarray, " n"]) -> tuple[UInt8[np.ndarray, "n H W 3"], Int32[np.ndarray, " n"]]:
        if self._edges is None:
            classes, instances = ids % self.num_classes, self._first + ids // self.num_classes
        else:
            instances = self._first + ids
            bits = random_bits("fractals-lt", self._seed, instances, 0, 1)[:, 0] >> np.uint64(32)
            classes = np.searchsorted(self._edges, bits, side="right")
        return self._generator.render(classes, instances), classes.astype(np.int32)


class Subset:
    """Some examples of a source, numbered anew: example i is example ids[i] of it."""

    def __init__(self, source: Source, ids: Int64[np.ndarray, " n"]):
        self.name, self.num_classes, self.ids, self._source = source.name, source.num_classes, ids, source
        self.labels_per_example = getattr(source, "labels_per_example", 1)
        self.fingerprint = digest(subset_of=source.fingerprint, ids=ids.tolist())
        if hasattr(source, "batch"):
            self.batch = lambda positions: source.batch(ids[positions])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int):
        return self._source[int(self.ids[index])]


def original_id(source: Source, index: int) -> int:
    """The id of example `index` in the source of which `source` is a subset, if it is one."""
    return int(source.ids[index]) if isinstance(source, Subset) else index


def load_source(
    name: str, split: str, *, num_examples: int | None = None, num_classes: int | None = None,
    image_size: int | None = None, seed: int = 0, hue_spread: float | int = 1.0, data_dir: str | os.PathLike | None = None,
    split_name: str = "", label_feature: str = "",
) -> Source:  # fmt: skip
    """The source called `name`, its "train" or "heldout" split, its first `num_examples` (default: all).

    num_classes, image_size, seed, hue_spread: of `fractals` and, with a long tail, `fractals-lt` (default 64 classes, 40 px;
    num_examples must be given); image_size also of `digits`. data_dir: where TFDS data was prepared (default: TFDS_DATA_DIR,
    or TFDS's own default). split_name: what the split is called where it is stored (TFDS: "train[:90%]"; default: train, and
    the first of validation, val and test). label_feature: of a TFDS set with several kinds of label. ValueError names what
    is wrong, with near names.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    kind, _, rest = name.partition(":")
    if split_name and (name in FRACTALS or name == "digits"):
        raise ValueError(f"split: {split_name!r} of {name}; allowed: {', '.join(SPLITS)}, as its own are called")
    if name in FRACTALS:
        if num_examples is None:
            raise ValueError("num_examples: fractals have no end; say how many")
        length = checked_length(name, split, num_examples, FRACTALS_HELDOUT if split == "heldout" else 2**31)
        return FractalSource(split, length, num_classes or 64, image_size or 40, seed, hue_spread, FRACTALS[name])
    if name == "digits":
        return _digits(split, num_examples, image_size or 40)
    if kind == "tfds" and rest:
        return load_tfds(name, split, split_name, num_examples, data_dir, label_feature)
    if kind in ("folder", "webdataset") and rest:
        return {"folder": FolderSource, "webdataset": WebDatasetSource}[kind](name, split, split_name, num_examples)
    near = difflib.get_close_matches(name, KNOWN, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"dataset: unknown {name!r}; {hint}known: {', '.join(KNOWN)}")


def _digits(split: str, num_examples: int | None, image_size: int) -> ArraySource:
    """scikit-learn's handwritten digits (UCI optical recognition, 8 x 8 grey), enlarged to RGB, in a fixed split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.argsort([hashlib.blake2b(f"digits{i}".encode(), digest_size=8).digest() for i in range(1797)])
    chosen = order[:-DIGITS_HELDOUT] if split == "train" else order[-DIGITS_HELDOUT:]
    chosen = chosen[: checked_length("digits", split, num_examples, len(chosen))]
    grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = np.stack([cv2.resize(i, (image_size, image_size), interpolation=cv2.INTER_CUBIC) for i in grey])
    mark = digest(name="digits", version=1, split=split, n=len(chosen), size=image_size)
    return ArraySource("digits", 10, mark, np.repeat(images[..., None], 3, axis=-1), digits.target[chosen])


def cached(source: Source, cache_dir: str | os.PathLike) -> Source:
    """`source` in memory, its rendered images kept in cache_dir for the next run; damaged files are made again.

    Only for sources that render images of one size (fractals), up to MAX_CACHED bytes; others are returned as they are.
    """
    if not isinstance(source, FractalSource) or len(source) * source.image_bytes > MAX_CACHED:
        return source
    path = Path(cache_dir) / f"{source.fingerprint}.npz"
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            images, labels, stored = file["images"], file["labels"], str(file["digest"])
        if stored != _checksum(images, labels):
            raise ValueError("checksum differs")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        images, labels = source.batch(np.arange(len(source), dtype=np.int64))
        _store(path, images, labels)
    return ArraySource(source.name, source.num_classes, source.fingerprint, images, labels)


def _store(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write the file, or do without and say so: a cache on a full disk costs time, no run."""
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, images=images, labels=labels, digest=_checksum(images, labels))
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        print(f"note: rendered images are not kept for other runs: {error}", file=sys.stderr)


def _checksum(images: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.blake2b(images.tobytes() + labels.tobytes(), digest_size=16).hexdigest()
