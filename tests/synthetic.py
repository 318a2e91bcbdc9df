"""Synthetic run records with a planted scaling law, to test the analysis and to try figures without runs."""

import numpy as np

VARIANTS = {  # name: (parameters, multiply-accumulates of one training image); about as the laptop family
    "F0-mini": (1.1e6, 2.4e6),
    "F1-mini": (2.0e6, 4.6e6),
    "F3-mini": (3.9e6, 9.0e6),
    "F3+-mini": (7.4e6, 1.7e7),
    "F7+-mini": (1.44e7, 3.4e7),
}
EPOCHS = (0.25, 0.5, 1.0, 2.0, 4.0)
LEARNING_RATES = (0.2, 0.4, 0.8, 1.6, 3.2)
EXAMPLES = 100_000
LAW = (12.0, 0.05)  # loss = 12 * train_flops ** -0.05 along the envelope


def summary(run_id, kind="pretrain", config=None, **results):
    """A finished run's summary with every key of the schema; `results` and `config` override."""
    config = {"variant": "F0-mini", "dataset": "fractals", "epoch_budget": 1.0, "batch_size": 256, "peak_lr": 0.8,
              "seed": 0, "augmult": 1, "weight_decay": 1e-6, "heldout_examples": 360} | (config or {})  # fmt: skip
    return {
        "schema": 1, "run_id": run_id, "kind": kind, "status": "done", "config": config, "config_hash": "0" * 16,
        "num_params": 1_100_000, "forward_macs": 2_400_000, "train_flops": 1e12, "steps": 390, "images_seen": 99_840,
        "examples_drawn": 99_840, "seconds": 60.0, "compile_seconds": 5.0, "images_per_second": 1664.0,
        "core_hours": 0.03, "tpu_v4_core_hours": 5e-6, "heldout_loss": 2.5, "heldout_top1": 0.4, "heldout_top5": 0.7,
        "train_loss": 2.4, "device_kind": "cpu", "device_count": 1, "platform": "cpu", "versions": {"jax": "0.0.0"},
        "git_commit": None, "git_dirty": False, "started_at": "2000-01-01T00:00:00+00:00",
        "finished_at": "2000-01-01T00:01:00+00:00",
    } | results  # fmt: skip


def optimal_lr(epochs, macs):
    """Planted best rate: falls by 2**-0.5 per doubling of epochs and by 2**-0.25 per doubling of the model."""
    return 1.2 * epochs**-0.5 * (macs / 2.4e6) ** -0.25


def pretrain_summaries(
    variants=VARIANTS, epochs=EPOCHS, lrs=LEARNING_RATES, noise=0.0, curvature=0.02, bend=0.03, seed=0
):
    """Summaries of a grid of pre-training runs.

    Loss = LAW * exp(bend * (log4 of distance from the variant's best epoch budget)**2) * exp(curvature * (log2 of lr
    from `optimal_lr`)**2) * lognormal(noise): each variant touches the envelope LAW at one epoch budget, larger ones
    later.
    """
    generator = np.random.default_rng(seed)
    smallest = min(macs for _, macs in variants.values())
    result = []
    for name, (params, macs) in variants.items():
        touches = epochs[0] * macs / smallest
        for budget in epochs:
            images = int(budget * EXAMPLES)
            flops = 6.0 * macs * images
            base = LAW[0] * flops ** -LAW[1] * np.exp(bend * np.log(budget / touches) ** 2 / np.log(4) ** 2)
            for lr in lrs:
                loss = base * np.exp(
                    curvature * np.log2(lr / optimal_lr(budget, macs)) ** 2 + noise * generator.normal()
                )
                result.append(summary(
                    f"{name}-e{budget:g}-lr{lr:g}", config={"variant": name, "epoch_budget": budget, "peak_lr": lr},
                    num_params=int(params), forward_macs=int(macs), train_flops=flops, images_seen=images,
                    heldout_loss=float(loss), heldout_top1=float(np.exp(-loss / 2)), tpu_v4_core_hours=flops / 1.955e17,
                ))  # fmt: skip
    return result


def finetune_summaries(pretrained, augmults=(1, 4)):
    """A fine-tuning run for each of the given pre-training summaries and each augmult, better for lower loss."""
    return [
        summary(
            f"ft-{origin['run_id']}-a{augmult}", kind="finetune", train_flops=2e11, heldout_loss=0.1,
            config={"variant": origin["config"]["variant"], "epoch_budget": 10.0, "peak_lr": 0.1, "augmult": augmult,
                    "rho": 0.05, "pretrained_run": origin["run_id"]},
            heldout_top1=1 - 0.02 * origin["heldout_loss"] ** 2 * (0.97 if augmult > 1 else 1.0),
        )
        for origin in pretrained
        for augmult in augmults
    ]  # fmt: skip


def table(summaries):
    """The summaries as `records.collect` would return them, without the detour over files."""
    import pandas as pd

    rows = [{k: v for k, v in s.items() if k not in ("config", "versions")} | s["config"] for s in summaries]
    return pd.DataFrame(rows)


def write_runs(folder, summaries):
    """Write each summary as folder/<run_id>/summary.json, as a study leaves them."""
    from nfnet_lib.files import write_json

    for each in summaries:
        (folder / each["run_id"]).mkdir(parents=True)
        write_json(folder / each["run_id"] / "summary.json", each)


def metrics(steps=200, seed=0, start=7.0, floor=2.4):
    """Metrics of one run as `records.read_metrics` returns them."""
    import pandas as pd

    generator, step = np.random.default_rng(seed), np.arange(1, steps + 1)
    lr = np.minimum(step / 20, 0.5 * (1 + np.cos(np.pi * step / steps)))
    loss = floor + (start - floor) * np.exp(-step / 40) + 0.05 * generator.normal(size=steps)
    return pd.DataFrame({"step": step, "epoch": step / steps, "loss": loss, "lr": lr})
