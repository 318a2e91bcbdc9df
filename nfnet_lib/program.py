"""The compiled programs of a run, made ahead of time and shared by the runs of a learning-rate search."""

import contextlib
import ctypes
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from nfnet_lib import models
from nfnet_lib.config import RunConfig
from nfnet_lib.data import Quarantine
from nfnet_lib.loader import Examples, eval_batches
from nfnet_lib.optim import make_adamw, make_optimizer
from nfnet_lib.sources import Source
from nfnet_lib.step import Schedule, eval_step, init_state, train_step

EVAL_BATCH = 128

# What a compiled program depends on; everything else of a config is data to it.
PROGRAM_PARAMETERS = (
    "variant", "drop_rate", "stochdepth_rate", "dtype", "unroll", "batch_size", "resolution", "eval_resolution",
    "loss", "head_bias", "optimizer", "momentum", "adam_b2", "grad_clip", "weight_decay", "agc_clip", "agc_eps",
    "label_smoothing", "rho", "ascent_fraction", "ema_decay",
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def programs(values: tuple, settings: tuple, num_classes: int, labels: tuple[int, int], eval_batch: int):
    """Compiled init(key), step(state, examples, schedule, key) and eval_step, shared by the runs of a search.

    values: of PROGRAM_PARAMETERS, by name; settings: of `models.create`. labels: an example's, in training and evaluation.
    """
    config = types.SimpleNamespace(**dict(values))
    model = models.create(
        config.variant, num_classes, drop_rate=config.drop_rate, stochdepth_rate=config.stochdepth_rate,
        dtype=jnp.dtype(config.dtype), unroll=config.unroll, **dict(settings),
    )  # fmt: skip
    if config.optimizer == "adamw":
        optimizer = make_adamw(
            b1=config.momentum, b2=config.adam_b2, weight_decay=config.weight_decay, grad_clip=config.grad_clip
        )
    else:
        optimizer = make_optimizer(
            momentum=config.momentum, weight_decay=config.weight_decay, agc_clip=config.agc_clip, agc_eps=config.agc_eps
        )
    key = jax.random.key(0)
    schedule = Schedule(jnp.float32(0), jnp.int32(0), jnp.int32(1))
    init = functools.partial(init_state, model, optimizer, ema=config.ema_decay > 0, head_bias=config.head_bias)
    init = _compiled(jax.jit(init), key)
    step = functools.partial(
        train_step, model=model, optimizer=optimizer, loss=config.loss, label_smoothing=config.label_smoothing,
        rho=config.rho, ascent_fraction=config.ascent_fraction, ema_decay=config.ema_decay,
    )  # fmt: skip

    def shapes(size: int, side: int, labels: int):
        return Examples(
            jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8), jax.ShapeDtypeStruct((size, labels), jnp.int32),
            jax.ShapeDtypeStruct((size, labels), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.float32),
        )  # fmt: skip

    examples = shapes(config.batch_size, config.resolution, labels[0])
    step = _compiled(jax.jit(step, donate_argnums=0), init.out_info, examples, schedule, key)
    examples = shapes(eval_batch, config.eval_resolution, labels[1])
    evaluation = jax.jit(functools.partial(eval_step, model=model, loss=config.loss))
    return init, step, _compiled(evaluation, model.param_shapes(), examples)


def _compiled(function, *arguments):
    """Compiled ahead of time. glibc keeps the gigabytes that the compiler frees (LOG.md): hand them back."""
    program = function.lower(*arguments).compile()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return program


def evaluate(compiled, config: RunConfig, source: Source, quarantine: Quarantine, params) -> dict[str, float]:
    """{"heldout_loss", "heldout_top1", "heldout_top5", "heldout_ece"}, each example that can be read counted once."""
    totals: dict[str, np.ndarray] = {}
    read, expected = 0, 0.0
    for batch in eval_batches(
        source, batch_size=min(EVAL_BATCH, len(source)), resolution=config.eval_resolution, margin=config.eval_margin,
        workers=config.loader_workers, on_bad=config.on_bad, normalise_labels=config.loss == "softmax",
    ):  # fmt: skip
        sums = jax.device_get(compiled(params, batch.examples))
        totals = {name: totals.get(name, 0.0) + np.asarray(value, np.float64) for name, value in sums.items()}
        read, expected = read + len(batch.ids), expected + float(batch.weights.sum())
        quarantine.add(batch.bad, "heldout")
    if read != len(source) or totals["examples"] != expected or not expected:
        raise RuntimeError(f"evaluated {totals['examples']:g} of {expected:g} examples, {read} of {len(source)} read")
    means = {f"heldout_{name}": float(totals[name] / totals["examples"]) for name in ("loss", "top1", "top5")}
    return means | {"heldout_ece": float(np.abs(totals["calibration"]).sum() / totals["examples"])}
