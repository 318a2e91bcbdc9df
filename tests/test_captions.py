"""Captions say what their tables hold, and change with them."""

import numpy as np
import pandas as pd
import pytest
import synthetic

from nfnet_lib import captions, plots, report, scaling, study_laws


@pytest.fixture(scope="module")
def runs():
    pretrained = synthetic.pretrain_summaries(noise=0.002)
    return synthetic.table([*pretrained, *synthetic.finetune_summaries(pretrained[-4:])])


def test_figure_2_states_cells_exponent_and_decades(runs):
    result = scaling.frontier_analysis(runs, resamples=200)
    text = captions.figure2(result)
    assert f"{len(result.cells)} cells of 5 variants" in text and f"the {len(result.points)} that no cheaper" in text
    assert f"exponent {result.law.exponent:.3f} (90 % interval {result.interval.low:.3f}" in text
    half = scaling.frontier_analysis(runs[runs["variant"].isin(["F0-mini", "F1-mini"])], resamples=200)
    assert "10 cells of 2 variants" in captions.figure2(half)


def test_figure_3_counts_edges_and_names_the_range(runs):
    cells = scaling.best_per_cell(runs)
    text = captions.figure3(cells)
    assert f"{int(cells['lr_is_interior'].sum())} of {len(cells)} have a worse rate" in text
    ends = cells[cells["epoch_budget"] == 0.25]["best_lr"]
    assert f"{ends.min():g} to {ends.max():g} at 0.25 epochs" in text


def test_figure_1_names_the_lowest_error(runs):
    table = scaling.finetune_table(runs)
    best = table.loc[table["top1_error_percent"].idxmin()]
    text = captions.figure1(table)
    assert f"{len(table)} runs" in text and f"Lowest: {best['top1_error_percent']:.3g} %, {best['variant']}" in text
    assert captions.figure1(table.iloc[:0]) == "No run has been fine-tuned."


def test_the_law_is_captioned_with_what_is_weak(runs):
    laws = study_laws.study_laws(scaling.best_per_cell(runs), runs, resamples=100)
    text = captions.size_and_data(laws)
    assert text.count("weakly identified") == len({"alpha", "beta", "E"} & set(laws.surface.weak()))
    assert f"alpha {laws.surface.parameters['alpha']:.3g}" in text


def test_a_caption_is_saved_beside_its_figure_and_in_it(tmp_path, runs):
    result = scaling.frontier_analysis(runs, resamples=100)
    text = captions.figure2(result)
    paths = plots.save_figure(plots.figure2(result), tmp_path / "figure2", table=result.cells, caption=text)
    assert [path.suffix for path in paths] == [".svg", ".png", ".txt", ".csv"]
    assert (tmp_path / "figure2.txt").read_text() == text + "\n"
    assert text.split(":")[0] in (tmp_path / "figure2.svg").read_text()
    assert len(pd.read_csv(tmp_path / "figure2.csv")) == len(result.cells)


def test_a_study_of_one_cell_says_that_no_law_is_fitted(runs):
    one = runs[(runs["kind"] == "pretrain") & (runs["variant"] == "F0-mini")]
    one = one[one["epoch_budget"] == one["epoch_budget"].min()]
    assert report.answer(one) == ["There is no answer yet: 1 of 1 cells is compute-optimal; a law needs 2."]
    assert "not fitted" in report.comparison(one)["ours (laptop scale)"]["held-out loss against compute"]


def test_two_points_are_no_evidence_of_a_line(runs):
    pretrain = runs[(runs["kind"] == "pretrain") & (runs["variant"] == runs["variant"].iloc[0])]
    two = pretrain[pretrain["epoch_budget"].isin(sorted(set(pretrain["epoch_budget"]))[:2])]
    caption = captions.figure2(scaling.frontier_analysis(two))
    said = " ".join([*report.answer(two), *report.comparison(two).iloc[:, -1], caption])
    assert said.count("two points") == 3 and "R^2" not in said and "explains" not in said


def test_the_points_fitted_are_the_points_named(runs):
    result = scaling.frontier_analysis(runs, skip=3)
    used = len(result.points) - 3
    assert result.law.num_points == used and f"through the {used} of them that cost most over" in captions.figure2(result)
    two = scaling.frontier_analysis(runs, skip=len(result.points) - 2)
    assert "exact: a line through two points" in captions.figure2(two) and "R^2" not in captions.figure2(two)


def test_diverged_runs_and_single_budgets_are_told_in_whole_words(runs):
    cells = scaling.best_per_cell(runs)
    one = captions.figure3(cells[cells["epoch_budget"] == 1])
    assert one.count("at 1 epoch") == 1 and "1 epochs" not in one
    lost = scaling.best_per_cell(runs[runs["kind"] == "pretrain"].assign(heldout_loss=np.nan))
    assert captions.figure3(lost) == "Every run diverged: there is no best learning rate."
