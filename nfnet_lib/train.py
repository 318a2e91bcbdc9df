"""The training loop: `run(config, out_dir)`, also as `python -m nfnet_lib.train params.yaml --out DIR`.

One call makes one run folder: params.json, metrics.jsonl, checkpoints/, summary.json. A folder with a summary is done;
one without resumes from its newest sound checkpoint, and ends with the numbers of an undisturbed run.
"""

import contextlib
import datetime
import fcntl
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfnet_lib import PROJECT, flops, paper
from nfnet_lib.checkpoint import Checkpoints
from nfnet_lib.config import ConfigError, FinetuneConfig, PretrainConfig, RunConfig, config_from_params
from nfnet_lib.data import QUARANTINE, Quarantine, load_sources, make_sampler, run_batches
from nfnet_lib.loader import on_device
from nfnet_lib.program import EVAL_BATCH, PROGRAM_PARAMETERS, evaluate, programs
from nfnet_lib.records import PARAMS, SUMMARY, MetricsWriter, read_metrics, read_summary, write_json
from nfnet_lib.sources import cached
from nfnet_lib.step import Schedule
from nfnet_lib.weights import load_pretrained, save_params, transfer

STOP = "STOP"  # a file of this name in the run folder asks for one more checkpoint and a clean end
LOCK_SECONDS = 60


class Stopped(RuntimeError):
    """The run was asked to stop and can be resumed: exit code 75 (EX_TEMPFAIL)."""


class NonFiniteLoss(RuntimeError):
    """The loss is not a number; the last checkpoint is kept."""


def run(config: RunConfig, out_dir: str | Path, *, cache_dir: str | Path | None = None, progress: bool = True) -> dict:
    """Train, evaluate and record one run in out_dir; returns its summary (also that of a run done before).

    cache_dir: shared by the runs of a study, for compiled programs and rendered images. ConfigError, before anything
    is written, for what can't be run or for an out_dir that holds a run of another config.
    """
    out_dir = Path(out_dir)
    _refuse_other(config, out_dir)
    if (out_dir / SUMMARY).exists():
        return read_summary(out_dir)
    if config.dtype == "bfloat16" and jax.default_backend() == "cpu":
        print("note: bfloat16 activations are emulated on CPU, and slow", file=sys.stderr)
    train_source, heldout_source = load_sources(config)
    sampler, initial = make_sampler(config, train_source), None
    if isinstance(config, FinetuneConfig):
        initial = load_pretrained(config, out_dir.parent, train_source.num_classes)
    if cache_dir is not None:
        _compilation_cache(Path(cache_dir))
        train_source, heldout_source = (cached(s, Path(cache_dir) / "images") for s in (train_source, heldout_source))
    out_dir.mkdir(parents=True, exist_ok=True)
    with _lock(out_dir):
        if (out_dir / SUMMARY).exists():
            return read_summary(out_dir)
        write_json(out_dir / PARAMS, config.model_dump(mode="json"))
        (out_dir / STOP).unlink(missing_ok=True)
        summary = _train(config, out_dir, train_source, heldout_source, sampler, initial, progress)
        write_json(out_dir / SUMMARY, summary)
        (out_dir / "failure.json").unlink(missing_ok=True)
        return summary


def small_pretraining(variant: str, study_dir: Path = PROJECT / "outputs" / "by_hand") -> Path:
    """Folder of a pre-training run of a minute or so in study_dir, made unless there: for trying out what follows."""
    config = PretrainConfig(
        variant=variant, num_classes=16, hue_spread=0.1, examples_per_epoch=1024, heldout_examples=512, batch_size=16,
        eval_resolution=32, agc_clip=0.16, agc_eps=0.05, peak_lr=0.05,
    )  # fmt: skip
    run(config, study_dir / config.run_id, cache_dir=study_dir / ".cache")
    return study_dir / config.run_id


