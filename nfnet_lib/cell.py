"""One notebook in a process of its own, through papermill, with the traps of papermill closed.

Success is never read off the notebook (after a dead kernel papermill's metadata calls every cell completed): a run is
done when the process ended with 0 and the run wrote its summary. It dies with the process that started it.
"""

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from nfnet_lib import PROJECT
from nfnet_lib.config import RunConfig
from nfnet_lib.files import write_json
from nfnet_lib.notebook_process import NotebookProcess, papermill
from nfnet_lib.records import FAILURE, STOP
from nfnet_lib.tuning import tuned_already

T = TypeVar("T")

NOTEBOOKS = PROJECT / "notebooks"
LONGEST_OUTPUT = 200_000  # characters of one printed output that a notebook keeps; the log has all of it
INTERACTIVE = "JPY_SESSION_NAME"  # which a Jupyter server sets for the kernels of open notebooks
_RUN_NOTEBOOK = {"pretrain": "02_pretrain.ipynb", "finetune": "03_finetune.ipynb"}
# XLA takes its work space anew at every step on CPU: 15% off a step from large pages, 3% where the process keeps it; some
# 5% off compilation where a thread keeps 500 small chunks of a size for itself, not 7 (LOG.md).
MALLOC_SETTINGS = (
    f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={4 << 30}:glibc.malloc.trim_threshold={8 << 30}"
    ":glibc.malloc.tcache_count=500"
)
# Logs are read for their last line. Python 3.13 colours tracebacks where FORCE_COLOR is set, as Jupyter sets it.
NO_COLOURS = {"PYTHON_COLORS": "0"}


class CellFailed(RuntimeError):
    """A notebook did not end well: the last line of its log; `log` is the whole.

    lost: its process or kernel died, or the machine did: another try, which resumes, may well succeed.
    """

    def __init__(self, message: str, log: str, lost: bool = False):
        super().__init__(message, log, lost)  # all of them, so that it survives being sent between processes
        self.log, self.lost = log, lost

    def __str__(self) -> str:
        return self.args[0]


class CellStopped(RuntimeError):
    """A cell was asked to stop, and can be resumed."""


_at_work: set[NotebookProcess] = set()
_idle: list[NotebookProcess] = []
_keepers: list[object] = []  # for whom processes are kept that have nothing to do
_stopping = threading.Event()  # no cell of this process starts any more


def heed_stopping(name: str) -> None:
    """CellStopped where no cell of this process is to start any more."""
    if _stopping.is_set():
        raise CellStopped(f"{name} was not started")


@contextlib.contextmanager
def cells_stopping(grace: float | int) -> Iterator[None]:
    """Start no more notebooks in this process, wait up to `grace` seconds for those that run, then kill them."""
    _stopping.set()
    end = time.monotonic() + grace
    try:
        while _at_work and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for process in list(_at_work):
            process.kill()
    yield
    _stopping.clear()


@contextlib.contextmanager
def processes_kept() -> Iterator[None]:
    """Within, one notebook after another is executed by the same processes, which have imported what cells need.

    They end with their threads at the latest.
    """
    keeper = object()
    _keepers.append(keeper)
    try:
        yield
    finally:
        _keepers.remove(keeper)
        while _idle and not _keepers:
            _idle.pop().close()


def _process_for(environment: dict[str, str], cores: int, errors: IO[str]) -> NotebookProcess:
    """One of this thread's that has nothing to do, or a new one."""
    for process in list(_idle):
        if process.made_for == (environment, cores, threading.current_thread()):
            _idle.remove(process)
            if process.alive:
                return process
    return NotebookProcess(environment, cores, bool(_keepers), errors)


def execute(
    notebook: Path,
    output: Path,
    parameters: dict[str, Any],
    *,
    cores: Sequence[int] = (),
    timeout: float | int | None = None,
    platform: str = "cpu",
    gpu_share: float | int = 0,
) -> None:
    """Execute `notebook` with `parameters` into `output`, which appears only if every cell ran; CellFailed otherwise.

    While it runs, and after a failure, the notebook is `output` with `.partial` before the suffix; the log lies beside.
    At the top of both stands the papermill command that does the same by hand.
    cores: the processor cores that it may use, which also fix the order of floating-point sums; none named: all.
    timeout: seconds. platform: what JAX must run on, unless JAX_PLATFORMS is set; where it is missing the run fails.
    gpu_share: of a GPU that several notebooks use at once; JAX would take three quarters of its memory for each. 0: all.
    """
    partial, log = output.with_suffix(".partial.ipynb"), output.with_suffix(".log")
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | NO_COLOURS | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", platform)}
    for name in ("MPLBACKEND", INTERACTIVE):  # the kernel's own puts figures into the notebook; nobody watches it
        environment.pop(name, None)
    environment.setdefault("GLIBC_TUNABLES", MALLOC_SETTINGS)
    if 0 < gpu_share < 1:
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 * gpu_share:g}")
    with log.open("w") as stream:
        process, code = _process_for(environment, len(cores), stream), None
    _at_work.add(process)
    try:
        heed_stopping(output.parent.name)
        code = process.execute(notebook, partial, parameters, cores, log, timeout)
    except subprocess.TimeoutExpired:
        raise CellFailed(f"{output.stem} took longer than {timeout / 60:g} minutes", log.read_text()) from None
    finally:
        _at_work.discard(process)
        if _keepers and code is not None and process.alive:
            _idle.append(process)
        else:
            process.close()
    if code != 0:
        if _stopping.is_set():
            raise CellStopped(f"{output.parent.name} was stopped")
        text = log.read_text()
        last = ([line for line in text.strip().splitlines() if line.strip()] or [""])[-1][:500]
        if re.match(r"(\w+\.)*Stopped: ", last):
            raise CellStopped(last)
        lost = code < 0 or "DeadKernelError" in last or "Kernel died before" in last
        if code < 0:
            last = f"its process was ended by {signal.Signals(-code).name}"
        raise CellFailed(last or f"exit code {code}", text, lost)
    partial.replace(output)


