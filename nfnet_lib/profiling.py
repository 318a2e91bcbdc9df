"""Where a training step's time goes: the steps of a run's own program, traced by jax.profiler, by part of the network.

Read from the trace of the device (every operation of the compiled step, on each of its threads or streams) and from the
operations' names, which say what part of the model and which pass they come from (`jax.named_scope`).
"""

import bisect
import glob
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from nfnet_lib import flops
from nfnet_lib.config import ConfigError, RunConfig
from nfnet_lib.loader import Examples
from nfnet_lib.program import PROGRAM_PARAMETERS, programs

PARTS = ("input", "weights", "stem", "stage0", "stage1", "stage2", "stage3", "blocks", "head", "loss", "optimizer")
PASSES = ("forward", "recomputed", "backward", "update")
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)


class StepProfile(NamedTuple):
    """operations: a row for each operation of the step with part, pass, what, calls and ms (a step's, of one thread's time).

    step_ms: median time of a step without the profiler. matmul_flops: a second, of a large matrix product in the run's type.
    """

    config: RunConfig
    operations: pd.DataFrame
    step_ms: float
    matmul_flops: float

    def by_part(self) -> pd.DataFrame:
        """Share of the traced time by part and pass, in percent, in the network's order; "all" is the sum."""
        table = self.operations.pivot_table(index="part", columns="pass", values="ms", aggfunc="sum", fill_value=0.0)
        table = table.reindex([*(part for part in PARTS if part in table.index), *sorted(set(table.index) - {*PARTS})])
        table = table[[name for name in PASSES if name in table]]
        table = table.assign(all=table.sum(axis=1))
        return 100 * table / table["all"].sum()

    def slowest(self, count: int = 12) -> pd.DataFrame:
        """The operations that take longest, of each the share in percent of the traced time."""
        table = self.operations.assign(share=100 * self.operations["ms"] / self.operations["ms"].sum())
        return table.nlargest(count, "ms").reset_index(drop=True)

    def sentence(self) -> str:
        """Images/s, and FLOP/s beside those of a matrix product."""
        config = self.config
        step = flops.train_flops(flops.run_macs(config), config.batch_size, config.rho, config.ascent_fraction)
        rate = step / self.step_ms * 1e3
        return (
            f"{config.variant}, {config.batch_size} views of {config.resolution} px, {config.dtype},"
            f" {jax.devices()[0].device_kind}: {self.step_ms:.1f} ms a step, {config.batch_size / self.step_ms * 1e3:.0f}"
            f" images/s; {rate / 1e9:,.0f} GFLOP/s of the network's own are {100 * rate / self.matmul_flops:.0f}% of what a"
            f" large matrix product reaches here ({self.matmul_flops / 1e9:,.0f} GFLOP/s)"
        )


