"""Estimates on record, their calibration, what studies cost, and what a budget buys."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nfnet_lib import calibration, paper, planning
from nfnet_lib.cli import main
from nfnet_lib.config import ConfigError, StudyConfig
from nfnet_lib.scaling import frontier_analysis
from nfnet_lib.study_cost import cost_lines, slice_of, study_table, with_header
from nfnet_lib.tpus import ESTIMATE_KEYS

ROOT = Path(__file__).parent.parent
PAPER = {"examples": 4e9, "global_batch": 4096, "topology": "v4:4x4x4", "num_classes": 30_000}
STUDIES = sorted([*ROOT.glob("params/tpu/*.yaml"), ROOT / "params" / "paper" / "study.yaml"])


def test_the_record_is_whole_and_each_program_stands_there_once():
    table = calibration.recorded_estimates()
    assert not table[list(ESTIMATE_KEYS)].duplicated().any()
    assert (table["cycles"] > 1e6).all() and (table["temporaries"] > 0).all() and table["libtpu"].notna().all()
    assert {"F0", "F1", "F3", "F3+", "F7", "F7+"} <= set(table.loc[table["generation"] == "v4", "variant"])
    whole = table[(table["topology"] == "v4:4x4x4") & (table["bottleneck_rule"] == "published")].set_index("variant")
    assert (whole["images"] == 64).all()
    assert whole.loc["F0", "cycles"] < whole.loc["F1", "cycles"] < whole.loc["F3", "cycles"] < whole.loc["F7", "cycles"]


def test_a_recorded_estimate_is_scaled_to_the_images_of_a_device():
    seconds, what = calibration.recorded("F3", "v4:4x4x4", 4096)
    half, _ = calibration.recorded("F3", "v4:4x4x8", 4096)
    assert half == pytest.approx(seconds / 2) and "64 images a device" in what
    assert (
        calibration.recorded("F3", "v5p:4x4x4", 4096) is None and calibration.recorded("F2", "v4:4x4x4", 4096) is None
    )
    assert (
        calibration.recorded("F7+", "v4:4x4x4", 4096, 224, "released")[0]
        < calibration.recorded("F7+", "v4:4x4x4", 4096)[0]
    )


def test_calibration_on_the_released_code_gives_its_published_times_back():
    table = calibration.calibration_table()
    released = table[table["program"] == calibration.RELEASED]
    for row in released.itertuples():
        likely, low, high = calibration.calibrated(row.estimate_ms, row.chip)
        assert likely == pytest.approx(row.published_ms, rel=0.02)
        assert low <= row.published_ms * 1.0001 and high >= row.published_ms * 0.9999
    ours = table[(table["program"] == calibration.OURS) & (table["chip"] == "v3")]
    assert list(ours["variant"]) == ["F0", "F1", "F2", "F3", "F4", "F5"] and (ours["estimate / published"] < 1).all()
    unknown, low, high = calibration.calibrated(1.0, "v5p")
    assert low < unknown < high


def test_the_papers_four_points():
    table = calibration.points_table().set_index("variant")
    printed = (
        paper.points()
        .query("unit == 'TPU-v4 core-hours' and quantity == 'pretrain compute'")
        .set_index("model")["value"]
    )
    assert list(table["paper"]) == [printed[name] for name in table.index] and len(table) == 4
    assert (table["floor"] < table["paper"]).all() and (table["floor"] < table["calibrated"]).all()
    assert (abs(table["calibrated / paper"] - 1) < 0.2).all()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_files_say_what_they_cost_now(path):
    """`nfnet cost params/tpu/*.yaml params/paper/study.yaml --write` makes these headers."""
    assert path.read_text() == with_header(path) and "# Cost, planned" in path.read_text()
    study, table = StudyConfig.from_file(path), study_table(path)
    assert len(table) == len(study.variants) * len(study.epoch_budgets) and table["fits"].all()


def test_cost_command_writes_headers_and_names_what_is_missing(tmp_path, capsys):
    path = Path(shutil.copy(ROOT / "params/tpu/imagenet2012_v4-8.yaml", tmp_path / "mine.yaml"))
    path.write_text(path.read_text().replace("# Slice: v4:2x2x1", "# Slice: v4:2x2x2"))
    before = StudyConfig.from_file(path)
    assert main(["cost", str(path)]) == 0 and "v4:2x2x2 slice" in capsys.readouterr().out
    assert "v4:2x2x2 slice" not in path.read_text(), "nothing is written unless asked"
    assert main(["cost", str(path), "--write"]) == 0 and "v4:2x2x2 slice" in path.read_text()
    text = path.read_text()
    assert main(["cost", str(path), "--write"]) == 0 and path.read_text() == text
    assert StudyConfig.from_file(path) == before and slice_of(path) == ("v4:2x2x2", 1000)
    path.write_text(text.replace("# Slice:", "# Sliced:"))
    capsys.readouterr()
    assert main(["cost", str(path)]) == 2 and "# Slice: TOPOLOGY" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lines,runs", [("", 36), ("  seeds: [0, 1, 2]", 108), ("  lr_search: grid", 48), ("  lr_search: two_trials", 25)]
)
def test_a_study_costs_as_many_runs_as_its_search_takes(lines, runs, tmp_path):
    path = tmp_path / "mine.yaml"
    text = (ROOT / "params/tpu/imagenet2012_v4-8.yaml").read_text()
    assert "lr_search" not in text and "seeds" not in text
    path.write_text(f"{text.rstrip()}\n{lines}\n")
    table = study_table(path)
    assert table["runs"].sum() == runs and len(table) == 12
    total = (table["runs"] * table["core_hours"]).sum()
    (said,) = [line for line in cost_lines(path) if "all 12 cells" in line]
    assert f": {calibration.rounded(total)} core-hours" in said
    assert f"{runs} runs" in said or f"{runs // 12} learning rates each" in said
    path.write_text(re.sub("pretrain:", "pretrain:\n    rho: 0.05", text, count=1))
    with pytest.raises(ConfigError, match=r"rho: 0\.05"):
        study_table(path)


def test_plan_command_says_where_its_estimate_comes_from(capsys):
    line = ["plan", "F7+", "--epochs", "8", "--examples", "4e9", "--topology", "v4:4x4x4", "--classes", "30000"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "recorded estimate" in out and "calibrated on published times" in out
    assert main([*line, "--rho", "0.05"]) == 0 and "plain steps" in capsys.readouterr().out
    assert main([*line, "--remat", "none"]) == 0 and "no compiled figure" in capsys.readouterr().out
    assert main(["plan", "F2", *line[2:]]) == 0 and "no compiled figure" in capsys.readouterr().out


def frontier():
    """A study whose compute-optimal size grows as compute^0.5, its loss as compute^-0.1."""
    compute = np.array([1e19, 1e20, 1e21, 1e22])
    return frontier_analysis(pd.DataFrame({
        "variant": ["F0", "F1", "F3", "F7+"], "epoch_budget": [1, 2, 4, 8], "train_flops": compute, "best_lr": 1.0,
        "num_params": compute**0.5 / 100, "images_seen": compute**0.5, "heldout_loss": 300 * compute**-0.1,
    }), resamples=10)  # fmt: skip


def test_what_a_budget_buys():
    law = frontier()
    params, images = planning.compute_optimal(law, 1e21)
    assert params == pytest.approx(1e21**0.5 / 100, rel=1e-6) and images == pytest.approx(1e21**0.5, rel=1e-6)
    plans = planning.with_losses(calibration.plan_table(["F0", "F3", "F7+"], [0.25, 1, 8], **PAPER), law)
    np.testing.assert_allclose(plans["predicted_loss"], 300 * plans["train_flops"] ** -0.1, rtol=1e-3)
    assert plans.loc[plans["train_flops"].between(1e19, 1e22), "decades_away"].eq(0).all()
    best = planning.best_within(plans, 45_000, law)
    assert best["core_hours"] <= 45_000 and best["variant"] == "F3" and best["epoch_budget"] == 8
    assert planning.best_within(plans, 1.0) is None and "No planned run" in planning.choice_sentence(plans, 1.0, law)
    sentence = planning.choice_sentence(plans, 45_000, law)
    assert "F3 for 8 epochs" in sentence and re.search(r"predicts [\d.]+ nats", sentence)
    larger = planning.best_within(plans, 1e9, law)
    assert larger["train_flops"] == plans["train_flops"].max()
    doubled = calibration.plan_table(["F3"], [2, 4, 8], **PAPER)
    assert planning.best_within(doubled, 1e9, law)["epoch_budget"] == 8, "of one size the longest run within the budget"


def test_no_loss_is_predicted_far_from_the_runs():
    law = frontier()
    table = planning.with_losses(pd.DataFrame({"train_flops": [1e17, 5e18, 1e20, 5e22, 2e23]}), law)
    np.testing.assert_allclose(table["decades_away"], [2, 0.301, 0, 0.699, 1.301], atol=0.01)
    assert list(table["predicted_loss"].isna()) == [True, False, False, False, True]


def test_a_slice_that_is_too_small_is_not_chosen():
    plans = calibration.plan_table(["F0", "G/14"], [1], **PAPER | {"topology": "v4:2x2x1"})
    assert list(plans["fits"]) == [True, False] and planning.best_within(plans, 1e9)["variant"] == "F0"


def test_the_explorer_follows_its_controls_and_shows_what_is_wrong():
    widget = planning.explorer(
        frontier(), variants=["F0", "F3"], epochs=[1.0, 8.0], core_hours=1000.0, price=0.0, **PAPER
    )
    (top, shown) = widget.children
    controls = {control.description: control for control in top.children[1].children}
    assert not [name for name in top.children[0].options if "-" in name], "full sizes only"
    assert "F0" in shown.value and "predicted loss" in shown.value
    before = shown.value
    controls["core-hours"].value = 1e6
    assert shown.value != before and "F3 for 8 epochs" in shown.value
    controls["slice"].value = "v4:4x4"
    assert "topology" in shown.value and "v4:4x4" in shown.value
    controls["slice"].value = "<script>"
    assert "<script>" not in shown.value
    controls["slice"].value = "v5p:4x4x4"
    assert "at the floor" in shown.value


def test_the_explorer_has_the_small_variants_that_it_is_asked_for():
    widget = planning.explorer(frontier(), variants=["F0-mini", "B/16"], epochs=[1.0], core_hours=1.0, price=0.0, **PAPER)
    choice = widget.children[0].children[0]
    assert choice.value == ("F0-mini", "B/16") and [name for name in choice.options if "-" in name] == ["F0-mini"]
    with pytest.raises(ConfigError, match="at least one of each"):
        calibration.plan_table([], [1.0], **PAPER)


def test_costs_figure():
    plans = calibration.plan_table(["F0", "F2"], [0.25, 1, 8], **PAPER)
    (axes,) = planning.costs(plans, 5000).axes
    lines = {line.get_gid(): line for line in axes.lines}
    np.testing.assert_allclose(lines["F0"].get_ydata(), plans.loc[plans["variant"] == "F0", "core_hours"])
    np.testing.assert_allclose(lines["F2"].get_ydata(), plans.loc[plans["variant"] == "F2", "floor_core_hours"])


def test_planned_without_a_slice_is_refused():
    with pytest.raises(ConfigError, match="topology"):
        calibration.plan_table(["F0"], [1], **PAPER | {"topology": "v4-8"})
