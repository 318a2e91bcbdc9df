"""Ways of fine-tuning side by side at equal compute: plain, SAM, repeated augmentation, both; seeds and what they can tell."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nfnet_lib.config import ConfigError, FinetuneConfig
from nfnet_lib.flops import train_flops
from nfnet_lib.records import collect
from nfnet_lib.report import open_study

if TYPE_CHECKING:
    import pandas as pd

PLAIN = "plain"
RHO = 0.05  # of SAM where the config has none (arXiv 2102.06171, A.5)
# name: (with SAM, views of each image)
ARMS = {
    PLAIN: (False, 1), "RA, 2 views": (False, 2), "RA, 4 views": (False, 4), "SAM": (True, 1), "SAM + RA, 4 views": (True, 4),
}  # fmt: skip
CONFIDENCE = 0.95


def arm_configs(config: FinetuneConfig, seeds: int) -> list[tuple[str, FinetuneConfig]]:
    """(arm, config) of every arm and seed, each with the compute of `config`: SAM's two gradients halve the steps.

    ConfigError for a batch that 4 views do not divide, or fewer than one step.
    """
    if seeds < 0:
        raise ConfigError(f"comparison_seeds: {seeds} is negative; allowed: 0 or more")
    budget = config.steps * _cost(config.rho, config.ascent_fraction)
    configs = []
    for name, (sam, augmult) in ARMS.items():
        rho = (config.rho or RHO) if sam else 0.0
        steps = max(1, round(budget / _cost(rho, config.ascent_fraction)))
        changed = {
            "compared_as": name,
            "rho": rho,
            "augmult": augmult,
            "epoch_budget": steps * config.batch_size / config.examples_per_epoch,
        }
        params = config.model_dump() | changed
        configs += [(name, FinetuneConfig.from_params(params | {"seed": config.seed + i})) for i in range(seeds)]
    return configs


def run_arms(config: FinetuneConfig, study_dir: Path, seeds: int, *, progress: bool = True) -> "pd.DataFrame":
    """Fine-tune every arm with every seed, each a run in study_dir unless it is done there; a row a run, as `recorded`."""
    from tqdm.auto import tqdm

    from nfnet_lib.train import run

    configs = [own for _, own in arm_configs(config, seeds)]
    for own in tqdm(configs, unit="run", disable=not progress):
        run(own, study_dir / own.run_id, cache_dir=study_dir / ".cache", progress=False)
    runs = recorded(collect(study_dir))
    return runs[runs["run_id"].isin([own.run_id for own in configs])]


def runs_to_show(config: FinetuneConfig, study_dir: Path, seeds: int) -> "pd.DataFrame":
    """`run_arms` with this number of seeds; 0: those on record, of study_dir or else of the laptop study; below 0: none."""
    if seeds > 0:
        return run_arms(config, study_dir, seeds)
    found = recorded(collect(study_dir))
    if found.empty and seeds == 0:
        with contextlib.suppress(FileNotFoundError):
            found = recorded(open_study()[0])
    return found[:0] if seeds < 0 else one_comparison(found, config)


def one_comparison(runs: "pd.DataFrame", config: FinetuneConfig) -> "pd.DataFrame":
    """Of recorded runs those of one variant, data set and origin: the config's where there are any, else the most."""
    groups = [group for _, group in runs.groupby(["variant", "dataset", "pretrained_run"], dropna=False, sort=False)]

    def rank(group: "pd.DataFrame") -> tuple[bool, bool, int]:
        first = group.iloc[0]
        alike = (first["variant"], first["dataset"]) == (config.variant, config.dataset)
        return alike and first["pretrained_run"] == config.pretrained_run, alike, len(group)

    return max(groups, key=rank) if groups else runs


