"""Near-duplicates of held-out images in a training set: `nfnet dedup --train SET --against SET... --out DIR`.

The papers removed near-duplicates of the test images from JFT (arXiv 1912.11370, appendix C; 2106.04560, section 3.3) and do
not say how. Here, in three stages, the training set being streamed once in bounded memory:

1. Perceptual hashes of 64 bits (ImageHash's phash) of the whole picture and of crops of 95 and 90% of its sides, more of
   them on the held-out side, and there also mirrored. Pairs within `radius` bits come from an exact index
   (`HammingIndex`): none is missed.
2. The two pictures of a pair, as 64 x 64 grey thumbnails without their coarsest and finest detail, are laid over each other at
   several crops, mirrored or not: the best normalised correlation is the pair's score.
3. Optionally the cosine of their pooled features under the weights of any model (`weights.load_weights`).

For sets that one machine does not read in time the same is a map and a reduce on any engine: map a shard of the training set
to its pairs with `HeldOut.pairs` (the held-out side is small and is sent to each worker), reduce by concatenation; ids are
global, so that the union over shards is the result for the whole set.
"""

import csv
import functools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import imagehash
import numpy as np
from jaxtyping import Int64, UInt8, UInt64
from PIL import Image

from nfnet_lib.config import ConfigError
from nfnet_lib.decode import decode_image
from nfnet_lib.encoded import IMAGE_SUFFIXES, image_files
from nfnet_lib.files import write_bytes
from nfnet_lib.sources import SPLITS, Source, load_source

MAX_RADIUS = 16
RADIUS = 10  # bits of 64; benchmarks/dedup.py measures what it and MIN_CORRELATION find
MIN_CORRELATION = 0.93
MIN_COSINE = 0.9
THUMB = 64  # pixels
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))
TRAIN_CROPS = ((0, 0, 1.0), *((y, x, 0.95) for y, x in PLACES), (0.5, 0.5, 0.9))  # row, column, share of each side
HELDOUT_CROPS = (*TRAIN_CROPS, *((y, x, 0.9) for y, x in PLACES[:4]))
SCALES = (1.0, 0.97, 0.95, 0.92, 0.9)  # of one picture laid over the other
BANDS = 4  # of 16 bits
CHUNK = 256  # training images read at a time
FILES = ("pairs.csv", "exclude.json", "borderline.png")
MOST_MARKS = 32  # of a list's pictures by which a run knows them again


class Pair(NamedTuple):
    """A training example and a held-out one that may be the same picture. cosine: nan without weights."""

    train_id: int
    against: str
    against_id: int
    distance: int
    correlation: float
    cosine: float
    mirrored: bool
    duplicate: bool


