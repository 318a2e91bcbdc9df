"""The state of a study's runs while it runs: a table, and the same again and again."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfnet_lib.locks import held, holder
from nfnet_lib.records import (
    FAILURE,
    METRICS,
    PARAMS,
    SUMMARY,
    RecordError,
    diverged,
    existing_folder,
    metric_lines,
    read_summary,
    run_folders,
)  # fmt: skip

if TYPE_CHECKING:
    import pandas as pd


def status_table(path: str | os.PathLike, alive_seconds: int | float = 300) -> "pd.DataFrame":
    """State of every run at or up to two folders below `path`, one row each, sorted by path.

    Columns: path (relative to the argument), state, step, steps (of the whole run), loss and images_per_second (of the last
    line of metrics.jsonl; NaN before the first), seconds_left (of training, at that rate; NaN unless running), host (of the
    process that has the run's lock), seconds_since_write, message. States:

        done         summary.json is there and sound
        damaged      summary.json or metrics.jsonl is there but cannot be trusted; `message` says why
        failed       failure.json is there and nothing was written to metrics.jsonl after it; `message` is its error
        diverged     the same of a loss that was not finite any more: a learning rate that was tried and is too high
        running      none of these; a process of this machine holds its lock, or, where another machine's does or none is named,
                     some file of the folder was written in the last `alive_seconds`
        unfinished   none of these: interrupted, will resume
    """
    import pandas as pd

    root = existing_folder(path)
    columns = [
        "path", "state", "step", "steps", "loss", "images_per_second", "seconds_left", "host", "seconds_since_write", "message",
    ]  # fmt: skip
    rows = [_status(folder, root, alive_seconds) for folder in run_folders(root)]
    table = pd.DataFrame(rows, columns=columns)
    floats = dict.fromkeys(["loss", "images_per_second", "seconds_left", "seconds_since_write"], "float64")
    return table.astype({"step": "Int64", "steps": "Int64"} | floats)


def _status(folder: Path, root: Path, alive_seconds: int | float) -> dict[str, Any]:
    row: dict[str, Any] = {"path": folder.relative_to(root).as_posix(), "state": "unfinished", "message": "", "host": ""}
    written = [file.stat().st_mtime for file in folder.iterdir() if file.is_file()]
    row["seconds_since_write"] = age = time.time() - max(written)
    metrics, failure, config = folder / METRICS, folder / FAILURE, _config_of(folder)
    if {"epoch_budget", "examples_per_epoch", "batch_size"} <= set(config):
        row["steps"] = round(config["epoch_budget"] * config["examples_per_epoch"] / config["batch_size"])
    try:
        if metrics.is_file() and (lines := metric_lines(metrics)):
            row |= {name: lines[-1][1].get(name) for name in ("step", "loss", "images_per_second")}
        if (folder / SUMMARY).is_file():
            row |= {"state": "done", "step": read_summary(folder).get("steps", row.get("step"))}
        elif failure.is_file() and not (metrics.is_file() and metrics.stat().st_mtime > failure.stat().st_mtime + 1):
            row |= {"state": "diverged" if diverged(folder) else "failed", "message": failure_message(failure)}
        else:
            lock, alive = holder(folder), held(folder)
            if alive or (alive is None and age < alive_seconds):
                row |= {"state": "running", "host": lock.host if lock else ""}
                if row.get("images_per_second") and row.get("steps"):
                    left = (row["steps"] - row["step"]) * config["batch_size"]
                    row["seconds_left"] = left / row["images_per_second"]
    except RecordError as error:
        row |= {"state": "damaged", "message": str(error)}
    return row


def _config_of(folder: Path) -> dict[str, Any]:
    """The parameters of a run as far as they can be read."""
    try:
        config = json.loads((folder / PARAMS).read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    except (OSError, ValueError):
        return {}


def failure_message(path: Path) -> str:
    """The error that a failure.json tells, or that it is damaged."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["error"])
    except (ValueError, KeyError, TypeError) as error:
        return f"{path.name} is damaged: {error!r}"


def shown(table: "pd.DataFrame") -> "pd.DataFrame":
    """`status_table` as people read it: step of steps, a time left, short messages."""
    import pandas as pd

    def number(value: Any, form: str) -> str:
        return "" if pd.isna(value) else format(value, form)

    return pd.DataFrame({
        "cell": table["path"],
        "state": table["state"],
        "step": [
            number(a, "d") + ("" if pd.isna(b) else f"{'-' if pd.isna(a) else ''}/{b:d}")
            for a, b in zip(table["step"], table["steps"], strict=True)
        ],
        "loss": [number(value, ".4f") for value in table["loss"]],
        "images/s": [number(value, ".0f") for value in table["images_per_second"]],
        "ETA": [number(value, ".0f") and duration(value) for value in table["seconds_left"]],
        "host": table["host"],
        "message": [message.splitlines()[0][:60] if message else "" for message in table["message"]],
    })  # fmt: skip


def duration(seconds: float | int) -> str:
    """ "1:05:09" or "5:09" of hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def counts(table: "pd.DataFrame") -> str:
    """How many runs there are in each state."""
    states = table["state"].value_counts()
    return f"{len(table)} runs: " + (", ".join(f"{n} {state}" for state, n in states.items()) or "none yet")


def status_lines(study_dir: str | os.PathLike) -> list[str]:
    """The table of a study's runs, then a line that counts them."""
    table = status_table(study_dir)
    return ([] if table.empty else shown(table).to_string(index=False).split("\n")) + [counts(table)]


def watch(study_dir: str | os.PathLike, seconds: float | int) -> None:
    """Print `status_lines` every so many seconds, over the last ones, until ctrl-C."""
    try:
        while True:
            lines = status_lines(study_dir)
            print("\033[H\033[2J" + "\n".join(lines), flush=True)
            time.sleep(seconds)
    except KeyboardInterrupt:
        pass