def _train(config, out_dir, train_source, heldout_source, sampler, initial, progress) -> dict[str, Any]:
    started = _now()
    clock = time.perf_counter()
    schedule = Schedule(jnp.float32(config.peak_lr), jnp.int32(config.warmup_steps), jnp.int32(config.steps))
    init_key, noise_key = jax.random.split(jax.random.key(config.seed))
    compile_clock = time.perf_counter()
    quarantine = Quarantine(out_dir / QUARANTINE, len(train_source), config.max_bad_fraction)
    values = tuple((name, getattr(config, name)) for name in PROGRAM_PARAMETERS)
    settings = tuple(config.model_settings.items())
    each = [getattr(source, "labels_per_example", 1) for source in (train_source, heldout_source)]
    labels = (each[0] * (2 if config.mixup_alpha or config.cutmix else 1), each[1])
    init, step, eval_function = programs(
        values, settings, train_source.num_classes, labels, min(EVAL_BATCH, len(heldout_source))
    )
    evaluated = functools.partial(evaluate, eval_function, config, heldout_source, quarantine)
    state = init(init_key)
    compile_seconds = time.perf_counter() - compile_clock
    if initial is not None:
        params = transfer(initial, state.params, keep_head=config.head == "keep")
        ema = jax.tree.map(jnp.copy, params) if state.ema is not None else None
        state = state._replace(params=params, ema=ema)

    checkpoints = Checkpoints(out_dir / "checkpoints")
    begin, position, trained_seconds = 0, 0, 0.0
    restored = checkpoints.restore(state)
    if restored is not None:
        begin, saved, record = restored
        checkpoints.discard_above(begin)
        position = sampler.resume(record["data"], train_source.fingerprint)
        state = jax.tree.map(jnp.asarray, saved)
        trained_seconds = record["seconds"]
    batches = run_batches(config, train_source, sampler, start=position)
    log_at = _spread(config.log_points, config.steps)
    save_at = _spread(config.checkpoints, config.steps) - {config.steps}
    eval_at = _spread(config.evaluations, config.steps) - {config.steps}

    loop_clock = time.perf_counter()
    with contextlib.closing(batches), MetricsWriter(out_dir / "metrics.jsonl", last_step=begin) as writer:
        bar = _progress(config, begin, progress)

        def read(metrics: dict, number: int, heldout: dict | None = None) -> None:
            """Metrics of an earlier step, when the device is already busy with the next, and a held-out evaluation."""
            loss = float(metrics["loss"])
            if not np.isfinite(loss):
                raise NonFiniteLoss(f"the loss is {loss} at step {number} of {config.steps}; a lower peak_lr may help")
            if number in log_at or heldout:
                rate = (number - begin) * config.batch_size / (time.perf_counter() - loop_clock)
                writer.write(
                    number, epoch=number * config.batch_size / config.examples_per_epoch, loss=loss,
                    lr=float(metrics["lr"]), grad_norm=float(metrics["grad_norm"]), images_per_second=round(rate, 1),
                    **(heldout or {}),
                )  # fmt: skip
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(config.batch_size)

        pending, ahead = None, on_device(batches)
        for number in range(begin + 1, config.steps + 1):
            batch, examples = next(ahead)
            quarantine.add(batch.bad)
            state, metrics = step(state, examples, schedule, noise_key)
            if pending is not None:
                read(pending, number - 1)
            pending = metrics
            stopping = (out_dir / STOP).exists()
            heldout = evaluated(state.params) if number in eval_at else None
            if heldout or number in save_at or stopping:
                read(pending, number, heldout)
                pending = None
            if number in save_at or stopping:
                writer.sync()
                seconds = trained_seconds + time.perf_counter() - loop_clock
                data = sampler.state(batch.position, train_source.fingerprint)
                checkpoints.save(number, state, {"data": data, "seconds": seconds})
            if stopping:
                checkpoints.close()
                raise Stopped(f"stopped at step {number} of {config.steps}; start it again to resume")
        if pending is not None:
            read(pending, config.steps)
        bar.close()
    trained_seconds += time.perf_counter() - loop_clock
    results = evaluated(state.params)
    if state.ema is not None:
        results |= {f"{name}_ema": value for name, value in evaluated(state.ema).items()}
    digests = save_params(out_dir, state.params if state.ema is None else state.ema)
    checkpoints.close()
    results |= {f"{split}_quarantined": len(ids) for split, ids in quarantine.ids.items()}
    return _summary(
        config, out_dir, train_source.num_classes, results, digests, started=started, seconds=trained_seconds,
        compile_seconds=compile_seconds, wall_seconds=time.perf_counter() - clock,
    )  # fmt: skip


