"""Training that outlives a browser's tab: in an open notebook a run is a process of its own, which the notebook watches.

Under papermill, and wherever else no browser shows the notebook, it trains in the notebook's own process, as `tuning.tune`.
"""

import asyncio
import html
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nfnet_lib import PROJECT, tuning
from nfnet_lib.cell import INTERACTIVE, NO_COLOURS, CellFailed, CellStopped, cell_dir
from nfnet_lib.config import ConfigError, RunConfig, config_from_params
from nfnet_lib.files import write_json
from nfnet_lib.locks import exclusive, held
from nfnet_lib.records import METRICS, STOP, read_metrics, run_folders
from nfnet_lib.status import counts, shown, status_table

_FOLDER = ".background"  # in a cell's folder: what was asked for, the log, and the lock of the process at work


def tune(config: RunConfig, lr_grid: list[float], study_dir: Path, *, seconds: float | int = 2) -> tuning.Tuned:
    """`tuning.tune`; in an open notebook by a process in the background, whose state is shown every `seconds`.

    Called again after a tab or kernel was lost, it finds the process at work and shows it again. Interrupting the cell ends
    the watching, not the run: `stop` does that. CellFailed with the last line of its log; CellStopped where it was stopped.
    """
    if INTERACTIVE not in os.environ:
        return tuning.tune(config, lr_grid, study_dir)
    if tuning.tuned_already(config, lr_grid, study_dir) is None:
        _follow(start(config, lr_grid, study_dir), study_dir, _trials(config, lr_grid), seconds)
    if tuning.tuned_already(config, lr_grid, study_dir) is None:
        text = (cell_dir(config, study_dir, lr_grid) / _FOLDER / "log").read_text()
        last = ([line for line in text.splitlines() if line.strip()] or ["it left no word"])[-1]
        raise CellStopped(last) if re.match(r"(\w+\.)*Stopped: ", last) else CellFailed(last, text)
    return tuning.tune(config, lr_grid, study_dir, progress=False)


def start(config: RunConfig, lr_grid: list[float], study_dir: Path) -> Path:
    """Train a cell in a process that needs nobody; returns its folder. Where one is at work already, that is it."""
    folder = cell_dir(config, study_dir, lr_grid) / _FOLDER
    if held(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in _trials(config, lr_grid):  # what was asked of earlier ones
        (study_dir / name / STOP).unlink(missing_ok=True)
    write_json(folder / "request.json", {
        "config": config.model_dump(mode="json"), "lr_grid": list(lr_grid), "study_dir": str(Path(study_dir).resolve()),
    })  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != INTERACTIVE} | NO_COLOURS
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nfnet_lib.background", str(folder)], stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True, cwd=PROJECT, env=environment,
        )  # fmt: skip
    while process.poll() is None and not held(folder):  # until it has its lock: a second call must find it
        time.sleep(0.05)
    return folder


def stop(config: RunConfig, lr_grid: list[float], study_dir: Path) -> None:
    """Ask a cell in the background for one more checkpoint and its end; `tune` goes on from there."""
    for name in _trials(config, lr_grid):
        if (study_dir / name).is_dir():
            (study_dir / name / STOP).touch()


def _trials(config: RunConfig, lr_grid: list[float]) -> set[str]:
    """The names of the runs that a cell may have."""
    return {tuning.at_lr(config, lr).run_id for lr in [*lr_grid, config.peak_lr]}


def _follow(folder: Path, study_dir: Path, trials: set[str], seconds: float | int) -> None:
    from IPython.display import HTML, display

    def table() -> HTML:
        state = status_table(study_dir)
        state = state[state["path"].isin(trials)]
        return HTML(f"<p>{counts(state)}</p>" + shown(state).to_html(index=False))

    handle = display(HTML("starting"), display_id=True)
    while held(folder):
        handle.update(table())
        time.sleep(seconds)
    handle.update(table())


def panel(study_dir: str | os.PathLike, seconds: float | int = 0):
    """A widget with the state of a study's runs and the curves of those that run, renewed every `seconds`; 0: as it is now.

    A folder that is not there yet is said to be awaited.
    """
    import ipywidgets as widgets

    folder = PROJECT / study_dir
    table, picture = widgets.HTML(), widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))

    def renew() -> None:
        if not folder.is_dir():
            name, now = html.escape(str(study_dir)), time.strftime("%H:%M:%S")
            table.value = f"<p>{name} is not there yet: a study makes it ({now})</p>"
            return
        state = status_table(folder)
        table.value = f"<p>{counts(state)}, {time.strftime('%H:%M:%S')}</p>" + shown(state).to_html(index=False)
        running = state.loc[state["state"] == "running", "path"].tolist() or _newest(folder, 4)
        picture.value = _curves({name: folder / name for name in running})

    async def keep_renewing() -> None:
        while True:
            await asyncio.sleep(seconds)
            renew()

    renew()
    widget = widgets.VBox([table, picture])
    if seconds > 0 and INTERACTIVE in os.environ:
        widget.renewing = asyncio.get_running_loop().create_task(
            keep_renewing()
        )  # kept: a task nobody holds may be dropped
    return widget


def _newest(folder: Path, count: int) -> list[str]:
    found = [path for path in run_folders(folder) if (path / METRICS).is_file()]
    found.sort(key=lambda path: (path / METRICS).stat().st_mtime)
    return [path.relative_to(folder).as_posix() for path in found[-count:]]


def _curves(folders: dict[str, Path]) -> bytes:
    import io

    from nfnet_lib.plots import learning_curves

    curves = {name: read_metrics(path) for name, path in folders.items() if (path / METRICS).is_file()}
    curves = {name: table for name, table in curves.items() if len(table)}
    if not curves:
        return b""
    buffer = io.BytesIO()
    learning_curves(curves).savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def _main(folder: Path) -> int:
    """The process in the background."""
    request: dict[str, Any] = json.loads((folder / "request.json").read_text())
    try:
        with exclusive(folder, "background"):
            tuning.tune(config_from_params(request["config"]), request["lr_grid"], Path(request["study_dir"]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
