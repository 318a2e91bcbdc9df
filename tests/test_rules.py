"""The paper's rules against studies in which they were planted, and against the published laptop study."""

import numpy as np
import pandas as pd
import pytest
import synthetic

from nfnet_lib import PROJECT, rules, scaling, study_laws


@pytest.fixture(scope="module")
def runs():
    return synthetic.table(synthetic.pretrain_summaries(noise=0.001))


@pytest.fixture(scope="module")
def cells(runs):
    return scaling.best_per_cell(runs)


def test_growth_finds_the_planted_rates(cells):
    """Each variant is best where epochs are proportional to its cost: both grow as the square root of compute."""
    found = rules.growth(cells, resamples=300)
    assert found.size[0] == pytest.approx(0.5, abs=0.1) and found.epochs[0] == pytest.approx(0.5, abs=0.1)
    assert found.size[0] + found.epochs[0] == pytest.approx(1.0, abs=1e-6)  # compute is their product
    assert found.size[1] < 0.5 < found.size[2] and "do not tell apart" in found.sentence()


def test_growth_of_size_alone_is_called_so():
    """Larger variants win at once, each at the one budget that is trained."""
    summaries = synthetic.pretrain_summaries(epochs=(0.25, 0.3), noise=0.0005, bend=0.0)
    found = rules.growth(scaling.best_per_cell(synthetic.table(summaries)), resamples=200)
    assert found.difference[1] > 0 and found.sentence().endswith("size faster.")


def test_growth_says_what_it_lacks(cells):
    with pytest.raises(ValueError, match="on the frontier; a rate of growth needs 3"):
        rules.growth(cells.nsmallest(2, "train_flops"))


def test_more_than_one_epoch_from_the_planted_budget_on(cells):
    once, more = rules.repeats_from(cells)
    points = cells[scaling.frontier(cells["train_flops"].to_numpy(), cells["heldout_loss"].to_numpy())]
    assert (points.loc[points["train_flops"] >= more, "epoch_budget"] > 1).all()
    assert points.loc[points["train_flops"] == once, "epoch_budget"].le(1).all() and once < more
    assert rules.repeats_from(cells[cells["epoch_budget"] <= 1]) is None


def test_monotone_rates_follow_a_falling_rate_and_smooth_a_rise():
    cells = pd.DataFrame({"variant": "F0", "epoch_budget": [0.25, 0.5, 1, 2], "best_lr": [0.8, 0.2, 0.4, 0.1]})
    fitted = rules.monotone_lr(cells)
    np.testing.assert_allclose(fitted["fitted_lr"], [0.8, 0.2 * 2**0.5, 0.2 * 2**0.5, 0.1])
    np.testing.assert_allclose(fitted["steps_off"], [0, -0.5, 0.5, 0], atol=1e-12)


@pytest.mark.parametrize("best,size,epochs,expected", [
    ([0.4], 2e6, 4.0, (0.4, 0.2)),  # one cell known: its own rate, then the lower
    ([0.8, 0.4, 0.2], 1e6, 4.0, (0.1, 0.05)),  # halves with each doubling of epochs: so does the next
    ([0.2, 0.4, 0.8], 1e6, 4.0, (0.8, 0.4)),  # a rising rate is not carried on
])  # fmt: skip
def test_a_rate_is_proposed_from_smaller_cells(best, size, epochs, expected):
    known = pd.DataFrame({
        "forward_macs": 1e6, "epoch_budget": [0.5, 1.0, 2.0][: len(best)], "best_lr": best,
    })  # fmt: skip
    assert rules.propose_lr(known, size, epochs, [0.05, 0.1, 0.2, 0.4, 0.8]) == expected


def test_two_trials_find_nearly_every_planted_optimum(runs):
    table = rules.two_trials(runs)
    assert len(table) == 24 and table["found"].mean() > 0.85
    assert table["excess"].max() < 0.05 and (table["excess"] >= 0).all()


@pytest.mark.parametrize("study,cells,found", [("", 25, 15), ("hours", 23, 19), ("widths", 23, 15)])
def test_two_trials_on_the_published_studies(study, cells, found):
    """As LOG.md has it: where runs are short best rates are noise in part, and what is not found costs little on average."""
    table = rules.two_trials(pd.read_csv(PROJECT / "outputs" / "published" / study / "results.csv"))
    assert len(table) == cells and table["tried"].map(len).gt(0).all() and table["found"].sum() == found
    assert (table["excess"][table["found"]] == 0).all() and (table["excess"][~table["found"]] > 0).all()
    assert table["excess"].mean() < 0.025


def test_two_trials_are_proposed_from_cells_of_the_same_family(runs):
    """The optimizers' rates have nothing to do with each other: AdamW's are a hundredth of SGD's."""
    names = dict(zip(synthetic.VARIANTS, ("Ti/16", "S/16", "B/16", "L/16", "g/14"), strict=True))
    vits = runs.assign(variant=runs["variant"].map(names), peak_lr=runs["peak_lr"] / 128, forward_macs=runs["forward_macs"] + 1)
    alone, both = rules.two_trials(runs), rules.two_trials(pd.concat([runs, vits]))
    assert len(both) == 2 * len(alone) and both["found"].sum() == 2 * alone["found"].sum()


def test_two_trials_say_nothing_of_cells_where_no_other_rate_was_tried():
    """The published GPU study searched by this very rule: that its best rates were among those proposed is no finding."""
    runs = pd.read_csv(PROJECT / "outputs" / "published" / "gpu" / "results.csv")
    assert rules.two_trials(runs).empty
    laws = study_laws.study_laws(scaling.best_per_cell(runs), runs)
    assert not any("Two trials" in sentence for sentence in laws.sentences())


def test_growth_is_not_read_off_an_axis_that_was_not_varied(cells):
    one_size, one_budget = cells[cells["variant"] == "F0-mini"], cells[cells["epoch_budget"] == 1]
    for part, name in ((one_size, "forward_macs"), (one_budget, "epoch_budget")):
        with pytest.raises(ValueError, match=f"cells: a single {name}"):
            rules.growth(part)


def test_two_trials_count_what_diverged_and_only_pre_training(runs):
    clean = rules.two_trials(runs)
    tuned = runs[runs["variant"] == "F1-mini"].assign(kind="finetune", heldout_loss=0.01)
    pd.testing.assert_frame_equal(rules.two_trials(pd.concat([runs, tuned])), clean)
    cell = clean[clean["tried"].map(len) == 2].iloc[-1]
    own = (runs["variant"] == cell["variant"]) & (runs["epoch_budget"] == cell["epoch_budget"])
    for lost in (np.nan, np.inf):
        broken = runs.copy()
        broken.loc[own & broken["peak_lr"].isin(cell["proposed"]), "heldout_loss"] = lost
        after = rules.two_trials(broken).set_index(["variant", "epoch_budget"]).loc[(cell["variant"], cell["epoch_budget"])]
        assert after["excess"] == np.inf and not after["found"]
    broken.loc[own, "heldout_loss"] = np.nan
    assert len(rules.two_trials(broken)) == len(clean) - 1, "a cell without a best rate is no test"
    with pytest.raises(ValueError, match="runs: 1 learning rate"):
        rules.two_trials(runs[runs["peak_lr"] == runs["peak_lr"].iloc[0]])
