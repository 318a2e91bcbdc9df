"""The comparison of families says what planted errors say, and no more."""

import numpy as np
import pandas as pd
import pytest

from nfnet_lib import families, plots
from nfnet_lib.config import ConfigError, StudyConfig


def runs(nfnet=0.5, vit=0.5, slope=-0.2, examples=2000, budgets=(0.5, 1, 2, 4)):
    """Error falls as a power of compute in each family; the middle of three learning rates is best."""
    rows = []
    for variants, scale in ((("F0-mini", "F1-mini"), nfnet), (("Ti/4-mini", "S/4-mini"), vit)):
        for size, variant in enumerate(variants):
            for epochs in budgets:
                for lr, worse in ((0.1, 1.1), (0.2, 1.0), (0.4, 1.2)):
                    compute = 1e10 * epochs * (1 + size)
                    error = scale * worse * (compute / 1e10) ** slope
                    rows.append(
                        {"kind": "pretrain", "variant": variant, "epoch_budget": epochs, "peak_lr": lr, "seed": 0,
                         "train_flops": compute, "heldout_loss": 3 * error, "heldout_top1": 1 - error,
                         "heldout_examples": examples}
                    )  # fmt: skip
    return pd.DataFrame(rows)


def test_cells_are_the_best_runs_with_their_family_and_sampling_error():
    cells = families.family_cells(runs())
    assert len(cells) == 16 and set(cells["family"]) == {"NFNet", "ViT"}
    assert (cells["best_lr"] == 0.2).all() and cells["lr_is_interior"].all() and (cells["num_lrs"] == 3).all()
    first = cells.iloc[0]
    error = 0.5 * 0.5**-0.2
    assert first["top1_error_percent"] == pytest.approx(100 * error)
    assert first["standard_error"] == pytest.approx(100 * (error * (1 - error) / 2000) ** 0.5)
    assert cells.groupby("family")["on_frontier"].any().all()
    assert any("One seed a run" in text for text in families.sentences(cells, families.compare_families(cells)))
    two = families.family_cells(pd.concat([runs(), runs().assign(seed=1)]))
    said = families.sentences(two, families.compare_families(two))
    assert any("Means over seeds" in text for text in said) and not any("One seed" in text for text in said)


@pytest.mark.parametrize(
    ("nfnet", "vit", "says"),
    [
        (0.5, 0.5, "the families match within sampling error"), (0.4, 0.6, "NFNets do better"),
        (0.6, 0.4, "ViTs do better"),
    ],
)  # fmt: skip
def test_the_verdict_is_the_planted_one(nfnet, vit, says):
    cells = families.family_cells(runs(nfnet, vit))
    comparison = families.compare_families(cells)
    np.testing.assert_allclose(comparison["ratio"], nfnet / vit, rtol=1e-6)
    text = families.sentences(cells, comparison)
    assert says in text[-1]
    assert f"(geometric mean {nfnet / vit:.2f})" in text[0]
    assert "NFNet 3.0, ViT 3.0" in text[2]


def test_crossing_frontiers_depend_on_the_compute():
    a, b = runs(0.4, slope=-0.1), runs(vit=0.7, slope=-0.5)
    table = pd.concat([a[a["variant"].str.startswith("F")], b[~b["variant"].str.startswith("F")]])
    table = table[table["heldout_top1"].between(0, 1)]
    cells = families.family_cells(table)
    assert "depends on the compute" in families.sentences(cells, families.compare_families(cells))[-1]


def test_what_can_not_be_compared_is_said():
    cells = families.family_cells(runs())
    with pytest.raises(ValueError, match="no ViT"):
        families.compare_families(cells[cells["family"] == "NFNet"])
    far = cells.assign(train_flops=np.where(cells["family"] == "ViT", 1e20, 1) * cells["train_flops"])
    with pytest.raises(ValueError, match="share no range"):
        families.compare_families(far)


def test_the_figure_shows_every_variant():
    axes = plots.families(families.family_cells(runs())).axes[0]
    names = {text.get_text() for text in axes.texts}
    assert {"F0-mini", "F1-mini", "Ti/4-mini", "S/4-mini"} <= names


def study(**changes):
    content = {
        "name": "two", "pretrain": {"examples_per_epoch": 64, "batch_size": 16, "heldout_examples": 16},
        "variants": ["F0-mini", "Ti/4-mini"], "epoch_budgets": [1], "lr_grid": [0.1, 0.2],
        "families": {"ViT": {"pretrain": {"optimizer": "adamw"}, "lr_grid": [0.001, 0.002, 0.004]}},
    }  # fmt: skip
    return StudyConfig(**{**content, **changes})


def test_a_family_has_parameters_and_rates_of_its_own():
    two = study()
    two.validate_cells()
    assert two.learning_rates("F0-mini")[0] == [0.1, 0.2]
    assert two.learning_rates("Ti/4-mini")[0] == [0.001, 0.002, 0.004]
    assert two.pretrain_config("F0-mini", 1, 0.1).optimizer == "sgd"
    config = two.pretrain_config("Ti/4-mini", 1, 0.001)
    assert config.optimizer == "adamw" and "/" not in config.run_id + config.cell_id
    wrong = study(families={"ViT": {"pretrain": {"optimiser": "adamw"}}})
    with pytest.raises(ConfigError, match="optimiser"):
        wrong.validate_cells()
    start = study(families={"ViT": {"lr_start": {1: 0.1}}}, lr_start={1: 0.2})
    assert start.learning_rates("Ti/4-mini") == ([0.1, 0.2], {1: 0.1}) and start.learning_rates("F0-mini")[1] == {1: 0.2}
    with pytest.raises(ConfigError, match="comparison_seeds: 3; allowed: 0, or else with finetune"):
        study(comparison_seeds=3).validate_cells()
    with pytest.raises(ConfigError, match="ascend"):
        study(families={"ViT": {"lr_grid": [0.2, 0.1]}}).validate_cells()


def test_a_family_without_errors():
    """It is no certainty, nor infinitely better: it counts as an error too few to be seen."""
    perfect = runs()
    perfect.loc[perfect["variant"].eq("F1-mini") & perfect["epoch_budget"].eq(4), "heldout_top1"] = 1.0
    cells = families.family_cells(perfect)
    assert cells["top1_error_percent"].min() == 0
    assert cells["standard_error"].min() == pytest.approx(100 * 0.5**0.5 / 2000, rel=1e-3)
    comparison = families.compare_families(cells)
    assert np.isfinite(comparison).all(axis=None) and 0 < comparison["ratio"].min() < 0.01
    assert "nan" not in " ".join(families.sentences(cells, comparison))
    assert plots.families(cells).axes[0].get_yscale() == "linear", "0 has no place on a log axis"