def recorded(df: "pd.DataFrame") -> "pd.DataFrame":
    """The runs of a comparison among records (`records.collect`), a row a run, in the order of ARMS.

    Columns: arm, seed, variant, dataset, epoch_budget, augmult, rho, train_flops, heldout_examples, top1_error_percent,
    heldout_loss, run_id, pretrained_run.
    """
    import pandas as pd

    arms = df["compared_as"].fillna("") if "compared_as" in df else pd.Series("", index=df.index)
    runs = df.assign(arm=arms)[arms.isin(list(ARMS))]
    runs = runs.assign(top1_error_percent=100 * (1 - runs["heldout_top1"]))
    runs = runs.sort_values(["arm", "seed"], key=lambda c: c.map(list(ARMS).index) if c.name == "arm" else c)
    return runs.reindex(columns=[
        "arm", "seed", "variant", "dataset", "epoch_budget", "augmult", "rho", "train_flops", "heldout_examples",
        "top1_error_percent", "heldout_loss", "run_id", "pretrained_run",
    ])  # fmt: skip


def arm_table(runs: "pd.DataFrame") -> "pd.DataFrame":
    """One row an arm of `run_arms`: seeds, mean error, its standard error, difference to plain, half its interval.

    difference and interval (NaN for the plain arm, or with one seed): percentage points; Welch's t interval that holds for all
    arms together with 95% (Bonferroni). The standard deviation over seeds is taken to be at least one example.
    """
    import pandas as pd
    from scipy.stats import t

    rows = []
    grouped = {name: part["top1_error_percent"].to_numpy(float) for name, part in runs.groupby("arm", sort=False)}
    if PLAIN not in grouped:
        raise ValueError(f"runs has no arm {PLAIN!r}; it has {', '.join(map(str, grouped))}")
    least = (100 / runs["heldout_examples"].iloc[0]) ** 2
    squares = {n: max(np.var(e, ddof=1), least) / len(e) if len(e) > 1 else np.nan for n, e in grouped.items()}
    for name, errors in grouped.items():
        difference, interval = errors.mean() - grouped[PLAIN].mean(), np.nan
        pair = [(squares[n], len(grouped[n])) for n in (name, PLAIN)]
        if name != PLAIN and all(n > 1 for _, n in pair):
            both = sum(square for square, _ in pair)
            freedom = both**2 / sum(square**2 / (n - 1) for square, n in pair)
            interval = t.ppf(1 - (1 - CONFIDENCE) / 2 / max(len(grouped) - 1, 1), freedom) * both**0.5
        rows.append({
            "arm": name, "seeds": len(errors), "mean": errors.mean(), "standard_error": squares[name] ** 0.5,
            "difference": np.nan if name == PLAIN else difference, "interval": interval,
        })  # fmt: skip
    return pd.DataFrame(rows)


def sentence(runs: "pd.DataFrame") -> str:
    """What the comparison shows; says so where a difference lies within the noise, or there is no comparison."""
    if runs.empty:
        return "No runs to compare: with comparison_seeds 3 they are made."
    table, examples = arm_table(runs), int(runs["heldout_examples"].iloc[0])
    plain, others = table[table["arm"] == PLAIN].iloc[0], table[table["arm"] != PLAIN]
    setting = f"{runs['variant'].iloc[0]} on {runs['dataset'].iloc[0]}"
    start = (
        f"{setting}: at equal compute plain fine-tuning errs on {plain['mean']:.2f}% of {examples:,} held-out images"
    )
    listed = "; ".join(
        f"{row.arm} {row.difference:+.2f}" + ("" if np.isnan(row.interval) else f" ± {row.interval:.2f}")
        for row in others.itertuples()
    )
    if others["interval"].isna().any():
        return f"{start} (differences in points: {listed}). With one seed nothing can be said of the noise."
    clear = others[others["difference"].abs() > others["interval"]]
    seeds = int(table["seeds"].min())
    tail = f" Differences in points over {seeds} seeds, with 95% intervals for all together: {listed}."
    if clear.empty:
        return f"{start}, and no other way differs from it by more than the noise.{tail}"
    found = " and ".join(
        f"{row.arm} {'lowers' if row.difference < 0 else 'raises'} that by {abs(row.difference):.2f} points"
        for row in clear.itertuples()
    )
    rest = len(others) - len(clear)
    noise = f"; the other {rest} can't be told from plain" if rest else ""
    return f"{start}: {found}{noise}.{tail}"


def _cost(rho: float, ascent_fraction: float) -> float:
    """Compute of a step, in plain steps."""
    return train_flops(1, 1, rho, ascent_fraction) / train_flops(1, 1, 0.0, 1.0)
