"""What a finished run's summary says: results, cost by stated conventions, and where and from what they were made."""

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from nfnet_lib import PROJECT, distributed, flops, paper
from nfnet_lib.config import RunConfig
from nfnet_lib.records import SCHEMA, sealed

_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy",
    "simplejpeg", "pillow", "opencv-python-headless",  # what makes pixels of bytes
)  # fmt: skip


def summary(
    config: RunConfig, num_classes: int, results: dict[str, Any], *, started: str, seconds: float, compile_seconds: float,
    wall_seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """The summary of a run with these results. seconds: of training, all processes at once, compilation apart."""
    variant = config.architecture
    macs = flops.forward_macs(variant, config.resolution, num_classes, config.bottleneck_rule)
    images_seen = config.steps * config.batch_size
    total = flops.train_flops(macs, images_seen, config.rho, config.ascent_fraction)
    own = len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else jax.local_device_count()
    cores = sum(distributed.gathered(own))
    return sealed({
        "schema": SCHEMA, "run_id": config.run_id, "cell_id": config.cell_id, "kind": config.kind, "status": "done",
        "config": config.model_dump(mode="json"), "config_hash": config.config_hash,
        "num_params": flops.num_params(variant, num_classes, config.bottleneck_rule, config.resolution),
        "forward_macs": macs, "train_flops": total, "steps": config.steps, "images_seen": images_seen,
        "examples_drawn": config.steps * config.unique_per_step, "seconds": seconds,
        "compile_seconds": compile_seconds, "wall_seconds": wall_seconds,
        "images_per_second": images_seen / seconds, "core_hours": seconds * cores / 3600,
        "tpu_v4_core_hours": float(paper.tpu_v4_core_hours(total)), **results,
        "device_kind": jax.devices()[0].device_kind, "device_count": jax.device_count(),
        "process_count": jax.process_count(), "platform": jax.default_backend(), "host_cores": cores,
        "processor": processor(),
        "versions": _versions(), **_CODE, "started_at": started, "finished_at": now(),
    })  # fmt: skip


def environment() -> dict[str, str]:
    """What can differ between the legs of a run and change its last digits: versions, devices, processes; of a run on CPUs the
    processor, for which XLA writes other code, and how many of its cores share a sum."""
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    found = _versions() | {"devices": devices, "processes": str(jax.process_count())}
    if jax.default_backend() == "cpu":
        found |= {"processor": processor(), "cores": str(len(os.sched_getaffinity(0)))}
    return found


def processor() -> str:
    """What the processor calls itself, or else its architecture."""
    try:
        named = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def changes(before: dict[str, str], after: dict[str, str], step: int) -> list[str]:
    """One sentence for each difference between two `environment`s in what both of them say."""
    names = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    return [f"step {step}: {name} {before[name]} before, {after[name]} now" for name in names]


def now() -> str:
    """This moment, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": sys.version.split()[0]} | {name: version(name) for name in _PACKAGES}


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


_CODE = _git()  # of what is imported here: the files may be others when a run ends
