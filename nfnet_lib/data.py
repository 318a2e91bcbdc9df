"""The data of a run: sources, exclusions, views and batches as its config asks for them, and the list of bad examples."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from nfnet_lib import located
from nfnet_lib.config import ConfigError, RunConfig
from nfnet_lib.files import write_bytes
from nfnet_lib.loader import BadExample, Batch, LoaderError, train_batches
from nfnet_lib.records import RecordError
from nfnet_lib.sampler import ExactlyOnceSampler
from nfnet_lib.sources import FRACTALS, Source, Subset, load_source

QUARANTINE = "quarantine.jsonl"
# Parameters of a run that say which examples there are.
DATA_PARAMETERS = (
    "dataset", "data_dir", "train_split", "heldout_split", "label_feature", "exclude", "num_classes", "image_size",
    "examples_per_epoch", "heldout_examples", "selection_examples", "data_seed", "hue_spread",
)  # fmt: skip


def load_sources(config: RunConfig) -> tuple[Source, Source]:
    """The training and held-out examples that a config asks for; ConfigError for what does not exist."""
    options: dict[str, Any] = {}
    if config.dataset in FRACTALS:
        options = {"num_classes": config.num_classes, "seed": config.data_seed, "hue_spread": config.hue_spread}
    if ":" not in config.dataset:
        options["image_size"] = config.image_size
    elif config.dataset.startswith("tfds:"):
        options = {"label_feature": config.label_feature, "data_dir": config.data_dir or None}
    wanted = (
        ("train", config.examples_per_epoch + config.selection_examples, config.train_split),
        ("heldout", config.heldout_examples, config.heldout_split),
    )
    try:
        train, heldout = (
            load_source(config.dataset, split, num_examples=number, split_name=name, **options)
            for split, number, name in wanted
        )
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith("dataset") else f"dataset: {text}") from None
    names = [getattr(source, "class_names", ()) for source in (train, heldout)]
    for number, (trained, other) in enumerate(zip(*names, strict=False)):  # folders of any name may be the splits
        if trained != other:
            raise ConfigError(f"dataset: {config.dataset!r}: class {number} is {trained!r} to train and {other!r} held out")
    if heldout.num_classes > train.num_classes:
        raise ConfigError(
            f"dataset: {config.dataset!r} has {train.num_classes} classes to train and {heldout.num_classes} held out"
        )
    return train, heldout


def make_sampler(config: RunConfig, source: Source) -> ExactlyOnceSampler:
    """The order of a run's examples, without those that `exclude` names and those kept for selection."""
    exclude = selection_ids(config, len(source))
    if config.exclude:
        exclude = np.union1d(exclude, load_exclusions(config, source))
    if len(exclude) >= len(source):
        raise ConfigError(f"exclude: {config.exclude or config.selection_examples!r} leaves none of {len(source)} examples")
    return ExactlyOnceSampler(len(source), config.seed, exclude if len(exclude) else None)


def selection_ids(config: RunConfig, num_examples: int) -> Int64[np.ndarray, " n"]:
    """The examples of the training split that are kept out of training: drawn at random by data_seed, the same for all runs."""
    return np.sort(ExactlyOnceSampler(num_examples, config.data_seed).example_ids(0, config.selection_examples))


def selection_source(config: RunConfig, source: Source) -> Subset | None:
    """The examples of `selection_ids`, of those that `exclude` does not name; None where there are none."""
    ids = selection_ids(config, len(source))
    if config.exclude:
        ids = np.setdiff1d(ids, load_exclusions(config, source))
    return Subset(source, ids) if len(ids) else None


