"""Ways of fine-tuning side by side, which cell is best by which measure, and recipes: numbers, words, figures."""

import numpy as np
import pandas as pd
import pytest
import synthetic
import yaml

from nfnet_lib import comparison, finetune_plots, ranking
from nfnet_lib.cli import main
from nfnet_lib.config import ConfigError, FinetuneConfig, StudyConfig
from nfnet_lib.flops import train_flops
from nfnet_lib.recipe import load_recipe

ROOT = synthetic.__file__.rsplit("/", 2)[0]
RECIPES = [f"{ROOT}/params/{name}/finetune.yaml" for name in ("paper", "gpu", "laptop")]


def arms_of(errors, examples=1000):
    """Runs of a comparison with these errors in percent, {arm: [one a seed]}."""
    return pd.DataFrame([
        {"arm": arm, "seed": seed, "variant": "F0-mini", "dataset": "digits", "epoch_budget": 6.0, "heldout_examples": examples,
         "top1_error_percent": error}
        for arm, each in errors.items() for seed, error in enumerate(each)
    ])  # fmt: skip


@pytest.mark.parametrize("rho,fraction,augmult", [(0.05, 1.0, 1), (0.0, 1.0, 4), (0.1, 0.25, 2)])
def test_all_arms_cost_the_same(rho, fraction, augmult):
    config = FinetuneConfig(
        variant="F1-mini", dataset="digits", examples_per_epoch=640, batch_size=32, epoch_budget=4, pretrained_run="x", rho=rho,
        ascent_fraction=fraction, augmult=augmult, seed=5,
    )  # fmt: skip
    arms = comparison.arm_configs(config, 3)
    assert [name for name, _ in arms] == [name for name in comparison.ARMS for _ in range(3)]
    costs = [train_flops(1, c.steps * c.batch_size, c.rho, c.ascent_fraction) for _, c in arms]
    own = train_flops(1, config.steps * config.batch_size, rho, fraction)
    assert np.ptp([*costs, own]) <= 2 * train_flops(1, config.batch_size), "to within a step of SAM"
    assert {c.seed for _, c in arms} == {5, 6, 7} and len({c.run_id for _, c in arms}) == 15
    by_name = dict(arms)
    assert by_name["plain"].rho == 0 and by_name["SAM + RA, 4 views"].augmult == 4
    assert by_name["SAM"].rho == (rho or 0.05)


def test_a_difference_within_the_noise_is_called_that_and_a_clear_one_is_not():
    near = arms_of({"plain": [4.0, 5.1, 4.4], "SAM": [4.2, 4.9, 4.1], "RA, 2 views": [4.6, 4.3, 4.5]})
    assert "no other way differs from it by more than the noise" in comparison.sentence(near)
    far = arms_of(
        {"plain": [4.0, 4.3, 4.1], "SAM": [2.0, 2.2, 2.1], "RA, 2 views": [4.2, 4.1, 4.4], "RA, 4 views": [9, 9.2, 9.1]}
    )
    text = comparison.sentence(far)
    assert "SAM lowers that by 2.03 points" in text and "RA, 4 views raises that by 4.97 points" in text
    assert "the other 1 can't be told from plain" in text
    one = comparison.sentence(arms_of({"plain": [4.0], "SAM": [1.0]}))
    assert "With one seed nothing can be said" in one and "-3.00" in one
    same = arms_of({"plain": [4.0, 4.0, 4.0], "SAM": [4.1, 4.1, 4.1]})
    assert "no other way" in comparison.sentence(same), "equal seeds are no proof: errors are whole examples"
    assert "No runs" in comparison.sentence(arms_of({}))
    with pytest.raises(ValueError, match="no arm 'plain'"):
        comparison.arm_table(arms_of({"SAM": [1.0]}))