class HammingIndex:
    """64-bit words among which all within `radius` bits of a query are found, exactly.

    Each word lies in one table for each of its four 16-bit bands. If two words differ by at most r bits, then in one of the
    bands by at most t_i, where the t_i + 1 sum to r + 1 (Norouzi et al., arXiv 1307.2982): so each band's table is asked
    for all codes within t_i bits of the query's. ValueError for a radius not in 0 to 16.
    """

    def __init__(self, words: UInt64[np.ndarray, " n"], radius: int = RADIUS):
        if not 0 <= radius <= MAX_RADIUS:
            raise ValueError(f"radius: {radius} bits; allowed: 0 to {MAX_RADIUS} of 64")
        self.words, self.radius = words, radius
        self._bands = []
        for band in range(BANDS):
            tolerance = (radius + 1) // BANDS - 1 + (band < (radius + 1) % BANDS)
            if tolerance < 0:
                continue
            codes = _code(words, band)
            order = np.argsort(codes, kind="stable")
            starts = np.searchsorted(codes[order], np.arange(2**16 + 1))
            self._bands.append((band, order, starts, _masks(tolerance)))

    def query(
        self, words: UInt64[np.ndarray, " q"]
    ) -> tuple[Int64[np.ndarray, " hits"], Int64[np.ndarray, " hits"], Int64[np.ndarray, " hits"]]:
        """(row of the query, row of the index, bits by which they differ) of each pair within the radius, once."""
        found = []
        for band, order, starts, masks in self._bands:
            asked = (_code(words, band)[:, None] ^ masks).ravel()
            counts = starts[asked + 1] - starts[asked]
            hit = np.flatnonzero(counts)
            rows = np.repeat(hit // len(masks), counts[hit])
            first = np.repeat(starts[asked[hit]] - np.cumsum(counts[hit]) + counts[hit], counts[hit])
            others = order[first + np.arange(len(rows))]
            distances = np.bitwise_count(words[rows] ^ self.words[others]).astype(np.int64)
            near = distances <= self.radius
            found.append(np.stack([rows[near], others[near], distances[near]]))
        pairs = np.unique(np.concatenate(found, axis=1), axis=1)
        return pairs[0], pairs[1], pairs[2]


def _code(words: UInt64[np.ndarray, " n"], band: int) -> Int64[np.ndarray, " n"]:
    return ((words >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.int64)


def _masks(bits: int) -> Int64[np.ndarray, " m"]:
    """All 16-bit words with at most `bits` bits set."""
    return np.array([sum(1 << i for i in c) for n in range(bits + 1) for c in combinations(range(16), n)], np.int64)


def thumbnail(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "64 64"]:
    """Grey, THUMB x THUMB whatever the aspect ratio."""
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (THUMB, THUMB), interpolation=cv2.INTER_AREA)


def hashes(
    thumb: UInt8[np.ndarray, "64 64"], crops: Sequence[tuple[float | int, float | int, float]]
) -> UInt64[np.ndarray, " crops"]:
    """The perceptual hash of each crop of a thumbnail."""
    words = []
    for row, column, share in crops:
        side = round(THUMB * share)
        top, left = round((THUMB - side) * row), round((THUMB - side) * column)
        crop = Image.fromarray(thumb[top : top + side, left : left + side])
        words.append(np.packbits(imagehash.phash(crop).hash.ravel()).view(">u8")[0])
    return np.array(words, np.uint64)


def _whole(thumb: UInt8[np.ndarray, "64 64"]) -> int:
    return int(hashes(thumb, TRAIN_CROPS[:1])[0])


def other_pictures(source: Source, marks: Mapping[int, int]) -> list[int]:
    """Ids of `source` that show something else than the pictures of which a list of ids has hashes, {id: 64 bits}.

    Ids count files by name, so that they mean others where files were added. A picture re-encoded or resized is the same one;
    what can't be read is passed over.
    """
    found = []
    for index, mark in sorted(marks.items()):
        if 0 <= index < len(source) and (thumb := _thumbnail_of(source, index)) is not None:
            if (mark ^ _whole(thumb)).bit_count() > MAX_RADIUS:
                found.append(index)
    return found


def correlation(one: UInt8[np.ndarray, "64 64"], other: UInt8[np.ndarray, "64 64"]) -> float:
    """The best normalised correlation of two thumbnails, either of which may be a crop of the other; at most 1."""
    bands = [cv2.GaussianBlur(t.astype(np.float32), (0, 0), 1.2) for t in (one, other)]
    bands = [band - cv2.GaussianBlur(band, (0, 0), 5) for band in bands]
    best = -1.0
    for whole, part in (bands, bands[::-1]):
        for height in SCALES:
            for width in SCALES:
                if abs(height - width) < 0.035:
                    size = (round(THUMB * width), round(THUMB * height))
                    template = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
                    best = max(best, float(cv2.matchTemplate(whole, template, cv2.TM_CCOEFF_NORMED).max()))
    return best


class HeldOut:
    """The held-out side: thumbnails and an index of the hashes of all its pictures, 6 KB each."""

    def __init__(self, sets: Sequence[tuple[str, Source]], radius: int = RADIUS, workers: int = 1, bar=None):
        self.ids: list[tuple[str, int]] = []
        self.sources = dict(sets)
        thumbs, words, self.unreadable = [], [], 0
        for name, source in sets:
            for index, thumb in _thumbnails(source, workers):
                if bar is not None:
                    bar.update()
                if thumb is None:
                    self.unreadable += 1
                    continue
                self.ids.append((name, index))
                thumbs.append(thumb)
                words += [hashes(thumb, HELDOUT_CROPS), hashes(np.ascontiguousarray(thumb[:, ::-1]), HELDOUT_CROPS)]
        if not thumbs:
            raise ConfigError(f"against: no readable picture in {', '.join(self.sources)}")
        self.thumbs = np.stack(thumbs)
        self.index = HammingIndex(np.concatenate(words), radius)
        self._per_picture = 2 * len(HELDOUT_CROPS)

    def pairs(
        self, thumbs: Sequence[tuple[int, np.ndarray]], min_correlation: float | int = MIN_CORRELATION
    ) -> list[Pair]:
        """All pairs of training pictures (id, thumbnail) and held-out ones within the radius, scored."""
        if not thumbs:
            return []
        rows, hits, distances = self.index.query(np.concatenate([hashes(thumb, TRAIN_CROPS) for _, thumb in thumbs]))
        rows, mirrored = rows // len(TRAIN_CROPS), hits % self._per_picture >= len(HELDOUT_CROPS)
        others = hits // self._per_picture
        out = []
        for row, other in sorted(set(zip(rows.tolist(), others.tolist(), strict=True))):
            same = (rows == row) & (others == other)
            one, two = thumbs[row][1], self.thumbs[other]
            scores = {
                flip: correlation(one, np.ascontiguousarray(two[:, ::-1]) if flip else two)
                for flip in set(mirrored[same].tolist())
            }
            best = max(scores, key=scores.get)
            out.append(
                Pair(
                    thumbs[row][0], *self.ids[other], int(distances[same].min()), scores[best], float("nan"), best,
                    scores[best] >= min_correlation,
                )
            )  # fmt: skip
        return out


def _thumbnails(source: Source, workers: int) -> Iterator[tuple[int, np.ndarray | None]]:
    """(id, thumbnail) of every example; None for those that can't be read."""
    ids = iter(range(len(source)))
    with ThreadPoolExecutor(workers) as pool:
        while chunk := list(islice(ids, CHUNK)):
            yield from zip(chunk, pool.map(functools.partial(_thumbnail_of, source), chunk), strict=True)


def _thumbnail_of(source: Source, index: int) -> np.ndarray | None:
    """None for what can't be read, whatever a source raises: the example is counted, and not compared."""
    try:
        return thumbnail(source[index][0])
    except Exception:
        return None


class PlainFolder:
    """All pictures below a folder, by path; no classes."""

    num_classes, fingerprint = 1, ""

    def __init__(self, root: Path):
        self.name = f"images:{root}"
        self.root = root
        self.files = [path.relative_to(root) for path, _ in image_files(root)]
        if not self.files:
            raise ConfigError(f"{root}: holds no pictures ({', '.join(IMAGE_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], int]:
        return decode_image(self.path(index).read_bytes()), 0

    def path(self, index: int) -> Path:
        return self.root / self.files[index]


def open_set(name: str, split: str, data_dir: str | None = None, num_examples: int | None = None) -> Source:
    """A folder of pictures, or NAME[@SPLIT] of a data set (`sources.load_source`); ConfigError for what is neither."""
    if Path(name).is_dir():
        return PlainFolder(Path(name))
    dataset, _, wanted = name.partition("@")
    try:
        if wanted in SPLITS:
            return load_source(dataset, wanted, data_dir=data_dir, num_examples=num_examples)
        return load_source(dataset, split, data_dir=data_dir, split_name=wanted, num_examples=num_examples)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def dedup(
    train: str, against: Sequence[str], out_dir: Path, *, data_dir: str | None = None,
    train_examples: int | None = None, against_examples: int | None = None, **options: Any,
) -> str:  # fmt: skip
    """`compare` of sets by name (`open_set`); options: those of `compare`."""
    if not against:
        raise ConfigError("against: no set to compare with")
    source = open_set(train, "train", data_dir, train_examples)
    sets = [(name, open_set(name, "heldout", data_dir, against_examples)) for name in against]
    dataset, _, split = (source.name, "", "") if isinstance(source, PlainFolder) else train.partition("@")
    return compare(source, sets, out_dir, dataset=dataset, split=split, **options)


def compare(
    source: Source, sets: Sequence[tuple[str, Source]], out_dir: Path, *, dataset: str, split: str = "",
    radius: int = RADIUS,
    min_correlation: float | int = MIN_CORRELATION, weights: Path | None = None, min_cosine: float | int = MIN_COSINE,
    workers: int = 1, progress: bool = True,
) -> str:  # fmt: skip
    """Compare every training picture with all of `sets`; returns what was found, in a sentence.

    Writes to out_dir, which must not hold results yet: pairs.csv with every pair within `radius`, its scores, and whether it
    counts as a duplicate (correlation, and cosine if there are weights); exclude.json, the ids of the duplicates for the
    `exclude` of a run on this `split` of `dataset`, with hashes of some (`other_pictures`); borderline.png, the pairs next to
    the limit on both sides. ConfigError for bad requests.
    """
    from tqdm.auto import tqdm

    for name, value in (("min_correlation", min_correlation), ("min_cosine", min_cosine)):
        if not -1 <= value <= 1:
            raise ConfigError(f"{name}: {value}; allowed: -1 to 1")
    if not 0 <= radius <= MAX_RADIUS:
        raise ConfigError(f"radius: {radius} bits; allowed: 0 to {MAX_RADIUS} of 64")
    if workers < 1:
        raise ConfigError(f"workers: {workers}; allowed: 1 or more")
    if present := [name for name in FILES if (out_dir / name).exists()]:
        raise ConfigError(f"out: {out_dir} already holds {', '.join(present)}; choose another folder")
    embed = None
    if weights is not None:
        from nfnet_lib.predict import embedder

        embed = embedder(weights)
    excluded: dict[int, str] = {}  # with the picture's hash
    borderline: list[Pair] = []
    number = unreadable = 0
    total = len(source) + sum(len(other) for _, other in sets)
    with tqdm(total=total, unit="img", desc="dedup", disable=not progress) as bar:
        heldout = HeldOut(sets, radius, workers, bar)
        out_dir.mkdir(parents=True, exist_ok=True)
        partial = out_dir / "pairs.partial.csv"
        with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow([*Pair._fields, "train_file", "against_file"])
            stream = _thumbnails(source, workers)
            while chunk := list(islice(stream, CHUNK)):
                readable = {index: thumb for index, thumb in chunk if thumb is not None}
                unreadable += len(chunk) - len(readable)
                pairs = heldout.pairs(list(readable.items()), min_correlation)
                if embed is not None:
                    pairs = [_with_cosine(pair, source, heldout, embed, min_cosine) for pair in pairs]
                for pair in pairs:
                    number += 1
                    other = heldout.sources[pair.against]
                    writer.writerow([*pair, _file(source, pair.train_id), _file(other, pair.against_id)])
                    if pair.duplicate and pair.train_id not in excluded:
                        excluded[pair.train_id] = f"{_whole(readable[pair.train_id]):016x}"
                borderline = sorted([*borderline, *pairs], key=lambda p: abs(p.correlation - min_correlation))[:24]
                bar.update(len(chunk))
    partial.replace(out_dir / FILES[0])
    ids = sorted(excluded)
    marked = ids[:: max(1, -(-len(ids) // MOST_MARKS))]
    content = {
        "dataset": dataset, "split": split, "against": [name for name, _ in sets], "radius": radius,
        "min_correlation": min_correlation, "num_examples": len(source), "ids": ids,
        "hashes": {str(index): excluded[index] for index in marked},
    }  # fmt: skip
    write_bytes(out_dir / FILES[1], f"{json.dumps(content)}\n".encode(), overwrite=True)
    picture = cv2.imencode(".png", contact_sheet(borderline, source, heldout.sources)[..., ::-1])[1]
    write_bytes(out_dir / FILES[2], picture.tobytes(), overwrite=True)
    return (
        f"{len(excluded)} of {len(source)} training pictures are near-duplicates of {len(heldout.ids)} held-out ones"
        f" ({number} pairs within {radius} bits"
        + (f"; {unreadable + heldout.unreadable} pictures can't be read)" if unreadable + heldout.unreadable else ")")
    )


def _with_cosine(pair: Pair, source: Source, heldout: HeldOut, embed, min_cosine: float | int) -> Pair:
    images = [source[pair.train_id][0], heldout.sources[pair.against][pair.against_id][0]]
    if pair.mirrored:
        images[1] = images[1][:, ::-1]
    one, two = embed(images)
    cosine = float(one @ two)
    return pair._replace(cosine=cosine, duplicate=pair.duplicate and cosine >= min_cosine)


def _file(source: Source, index: int) -> str:
    return str(source.path(index)) if hasattr(source, "path") else ""


def contact_sheet(pairs: Sequence[Pair], source: Source, others: dict[str, Source]) -> UInt8[np.ndarray, "H W 3"]:
    """The two pictures of each pair side by side, its correlation, and a green (duplicate) or red frame."""
    side, columns = 112, 4
    rows = max(1, -(-len(pairs) // columns))
    sheet = np.full((rows * (side + 26), columns * (2 * side + 12), 3), 255, np.uint8)
    for i, pair in enumerate(sorted(pairs, key=lambda pair: -pair.correlation)):
        top, left = i // columns * (side + 26), i % columns * (2 * side + 12)
        for j, image in enumerate((source[pair.train_id][0], others[pair.against][pair.against_id][0])):
            small = cv2.resize(np.ascontiguousarray(image), (side, side), interpolation=cv2.INTER_AREA)
            sheet[top + 3 : top + 3 + side, left + 3 + j * (side + 2) : left + 3 + side + j * (side + 2)] = small
        colour = (0, 150, 60) if pair.duplicate else (200, 30, 30)
        cv2.rectangle(sheet, (left + 1, top + 1), (left + 2 * side + 7, top + side + 4), colour, 2)
        text = f"{pair.correlation:.3f}  {pair.distance} bits{'  mirrored' if pair.mirrored else ''}"
        cv2.putText(
            sheet, text, (left + 4, top + side + 19), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (30, 30, 30), 1, cv2.LINE_AA
        )
    return sheet


def read_pairs(out_dir: str | Path):
    """The table of pairs that `dedup` wrote, as a DataFrame."""
    import pandas as pd

    return pd.read_csv(Path(out_dir) / FILES[0])


class Summary(NamedTuple):
    """What a comparison found: a sentence, the table of pairs, and the sources, {name of the other: it}, whose ids they are."""

    sentence: str
    pairs: Any
    train: Source
    others: dict[str, Source]


def summary(
    source: Source, heldout: Source, dataset: str, out_dir: str | Path = "", data_dir: str | None = None
) -> Summary:  # fmt: skip
    """Of the comparison in out_dir; without one, of `source` with `heldout`, made here and not kept.

    ConfigError where a set that was compared can't be opened any more.
    """
    if out_dir:
        content, pairs = json.loads((Path(out_dir) / FILES[1]).read_text()), read_pairs(out_dir)
        name = content["dataset"] + (f"@{content['split']}" if content["split"] else "")
        train = open_set(name.removeprefix("images:"), "train", data_dir, content["num_examples"])
        most = pairs.groupby("against")["against_id"].max() + 1
        others = {against: open_set(against, "heldout", data_dir, int(count)) for against, count in most.items()}
        text = (
            f"{len(content['ids'])} of {content['num_examples']} training pictures are near-duplicates of held-out ones"
        )
        return Summary(text + ".", pairs, train, others)
    with tempfile.TemporaryDirectory() as folder:
        text = compare(source, [("heldout", heldout)], Path(folder), dataset=dataset, progress=False)
        return Summary(text + ".", read_pairs(folder), source, {"heldout": heldout})
