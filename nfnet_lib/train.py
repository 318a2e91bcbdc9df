"""The training loop: `run(config, out_dir)`, also as `python -m nfnet_lib.train params.yaml --out DIR`.

One call makes one run folder: params.json, metrics.jsonl, checkpoints/, summary.json. A folder with a summary is done;
one without resumes from its newest sound checkpoint, and ends with the numbers of an undisturbed run.
"""

import contextlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nfnet_lib import PROJECT, distributed, provenance
from nfnet_lib.checkpoint import CheckpointError, Checkpoints, not_finite, restored
from nfnet_lib.config import ConfigError, FinetuneConfig, PretrainConfig, RunConfig, config_from_params
from nfnet_lib.data import QUARANTINE, Quarantine, load_sources, make_sampler, run_batches, selection_source
from nfnet_lib.files import no_room, write_json
from nfnet_lib.loader import LoaderError, on_device
from nfnet_lib.locks import exclusive
from nfnet_lib.program import EVAL_BATCH, PROGRAM_PARAMETERS, Program, Programs, evaluate, programs
from nfnet_lib.records import FAILURE, PARAMS, STOP, SUMMARY, MetricsWriter, RecordError, read_metrics, read_summary
from nfnet_lib.selection import Selection
from nfnet_lib.sources import cached
from nfnet_lib.stopping import asked_to_stop, heeding_sigterm
from nfnet_lib.tensorboard import EventWriter
from nfnet_lib.weights import load_pretrained, save_classes, save_params, transfer

LOCK_SECONDS = 60
ADVICE = "a lower peak_lr may help"


class Stopped(RuntimeError):
    """The run was asked to stop and can be resumed: exit code 75 (EX_TEMPFAIL)."""


class NonFiniteLoss(RuntimeError):
    """The loss, the gradient or a parameter is not a number; checkpoints are from before, and are kept."""


def run(config: RunConfig, out_dir: str | Path, *, cache_dir: str | Path | None = None, progress: bool = True) -> dict:
    """Train, evaluate and record one run in out_dir; returns its summary (also that of a run done before).

    cache_dir: shared by the runs of a study, for compiled programs and rendered images. ConfigError, before anything
    is written, for what can't be run or for an out_dir that holds a run of another config.
    """
    out_dir = Path(out_dir)
    _agree(lambda: _refuse_other(config, out_dir))
    if summary := distributed.told(_finished(out_dir)):
        return summary
    if config.dtype == "bfloat16" and jax.default_backend() == "cpu":
        print("note: bfloat16 activations are emulated on CPU, and slow", file=sys.stderr)
    _refuse_devices(config, jax.device_count(), jax.process_count())
    train_source, heldout_source = load_sources(config)
    _refuse_disagreement(config, train_source.fingerprint, heldout_source.fingerprint)
    sampler, initial = make_sampler(config, train_source), None
    class_names = getattr(train_source, "class_names", ())
    if isinstance(config, FinetuneConfig):
        initial = load_pretrained(config, out_dir.parent, train_source.num_classes, class_names)
    if cache_dir is not None:
        _compilation_cache(Path(cache_dir))
        train_source, heldout_source = (cached(s, Path(cache_dir) / "images") for s in (train_source, heldout_source))
    with contextlib.ExitStack() as held:
        _agree(lambda: held.enter_context(exclusive(out_dir, "out_dir", LOCK_SECONDS)))
        if summary := distributed.told(_finished(out_dir)):
            return summary
        if distributed.is_primary():
            write_json(out_dir / PARAMS, config.model_dump(mode="json"))
            save_classes(out_dir, class_names)
        asked = held.enter_context(heeding_sigterm())
        summary = _train(config, out_dir, train_source, heldout_source, sampler, initial, asked, progress)
        Program.all_kept()
        if distributed.is_primary():
            write_json(out_dir / SUMMARY, summary)
            (out_dir / FAILURE).unlink(missing_ok=True)
        return distributed.told(summary)


def small_pretraining(variant: str, study_dir: Path = PROJECT / "outputs" / "by_hand") -> Path:
    """Folder of a pre-training run of a minute or so in study_dir, made unless there: for trying out what follows."""
    config = PretrainConfig(
        variant=variant, num_classes=16, hue_spread=0.1, examples_per_epoch=1024, heldout_examples=512, batch_size=16,
        eval_resolution=32, agc_clip=0.16, agc_eps=0.05, peak_lr=0.05,
    )  # fmt: skip
    run(config, study_dir / config.run_id, cache_dir=study_dir / ".cache")
    return study_dir / config.run_id


def _asked_by(stop_files: list[Path]) -> str:
    """The run's own STOP file has done its work and goes; one of the study stays for its other runs, and is named."""
    own, study = stop_files
    if distributed.is_primary():
        own.unlink(missing_ok=True)
    return f", as {study.parent.name}/{study.name} asks" if study.exists() else ""


