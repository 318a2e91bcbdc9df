"""A study: pre-training cells with the learning rate tuned in each, fine-tuning of the winners, analysis, report.

Every cell (cell.run_cell) is an executed notebook and the records of its runs: a search of the learning rate, or one run.
The steps of a study depend on each other as a graph; an engine runs those that can run, on this machine or on a cluster.
What is done is skipped, so that a study killed at any moment goes on where it was, and ends with the same records.
"""

import contextlib
import functools
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nfnet_lib import PROJECT
from nfnet_lib.cell import NOTEBOOKS, execute, finished, project_relative, run_cell
from nfnet_lib.config import ConfigError, FinetuneConfig, PretrainConfig, RunConfig, StudyConfig
from nfnet_lib.engine import Engine, make_engine
from nfnet_lib.files import write_json
from nfnet_lib.graph import Done, Step, Work, run_graph
from nfnet_lib.locks import exclusive
from nfnet_lib.records import STOP, collect, results_csv
from nfnet_lib.report import best_run
from nfnet_lib.study_changes import refuse_other_study
from nfnet_lib.study_grid import PretrainCell, pretrain_cells, search_of, smaller_cells
from nfnet_lib.tuning import known_loss

GRACE_SECONDS = 60  # that interrupted runs get for a last checkpoint


def run_study(
    study: StudyConfig, study_dir: Path, *, engine: str = "local", address: str = "", only: Sequence[str] = ()
) -> tuple[Path | None, dict[str, str]]:
    """Run or resume a study; returns the report's path and {cell or notebook: error} of what failed.

    engine: "local" or "ray", with the `address` of a cluster. only: names of pre-training cells (`PretrainCell.name`); nothing
    else is run then, there is no report (None), and several such calls may share a folder, each stopped by itself. ConfigError
    if study_dir holds another study, is in use, or a name is unknown, or if `only` meets a file that asks all to stop.
    """
    from tqdm.auto import tqdm

    study_dir = study_dir.resolve()  # cells are in the checkout
    refuse_other_study(study, study_dir)
    cells = pretrain_cells(study)
    refuse_unknown_cells(study, only)
    runs_on = make_engine(
        engine, workers=study.workers, cores_per_run=study.cores_per_run, memory_per_run_gb=study.memory_per_run_gb,
        gpus_per_run=study.gpus_per_run, retries=study.retries, address=address,
    )  # fmt: skip
    if study.tpu_slice and engine != "ray":
        raise ConfigError(
            f"tpu_slice: {study.tpu_slice!r} with engine={engine!r}; slices are set apart by engine='ray'"
        )
    with contextlib.chdir(PROJECT):  # where its cells are
        _refuse_later_failures(study)
    if only and (study_dir / STOP).exists():
        raise ConfigError(f"only: {project_relative(study_dir / STOP)} asks what runs there to stop; remove it to start a cell")
    study_dir.mkdir(parents=True, exist_ok=True)
    stops = _stop_files(study, study_dir, [cell for cell in cells if cell.name in only])
    with exclusive(study_dir, "study", shared=bool(only)), _interruptible(stops, runs_on):
        if not (study_dir / "study.json").exists() or not only:
            write_json(study_dir / "study.json", study.model_dump(mode="json"))
        steps = _graph(study, study_dir)
        if only:
            steps = [step for step in steps if step.name.partition("_lr")[0] in only]
        with tqdm(total=len(steps) + (not only), unit="cell", desc=study.name) as bar:
            bar.write(f"{study.name}: {len(steps)} steps, {runs_on.workers} at a time")
            failures = run_graph(steps, runs_on, bar.write, bar.update)
            if only:
                return None, failures
            from nfnet_lib.report import build_report

            report = build_report(study_dir)
            bar.update()
    return report, failures


