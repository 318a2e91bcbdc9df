"""Sources of encoded images on disk: prepared TFDS sets, folders of class folders, webdataset shards.

Each gives example i's bytes and labels by index; decode.py makes pixels of them, in the loader's threads. TensorFlow is
never imported: TFDS data is read as ArrayRecord files, images as the bytes that were stored.
"""

import difflib
import hashlib
import json
import os
import stat
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from nfnet_lib import located
from nfnet_lib.decode import decode_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
HELDOUT_SPLITS = ("validation", "val", "test", "heldout")  # the first that exists is held out
HELDOUT_SHARE = 10  # of a folder without splits, about every tenth example is held out
MAX_CLASSES = 10**6  # of webdataset shards, whose labels are numbers: a larger one is a mistake
MAX_LABELS = 128  # of an example with several; the surest are kept
# Features that hold labels, in this order, where an image set has several.
LABEL_FEATURES = ("label", "real_label", "correct_multi_labels", "objects_trainable", "objects", "labels")
NOT_IN_TFDS = {
    "imagenet21k": "TFDS has no ImageNet-21k (github.com/tensorflow/datasets issue 3414): make webdataset shards or a folder "
    "of class folders from the winter-2021 release and use webdataset:DIR or folder:DIR",
    "i_naturalist2021": "TFDS 4.9 lacks the label file of i_naturalist2021, so it can't be prepared: use "
    "tfds:i_naturalist2018, or unpack the 2021 archives and use folder:DIR",
    "laion400m": "laion400m has captions and no classes: it can't train a classifier",
    "jft300m": "JFT is not public: places365_small, open_images_v4 and ImageNet-21k come nearest",
    "jft4b": "JFT is not public: places365_small, open_images_v4 and ImageNet-21k come nearest",
}
MANUAL = {
    "imagenet2012": "; it needs ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (image-net.org, after registration) in "
    "DIR/downloads/manual",
}


class EncodedSource:
    """Base of sources that hold encoded images: subclasses give `_read(index) -> (bytes, labels)`."""

    labels_per_example = 1

    def __init__(self, name: str, class_names: Sequence[str], length: int, fingerprint: str):
        self.name, self.class_names, self.num_classes = name, tuple(class_names), len(class_names)
        self._length, self.fingerprint = length, fingerprint

    def __len__(self) -> int:
        return self._length

    def _read(self, index: int) -> tuple[bytes | np.ndarray, tuple[int, ...]]:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[int, ...]]:
        """(pixels, labels); ValueError, naming the example, if either is damaged."""
        encoded, labels = self.encoded(index)
        return decode_image(encoded), labels

    def encoded(self, index: int) -> tuple[bytes | np.ndarray, tuple[int, ...]]:
        """(bytes as stored, labels), undecoded."""
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} of {self._length} examples")
        encoded, labels = self._read(index)
        for label in labels:
            if not 0 <= label < self.num_classes:
                raise ValueError(f"label {label} is not in 0 to {self.num_classes - 1}")
        return encoded, labels


def digest(**parts: object) -> str:
    """32 hex digits of everything that decides a source's content."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def checked_length(name: str, split: str, wanted: int | None, available: int) -> int:
    """`wanted`, or all that is `available`; ValueError for more than that."""
    if wanted is not None and not 1 <= wanted <= available:
        raise ValueError(
            f"dataset: {name!r} has {available} {split} examples, {wanted} were asked for; allowed: 1 to {available}"
        )
    return available if wanted is None else wanted


class TFDSSource(EncodedSource):
    """A prepared TFDS image-classification set; several labels an example where the set has that (open_images_v4)."""

    def __init__(self, name: str, folder: Path, split: str, wanted: str, num_examples: int | None, label_feature: str):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        features, splits = builder.info.features, builder.info.splits
        usable = [f for f in LABEL_FEATURES if f in features and _class_label(features[f]) is not None]
        self._feature = label_feature or next(iter(usable), "")
        if "image" not in features or self._feature not in features or _class_label(features[self._feature]) is None:
            raise ValueError(
                f"dataset: {name!r} has features {', '.join(sorted(features))}: needs image and "
                + (f"classes in {label_feature!r}" if label_feature else "classes (label_feature names them)")
            )
        wanted = wanted or ("train" if split == "train" else next((s for s in HELDOUT_SPLITS if s in splits), "test"))
        try:
            self._data = builder.as_data_source(split=wanted, decoders={"image": tfds.decode.SkipDecoding()})
        except (ValueError, KeyError) as error:
            raise ValueError(f"dataset: {name!r} has no split {wanted!r}: {', '.join(splits)}") from error
        labels, feature = _class_label(features[self._feature]), features[self._feature]
        self.labels_per_example = 1 if labels is feature else MAX_LABELS
        length = checked_length(name, split, num_examples, len(self._data))
        shards = {s: list(splits[s].shard_lengths) for s in sorted(splits) if s in wanted}
        self._check_shards(name, shards.get(wanted, [len(self._data)]))
        mark = {"name": name, "version": str(builder.info.version), "split": wanted, "n": length, "shards": shards}
        if self._feature != "label":
            mark["label_feature"] = self._feature
        super().__init__(name, labels.names, length, digest(**mark))

    def _check_shards(self, name: str, lengths: list[int]) -> None:
        """ValueError for a shard that is missing or cut, of which neither the first nor the last example can be read."""
        end = 0
        for number, length in enumerate(lengths):
            begin, end, error = end, end + length, None
            for index in (end - 1, begin)[: min(2, length)]:
                try:
                    self._data[index]
                    break
                except Exception as failed:  # of C++ code, of many kinds
                    error = failed
            else:
                if error is not None:
                    text = str(error).strip().splitlines()[0]
                    raise ValueError(f"dataset: {name!r}: shard {number} of {len(lengths)} can't be read: {text}")

    def _read(self, index: int) -> tuple[bytes | np.ndarray, tuple[int, ...]]:
        example = self._data[index]
        return example["image"], _labels(example[self._feature])


def _class_label(feature: Any) -> Any:
    """The ClassLabel of a feature: itself, or that of a sequence of labels or of objects with one; else None."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.ClassLabel):
        return feature
    inner = getattr(feature, "feature", None)
    if isinstance(inner, tfds.features.FeaturesDict):
        inner = inner["label"] if "label" in inner else None
    return inner if isinstance(inner, tfds.features.ClassLabel) else None


