"""The loop: records, resume to the last digit, fine-tuning hand-over, refusals that write nothing."""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from nfnet_lib import compiler, flops, models, tuning
from nfnet_lib.checkpoint import CheckpointError, Checkpoints
from nfnet_lib.config import ConfigError, FinetuneConfig, PretrainConfig
from nfnet_lib.evaluate import evaluate_weights
from nfnet_lib.loader import Examples, LoaderError
from nfnet_lib.optim import make_optimizer
from nfnet_lib.program import PROGRAM_PARAMETERS, programs
from nfnet_lib.step import train_step
from nfnet_lib.train import NonFiniteLoss, Stopped, main, run
from nfnet_lib.variants import get_variant
from nfnet_lib.weights import load_params

TINY = {
    "variant": "F0-mini", "num_classes": 8, "image_size": 16, "resolution": 16, "eval_resolution": 16,
    "examples_per_epoch": 64, "heldout_examples": 30, "batch_size": 16, "epoch_budget": 2.0, "peak_lr": 0.05,
    "checkpoints": 4, "evaluations": 2,
}  # fmt: skip
FINETUNED = TINY | {
    "dataset": "digits", "resolution": 24, "eval_resolution": 24, "epoch_budget": 1.0, "rho": 0.05, "drop_rate": 0.2,
    "stochdepth_rate": 0.1, "ema_decay": 0.9, "flip": False,
}  # fmt: skip
TIMES = (
    "seconds", "wall_seconds", "compile_seconds", "images_per_second", "core_hours", "started_at", "finished_at",
    "data_wait_seconds", "metrics_digest", "digest",  # digests are of times, too
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    config = PretrainConfig(**TINY)
    return config, folder / config.run_id, run(config, folder / config.run_id, cache_dir=cache, progress=False)


def comparable(out_dir):
    summary = {k: v for k, v in json.loads((out_dir / "summary.json").read_text()).items() if k not in TIMES}
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return summary, [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def test_the_record_says_what_was_done(finished):
    config, out_dir, summary = finished
    assert summary == json.loads((out_dir / "summary.json").read_text())
    assert summary["steps"] == config.steps == 8 and summary["images_seen"] == 128
    macs = flops.forward_macs(get_variant("F0-mini"), 16, 8)
    assert summary["forward_macs"] == macs and summary["train_flops"] == 6 * macs * 128
    assert 0 <= summary["heldout_top1"] <= summary["heldout_top5"] <= 1
    assert summary["heldout_top1"] * 30 == pytest.approx(round(summary["heldout_top1"] * 30)), "30 examples, each once"
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "heldout_loss" in line] == [4], "the one before the end"
    assert json.loads((out_dir / "params.json").read_text()) == config.model_dump(mode="json")


def test_saved_parameters_give_the_recorded_loss(finished):
    config, out_dir, summary = finished
    from nfnet_lib.augment import default_margin, eval_views
    from nfnet_lib.data import load_sources
    from nfnet_lib.step import normalise

    model, params = models.create("F0-mini", 8), load_params(out_dir)
    images, labels = load_sources(config)[1].batch(np.arange(30))
    views = eval_views(images, 16, default_margin(16))
    logits = np.asarray(jax.jit(model.apply)(params, normalise(jax.numpy.asarray(views))), np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(probabilities[np.arange(30), labels]).mean()
    assert loss == pytest.approx(summary["heldout_loss"], rel=1e-4)
    top, hits = probabilities.max(1), probabilities.argmax(1) == labels
    bins = [np.minimum(np.floor(top * 15), 14) == b for b in range(15)]
    error = sum(abs(top[b].mean() - hits[b].mean()) * b.mean() for b in bins if b.any())
    assert summary["heldout_ece"] == pytest.approx(error, abs=1e-4)


def test_a_finished_run_is_not_run_again(finished):
    config, out_dir, summary = finished
    stamp = (out_dir / "summary.json").stat().st_mtime_ns
    assert run(config, out_dir, progress=False) == summary
    assert (out_dir / "summary.json").stat().st_mtime_ns == stamp


def test_stopped_and_resumed_ends_with_the_same_numbers(finished, cache, tmp_path):
    config, out_dir, _ = finished
    other = tmp_path / config.run_id
    for leg in range(1, 4):  # also a STOP file that is there before the first step is heeded, and then gone
        other.mkdir(exist_ok=True)
        (other / "STOP").touch()
        with pytest.raises(Stopped, match=rf"stopped at step {leg} of \d+; start it again"):
            run(config, other, cache_dir=cache, progress=False)
        assert not (other / "STOP").exists()
    (tmp_path / "STOP").touch()  # the study's stays for its other runs
    with pytest.raises(Stopped, match=f"stopped at step 4 of .* as {tmp_path.name}/STOP asks; start it again"):
        run(config, other, cache_dir=cache, progress=False)
    (tmp_path / "STOP").unlink()
    run(config, other, cache_dir=cache, progress=False)
    assert comparable(other) == comparable(out_dir)
    for ours, theirs in zip(jax.tree.leaves(load_params(other)), jax.tree.leaves(load_params(out_dir)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_killed_at_any_moment_it_resumes(finished, cache, tmp_path):
    config, out_dir, _ = finished
    other, params = tmp_path / config.run_id, tmp_path / "params.json"
    params.write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "nfnet_lib.train", str(params), "--out", str(other), "--cache-dir", str(cache)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    rng = np.random.default_rng(0)
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (other / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    ours, theirs = comparable(other), comparable(out_dir)
    assert ours == theirs


def test_a_damaged_checkpoint_is_found_and_the_one_before_used(tmp_path):
    state = {"w": np.arange(100_000, dtype=np.float32), "step": np.int32(1)}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", {"seed": 1})
    assert checkpoints.restore(state) is None
    for step in (1, 2):
        checkpoints.save(step, {**state, "step": np.int32(step)}, {"seconds": 0.0})
        checkpoints.wait()
    data = max(
        (tmp_path / "run" / "checkpoints" / "2").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    with pytest.warns(UserWarning, match=r"checkpoint 2 .* can.t be used, .*: .*saved as float32 \(100000,\)"):
        step, restored, record = checkpoints.restore(state)
    assert step == 1 and record == {"seconds": 0.0}
    np.testing.assert_array_equal(restored["w"], state["w"])
    checkpoints.discard_above(1)
    checkpoints.save(2, {**state, "step": np.int32(2)}, {"seconds": 1.0})
    checkpoints.wait()
    assert checkpoints.restore(state)[0] == 2
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no sound checkpoint"):
        checkpoints.restore({**state, "w": state["w"].astype(np.float16)})
    checkpoints.close()


@pytest.mark.parametrize("augmult", [1, 4])
def test_fine_tuning_takes_over_the_body(finished, cache, augmult):
    _, pretrained, _ = finished
    config = FinetuneConfig(**FINETUNED, pretrained_run=pretrained.name, augmult=augmult)
    summary = run(config, pretrained.parent / config.run_id, cache_dir=cache, progress=False)
    assert summary["images_seen"] == 64 and summary["examples_drawn"] == 64 // augmult
    assert summary["train_flops"] == 2 * 6 * summary["forward_macs"] * 64, "SAM is two gradients"
    assert {"heldout_loss", "heldout_loss_ema"} <= set(summary)
    tuned, body = load_params(pretrained.parent / config.run_id), load_params(pretrained)
    assert tuned["head"]["b"].shape == (10,) and body["head"]["b"].shape == (8,)
    w, before = tuned["stage2"]["first"]["conv0"]["w"], body["stage2"]["first"]["conv0"]["w"]
    assert np.linalg.norm(w - before) < 0.5 * np.linalg.norm(before), "started from the pre-trained body"


def test_sam_s_step_as_runs_compile_it_is_the_step_as_written():
    """On a CPU its kernels are made by other emitters than everything else's: every parameter after three steps."""
    config = FinetuneConfig(**FINETUNED, pretrained_run="any")
    values = tuple((name, getattr(config, name)) for name in PROGRAM_PARAMETERS)
    made = programs(values, tuple(config.model_settings.items()), 10, (1, 1), config.heldout_examples)
    model = models.create("F0-mini", 10, drop_rate=config.drop_rate, stochdepth_rate=config.stochdepth_rate)
    optimizer = make_optimizer(
        momentum=config.momentum, weight_decay=config.weight_decay, agc_clip=config.agc_clip, agc_eps=config.agc_eps
    )
    written = jax.jit(functools.partial(
        train_step, model=model, optimizer=optimizer, loss="softmax", label_smoothing=config.label_smoothing, rho=config.rho,
        ascent_fraction=1.0, ema_decay=config.ema_decay,
    ))  # fmt: skip
    key, noise = made.keys(0)
    schedule, generator = made.schedule(0.05, 1, 4), np.random.default_rng(0)
    ours, theirs = made.init(key), made.init(key)
    for _ in range(3):
        examples = Examples(
            generator.integers(0, 256, (16, 24, 24, 3), np.uint8), generator.integers(0, 10, (16, 1), np.int32),
            np.ones((16, 1), np.float32), np.ones(16, np.float32),
        )  # fmt: skip
        ours, metrics = made.step(ours, made.place_batch(examples), schedule, noise)
        theirs, wanted = written(theirs, examples, schedule, noise)
        assert float(metrics["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-4)
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(ours.params), jax.tree.leaves(theirs.params), strict=True):
        where, tolerance = jax.tree_util.keystr(path), 1e-4 * np.abs(two).max() + 1e-7
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=tolerance, err_msg=where)


def test_a_switch_that_the_compiler_does_not_have_is_left_out(monkeypatch):
    """XLA drops some from one release to the next (jax 0.12 has no older emitters), and asked for one it compiles nothing."""
    monkeypatch.setattr(compiler, "_NEWER_EMITTERS", "xla_cpu_no_such_switch")
    assert compiler.knows("xla_cpu_enable_fast_math") and not compiler.knows("xla_cpu_no_such_switch")
    config = FinetuneConfig(**FINETUNED | {"variant": "Ti/4-mini", "optimizer": "adamw"}, pretrained_run="any")
    values = tuple((name, getattr(config, name)) for name in PROGRAM_PARAMETERS)
    made = programs.__wrapped__(values, tuple(config.model_settings.items()), 10, (1, 1), config.heldout_examples)
    assert int(made.init(made.keys(0)[0]).step) == 0
    made.step.wait()


def test_refusals_write_nothing(finished, tmp_path):
    _, out_dir, _ = finished
    with pytest.raises(ConfigError, match=r"peak_lr: 0.1, but .* holds a run with 0.05"):
        run(PretrainConfig(**{**TINY, "peak_lr": 0.1}), out_dir)
    for bad, words in (
        (PretrainConfig(dataset="fractal"), "dataset: unknown 'fractal'; did you mean fractals"),
        (PretrainConfig(dataset="digits", examples_per_epoch=8192), "dataset: 'digits' has 1437 train examples"),
        (FinetuneConfig(pretrained_run="nowhere"), "pretrained_run: 'nowhere' is not a finished run"),
        (
            FinetuneConfig(**{**TINY, "variant": "F1-mini"}, pretrained_run=out_dir.name),
            "variant: 'F1-mini' is not that of",
        ),
    ):
        target = (out_dir.parent if isinstance(bad, FinetuneConfig) else tmp_path) / "new"
        with pytest.raises(ConfigError, match=words):
            run(bad, target)
        assert not target.exists()


def test_the_command_exits_2_with_one_line(tmp_path, capsys):
    (tmp_path / "p.yaml").write_text("batch_size: 100000")
    assert main([str(tmp_path / "p.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: batch_size: 100000 is larger than the data")
    assert not (tmp_path / "out").exists()


def test_rates_that_diverge_lose_the_search_and_are_not_tried_again(cache, tmp_path):
    config = PretrainConfig(**{**TINY, "variant": "Ti/4-mini", "agc_clip": 1e6, "warmup_fraction": 0.0, "epoch_budget": 8.0})
    (tmp_path / ".cache").symlink_to(cache)
    tuned = tuning.tune(config, [0.05, 1000.0], tmp_path, progress=False)
    assert math.isfinite(tuned.losses[0.05]) and tuned.losses[1000.0] == math.inf
    assert tuned.summary["config"]["peak_lr"] == 0.05 and len(tuned.metrics) == 2
    lost = tmp_path / tuning.at_lr(config, 1000.0).run_id
    assert (
        "at step" in json.loads((lost / "failure.json").read_text())["error"] and not (lost / "summary.json").exists()
    )
    assert tuning.tuned_already(config, [0.05, 1000.0], tmp_path) == tuned.summary
    assert tuning.tuned_already(config, [0.025, 0.05, 1000.0], tmp_path) is None
    with pytest.raises(NonFiniteLoss, match="at step"):
        tuning.tune(tuning.at_lr(config, 2000.0), [], tmp_path, progress=False)
    with pytest.raises(ConfigError, match=r"peak_lr: 0\.05 is not in lr_grid"):
        tuning.tune(config, [0.1], tmp_path)


def test_a_vit_learns_with_adamw_and_is_fine_tuned_at_a_higher_resolution(tmp_path, cache):
    vit = {
        **TINY,
        "variant": "Ti/4-mini",
        "evaluations": 1,
        "hue_spread": 0.0,
        "examples_per_epoch": 512,
        "epoch_budget": 1.0,
    }
    config = PretrainConfig(**{**vit, "optimizer": "adamw", "peak_lr": 0.004, "num_classes": 4})
    summary = run(config, tmp_path / config.run_id, cache_dir=cache, progress=False)
    assert summary["heldout_loss"] < 0.9 * np.log(4)
    assert summary["num_params"] == sum(p.size for p in jax.tree.leaves(load_params(tmp_path / config.run_id)))
    tuned = FinetuneConfig(
        **{**vit, "dataset": "digits", "examples_per_epoch": 64, "image_size": 24, "resolution": 24, "eval_resolution": 32},
        pretrained_run=config.run_id, rho=0.05, augmult=2, stochdepth_rate=0.1, drop_rate=0.1, optimizer="adamw",
    )  # fmt: skip
    summary = run(tuned, tmp_path / tuned.run_id, cache_dir=cache, progress=False)
    params = load_params(tmp_path / tuned.run_id)
    assert params["pos_embedding"].shape == (1, 36, 60) and params["head"]["b"].shape == (10,)
    assert np.isfinite(summary["heldout_loss"]) and summary["examples_drawn"] == summary["images_seen"] // 2
    other = tuned.model_copy(update={"pool": "map"})
    with pytest.raises(ConfigError, match="pool: 'map' is not that of"):
        run(other, tmp_path / "other", cache_dir=cache, progress=False)


@pytest.mark.parametrize("changed", [{}, {"eval_margin": 0, "loss": "sigmoid", "eval_resolution": 24}])
def test_nfnet_evaluate_repeats_what_a_run_said_of_itself(changed, cache, finished, tmp_path):
    """With the margin and the loss that the run was evaluated with."""
    folder, summary = finished[1:]
    if changed:
        folder = tmp_path / "run"
        summary = run(PretrainConfig(**TINY | changed), folder, cache_dir=cache, progress=False)
    row = evaluate_weights(folder, classes="all", progress=False).iloc[0]
    for name in ("loss", "top1", "top5", "ece"):
        assert row[name] == pytest.approx(summary[f"heldout_{name}"], rel=1e-5, abs=1e-6), name


def test_a_summary_of_other_parameters_is_not_taken_for_this_run_s(finished, tmp_path):
    config, folder, summary = finished
    mine = tmp_path / "run"
    shutil.copytree(folder, mine)
    (mine / "params.json").unlink()
    assert run(config, mine, progress=False) == summary
    with pytest.raises(ConfigError, match="out_dir: run holds a finished run of other parameters"):
        run(config.model_copy(update={"peak_lr": 0.1}), mine, progress=False)


def test_each_process_mixes_pairs_of_its_own():
    from nfnet_lib.train import _refuse_devices

    config = PretrainConfig(**TINY | {"batch_size": 6, "examples_per_epoch": 60, "cutmix": True})
    _refuse_devices(config, 1, 1)
    with pytest.raises(ConfigError, match="batch_size: 3 examples a step in each of 2 processes"):
        _refuse_devices(config, 2, 2)


def test_processes_without_a_coordinator_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "params.json"), "--out", str(tmp_path / "out"), "--processes", "2", "--process-id", "0"])
    assert "need --coordinator" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_whose_last_evaluation_fails_trains_no_step_again(tmp_path):
    import cv2

    rng = np.random.default_rng(0)
    for split, number in (("train", 24), ("val", 8)):
        for index in range(number):
            path = tmp_path / "photos" / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), rng.integers(0, 255, (16, 16, 3), np.uint8))
    damaged = [tmp_path / "photos" / "val" / "a" / f"{index}.png" for index in (0, 2)]
    sound = [path.read_bytes() for path in damaged]
    for path, content in zip(damaged, sound, strict=True):
        path.write_bytes(b"?" * len(content))  # of the same size: the same data set
    config = PretrainConfig(
        variant="F0-pico", dataset=f"folder:{tmp_path}/photos", examples_per_epoch=24, heldout_examples=8, batch_size=8,
        epoch_budget=2, resolution=16, eval_resolution=16, checkpoints=1,
    )  # fmt: skip
    with pytest.raises(LoaderError, match="2 of 8 heldout examples can't be read"):
        run(config, tmp_path / "run", progress=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert lines.count(b"\n") == 6
    for path, content in zip(damaged, sound, strict=True):
        path.write_bytes(content)
    assert run(config, tmp_path / "run", progress=False)["steps"] == 6
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines
