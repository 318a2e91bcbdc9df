"""What a study is going to run: its cells, their searches, dry runs, overrides; and its graph, run by a test engine."""

import re
import threading
from concurrent.futures import Future

import pandas as pd
import pytest
import synthetic

from nfnet_lib import flops, graph, rules, study, study_changes, study_grid, study_plan
from nfnet_lib.cell import CellFailed, cell_dir
from nfnet_lib.cli import main
from nfnet_lib.config import ConfigError, StudyConfig
from nfnet_lib.files import write_json
from nfnet_lib.study_plan import plan_sentence, plan_table
from nfnet_lib.tuning import at_lr

FILE = """
study:
  name: planned
  pretrain: {num_classes: 4, image_size: 16, resolution: 16, eval_resolution: 16, examples_per_epoch: 64,
             heldout_examples: 16, batch_size: 16}
  variants: [F1-mini, F0-mini]
  epoch_budgets: [2, 1]
  lr_grid: [0.0125, 0.025, 0.05, 0.1, 0.2]
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "study.yaml").write_text(FILE)
    return tmp_path / "study.yaml"


def planted(folder, config, lr_grid, best):
    """Plant the records of a finished cell whose best rate is `best`."""
    for lr in lr_grid:
        run = at_lr(config, lr)
        loss = 1 + abs(lr_grid.index(lr) - lr_grid.index(best))
        record = synthetic.summary(run.run_id, kind=run.kind, config=run.model_dump(mode="json"), heldout_loss=float(loss))
        (folder / run.run_id).mkdir(parents=True, exist_ok=True)
        write_json(folder / run.run_id / "summary.json", record | {"config_hash": run.config_hash, "wall_seconds": 61.0,
                   "cell_id": run.cell_id, "num_params": flops.num_params(run.architecture, 4)})  # fmt: skip
    cell = cell_dir(config, folder, lr_grid if len(lr_grid) > 1 else ())
    cell.mkdir(exist_ok=True)
    (cell / "run.ipynb").write_text("{}")


def test_cells_are_the_grid_the_longest_first(path):
    named = StudyConfig.from_file(path, {"seeds": [0, 7]})
    cells = study_grid.pretrain_cells(named)
    assert [cell.name for cell in cells[:2]] == ["F1-mini_ep2_s0", "F1-mini_ep2_s7"] and len(cells) == 8
    assert cells[-1].name == "F0-mini_ep1_s7"
    assert {study_grid.search_of(named, cell, path.parent)[0].seed for cell in cells} == {0, 7}
    assert {cell.seed for cell in study_grid.pretrain_cells(StudyConfig.from_file(path))} == {None}


def test_two_trials_start_from_smaller_cells(path, tmp_path):
    named, folder = StudyConfig.from_file(path, {"lr_search": "two_trials"}), tmp_path / "out"
    by_name = {cell.name: cell for cell in study_grid.pretrain_cells(named)}
    config, grid = study_grid.search_of(named, by_name["F0-mini_ep1"], folder)
    assert grid == named.lr_grid, "the smallest cell is searched in full"
    assert study_grid.search_of(named, by_name["F0-mini_ep2"], folder) is None
    planted(folder, config, grid, best=0.1)
    config, pair = study_grid.search_of(named, by_name["F0-mini_ep2"], folder)
    known = pd.DataFrame([{"forward_macs": flops.run_macs(config), "epoch_budget": 1.0, "best_lr": 0.1}])
    assert (config.peak_lr, set(pair)) == (0.1, {0.1, 0.05})
    assert (config.peak_lr, *sorted(set(pair) - {config.peak_lr})) == rules.propose_lr(
        known, flops.run_macs(config), 2.0, named.lr_grid
    )
    assert study_grid.search_of(named, by_name["F1-mini_ep2"], folder) is None, "two smaller cells are not done"


def test_a_dry_run_plans_counts_and_writes_nothing(path, tmp_path, capsys):
    named, folder = StudyConfig.from_file(path), tmp_path / "out"
    assert main(["study", str(path), "--out", str(folder), "--dry-run"]) == 0
    assert "4 cells, 12 runs" in capsys.readouterr().out and not folder.exists()
    cell = study_grid.pretrain_cells(named)[0]
    planted(folder, *study_grid.search_of(named, cell, folder), best=0.05)
    from nfnet_lib.records import collect

    table = plan_table(named, folder, collect(folder)).set_index("cell")
    assert table["state"].to_dict() == {
        "F1-mini_ep2": "done", "F0-mini_ep2": "to do", "F1-mini_ep1": "to do", "F0-mini_ep1": "to do",
    }  # fmt: skip
    config, _ = study_grid.search_of(named, cell, folder)
    own = flops.forward_macs(config.architecture, 16, 4)
    assert table.loc["F1-mini_ep2", "train_flops"] == 6 * own * 128 and table.loc["F1-mini_ep2", "steps"] == 8
    rate, on_top = 60.0 / 1e12, 5 * 1.0 + 6  # of the planted records: five runs with a second on top each
    assert table.loc["F1-mini_ep2", "minutes"] == pytest.approx((3 * 6 * own * 128 * rate + on_top) / 60)
    sentence = plan_sentence(table, 2)
    assert "1 cells are done" in sentence and "2 at a time" in sentence
    assert "No timed runs" in plan_sentence(plan_table(named, tmp_path / "none"), 2)
    every = plan_table(StudyConfig.from_file(path, {"lr_search": "grid"}), tmp_path / "none")
    assert set(every["runs"]) == {5}
    two = plan_table(StudyConfig.from_file(path, {"lr_search": "two_trials"}), tmp_path / "none")
    assert two["runs"].tolist() == [2, 2, 2, 3], "before the smallest cell is done, too"


def test_a_dry_run_of_one_cell(path, tmp_path, capsys):
    arguments = ["study", str(path), "--out", str(tmp_path / "out"), "--dry-run", "--only"]
    assert main([*arguments, "F0-mini_ep2"]) == 0 and "1 cells, 3 runs" in capsys.readouterr().out
    assert main([*arguments, "F0-mini_ep3"]) == 2 and "only: no cell 'F0-mini_ep3'" in capsys.readouterr().err


def test_seeds_are_added_to_a_study_without(path, tmp_path):
    write_json(tmp_path / "study.json", StudyConfig.from_file(path, {"pretrain.seed": 3}).model_dump(mode="json"))
    study_changes.refuse_other_study(StudyConfig.from_file(path, {"pretrain.seed": 3, "seeds": [3, 4]}), tmp_path)
    with pytest.raises(ConfigError, match=r"seeds: \[0, 1\], but"):
        study_changes.refuse_other_study(StudyConfig.from_file(path, {"pretrain.seed": 3, "seeds": [0, 1]}), tmp_path)


def test_compared_ways_of_fine_tuning_are_no_cells(tmp_path, monkeypatch):
    laptop = StudyConfig.from_file(study.NOTEBOOKS.parent / "params" / "laptop" / "study.yaml")
    monkeypatch.setattr(study_plan, "finished", lambda *_: {})  # pre-training
    for compared, state in (("plain", "to do"), ("", "done")):
        own = {"variant": "F0-nano", "augmult": 1, "compared_as": compared}
        synthetic.write_runs(tmp_path / state, [synthetic.summary("a", kind="finetune", config=own)])
        table = plan_table(laptop, tmp_path / state).set_index("cell")
        assert table.loc["finetune_F0-nano_ra1", "state"] == state, "while its pre-training is done"
        assert table.loc["finetune_F0-nano_ra4", "state"] == "to do"
        assert table.loc["03_finetune", ["runs", "state"]].tolist() == [15, "to do"], "5 ways, 3 seeds"


@pytest.mark.parametrize(
    "override,words",
    [
        ("pretrain.num_clases=3", "num_clases: unknown parameter of PretrainConfig; did you mean num_classes"),
        ("pretain.num_classes=3", "pretain: unknown key of a study; did you mean pretrain"),
        ("variants=[F0-mini, F0-mini]", "variants: ['F0-mini', 'F0-mini'] has repeats"),
        ("name.x=1", "name.x: name is 'planned', not a mapping"),
        ("epoch_budgets=", "epoch_budgets: None is out of range"),
        ("tpu_slice=big", "tpu_slice: 'big' is out of range"),
        ("lr_grid=[0.1", "the value of lr_grid is not YAML"),
        ("nonsense", "'nonsense' is not NAME=VALUE"),
    ],
)
def test_overrides_that_can_not_be(path, tmp_path, capsys, override, words):
    assert main(["study", str(path), "--out", str(tmp_path / "out"), "-p", override]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


class Recording:
    """An engine that runs nothing: every call ends at once with what `outcome` says of its cell."""

    workers = at_once = 1

    def __init__(self, outcome):
        self.outcome, self.calls = outcome, []

    def submit(self, function, *arguments, **options):
        future: Future = Future()
        self.calls.append((function.__name__, arguments, options))
        result = self.outcome(*arguments, **options)
        future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)
        return future

    def close(self, grace=0):
        pass


def test_the_graph_of_a_study(path, tmp_path):
    """Searches, then fine-tuning from the best run of each variant, then the table; what lacks its origin is said to."""
    folder = tmp_path / "out"
    folder.mkdir()
    finetune = {"dataset": "digits", "image_size": 24, "resolution": 24, "eval_resolution": 24, "batch_size": 16,
                "examples_per_epoch": 64, "heldout_examples": 16}  # fmt: skip
    named = StudyConfig.from_file(path, {"finetune": finetune, "finetune_augmults": [1, 4], "notebooks": []})

    def outcome(config, study_dir, *, lr_grid, **_):
        if config.kind == "pretrain" and config.variant == "F1-mini":
            return CellFailed("it broke", "log")
        best = 0.1 if config.epoch_budget == 2 else 0.05
        planted(study_dir, config, list(lr_grid) or [config.peak_lr], best if lr_grid else config.peak_lr)
        return {"heldout_loss": 1.0, "config": {"peak_lr": best}}

    engine, said = Recording(outcome), []
    failures = graph.run_graph(study._graph(named, folder), engine, said.append, lambda: None)
    assert set(failures) == {"F1-mini_ep1", "F1-mini_ep2", "finetune_F1-mini_ra1", "finetune_F1-mini_ra4"}
    assert failures["F1-mini_ep1"] == "it broke"
    assert failures["finetune_F1-mini_ra1"] == "not run: no pre-training run of F1-mini is done"
    kinds = [arguments[0].kind for _, arguments, _ in engine.calls]
    assert kinds == ["pretrain"] * 4 + ["finetune"] * 2
    tuned = [arguments[0] for _, arguments, _ in engine.calls[4:]]
    assert {config.augmult for config in tuned} == {1, 4}
    assert all("F0-mini" in config.pretrained_run for config in tuned)
    assert (folder / "results.csv").read_text().count("\n") == 1 + 10 + 2
    again = Recording(outcome)
    graph.run_graph(study._graph(named, folder), again, said.append, lambda: None)
    assert {arguments[0].variant for _, arguments, _ in again.calls} == {"F1-mini"}, "what is done never meets the engine"
    assert any("skipped: already done" in line for line in said)


@pytest.mark.parametrize("lr_search", ["bracket", "two_trials", "grid"])
def test_every_search_of_the_learning_rate_runs_to_its_end(path, tmp_path, lr_search):
    """With two trials the smaller cells first; a cell whose smaller one failed is not run, and says why."""
    folder = tmp_path / "out"
    folder.mkdir()
    named = StudyConfig.from_file(path, {"lr_search": lr_search, "notebooks": []})

    def outcome(config, *_, lr_grid=(), **__):
        planted(folder, config, list(lr_grid) or [config.peak_lr], lr_grid[0] if lr_grid else config.peak_lr)
        return {"heldout_loss": 1.0, "config": {"peak_lr": config.peak_lr}}

    engine = Recording(outcome)
    assert graph.run_graph(study._graph(named, folder), engine, lambda _: None, lambda: None) == {}
    called = [(cell[0].variant, cell[0].epoch_budget, len(options["lr_grid"])) for _, cell, options in engine.calls]
    if lr_search == "grid":
        assert len(called) == 4 * 5 and {rates for _, _, rates in called} == {0}
        return
    assert len(called) == 4 and {rates for *_, rates in called} == ({2, 5} if lr_search == "two_trials" else {5})
    if lr_search == "two_trials":
        assert called[0] == ("F0-mini", 1, 5) and called[-1] == ("F1-mini", 2, 2)
        broken = Recording(lambda *_, **__: CellFailed("it broke", "log"))
        (tmp_path / "other").mkdir()
        failures = graph.run_graph(study._graph(named, tmp_path / "other"), broken, lambda _: None, lambda: None)
        assert len(broken.calls) == 1 and failures["F0-mini_ep1"] == "it broke"
        assert failures["F1-mini_ep2"].startswith("not run: a smaller cell, whose best learning rate the search starts from")


def test_the_longest_chain_goes_first_and_no_program_is_compiled_twice_at_once(path, tmp_path):
    """One call at a time: the run that the comparison needs, the comparison, then a run of every program, then the others.

    The notebook that needs no more than pre-training comes before those others: at the end everything would wait for it.
    """
    folder = tmp_path / "out"
    folder.mkdir()
    finetune = {"dataset": "digits", "image_size": 24, "resolution": 24, "eval_resolution": 24, "batch_size": 16,
                "examples_per_epoch": 64, "heldout_examples": 16}  # fmt: skip
    changes = {"finetune": finetune, "finetune_augmults": [1, 4], "comparison_seeds": 1, "variants": ["F0-mini", "F1-mini"],
               "notebooks": ["index", "01_architecture"]}  # fmt: skip
    named = StudyConfig.from_file(path, changes)

    def outcome(config, *_, lr_grid=(), **__):
        if getattr(config, "kind", "") == "pretrain":
            planted(folder, config, list(lr_grid), 0.05)
        return {"heldout_loss": 1.0, "config": {"peak_lr": 0.05}}

    engine = Recording(outcome)
    assert graph.run_graph(study._graph(named, folder), engine, lambda _: None, lambda: None) == {}
    order = [
        arguments[0].stem if name == "execute" else f"{arguments[0].variant} {arguments[0].augmult}"
        for name, arguments, _ in engine.calls[4:]
    ]
    assert order == ["F0-mini 1", "03_finetune", "01_architecture", "F1-mini 1", "F0-mini 4", "F1-mini 4", "index"]
    needs = {step.name: step.needs for step in study._graph(named, folder)}
    assert set(needs["01_architecture"]) == {f"{variant}_ep{epochs}" for variant in named.variants for epochs in (1, 2)}
    assert needs["index"] == ("results.csv",)
    (options,) = [options for name, arguments, options in engine.calls if name == "execute" and "03_" in arguments[0].stem]
    assert options["timeout"] == 60 * named.timeout_minutes * 6, "of six runs, one after the other"
    every = StudyConfig.from_file(path, changes | {"finetune_cells": "all", "gpus_per_run": 0.25})
    needs = {step.name: step.needs for step in study._graph(every, folder)}
    assert set(needs["03_finetune"]) == {"finetune_F0-mini_ep2_ra1", "F0-mini_ep1", "F0-mini_ep2"}, "the best of all budgets"


def test_two_trials_look_at_each_smaller_cell_once(path, tmp_path, monkeypatch):
    named = StudyConfig.from_file(path, {"lr_search": "two_trials", "epoch_budgets": [0.25, 0.5, 1, 2, 4, 8, 16]})
    cells, looked = study_grid.pretrain_cells(named), []
    folder = tmp_path / "out"
    for cell in reversed(cells):
        planted(folder, *study_grid.search_of(named, cell, folder), best=0.05)
    finished = study_grid.finished
    monkeypatch.setattr(study_grid, "finished", lambda config, *rest: looked.append(config) or finished(config, *rest))
    assert study_grid.search_of(named, cells[0], folder) is not None
    assert len(looked) == len(cells) - 1 == 13


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_an_engine_has_no_more_calls_at_a_time_than_it_wants(at_once):
    engine, running, most = Recording(None), [], []
    engine.at_once = at_once

    def submit(function, number):
        running.append(number)
        most.append(len(running))
        future: Future = Future()
        threading.Timer(0.02, lambda: (running.remove(number), future.set_result(number))).start()
        return future

    engine.submit = submit
    steps = [graph.Step(str(i), (), lambda i=i: graph.Work(None, (i,), {}), lambda *_: "") for i in range(12)]
    graph.run_graph(steps, engine, lambda _: None, lambda: None)
    assert max(most) == at_once


def test_slices_and_platforms_reach_the_engine(path, tmp_path):
    (tmp_path / "out").mkdir()
    named = StudyConfig.from_file(path, {"tpu_slice": "v4:2x2x4", "platform": "tpu", "retries": 5, "variants": ["F0-mini"]})
    engine = Recording(lambda *_, **__: CellFailed("not today", ""))
    graph.run_graph(study._graph(named, tmp_path / "out"), engine, lambda _: None, lambda: None)
    for _, _, options in engine.calls:
        assert (options["tpu_slice"], options["platform"], options["retries"]) == ("v4:2x2x4", "tpu", 5)


def test_a_changed_file_is_refused_but_where_it_runs_may_change(path, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    write_json(folder / "study.json", StudyConfig.from_file(path).model_dump(mode="json"))
    with pytest.raises(ConfigError, match=r"lr_grid: \[0\.1, 0\.2\], but .* holds a study with \[0\.0125"):
        study.run_study(StudyConfig.from_file(path, {"lr_grid": [0.1, 0.2]}), folder)
    study_changes.refuse_other_study(StudyConfig.from_file(path, {"workers": 1, "retries": 0, "platform": "cuda"}), folder)
    with pytest.raises(ConfigError, match=r"^pretrain\.num_classes: 8, but .* holds a study with 4;"):
        study_changes.refuse_other_study(StudyConfig.from_file(path, {"pretrain.num_classes": 8}), folder)
    with pytest.raises(ConfigError, match=r"^pretrain\.flip: False, but .* holds a study with True;"):
        study_changes.refuse_other_study(StudyConfig.from_file(path, {"pretrain.flip": False}), folder)
    study_changes.refuse_other_study(StudyConfig.from_file(path, {"pretrain.flip": True}), folder)
    assert main(["study", str(path), "--out", str(folder), "--dry-run", "-p", "pretrain.num_classes=8"]) == 2


def test_a_study_may_grow_but_not_change(path, tmp_path):
    """Runs on record stay part of it; fine-tuning is free to change until there is a run of it."""
    before = {"variants": ["F0-mini", "F1-mini"], "epoch_budgets": [1, 2], "seeds": [0], "lr_start": {1: 0.1}}
    before |= {"finetune": {}, "finetune_augmults": [1]}
    write_json(tmp_path / "study.json", StudyConfig.from_file(path, before).model_dump(mode="json"))

    def check(**changes):
        study_changes.refuse_other_study(StudyConfig.from_file(path, before | changes), tmp_path)

    def refused(key, **changes):
        with pytest.raises(ConfigError, match=rf"^{key}: .* holds a study with "):
            check(**changes)

    check(variants=["F0-mini", "F0-nano", "F1-mini"], epoch_budgets=[0.5, 1, 2], seeds=[1, 0])
    check(epoch_budgets=[4], variant_epoch_budgets={"F0-mini": [1, 2], "F1-mini": [2, 1]})
    vit = {"ViT": {"pretrain": {"optimizer": "adamw"}, "lr_grid": [0.001, 0.002]}}
    check(variants=["F0-mini", "F1-mini", "Ti/4-mini"], families=vit)
    refused("families.NFNet", families={"NFNet": {"lr_grid": [0.1, 0.2]}})
    refused("variants", variants=["F1-mini", "F0-mini"])
    refused("variants", variants=["F0-mini"])
    refused("epoch_budgets", epoch_budgets=[1])
    refused("variant_epoch_budgets.F1-mini", variant_epoch_budgets={"F1-mini": [1]})
    refused("seeds", seeds=[1])
    refused("seeds", seeds=[])
    refused("lr_start.1.0", lr_start={1: 0.2})
    check(lr_start={1: 0.1, 2: 0.1})
    check(finetune={"rho": 0.05}, finetune_augmults=[2, 1], finetune_variants={"F0-mini": {"rho": 0.1}})
    (tmp_path / "finetune_F0-mini").mkdir()
    check(finetune_augmults=[1, 2], finetune_variants={"F3-mini": {"rho": 0.1}})
    refused("finetune_augmults", finetune_augmults=[2])
    refused("finetune.rho", finetune={"rho": 0.05})
    refused("finetune_variants.F0-mini", finetune_variants={"F0-mini": {"rho": 0.1}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": {"bottleneck_rule": "released"}},
         "finetune: bottleneck_rule: 'released' for F1-mini, pre-trained with 'published'; allowed: the same"),
        ({"finetune": {"head": "keep", "num_classes": 7}}, "head: 'keep' for F1-mini, but the data of pre-training have 4"),
        ({"finetune": {"batch_size": 18, "examples_per_epoch": 36}, "comparison_seeds": 1}, "augmult: 4 does not divide"),
        ({"notebooks": ["02_pretrain"]}, "notebooks: '02_pretrain' is not one of the analyses"),
        ({"finetune": {"exclude": "no/such/list.json"}}, "exclude: no/such/list.json is not a list of ids"),
        ({"families": {"NFNet": {"pretrain": {"dataset": "folder:no/such/folder"}}}}, "no/such/folder"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_later_runs_is_told_at_once(path, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        study.run_study(StudyConfig.from_file(path, changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_analysis_notebooks_are_told_what_they_have_parameters_for(path, tmp_path):
    import papermill

    named = StudyConfig.from_file(path, {"notebooks": ["index", "00_data"], "pretrain.data_seed": 3})
    for name in named.notebooks:
        told = study._shown(named, tmp_path, name)
        assert set(told) <= set(papermill.inspect_notebook(str(study.NOTEBOOKS / f"{name}.ipynb")))
    assert (told["num_classes"], told["examples"], told["heldout_examples"]) == (4, 64, 16), "the study's, no more"
    assert told["data_seed"] == 3
