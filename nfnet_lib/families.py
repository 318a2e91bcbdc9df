"""ConvNets against Vision Transformers in one study: the same data, the same compute axis, the same tuning effort."""

from typing import TYPE_CHECKING

import numpy as np

from nfnet_lib.power_law import frontier
from nfnet_lib.scaling import best_per_cell
from nfnet_lib.variants import get_variant

if TYPE_CHECKING:
    import pandas as pd


def family_cells(df: "pd.DataFrame", compute: str = "train_flops") -> "pd.DataFrame":
    """The best run of each cell (`scaling.best_per_cell`, by held-out loss), one row each.

    Columns: family ("NFNet", "ViT"), variant, epoch_budget, best_lr, lr_is_interior, num_lrs (tried), num_seeds, `compute`,
    heldout_loss, top1_error_percent, standard_error (of that, binomial, in points), on_frontier (of its family, by error).
    """
    import pandas as pd

    cells = best_per_cell(df, compute=compute)
    cells = cells[np.isfinite(cells["heldout_loss"])]
    runs = df[df["kind"] == "pretrain"].groupby(["variant", "epoch_budget", "peak_lr"])
    means = runs[["heldout_top1", "heldout_examples"]].mean()
    best = means.loc[pd.MultiIndex.from_frame(cells[["variant", "epoch_budget", "best_lr"]])]
    error, examples = 1 - best["heldout_top1"].to_numpy(), best["heldout_examples"].to_numpy() * cells["num_seeds"].to_numpy()
    unsure = np.clip(error, 0.5 / examples, 1 - 0.5 / examples)  # none or all wrong is no certainty
    table = cells.assign(
        family=[get_variant(name).family for name in cells["variant"]],
        num_lrs=cells["lrs"].map(len),
        top1_error_percent=100 * error,
        standard_error=100 * np.sqrt(unsure * (1 - unsure) / examples),
    )
    table["on_frontier"] = False
    for _, part in table.groupby("family"):
        table.loc[part.index, "on_frontier"] = frontier(
            part[compute].to_numpy(dtype=float), part["top1_error_percent"].to_numpy(dtype=float)
        )
    columns = ["family", "variant", "epoch_budget", "best_lr", "lr_is_interior", "num_lrs", "num_seeds", compute]
    return table[[*columns, "heldout_loss", "top1_error_percent", "standard_error", "on_frontier"]].reset_index(drop=True)


def compare_families(
    cells: "pd.DataFrame", first: str = "NFNet", second: str = "ViT", compute: str = "train_flops"
) -> "pd.DataFrame":
    """Errors of two families at equal compute: at each frontier point of either that lies within both frontiers.

    Between its points a frontier is a straight line on log-log axes, no error counting as its standard error; it is not
    extrapolated. Columns: `compute`, one
    for each family (error in percent), ratio (first / second), noise (standard error of the difference, in points).
    ValueError where a family is missing or the frontiers share no range of compute.
    """
    import pandas as pd

    lines = {}
    for family in (first, second):
        part = cells[(cells["family"] == family) & cells["on_frontier"]].sort_values(compute)
        if part.empty:
            raise ValueError(f"cells has no {family}; it has {', '.join(sorted(set(cells['family']))) or 'no rows'}")
        lines[family] = [part[name].to_numpy(dtype=float) for name in (compute, "top1_error_percent", "standard_error")]
    low, high = max(line[0][0] for line in lines.values()), min(line[0][-1] for line in lines.values())
    if low > high:
        raise ValueError(f"the frontiers of {first} and {second} share no range of {compute}")
    at = np.unique(np.concatenate([line[0] for line in lines.values()]))
    at = at[(low <= at) & (at <= high)]
    errors, noises = [], []
    for where, error, noise in lines.values():
        errors.append(np.exp(np.interp(np.log(at), np.log(where), np.log(np.maximum(error, noise)))))
        noises.append(np.interp(np.log(at), np.log(where), noise))
    return pd.DataFrame(
        {compute: at, first: errors[0], second: errors[1], "ratio": errors[0] / errors[1], "noise": np.hypot(*noises)}
    )


def sentences(cells: "pd.DataFrame", comparison: "pd.DataFrame") -> list[str]:
    """What the comparison shows, every number of it from the tables."""
    compute, first, second = comparison.columns[:3]
    ratio, noise = comparison["ratio"], comparison["noise"]
    difference = comparison[first] - comparison[second]
    clear = difference.abs() > 2 * noise
    lower = {first: int((clear & (difference < 0)).sum()), second: int((clear & (difference > 0)).sum())}
    effort = ", ".join(
        f"{family} {part['num_lrs'].mean():.1f}" for family, part in cells.groupby("family") if family in lower
    )
    result = [
        f"From {comparison[compute].iloc[0]:.3g} to {comparison[compute].iloc[-1]:.3g} training FLOPs the top-1 error of "
        f"{first}s is {ratio.min():.2f} to {ratio.max():.2f} times that of {second}s at equal compute (geometric mean "
        f"{np.exp(np.log(ratio).mean()):.2f}).",
        f"At {len(comparison)} values of compute {first}s are lower by more than twice the sampling error of the held-out "
        f"set at {lower[first]}, {second}s at {lower[second]}; at {int((~clear).sum())} they can't be told apart.",
        f"Learning rates tried a cell, on average: {effort}. "
        + ("One seed a run" if cells["num_seeds"].eq(1).all() else "Means over seeds")
        + ": what another seed would change is not in the sampling error.",
    ]
    edge = cells[~cells["lr_is_interior"]]
    if len(edge):
        result.append(f"In {len(edge)} of {len(cells)} cells the best rate lies at the edge of its grid.")
    winner = first if lower[first] > lower[second] else second
    if clear.any() and min(lower.values()) == 0:
        verdict = f"{winner}s do better on these data"
    elif clear.any():
        verdict = "which family does better depends on the compute"
    else:
        verdict = "the families match within sampling error"
    return [*result, f"At this scale {verdict}."]