def load_exclusions(config: RunConfig, source: Source) -> Int64[np.ndarray, " n"]:
    """Ids of `source` on the list that `nfnet dedup` wrote at config.exclude; ConfigError if it is for other data.

    Ids count within a split, so that a list for another split, or from before files were added, would leave out the wrong
    examples: by the hashes on it some of its pictures are known again.
    """
    from nfnet_lib.dedup import other_pictures

    path = config.exclude
    try:
        content = json.loads(located(path).read_text())
        if wrong := [i for i in content["ids"] if type(i) is not int or not 0 <= i < 2**62]:
            raise ValueError(f"{wrong[0]!r} is no id")
        ids = np.array(content["ids"], np.int64)
        marks = {int(index): int(mark, 16) for index, mark in dict(content.get("hashes", {})).items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"exclude: {path} is not a list of ids as `nfnet dedup` writes it: {error}") from None
    if content.get("dataset") != config.dataset:
        raise ConfigError(f"exclude: {path} is for {content.get('dataset')!r}, the run's dataset is {config.dataset!r}")
    found, wanted = (name or "train" for name in (content.get("split", ""), config.train_split))
    if found != wanted:
        raise ConfigError(f"exclude: {path} is for the split {found!r}, the run's train_split is {wanted!r}")
    if others := other_pictures(source, marks):
        raise ConfigError(
            f"exclude: {path} is for other pictures: example {others[0]} is not the one it names; run nfnet dedup again"
        )
    return ids[ids < len(source)]


def run_batches(config: RunConfig, source: Source, sampler: ExactlyOnceSampler, **options: Any) -> Iterator[Batch]:
    """`loader.train_batches` as a config asks for it."""
    return train_batches(
        source, sampler, batch_size=config.batch_size, augmult=config.augmult, resolution=config.resolution,
        seed=config.seed, flip=config.flip, min_area=config.min_area, mixup_alpha=config.mixup_alpha,
        cutmix=config.cutmix, randaugment_layers=config.randaugment_layers,
        randaugment_magnitude=config.randaugment_magnitude, on_bad=config.on_bad,
        normalise_labels=config.loss == "softmax", **{"workers": config.loader_workers, **options},
    )  # fmt: skip


def example_views(config: RunConfig, count: int = 24) -> UInt8[np.ndarray, "n H W 3"]:
    """The first `count` training views of a run, [count, resolution, resolution, 3]."""
    source, _ = load_sources(config)
    views: list[np.ndarray] = []
    with contextlib.closing(run_batches(config, source, make_sampler(config, source), workers=0)) as batches:
        while len(views) < count:
            views += list(next(batches).images)
    return np.stack(views[:count])


class Quarantine:
    """The examples of a run that could not be read, in a file, each once; LoaderError above the allowed share.

    One bad example is always allowed, so that small sets can have one at all. Of several processes only the first has a
    path, and learns at `merge` what the others found.
    """

    def __init__(self, path: Path | None, num_examples: int, max_fraction: float | int):
        self.path, self.num_examples, self.max_fraction = path, num_examples, max_fraction
        *lines, rest = path.read_bytes().split(b"\n") if path is not None and path.exists() else [b""]
        self.ids: dict[str, set[int]] = {"train": set(), "heldout": set()}
        self._to_tell: list[tuple[str, list]] = []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                self.ids[entry["split"]].add(entry["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise RecordError(f"{path}, line {number}: {error!r}: {line[:80]!r}") from None
        if rest:  # of a run that was killed; the next line must not go on from there
            write_bytes(path, b"".join(line + b"\n" for line in lines), overwrite=True)

    def add(self, bad: tuple[BadExample, ...], split: str = "train") -> None:
        """Write down what is new among `bad`."""
        for example in bad:
            if example.id not in self.ids[split]:
                self.ids[split].add(example.id)
                if self.path is None:
                    self._to_tell.append((split, list(example)))
                    continue
                with self.path.open("a") as file:
                    file.write(json.dumps({"split": split, **example._asdict()}) + "\n")
        if bad and split == "train" and len(self.ids[split]) > max(1, self.max_fraction * self.num_examples):
            raise LoaderError(
                f"max_bad_fraction: {len(self.ids[split])} of {self.num_examples} examples can't be read, more than"
                f" {self.max_fraction:g}; the last, example {bad[-1].id}: {bad[-1].reason}"
                + (f"; all are in {self.path.name}" if self.path is not None else "")
            )

    def merge(self) -> None:
        """Tell the first process what the others found; all must call it."""
        from nfnet_lib import distributed

        found, self._to_tell = distributed.gathered(self._to_tell), []
        for split, example in (entry for entries in found for entry in entries):
            self.add((BadExample(*example),), split)