def _summary(
    config, out_dir, num_classes, results, digests, *, started, seconds, compile_seconds, wall_seconds
) -> dict:
    variant = config.architecture
    macs = flops.forward_macs(variant, config.resolution, num_classes, config.bottleneck_rule)
    images_seen = config.steps * config.batch_size
    total = flops.train_flops(macs, images_seen, config.rho, config.ascent_fraction)
    curve = read_metrics(out_dir)["loss"]
    cores = len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else jax.device_count()
    return {
        "schema": 1, "run_id": config.run_id, "cell_id": config.cell_id, "kind": config.kind, "status": "done",
        "config": config.model_dump(mode="json"), "config_hash": config.config_hash,
        "num_params": flops.num_params(variant, num_classes, config.bottleneck_rule, config.resolution),
        "forward_macs": macs, "train_flops": total, "steps": config.steps, "images_seen": images_seen,
        "examples_drawn": config.steps * config.unique_per_step, "seconds": seconds,
        "compile_seconds": compile_seconds, "wall_seconds": wall_seconds,
        "images_per_second": images_seen / seconds, "core_hours": seconds * cores / 3600,
        "tpu_v4_core_hours": float(paper.tpu_v4_core_hours(total)), **results,
        "train_loss": float(curve.tail(max(1, len(curve) // 10)).mean()),
        "device_kind": jax.devices()[0].device_kind, "device_count": jax.device_count(),
        "platform": jax.default_backend(), "host_cores": cores, "versions": _versions(), **_git(),
        "started_at": started, "finished_at": _now(), "params_digests": digests,
    }  # fmt: skip


def _refuse_other(config: RunConfig, out_dir: Path) -> None:
    params = out_dir / PARAMS
    if params.exists():
        before = json.loads(params.read_text())
        now = config.model_dump(mode="json")
        for name in sorted(set(before) | set(now)):
            if before.get(name) != now.get(name):
                raise ConfigError(
                    f"{name}: {now.get(name)!r}, but {out_dir.name} holds a run with {before.get(name)!r}; "
                    "choose another output folder"
                )


def _compilation_cache(folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def _lock(out_dir: Path) -> Iterator[None]:
    """One process a run folder; the lock ends with its holder, however that dies."""
    with (out_dir / ".lock").open("w") as file:
        for attempt in range(LOCK_SECONDS * 4):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == LOCK_SECONDS * 4 - 1:
                    raise ConfigError(f"out_dir: another process is running {out_dir.name}") from None
                time.sleep(0.25)
        yield


def _spread(points: int, steps: int) -> set[int]:
    """At most `points` step numbers, evenly spread, the last one `steps`."""
    return {round((i + 1) * steps / min(points, steps)) for i in range(min(points, steps))}


def _progress(config: RunConfig, begin: int, shown: bool):
    from tqdm.auto import tqdm

    return tqdm(
        total=config.steps * config.batch_size, initial=begin * config.batch_size, unit="img", unit_scale=True,
        desc=config.variant, disable=not shown, mininterval=1.0,
    )  # fmt: skip


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {
        name: version(name)
        for name in (
            "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy",
            "simplejpeg", "pillow", "opencv-python-headless",  # what makes pixels of bytes
        )
    }


def _git() -> dict[str, Any]:
    """The commit of the code, and whether files that git tracks differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}


def main(argv: list[str] | None = None) -> int:
    """`python -m nfnet_lib.train params.yaml --out DIR`; exit codes 0 done, 1 bad data, 2 bad parameters, 75 stopped."""
    import argparse

    import yaml

    parser = argparse.ArgumentParser(prog="python -m nfnet_lib.train", description="Train one run, or resume it.")
    parser.add_argument("params", type=Path, help="YAML or JSON file of flat parameters")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--cache-dir", type=Path, help="compiled programs and rendered images, shared by runs")
    arguments = parser.parse_args(argv)
    try:
        config = config_from_params(yaml.safe_load(arguments.params.read_text()))
        summary = run(config, arguments.out, cache_dir=arguments.cache_dir)
    except (ConfigError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LoaderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 75
    print(f"held-out loss {summary['heldout_loss']:.4f}, top-1 {summary['heldout_top1']:.1%}: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