def profile_step(config: RunConfig, *, steps: int = 5, trace_dir: str | Path | None = None) -> StepProfile:
    """Compile the step of `config`, time it, and trace `steps` of them on random pictures.

    trace_dir: keeps the trace there, for TensorBoard or Perfetto. ConfigError where steps is not positive, or where the
    device leaves no trace of its operations.
    """
    if steps < 1:
        raise ConfigError(f"steps: {steps} is not positive")
    from nfnet_lib.data import load_sources

    classes = load_sources(config)[0].num_classes
    program = programs(
        tuple((name, getattr(config, name)) for name in PROGRAM_PARAMETERS), tuple(config.model_settings.items()),
        classes, (1, 1), config.batch_size,
    )  # fmt: skip
    key, noise_key = program.keys(config.seed)
    schedule = program.schedule(config.peak_lr, config.warmup_steps, config.steps)
    rng, shape = np.random.default_rng(0), (config.batch_size, config.resolution, config.resolution, 3)
    examples = program.place_batch(
        Examples(
            rng.integers(0, 256, shape, np.uint8), rng.integers(0, classes, (config.batch_size, 1), np.int32),
            np.ones((config.batch_size, 1), np.float32), np.ones(config.batch_size, np.float32),
        )
    )  # fmt: skip
    state, seconds = program.init(key), []
    program.evaluation.wait()  # or its compilation would be in the figures
    for _ in range(2 + max(steps, 5)):
        began = time.perf_counter()
        state, metrics = program.step(state, examples, schedule, noise_key)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(trace_dir or temporary)
        with jax.profiler.trace(str(folder)):
            for _ in range(steps):
                state, metrics = program.step(state, examples, schedule, noise_key)
                jax.block_until_ready(metrics)
        newest = max(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True), key=lambda path: Path(path).stat().st_mtime)
        events = list(_events(jax.profiler.ProfileData.from_file(newest), "jit_train_step"))
    if not events:
        raise ConfigError(f"profile: no operation of the step is in the trace of {jax.devices()[0].device_kind}")
    operations = operation_table(events, program.step.wait().as_text(), steps)
    config = config.model_copy(update={"num_classes": classes})  # of the program
    return StepProfile(config, operations, float(np.median(seconds[2:])) * 1e3, _matmul_flops(jnp.dtype(config.dtype)))


def operation_table(
    events: Iterable[tuple[str, int, float, float]], program_text: str, steps: int
) -> pd.DataFrame:
    """Of (operation, thread, start, duration in ns): calls and ms a step of each, without the time of those within it.

    program_text: of the compiled step, in which the operations' names say where they come from.
    """
    origin = dict(_INSTRUCTION.findall(program_text))
    calls: dict[str, int] = defaultdict(int)
    nanoseconds: dict[str, float] = defaultdict(float)
    threads: dict[int, list] = defaultdict(list)
    for event in events:
        threads[event[1]].append(event)
    for own in threads.values():
        own.sort(key=lambda event: (event[2], -event[3]))
        starts = [event[2] for event in own]
        for index, (name, _, start, duration) in enumerate(own):
            calls[name] += 1
            nanoseconds[name] += duration
            inner, end = index + 1, bisect.bisect_left(starts, start + duration, index + 1)
            while inner < end:  # direct children only: each skips what lies within itself
                nanoseconds[name] -= own[inner][3]
                inner = bisect.bisect_left(starts, own[inner][2] + own[inner][3], inner + 1)
    rows = [
        {"operation": name, "what": origin.get(name, "").rpartition("/")[2], "part": part_of(origin.get(name, "")),
         "pass": pass_of(origin.get(name, "")), "calls": calls[name] / steps, "ms": nanoseconds[name] / steps / 1e6}
        for name in calls
    ]  # fmt: skip
    return pd.DataFrame(rows).sort_values("ms", ascending=False, ignore_index=True)


def part_of(op_name: str) -> str:
    """The part of the step that an operation comes from, of PARTS, or "other". Weight standardisation anywhere is "weights"."""
    words = re.split(r"[/()]", op_name)
    return "weights" if "weights" in words else next((word for word in words if word in PARTS), "other")


def pass_of(op_name: str) -> str:
    """Of PASSES. An operation that is in no derivative and not in a part of the network belongs to the update.

    "recomputed" is what jax.checkpoint computes again; what `remat.scan_recomputing` does is in the loop of "backward".
    """
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if part_of(op_name) not in ("optimizer", "other") else "update"


def _events(data: "jax.profiler.ProfileData", module: str) -> Iterable[tuple[str, int, float, float]]:
    """(operation, thread, start, duration in ns) of everything traced that belongs to a program of this name."""
    thread = 0
    for plane in data.planes:
        for line in plane.lines:
            thread += 1
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and str(stats.get("hlo_module", module)).startswith(module):
                    yield str(stats["hlo_op"]), thread, event.start_ns, event.duration_ns


def _matmul_flops(dtype: np.dtype, side: int = 2048) -> float:
    """FLOP/s of the best of a few products of two large square matrices."""
    a = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)
