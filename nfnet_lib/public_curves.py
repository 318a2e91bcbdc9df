"""Public measurements of others, in a layer of their own: never in one fit, nor on one axis, with runs of this project.

`few_shot_curves` are networks pre-trained on JFT, shipped with this package (source, licence and what was left out: in the head
of the file). Hoffmann's language models, as Epoch AI read them from a figure, are not shipped: no licence of that table was
found. `hoffmann_runs` reads the user's copy of data/svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla.
"""

import os
from collections.abc import Mapping
from io import StringIO
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfnet_lib.law_fits import DELTA, LawFit, fit_law

if TYPE_CHECKING:
    import pandas as pd

FEW_SHOT = Path(__file__).parent / "public_data" / "imagenet_10shot.csv"
FEW_SHOT_SOURCE, FEW_SHOT_LICENCE = "arXiv 2209.06640", "CC BY 4.0"
FAMILIES = {"ViT": "ViT", "BiT": "BiT", "MiX": "MLP-Mixer"}  # by the first part of a model's name

EPOCH_REFIT = {"E": (1.817, 1.769, 1.871), "alpha": (0.348, 0.317, 0.373), "beta": (0.366, 0.331, 0.415)}
"""{parameter: (estimate, low, high)} with 95 % intervals: Epoch AI's refit of 240 of Hoffmann's runs (arXiv 2404.10102)."""

_OUTLIERS = 5  # runs that Epoch AI left out

_FEW_SHOT_COLUMNS = {"Model": None, "Seen Examples": (1.0, 1e12), "Loss": (1e-9, 1.0), "Training": (0.0, 1.0)}
_HOFFMANN_COLUMNS = {"Model Size": (1e6, 1e13), "Training FLOP": (1e15, 1e27), "loss": (1.0, 15.0)}


def few_shot_curves(path: str | os.PathLike = FEW_SHOT) -> "pd.DataFrame":
    """ImageNet 10-shot error while six networks were pre-trained on JFT (arXiv 2209.06640), one row a point, by examples seen.

    Columns: model, family, examples_seen, top1_error_percent, held_out (bool: not for fitting), source, licence. Another file
    with that benchmark's columns, of one task, is read as well. ValueError for one that can not be read, a column missing, a
    value outside its range, or a model's examples not in rising order.
    """
    table = _read(path, _FEW_SHOT_COLUMNS)
    for model, rows in table.groupby("Model", sort=False):
        if str(model).split("/")[0] not in FAMILIES:
            raise ValueError(f"{path}: column 'Model' holds {model!r}; allowed: {'/..., '.join(FAMILIES)}/...")
        if not (np.diff(rows["Seen Examples"]) > 0).all():
            raise ValueError(f"{path}: column 'Seen Examples' of {model} must rise from row to row")
    return table.rename(columns={"Model": "model", "Seen Examples": "examples_seen"}).assign(
        family=table["Model"].str.split("/").str[0].map(FAMILIES), top1_error_percent=100 * table["Loss"],
        held_out=table["Training"] == 0, source=FEW_SHOT_SOURCE, licence=FEW_SHOT_LICENCE,
    )[["model", "family", "examples_seen", "top1_error_percent", "held_out", "source", "licence"]]  # fmt: skip


def curve_fits(curves: "pd.DataFrame") -> dict[str, LawFit]:
    """{model: Zhai's shifted law of its error in percent against examples seen}, each of its own curve, without held-out rows.

    No intervals: the points of one curve are successive moments of one run, and a bootstrap takes them for independent. The law
    has no ceiling: where a curve sets out near 100 % it overshoots.
    """
    arrays = curves[~curves["held_out"]].astype({"examples_seen": float, "top1_error_percent": float})
    return {
        str(model): fit_law("shifted", rows["top1_error_percent"].to_numpy(), compute=rows["examples_seen"].to_numpy())
        for model, rows in arrays.groupby("model", sort=False)
    }


