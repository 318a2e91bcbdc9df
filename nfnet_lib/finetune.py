"""Fine-tuning of weights from a file on any data set, by one command: the published recipe, made to fit the data."""

from pathlib import Path
from typing import Any

from nfnet_lib.config import ConfigError, FinetuneConfig
from nfnet_lib.pretrained import WeightsError
from nfnet_lib.sources import load_source
from nfnet_lib.variants import get_variant
from nfnet_lib.weights import load_weights

# arXiv 2102.06171, A.5; AGC as in its A.1. The learning rate there is 0.1 at batch 2048.
RECIPE = {"rho": 0.05, "weight_decay": 1e-5, "drop_rate": 0.25, "stochdepth_rate": 0.1, "label_smoothing": 0.1}
BATCH = 2048


def finetune_config(
    weights: str | Path, dataset: str, *, epochs: float | int = 10, batch_size: int = 32, **overrides: Any
) -> FinetuneConfig:
    """The config of fine-tuning the weights of a file on all of a data set for about `epochs`.

    The recipe of the 2021 paper (RECIPE) at the variant's resolutions; peak_lr 0.1 at its batch of 2,048, by the square root
    of the batch's size below that (our choice). overrides: any parameter. ConfigError for what does not fit together.
    """
    try:
        loaded, _ = load_weights(weights)
        names = ("data_dir", "train_split", "heldout_split", "label_feature")
        data_dir, train_split, heldout_split, label_feature = (overrides.get(name, "") for name in names)
        common = {
            "data_dir": data_dir or None,
            "label_feature": label_feature,
            "image_size": overrides.get("image_size"),
        }
        examples = overrides.get("examples_per_epoch") or len(
            load_source(dataset, "train", split_name=train_split, **common)
        )
        heldout = overrides.get("heldout_examples") or len(
            load_source(dataset, "heldout", split_name=heldout_split, **common)
        )
    except (OSError, WeightsError) as error:
        raise ConfigError(f"weights: {error}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if epochs <= 0 or batch_size < 1:
        raise ConfigError(f"epochs, batch_size: {epochs}, {batch_size}; expected above 0")
    batch_size = min(batch_size, examples)
    steps = max(1, round(epochs * examples / batch_size))
    variant = get_variant(loaded)
    settings = {name: value for name, value in loaded.settings.items() if name != "image_size"}
    return FinetuneConfig.from_params(
        RECIPE | settings | {
            "variant": str(loaded), "dataset": dataset, "pretrained_weights": str(weights), "examples_per_epoch": examples,
            "heldout_examples": heldout, "batch_size": batch_size, "epoch_budget": steps * batch_size / examples,
            "peak_lr": 0.1 * min(1.0, batch_size / BATCH) ** 0.5, "resolution": variant.train_px,
            "eval_resolution": variant.test_px, "min_area": 0.08, "loader_workers": 2,
        } | overrides
    )  # fmt: skip