def _train(config, out_dir, train_source, heldout_source, sampler, initial, asked, progress) -> dict[str, Any]:
    started, clock, primary = provenance.now(), time.perf_counter(), distributed.is_primary()
    stop_files = [out_dir / STOP, out_dir.parent / STOP]
    each = [getattr(source, "labels_per_example", 1) for source in (train_source, heldout_source)]
    program = programs(
        tuple((name, getattr(config, name)) for name in PROGRAM_PARAMETERS), tuple(config.model_settings.items()),
        train_source.num_classes, (each[0] * (2 if config.mixup_alpha or config.cutmix else 1), each[1]),
        -(-min(EVAL_BATCH, len(heldout_source)) // jax.device_count()) * jax.device_count(),
    )  # fmt: skip
    init_key, noise_key = program.keys(config.seed)
    schedule = program.schedule(config.peak_lr, config.warmup_steps, config.steps)
    state = program.init(init_key)
    if initial is not None:
        params = transfer(initial, distributed.host_copy(state.params), keep_head=config.head == "keep")
        state = state._replace(params=params, ema=params if state.ema is not None else None)
        state = program.place_state(distributed.host_copy(state))

    quarantine = Quarantine(out_dir / QUARANTINE if primary else None, len(train_source), config.max_bad_fraction)
    selection = Selection(selection_source(config, train_source), state.params)
    checkpoints = Checkpoints(out_dir / "checkpoints", config.model_dump(mode="json")) if primary else None
    begin, position, trained_seconds, waited, known_lines = 0, 0, 0.0, 0.0, None
    environment, changes = provenance.environment(), []
    if (found := restored(checkpoints, (state, selection.params))) is not None:
        begin, (saved, best), record = found
        try:
            position = sampler.resume(record["data"], train_source.fingerprint)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {begin} in {out_dir.name}: {error}") from None
        state = program.place_state(saved)
        selection.resume(best, record["selected"])
        trained_seconds, waited, known_lines = record["seconds"], record["waited"], record["metrics"]
        changes = record["changes"] + provenance.changes(record["environment"], environment, begin)
        for change in changes[len(record["changes"]) :] if primary else ():
            print(f"note: resumed at {change}; later digits may differ", file=sys.stderr)
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = run_batches(config, train_source, sampler, start=position, **share)
    log_at = _spread(config.log_points, config.steps)
    save_at = _spread(config.checkpoints, config.steps)
    eval_at = _spread(config.evaluations, config.steps) - {config.steps}
    # Collectives of two programs at once deadlock on several CPU devices.
    alone = jax.default_backend() == "cpu" and jax.local_device_count() > 1

    def evaluated(state, number: int) -> dict[str, float]:
        """Of the raw and the averaged weights, on the examples by which weights are chosen, or else on those held out."""
        results = {}
        for weights, params in (("", state.params), ("ema", state.ema)):
            if params is not None:
                source = heldout_source if selection.source is None else selection.source
                split = "heldout" if selection.source is None else "selection"
                found = evaluate(program, config, source, quarantine, params, split)
                results |= {f"{name}_{weights}".rstrip("_"): value for name, value in found.items()}
                selection.consider(params, found, number, weights or "raw")
        return results

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(batches))
        ahead = on_device(batches, program.place_batch)
        if begin < config.steps:
            ahead = itertools.chain([next(ahead)], ahead)  # read while the step is compiled
        program.step.wait()
        loop_clock = time.perf_counter()
        compile_seconds = loop_clock - clock
        writer = MetricsWriter(out_dir / "metrics.jsonl", begin, known_lines) if primary else None
        stack.enter_context(writer or contextlib.nullcontext())
        stack.callback(checkpoints.close if primary else lambda: None)  # what is being saved is on disk, however this ends
        events = stack.enter_context(EventWriter(out_dir, last_step=begin)) if primary else None
        bar = stack.enter_context(_progress(config, begin, progress and primary))

        def read(metrics: dict, number: int, heldout: dict | None = None) -> None:
            """Metrics of an earlier step, when the device is already busy with the next, and an evaluation."""
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            for name, value in (("loss", loss), ("norm of the gradient", norm)):
                if not np.isfinite(value):
                    raise NonFiniteLoss(f"the {name} is {value} at step {number} of {config.steps}; {ADVICE}")
            if writer is not None and (number in log_at or heldout):
                rate = (number - begin) * config.batch_size / (time.perf_counter() - loop_clock)
                line = {
                    "epoch": number * config.batch_size / config.examples_per_epoch, "loss": loss, "lr": float(metrics["lr"]),
                    "grad_norm": norm, "images_per_second": round(rate, 1), **(heldout or {}),
                }  # fmt: skip
                writer.write(number, **line)
                events.write(number, **line)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(config.batch_size)

        pending = None
        for number in range(begin + 1, config.steps + 1):
            asked_at = time.perf_counter()
            batch, examples = next(ahead)
            waited += time.perf_counter() - asked_at
            quarantine.add(batch.bad)
            state, metrics = program.step(state, examples, schedule, noise_key)
            if alone:
                jax.block_until_ready(metrics)
            if pending is not None:
                read(pending, number - 1)
            pending = metrics
            stopping = asked_to_stop(asked, stop_files, number)
            results = evaluated(state, number) if number in eval_at else None
            if results or number in save_at or stopping:
                read(pending, number, results)
                pending = None
            if number in save_at or stopping:
                seconds = trained_seconds + time.perf_counter() - loop_clock
                data = sampler.state(batch.position, train_source.fingerprint)
                saved = distributed.host_copy((state, selection.params))
                _refuse_not_finite(saved, number, config)
                quarantine.merge()
                if primary:
                    writer.sync()
                    events.sync()
                    checkpoints.save(number, saved, {
                        "data": data, "seconds": seconds, "waited": waited, "selected": selection.record,
                        "metrics": writer.digest, "environment": environment, "changes": changes,
                    })  # fmt: skip
            if stopping:
                raise Stopped(f"stopped at step {number} of {config.steps}{_asked_by(stop_files)}; start it again to resume")
        if pending is not None:
            read(pending, config.steps)
    trained_seconds += time.perf_counter() - loop_clock
    results, kept = _final(config, program, state, selection, evaluated, heldout_source, quarantine)
    quarantine.merge()
    kept = distributed.host_copy(kept)
    _refuse_not_finite(kept, config.steps, config)
    if wrong := [name for name, value in results.items() if isinstance(value, float) and not np.isfinite(value)]:
        raise NonFiniteLoss(f"{wrong[0]} is {results[wrong[0]]} after {config.steps} steps; {ADVICE}")
    if primary:
        results |= {"params_digests": save_params(out_dir, kept), "metrics_digest": writer.digest}
        results |= {"data_wait_seconds": waited} | ({"changes": changes} if changes else {})
        curve = read_metrics(out_dir)["loss"]
        results |= {f"{split}_quarantined": len(ids) for split, ids in quarantine.ids.items()}
        results |= {"train_loss": float(curve.tail(max(1, len(curve) // 10)).mean())}
    return provenance.summary(
        config, train_source.num_classes, results, started=started, seconds=trained_seconds,
        compile_seconds=compile_seconds, wall_seconds=time.perf_counter() - clock,
    )  # fmt: skip


def _final(
    config, program: Programs, state, selection: Selection, evaluated, heldout_source, quarantine
) -> tuple[dict[str, Any], Any]:
    """(held-out results, the parameters to keep): those selected, or else the moving average where there is one.

    heldout_* are of the parameters kept; _raw and _ema those of the last step, where more than one is in question.
    """
    chosen, results = evaluated(state, config.steps) if selection.source is not None else {}, {}
    last = {"raw": state.params} | ({} if state.ema is None else {"ema": state.ema})
    heldout = {name: evaluate(program, config, heldout_source, quarantine, p, "heldout") for name, p in last.items()}
    if len(last) > 1 or selection.source is not None:
        results = {f"{name}_{weights}": value for weights, found in heldout.items() for name, value in found.items()}
    step, weights, kept = config.steps, list(last)[-1], list(last.values())[-1]
    if selection.source is not None:
        step, weights = selection.record["step"], selection.record["weights"]
        kept = program.place_params(selection.params)
    found = heldout[weights]
    if step != config.steps:
        found = evaluate(program, config, heldout_source, quarantine, kept, "heldout")
    return chosen | results | found | {"kept_step": step, "kept_weights": weights}, kept


def _refuse_not_finite(tree, number: int, config: RunConfig) -> None:
    if path := not_finite(tree):
        raise NonFiniteLoss(f"{path} is not finite at step {number} of {config.steps}; {ADVICE}")


def _agree(check) -> None:
    """`check()` on the first process; its ConfigError in all of them."""
    error = None
    if distributed.is_primary():
        try:
            check()
        except ConfigError as refused:
            error = str(refused)
    if error := distributed.told(error):
        raise ConfigError(error)


def _refuse_disagreement(config: RunConfig, *fingerprints: str) -> None:
    """ConfigError unless all processes have the same parameters and data: each would train on something of its own."""
    found = distributed.gathered([config.model_dump(mode="json"), list(fingerprints)])
    for number, (other, data) in enumerate(found):
        if different := [name for name in found[0][0] if found[0][0][name] != other.get(name)]:
            name = different[0]
            raise ConfigError(f"{name}: {found[0][0][name]!r} in process 0, {other.get(name)!r} in process {number}")
        if data != found[0][1]:
            raise ConfigError(f"dataset: process {number} sees other data in {config.dataset!r} than process 0")


def _finished(out_dir: Path) -> dict | None:
    return read_summary(out_dir) if distributed.is_primary() and (out_dir / SUMMARY).exists() else None


def _refuse_devices(config: RunConfig, devices: int, processes: int) -> None:
    if config.batch_size % (devices * config.augmult):
        raise ConfigError(
            f"batch_size: {config.batch_size} does not divide among {devices} devices with augmult={config.augmult} views of an"
            f" example on one; allowed: multiples of {devices * config.augmult}"
        )
    own = config.unique_per_step // processes
    if (config.mixup_alpha or config.cutmix) and own % 2:
        raise ConfigError(
            f"batch_size: {own} examples a step in each of {processes} processes can't be mixed in pairs; allowed: even numbers"
        )


def _refuse_other(config: RunConfig, out_dir: Path) -> None:
    params = out_dir / PARAMS
    if (out_dir / STOP).is_dir():
        raise ConfigError(f"out_dir: {out_dir / STOP} is a folder; a file of this name asks a run to stop")
    if params.exists():
        try:
            before = json.loads(params.read_text())
            if not isinstance(before, dict):
                raise ValueError(f"it holds {type(before).__name__}, not an object")
        except ValueError as error:
            raise ConfigError(f"out_dir: {params} is damaged ({error}); remove it to go on: checkpoints say whose they are")\
                from None
        now = config.model_dump(mode="json")
        for name in sorted(set(before) | set(now)):
            if before.get(name) != now.get(name):
                raise ConfigError(
                    f"{name}: {now.get(name)!r}, but {out_dir.name} holds a run with {before.get(name)!r}; "
                    "choose another output folder"
                )
    if (out_dir / SUMMARY).exists() and read_summary(out_dir)["config_hash"] != config.config_hash:
        raise ConfigError(f"out_dir: {out_dir.name} holds a finished run of other parameters; choose another output folder")


def _compilation_cache(folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _spread(points: int, steps: int) -> set[int]:
    """At most `points` step numbers, evenly spread, the last one `steps`."""
    return {round((i + 1) * steps / min(points, steps)) for i in range(min(points, steps))}


def _progress(config: RunConfig, begin: int, shown: bool):
    from tqdm.auto import tqdm

    return tqdm(
        total=config.steps * config.batch_size, initial=begin * config.batch_size, unit="img", unit_scale=True,
        desc=config.variant, disable=not shown, mininterval=1.0,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """`python -m nfnet_lib.train params.yaml --out DIR`; exit codes 0 done, 1 bad data, no memory or a full disk,
    2 bad input, 3 diverged, 75 stopped."""
    import argparse

    from nfnet_lib.strict_yaml import read_mapping

    parser = argparse.ArgumentParser(prog="python -m nfnet_lib.train", description="Train one run, or resume it.")
    parser.add_argument("params", type=Path, help="YAML or JSON file of flat parameters")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--cache-dir", type=Path, help="compiled programs and rendered images, shared by runs")
    parser.add_argument("--distributed", action="store_true", help="one of several processes, found by themselves (TPU pods,"
                        " Slurm, Open MPI, Kubernetes) or told by JAX_COORDINATOR_ADDRESS and its like")  # fmt: skip
    parser.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="of several processes, where the first is"
    )
    parser.add_argument("--processes", type=int, default=0, help="with --coordinator: how many")
    parser.add_argument("--process-id", type=int, default=-1, help="with --coordinator: which this one is, from 0")
    arguments = parser.parse_args(argv)
    if not arguments.coordinator and (arguments.processes or arguments.process_id >= 0):
        parser.error("--processes and --process-id need --coordinator")
    try:
        if arguments.distributed or arguments.coordinator:
            distributed.start(arguments.coordinator, arguments.processes, arguments.process_id)
        config = config_from_params(read_mapping(arguments.params, "params"))
        summary = run(config, arguments.out, cache_dir=arguments.cache_dir)
    except (ConfigError, RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if no_room(error) else 2
    except LoaderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        what = (str(error).splitlines() or ["out of memory"])[0]
        print(f"error: {what} A smaller batch_size or resolution needs less.", file=sys.stderr)
        return 1
    except NonFiniteLoss as error:
        if distributed.is_primary():
            write_json(arguments.out / FAILURE, {"error": str(error), "diverged": True})
        print(f"error: {error}", file=sys.stderr)
        return 3
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 75
    print(f"held-out loss {summary['heldout_loss']:.4f}, top-1 {summary['heldout_top1']:.1%}: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
