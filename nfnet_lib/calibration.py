"""From the TPU compiler's estimate to the time that a step takes: published measurements beside estimates of their programs.

An estimate is the compiler's: it counts what one device computes, at the clock at which its matrix units reach their peak, and
not what devices send each other. How far it is off is known from released code whose times were published.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nfnet_lib import paper
from nfnet_lib.config import ConfigError
from nfnet_lib.tpus import ESTIMATES, Cost, cost, parse_topology
from nfnet_lib.variants import get_variant

if TYPE_CHECKING:
    import pandas as pd

RELEASED, OURS = "released code", "this library"


@dataclass(frozen=True)
class Measurement:
    """A step that somebody timed. images: a device. estimate, of the compiler for this program, and published: ms a step."""

    variant: str
    generation: str
    resolution: int
    images: int
    estimate: float
    published: float
    source: str


_README = "README of google-deepmind/deepmind-research nfnets: TPUv3, batch 32 a core"
_PRINTED = (
    paper.points()
    .query("quantity == 'pretrain compute' and unit == 'TPU-v4 core-hours'")
    .set_index("model")["value"]
    .to_dict()
)
# The released NFNet code, compiled for TPU by libtpu 0.0.51 (ms), where its time is known.
MEASURED = (
    Measurement("F0", "v3", 192, 32, 53.9, paper.V3_STEP_MS["F0"][1], _README),
    Measurement("F1", "v3", 224, 32, 119.2, paper.V3_STEP_MS["F1"][1], _README),
    Measurement("F7+", "v4", 224, 64, 402e6 / 1.05e9 * 1e3, _PRINTED["F7+"] * 3600e3 / (7_812_500 * 128),
                "arXiv 2310.16764: 8 epochs of 4e9 images at batch 4096, \"estimated by eye\""),
)  # fmt: skip
POINTS = {"F7+": (32e9, 30_000), "g/14": (16e9, 29_593), "G/14": (20.5e9, 29_593), "So400m/14": (40e9, 29_593)}
"""{variant: (images seen, classes)} of the points of Figure 1 with known compute (arXiv 2310.16764, 2106.04560, 2305.13035)."""


def ratios() -> dict[str, list[float]]:
    """{generation: estimate / published} of the released code."""
    found: dict[str, list[float]] = {}
    for row in MEASURED:
        found.setdefault(row.generation, []).append(row.estimate / row.published)
    return found


def calibrated(seconds: float | int, generation: str) -> tuple[float, float, float]:
    """(likely, low, high): what a step that the compiler puts at `seconds` takes.

    Likely by the geometric mean of this generation's ratios, or of all generations' where it has none; low and high by the
    largest and smallest of all, since three programs are few.
    """
    known = ratios()
    every = [ratio for own in known.values() for ratio in own]
    likely = float(np.exp(np.mean(np.log(known.get(generation, every)))))
    return seconds / likely, seconds / max(every), seconds / min(every)


def recorded_estimates() -> "pd.DataFrame":
    """The compiler's answers on record (benchmarks/tpu.py), with generation and images a device."""
    import pandas as pd

    table = pd.read_csv(ESTIMATES)
    chips = [parse_topology(topology) for topology in table["topology"]]
    devices = [
        count * (chip.devices if megacore else chip.cores)
        for (chip, count), megacore in zip(chips, table["megacore"], strict=True)
    ]
    table.insert(2, "generation", [topology.split(":")[0] for topology in table["topology"]])
    table.insert(3, "images", table["global_batch"] // np.array(devices, int))
    return table


@functools.cache
def recorded(
    variant: str, topology: str, global_batch: int, resolution: int = 224, bottleneck_rule: str = "published",
    remat: str | None = None,
) -> tuple[float, str] | None:  # fmt: skip
    """(seconds a step by the compiler's recorded estimate, what was compiled), or None where nothing like it was.

    Of the same variant, generation and resolution, the one with the nearest number of images a device, scaled to this one's:
    the state's share does not grow with it, so that more images than were compiled for are planned a little too dear. remat:
    only programs with it; None: any.
    """
    chip, chips = parse_topology(topology)
    images = global_batch / (chips * chip.devices)
    table = recorded_estimates()
    same = (table["variant"] == variant) & (table["generation"] == topology.split(":")[0]) & table["megacore"]
    same &= (table["resolution"] == resolution) & (table["bottleneck_rule"] == bottleneck_rule)
    if remat is not None:
        same &= table["remat"] == remat
    if not same.any():
        return None
    rows = table[same]
    row = rows.loc[(rows["images"] / images).map(np.log).abs().idxmin()]
    what = f"{row.images} images a device, {row.num_classes:,} classes, {row.topology}, remat {row.remat}, libtpu {row.libtpu}"
    return row.cycles / chip.clock * images / row.images, what


def calibration_table() -> "pd.DataFrame":
    """Estimates beside published times, ms a step, one row a program: the released code, and this library's programs.

    Only the released code's were timed as they were compiled; this library's are other programs for the same arithmetic.
    """
    import pandas as pd

    rows = [
        (RELEASED, m.variant, m.generation, m.resolution, m.images, m.estimate, m.published, m.source) for m in MEASURED
    ]
    for variant, (side, published) in paper.V3_STEP_MS.items():
        if found := recorded(variant, "v3:2x2", 256, side):
            rows.append((OURS, variant, "v3", side, 32, found[0] * 1e3, published, _README))
    if found := recorded("F7+", "v4:4x4x4", 4096):
        rows.append((OURS, "F7+", "v4", 224, 64, found[0] * 1e3, MEASURED[-1].published, MEASURED[-1].source))
    columns = ["program", "variant", "chip", "px", "images", "estimate_ms", "published_ms", "source"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(7, "estimate / published", table["estimate_ms"] / table["published_ms"])
    return table


def points_table() -> "pd.DataFrame":
    """Planned core-hours of the paper's four points of known compute on TPU v4, and what the paper says; NaN: not compiled."""
    import pandas as pd

    rows = []
    for variant, (images, classes) in POINTS.items():
        topology = "v4:4x4x4" if get_variant(variant).family == "NFNet" else "v4:4x4x8"
        planned = cost(variant, topology, epochs=1, examples=images, global_batch=4096, num_classes=classes)
        found = recorded(variant, topology, 4096)
        seconds = calibrated(found[0], "v4") if found else (np.nan,) * 3
        hours = [planned.core_hours(s) for s in (found[0] if found else np.nan, *seconds)]
        rows.append((variant, images, planned.core_hours(), *hours, _PRINTED[variant]))
    columns = ["variant", "images", "floor", "estimate", "calibrated", "low", "high", "paper"]
    table = pd.DataFrame(rows, columns=columns)
    table["calibrated / paper"] = table["calibrated"] / table["paper"]
    return table


def plan_table(
    variants: list[str], epochs: list[float | int], *, examples: float | int, global_batch: int, topology: str,
    num_classes: int = 1000, resolution: int = 224, remat: str = "by_stage", sharding: str = "fsdp",
    bottleneck_rule: str = "published", price: float | int | None = None,
) -> "pd.DataFrame":  # fmt: skip
    """One row for each variant and epoch budget: steps, FLOPs, whether it fits, and core-hours by floor, estimate, calibrated.

    ConfigError as `tpus.cost`. Columns without a compiled figure are NaN; dollars are of the calibrated hours, or the floor's.
    """
    import pandas as pd

    if not variants or not epochs:
        raise ConfigError(f"variants, epochs: {variants}, {epochs}; at least one of each is needed")
    rows = []
    for variant in variants:
        for budget in epochs:
            planned = cost(
                variant, topology, epochs=budget, examples=examples, global_batch=global_batch, num_classes=num_classes,
                resolution=resolution, remat=remat, sharding=sharding,
                bottleneck_rule=bottleneck_rule,
            )  # fmt: skip
            found = recorded(variant, topology, global_batch, resolution, bottleneck_rule, remat)
            rows.append(_plan_row(variant, budget, planned, found, topology.split(":")[0], price))
    return pd.DataFrame(rows)


def _plan_row(
    variant: str,
    budget: float | int,
    planned: Cost,
    found: tuple[float, str] | None,
    generation: str,
    price: float | int | None,
) -> dict:
    seconds = calibrated(found[0], generation) if found else (None, None, None)
    hours = [planned.core_hours(s) if s else np.nan for s in (found and found[0], *seconds)]
    return {
        "variant": variant, "epoch_budget": budget, "steps": planned.steps, "train_flops": planned.flops,
        "memory_gib": sum(planned.memory.values()) / 2**30, "fits": planned.fits,
        "floor_core_hours": planned.core_hours(),
        **dict(zip(("estimate_core_hours", "core_hours", "low", "high"), hours, strict=True)),
        "days": planned.steps * (seconds[0] or planned.floor_seconds) / 86400, "dollars": planned.dollars(seconds[0], price),
        "compiled": found[1] if found else "nothing: the floor alone",
    }  # fmt: skip


def rounded(value: float | int) -> str:
    """A number to three digits, with commas and without powers of ten."""
    return f"{float(f'{value:.3g}'):,.10g}"
