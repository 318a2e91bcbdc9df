"""Run records: what is collected, what is refused, and files that survive being killed in the middle."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from nfnet_lib import files, records, report, scaling, status
from nfnet_lib.config import PretrainConfig


@pytest.fixture
def study(tmp_path):
    summaries = synthetic.pretrain_summaries(epochs=(0.5, 1.0), lrs=(0.4, 0.8))
    synthetic.write_runs(tmp_path, summaries + synthetic.finetune_summaries(summaries[:2]))
    return tmp_path


# ------------------------------------------------------------------------------------------------------------ collect


def test_collect_returns_every_finished_run_with_its_numbers(study):
    table = records.collect(study)
    expected = synthetic.pretrain_summaries(epochs=(0.5, 1.0), lrs=(0.4, 0.8))
    assert len(table) == len(expected) + 4
    found = table.set_index("run_id")
    for summary in expected:
        row = found.loc[summary["run_id"]]
        assert row["heldout_loss"] == summary["heldout_loss"]
        assert row["peak_lr"] == summary["config"]["peak_lr"]
        assert row["versions.jax"] == "0.0.0"
        assert (study / row["path"] / "summary.json").is_file()


def test_collect_order_and_types_do_not_depend_on_the_order_of_creation(tmp_path):
    summaries = synthetic.pretrain_summaries(epochs=(1.0,), lrs=(0.4, 0.8))
    for name, order in (("a", summaries), ("b", summaries[::-1])):
        synthetic.write_runs(tmp_path / name, order)
    pd.testing.assert_frame_equal(records.collect(tmp_path / "a"), records.collect(tmp_path / "b"))


def test_diverged_rates_are_rows_without_a_loss_where_they_are_wanted(tmp_path):
    """A rate above the best that diverged is a worse one: without it the best seemed to lie at the edge of its grid."""
    config = PretrainConfig.from_params({"peak_lr": 0.4})
    runs = [synthetic.summary(f"lr{lr:g}", config=config.model_dump() | {"peak_lr": lr}, heldout_loss=loss)
            for lr, loss in ((0.1, 2.5), (0.2, 2.0))]  # fmt: skip
    synthetic.write_runs(tmp_path, runs)
    lost, failed, tuned = (tmp_path / name for name in ("lost", "failed", "tuned"))
    for folder, said in ((lost, {"diverged": True}), (failed, {}), (tuned, {"diverged": True})):
        folder.mkdir()
        (folder / "failure.json").write_text(json.dumps({"error": "loss is nan"} | said))
    (lost / "params.json").write_text(config.model_dump_json())
    (failed / "params.json").write_text(config.model_dump_json())
    assert len(records.collect(tmp_path)) == 2
    table = records.collect(tmp_path, with_diverged=True)
    assert table["status"].tolist() == ["done", "done", "diverged"] and table["path"].tolist()[2] == "lost"
    assert table["heldout_loss"].isna().tolist() == [False, False, True] and table["train_flops"].gt(0).all()
    (cell,) = scaling.best_per_cell(table).itertuples()
    assert cell.best_lr == 0.2 and cell.lr_is_interior and cell.lrs == (0.1, 0.2, 0.4)
    states = report.run_table(tmp_path)["state"].str.split(":").str[0]
    assert states.tolist() == ["done", "done", "failed", "diverged", "diverged"]
    assert "1 diverged" in report.provenance(table).loc["runs", "value"]


def test_types_are_stable_when_some_runs_lack_a_key(study):
    table = records.collect(study)
    assert table["steps"].dtype == "int64"
    assert table["epoch_budget"].dtype == "float64"
    assert table["rho"].dtype == "float64"  # fine-tuning only
    assert table.loc[table["kind"] == "pretrain", "rho"].isna().all()


def test_integral_floats_in_json_stay_floats(tmp_path):
    synthetic.write_runs(
        tmp_path, [synthetic.summary("r", config={"peak_lr": 1, "epoch_budget": 2}, train_flops=10**12)]
    )
    table = records.collect(tmp_path)
    assert {str(table[name].dtype) for name in ("peak_lr", "epoch_budget", "train_flops")} == {"float64"}


def test_depth_and_single_run(tmp_path):
    synthetic.write_runs(tmp_path / "x" / "y", [synthetic.summary("deep")])
    synthetic.write_runs(tmp_path, [synthetic.summary("shallow")])
    synthetic.write_runs(tmp_path / "1" / "2" / "3", [synthetic.summary("too_deep")])
    assert set(records.collect(tmp_path)["path"]) == {"shallow"}  # x/y/deep lies three levels below
    assert set(records.collect(tmp_path / "x")["path"]) == {"y/deep"}
    assert records.collect(tmp_path / "shallow")["run_id"].tolist() == ["shallow"]


def test_unfinished_and_failed_runs_are_left_out(study):
    (study / "running").mkdir()
    (study / "running" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (study / "failed").mkdir()
    files.write_json(study / "failed" / "failure.json", {"error": "boom", "traceback": ""})
    assert not {"running", "failed"} & set(records.collect(study)["path"])


def test_no_finished_run_gives_an_empty_table_with_columns(tmp_path):
    table = records.collect(tmp_path)
    assert len(table) == 0
    assert {"run_id", "variant", "heldout_loss", "path"} <= set(table.columns)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        records.collect(tmp_path / "nowhere")


DAMAGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not an object": lambda text: "[1, 2]",
    "older schema": lambda text: text.replace('"schema": 1', '"schema": 0'),
    "key missing": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "heldout_loss"}),
    "not done": lambda text: text.replace('"done"', '"interrupted"'),
    "config no object": lambda text: json.dumps(json.loads(text) | {"config": 3}),
    "contradiction": lambda text: json.dumps(json.loads(text) | {"peak_lr": 123.0}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_summary_is_an_error_naming_the_file_or_skipped_with_a_warning_naming_it(study, damage):
    victim = study / "F0-mini-e1-lr0.8" / "summary.json"
    healthy = len(records.collect(study))
    victim.write_text(damage(victim.read_text()))
    with pytest.raises(records.RecordError, match=r"F0-mini-e1-lr0\.8.summary\.json"):
        records.collect(study)
    with pytest.warns(UserWarning, match=r"1 damaged record.*F0-mini-e1-lr0\.8"):
        assert len(records.collect(study, damaged="skip")) == healthy - 1


def test_wrong_damaged_argument(study):
    with pytest.raises(ValueError, match="damaged='ignore'"):
        records.collect(study, damaged="ignore")


def test_results_csv_reads_back_exactly(study, tmp_path):
    table = records.collect(study)
    records.results_csv(table, tmp_path / "results.csv")
    again = pd.read_csv(tmp_path / "results.csv")
    np.testing.assert_array_equal(again["heldout_loss"], table["heldout_loss"])
    assert b"\r" not in (tmp_path / "results.csv").read_bytes()
    assert str(study) not in (tmp_path / "results.csv").read_text()


# ------------------------------------------------------------------------------------------------------------- status


def test_status_tells_the_six_states_apart(tmp_path):
    synthetic.write_runs(tmp_path, [synthetic.summary("done", steps=390), synthetic.summary("harmed")])
    (tmp_path / "harmed" / "summary.json").write_text("{")
    for name in ("running", "stopped", "failed", "lost", "resumed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"step"')
    for name in ("failed", "resumed"):
        files.write_json(tmp_path / name / "failure.json", {"error": "loss is nan", "traceback": ""})
    files.write_json(tmp_path / "lost" / "failure.json", {"error": "loss is nan", "diverged": True})
    os.utime(tmp_path / "stopped" / "metrics.jsonl", (1e9, 1e9))
    os.utime(tmp_path / "resumed" / "failure.json", (1e9, 1e9))
    table = status.status_table(tmp_path).set_index("path")
    assert table["state"].to_dict() == {
        "done": "done", "harmed": "damaged", "running": "running", "stopped": "unfinished", "failed": "failed",
        "lost": "diverged", "resumed": "running",
    }  # fmt: skip
    assert table.loc["running", ["step", "loss"]].tolist() == [2, 2.5]
    assert table.loc["done", "step"] == 390
    assert table.loc["failed", "message"] == "loss is nan"
    assert "harmed" in table.loc["harmed", "message"]


def test_status_of_an_empty_folder(tmp_path):
    assert status.status_table(tmp_path).empty


# -------------------------------------------------------------------------------------------------------------- files


def test_write_json_keeps_the_old_file_when_killed_before_the_rename(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_json(path, {"value": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_write_json_converts_numpy_and_refuses_what_is_no_json(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": np.float32(0.5), "b": np.arange(2), "c": tmp_path})
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [0, 1], "c": str(tmp_path)}
    for bad in (float("nan"), object()):
        with pytest.raises(ValueError, match=r"x\.json"):
            files.write_json(path, {"a": bad})
    assert json.loads(path.read_text())["a"] == 0.5


# ------------------------------------------------------------------------------------------------------------ metrics


def _train(path, steps, last_step=-1):
    with records.MetricsWriter(path, last_step) as writer:
        for step in steps:
            writer.write(step, loss=1.0 / (step + 1), lr=np.float32(0.1))


@settings(max_examples=40, deadline=None)
@given(total=st.integers(1, 30), stopped=st.integers(0, 30), saved=st.integers(0, 30), cut=st.integers(0, 60))
def test_a_resumed_runs_metrics_equal_an_undisturbed_ones(tmp_path_factory, total, stopped, saved, cut):
    folder = tmp_path_factory.mktemp("metrics")
    stopped = min(stopped, total)
    saved = min(saved, stopped)  # a checkpoint never lies ahead of the metrics written and synced
    _train(folder / "whole.jsonl", range(1, total + 1))
    _train(folder / "killed.jsonl", range(1, stopped + 1))
    content = (folder / "killed.jsonl").read_bytes()
    synced = sum(len(line) + 1 for line in content.split(b"\n")[:saved])
    (folder / "killed.jsonl").write_bytes(content[: max(synced, len(content) - cut)])  # torn anywhere after it
    _train(folder / "killed.jsonl", range(saved + 1, total + 1), last_step=saved)
    assert (folder / "killed.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_a_fresh_writer_begins_an_empty_file(tmp_path):
    _train(tmp_path / "run" / "metrics.jsonl", range(5))
    _train(tmp_path / "run" / "metrics.jsonl", range(2))
    assert records.read_metrics(tmp_path / "run")["step"].tolist() == [0, 1]


def test_steps_must_increase(tmp_path):
    with records.MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(3, loss=1.0)
        with pytest.raises(ValueError, match="step=3"):
            writer.write(3, loss=1.0)


def test_non_finite_metrics_are_null_and_read_as_nan(tmp_path):
    with records.MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(1, loss=float("nan"), lr=0.1)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert np.isnan(records.read_metrics(tmp_path)["loss"].iloc[0])


def test_lines_are_visible_to_a_follower_at_once(tmp_path):
    writer = records.MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(1, loss=2.0)
    assert records.read_metrics(tmp_path)["loss"].tolist() == [2.0]
    writer.close()


def test_a_torn_last_line_is_left_out_but_damage_before_it_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert records.read_metrics(tmp_path)["step"].tolist() == [1]
    path.write_bytes(b'{"step": 1}\n\0\0\0\0\n{"step": 3}\n')
    with pytest.raises(records.RecordError, match=r"metrics\.jsonl, line 2"):
        records.read_metrics(tmp_path)


def test_read_metrics_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        records.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert len(records.read_metrics(tmp_path)) == 0


def test_the_scale_of_runs_is_laptop_unless_an_accelerator_ran_them():
    cpu = {"platform": "cpu", "device_kind": "cpu", "device_count": 1}
    gpu = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3", "device_count": 1}
    tpu = {"platform": "tpu", "device_kind": "TPU v4", "device_count": 64}
    assert records.scale(cpu) == records.scale(pd.DataFrame([cpu, cpu])) == records.scale({}) == "laptop scale"
    assert records.scale(pd.DataFrame([cpu, tpu, gpu])) == "1 x NVIDIA H100 80GB HBM3, 64 x TPU v4"
