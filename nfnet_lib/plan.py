"""What a training step costs on a TPU, asked of the TPU's own compiler on a machine without one.

libtpu (the [plan] extra) compiles ahead of time for a named topology and writes into the optimised program how many cycles
it expects of every instruction. Those are estimates; `calibration` sets them beside published times.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nfnet_lib import models
from nfnet_lib.config import ConfigError
from nfnet_lib.convolution import for_backend
from nfnet_lib.files import write_json
from nfnet_lib.loader import Examples
from nfnet_lib.optim import make_adamw, make_optimizer
from nfnet_lib.sharding import batch_sharding, make_mesh, replicated, state_shardings
from nfnet_lib.step import Schedule, init_state, train_step
from nfnet_lib.tpus import parse_topology

# libtpu looks for a TPU machine's metadata unless told not to; none of this reaches other processes.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v4-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
LEAN = {"remat": "by_stage"}  # of `models.create`: what costs fewest cycles on TPU v4 (LOG.md)


class Estimate(NamedTuple):
    """The compiler's view of one step on one device: estimated_cycles, and bytes of memory by what needs them."""

    cycles: float
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    program: int

    def line(self, clock: float, memory: float) -> str:
        """The compiler's view in words; clock in Hz, memory in bytes of a device."""
        return (
            f"the compiler's estimate: {self.cycles / 1e6:.1f}M cycles, {self.cycles / clock * 1e3:.1f} ms a step;"
            f" {self.peak / 2**30:.1f} of {memory / 2**30:.0f} GiB, {self.temporaries / 2**30:.1f} of them temporary"
        )

    @property
    def peak(self) -> int:
        """Bytes of memory that the step needs: state and batch, temporaries, and what of the outputs is not in place."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


def devices_of(topology: str, *, megacore: bool = True) -> list:
    """The devices of a TPU topology such as "v4:2x2x1". megacore: of v4 and v5p, chips as `jax.devices()` shows them there.

    ConfigError for a topology that the compiler does not know, or without libtpu.
    """
    parse_topology(topology)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore" if megacore else "default"} if topology.startswith("v4") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # libtpu and the plugin loader raise kinds of their own
        text = str(error).splitlines()[0][:300]
        hint = "is it one of the TPU's?" if importlib.util.find_spec("libtpu") else "install the [plan] extra"
        raise ConfigError(f"topology: {topology!r} can't be compiled for ({hint}): {text}") from None


def compile_train_step(
    variant: str, *, topology: str, global_batch: int, num_classes: int = 1000, megacore: bool = True, resolution: int = 224,
    dtype: str = "bfloat16", sharding: str = "fsdp", rho: float = 0.0, ascent_fraction: float = 1.0,
    compiler_options: dict[str, Any] | None = None, **settings: Any,
) -> jax.stages.Compiled:  # fmt: skip
    """The training step of a variant compiled for a TPU topology: SGD with AGC (ViTs: AdamW), float32 parameters.

    settings: of `models.create` (remat, unroll, ...), by default LEAN. ConfigError for a batch that the devices do
    not divide and for topologies that the compiler does not know; jax's own error where a step does not fit the memory.
    """
    mesh = make_mesh(devices_of(topology, megacore=megacore))
    if global_batch % mesh.size:
        raise ConfigError(f"global_batch: {global_batch} does not divide among the {mesh.size} devices of {topology}")
    return lower_train_step(
        variant, mesh, global_batch, num_classes=num_classes, resolution=resolution, dtype=dtype, sharding=sharding, rho=rho,
        ascent_fraction=ascent_fraction, **settings,
    ).compile(compiler_options=compiler_options)  # fmt: skip


def lower_train_step(
    variant: str, mesh: Mesh, global_batch: int, *, num_classes: int, resolution: int, dtype: str, sharding: str, rho: float,
    ascent_fraction: float, **settings: Any,
) -> jax.stages.Lowered:  # fmt: skip
    """The step of `compile_train_step` for the devices of a mesh, not yet compiled."""
    model = models.create(variant, num_classes, dtype=jnp.dtype(dtype), **LEAN | settings)
    optimizer = make_optimizer(weight_decay=1e-6) if model.variant.family == "NFNet" else make_adamw(weight_decay=1e-6)
    shared, split = replicated(mesh), batch_sharding(mesh)

    def shape(size: tuple[int, ...], kind: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, kind, sharding=where)

    key = jax.eval_shape(jax.random.key, 0)
    key = shape(key.shape, key.dtype, shared)
    state = jax.eval_shape(functools.partial(init_state, model, optimizer, ema=False), key)
    placed = state_shardings(mesh, state, sharding)
    state = jax.tree.map(lambda leaf, where: shape(leaf.shape, leaf.dtype, where), state, placed)
    schedule = Schedule(*(shape((), kind, shared) for kind in (jnp.float32, jnp.int32, jnp.int32)))
    examples = Examples(
        shape((global_batch, resolution, resolution, 3), jnp.uint8, split), shape((global_batch, 1), jnp.int32, split),
        shape((global_batch, 1), jnp.float32, split), shape((global_batch,), jnp.float32, split),
    )  # fmt: skip
    step = functools.partial(
        train_step, model=model, optimizer=optimizer, loss="softmax", label_smoothing=0.0, rho=rho,
        ascent_fraction=ascent_fraction, ema_decay=0.0, mesh=mesh, per_device=True, placed=placed.params,
    )  # fmt: skip
    with for_backend("tpu"):
        return jax.jit(step, donate_argnums=0, out_shardings=(placed, shared)).lower(state, examples, schedule, key)


def cached_estimate(variant: str, cache_dir: str | os.PathLike, **request: Any) -> Estimate:
    """`estimate` of `compile_train_step(variant, **request)`, asked once for a request, library version and code."""
    from importlib.metadata import PackageNotFoundError, version

    def found(package: str) -> str:
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
        return ""

    source = hashlib.sha256()
    for name in ("nfnet", "convolution", "kept", "remat", "vit", "models", "step", "agc", "sam", "optim", "losses", "plan"):
        source.update((Path(__file__).parent / f"{name}.py").read_bytes())
    key = {"variant": variant, **request, "jax": found("jax"), "libtpu": found("libtpu"), "source": source.hexdigest()}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"{variant.replace('/', '-')}_{digest}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return Estimate(**json.loads(path.read_text())["estimate"])
    made = estimate(compile_train_step(variant, **request))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"request": key, "estimate": made._asdict()})
    return made


def estimate(compiled: jax.stages.Compiled) -> Estimate:
    """The compiler's figures of a program for one device."""
    memory = compiled.memory_analysis()
    return Estimate(
        estimated_cycles(compiled.as_text()), memory.argument_size_in_bytes, memory.output_size_in_bytes,
        memory.alias_size_in_bytes, memory.temp_size_in_bytes, memory.generated_code_size_in_bytes,
    )  # fmt: skip


