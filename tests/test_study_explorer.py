"""The explorer: what the controls choose is what is drawn and said; 2,000 records included."""

import io
import time

import numpy as np
import pandas as pd
import pytest
import synthetic
from PIL import Image

from nfnet_lib import PROJECT, study_explorer
from nfnet_lib.optimum import FrontierLines
from nfnet_lib.scaling import best_per_cell
from nfnet_lib.study_explorer import VIEWS, Explorer


def drawn(explorer):
    return np.asarray(Image.open(io.BytesIO(explorer.picture.value)).convert("L"))


@pytest.fixture
def folder(tmp_path):
    runs = synthetic.pretrain_summaries(noise=0.005)
    synthetic.write_runs(tmp_path, [*runs, *synthetic.finetune_summaries(runs[::20])])
    for run in runs[:2]:
        synthetic.metrics().to_json(tmp_path / run["run_id"] / "metrics.jsonl", orient="records", lines=True)
    return tmp_path


def test_every_view_and_control(folder):
    explorer = study_explorer.explorer(str(folder))
    for view in VIEWS:
        explorer.view.value = view
        assert drawn(explorer).std() > 10, view
    explorer.view.value = VIEWS[0]
    before, said = drawn(explorer), explorer.text.value
    explorer.budget.value = explorer.budget.value / 3
    assert (drawn(explorer) != before).any() and explorer.text.value != said
    explorer.variants.value = ("F0-mini", "F3-mini")
    explorer.epochs.value = (0.5, 2.0)
    cells = explorer.cells()
    assert set(cells["variant"]) == {"F0-mini", "F3-mini"} and cells["epoch_budget"].between(0.5, 2).all()
    explorer.lr.value = "0.8"
    assert (explorer.cells()["best_lr"] == 0.8).all()
    explorer.variants.value = ()
    assert "no run of these variants" in explorer.text.value and explorer.picture.layout.display == "none"
    explorer.variants.value = ("F0-mini",)
    assert explorer.picture.layout.display == ""


def test_the_predicted_loss_is_in_the_picture_below_all_cells_too():
    cells = best_per_cell(pd.read_csv(PROJECT / "outputs" / "published" / "results.csv"))
    lines, compute = FrontierLines(cells), 7e11
    predicted = float(lines.losses(np.array([compute]))[0][0])
    assert predicted < cells["heldout_loss"].min()
    axes = study_explorer.loss_figure(cells, lines, compute).axes[0]
    assert axes.get_ylim()[0] < predicted and axes.get_ylim()[1] > cells["heldout_loss"].max()


def test_two_runs_side_by_side(folder):
    explorer = study_explorer.explorer(str(folder))
    explorer.view.value = VIEWS[3]
    assert "not on this machine" in explorer.text.value
    runs = [name for name in explorer._records["run_id"] if (folder / name / "metrics.jsonl").exists()]
    explorer.first.value, explorer.second.value = runs
    assert "not on this machine" not in explorer.text.value
    assert all(name in explorer.text.value for name in runs) and "peak_lr" in explorer.text.value


def test_markup_in_records_is_shown_as_text(folder):
    runs = synthetic.pretrain_summaries(epochs=(1.0,), lrs=(0.4, 0.8))
    for run in runs:
        run["config"]["variant"] = "<script>alert(1)</script>" + run["config"]["variant"]
        run["device_kind"] = "<b>bold</b>" + run["run_id"]
    table = synthetic.table(runs).assign(path="x")
    explorer = Explorer(table)
    for view in (VIEWS[0], VIEWS[3]):
        explorer.view.value = view
        assert "<script>" not in explorer.text.value and "<b>bold" not in explorer.text.value


def test_the_budget_of_a_planted_law_is_read_off_with_its_interval():
    runs = synthetic.table(synthetic.pretrain_summaries(noise=0.01))
    lines = FrontierLines(best_per_cell(runs))
    coefficient, exponent = synthetic.LAW
    for compute in (3e12, 1e14, 1e15):
        found, expected = lines.at(compute), coefficient * compute**-exponent
        loss, low, high = found.heldout_loss
        assert loss == pytest.approx(expected, rel=0.05) and low <= loss <= high
        assert found.num_params[1] <= found.num_params[0] <= found.num_params[2]
    assert lines.at(lines.range[1] * 10).decades_away == pytest.approx(1)
    assert "1.0 decades beyond" in lines.at(lines.range[1] * 10).sentence() and lines.at(lines.range[1]).decades_away == 0
    assert lines.at(lines.range[0] / 100).sentence().endswith("; 2.0 decades below the study's runs.")
    assert "TPU-v4 core-hours: held-out" in FrontierLines(
        best_per_cell(runs, compute="tpu_v4_core_hours"), "tpu_v4_core_hours"
    ).at(1.0).sentence()
    for wrong in (0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"compute: .*; allowed: finite and above 0"):
            lines.at(wrong)
    np.testing.assert_allclose(lines.losses(np.array([1e14]))[:, 0], lines.at(1e14).heldout_loss)
    with pytest.raises(ValueError, match="fewer than 2 of 1 are on the frontier"):
        FrontierLines(best_per_cell(runs).head(1))


def test_two_thousand_records_are_redrawn_in_time():
    """A generous bound for shared machines; what was measured is in LOG.md."""
    many = synthetic.pretrain_summaries(epochs=tuple(0.25 * 1.15**i for i in range(40)), lrs=synthetic.LEARNING_RATES * 2)
    table = synthetic.table(many[:2000]).drop_duplicates("run_id").assign(path="x")
    more = table.assign(peak_lr=table["peak_lr"] * 32, heldout_loss=table["heldout_loss"] * 1.1, run_id=table["run_id"] + "b")
    import pandas as pd

    explorer = Explorer(pd.concat([table, more], ignore_index=True))
    assert len(explorer._records) == 2000
    clock = time.perf_counter()
    for _ in range(3):
        explorer.budget.value *= 0.9
    assert (time.perf_counter() - clock) / 3 < 3