def _labels(value: Any) -> tuple[int, ...]:
    """Classes of a label, a sequence of labels, or of objects; of those, what was verified absent (confidence 0) is not one."""
    if isinstance(value, dict):
        labels = np.asarray(value["label"], np.int64)
        sure = np.asarray(value.get("confidence", np.ones(len(labels))))
        order = np.argsort(-sure, kind="stable")
        value = labels[order][sure[order] > 0]
    return tuple(dict.fromkeys(np.atleast_1d(np.asarray(value, np.int64)).tolist()))[:MAX_LABELS]


def load_tfds(
    name: str, split: str, wanted: str, num_examples: int | None, data_dir: str | os.PathLike | None, label_feature: str
) -> TFDSSource:
    """The prepared set `tfds:NAME`; ValueError says how to prepare one that is not there."""
    root = located(data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")
    short = name.removeprefix("tfds:")
    folders = {}
    if root.is_dir():
        for info in sorted(root.glob("*/**/dataset_info.json"), key=lambda p: _version(p.parent.name)):
            folders["/".join(info.parent.relative_to(root).parts[:-1])] = info.parent  # the newest version wins
    if short in folders:
        return TFDSSource(name, folders[short], split, wanted, num_examples, label_feature)
    if advice := NOT_IN_TFDS.get(short.split("/")[0]):
        raise ValueError(f"dataset: {name!r}: {advice}")
    near = difflib.get_close_matches(short, folders, n=3, cutoff=0.3) or sorted(folders)[:5]
    prepared = f"prepared there: {', '.join(near)}" if near else "nothing is prepared there"
    raise ValueError(
        f"dataset: {name!r} is not prepared in {root}; {prepared}. With the [tfds-build] extra, prepare it by "
        f"`tfds build {short} --data_dir DIR --file_format array_record`"
        + MANUAL.get(short.split("/")[0], "")
        + _near_builders(short)
    )


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in name.split("."))


def _near_builders(wanted: str) -> str:
    import tensorflow_datasets as tfds

    builders = tfds.list_builders(with_community_datasets=False)
    base = wanted.split("/")[0]
    near = difflib.get_close_matches(base, builders, n=3, cutoff=0.5)
    return "" if base in builders or not near else f"; TFDS knows {', '.join(near)}"


