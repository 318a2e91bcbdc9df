"""What a study costs on the TPU slice that its file names, and the lines of its header that say so.

A study file for TPUs has a comment line such as "# Slice: v4:4x4x4, 1,000 classes"; `write_header` puts the cost below it.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from nfnet_lib.calibration import plan_table, rounded
from nfnet_lib.config import ConfigError, StudyConfig
from nfnet_lib.files import write_bytes
from nfnet_lib.study_grid import PretrainCell, least_runs

if TYPE_CHECKING:
    import pandas as pd

_SLICE = re.compile(r"^# Slice: (\S+), ([\d,]+) classes$", re.MULTILINE)
_COST = re.compile(r"^# Cost, planned.*\n(?:#   .*\n)*", re.MULTILINE)


def slice_of(path: str | Path) -> tuple[str, int]:
    """(topology, classes) that a study file names; ConfigError where it names none."""
    found = _SLICE.search(Path(path).read_text())
    if not found:
        raise ConfigError(f'study file: {path} has no line "# Slice: TOPOLOGY, N classes"')
    return found[1], int(found[2].replace(",", ""))


def study_table(path: str | Path) -> "pd.DataFrame":
    """`calibration.plan_table` of the cells of a study file on its slice, one pre-training run each.

    A column more, runs: those that the search of a cell's learning rate takes at least, with all seeds. ConfigError for
    pre-training with SAM.
    """
    import pandas as pd

    study, (topology, classes) = StudyConfig.from_file(path), slice_of(path)
    tables = []
    for variant in study.variants:
        budgets, seeds = study.budgets_of(variant), study.seeds or [None]
        own = study.pretrain_config(variant, budgets[0], study.learning_rates(variant)[0][0], seeds[0])
        if own.rho:
            raise ConfigError(f"rho: {own.rho} in pre-training; the cost of SAM is not planned; allowed: 0")
        table = plan_table(
            [variant], budgets, examples=own.examples_per_epoch, global_batch=own.batch_size, topology=topology,
            num_classes=classes, resolution=own.resolution, remat=own.remat, sharding=own.sharding,
            bottleneck_rule=own.bottleneck_rule,
        )  # fmt: skip
        runs = [len(seeds) * least_runs(study, PretrainCell(variant, budget, seeds[0])) for budget in table["epoch_budget"]]
        tables.append(table.assign(runs=runs))
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
    runs = table["runs"]
    low, high = ((runs * table[name].fillna(table["floor_core_hours"])).sum() for name in ("low", "high"))
    total, dollars, days = ((runs * values).sum() for values in (hours, table["dollars"], table["days"]))
    seeds = len(StudyConfig.from_file(path).seeds)
    each = f"{runs.iloc[0]} learning rates each" if seeds < 2 and runs.nunique() == 1 else f"{runs.sum()} runs"
    lines.append(f"  all {len(table)} cells, {each}: {rounded(total)} core-hours ({rounded(low)} to {rounded(high)}),")
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
