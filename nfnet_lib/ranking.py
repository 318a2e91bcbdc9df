"""Which pre-training run is best for fine-tuning: the one of lowest held-out loss, or another of equal compute?

The paper (section 3) finds that fine-tuning favours slightly larger models and shorter budgets than held-out loss does.
"""

from typing import TYPE_CHECKING

import numpy as np

from nfnet_lib.scaling import finetune_table

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    "budget", "cells", "loss_variant", "loss_epochs", "loss_params", "error_variant", "error_epochs", "error_params", "same",
    "size_doublings", "epoch_doublings", "error_gain", "noise",
)  # fmt: skip


def finetuned_cells(df: "pd.DataFrame", augmult: int = 1, compute: str = "train_flops") -> "pd.DataFrame":
    """One row a (variant, epoch_budget) cell that was fine-tuned with `augmult`, the mean over its fine-tuning runs.

    df: runs of both kinds (`records.collect`). Columns: variant, epoch_budget, num_params, pretrain_compute,
    pretrain_heldout_loss, top1_error_percent, heldout_examples (of fine-tuning).
    """
    table = finetune_table(df, compute=compute)
    table = table[table["augmult"] == augmult]
    by_run = df.drop_duplicates("run_id").set_index("run_id")
    table = table.assign(
        num_params=table["pretrained_run"].map(by_run["num_params"]),
        heldout_examples=table["run_id"].map(by_run["heldout_examples"]),
    )
    columns = ["num_params", "pretrain_compute", "pretrain_heldout_loss", "top1_error_percent", "heldout_examples"]
    if table.empty:  # has no numbers to take means of
        return table[["variant", "epoch_budget", *columns]]
    return table.groupby(["variant", "epoch_budget"], sort=False)[columns].mean().reset_index()


def best_by_budget(cells: "pd.DataFrame") -> "pd.DataFrame":
    """For each compute budget the best cell by held-out loss and by fine-tuned error, and how far apart they are.

    cells: `finetuned_cells`. Budgets are doublings, from that of the second cheapest cell to that of the dearest; a cell
    competes at every budget that covers its pre-training. Of equal errors the one of lower loss wins, so that a distance is
    never an accident of ties.

    Columns: budget, cells (competing), loss_* and error_* (variant, epochs, params of the two), same, size_doublings and
    epoch_doublings (log2 of the ratio, error's to loss's), error_gain (percentage points of error that choosing by loss
    costs), noise (1.96 standard errors of such a gain, by the number of held-out examples, taking the two as independent).
    """
    import pandas as pd

    if len(cells) < 2:
        return pd.DataFrame(columns=_COLUMNS)
    compute = np.sort(cells["pretrain_compute"].to_numpy(float))
    doublings = int(np.floor(np.log2(compute[-1] / compute[1]) + 1e-9))
    rows = []
    for budget in compute[-1] / 2.0 ** np.arange(doublings, -1, -1):
        among = cells[cells["pretrain_compute"] <= budget * (1 + 1e-9)]
        by_loss = among.sort_values(["pretrain_heldout_loss", "pretrain_compute"]).iloc[0]
        by_error = among.sort_values(["top1_error_percent", "pretrain_heldout_loss"]).iloc[0]
        rates = [row["top1_error_percent"] / 100 for row in (by_loss, by_error)]
        variance = sum(rate * (1 - rate) / by_error["heldout_examples"] for rate in rates)
        rows.append((
            budget, len(among), *by_loss[["variant", "epoch_budget", "num_params"]],
            *by_error[["variant", "epoch_budget", "num_params"]], bool(by_loss.name == by_error.name),
            np.log2(by_error["num_params"] / by_loss["num_params"]),
            np.log2(by_error["epoch_budget"] / by_loss["epoch_budget"]), 100 * (rates[0] - rates[1]), 196 * variance**0.5,
        ))  # fmt: skip
    return pd.DataFrame(rows, columns=_COLUMNS)


def sentence(table: "pd.DataFrame") -> str:
    """What `best_by_budget` shows, beside what the paper says."""
    paper = "The paper finds that fine-tuning favours slightly larger models and shorter budgets."
    if table.empty:
        return f"Fewer than two cells were fine-tuned: there is nothing to choose between. {paper}"
    apart = table[~table["same"]]
    text = (
        f"At {len(table) - len(apart)} of {len(table)} compute budgets the cell of lowest held-out loss is also the best"
        " fine-tuned"
    )
    if apart.empty:
        return f"{text}. {paper}"
    size, epochs = 2 ** apart["size_doublings"].mean(), 2 ** apart["epoch_doublings"].mean()
    clear = int((apart["error_gain"] > apart["noise"]).sum())
    return (
        f"{text}. At the other {len(apart)} fine-tuning prefers on average {size:.2g} times the parameters and"
        f" {epochs:.2g} times the epochs, for {apart['error_gain'].mean():.2f} points less error; that is more than the noise"
        f" of the held-out set at {clear} of them. {paper}"
    )
