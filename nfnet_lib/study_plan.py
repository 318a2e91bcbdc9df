"""What a study will run and cost, before it runs: `nfnet study FILE --dry-run`."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfnet_lib import flops, paper
from nfnet_lib.cell import finished
from nfnet_lib.comparison import ARMS
from nfnet_lib.config import RunConfig, StudyConfig
from nfnet_lib.records import collect
from nfnet_lib.study_grid import least_runs, pretrain_cells, search_of

if TYPE_CHECKING:
    import pandas as pd

NOTEBOOK_SECONDS = 6  # that a cell's notebook takes beside its runs, on a laptop's core (LOG.md)


def plan_table(study: StudyConfig, study_dir: Path, timed: "pd.DataFrame | None" = None) -> "pd.DataFrame":
    """A row a cell, in the order in which they start; the last, 03_finetune, is the comparison of ways of fine-tuning.

    Columns: cell, runs (of a search, at least), steps and train_flops (of a run), minutes (of all its runs on one worker, from
    `timed`), core_hours (all its runs, TPU v4 by the paper's formula), state ("done" or "to do"). timed: records of finished
    runs on the machine's kind of device; a variant that is not among them gets the rate of the nearest in size, NaN with none.
    """
    import pandas as pd

    rows = []
    for cell in pretrain_cells(study):
        found = search_of(study, cell, study_dir)
        grid = study.learning_rates(cell.variant)[0]
        config = found[0] if found else study.pretrain_config(*cell[:2], grid[0], cell.seed)
        if study.lr_search == "grid":
            done = all(finished(config.model_copy(update={"peak_lr": lr}), study_dir) for lr in grid)
        else:
            done = found is not None and finished(found[0], study_dir, found[1]) is not None
        rows.append(_row(cell.name, config, least_runs(study, cell), done, timed))
    searched = {cell.variant for cell, row in zip(pretrain_cells(study), rows, strict=True) if row["state"] != "done"}
    known = collect(study_dir) if study_dir.is_dir() else pd.DataFrame()
    tuned = compared = known[known["kind"] == "finetune"] if len(known) else known
    if "compared_as" in tuned:
        of_comparison = tuned["compared_as"].fillna("") != ""
        tuned, compared = tuned[~of_comparison], tuned[of_comparison]
    for variant in study.variants if study.finetune is not None else ():
        count = len(study.budgets_of(variant)) if study.finetune_cells == "all" else 1
        for augmult in study.finetune_augmults:
            config = study.finetune_config(variant, "to-be-found", augmult)
            there = int((tuned["variant"].eq(variant) & tuned["augmult"].eq(augmult)).sum()) if len(tuned) else 0
            done = there >= count and variant not in searched
            rows.append(_row(f"finetune_{variant.replace('/', '-')}_ra{augmult}", config, count, done, timed))
    if study.comparison_seeds:  # all its runs cost as much
        first, count = study.variants[0], len(ARMS) * study.comparison_seeds
        there = int(compared["variant"].eq(first).sum()) if len(compared) else 0
        rows.append(_row("03_finetune", study.finetune_config(first, "to-be-found", 1), count, there >= count, timed))
    return pd.DataFrame(rows)


def _row(name: str, config: RunConfig, runs: int, done: bool, timed: "pd.DataFrame | None") -> dict:
    total = flops.run_flops(config)
    return {
        "cell": name, "runs": runs, "steps": config.steps, "train_flops": total,
        "minutes": _seconds(config, runs * total, timed) / 60, "core_hours": runs * float(paper.tpu_v4_core_hours(total)),
        "state": "done" if done else "to do",
    }  # fmt: skip


def _seconds(config: RunConfig, train_flops: float, timed: "pd.DataFrame | None") -> float:
    """Of a cell: its FLOPs at the rate of the timed runs of the variant nearest in size, and what comes on top of training."""
    if timed is None or not len(timed):
        return np.nan
    away = np.abs(np.log(timed["num_params"] / flops.num_params(config.architecture, config.num_classes)))
    own = timed[timed["variant"] == timed.loc[away.idxmin(), "variant"]]
    on_top = own.assign(seconds=own["wall_seconds"] - own["seconds"]).groupby("cell_id")["seconds"].sum().median()
    return float((own["seconds"] / own["train_flops"]).median() * train_flops + on_top + NOTEBOOK_SECONDS)


def plan_sentence(table: "pd.DataFrame", workers: int) -> str:
    """The totals: what there is, what is left, and how long that takes on so many workers."""
    left = table[table["state"] == "to do"]
    text = (
        f"{len(table)} cells, {table['runs'].sum()} runs, {(table['runs'] * table['train_flops']).sum():.3g} FLOPs,"
        f" {table['core_hours'].sum():.3g} TPU-v4 core-hours by formula; {len(table) - len(left)} cells are done"
    )
    if left.empty:
        return f"{text}."
    if left["minutes"].isna().any():
        return f"{text}. No timed runs say how long the others take."
    minutes = max(left["minutes"].sum() / workers, left["minutes"].max())
    return f"{text}, the others take about {minutes:.3g} minutes, {workers} at a time (planned from the rates of timed runs)."