def test_intervals_hold_for_all_arms_together():
    """Where nothing differs, some arm seems to in about 5% of comparisons, and not in 18%."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        runs = arms_of({name: rng.normal(10, 1, 3) for name in comparison.ARMS}, examples=10**6)
        table = comparison.arm_table(runs)
        wrong += bool((table["difference"].abs() > table["interval"]).any())
    assert 0 <= wrong / 400 < 0.09


def test_records_give_the_comparison_and_keep_it_out_of_figure_1():
    from nfnet_lib.scaling import finetune_table

    runs = synthetic.pretrain_summaries()[:3]
    tuned = synthetic.finetune_summaries(runs[:1])
    compared = [
        synthetic.summary(f"c{i}", kind="finetune", heldout_top1=0.9,
                          config={"pretrained_run": runs[0]["run_id"], "compared_as": arm, "heldout_examples": 360})
        for i, arm in enumerate(reversed(comparison.ARMS))
    ]  # fmt: skip
    table = synthetic.table([*runs, *tuned, *compared])
    assert list(comparison.recorded(table)["arm"]) == list(comparison.ARMS)
    assert len(finetune_table(table)) == len(tuned)
    assert comparison.recorded(synthetic.table(runs)).empty


def test_a_study_s_own_values_for_a_variant_are_added_to_the_recipe_s():
    path = f"{ROOT}/params/laptop/study.yaml"
    before, after = (
        StudyConfig.from_file(path, own).finetune_config("F0-mini", "x", 1).model_dump()
        for own in ({}, {"finetune_variants.F0-mini.peak_lr": 0.1})
    )
    assert {name for name in before if before[name] != after[name]} == {"peak_lr"}
    with pytest.raises(ConfigError, match=r"finetune_variants: .*'F0-pcio'"):
        StudyConfig.from_file(path, {"finetune_variants.F0-pcio.rho": 0.1})


def test_of_several_comparisons_in_a_folder_one_is_shown():
    """Runs of other variants and origins are no more seeds."""
    config = FinetuneConfig(variant="F1-mini", dataset="digits", pretrained_run="b")
    compared = [
        synthetic.summary(f"{variant}{origin}{arm}{seed}", kind="finetune", heldout_top1=0.9,
                          config={"variant": variant, "dataset": "digits", "pretrained_run": origin, "compared_as": arm,
                                  "seed": seed})
        for variant, origin, seeds in (("F0-mini", "a", 3), ("F1-mini", "b", 2), ("F1-mini", "c", 2))
        for arm in ("plain", "SAM", "a way of later days") for seed in range(seeds)
    ]  # fmt: skip
    runs = comparison.recorded(synthetic.table(compared))
    assert set(runs["arm"]) == {"plain", "SAM"} and len(runs) == 14
    own = comparison.one_comparison(runs, config)
    assert set(own["variant"]) == {"F1-mini"} and set(own["pretrained_run"]) == {"b"} and len(own) == 4
    other = comparison.one_comparison(runs, config.model_copy(update={"variant": "F3-mini"}))
    assert set(other["variant"]) == {"F0-mini"} and len(other) == 6, "that of the most runs"
    assert comparison.one_comparison(runs[:0], config).empty


def planted_cells():
    """Four variants by three budgets; error favours twice the size at half the epochs."""
    rows = []
    for i, size in enumerate((1, 2, 4, 8)):
        for epochs in (1, 2, 4):
            compute = size * epochs * 1e12
            best = np.log2(size / epochs)
            rows.append({
                "variant": f"F{i}-mini", "epoch_budget": epochs, "num_params": size * 1e6, "pretrain_compute": compute,
                "pretrain_heldout_loss": 3 - 0.2 * np.log2(compute / 1e12) + 0.1 * best**2,
                "top1_error_percent": 20 - 2 * np.log2(compute / 1e12) + 1.0 * (best - 2) ** 2, "heldout_examples": 1000.0,
            })  # fmt: skip
    return pd.DataFrame(rows)


def test_the_distance_between_best_by_loss_and_best_by_error():
    cells = planted_cells()
    table = ranking.best_by_budget(cells)
    assert (table["budget"].diff().dropna() > 0).all() and table["budget"].iloc[-1] == 32e12
    at4 = table[np.isclose(table["budget"], 4e12)].iloc[0]
    assert (at4["loss_variant"], at4["loss_epochs"]) == ("F1-mini", 2)
    assert (at4["error_variant"], at4["error_epochs"]) == ("F2-mini", 1)
    assert at4["size_doublings"] == 1 and at4["epoch_doublings"] == -1 and not at4["same"]
    for row in table.itertuples():
        among = cells[cells["pretrain_compute"] <= row.budget * 1.001]
        assert row.cells == len(among)
        best = among.loc[among["top1_error_percent"].idxmin()]
        assert (row.error_variant, row.error_epochs) == (best["variant"], best["epoch_budget"])
    text = ranking.sentence(table)
    assert "times the parameters" in text and "The paper finds" in text
    agree = cells.assign(top1_error_percent=cells["pretrain_heldout_loss"] * 5)
    assert ranking.best_by_budget(agree)["same"].all() and "At 5 of 5" in ranking.sentence(
        ranking.best_by_budget(agree)
    )
    tied = cells.assign(top1_error_percent=5.0)
    assert ranking.best_by_budget(tied)["same"].all(), "a tie is no reason to prefer another cell"
    assert "Fewer than two cells" in ranking.sentence(ranking.best_by_budget(cells[:1]))


def test_cells_are_means_over_fine_tuning_runs():
    runs = [r for r in synthetic.pretrain_summaries() if r["config"]["peak_lr"] == 0.8][:2]
    tuned = [
        synthetic.summary(f"t{i}", kind="finetune", heldout_top1=top1, config={
            "pretrained_run": run["run_id"], "variant": run["config"]["variant"], "heldout_examples": 360, "seed": i})
        for i, (run, top1) in enumerate([(runs[0], 0.8), (runs[0], 0.9), (runs[1], 0.7)])
    ]  # fmt: skip
    cells = ranking.finetuned_cells(synthetic.table([*runs, *tuned]))
    np.testing.assert_allclose(cells["top1_error_percent"], [15, 30])
    np.testing.assert_allclose(cells["num_params"], [r["num_params"] for r in runs])
    none = ranking.finetuned_cells(synthetic.table(runs))
    assert none.empty and "Fewer than two cells" in ranking.sentence(ranking.best_by_budget(none))


def test_figures_draw_what_the_tables_say():
    runs = arms_of({"plain": [4.0, 4.3, 4.1], "SAM": [2.0, 2.2, 2.1]})
    axes = finetune_plots.arms(runs).axes[0]
    rings = next(line for line in axes.lines if line.get_gid() == "SAM")
    np.testing.assert_allclose(sorted(rings.get_xdata()), [2.0, 2.1, 2.2])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["plain", "SAM"]
    cells = planted_cells()
    upper, lower = finetune_plots.best_by_budget(ranking.best_by_budget(cells), cells).axes
    drawn = next(line for line in lower.lines if line.get_gid() == "error epochs")
    np.testing.assert_allclose(drawn.get_ydata(), ranking.best_by_budget(cells)["error_epochs"].astype(float))
    assert [label.get_text() for label in upper.get_yticklabels()] == ["F0-mini", "F1-mini", "F2-mini", "F3-mini"]
    sweep = pd.DataFrame({"dataset": "a", "resolution": [32, 16], "top1": [0.5, 0.4], "examples": 100})
    axes = finetune_plots.resolution_sweep(sweep, trained_at=16).axes[0]
    line = next(line for line in axes.lines if line.get_gid() == "a")
    np.testing.assert_allclose(line.get_xdata(), [16, 32])
    np.testing.assert_allclose(line.get_ydata(), [60, 50])


@pytest.mark.parametrize("path", RECIPES)
@pytest.mark.parametrize("variant", ["F0", "F3", "F7+", "F6", "F1-mini"])
def test_every_recipe_fits_every_variant(path, variant, capsys):
    params = load_recipe(path).params(variant)
    config = FinetuneConfig.from_params(params | {"pretrained_run": "x"})
    assert config.variant == variant and config.rho == 0.05 and config.drop_rate == 0.25
    assert main(["params", path, variant]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == params


def test_the_published_recipe_is_what_the_papers_print():
    recipe = load_recipe(RECIPES[0])
    config = FinetuneConfig.from_params(recipe.params("F7+") | {"pretrained_run": "x"})
    assert (config.resolution, config.eval_resolution, config.epoch_budget, config.batch_size) == (384, 480, 50, 2048)
    assert (config.peak_lr, config.warmup_steps, config.weight_decay) == (0.1, 5000, 1e-5)
    assert config.stochdepth_rate == 0.1 and config.ema_decay == 0.9999 and config.sam_perturbation == "per_device"
    assert config.sharding == "fsdp" and recipe.params("F0").get("sharding") is None


def test_recipes_build_on_each_other_and_bad_ones_are_refused(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "finetune: {rho: 0.1, peak_lr: 0.2}\nvariants: {F0: {peak_lr: 0.3, drop_rate: 0.1}}\n"
    )
    (tmp_path / "own.yaml").write_text("base: base.yaml\nfinetune: {peak_lr: 0.4}\nvariants: {F0: {drop_rate: 0.2}}\n")
    recipe = load_recipe(tmp_path / "own.yaml")
    assert recipe.params("F1") == {"rho": 0.1, "peak_lr": 0.4, "variant": "F1"}
    assert recipe.params("F0") == {"rho": 0.1, "peak_lr": 0.3, "drop_rate": 0.2, "variant": "F0"}
    for content, words in (
        ("finetune: {rhoo: 1}", "rhoo: unknown parameter"), ("finetune: {}\nvariants: {F99: {}}", "variants: variant: unknown"),
        ("recipe: {}", "must hold finetune"), ("base: self.yaml\nfinetune: {}", "more than 8 deep"),
        ("finetune: {}\nvariants: {1: {}}", "variants: variant: unknown '1'"),
        ("finetune: {}\nbase: none.yaml", "can't be read"),
        ("finetune: {}\nvariants: {F0: {lr: 1}}", "lr: unknown"),
    ):  # fmt: skip
        (tmp_path / "self.yaml").write_text(content)
        with pytest.raises(ConfigError, match=words):
            load_recipe(tmp_path / "self.yaml")


def test_a_study_takes_its_recipe_from_a_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "finetune: {dataset: digits, examples_per_epoch: 64, batch_size: 32}\nvariants: {F1-mini: {peak_lr: 0.01}}\n"
    )
    (tmp_path / "study.yaml").write_text(
        "study: {name: s, pretrain: {}, variants: [F0-mini, F1-mini], epoch_budgets: [1], lr_grid: [0.1],\n"
        " finetune: recipe.yaml}"
    )
    study = StudyConfig.from_file(tmp_path / "study.yaml")
    assert [study.finetune_config(v, "x", 1).peak_lr for v in study.variants] == [0.1, 0.01]
