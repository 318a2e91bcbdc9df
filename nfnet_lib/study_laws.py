"""What a study says about scaling beyond its frontier: the law of size and data, how far it carries, the paper's rules.

`study_laws` chains `law_fits`, `law_checks` and `rules` over the cells of one study (`scaling.best_per_cell`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nfnet_lib import law_checks, rules
from nfnet_lib.law_fits import LawFit, TooFew, fit_law
from nfnet_lib.scaling import CELL, UNITS, _require, cell_names

if TYPE_CHECKING:
    import pandas as pd

FEWEST_CELLS = 7  # for the law of size and data: its 5 parameters, one more, and one to leave out
FLOPS_PER_VIEW = 6.0  # training FLOPs a view for each multiply-accumulate of the forward pass: 2 FLOPs, and 3 passes
_MEANS = {"alpha": "size", "beta": "views"}


@dataclass(frozen=True)
class StudyLaws:
    """cells: those fitted, with predicted (loss by the surface) and outlier (bool), cheapest first.

    surface: L(N, D) of forward multiply-accumulates and views seen, None below FEWEST_CELLS or with fewer than 3 sizes or
    numbers of views: then extrapolation is empty and cells lack those columns, and nothing can be predicted (ValueError).
    extrapolation: `law_checks.extrapolation_error`. growth, repeats: `rules.growth` and `rules.repeats_from`, None where the
    frontier is too short. notes: why something is missing.
    trials: `rules.two_trials`.
    """

    cells: "pd.DataFrame"
    surface: LawFit | None
    extrapolation: "pd.DataFrame"
    growth: rules.Growth | None
    repeats: tuple[float, float] | None
    trials: "pd.DataFrame"
    compute: str
    loss: str
    notes: tuple[str, ...] = ()

    def predict(self, macs, views) -> "pd.DataFrame":
        """Loss of runs not made, with its 90 % interval: the law's own, and for one run with the scatter of runs about it.

        Columns: forward_macs, views, train_flops, loss, low, high, run_low, run_high.
        """
        import pandas as pd

        self._need_surface()
        macs, views = np.broadcast_arrays(np.asarray(macs, float), np.asarray(views, float))
        low, high = self.surface.predict_interval(size=macs, data=views)
        scatter = np.quantile(self.surface.residuals, [0.05, 0.95])
        return pd.DataFrame({
            "forward_macs": np.ravel(macs), "views": np.ravel(views), "train_flops": np.ravel(FLOPS_PER_VIEW * macs * views),
            "loss": np.ravel(self.surface.predict(size=macs, data=views)), "low": np.ravel(low), "high": np.ravel(high),
            "run_low": np.ravel(low * np.exp(-scatter[1])), "run_high": np.ravel(high * np.exp(-scatter[0])),
        })  # fmt: skip

    def worth_running(self, macs: float, views: float) -> "pd.DataFrame":
        """By how much each pairing of the study's sizes with its numbers of views, or twice the most, would narrow the loss
        predicted at (macs, views); most first. Columns: forward_macs, views, train_flops, gain (share of variance)."""
        import pandas as pd

        self._need_surface()
        sizes = np.unique(self.cells["forward_macs"].to_numpy(float))
        amounts = np.unique(self.cells["images_seen"].to_numpy(float))
        grid = np.meshgrid(sizes, np.append(amounts, 2 * amounts.max()), indexing="ij")
        size, data = (axis.ravel() for axis in grid)
        gain = law_checks.next_cell(self.surface, {"size": size, "data": data}, {"size": macs, "data": views})
        table = pd.DataFrame({"forward_macs": size, "views": data, "train_flops": FLOPS_PER_VIEW * size * data, "gain": gain})
        return table.sort_values("gain", ascending=False, ignore_index=True)

    def _need_surface(self) -> None:
        if self.surface is None:
            raise ValueError(f"cells: {len(self.cells)}; a prediction needs the law of size and data. {self.notes[0]}")

    def sentences(self) -> list[str]:
        """The findings in words, every number of them taken from this result."""
        result = self._of_surface() if self.surface else []
        if self.growth:
            result.append(f"Along the frontier {self.growth.sentence()}")
        if self.repeats:
            once, more = self.repeats
            result.append(f"More than one epoch is best from {more:.3g} {UNITS.get(self.compute, self.compute)} on"
                          f"{f' (not yet at {once:.3g})' if once else ', the cheapest on the frontier'}.")  # fmt: skip
        if len(tried := self.trials.dropna(subset="excess")):
            ended = tried.loc[np.isfinite(tried["excess"]), "excess"]
            result.append(
                f"Two trials, proposed from cheaper cells, hold the best learning rate in {int(self.trials['found'].sum())} of"
                f" {len(self.trials)} cells"
                + (f"; the loss is at most {100 * ended.max():.1f} % above the best" if len(ended) else "")
                + (f"; what was run of them diverged in {len(tried) - len(ended)}." if len(ended) < len(tried) else ".")
            )
        return result + list(self.notes)

    def _of_surface(self) -> list[str]:
        weak = self.surface.weak()
        loose = [name for name in ("alpha", "beta") if name in weak]
        if loose:
            names = " and ".join(_MEANS[name] for name in loose)
            grown = f"These runs do not tell how the loss falls with {names} by itself: no best size is read off this law."
        elif "E" in weak:  # another floor has other exponents
            grown = "These runs do not tell the floor, and the exponents with it: no best size is read off this law."
        else:
            grown = "By this law the best size grows as compute^{:.2f} ({:.2f} to {:.2f}), and views as".format(
                *law_checks.growth_exponents(self.surface)["size"]
            )
            grown += " compute^{:.2f} ({:.2f} to {:.2f}).".format(*law_checks.growth_exponents(self.surface)["data"])
        result = [
            f"Law of size and data over all {len(self.cells)} cells, L = A N^-alpha + B D^-beta + E (N: multiply-accumulates of"
            f" a forward pass, D: views): {self.surface.sentence()}",
            grown,
        ]
        if len(self.extrapolation):
            far = self.extrapolation.iloc[min(len(self.extrapolation), max(1, len(self.cells) // 4)) - 1]
            held = int(far["held_out"])
            result.append(
                f"Fitted without the {f'{held} most expensive cells' if held > 1 else 'most expensive cell'}, it is"
                f" {abs(far['error_percent']):.1f} % {'above' if far['error_percent'] > 0 else 'below'} the loss of the most"
                f" expensive run, {far['reach']:.1f} times beyond what it was fitted to."
            )
        strange = self.cells[self.cells["outlier"]]
        if len(strange):
            result.append(f"The law of the others does not explain: {cell_names(strange)}.")
        return result


def study_laws(
    cells: "pd.DataFrame", runs: "pd.DataFrame", compute: str = "train_flops", loss: str = "heldout_loss", *,
    resamples: int = 500, seed: int = 0,
) -> StudyLaws:  # fmt: skip
    """The laws of a study. cells: of `scaling.best_per_cell`; runs: the records they come from, for the two-trial rule.

    ValueError for missing columns, or if every run diverged. What there are too few cells, sizes, budgets or rates for is left
    out, with a note.
    """
    import pandas as pd

    _require(cells, [*CELL, compute, loss, "forward_macs", "images_seen"], "cells")
    cells = cells[np.isfinite(cells[loss])].sort_values([compute, loss], kind="stable", ignore_index=True)
    if cells.empty:
        raise ValueError("cells: every run diverged; there is no law of losses that are not finite")
    size, data = (cells[name].to_numpy(float) for name in ("forward_macs", "images_seen"))
    points = {"size": size, "data": data, "loss": cells[loss].to_numpy(float), "compute": cells[compute].to_numpy(float)}
    notes, growth, surface, extrapolation, trials = [], None, None, pd.DataFrame(), pd.DataFrame(columns=rules.TRIAL_COLUMNS)
    try:
        if len(cells) < FEWEST_CELLS:
            raise TooFew(f"{len(cells)} cells, and it needs {FEWEST_CELLS}")
        groups = cells["variant"].to_numpy()
        surface = fit_law("surface", points["loss"], groups, size=size, data=data, resamples=resamples, seed=seed)
    except TooFew as error:
        notes.append(f"No law of size and data: {error}.")
    else:
        extrapolation = law_checks.extrapolation_error("surface", points)
        predicted, outlier = surface.predict(size=size, data=data), law_checks.outliers("surface", points)
        cells = cells.assign(predicted=predicted, outlier=outlier)
    try:
        growth = rules.growth(cells, compute, loss, resamples=resamples, seed=seed)
    except ValueError as error:
        notes.append(f"No rate of growth along the frontier: {error}.")
    repeats = rules.repeats_from(cells, compute, loss)
    try:
        trials = rules.two_trials(runs, loss)
    except ValueError as error:
        notes.append(f"No test of two trials: {error}.")
    if (surface or growth) and (cells.groupby("variant").size() == 1).any():
        notes.append("Some variants have a single cell, which every resample keeps: intervals are too narrow.")
    return StudyLaws(cells, surface, extrapolation, growth, repeats, trials, compute, loss, tuple(notes))