def _refuse_later_failures(study: StudyConfig) -> None:
    """ConfigError for data that are missing, or of other classes than a head to be kept, and ways that can't be compared."""
    from nfnet_lib.comparison import arm_configs
    from nfnet_lib.data import DATA_PARAMETERS, load_sources, make_sampler

    @functools.cache
    def classes_of(config: RunConfig) -> int:
        source, _ = load_sources(config)
        make_sampler(config, source)
        return source.num_classes

    def classes(config: RunConfig) -> int:
        """Of runs that read the same data once."""
        return classes_of(PretrainConfig.model_construct(**{name: getattr(config, name) for name in DATA_PARAMETERS}))

    for variant in study.variants:
        trained = classes(study.pretrain_config(variant, study.budgets_of(variant)[0], study.learning_rates(variant)[0][0]))
        tuned = study.finetune_config(variant, "to-be-found", 1) if study.finetune is not None else None
        if tuned is not None and classes(tuned) != trained and tuned.head == "keep":
            raise ConfigError(
                f"finetune: head: 'keep' for {variant}, but the data of pre-training have {trained} classes and those of"
                f" fine-tuning {classes(tuned)}; allowed: new"
            )
    if study.comparison_seeds:
        arm_configs(study.finetune_config(study.variants[0], "to-be-found", 1), study.comparison_seeds)


def _graph(study: StudyConfig, study_dir: Path) -> list[Step]:
    """Learning-rate searches, then fine-tuning of the winners, then the comparison and the analysis."""
    cells, steps, of_cell = pretrain_cells(study), [], {}
    for cell in cells:
        if study.lr_search == "grid":  # no search: each rate is a run with a notebook of its own
            rates = study.learning_rates(cell.variant)[0]
            runs = [study.pretrain_config(*cell[:2], lr, cell.seed) for lr in rates]
            steps += [_rate_step(study, study_dir, cell, config) for config in runs]
            of_cell[cell] = tuple(step.name for step in steps[-len(runs) :])
        else:
            needs = tuple(other.name for other in smaller_cells(study, cell)) if study.lr_search == "two_trials" else ()
            steps.append(_search_step(study, study_dir, cell, needs))
            of_cell[cell] = (cell.name,)
    tuned = _finetuning_steps(study, study_dir, of_cell)
    if study.comparison_seeds and (compared := [step for step in tuned if step.name.endswith("_ra1")]):
        origins = [cell for cell in cells if cell.variant == study.variants[0]]
        needs = (compared[0].name, *(name for cell in origins for name in of_cell[cell]))
        comparison = _comparison_step(study, study_dir, needs, origins)
        tuned = [compared[0], comparison, *(step for step in tuned if step is not compared[0])]  # the longest chain first
    pretraining = tuple(name for names in of_cell.values() for name in names)
    early = [name for name in study.notebooks if name == "01_architecture"]  # it shows the best pre-training run
    runs = tuple(step.name for step in steps + tuned)
    steps += [*tuned[:2], *(_analysis_step(study, study_dir, name, pretraining) for name in early), *tuned[2:]]

    def table() -> None:
        results_csv(collect(study_dir, with_diverged=True), study_dir / "results.csv")

    steps.append(Step("results.csv", runs, table, lambda *_: ""))
    late = [name for name in study.notebooks if name not in early]
    return steps + [_analysis_step(study, study_dir, name, ("results.csv",)) for name in late]


def _analysis_step(study: StudyConfig, study_dir: Path, name: str, needs: tuple[str, ...]) -> Step:
    def make() -> Work | str:
        shown = _shown(study, study_dir, name)
        return _notebook(study, study_dir, name, shown, "cpu") if shown else "not run: no pre-training run is done"

    return Step(name, needs, make, _executed(name))


