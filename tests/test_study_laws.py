"""A study's laws as tables and sentences: planted where they are known, and honest where the runs say little."""

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest

from nfnet_lib import PROJECT, law_plots, scaling, study_laws

SIZES = {"F0-mini": 2.4e6, "F1-mini": 9e6, "F3-mini": 3.6e7, "F7-mini": 1.4e8}
TRUTH = {"A": 800.0, "B": 5000.0, "E": 0.9, "alpha": 0.45, "beta": 0.55}


def planted(noise=0.002, seed=0, wrong=()):
    """Runs of a law of size and data, three rates a cell; `wrong` cells (variant, epochs) come out 5 % too high."""
    generator, rows = np.random.default_rng(seed), []
    for variant, macs in SIZES.items():
        for epochs in (0.25, 0.5, 1, 2, 4, 8):
            views = 100_000 * epochs
            loss = TRUTH["A"] * macs ** -TRUTH["alpha"] + TRUTH["B"] * views ** -TRUTH["beta"] + TRUTH["E"]
            loss *= np.exp(noise * generator.standard_normal()) * (1.05 if (variant, epochs) in wrong else 1)
            rows += [
                {"kind": "pretrain", "variant": variant, "epoch_budget": epochs, "peak_lr": 0.4 * factor, "forward_macs": macs,
                 "images_seen": views, "train_flops": 6 * macs * views, "heldout_loss": loss * (1 + 0.02 * (factor != 1))}
                for factor in (0.5, 1, 2)
            ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def laws():
    runs = planted()
    return study_laws.study_laws(scaling.best_per_cell(runs), runs, resamples=200)


def test_the_planted_law_comes_back(laws):
    for name in ("alpha", "beta", "E"):
        low, high = laws.surface.interval(name)
        assert low - 0.02 < TRUTH[name] < high + 0.02
    assert not laws.cells["outlier"].any() and not {"alpha", "beta"} & set(laws.surface.weak())
    assert (np.abs(np.log(laws.cells["predicted"] / laws.cells["heldout_loss"])) < 0.01).all()


def test_a_run_not_made_is_predicted_with_its_interval(laws):
    made = laws.predict(macs=[1.4e8, 5.6e8], views=[1.6e6, 1.6e6])
    truth = TRUTH["A"] * made["forward_macs"] ** -TRUTH["alpha"] + TRUTH["B"] * made["views"] ** -TRUTH["beta"] + TRUTH["E"]
    np.testing.assert_allclose(made["loss"], truth, rtol=0.01)
    assert (made["run_low"] < made["low"]).all() and (made["low"] < made["loss"]).all()
    assert (made["loss"] < made["high"]).all() and (made["high"] < made["run_high"]).all()
    np.testing.assert_allclose(made["train_flops"], 6 * made["forward_macs"] * made["views"])


def test_what_is_worth_running_is_near_what_is_asked(laws):
    table = laws.worth_running(5.6e8, 1.6e6)
    assert table["gain"].between(0, 1).all() and table["gain"].is_monotonic_decreasing
    assert table["forward_macs"].iloc[0] >= 3.6e7


def test_sentences_change_with_the_runs():
    runs = planted(wrong=[("F7-mini", 8), ("F3-mini", 4)])
    strange = study_laws.study_laws(scaling.best_per_cell(runs), runs, resamples=100)
    text = " ".join(strange.sentences())
    assert "does not explain: F3-mini at 4 epochs, F7-mini at 8 epochs." in text
    alpha = strange.surface.parameters["alpha"]
    assert f"alpha = {alpha:.4g}" in text
    other = planted(seed=5)
    other = study_laws.study_laws(scaling.best_per_cell(other), other, resamples=100)
    said = " ".join(other.sentences())
    assert said != text and f"alpha = {other.surface.parameters['alpha']:.4g}" in said
    assert "By this law the best size grows as compute^" in said


def test_runs_that_say_nothing_of_size_are_said_to():
    """A published study of networks that differ in depth: its losses hardly depend on size at equal epochs."""
    runs = pd.read_csv(PROJECT / "outputs" / "published" / "hours" / "results.csv")
    laws = study_laws.study_laws(scaling.best_per_cell(runs), runs, resamples=100)
    text = " ".join(laws.sentences())
    assert "alpha" in laws.surface.weak() and "These runs do not tell how the loss falls with size" in text
    assert np.isfinite(laws.cells["predicted"]).all() and np.isfinite(laws.extrapolation.to_numpy(float)).all()
    assert isinstance(law_plots.size_and_data(laws), matplotlib.figure.Figure)


def test_size_and_epochs_grow_together_in_the_published_study_of_widths():
    """What the README says of it is computed here from the record."""
    runs = pd.read_csv(PROJECT / "outputs" / "published" / "widths" / "results.csv")
    result = scaling.frontier_analysis(runs)
    text = " ".join(result.sentences())
    assert "F0-pico is best from 2.43e+09 to 9.52e+09, then another variant's curve falls below." in text
    best = result.ranges.set_index("variant")
    assert list(best.index) == ["F0-pico", "F0-nano", "F0-micro", "F0-mini"], "each size has its range of compute"
    assert result.law.r_squared > 0.97
    grown = " ".join(study_laws.study_laws(result.cells, runs, resamples=100).sentences())
    assert "at rates that these runs do not tell apart" in grown


@pytest.mark.parametrize("cells", [1, 2, 6, 7])
def test_few_cells_leave_out_what_they_do_not_allow(cells):
    runs = planted()
    some = scaling.best_per_cell(runs).iloc[[0, 1, 2, 7, 8, 14, 15][:cells]]
    own = runs[runs.set_index(["variant", "epoch_budget"]).index.isin(some.set_index(["variant", "epoch_budget"]).index)]
    laws = study_laws.study_laws(some, own, resamples=50)
    text = " ".join(laws.sentences())
    assert (laws.surface is None) == (cells < 7) == (f"No law of size and data: {cells} cells" in text)
    assert len(laws.trials) == cells - 1
    if laws.surface is None:
        with pytest.raises(ValueError, match=f"cells: {cells}; a prediction needs"):
            laws.predict(1e8, 1e6)


def test_what_the_runs_do_not_allow_is_left_out_with_a_note():
    runs = planted()
    own = runs[runs["variant"].isin(["F0-mini", "F1-mini"])]
    two = study_laws.study_laws(scaling.best_per_cell(own), own, resamples=50)
    assert two.surface is None and "No law of size and data: size: 2 different" in " ".join(two.sentences())
    once = runs[runs["peak_lr"] == 0.4]
    assert "No test of two trials: runs: 1 learning rate" in " ".join(
        study_laws.study_laws(scaling.best_per_cell(once), once, resamples=20).sentences()
    )
    cheapest = (runs["variant"] == "F0-mini") & (runs["epoch_budget"] == 0.25)
    lost = runs.assign(heldout_loss=runs["heldout_loss"].mask(cheapest))
    laws = study_laws.study_laws(scaling.best_per_cell(lost), lost, resamples=20)
    assert len(laws.cells) == 23 and len(laws.trials) == 22
    with pytest.raises(ValueError, match="every run diverged"):
        study_laws.study_laws(scaling.best_per_cell(runs.assign(heldout_loss=np.nan)), runs)
    hours = runs.assign(core_hours=runs["train_flops"] / 1e12)
    text = " ".join(study_laws.study_laws(scaling.best_per_cell(hours, compute="core_hours"), hours, "core_hours",
                                          resamples=20).sentences())  # fmt: skip
    assert "core-hours on" in text and "training FLOPs" not in text


def test_no_best_size_is_read_off_a_law_whose_floor_is_not_known():
    """Small noisy studies of a law with a floor: what is claimed of growth is right, and where it is not known nothing is."""
    claims = 0
    for seed in range(8):
        runs = planted(noise=0.02, seed=seed)
        laws = study_laws.study_laws(scaling.best_per_cell(runs), runs, resamples=50)
        claimed = "By this law the best size grows" in " ".join(laws.sentences())
        assert claimed == (not {"alpha", "beta", "E"} & set(laws.surface.weak()))
        claims += claimed
    assert claims < 8
