"""What a study costs on the TPU slice that its file names, and the lines of its header that say so.

A study file for TPUs has a comment line such as "# Slice: v4:4x4x4, 1,000 classes"; `write_header` puts the cost below it.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from nfnet_lib.calibration import plan_table, rounded
from nfnet_lib.config import ConfigError, PretrainConfig, StudyConfig
from nfnet_lib.files import write_bytes

if TYPE_CHECKING:
    import pandas as pd

_SLICE = re.compile(r"^# Slice: (\S+), ([\d,]+) classes$", re.MULTILINE)
_COST = re.compile(r"^# Cost, planned.*\n(?:#   .*\n)*", re.MULTILINE)
LEAST_TRIALS = 3  # learning rates a cell: an optimum between two that are worse


def slice_of(path: str | Path) -> tuple[str, int]:
    """(topology, classes) that a study file names; ConfigError where it names none."""
    found = _SLICE.search(Path(path).read_text())
    if not found:
        raise ConfigError(f'study file: {path} has no line "# Slice: TOPOLOGY, N classes"')
    return found[1], int(found[2].replace(",", ""))


def study_table(path: str | Path) -> "pd.DataFrame":
    """`calibration.plan_table` of the cells of a study file on its slice; one pre-training run each."""
    import pandas as pd

    study, (topology, classes) = StudyConfig.from_file(path), slice_of(path)
    shared = PretrainConfig.from_params(study.pretrain)
    tables = [
        plan_table(
            [variant], study.budgets_of(variant), examples=shared.examples_per_epoch, global_batch=shared.batch_size,
            topology=topology, num_classes=classes, resolution=shared.resolution, remat=shared.remat, sharding=shared.sharding,
            bottleneck_rule=shared.bottleneck_rule,
        )
        for variant in study.variants
    ]  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def cost_lines(path: str | Path) -> list[str]:
    """The header's lines, without their "# "."""
    table, (topology, _) = study_table(path), slice_of(path)
    hours = table["core_hours"].fillna(table["floor_core_hours"])
    known = table["core_hours"].notna()
    lines = [f"Cost, planned (nfnet cost {Path(path).name} --write; pre-training, calibrated on published times):"]
    for variant, rows in table.assign(hours=hours, known=known).groupby("variant", sort=False):
        runs = ", ".join(
            f"{row.epoch_budget:g} epoch{'s' * (row.epoch_budget != 1)} {rounded(row.hours)}"
            for row in rows.itertuples()
        )
        note = "" if rows["known"].all() else " at the floor: not compiled"
        fits = "" if rows["fits"].all() else "; DOES NOT FIT"
        lines.append(f"  {variant}: core-hours of a run: {runs}{note}{fits}")
    low, high = (LEAST_TRIALS * table[name].fillna(table["floor_core_hours"]).sum() for name in ("low", "high"))
    total = LEAST_TRIALS * hours.sum()
    dollars = LEAST_TRIALS * table["dollars"].sum()
    lines.append(
        f"  all {len(table)} cells, {LEAST_TRIALS} learning rates each: {rounded(total)} core-hours ({rounded(low)} to"
        f" {rounded(high)}),"
    )
    days = LEAST_TRIALS * table["days"].sum()
    lines.append(
        f"  {days:.3g} days of one {topology} slice, ${dollars:,.0f} on demand by an old list; fine-tuning apart"
    )
    return lines


def with_header(path: str | Path) -> str:
    """The study file's text with the planned cost as it is now, below the slice."""
    text = _COST.sub("", Path(path).read_text())
    block = "".join(f"# {line}\n" for line in cost_lines(path))
    return _SLICE.sub(lambda found: f"{found[0]}\n{block.rstrip()}", text)


def write_header(path: str | Path) -> bool:
    """Whether the file had to be changed."""
    text = with_header(path)
    if text == Path(path).read_text():
        return False
    write_bytes(path, text.encode(), overwrite=True)
    return True
