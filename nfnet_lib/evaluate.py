"""Accuracy of finished weights on any labelled set at any resolution: ImageNet-V2, ReaL, -A, -R and the like."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Int64

from nfnet_lib import models
from nfnet_lib.config import ConfigError, config_from_params
from nfnet_lib.data import load_sources
from nfnet_lib.data_plots import labels_of
from nfnet_lib.dedup import open_set
from nfnet_lib.loader import eval_batches
from nfnet_lib.predict import LARGEST, eval_margin, loss_of, read_labels
from nfnet_lib.records import PARAMS, read_summary
from nfnet_lib.sources import Source
from nfnet_lib.step import eval_step, means_of
from nfnet_lib.weights import load_weights, trained_classes

if TYPE_CHECKING:
    import pandas as pd

IMAGENET_CLASSES = 1000
# Sets of 200 of ImageNet's classes, which their authors score among those 200 (arXiv 1907.07174 and 2006.16241).
SCORED_AMONG_PRESENT = ("tfds:imagenet_a", "tfds:imagenet_r")


class Relabelled:
    """A source whose label l is called mapping[l]."""

    def __init__(self, source: Source, mapping: Int64[np.ndarray, " K"], num_classes: int):
        self.name, self.num_classes, self.fingerprint = source.name, num_classes, source.fingerprint
        self.labels_per_example = getattr(source, "labels_per_example", 1)
        self._source, self._mapping = source, mapping
        if hasattr(source, "batch"):
            self.batch = self._batch

    def __len__(self) -> int:
        return len(self._source)

    def _batch(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = self._source.batch(ids)
        return images, self._mapping[labels].astype(np.int32)

    def __getitem__(self, index: int):
        image, label = self._source[index]
        labels = label if isinstance(label, tuple) else (label,)
        return image, tuple(int(self._mapping[own]) for own in labels)


def evaluate_weights(
    weights: str | os.PathLike, dataset: str = "", resolutions: Sequence[int] = (), *, classes: str = "auto",
    labels: str | os.PathLike | None = None, num_examples: int | None = None, data_dir: str | None = None,
    batch_size: int = 32, workers: int = 2, progress: bool = True,
) -> "pd.DataFrame":  # fmt: skip
    """One row a resolution: dataset, resolution, classes, examples, top1, top5 (fractions), loss (nats), ece.

    weights: a run's folder, which is evaluated with its own margin and loss, or a file (`weights.load_weights`). dataset:
    NAME[@SPLIT]; empty: what a run was evaluated on. resolutions: in pixels; empty: that of the weights' test. An example with
    several right labels (ReaL) is right with any of them; one with none is left out.

    Classes of the set that are called otherwise than the head's are matched by name: by `labels`, a file of the names of the
    weights' classes, or else as ImageNet's WordNet ids where the weights have 1,000 classes. classes: "all" of the head's
    compete, or only those "present" in the set; "auto": present for ImageNet-A and -R, and where the set has fewer classes.
    ConfigError for classes that don't fit, or resolutions that the variant does not take.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    if classes not in ("auto", "all", "present"):
        raise ConfigError(f"classes: {classes!r} is not one of auto, all, present")
    variant, params = load_weights(weights)
    source = _source(weights, dataset, num_examples, data_dir)
    name = dataset or source.name
    mapping = class_mapping(source, len(params["head"]["b"]), labels, trained_classes(weights))
    few = dataset.partition("@")[0] in SCORED_AMONG_PRESENT or (dataset and source.num_classes < len(params["head"]["b"]))
    if classes == "present" or (classes == "auto" and few):
        params, mapping = _among_present(params, mapping, source)
    relabelled = Relabelled(source, mapping, len(params["head"]["b"]))
    model, rows, loss = models.create(variant, len(params["head"]["b"])), [], loss_of(weights)
    for resolution in resolutions or [_tested_at(weights, variant)]:
        _refuse_resolution(variant, resolution)
        step = _step(model.variant.name, model.num_classes, tuple(sorted(model.settings.items())), variant.pixels, loss)
        batches = eval_batches(
            relabelled, batch_size=batch_size, resolution=resolution, margin=eval_margin(weights, resolution),
            squash=model.variant.squash, workers=workers, normalise_labels=loss == "softmax",
        )  # fmt: skip
        shown = tqdm(
            batches, total=-(-len(source) // batch_size), desc=f"{resolution} px", disable=not progress, unit="batch"
        )
        sums = [jax.device_get(step(params, batch.examples)) for batch in shown]
        total = {key: np.sum([part[key] for part in sums], axis=0, dtype=np.float64) for key in sums[0]}
        if not total["examples"]:
            raise ConfigError(f"dataset: {name!r} has no example with a label that can be read")
        means = means_of(total)
        row = {"dataset": name, "resolution": resolution, "classes": model.num_classes, "examples": int(total["examples"])}
        rows.append(row | {key: means[key] for key in ("top1", "top5", "loss", "ece")})
    return pd.DataFrame(rows)


@functools.lru_cache(maxsize=4)
def _step(name: str, num_classes: int, settings: tuple, pixels: str, loss: str):
    """Compiled once at each resolution for all sets that a process looks at."""
    model = models.create(name, num_classes, **dict(settings))
    return jax.jit(functools.partial(eval_step, model=model, pixels=pixels, loss=loss))


def evaluate_sets(weights: str | os.PathLike, names: str, resolutions: Sequence[int], **options) -> "pd.DataFrame":
    """`evaluate_weights` on several sets, named with commas between; empty: what a run was evaluated on."""
    import pandas as pd

    sets = [name.strip() for name in names.split(",")]
    return pd.concat([evaluate_weights(weights, name, resolutions, **options) for name in sets], ignore_index=True)


def sweep_resolutions(weights: str | os.PathLike, resolutions: str = "") -> list[int]:
    """The numbers of a text like "256, 320"; of an empty one half, 3/4, 1, 5/4, 3/2 and 2 times the resolution of the test."""
    variant, _ = load_weights(weights)
    if resolutions.strip():
        try:
            return [int(text) for text in resolutions.split(",")]
        except ValueError:
            raise ConfigError(
                f"resolutions: {resolutions!r} is not a list of whole numbers with commas between"
            ) from None
    test, multiple = _tested_at(weights, variant), models.create(variant).variant.resolution_multiple
    return sorted({max(1, round(test * share / multiple)) * multiple for share in (0.5, 0.75, 1, 1.25, 1.5, 2)})


def trained_at(weights: str | os.PathLike) -> int | None:
    """The resolution in pixels at which weights were trained: a run's, or that published for the variant."""
    if (Path(weights) / PARAMS).is_file():
        return config_from_params(read_summary(weights)["config"]).resolution
    return models.create(load_weights(weights)[0]).variant.train_px


def class_mapping(
    source: Source, num_classes: int, labels: str | os.PathLike | None = None, trained_on: Sequence[str] = ()
) -> Int64[np.ndarray, " K"]:
    """The head's class of each class of a source: by name where names are known, else the same number. ConfigError if none.

    labels: a file of the names of the head's classes; trained_on: those that a run wrote down.
    """
    names = list(getattr(source, "class_names", ()))
    own = read_labels(labels, num_classes) if labels else trained_on
    index = {name: i for i, name in enumerate(own or (_imagenet_names() if num_classes == IMAGENET_CLASSES else []))}
    if names and all(name in index for name in names):
        return np.array([index[name] for name in names], np.int64)
    lost = [name for name in names if name not in index] or ["no names"]
    if labels:
        raise ConfigError(f"labels: {labels} lacks classes of {source.name}, which has {', '.join(lost[:3])}")
    if names and trained_on:
        raise ConfigError(
            f"dataset: {source.name} has classes that the weights were not trained on, {', '.join(lost[:3])}; a labels file"
            " can say what they are to be taken for"
        )
    if source.num_classes != num_classes:
        raise ConfigError(
            f"dataset: {source.name} has {source.num_classes} classes, the weights {num_classes}, and their names do not tell"
            " which is which; a labels file can"
        )
    return np.arange(num_classes)


def sentence(table: "pd.DataFrame") -> str:
    """What a table of `evaluate_weights` shows: the best resolution of each set."""
    parts = []
    for name, rows in table.groupby("dataset", sort=False):
        best = rows.loc[rows["top1"].idxmax()]
        error = 100 * (best["top1"] * (1 - best["top1"]) / best["examples"]) ** 0.5
        parts.append(
            f"{name}: top-1 {100 * best['top1']:.1f} ± {error:.1f}% at {best['resolution']} px"
            + (f", best of {len(rows)} resolutions" if len(rows) > 1 else "")
            + f" ({best['examples']:,} examples, {best['classes']:,} classes)"
        )
    return "; ".join(parts) + "."


def _tested_at(weights: str | os.PathLike, variant) -> int:
    """The resolution of the weights' own test: a run's, or that published for the variant."""
    if (Path(weights) / PARAMS).is_file():
        return config_from_params(read_summary(weights)["config"]).eval_resolution
    return variant.settings.get("image_size", models.create(variant).variant.test_px)


def _source(weights: str | os.PathLike, dataset: str, num_examples: int | None, data_dir: str | None) -> Source:
    """The set called so, or what a run was evaluated on."""
    if dataset:
        return open_set(dataset, "heldout", data_dir, num_examples)
    if not (Path(weights) / PARAMS).is_file():
        raise ConfigError("dataset: '' is none; name one, as these weights are no run's")
    config = config_from_params(read_summary(weights)["config"])
    changed = {"heldout_examples": num_examples, "data_dir": data_dir}
    return load_sources(config.model_copy(update={name: value for name, value in changed.items() if value is not None}))[1]


def _among_present(params, mapping: np.ndarray, source: Source):
    """(parameters whose head has only the classes that occur in the source, its classes among those)."""
    found = labels_of(source, len(source), skip_bad=True)
    present = sorted({int(mapping[label]) for labels in found for label in labels})
    if not present:
        raise ConfigError(f"dataset: {source.name} has no labels")
    place = np.full(len(params["head"]["b"]), -1, np.int64)
    place[present] = np.arange(len(present))
    head = {"w": params["head"]["w"][:, np.array(present)], "b": params["head"]["b"][np.array(present)]}
    return params | {"head": head}, place[mapping]


def _refuse_resolution(variant, resolution: int) -> None:
    multiple = models.create(variant).variant.resolution_multiple
    if not multiple <= resolution <= LARGEST or resolution % multiple:
        raise ConfigError(f"resolutions: {resolution} is not a multiple of {multiple} up to {LARGEST}, which {variant} needs")


def _imagenet_names() -> list[str]:
    """The WordNet ids of ImageNet's 1,000 classes in the order of the published weights."""
    from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

    return Path(imagenet_common.label_names_file()).read_text().split()
