"""The compiled programs of a run, made ahead of time and shared by the runs of a learning-rate search."""

import concurrent.futures
import contextlib
import contextvars
import ctypes
import functools
import gc
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from nfnet_lib import compiler, distributed, models, program_store
from nfnet_lib.config import RunConfig
from nfnet_lib.data import Quarantine
from nfnet_lib.loader import Examples, LoaderError, eval_batches
from nfnet_lib.optim import make_adamw, make_optimizer
from nfnet_lib.sharding import batch_sharding, make_mesh, place, replicated, state_shardings
from nfnet_lib.sources import Source, original_id
from nfnet_lib.step import Schedule, TrainState, eval_step, init_state, means_of, train_step

EVAL_BATCH = 128

# What a compiled program depends on; everything else of a config is data to it.
PROGRAM_PARAMETERS = (
    "variant", "drop_rate", "stochdepth_rate", "dtype", "unroll", "remat", "batch_size", "resolution", "eval_resolution",
    "loss", "head_bias", "optimizer", "momentum", "adam_b2", "grad_clip", "weight_decay", "agc_clip", "agc_eps",
    "label_smoothing", "rho", "ascent_fraction", "sam_perturbation", "ema_decay", "sharding",
)  # fmt: skip


class Program:
    """A compiled function that may still be in the making: a call waits for it. One after another in three threads: while one
    program is compiled the next is traced, and the one before is kept.

    kept: where it is kept for other processes (`program_store`), or None. soon: of `compiler.options`.
    """

    _tracer = concurrent.futures.ThreadPoolExecutor(1, "tracer")
    _compiler = concurrent.futures.ThreadPoolExecutor(1, "compiler")
    _keeper = concurrent.futures.ThreadPoolExecutor(1, "keeper")

    def __init__(self, kept: Path | None, soon: bool, function, *arguments):
        self._kept, self._soon = kept, soon
        self._found = self._tracer.submit(contextvars.copy_context().run, self._find, function, *arguments)

    def __call__(self, *arguments):
        return self.wait()(*arguments)

    def wait(self) -> jax.stages.Compiled:
        """The compiled function, or what tracing or the compiler raised."""
        found = self._found.result()
        return found.result() if isinstance(found, concurrent.futures.Future) else found

    def _find(self, function, *arguments) -> jax.stages.Compiled | concurrent.futures.Future:
        """Kept from before, or what the compiler will make."""
        if self._kept is not None and (program := program_store.load(self._kept)) is not None:
            return program
        with _no_garbage_collected():
            lowered = function.lower(*arguments)
        return self._compiler.submit(contextvars.copy_context().run, self._compile, lowered)

    def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        program, new = program_store.compiled(lowered, compiler.options(self._soon))
        self._keeper.submit(self._tidy, program if new else None)
        return program

    @classmethod
    def all_kept(cls) -> None:
        """Wait until what was compiled is kept: a process may end without its threads."""
        cls._keeper.submit(lambda: None).result()

    def _tidy(self, program: jax.stages.Compiled | None) -> None:
        """Keep a new program, and hand back the gigabytes that the compiler frees and glibc does not (LOG.md)."""
        if program is not None and self._kept is not None:
            program_store.keep(program, self._kept)
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Of Python's cycles: a quarter of tracing's time went to looking through what it makes (LOG.md)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Programs(NamedTuple):
    """init(key), step(state, examples, schedule, key) and evaluation(params, examples), and where their arrays lie.

    They are compiled in this order while the caller opens its data and, in the end, trains.
    """

    mesh: Mesh
    state_shardings: Any
    init: Program
    step: Program
    evaluation: Program
    eval_batch: int

    def keys(self, seed: int) -> tuple[Array, Array]:
        """The keys of a run's initialisation and of its noise, on every device."""
        return _key_maker(self.mesh)(np.uint32(seed))

    def schedule(self, peak_lr: float, warmup_steps: int, steps: int) -> Schedule:
        """A run's schedule, on every device."""
        values = Schedule(np.float32(peak_lr), np.int32(warmup_steps), np.int32(steps))
        return place(values, Schedule(*[replicated(self.mesh)] * 3))

    def place_batch(self, examples: Examples) -> Examples:
        """This process's part of a batch, split among its devices."""
        if jax.process_count() == 1:
            if self.mesh.size == 1 and jax.default_backend() == "cpu":  # the call itself takes arrays of the host sooner
                return examples
            return jax.device_put(examples, batch_sharding(self.mesh))
        put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(self.mesh))
        return jax.tree.map(put, examples)

    def place_state(self, state: TrainState) -> TrainState:
        """A training state of the host, as the step wants it."""
        return place(state, self.state_shardings)

    def place_params(self, params: PyTree) -> PyTree:
        """Parameters of the host, as evaluation wants them."""
        return place(params, self.state_shardings.params)


@functools.lru_cache(maxsize=1)
def _key_maker(mesh: Mesh):
    """Compiled once: a process may make thousands of runs."""
    return jax.jit(lambda seed: tuple(jax.random.split(jax.random.key(seed))), out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=1)