def estimated_cycles(program: str) -> float:
    """Sum of `estimated_cycles` over an optimised HLO program, loop bodies as often as they are run.

    A fusion's cycles stand at the call; computations it calls are not counted again.
    """
    computations, entry = _computations(program)

    @functools.cache
    def cycles(name: str) -> float:
        total = 0.0
        for line in computations.get(name, ()):
            if found := re.search(r'"estimated_cycles":"?(\d+)', line):
                total += float(found[1])
            if " while(" in line:
                body = re.search(r"body=%?([\w.\-]+)", line)[1]
                condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
                total += _trip_count(line, computations.get(condition, ())) * (cycles(body) + cycles(condition))
            elif " conditional(" in line:
                branches = re.search(r"branch_computations=\{([^}]*)\}", line)
                names = (
                    re.findall(r"%?([\w.\-]+)", branches[1])
                    if branches
                    else re.findall(r"_computation=%?([\w.\-]+)", line)
                )
                total += max(map(cycles, names), default=0.0)
            elif " call(" in line and (called := re.search(r"to_apply=%?([\w.\-]+)", line)):
                total += cycles(called[1])
        return total

    return cycles(entry)


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """{name: lines} of an HLO module's computations, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line) if line and not line[0].isspace() else None
        if head and not line.startswith("HloModule"):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def _trip_count(line: str, condition: tuple | list) -> int:
    """How often a while loop runs: what the compiler knows, or the constant that its condition compares with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    constants = [int(n) for text in condition for n in re.findall(r"constant\((\d+)\)", text)]
    return max(constants, default=1)
