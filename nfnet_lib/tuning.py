"""The learning rate of a cell (a variant at an epoch budget), tuned on a grid of factors of 2 (the paper, section 2)."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nfnet_lib.config import ConfigError, RunConfig
from nfnet_lib.files import write_json
from nfnet_lib.records import FAILURE, SUMMARY, diverged, read_metrics, read_summary

if TYPE_CHECKING:
    import pandas as pd


class Tuned(NamedTuple):
    """losses: {peak_lr: held-out loss, infinite where it diverged}; metrics: {name: metrics of that run}; summary: best's."""

    losses: dict[float, float]
    metrics: dict[str, "pd.DataFrame"]
    summary: dict


def search_lr(grid: list[float], start: float, loss_of: Callable[[float], float]) -> dict[float, float]:
    """{lr: loss} of the rates tried: start and its neighbours in `grid`, then on downhill until a minimum is bracketed.

    The best rate found has a worse one on each side, unless it is an end of the grid.
    """
    tried: dict[int, float] = {}

    def try_index(index: int) -> None:
        if 0 <= index < len(grid) and index not in tried:
            tried[index] = loss_of(grid[index])

    best = grid.index(start)
    while True:
        for index in (best, best - 1, best + 1):
            try_index(index)
        lowest = min(tried, key=lambda index: (tried[index], index))
        if lowest == best:
            return {grid[index]: tried[index] for index in sorted(tried)}
        best = lowest


def tune(config: RunConfig, lr_grid: list[float], study_dir: Path, *, progress: bool = True) -> Tuned:
    """Train `config` at its peak_lr and at those of lr_grid that `search_lr` asks for, each a run in study_dir.

    An empty lr_grid is peak_lr alone. Runs that are done are not run again. A rate that diverges counts as infinitely
    bad and leaves failure.json; NonFiniteLoss where all do. ConfigError for a peak_lr that is not in the grid.
    """
    from nfnet_lib.train import NonFiniteLoss, run

    def loss_of(lr: float) -> float:
        trial = at_lr(config, lr)
        known = known_loss(trial, study_dir)
        if known is not None:
            return known
        folder = study_dir / trial.run_id
        try:
            return run(trial, folder, cache_dir=study_dir / ".cache", progress=progress)["heldout_loss"]
        except NonFiniteLoss as error:
            if not lr_grid:
                raise
            write_json(folder / FAILURE, {"error": str(error), "diverged": True})
            return math.inf

    losses = _search(config, lr_grid, loss_of)
    best = min(losses, key=losses.get)
    if not math.isfinite(losses[best]):
        raise NonFiniteLoss(f"every peak_lr tried diverged: {', '.join(f'{lr:g}' for lr in losses)}")
    folders = {lr: study_dir / at_lr(config, lr).run_id for lr in losses}
    curves = {f"{config.variant}, peak_lr {lr:g}": read_metrics(folder) for lr, folder in folders.items()}
    return Tuned(losses, curves, read_summary(folders[best]))


def table(losses: dict[float, float]) -> "pd.DataFrame":
    """Held-out loss of each learning rate tried, and which is the best."""
    import pandas as pd

    best = min(losses, key=losses.get)
    rows = [{"peak_lr": lr, "heldout_loss": loss, "best": lr == best} for lr, loss in losses.items()]
    return pd.DataFrame(rows).set_index("peak_lr")


def tuned_already(config: RunConfig, lr_grid: list[float], study_dir: Path) -> dict | None:
    """Summary of the best run of a cell whose search is complete in study_dir; None where a run is missing."""
    losses, missing = _search_on_record(config, lr_grid, study_dir)
    return None if missing else read_summary(study_dir / at_lr(config, min(losses, key=losses.get)).run_id)


def missing_run(config: RunConfig, lr_grid: list[float], study_dir: Path) -> RunConfig | None:
    """The run that a cell's search in study_dir asks for next; None where it is complete."""
    return _search_on_record(config, lr_grid, study_dir)[1]


def _search_on_record(config: RunConfig, lr_grid: list[float], study_dir: Path) -> tuple[dict, RunConfig | None]:
    """({peak_lr: loss}, None) of a complete search; ({}, the first run that is missing) of another."""

    class Missing(Exception):
        pass

    def loss_of(lr: float) -> float:
        trial = at_lr(config, lr)
        loss = known_loss(trial, study_dir)
        if loss is None:
            raise Missing(trial)
        return loss

    try:
        return _search(config, lr_grid, loss_of), None
    except Missing as missing:
        return {}, missing.args[0]


def known_loss(config: RunConfig, study_dir: Path) -> float | None:
    """Held-out loss of a finished run in study_dir; infinite where it diverged; None where it is not done.

    ConfigError where its folder holds a run of other parameters.
    """
    folder = study_dir / config.run_id
    if (folder / SUMMARY).exists():
        summary = read_summary(folder)
        if summary["config_hash"] != config.config_hash:
            raise ConfigError(f"{folder.name} holds a run of other parameters; choose another study folder")
        return summary["heldout_loss"]
    return math.inf if diverged(folder) else None


def at_lr(config: RunConfig, peak_lr: float) -> RunConfig:
    """The same run at another learning rate."""
    return config.model_copy(update={"peak_lr": peak_lr})


def _search(config: RunConfig, lr_grid: list[float], loss_of: Callable[[float], float]) -> dict[float, float]:
    grid = list(lr_grid) or [config.peak_lr]
    if config.peak_lr not in grid:
        raise ConfigError(f"peak_lr: {config.peak_lr} is not in lr_grid={grid}, where the search must begin")
    return search_lr(grid, config.peak_lr, loss_of)
