"""Runs on many devices and in many processes: the losses of one device, whatever is killed on the way.

The processes are real: CPU processes that find each other by address, each with fake devices of its own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nfnet_lib.weights import load_params

ROOT = Path(__file__).parent.parent
SMALL = {  # compiles in seconds; 20 steps
    "variant": "Ti/4-mini", "optimizer": "adamw", "peak_lr": 0.002, "num_classes": 8, "image_size": 16, "resolution": 16,
    "eval_resolution": 16, "examples_per_epoch": 128, "heldout_examples": 40, "batch_size": 16, "epoch_budget": 2.5,
    "hue_spread": 0.1, "checkpoints": 4, "evaluations": 5, "stochdepth_rate": 0.1, "drop_rate": 0.1, "ema_decay": 0.9,
    "selection_examples": 30,
}  # fmt: skip
LIMIT = 240  # seconds; collectives that wait for nobody would wait for ever


def start(folder, params, *, devices=1, processes=1, last=None, before=""):
    """Processes of one run in `folder`. last: parameters of the last of them that differ. before: Python to run first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    paths = [folder.with_suffix(".json")] * (processes - 1) + [folder.with_suffix(".last.json" if last else ".json")]
    for path, changes in ((paths[-1], last or {}), (folder.with_suffix(".json"), {})):
        path.write_text(json.dumps(params | changes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    started = []
    for number in range(processes):
        code = f"{before}\nimport runpy\nrunpy.run_module('nfnet_lib.train', run_name='__main__', alter_sys=True)"
        command = [sys.executable, "-c", code, str(paths[number]), "--out", str(folder)]
        who = ["--coordinator", address, "--processes", str(processes), "--process-id", str(number)]
        log = folder.with_suffix(f".{number}.log").open("w")
        started.append(
            subprocess.Popen(
                command + (who if processes > 1 else []), env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        )
    return started


def end(started, expected=0):
    try:
        codes = [process.wait(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [expected] * len(started)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    names = [
        name for name in summary if name.startswith(("heldout_", "selection_")) and isinstance(summary[name], float)
    ]
    return [line["loss"] for line in lines], {name: summary[name] for name in names}


def until(condition, started=()):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.002)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed") / "one"
    end(start(folder, SMALL))
    return folder


@pytest.mark.parametrize("devices,processes,sharding", [(8, 1, "fsdp"), (1, 2, "replicated"), (2, 4, "fsdp")])
def test_losses_are_those_of_one_device(one, tmp_path, devices, processes, sharding):
    folder = tmp_path / "many"
    end(start(folder, SMALL | {"sharding": sharding}, devices=devices, processes=processes))
    (expected, results), (found, same) = losses(one), losses(folder)
    assert len(found) == 20
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name in results:
        assert same[name] == pytest.approx(results[name], rel=1e-4, abs=1e-6), name
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["device_count"] == devices * processes and summary["process_count"] == processes


def test_of_four_processes_one_is_killed_while_saving_and_two_go_on(one, tmp_path):
    folder = tmp_path / "run"
    started = start(folder, SMALL, processes=4)
    checkpoints = folder / "checkpoints"
    until(
        lambda: checkpoints.exists() and any("tmp" in p.name for p in checkpoints.glob("1*")), started
    )  # step 10 or 15
    started[0].send_signal(signal.SIGKILL)
    for process in started:
        process.kill()
        process.wait()
    assert not (folder / "summary.json").exists()
    end(start(folder, SMALL, processes=2))
    (expected, results), (found, same) = losses(one), losses(folder)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert same == pytest.approx(results, rel=1e-4, abs=1e-6)


def test_a_termination_signal_saves_and_the_run_ends_bit_equal(one, tmp_path):
    folder = tmp_path / "run"
    (process,) = start(folder, SMALL)
    until(
        lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text().count("\n") >= 2,
        [process],
    )
    process.send_signal(signal.SIGTERM)
    end([process], expected=75)
    assert "stopped at step" in folder.with_suffix(".0.log").read_text() and not (folder / "summary.json").exists()
    assert [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
    end(start(folder, SMALL))
    assert losses(folder) == losses(one)


def test_the_weights_kept_are_the_best_on_examples_kept_out_of_training(one):
    summary = json.loads((one / "summary.json").read_text())
    lines = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "selection_top1" in line]
    assert [line["step"] for line in judged] == [4, 8, 12, 16] and not any("heldout_top1" in line for line in lines)
    judged.append({"step": 20} | {name: value for name, value in summary.items() if name.startswith("selection_")})
    scores = [
        (-line[f"selection_top1{end}"], line[f"selection_loss{end}"], line["step"], weights)
        for line in judged for weights, end in (("raw", ""), ("ema", "_ema"))
    ]  # fmt: skip
    _, _, step, weights = min(scores)
    assert (summary["kept_step"], summary["kept_weights"]) == (step, weights)

    import jax

    from nfnet_lib import models
    from nfnet_lib.config import PretrainConfig
    from nfnet_lib.data import load_sources, make_sampler, selection_source
    from nfnet_lib.loader import eval_batches
    from nfnet_lib.step import eval_step

    config = PretrainConfig(**SMALL)
    train, heldout = load_sources(config)
    sampler, kept_out = make_sampler(config, train), selection_source(config, train)
    assert len(train) == 158 and len(kept_out) == 30
    assert set(kept_out.ids) | set(sampler.example_ids(0, 128)) == set(range(158)), "an epoch is what is left"
    model = models.create("Ti/4-mini", 8, **config.model_settings)
    for source, name in ((kept_out, "selection"), (heldout, "heldout")):
        batches = eval_batches(source, batch_size=10, resolution=16)
        sums = [eval_step(load_params(one), jax.device_put(batch.examples), model=model) for batch in batches]
        sums = jax.device_get(sums)
        top1 = sum(part["top1"] for part in sums) / len(source)
        wanted = summary["heldout_top1"] if name == "heldout" else -min(scores)[0]
        assert top1 == pytest.approx(wanted, abs=1e-6), name


def test_a_batch_that_does_not_divide_among_the_devices_is_refused(tmp_path):
    (process,) = start(tmp_path / "run", SMALL | {"batch_size": 20, "epoch_budget": 0.625}, devices=8)
    end([process], expected=2)
    text = (tmp_path / "run.0.log").read_text()
    assert "batch_size: 20 does not divide among 8 devices" in text and not (tmp_path / "run").exists()


def test_processes_that_disagree_are_refused_before_anything_is_written(tmp_path):
    end(start(tmp_path / "run", SMALL, processes=2, last={"seed": 4}), expected=2)
    for number in range(2):
        assert "error: seed: 0 in process 0, 4 in process 1" in (tmp_path / f"run.{number}.log").read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--coordinator", "nowhere"], "coordinator: 'nowhere' is not HOST:PORT"),
        (["--coordinator", "127.0.0.1:1", "--processes", "2", "--process-id", "2"], "process_id: 2 is not in 0 to 1"),
    ],
)
def test_processes_that_can_not_meet_are_told_so(tmp_path, arguments, words):
    (tmp_path / "params.json").write_text(json.dumps(SMALL))
    command = [sys.executable, "-m", "nfnet_lib.train", str(tmp_path / "params.json"), "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=LIMIT, check=False)
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "run").exists()