def curve_laws(curves: "pd.DataFrame", fits: Mapping[str, LawFit]) -> "pd.DataFrame":
    """One row a model: A, a, d, E (floor, %) of its law, R^2, fitted rows, how far the held-out rows reach beyond them (ratio
    of examples) and the mean error of the law there, in percent of the error measured."""
    import pandas as pd

    rows = []
    for model, fit in fits.items():
        part = curves[(curves["model"] == model) & curves["held_out"]]
        seen, error = part["examples_seen"].to_numpy(float), part["top1_error_percent"].to_numpy(float)
        rows.append({
            "model": model, **{name: fit.parameters[name] for name in ("A", "a", "d", "E")}, "r_squared": fit.r_squared,
            "fitted_rows": len(fit.residuals), "held_out_rows": len(part),
            "reach": seen.max() / fit.ranges["compute"][1] if len(part) else np.nan,
            "held_out_error_percent": 100 * float(np.mean(fit.predict(compute=seen) / error - 1)) if len(part) else np.nan,
        })  # fmt: skip
    return pd.DataFrame(rows)


def hoffmann_runs(path: str | os.PathLike) -> "pd.DataFrame":
    """Hoffmann's language models (arXiv 2203.15556, Figure 4) as Epoch AI extracted them, from the user's copy of their table.

    Columns: parameters, tokens (= FLOPs / 6 parameters), train_flops, loss (nats a token), kept: False for the five highest
    losses and their equals, which Epoch AI's refit leaves out; in their 245 rows these are also the five with the fewest tokens
    a parameter. Rows with an empty cell are skipped, as there. ValueError for a file that can not be read, a column missing or
    a value outside its range.
    """
    table = _read(path, _HOFFMANN_COLUMNS, skip_empty=True)
    if len(table) <= _OUTLIERS:
        raise ValueError(f"{path}: {len(table)} rows; allowed: more than the {_OUTLIERS} highest losses, which are left out")
    size, flops, loss = (table[name].astype(float) for name in _HOFFMANN_COLUMNS)
    return table.assign(
        parameters=size, tokens=flops / (6 * size), train_flops=flops, loss=loss, kept=loss < loss.nlargest(_OUTLIERS).iloc[-1]
    )[["parameters", "tokens", "train_flops", "loss", "kept"]]


def fit_hoffmann(runs: "pd.DataFrame", *, resamples: int = 0, seed: int = 0) -> LawFit:
    """L(N, D) of the runs kept, with Hoffmann's and Epoch AI's own Huber delta of 1e-3 (arXiv 2404.10102).

    On their table of 245 rows: A 477.9, B 2143, E 1.817, alpha 0.347, beta 0.367; they print 482, 2085, 1.817, 0.348, 0.366.
    """
    kept = runs[runs["kept"]]
    inputs = {"size": kept["parameters"].to_numpy(float), "data": kept["tokens"].to_numpy(float)}
    return fit_law("surface", kept["loss"].to_numpy(float), delta=DELTA, resamples=resamples, seed=seed, **inputs)


def beside_epoch(fit: LawFit) -> "pd.DataFrame":
    """The fit beside Epoch AI's refit: parameter, fitted, epoch, low, high (their 95 % interval), within (bool)."""
    import pandas as pd

    rows = [(name, fit.parameters[name], *published) for name, published in EPOCH_REFIT.items()]
    table = pd.DataFrame(rows, columns=["parameter", "fitted", "epoch", "low", "high"])
    return table.assign(within=table["fitted"].between(table["low"], table["high"]))


def _read(
    path: str | os.PathLike, columns: Mapping[str, tuple[float, float] | None], skip_empty: bool = False
) -> "pd.DataFrame":
    """The columns named, numbers checked against their range (None: text). skip_empty: leave out rows with an empty cell."""
    import pandas as pd

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        # Not read_csv's own comments: Epoch AI's table has colours, "#faebdd", before its numbers.
        table = pd.read_csv(StringIO("\n".join(dropwhile(lambda line: line.startswith("#"), lines))))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable CSV table: {' '.join(str(error).split())}") from None
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"{path}: lacks column(s) {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    table = table[list(columns)]
    table = table.dropna() if skip_empty else table
    if table.empty:
        raise ValueError(f"{path}: holds no rows")
    for name, allowed in columns.items():
        if allowed is None:
            continue
        low, high = allowed
        values = pd.to_numeric(table[name], errors="coerce")
        if len(wrong := table[name][~values.between(low, high)]):
            row, value = wrong.index[0] + 1, wrong.iloc[0]
            raise ValueError(f"{path}: column {name!r}, row {row}: {value}; allowed: {low:g} to {high:g}")
        table = table.assign(**{name: values})
    return table.reset_index(drop=True)