def _shown(study: StudyConfig, study_dir: Path, name: str) -> dict[str, Any]:
    """What an analysis notebook is told: the study's folder; 00_data its data, 07_evaluate its best run, if there is one."""
    if name == "07_evaluate":
        best = best_run(str(study_dir))
        return {"weights": project_relative(best)} if best else {}
    if name != "00_data":
        return {"study_dir": project_relative(study_dir)}
    first = pretrain_cells(study)[0]
    config = study.pretrain_config(*first[:2], study.learning_rates(first.variant)[0][0], first.seed)
    names = (
        "dataset", "data_dir", "train_split", "heldout_split", "label_feature", "num_classes", "image_size", "data_seed",
        "hue_spread", "resolution", "min_area",
    )  # fmt: skip
    return {key: getattr(config, key) for key in names} | {
        "examples": min(600, config.examples_per_epoch), "heldout_examples": min(200, config.heldout_examples),
    }  # fmt: skip


def _search_step(study: StudyConfig, study_dir: Path, cell: PretrainCell, needs: tuple[str, ...]) -> Step:
    def make() -> Work | Done | str:
        found = search_of(study, cell, study_dir)
        if found is None:
            return "not run: a smaller cell, whose best learning rate the search starts from, is not done"
        return _cell(study, study_dir, *found)

    return Step(cell.name, needs, make, functools.partial(_result, cell.name, searched=True))


def _rate_step(study: StudyConfig, study_dir: Path, cell: PretrainCell, config: PretrainConfig) -> Step:
    name = f"{cell.name}_lr{config.peak_lr:g}"

    def make() -> Work | Done:
        diverged = known_loss(config, study_dir) == math.inf
        return Done({"heldout_loss": math.inf}) if diverged else _cell(study, study_dir, config)

    return Step(name, (), make, functools.partial(_result, name))


def _finetuning_steps(study: StudyConfig, study_dir: Path, of_cell: dict[PretrainCell, tuple[str, ...]]) -> list[Step]:
    """A step for each fine-tuning run: of the best pre-training run, by held-out loss, of each variant, or of each cell.

    The first variant's first, then by size; runs that share a compiled program far apart, so that only one has to compile it.
    """
    variants = dict.fromkeys([study.variants[0], *(cell.variant for cell in of_cell)])
    steps = []
    for augmult in study.finetune_augmults if study.finetune is not None else ():
        for variant in variants:
            for budget in study.budgets_of(variant) if study.finetune_cells == "all" else [None]:
                origins = [c for c in of_cell if c.variant == variant and budget in (None, c.epoch_budget)]
                needs = tuple(name for cell in origins for name in of_cell[cell])
                name = f"finetune_{variant.replace('/', '-')}{'' if budget is None else f'_ep{budget:g}'}_ra{augmult}"

                def make(origins=origins, variant=variant, augmult=augmult) -> Work | Done | str:
                    config = _winner(study, study_dir, origins, variant, augmult)
                    return config if isinstance(config, str) else _cell(study, study_dir, config)

                steps.append(Step(name, needs, make, functools.partial(_result, name)))
    return steps


def _comparison_step(study: StudyConfig, study_dir: Path, needs: tuple[str, ...], origins: list[PretrainCell]) -> Step:
    """Ways of fine-tuning the first variant, in the notebook of its run, executed once more."""

    def make() -> Work | str:
        from nfnet_lib.comparison import ARMS

        config = _winner(study, study_dir, origins, study.variants[0], 1)
        if isinstance(config, str):
            return config
        parameters = config.model_dump(mode="json", exclude={"kind"}) | _shown(study, study_dir, "03_finetune")
        parameters["comparison_seeds"] = study.comparison_seeds
        work = _notebook(study, study_dir, "03_finetune", parameters, study.platform)
        timeout = work.options["timeout"] * (1 + len(ARMS) * study.comparison_seeds)  # all its runs, one after the other
        return work._replace(options=work.options | {"timeout": timeout, "gpu_share": study.gpus_per_run})

    return Step("03_finetune", needs, make, _executed("03_finetune"))