def run_cell(
    config: RunConfig, study_dir: Path, *, lr_grid: Sequence[float] = (), cores: Sequence[int] = (),
    timeout: float | int | None = None, platform: str = "cpu", gpu_share: float | int = 0, retries: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The summary of the best run of a cell of a study, made by its notebook unless it is done.

    With an lr_grid the cell is a search from config.peak_lr (`tuning.tune`), without one a single run. A process that was
    lost is started again up to `retries` times, and resumes. CellFailed leaves failure.json with the traceback, beside the
    notebook as far as it came. This is the function that the engines call, on whatever machine.
    """
    folder = cell_dir(config, study_dir, lr_grid)
    output = folder / "run.ipynb"
    done = finished(config, study_dir, lr_grid)
    if done is not None:
        return done
    parameters = config.model_dump(mode="json", exclude={"kind"}) | {"study_dir": project_relative(study_dir)}
    if lr_grid:
        parameters["lr_grid"] = list(lr_grid)
    if config.kind == "finetune":
        parameters["comparison_seeds"] = -1
    notebook = NOTEBOOKS / _RUN_NOTEBOOK[config.kind]

    def attempt() -> dict[str, Any]:
        execute(notebook, output, parameters, cores=cores, timeout=timeout, platform=platform, gpu_share=gpu_share)
        if (done := tuned_already(config, list(lr_grid), study_dir)) is None:
            raise CellFailed("the notebook ended without a summary of its run", output.with_suffix(".log").read_text())
        return done

    done = with_retries(attempt, retries, folder, searched=bool(lr_grid))
    (folder / FAILURE).unlink(missing_ok=True)
    return done


def with_retries(attempt: Callable[[], T], retries: int, folder: Path, *, searched: bool) -> T:
    """What `attempt` gives, tried again up to `retries` times where what it ran on was lost; CellStopped by its study's STOP.

    folder: the cell's, where a CellFailed that remains leaves failure.json; searched: whether a search of learning rates.
    """
    started = time.time()
    for left in itertools.count(retries, -1):
        if (folder.parent / STOP).exists():
            raise CellStopped(f"{folder.name} was not started")
        try:
            return attempt()
        except CellFailed as error:
            if error.lost and left:
                continue
            failure = {"error": str(error), "traceback": error.log[-20_000:], "seconds": time.time() - started}
            failure |= {"diverged": True} if "NonFiniteLoss" in str(error) and not searched else {}
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / FAILURE, failure)
            raise


def finished(config: RunConfig, study_dir: Path, lr_grid: Sequence[float] = ()) -> dict[str, Any] | None:
    """Summary of the best run of a cell that is done, with its notebook; None otherwise."""
    if not (cell_dir(config, study_dir, lr_grid) / "run.ipynb").exists():
        return None
    return tuned_already(config, list(lr_grid), study_dir)


def cell_dir(config: RunConfig, study_dir: Path, lr_grid: Sequence[float] = ()) -> Path:
    """Where the executed notebook of a cell lies: in its run's folder, or that of the search."""
    return study_dir / (config.cell_id if lr_grid else config.run_id)


def project_relative(path: Path) -> str:
    """`path` relative to the checkout where it lies inside: no machine path gets into notebooks and records."""
    path = Path(path).resolve()
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)


def command(notebook: Path, parameters: dict[str, Any]) -> str:
    """The papermill command, from the checkout, that executes `notebook` so; only what differs from its defaults is named."""
    import yaml

    with contextlib.redirect_stderr(None):
        defaults = {name: known["default"] for name, known in papermill().inspect_notebook(str(notebook)).items()}
    changed = {name: value for name, value in parameters.items() if repr(value) != defaults.get(name, "").strip()}
    text = yaml.safe_dump(changed, default_flow_style=True, width=float("inf"), sort_keys=False).strip()
    values = f" -y {shlex.quote(text)}" if changed else ""
    return f"papermill {shlex.quote(project_relative(notebook))} by_hand.ipynb{values}"


def with_command(notebook: Path, parameters: dict[str, Any]):
    """The notebook with the command below its title."""
    import nbformat

    content = nbformat.read(notebook, 4)
    text = f"Executed by the runner of studies; by hand, from the checkout:\n```\n{command(notebook, parameters)}\n```"
    cell = nbformat.v4.new_markdown_cell(text, metadata={"tags": ["papermill-command"]})
    if content.get("nbformat_minor", 0) < 5:
        cell.pop("id", None)
    content.cells.insert(1 if content.cells and content.cells[0].cell_type == "markdown" else 0, cell)
    return content


def shorten_outputs(path: Path) -> None:
    """Leave out the middle of what was printed where it is too much for a browser."""
    import nbformat

    content = nbformat.read(path, 4)
    long = [
        output
        for cell in content.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and len(output.text) > LONGEST_OUTPUT
    ]
    for output in long:
        half, cut = LONGEST_OUTPUT // 2, len(output.text) - LONGEST_OUTPUT
        output.text = (
            f"{output.text[:half]}\n... {cut:,} characters left out; the log has them ...\n{output.text[-half:]}"
        )
    if long:
        nbformat.write(content, path)
