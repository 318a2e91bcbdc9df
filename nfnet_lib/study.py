"""A study: pre-training cells with the learning rate tuned in each, fine-tuning of the winners, analysis, report.

Every cell (cell.run_cell) is an executed notebook and the records of its runs: a search of the learning rate, or one run.
What is done is skipped, so that a study killed at any moment goes on where it was, and ends with the same records.
"""

import contextlib
import fcntl
import functools
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from nfnet_lib import flops
from nfnet_lib.cell import NOTEBOOKS, CellFailed, cell_dir, execute, project_relative, run_cell
from nfnet_lib.config import ConfigError, RunConfig, StudyConfig
from nfnet_lib.records import collect, results_csv, write_json
from nfnet_lib.variants import VARIANTS

_FREE_TO_CHANGE = (
    "workers", "memory_per_run_gb", "timeout_minutes", "notebooks", "finetune_cells", "comparison_seeds"
)  # fmt: skip


class Pool:
    """A few threads, each of which waits for one run at a time on one core of its own."""

    def __init__(self, study: StudyConfig, study_dir: Path, say: Callable[[str], None]):
        cores = sorted(os.sched_getaffinity(0))
        memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        fitting = max(1, int(memory_gb // study.memory_per_run_gb))
        self.workers = min(study.workers or len(cores), len(cores), fitting)
        self.failures: dict[str, str] = {}
        self._study, self._dir, self._say = study, study_dir, say
        self._cores: queue.SimpleQueue = queue.SimpleQueue()
        for core in cores[: self.workers]:
            self._cores.put(core)
        self.stopping = threading.Event()

    def run(self, config: RunConfig, lr_grid: Sequence[float] = ()) -> None:
        """One cell (cell.run_cell); a failure is reported and remembered."""
        if self.stopping.is_set():
            raise KeyboardInterrupt
        core = self._cores.get()
        name = config.cell_id if lr_grid else config.run_id
        try:
            done = (cell_dir(config, self._dir, lr_grid) / "run.ipynb").exists()
            clock = time.monotonic()
            summary = run_cell(config, self._dir, lr_grid=lr_grid, core=core, timeout=60 * self._study.timeout_minutes)
            took = "skipped: already done" if done else f"{time.monotonic() - clock:.0f} s"
            best = f" at peak_lr {summary['config']['peak_lr']:g}" if lr_grid else ""
            self._say(f"{name}: held-out loss {summary['heldout_loss']:.4f}{best} ({took})")
        except CellFailed as error:
            self.failures[name] = str(error)
            self._say(f"{name}: FAILED: {error}")
        finally:
            self._cores.put(core)

    def execute(self, name: str, parameters: dict[str, Any]) -> None:
        """An analysis notebook that trains, on a core of its own; a failure is reported and remembered."""
        if self.stopping.is_set():
            raise KeyboardInterrupt
        core = self._cores.get()
        try:
            timeout = 60 * self._study.timeout_minutes
            self.failures |= _analyse(name, self._dir, self._say, parameters, core, timeout)
        finally:
            self._cores.put(core)

    def map(self, function: Callable, items: list, done: Callable[[], None]) -> None:
        """function(item) for all items, as many at a time as there are workers; an interrupt ends all of them."""
        with ThreadPoolExecutor(self.workers) as executor:
            futures = [executor.submit(function, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
                    done()
            except BaseException:
                self.stopping.set()
                for future in futures:
                    future.cancel()
                raise


def run_study(study: StudyConfig, study_dir: Path) -> tuple[Path, dict[str, str]]:
    """Run or resume a study; returns the report's path and {run or notebook: error} of what failed.

    ConfigError if study_dir holds another study or is in use.
    """
    from tqdm.auto import tqdm

    from nfnet_lib.data import load_sources
    from nfnet_lib.report import build_report

    _refuse_other_study(study, study_dir)
    cells = [(variant, budget) for variant in study.variants for budget in study.epoch_budgets]
    cells.sort(key=lambda cell: -_cost(study, *cell))  # the longest first: the pool stays full to the end
    for config in [study.pretrain_config(*cells[0], study.learning_rates(cells[0][0])[0][0])] + (
        [study.finetune_config(study.variants[0], "to-be-found", 1)] if study.finetune else []
    ):
        load_sources(config)  # an unknown or missing data set is refused here
    study_dir.mkdir(parents=True, exist_ok=True)
    with _exclusive(study_dir), _interruptible(study_dir):
        write_json(study_dir / "study.json", study.model_dump(mode="json"))
        tuning = len(cells) if study.finetune_cells == "all" else len(study.variants)
        tuning = tuning * len(study.finetune_augmults) if study.finetune else 0
        with tqdm(total=len(cells) + tuning + len(study.notebooks) + 1, unit="cell", desc=study.name) as bar:
            pool = Pool(study, study_dir, bar.write)
            bar.write(f"{study.name}: {len(cells)} cells, {tuning} fine-tuning runs, {pool.workers} at a time")
            pool.map(lambda cell: _run_pretraining(study, pool, *cell), cells, lambda: bar.update())
            records = collect(study_dir)
            if study.finetune:
                pool.map(lambda job: job(), _finetuning_jobs(study, pool, records), lambda: bar.update())
            failures = dict(pool.failures)
            results_csv(collect(study_dir), study_dir / "results.csv")
            for name in study.notebooks:
                failures |= _analyse(name, study_dir, bar.write)
                bar.update()
            report = build_report(study_dir)
            bar.update()
    return report, failures


def _run_pretraining(study: StudyConfig, pool: Pool, variant: str, budget: float) -> None:
    lr_grid, lr_start = study.learning_rates(variant)
    if study.lr_search == "grid":
        for lr in lr_grid:
            pool.run(study.pretrain_config(variant, budget, lr))
        return
    start = lr_start.get(budget, lr_grid[len(lr_grid) // 2])
    pool.run(study.pretrain_config(variant, budget, start), lr_grid)


def _finetuning_jobs(study: StudyConfig, pool: Pool, records) -> list[Callable[[], None]]:
    """A job for each fine-tuning run; that of the first variant is followed by the comparison of recipes, if there is one."""
    configs = _finetuning(study, records)
    jobs: list[Callable[[], None]] = []
    compared = [config for config in configs if config.variant == study.variants[0] and config.augmult == 1][:1]
    for config in compared if study.comparison_seeds else ():
        configs.remove(config)

        def job(config=config) -> None:
            pool.run(config)
            parameters = config.model_dump(mode="json", exclude={"kind"})
            pool.execute("03_finetune", parameters | {"comparison_seeds": study.comparison_seeds})

        jobs.append(job)
    return jobs + [functools.partial(pool.run, config) for config in configs]


def _finetuning(study: StudyConfig, records) -> list[RunConfig]:
    """Fine-tuning configs of the best pre-training run, by held-out loss, of each variant, or of each cell."""
    runs = records[records["kind"] == "pretrain"] if len(records) else records
    configs = []
    for variant in study.variants:
        own = runs[runs["variant"] == variant].sort_values(["heldout_loss", "run_id"]) if len(runs) else runs
        if len(own):
            own = own.drop_duplicates("epoch_budget") if study.finetune_cells == "all" else own.head(1)
            configs += [study.finetune_config(variant, i, k) for i in own["run_id"] for k in study.finetune_augmults]
    # The two runs of a variant share a compiled program: apart in time, the second finds it.
    size = {variant: flops.num_params(VARIANTS[variant], 10) for variant in study.variants}
    return sorted(configs, key=lambda config: (config.augmult, -size[config.variant]))


def _analyse(
    name: str, study_dir: Path, say: Callable[[str], None], parameters: dict[str, Any] | None = None,
    core: int | None = None, timeout: float | int = 600,
) -> dict[str, str]:  # fmt: skip
    try:
        execute(NOTEBOOKS / f"{name}.ipynb", study_dir / "analysis" / f"{name}.ipynb",
                (parameters or {}) | {"study_dir": project_relative(study_dir)}, core=core, timeout=timeout)  # fmt: skip
        say(f"{name}: executed")
        return {}
    except CellFailed as error:
        say(f"{name}: FAILED: {error}")
        return {name: str(error)}


def _cost(study: StudyConfig, variant: str, budget: float) -> float:
    config = study.pretrain_config(variant, budget, study.learning_rates(variant)[0][0])
    return budget * flops.forward_macs(config.architecture, config.resolution, config.num_classes)


def _refuse_other_study(study: StudyConfig, study_dir: Path) -> None:
    import json

    path = study_dir / "study.json"
    if not path.exists():
        return
    now = study.model_dump(mode="json")
    before = StudyConfig.model_construct().model_dump(mode="json", warnings=False) | json.loads(path.read_text())
    for key in now:
        if key not in _FREE_TO_CHANGE and before.get(key) != now[key]:
            raise ConfigError(
                f"{key}: {now[key]!r}, but {project_relative(study_dir)} holds a study with {before.get(key)!r}; "
                "give the study another name or another --out"
            )


@contextlib.contextmanager
def _exclusive(study_dir: Path) -> Iterator[None]:
    with (study_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"study: another process is running {project_relative(study_dir)}") from None
        yield


@contextlib.contextmanager
def _interruptible(study_dir: Path) -> Iterator[None]:
    """On SIGINT or SIGTERM ask every run for a last checkpoint (a kernel never gets the signal itself), then go."""

    def stop(*_):
        for params in study_dir.glob("*/params.json"):
            if not (params.parent / "summary.json").exists():
                (params.parent / "STOP").touch()
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