def _winner(
    study: StudyConfig, study_dir: Path, origins: list[PretrainCell], variant: str, augmult: int
) -> FinetuneConfig | str:
    """The fine-tuning config of the best finished run of these cells; a sentence where there is none."""
    runs = collect(study_dir)
    runs = runs[(runs["kind"] == "pretrain") & (runs["variant"] == variant)] if len(runs) else runs
    if len(runs):
        runs = runs[runs["epoch_budget"].isin([cell.epoch_budget for cell in origins])]
    if not len(runs):
        return f"not run: no pre-training run of {variant} is done"
    best = runs.sort_values(["heldout_loss", "run_id"]).iloc[0]
    return study.finetune_config(variant, best["run_id"], augmult)


def _cell(study: StudyConfig, study_dir: Path, config: RunConfig, lr_grid: Sequence[float] = ()) -> Work | Done:
    """What is left to do for a cell."""
    done = finished(config, study_dir, lr_grid)
    if done is not None:
        return Done(done)
    options: dict[str, Any] = {
        "lr_grid": tuple(lr_grid), "timeout": 60 * study.timeout_minutes, "platform": study.platform,
        "gpu_share": study.gpus_per_run, "retries": study.retries,
    }  # fmt: skip
    return Work(run_cell, (config, study_dir), options | ({"tpu_slice": study.tpu_slice} if study.tpu_slice else {}))


def _notebook(study: StudyConfig, study_dir: Path, name: str, parameters: dict[str, Any], platform: str) -> Work:
    """The execution of an analysis notebook."""
    arguments = (NOTEBOOKS / f"{name}.ipynb", study_dir / "analysis" / f"{name}.ipynb", parameters)
    return Work(execute, arguments, {"timeout": 60 * study.timeout_minutes, "platform": platform})


def _result(name: str, summary: dict[str, Any], took: float | None, searched: bool = False) -> str:
    best = f" at peak_lr {summary['config']['peak_lr']:g}" if searched else ""
    return f"{name}: held-out loss {summary['heldout_loss']:.4f}{best} " + (
        "(skipped: already done)" if took is None else f"({took:.0f} s)"
    )


def _executed(name: str) -> Callable[[Any, float | None], str]:
    return lambda _, took: f"{name}: executed ({took:.0f} s)"


def refuse_unknown_cells(study: StudyConfig, only: Sequence[str]) -> None:
    """ConfigError for a name of no pre-training cell."""
    known = [cell.name for cell in pretrain_cells(study)]
    if unknown := sorted(set(only) - set(known)):
        raise ConfigError(f"only: no cell {unknown[0]!r}; known: {', '.join(known)}")


def _stop_files(study: StudyConfig, study_dir: Path, only: list[PretrainCell]) -> list[Path]:
    """The files that ask a study's runs to stop: its own, or, as others may run in its folder, those of the cells' runs."""
    runs = [
        study.pretrain_config(*cell[:2], lr, cell.seed).run_id for cell in only for lr in study.learning_rates(cell.variant)[0]
    ]
    return [study_dir / run / STOP for run in runs] or [study_dir / STOP]


@contextlib.contextmanager
def _interruptible(stops: list[Path], engine: Engine) -> Iterator[None]:
    """On SIGINT or SIGTERM ask every run for a last checkpoint (a kernel never gets the signal itself); then again, end now."""

    def take_back() -> None:
        for stop in stops:
            stop.unlink(missing_ok=True)

    take_back()  # of a study that was killed
    asked: list[int] = []

    def handle(*_) -> None:
        asked.append(1)
        for stop in stops:
            if stop.parent.is_dir():
                stop.touch()
        if len(asked) == 1:
            print(
                f"stopping: runs get {GRACE_SECONDS} s for a last checkpoint; once more ends them now", file=sys.stderr
            )
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        try:
            engine.close(GRACE_SECONDS if asked else 0)
        finally:
            take_back()
            for number, handler in previous.items():
                signal.signal(number, handler)