def programs(values: tuple, settings: tuple, num_classes: int, labels: tuple[int, int], eval_batch: int) -> Programs:
    """The programs of a run on all devices, shared by the runs of a search.

    values: of PROGRAM_PARAMETERS, by name; settings: of `models.create`. labels: an example's, in training and evaluation.
    """
    config, mesh = types.SimpleNamespace(**dict(values)), make_mesh()
    model = models.create(
        config.variant, num_classes, drop_rate=config.drop_rate, stochdepth_rate=config.stochdepth_rate,
        dtype=jnp.dtype(config.dtype), unroll=config.unroll, remat=config.remat, **dict(settings),
    )  # fmt: skip
    if config.optimizer == "adamw":
        optimizer = make_adamw(
            b1=config.momentum, b2=config.adam_b2, weight_decay=config.weight_decay, grad_clip=config.grad_clip
        )
    else:
        optimizer = make_optimizer(
            momentum=config.momentum, weight_decay=config.weight_decay, agc_clip=config.agc_clip, agc_eps=config.agc_eps
        )

    def shapes(tree: PyTree, shardings: PyTree) -> PyTree:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def batch(size: int, side: int, labels: int) -> Examples:
        examples = Examples(
            jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8), jax.ShapeDtypeStruct((size, labels), jnp.int32),
            jax.ShapeDtypeStruct((size, labels), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.float32),
        )  # fmt: skip
        return shapes(examples, Examples(*[batch_sharding(mesh)] * len(examples)))

    shared = replicated(mesh)
    key = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=shared)
    schedule = Schedule(
        *(jax.ShapeDtypeStruct((), dtype, sharding=shared) for dtype in (jnp.float32, jnp.int32, jnp.int32))
    )
    init = functools.partial(init_state, model, optimizer, ema=config.ema_decay > 0, head_bias=config.head_bias)
    state = jax.eval_shape(init, key)
    placed = state_shardings(mesh, state, config.sharding)
    state = shapes(state, placed)
    step = functools.partial(
        train_step, model=model, optimizer=optimizer, loss=config.loss, label_smoothing=config.label_smoothing,
        rho=config.rho, ascent_fraction=config.ascent_fraction, ema_decay=config.ema_decay, mesh=mesh,
        per_device=config.sam_perturbation == "per_device", placed=placed.params if mesh.size > 1 else None,
    )  # fmt: skip
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, shared))
    evaluation = jax.jit(functools.partial(eval_step, model=model, loss=config.loss), out_shardings=shared)

    def program(name: str, function, *arguments) -> Program:
        made_from = (values, settings, num_classes, labels, eval_batch)
        return Program(program_store.path_of(name, made_from), name != "step" or config.rho > 0, function, *arguments)

    return Programs(
        mesh, placed, program("init", jax.jit(init, out_shardings=placed), key),
        program("step", step, state, batch(config.batch_size, config.resolution, labels[0]), schedule, key),
        program("evaluation", evaluation, state.params, batch(eval_batch, config.eval_resolution, labels[1])), eval_batch,
    )  # fmt: skip


def evaluate(
    program: Programs, config: RunConfig, source: Source, quarantine: Quarantine, params: PyTree, split: str
) -> dict[str, float]:
    """{"<split>_loss", "_top1", "_top5", "_ece"}, each example that can be read counted once, over all processes.

    LoaderError where more than the config's max_bad_fraction can't be read, or none can.
    """
    totals: dict[str, np.ndarray] = {}
    read, lost, expected = 0, 0, 0.0
    for batch in eval_batches(
        source, batch_size=program.eval_batch, resolution=config.eval_resolution, margin=config.eval_margin,
        squash=config.architecture.squash, workers=config.loader_workers, on_bad=config.on_bad,
        normalise_labels=config.loss == "softmax", process_index=jax.process_index(), process_count=jax.process_count(),
    ):  # fmt: skip
        sums = jax.device_get(program.evaluation(params, program.place_batch(batch.examples)))
        totals = {name: totals.get(name, 0.0) + np.asarray(value, np.float64) for name, value in sums.items()}
        read, lost, expected = read + len(batch.ids), lost + len(batch.bad), expected + float(batch.weights.sum())
        bad = tuple(example._replace(id=original_id(source, example.id)) for example in batch.bad)
        quarantine.add(bad, "heldout" if split == "heldout" else "train")
    read, lost, expected = (sum(values) for values in zip(*distributed.gathered([read, lost, expected]), strict=True))
    if lost > max(1, config.max_bad_fraction * len(source)):  # a number of what is left would pass for one of all
        raise LoaderError(
            f"max_bad_fraction: {lost} of {len(source)} {split} examples can't be read, more than {config.max_bad_fraction:g};"
            " once they can, the same run goes on from its last checkpoint"
        )
    if not expected:
        raise LoaderError(f"{source.name}: none of {len(source)} {split} examples has a label that can be read")
    if read != len(source) or totals["examples"] != expected:
        raise RuntimeError(f"evaluated {totals['examples']:g} of {expected:g} examples, {read} of {len(source)} read")
    return {f"{split}_{name}": value for name, value in means_of(totals).items()}
