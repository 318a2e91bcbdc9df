"""What `nfnet dedup` finds of planted near-duplicates, on photographs and on fractals, and how it scales.

    python benchmarks/dedup.py                    tiles of scikit-learn's (and, if installed, scikit-image's) photographs
    python benchmarks/dedup.py --photos DIR       also tiles of a folder's photographs, which must be distinct

Half of the pictures are held out; the training set is the other half and, for each held-out picture and each change, a changed
copy. Recall: share of the copies found. Precision: share of the pairs found that were planted.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from nfnet_lib.dedup import RADIUS, TRAIN_CROPS, HammingIndex, HeldOut, thumbnail
from nfnet_lib.sources import load_source

TILE = 200
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "motorcycle_left.png",
               "camera.png", "brick.png", "grass.png", "gravel.png", "ihc.png", "retina.jpg")  # fmt: skip


def photographs(folder: Path | None) -> list[np.ndarray]:
    """Tiles that don't overlap, but for those of nearly one grey."""
    from sklearn.datasets import load_sample_images

    images = list(load_sample_images().images)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")) if folder else []
    if (spec := importlib.util.find_spec("skimage")) is not None:
        paths += [Path(spec.origin).parent / "data" / name for name in PHOTOGRAPHS]
    images += [cv2.imread(str(path))[..., ::-1] for path in paths if path.exists()]
    tiles = [
        np.ascontiguousarray(image[y : y + TILE, x : x + TILE])
        for image in images
        for y in range(0, image.shape[0] - TILE + 1, TILE)
        for x in range(0, image.shape[1] - TILE + 1, TILE)
    ]
    return [tile for tile in tiles if cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY).std() > 20]


def fractals(count: int) -> list[np.ndarray]:
    source = load_source("fractals", "train", num_examples=count, num_classes=64, image_size=64)
    return list(source.batch(np.arange(count))[0])


def changes(rng: np.random.Generator) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    def quality(image: np.ndarray, value: int) -> np.ndarray:
        return cv2.imdecode(cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, value])[1], 1)[..., ::-1]

    def crop(image: np.ndarray, share: float) -> np.ndarray:
        height, width = (round(side * share) for side in image.shape[:2])
        top, left = rng.integers(image.shape[0] - height + 1), rng.integers(image.shape[1] - width + 1)
        return image[top : top + height, left : left + width]

    def edges(image: np.ndarray, share: float) -> np.ndarray:
        rows, columns = (round(side * share) for side in image.shape[:2])
        return image[rows : image.shape[0] - rows, columns : image.shape[1] - columns]

    return {
        "re-encoded at quality 50": lambda i: quality(i, 50),
        "half the size": lambda i: cv2.resize(i, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
        "twice the size": lambda i: cv2.resize(i, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC),
        "5% of each side cropped": lambda i: crop(i, 0.95),
        "brighter by 10%": lambda i: cv2.convertScaleAbs(i, alpha=1.1),
        "darker by 10%": lambda i: cv2.convertScaleAbs(i, alpha=0.9),
        "mirrored": lambda i: i[:, ::-1],
        "cropped, mirrored, quality 50": lambda i: quality(np.ascontiguousarray(crop(i, 0.95)[:, ::-1]), 50),
        "(10% of each side cropped)": lambda i: crop(i, 0.9),
        "(5% cut from all four edges)": lambda i: edges(i, 0.05),
    }


class Pictures:
    """A list of pictures as a source."""

    num_classes, fingerprint, name = 1, "", "pictures"

    def __init__(self, images: list[np.ndarray]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index], 0


def found(name: str, images: list[np.ndarray], rng: np.random.Generator) -> None:
    order = rng.permutation(len(images))
    held, others = [images[i] for i in order[::2]], [images[i] for i in order[1::2]]
    heldout = HeldOut([("held", Pictures(held))])
    print(f"{name}: {len(held)} held out, {len(others)} others in the training set")
    wrong = sum(pair.duplicate for pair in heldout.pairs([(-1 - i, thumbnail(o)) for i, o in enumerate(others)]))
    planted, hits = 0, 0
    for change, function in changes(rng).items():
        pairs = heldout.pairs([(i, thumbnail(np.ascontiguousarray(function(image)))) for i, image in enumerate(held)])
        right = {pair.train_id for pair in pairs if pair.duplicate and pair.train_id == pair.against_id}
        extra = sum(pair.duplicate and pair.train_id != pair.against_id for pair in pairs)
        print(f"  {change:<32} recall {len(right) / len(held):.3f}, {extra} wrong pairs")
        if not change.startswith("("):
            planted, hits, wrong = planted + len(held), hits + len(right), wrong + extra
    print(f"  {'in all without brackets':<32} recall {hits / planted:.3f}, precision {hits / (hits + wrong):.4f}\n")


def scale(rng: np.random.Generator) -> None:
    """Index queries; memory and time of the rest are per picture and stated by `HeldOut`."""
    for words in (rng.integers(0, 2**64, size, dtype=np.uint64) for size in (100_000, 1_000_000)):
        index = HammingIndex(words, RADIUS)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < 5:
            index.query(rng.integers(0, 2**64, 64 * len(TRAIN_CROPS), dtype=np.uint64))
            count += 64
        each = (time.perf_counter() - began) / count
        hours = each * 1e8 / 3600
        print(f"{len(words):>9,} hashes held out: {each * 1e6:.0f} us a training picture; 1e8 of them: {hours:.0f} core-hours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--fractals", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    found("photographs", photographs(arguments.photos), rng)
    found("fractals", fractals(arguments.fractals), rng)
    scale(rng)


if __name__ == "__main__":
    main()
