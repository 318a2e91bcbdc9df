"""TPU generations as data: peak arithmetic, memory and list prices of a chip, and what a topology's name says."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from nfnet_lib.config import ConfigError
from nfnet_lib.flops import forward_macs, num_params, train_flops
from nfnet_lib.kept import by_stage, encoder_bytes, kept_bytes
from nfnet_lib.variants import STAGE_STRIDES, Variant, ViTVariant, get_variant

GIB = 2**30
ESTIMATES = Path(__file__).parent / "tpu_estimates.csv"  # the compiler's answers, made by benchmarks/tpu.py
ESTIMATE_KEYS = {  # what an answer depends on, with `plan.compile_train_step`'s defaults
    "variant": "", "topology": "", "global_batch": 0, "num_classes": 1000, "resolution": 224, "bottleneck_rule": "published",
    "remat": "by_stage", "sharding": "fsdp", "megacore": True,
}  # fmt: skip


@dataclass(frozen=True)
class Chip:
    """cores: of a chip. devices: of jax on a chip. flops: bfloat16 peak of a chip, FLOP/s. memory: bytes of a chip.

    bandwidth: of its memory, bytes/s. clock: Hz, that at which its matrix units reach the peak. dollars: a chip-hour on demand,
    the cheapest listed region. sources: where they come from.
    """

    cores: int
    devices: int
    flops: float
    memory: int
    bandwidth: float
    clock: float
    dollars: float
    sources: str


_PRICES = "price: dstackai/gpuhunt tpu_pricing.json, an old list"
CHIPS = {
    "v3": Chip(2, 2, 123e12, 32 * GIB, 900e9, 0.94e9, 2.00, f"docs.cloud.google.com/tpu; {_PRICES}"),
    "v4": Chip(2, 1, 275e12, 32 * GIB, 1200e9, 1.05e9, 3.22, f"docs.cloud.google.com/tpu; {_PRICES}"),
    "v5e": Chip(1, 1, 197e12, 16 * GIB, 819e9, 1.50e9, 1.20, f"docs.cloud.google.com/tpu; {_PRICES}"),
    "v5p": Chip(
        2, 1, 459e12, 95 * GIB, 2765e9, 1.75e9, 4.20, f"docs.cloud.google.com/tpu, jax-ml/scaling-book; {_PRICES}"
    ),
    "v6e": Chip(1, 1, 918e12, 32 * GIB, 1640e9, 1.75e9, 2.70, f"jax-ml/scaling-book; {_PRICES}"),
}
_TOPOLOGY = re.compile(r"(v3|v4|v5e|v5p|v6e):(\d+)x(\d+)(?:x(\d+))?")


def parse_topology(text: str) -> tuple[Chip, int]:
    """(the chip, how many) of a topology such as "v4:4x4x4"; ConfigError for what is none."""
    match = _TOPOLOGY.fullmatch(text)
    if not match:
        raise ConfigError(f"topology: {text!r} is not of the form v4:4x4x4; generations: {', '.join(CHIPS)}")
    sides = [int(side) for side in match.groups()[1:] if side]
    if 0 in sides or len(sides) != (3 if match[1] in ("v4", "v5p") else 2):
        raise ConfigError(
            f"topology: {text!r}; {match[1]} has {3 if match[1] in ('v4', 'v5p') else 2} sides of 1 or more"
        )
    return CHIPS[match[1]], math.prod(sides)


@dataclass(frozen=True)
class Cost:
    """What a run costs on a slice by its floor: no step can be faster than the chips' peaks allow.

    steps; flops: of the whole run; floor_seconds: a step's, by arithmetic or by memory traffic of the parameters and optimizer
    state, whichever is longer; memory: bytes on a device by part, activations as `activation_bytes` estimates them; fits.
    """

    chip: Chip
    chips: int
    steps: int
    flops: float
    floor_seconds: float
    memory: dict[str, float]
    remat: str = "none"

    @property
    def fits(self) -> bool:
        """Whether the parts are less than what a device has; the compiler's program and fragments come on top."""
        return sum(self.memory.values()) < self.chip.memory / self.chip.devices

    def lines(self) -> list[str]:
        """The plan in words: steps and arithmetic, memory by part, and whether it fits."""
        room = self.chip.memory / self.chip.devices
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.memory.items() if size)
        total = sum(self.memory.values())
        advice = "" if self.fits else f"; to make it fit: {self.advice()}"
        return [
            f"{self.steps:,} steps, {self.flops:.3g} FLOPs; {self.chips} chips; a step of at least"
            f" {self.floor_seconds * 1e3:.1f} ms",
            f"memory of a device by arithmetic, GiB: {parts}; {total / GIB:.1f} of {room / GIB:.0f}"
            + (" fits" if self.fits else " does not fit") + advice,
        ]  # fmt: skip

    def advice(self) -> str:
        """What would make a run fit: the largest part of its memory made smaller."""
        state = sum(self.memory[name] for name in ("params", "optimizer"))
        if self.memory["activations"] >= state:
            less = {"full": "", "by_stage": "remat full, "}.get(self.remat, "remat by_stage or full, ")
            return f"{less}a smaller batch, or a larger slice"
        return "sharding fsdp on a larger slice"

    def bill(self, step_seconds: float | None = None, price: float | None = None) -> str:
        """Core-hours, chip-hours and dollars at this many seconds a step, by default the floor's."""
        hours, rate = self.core_hours(step_seconds), self.chip.dollars if price is None else price
        what = "at the compiler's estimate" if step_seconds else "at the floor, which no run reaches"
        return (
            f"{hours:,.1f} core-hours, {hours / self.chip.cores:,.1f} chip-hours, ${self.dollars(step_seconds, price):,.0f} at"
            f" ${rate:g} a chip-hour: {what}"
        )

    def core_hours(self, step_seconds: float | None = None) -> float:
        """Core-hours of the run at this many seconds a step, by default the floor's."""
        return self.steps * (step_seconds or self.floor_seconds) * self.chips * self.chip.cores / 3600

    def dollars(self, step_seconds: float | None = None, price: float | None = None) -> float:
        """What the chip-hours cost, at `price` dollars each, by default the listed one."""
        return self.core_hours(step_seconds) / self.chip.cores * (self.chip.dollars if price is None else price)