class FolderSource(EncodedSource):
    """DIR/train/CLASS/*.jpg and DIR/validation/CLASS/*.jpg, or DIR/CLASS/*.jpg, of which about a tenth is held out.

    Examples are in an order by hash of their paths, so that the first n are a sample of all classes and files added
    later do not move the others' split.
    """

    def __init__(self, name: str, split: str, wanted: str, num_examples: int | None):
        root = located(name.removeprefix("folder:"))
        if not root.is_dir():
            raise ValueError(f"dataset: {name!r}: {root} is not a folder")
        train, folder = root / "train", root
        if wanted or train.is_dir():
            names = [wanted] if wanted else ["train"] if split == "train" else HELDOUT_SPLITS
            folder = next((root / n for n in names if (root / n).is_dir()), None)
            if folder is None:
                raise ValueError(f"dataset: {name!r} has no folder {' or '.join(names)} in {root}")
        classes = sorted(p.name for p in (train if train.is_dir() else folder).iterdir() if _is_class(p))
        files = [(c, path, size) for c in classes for path, size in image_files(folder / c)]
        unknown = sorted(p.name for p in folder.iterdir() if _is_class(p) and p.name not in classes)
        if unknown:
            raise ValueError(f"dataset: {name!r}: {folder.name} has classes that train lacks: {', '.join(unknown[:3])}")
        ordered = sorted(files, key=lambda file: _path_hash(file[1].relative_to(folder)))
        if folder == root:
            heldout = [_path_hash(path.relative_to(folder)) % HELDOUT_SHARE == 0 for _, path, _ in ordered]
            ordered = [file for file, out in zip(ordered, heldout, strict=True) if out == (split != "train")]
        if not ordered:
            raise ValueError(
                f"dataset: {name!r} has no {split} images in {folder}; expected CLASS/NAME with NAME ending in"
                f" {', '.join(IMAGE_SUFFIXES)}"
            )
        length = checked_length(name, split, num_examples, len(ordered))
        self._root, index = folder, {c: i for i, c in enumerate(classes)}
        self._files = [(path.relative_to(folder).as_posix(), index[c]) for c, path, _ in ordered[:length]]
        sizes = [(path, size) for (path, _), (_, _, size) in zip(self._files, ordered, strict=False)]
        super().__init__(f"folder:{root.name}", classes, length, digest(kind="folder", classes=classes, files=sizes))

    def _read(self, index: int) -> tuple[bytes, tuple[int, ...]]:
        path, label = self._files[index]
        return (self._root / path).read_bytes(), (label,)

    def path(self, index: int) -> Path:
        """Where example `index` lies."""
        return self._root / self._files[index][0]


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def image_files(folder: Path) -> list[tuple[Path, int]]:
    """(path, bytes) of the image files below a folder, by path; -1 bytes for links that lead nowhere.

    Hidden files are left out, and so are pipes and other things that may never end.
    """
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            if path.suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
                continue
            try:
                status = path.stat()
            except OSError:
                found.append((path, -1))
                continue
            if stat.S_ISREG(status.st_mode):
                found.append((path, status.st_size))
    return sorted(found)


def _path_hash(path: Path) -> int:
    return int.from_bytes(hashlib.blake2b(path.as_posix().encode("utf-8", "surrogateescape"), digest_size=8).digest())


class WebDatasetSource(EncodedSource):
    """DIR/train*.tar and DIR/validation*.tar with KEY.jpg and KEY.cls (or KEY.json with a label), uncompressed.

    The shards are indexed once by their headers and then read at random; nothing is unpacked.
    """

    def __init__(self, name: str, split: str, wanted: str, num_examples: int | None):
        root = located(name.removeprefix("webdataset:"))
        if not root.is_dir():
            raise ValueError(f"dataset: {name!r}: {root} is not a folder")
        shards = _shards(root, split, wanted)
        if not shards:
            found = sorted(p.name for p in root.iterdir())[:3]
            raise ValueError(
                f"dataset: {name!r} has no {wanted or split} shards (uncompressed .tar) in {root}; it has {', '.join(found)}"
            )
        members = [(shard, *member) for shard in shards for member in _tar_index(shard)]
        if not members:
            raise ValueError(f"dataset: {name!r}: {shards[0].name} holds no pairs KEY.jpg and KEY.cls (or KEY.json)")
        train = members if split == "train" else [m for s in _shards(root, "train", "") for m in _tar_index(s)]
        num_classes = 1 + max(member[-1] for member in train or members)
        if num_classes > MAX_CLASSES:
            raise ValueError(f"dataset: {name!r} has a label {num_classes - 1}; allowed: below {MAX_CLASSES}")
        length = checked_length(name, split, num_examples, len(members))
        self._members = members[:length]
        mark = [(shard.name, *member) for shard, *member in self._members]
        names = tuple(str(i) for i in range(num_classes))
        super().__init__(f"webdataset:{root.name}", names, length, digest(kind="webdataset", members=mark))

    def _read(self, index: int) -> tuple[bytes, tuple[int, ...]]:
        shard, offset, size, label = self._members[index]
        with shard.open("rb") as file:
            file.seek(offset)
            return file.read(size), (label,)


def _shards(root: Path, split: str, wanted: str) -> list[Path]:
    if wanted:
        return sorted(root.glob(wanted if wanted.endswith(".tar") else f"{wanted}*.tar"))
    prefixes = ("train",) if split == "train" else HELDOUT_SPLITS
    return next((found for prefix in prefixes if (found := sorted(root.glob(f"{prefix}*.tar")))), [])


def _tar_index(shard: Path) -> list[tuple[int, int, int]]:
    """(offset, bytes, label) of each image of a shard; ValueError if it is cut short."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // 512) * 512
                if not member.isfile():
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key = f"{folder}/{stem}"
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    images[key] = (member.offset_data, member.size)
                elif suffix in ("cls", "json") and member.size < 2**20:
                    value = json.loads(archive.extractfile(member).read())
                    if not isinstance(value, dict):
                        labels[key] = int(value)
                    elif "label" in value:  # a .json may also hold other things; a .cls is the label
                        labels.setdefault(key, int(value["label"]))
        size = shard.stat().st_size
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"dataset: shard {shard.name} can't be read: {error}") from None
    if size < end + 512:  # an archive ends with blocks of zeros
        raise ValueError(f"dataset: shard {shard.name} is cut short")
    return [(*images[key], labels[key]) for key in images if key in labels]
