"""One notebook in a process of its own, through papermill, with the traps of papermill closed.

Success is never read off the notebook (after a dead kernel papermill's metadata calls every cell completed): a run is
done when the process ended with 0 and the run wrote its summary. The child dies with the process that started it.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nfnet_lib import PROJECT
from nfnet_lib.config import RunConfig
from nfnet_lib.records import FAILURE, write_json
from nfnet_lib.tuning import tuned_already

NOTEBOOKS = PROJECT / "notebooks"
_RUN_NOTEBOOK = {"pretrain": "02_pretrain.ipynb", "finetune": "03_finetune.ipynb"}
# Large memory pages: XLA maps and unmaps its work space at every step on CPU; 15% off a step (LOG.md).
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class CellFailed(RuntimeError):
    """A notebook did not end well: the last line of its log; `log` is the whole."""

    def __init__(self, message: str, log: str):
        super().__init__(message)
        self.log = log


def execute(
    notebook: Path,
    output: Path,
    parameters: dict[str, Any],
    *,
    core: int | None = None,
    timeout: float | int | None = None,
) -> None:
    """Execute `notebook` with `parameters` into `output`, which appears only if every cell ran; CellFailed otherwise.

    While it runs, and after a failure, the notebook is `output` with `.partial` before the suffix; the log lies beside.
    core: the one processor core that it may use, which also fixes the order of floating-point sums.
    """
    partial, log = output.with_suffix(".partial.ipynb"), output.with_suffix(".log")
    output.parent.mkdir(parents=True, exist_ok=True)
    request = {"notebook": str(notebook), "output": str(partial), "parameters": parameters, "core": core}
    environment = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    environment.pop("MPLBACKEND", None)  # the kernel's own puts figures into the notebook
    environment.setdefault("GLIBC_TUNABLES", _HUGE_PAGES)
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "nfnet_lib.cell", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=PROJECT, text=True,
        )  # fmt: skip
        try:
            process.communicate(json.dumps(request), timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise CellFailed(f"{output.stem} took longer than {timeout / 60:g} minutes", log.read_text()) from None
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode != 0:
        text = log.read_text()
        lines = [line for line in text.strip().splitlines() if line.strip()]
        raise CellFailed(lines[-1][:500] if lines else f"exit code {process.returncode}", text)
    partial.replace(output)


def run_cell(
    config: RunConfig, study_dir: Path, *, lr_grid: Sequence[float] = (), core: int | None = None,
    timeout: float | int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The summary of the best run of a cell of a study, made by its notebook unless it is done.

    With an lr_grid the cell is a search from config.peak_lr (`tuning.tune`), without one a single run. CellFailed leaves
    failure.json. This is the function behind which an engine may put a cluster.
    """
    folder = cell_dir(config, study_dir, lr_grid)
    output = folder / "run.ipynb"
    done = tuned_already(config, list(lr_grid), study_dir)
    if done is not None and output.exists():
        return done
    parameters = config.model_dump(mode="json", exclude={"kind"}) | {"study_dir": project_relative(study_dir)}
    if lr_grid:
        parameters["lr_grid"] = list(lr_grid)
    if config.kind == "finetune":
        parameters["comparison_seeds"] = -1
    started = time.time()
    try:
        execute(NOTEBOOKS / _RUN_NOTEBOOK[config.kind], output, parameters, core=core, timeout=timeout)
        done = tuned_already(config, list(lr_grid), study_dir)
        if done is None:
            raise CellFailed("the notebook ended without a summary of its run", output.with_suffix(".log").read_text())
    except CellFailed as error:
        write_json(
            folder / FAILURE, {"error": str(error), "traceback": error.log[-20_000:], "seconds": time.time() - started}
        )
        raise
    (folder / FAILURE).unlink(missing_ok=True)
    return done


def cell_dir(config: RunConfig, study_dir: Path, lr_grid: Sequence[float] = ()) -> Path:
    """Where the executed notebook of a cell lies: in its run's folder, or that of the search."""
    return study_dir / (config.cell_id if lr_grid else config.run_id)


def project_relative(path: Path) -> str:
    """`path` relative to the checkout where it lies inside: no machine path gets into notebooks and records."""
    path = Path(path).resolve()
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)


def _main(parent: int) -> None:
    """The child: bound to its parent's life and to its core, then papermill."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent process is gone")
    request = json.load(sys.stdin)
    if request["core"] is not None:
        os.sched_setaffinity(0, {request["core"]})
    import papermill

    papermill.execute_notebook(
        request["notebook"], request["output"], request["parameters"],
        kernel_name="python3", progress_bar=False, log_output=True, start_timeout=180, coalesce_streams=True,
    )  # fmt: skip


if __name__ == "__main__":
    _main(int(sys.argv[1]))