def cost(
    variant: str, topology: str, *, epochs: float | int, examples: float | int, global_batch: int, num_classes: int = 1000,
    resolution: int = 224, remat: str = "none", sharding: str = "replicated", rho: float = 0.0, ascent_fraction: float = 1.0,
    bottleneck_rule: str = "published",
) -> Cost:  # fmt: skip
    """The cost of a training run of a variant by arithmetic alone. ConfigError for what does not fit together."""
    try:
        architecture = get_variant(variant)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    chip, chips = parse_topology(topology)
    devices = chips * chip.devices
    for name, value in (("epochs", epochs), ("examples", examples), ("global_batch", global_batch)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}: {value} is not above 0, or has no end")
    if examples < 1:
        raise ConfigError(f"examples: {examples:g} is not at least 1")
    if not 0 <= rho < math.inf:
        raise ConfigError(f"rho: {rho:g}; allowed: 0 or more")
    if num_classes < 1:
        raise ConfigError(f"num_classes: {num_classes} is not at least 1")
    multiple = architecture.resolution_multiple
    if resolution < multiple or resolution % multiple:
        raise ConfigError(f"resolution: {resolution} is not a multiple of {multiple}, which {variant} needs")
    if global_batch % devices:
        raise ConfigError(f"global_batch: {global_batch} does not divide among the {devices} devices of {topology}")
    steps, images = max(1, round(epochs * examples / global_batch)), global_batch // devices
    flops = train_flops(
        forward_macs(architecture, resolution, num_classes, bottleneck_rule), steps * global_batch, rho, ascent_fraction
    )
    params = 4.0 * num_params(architecture, num_classes, bottleneck_rule, resolution)
    share = devices if sharding == "fsdp" else 1
    moments = 2 if isinstance(architecture, ViTVariant) else 1  # AdamW's, momentum
    state = {"params": params / share, "optimizer": moments * params / share}
    # A step reads and writes both, and the gradient.
    traffic = (2 * (1 + moments) + 1) * params / (chip.bandwidth / chip.devices)
    return Cost(
        chip, chips, steps, flops, max(flops / steps / (chip.flops * chips), traffic),
        state | {"gradient": params, "gathered params": params if share > 1 else 0.0, "batch": images * resolution**2 * 3.0,
                 "activations": activation_bytes(architecture, images, resolution, remat, bottleneck_rule)},
        remat,
    )  # fmt: skip


def activation_bytes(
    variant: Variant | ViTVariant, images: int, resolution: int, remat: str, bottleneck_rule: str = "published"
) -> float:
    """Bytes of bfloat16 activations that the backward pass needs of a device's images: an estimate.

    A ViT's: `kept.encoder_bytes`. An NFNet's: the stem's maps, and of its stages `kept.kept_bytes`.
    """
    if isinstance(variant, ViTVariant):
        return encoder_bytes(variant, images, (resolution // variant.patch) ** 2, remat)
    side = -(-resolution // 2)
    total = float(sum(side**2 * channels for channels in variant.stem)) * (2 if remat == "none" else 1)
    chosen = by_stage(variant, images, resolution, resolution, bottleneck_rule)
    total, side = 2.0 * images * total, -(-side // 2)
    for stage, stride in enumerate(STAGE_STRIDES):
        side = -(-side // stride)
        kept = chosen[stage] if remat == "by_stage" else remat
        total += kept_bytes(variant, stage, images, side, side, kept, bottleneck_rule)
    return total
