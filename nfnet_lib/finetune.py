"""Fine-tuning of weights from a file on any data set, by one command: the published recipe, made to fit the data."""

import math
from pathlib import Path
from typing import Any

from nfnet_lib import PROJECT
from nfnet_lib.config import ConfigError, FinetuneConfig, as_numbers
from nfnet_lib.pretrained import WeightsError
from nfnet_lib.recipe import load_recipe
from nfnet_lib.sources import load_source
from nfnet_lib.variants import get_variant
from nfnet_lib.weights import load_weights

PUBLISHED = PROJECT / "params" / "paper" / "finetune.yaml"
BATCH = 2048  # at which its learning rate is 0.1
# What a recipe for another data set, batch and machine keeps of the published one.
_KEPT = ("rho", "weight_decay", "drop_rate", "stochdepth_rate", "label_smoothing", "agc_clip", "agc_eps", "min_area")


def finetune_config(
    weights: str | Path, dataset: str = "", *, recipe: str | Path | None = None, epochs: float | int | None = None,
    batch_size: int | None = None, **overrides: Any,
) -> FinetuneConfig:  # fmt: skip
    """The config of fine-tuning the weights of a file on a data set.

    recipe: a recipe file (recipe.py), taken as it is, but for epochs, batch_size and dataset where they are given. Without one:
    on all of `dataset`, which must then be named, for about `epochs` (10) at batch_size 32, by the rates of the published
    recipe, at the variant's resolutions, with peak_lr 0.1 at the published batch of 2,048 and by the square root of the batch's
    size below that (our choice). overrides: any parameter. ConfigError for what does not fit together.
    """
    try:
        loaded, _ = load_weights(weights, num_classes=1)  # its head is not looked at here
    except (OSError, WeightsError) as error:
        raise ConfigError(f"weights: {error}") from None
    FinetuneConfig.refuse_unknown(overrides)
    overrides = as_numbers(FinetuneConfig, overrides)
    settings = {name: value for name, value in loaded.settings.items() if name != "image_size"}
    given = {"epoch_budget": epochs, "batch_size": batch_size, "dataset": dataset or None}
    own = {"variant": str(loaded), "pretrained_weights": str(weights)} | settings
    if recipe is not None:
        chosen = {name: value for name, value in given.items() if value is not None}
        return FinetuneConfig.from_params(load_recipe(recipe).params(str(loaded)) | own | chosen | overrides)
    if not dataset:
        raise ConfigError("dataset: '' is none; name one, or a recipe that does")
    epochs, batch_size = 10 if epochs is None else epochs, 32 if batch_size is None else batch_size
    if not 0 < epochs < math.inf or batch_size < 1:
        raise ConfigError(f"epochs, batch_size: {epochs}, {batch_size}; expected above 0, and an end")
    examples, heldout = (overrides.get(name) for name in ("examples_per_epoch", "heldout_examples"))
    examples = examples or _length(dataset, "train", overrides) - overrides.get("selection_examples", 0)
    heldout = heldout or _length(dataset, "heldout", overrides)
    if examples < 1:
        raise ConfigError(f"selection_examples: {overrides['selection_examples']} leaves nothing to train on")
    if given["batch_size"] is None:
        batch_size = min(batch_size, examples)
    steps = max(1, round(epochs * examples / batch_size))
    variant, published = get_variant(loaded), load_recipe(PUBLISHED).finetune
    return FinetuneConfig.from_params(
        {name: published[name] for name in _KEPT} | own | {
            "dataset": dataset, "examples_per_epoch": examples, "heldout_examples": heldout, "batch_size": batch_size,
            "epoch_budget": steps * batch_size / examples, "peak_lr": 0.1 * min(1.0, batch_size / BATCH) ** 0.5,
            "resolution": variant.train_px, "eval_resolution": variant.test_px, "loader_workers": 2,
        } | overrides
    )  # fmt: skip


def _length(dataset: str, split: str, overrides: dict[str, Any]) -> int:
    """Examples of a split of a data set, which is stored as the overrides say."""
    name = overrides.get("train_split" if split == "train" else "heldout_split", "")
    try:
        return len(
            load_source(
                dataset, split, split_name=name, data_dir=overrides.get("data_dir") or None,
                label_feature=overrides.get("label_feature", ""), image_size=overrides.get("image_size"),
            )
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None
