"""One TPU slice a cell, on a Ray cluster: each run starts on every host of the slice, and the cell's notebook reads the record.

The only file that uses Ray's slice placement, which Ray calls alpha. Never run on real TPUs: tested on a cluster of
nodes on one machine that carry the labels and resources of TPU hosts (tests/test_ray.py).
"""

import contextlib
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nfnet_lib import PROJECT
from nfnet_lib.cell import NO_COLOURS, CellFailed, CellStopped, cell_dir, with_retries
from nfnet_lib.config import ConfigError, RunConfig
from nfnet_lib.files import write_json
from nfnet_lib.notebook_process import end_with
from nfnet_lib.tuning import missing_run

DIVERGED, STOPPED = 3, 75  # exit codes of train.main
OTHERS_SECONDS = 120  # that the other hosts of a run that failed on one get to end


def on_slice(
    tpu_slice: str, function: Callable, config: RunConfig, study_dir: Path, *, cores: Sequence[int] = (), **options: Any
) -> Any:
    """Make the runs that a cell lacks on a slice of its own, then `function`, cell.run_cell, which finds them done.

    tpu_slice: "v4:2x2x4". Waits for a free slice. CellFailed and CellStopped as from run_cell, a slice of which a host was lost
    is given back for another up to `retries` times; ConfigError for a slice that TPUs of that generation don't come in.
    """
    lr_grid = options.get("lr_grid", ())

    def attempt() -> None:
        with _reserved(tpu_slice) as placement:
            while (run := missing_run(config, list(lr_grid), study_dir)) is not None:
                _train(placement, run, study_dir, options.get("timeout"), options.get("platform", "tpu"))

    folder = cell_dir(config, study_dir, lr_grid)
    with_retries(attempt, options.get("retries", 0), folder, searched=bool(lr_grid))
    return function(config, study_dir, **options | {"platform": "cpu"}, cores=cores)


@contextlib.contextmanager
def _reserved(tpu_slice: str) -> Iterator[Any]:
    from ray.util.tpu import SlicePlacementGroup

    generation, _, topology = tpu_slice.partition(":")
    try:
        placement = SlicePlacementGroup(
            topology=topology, accelerator_version=generation, strategy="STRICT_SPREAD", head_reservation_timeout_s=None
        )
    except ValueError as error:
        raise ConfigError(f"tpu_slice: {tpu_slice!r}: {error}") from None
    try:
        yield placement
    finally:
        placement.shutdown()


def _train(placement: Any, config: RunConfig, study_dir: Path, timeout: float | int | None, platform: str) -> None:
    """One run, a process on each host of the slice."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    folder = study_dir / config.run_id
    folder.mkdir(parents=True, exist_ok=True)
    params = folder / ".slice_params.json"
    write_json(params, config.model_dump(mode="json"))

    def on_host(index: int, function: Callable, *arguments: Any):
        strategy = PlacementGroupSchedulingStrategy(placement.placement_group, placement_group_bundle_index=index)
        chips = {name: count for name, count in placement.bundle_resources.items() if name != "CPU"}  # has its own argument
        task = ray.remote(function).options(num_cpus=0, resources=chips, scheduling_strategy=strategy, max_retries=0)
        return task.remote(*arguments)

    ray.get(placement.placement_group.ready())
    coordinator, hosts = ray.get(on_host(0, _free_address)), placement.num_hosts
    tasks = [
        on_host(i, _host, params, folder, coordinator, hosts, i, timeout, os.environ.get("JAX_PLATFORMS", platform))
        for i in range(hosts)
    ]
    results, errors, waiting = [], [], tasks
    # Without a host the others fail as well, and often sooner than Ray misses it: all are waited for, so that it is known.
    while waiting and not any(getattr(error, "lost", False) for error in errors):
        ended, waiting = ray.wait(waiting, timeout=OTHERS_SECONDS if errors else None)
        if not ended:
            break
        try:
            results += ray.get(ended)
        except ray.exceptions.RayTaskError as error:
            errors.append(getattr(error, "cause", error))
        except ray.exceptions.RayError as error:
            errors.append(CellFailed(f"a host of the slice was lost: {type(error).__name__}", str(error), lost=True))
    if errors:
        raise max(errors, key=lambda error: getattr(error, "lost", False))
    if STOPPED in results:
        raise CellStopped(f"{config.run_id} was stopped")
    params.unlink()


def _free_address() -> str:
    """HOST:PORT of this machine on which nothing listens."""
    import ray

    host = ray.util.get_node_ip_address()
    with socket.socket() as listener:
        listener.bind((host, 0))
        return f"{host}:{listener.getsockname()[1]}"


def _host(
    params: Path, folder: Path, coordinator: str, hosts: int, index: int, timeout: float | int | None, platform: str
) -> int:
    """This host's process of a run: its exit code, 0, DIVERGED or STOPPED; CellFailed for any other."""
    log = folder / f"host{index}.log"
    command = [
        sys.executable, "-m", "nfnet_lib.train", str(params), "--out", str(folder),
        "--cache-dir", str(folder.parent / ".cache"),
        "--coordinator", coordinator, "--processes", str(hosts), "--process-id", str(index),
    ]  # fmt: skip

    with log.open("w") as stream:
        try:
            code = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, cwd=PROJECT, timeout=timeout,
                preexec_fn=functools.partial(end_with, os.getpid()),
                env=os.environ | NO_COLOURS | {"JAX_PLATFORMS": platform}, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            raise CellFailed(f"{folder.name} took longer than {timeout / 60:g} minutes", log.read_text()) from None
    if code not in (0, DIVERGED, STOPPED):
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        raise CellFailed(lines[-1][:500] if lines else f"exit code {code}", "\n".join(lines), lost=code < 0)
    return code
