"""The grid of a study: its pre-training cells, and where the search of each one's learning rate begins."""

from pathlib import Path
from typing import NamedTuple

from nfnet_lib import flops
from nfnet_lib.cell import finished
from nfnet_lib.config import PretrainConfig, StudyConfig
from nfnet_lib.variants import VARIANTS


class PretrainCell(NamedTuple):
    """A variant at an epoch budget with a seed (None: that of the study's parameters), whose learning rate is tuned."""

    variant: str
    epoch_budget: float
    seed: int | None

    @property
    def name(self) -> str:
        seed = "" if self.seed is None else f"_s{self.seed}"
        return f"{self.variant.replace('/', '-')}_ep{self.epoch_budget:g}{seed}"


def pretrain_cells(study: StudyConfig) -> list[PretrainCell]:
    """The grid of a study, the longest cell first: the workers stay busy to the end."""
    cells = [
        PretrainCell(variant, budget, seed)
        for variant in study.variants
        for budget in study.budgets_of(variant)
        for seed in study.seeds or [None]
    ]
    return sorted(cells, key=lambda cell: -_macs(study, cell))


def search_of(study: StudyConfig, cell: PretrainCell, study_dir: Path) -> tuple[PretrainConfig, list[float]] | None:
    """(where the search of a cell's learning rate begins, the rates that it may try).

    With lr_search="two_trials" that depends on the best rates of smaller cells: None where one that is needed is not done.
    """
    return _search_of(study, cell, study_dir, {})


def _search_of(
    study: StudyConfig, cell: PretrainCell, study_dir: Path, searched: dict[PretrainCell, PretrainConfig | None]
) -> tuple[PretrainConfig, list[float]] | None:  # fmt: skip
    """searched: what was found of smaller cells on the way, which have smaller ones in common."""
    lr_grid, lr_start = study.learning_rates(cell.variant)
    start = lr_start.get(cell.epoch_budget, lr_grid[len(lr_grid) // 2])
    if study.lr_search == "two_trials" and (smaller := smaller_cells(study, cell)):
        import pandas as pd

        from nfnet_lib.rules import propose_lr

        known = []
        for other in smaller:
            if other not in searched:
                searched[other] = _searched(study, other, study_dir, searched)
            if (config := searched[other]) is None:
                return None
            known.append({
                "forward_macs": flops.run_macs(config), "epoch_budget": other.epoch_budget, "best_lr": config.peak_lr,
            })  # fmt: skip
        start, second = propose_lr(pd.DataFrame(known), _size(study, cell), cell.epoch_budget, lr_grid)
        lr_grid = sorted((start, second))
    return study.pretrain_config(*cell[:2], start, cell.seed), lr_grid


def _searched(
    study: StudyConfig, cell: PretrainCell, study_dir: Path, searched: dict[PretrainCell, PretrainConfig | None]
) -> PretrainConfig | None:  # fmt: skip
    """The config of a cell's best run; None where the cell is not done."""
    found = _search_of(study, cell, study_dir, searched)
    if found is None or (summary := finished(found[0], study_dir, found[1])) is None:
        return None
    return found[0].model_copy(update={"peak_lr": summary["config"]["peak_lr"]})


def smaller_cells(study: StudyConfig, cell: PretrainCell) -> list[PretrainCell]:
    """The cells whose best rates a two-trial search starts from: no larger in size and epochs, of the same family and seed."""
    family = VARIANTS[cell.variant].family
    return [
        other
        for other in pretrain_cells(study)
        if other != cell and other.seed == cell.seed and other.epoch_budget <= cell.epoch_budget
        and VARIANTS[other.variant].family == family and _size(study, other) <= _size(study, cell)
    ]  # fmt: skip


def least_runs(study: StudyConfig, cell: PretrainCell) -> int:
    """Learning rates that a cell's search tries at least: all of a grid, two trials, or three where a minimum is bracketed."""
    rates = len(study.learning_rates(cell.variant)[0])
    if study.lr_search == "grid":
        return rates
    return min(2 if study.lr_search == "two_trials" and smaller_cells(study, cell) else 3, rates)


def _size(study: StudyConfig, cell: PretrainCell) -> int:
    return flops.run_macs(study.pretrain_config(*cell[:2], study.learning_rates(cell.variant)[0][0], cell.seed))


def _macs(study: StudyConfig, cell: PretrainCell) -> float:
    return cell.epoch_budget * _size(study, cell)
