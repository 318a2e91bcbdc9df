"""Records of runs: what a run writes, and the tidy table that the analysis reads.

A run folder holds `params.json`, `metrics.jsonl` (one JSON object a line) and, once finished, `summary.json`; a failed
run holds `failure.json`. A finished `summary.json` is the only proof that a run is done. Nothing is parsed out of logs.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfnet_lib.files import to_json, write_bytes

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 2  # 1 had no digest; what is missing from older records is missing from tables, too
SUMMARY, FAILURE, METRICS, PARAMS = "summary.json", "failure.json", "metrics.jsonl", "params.json"
CLASSES = "classes.json"  # names of a run's classes, where its data have them
STOP = "STOP"  # a file of this name in a run's folder, or its study's: runs save and end, and no cell starts any more
_MARKERS = (SUMMARY, FAILURE, METRICS, PARAMS)
_BELOW_STUDY = 2  # run folders lie at most this many levels below the folder given
_LEADING = ("run_id", "kind", "variant", "epoch_budget", "peak_lr", "seed", "heldout_loss", "heldout_top1",
            "heldout_top5", "train_loss", "train_flops", "tpu_v4_core_hours")  # fmt: skip
_SORT = ("kind", "variant", "epoch_budget", "peak_lr", "run_id")
_REQUIRED = ("run_id", "kind", "status", "config", "train_flops", "heldout_loss")
_INTEGERS = ("schema", "num_params", "forward_macs", "steps", "images_seen", "examples_drawn", "train_quarantined",
             "heldout_quarantined", "device_count", "num_classes", "examples_per_epoch", "heldout_examples",
             "image_size", "batch_size", "warmup_steps", "seed", "data_seed", "augmult", "resolution",
             "eval_resolution")  # fmt: skip
_FLOATS = ("train_flops", "seconds", "compile_seconds", "images_per_second", "core_hours", "tpu_v4_core_hours",
           "heldout_loss", "heldout_top1", "heldout_top5", "heldout_ece", "train_loss", "epoch_budget", "peak_lr",
           "weight_decay", "data_wait_seconds", "agc_clip", "label_smoothing", "drop_rate",
           "stochdepth_rate", "ema_decay", "rho", "ascent_fraction")  # fmt: skip


class RecordError(ValueError):
    """A record that cannot be trusted; the message names the file and what is wrong with it."""


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` as JSON values, with the digest of all that it says: a flipped digit is as valid as the right one."""
    values = json.loads(json.dumps({key: record[key] for key in record if key != "digest"}, default=to_json))
    content = json.dumps(values, sort_keys=True).encode()
    return values | {"digest": hashlib.blake2b(content, digest_size=8).hexdigest()}


class MetricsWriter:
    """Appends one JSON object a line to `path`; a resumed run's file ends up equal to an undisturbed one's.

    Args:
        path: the metrics.jsonl file; created with its folder where missing.
        last_step: step of the checkpoint that the run resumes from. Lines of later steps, which the run will write
            again, and a torn last line are removed. The default -1 begins an empty file.
        digest: of the lines up to there, as `digest` was then. RecordError, and nothing is changed, if they are others.

    Non-finite numbers are written as null, since JSON has none. Call `sync` before saving a checkpoint: a metrics file
    that lost lines up to the checkpoint's step could not be completed by a resumed run.
    """

    def __init__(self, path: str | os.PathLike, last_step: int = -1, digest: str | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if self.path.exists():
            lines = metric_lines(self.path)
            kept = [line for line, record in lines if record["step"] <= last_step]
            last_step = max([record["step"] for _, record in lines if record["step"] <= last_step], default=-1)
        else:
            last_step = -1
        self._hash = hashlib.blake2b("".join(f"{line}\n" for line in kept).encode(), digest_size=8)
        if digest not in (None, self.digest):
            raise RecordError(f"{self.path} lacks or has changed lines that the checkpoint knows; remove the checkpoints, too,"
                              " to begin the run again")  # fmt: skip
        write_bytes(self.path, "".join(f"{line}\n" for line in kept).encode(), overwrite=True)
        self.last_step = last_step
        self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def write(self, step: int, **metrics: Any) -> None:
        """Append one line. Raises ValueError where `step` does not exceed the last one written."""
        if step <= self.last_step:
            raise ValueError(f"step={step} must exceed the last step written to {self.path}, {self.last_step}")
        record = {"step": int(step)} | {name: _finite(value) for name, value in metrics.items()}
        line = json.dumps(record, allow_nan=False, default=to_json) + "\n"
        self._hash.update(line.encode())
        self._file.write(line)
        self._file.flush()  # a reader that follows the file sees every step at once
        self.last_step = step

    @property
    def digest(self) -> str:
        """Of all lines."""
        return self._hash.hexdigest()

    def sync(self) -> None:
        """Force everything written so far to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _finite(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metric_lines(path: Path) -> list[tuple[str, dict]]:
    """Lines of a metrics file with their parsed records, without a torn last one. Raises RecordError for any other."""
    *lines, rest = path.read_bytes().split(b"\n")  # `rest` has no newline: torn, even if it happens to parse
    result = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no object with an integer 'step'")
        except ValueError as error:
            if number == len(lines) and not rest:  # a lost page can leave a last line of zeros with its newline
                break
            raise RecordError(f"{path}, line {number}: {error}: {line[:80]!r}") from error
        result.append((line.decode("utf-8"), record))
    return result


def read_metrics(run_dir: str | os.PathLike) -> "pd.DataFrame":
    """Metrics of one run as a table, one row a line; a torn last line is left out.

    Columns are those that the run wrote (at least `step`), null becoming NaN. Raises FileNotFoundError where the run
    has no metrics.jsonl, RecordError where a line before the last is damaged or a finished run had others.
    """
    import pandas as pd

    path = Path(run_dir) / METRICS
    lines = metric_lines(path)
    if (Path(run_dir) / SUMMARY).is_file() and (wanted := read_summary(run_dir).get("metrics_digest")):
        if wanted != hashlib.blake2b("".join(f"{line}\n" for line, _ in lines).encode(), digest_size=8).hexdigest():
            raise RecordError(f"{path} has been changed since the run ended: its digest differs")
    records = [record for _, record in lines]
    table = pd.DataFrame(records) if records else pd.DataFrame({"step": [], "epoch": [], "loss": []}, dtype="float64")
    table["step"] = table["step"].astype("int64")
    for name in table.columns.difference(["step"]):
        if table[name].isna().all():  # a column of nulls only has no type of its own
            table[name] = table[name].astype("float64")
    return table


def run_folders(root: Path, below: int = _BELOW_STUDY) -> Iterator[Path]:
    """Run folders at `root` or at most `below` levels under it, sorted; nothing below a run folder is looked at."""
    if any((root / name).is_file() for name in _MARKERS):
        yield root
        return
    if below:
        for child in sorted(root.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from run_folders(child, below - 1)


def existing_folder(path: str | os.PathLike) -> Path:
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} is no folder; give a run folder or a folder of runs")
    return root


def read_summary(run_dir: str | os.PathLike) -> dict:
    """The summary of one finished run. Raises RecordError naming the file and what is damaged, missing or too old."""
    path = Path(run_dir) / SUMMARY
    if not path.exists():
        raise RecordError(f"{run_dir} is not the folder of a finished run: {SUMMARY} is not there")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, OSError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RecordError(f"{path} cannot be read as JSON: {error}; remove it to have the run made again") from error
    if not isinstance(summary, dict):
        raise RecordError(f"{path} holds a JSON {type(summary).__name__}, not an object")
    if (schema := summary.get("schema")) not in range(1, SCHEMA + 1) or isinstance(schema, bool):
        raise RecordError(f"{path} has schema {schema!r}, this version reads schemas 1 to {SCHEMA}: "
                          "run it again or read it with the version that wrote it")  # fmt: skip
    if schema > 1 and sealed(summary)["digest"] != summary.get("digest"):
        raise RecordError(f"{path} has been changed since it was written: its digest differs")
    if missing := [key for key in _REQUIRED if key not in summary]:
        raise RecordError(f"{path} lacks {', '.join(missing)}")
    for name in ("train_flops", "heldout_loss"):
        if not isinstance(summary[name], int | float) or isinstance(summary[name], bool):
            raise RecordError(f"{path}: {name} is {summary[name]!r}, not a number")
    if not isinstance(summary["config"], dict):
        raise RecordError(f"{path}: config is a JSON {type(summary['config']).__name__}, not an object")
    if summary["status"] != "done":
        raise RecordError(
            f"{path} has status {summary['status']!r}; a summary is written by finished runs, status 'done'"
        )
    return summary


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _flat_row(run_dir: Path, root: Path) -> dict:
    """One row of `collect`: config keys without a prefix, other nested keys joined by a dot, lists as JSON text."""
    summary = read_summary(run_dir)
    config = summary.pop("config")
    for name in ("params_digests", "metrics_digest", "digest"):  # hundreds of columns that no table needs
        summary.pop(name, None)
    row = dict(_flatten(summary))
    for key, value in _flatten(config):
        if key in row and row[key] != value:
            raise RecordError(f"{run_dir / SUMMARY}: {key} is {row[key]!r} but config.{key} is {value!r}")
        row[key] = value
    return row | {"path": run_dir.relative_to(root).as_posix()}


def _flatten(mapping: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, list) else value


def diverged(run_dir: Path) -> bool:
    """Whether a run has no summary because its loss was not finite any more: a learning rate that was tried and is too high."""
    try:
        return not (run_dir / SUMMARY).exists() and json.loads((run_dir / FAILURE).read_text()).get("diverged") is True
    except (OSError, ValueError, AttributeError):
        return False


def _diverged_row(run_dir: Path, root: Path) -> dict | None:
    """A row of `collect` for a run of pre-training that diverged; None for any other."""
    from nfnet_lib import flops
    from nfnet_lib.config import config_from_params

    if not diverged(run_dir):
        return None
    try:
        config = config_from_params(json.loads((run_dir / PARAMS).read_text(encoding="utf-8")))
    except (OSError, ValueError):  # ConfigError is one
        return None
    if config.kind != "pretrain":
        return None
    row = {"run_id": config.run_id, "status": "diverged", "heldout_loss": math.nan, "train_flops": flops.run_flops(config)}
    return row | dict(_flatten(config.model_dump(mode="json"))) | {"path": run_dir.relative_to(root).as_posix()}


def collect(path: str | os.PathLike, damaged: str = "raise", *, with_diverged: bool = False) -> "pd.DataFrame":
    """All finished runs at or up to two folders below `path`, one row each.

    Columns: first run_id, kind ("pretrain" or "finetune"), variant, epoch_budget (passes over the data), peak_lr, seed,
    heldout_loss (nats an image), heldout_top1 and heldout_top5 (fractions), train_loss, train_flops
    (6 * forward_macs * images_seen; SAM adds its share of ascent), tpu_v4_core_hours (by formula); then every other key of
    the summary (steps, images_seen, examples_drawn, heldout_ece, train_quarantined and heldout_quarantined: examples that
    could not be read, num_params, forward_macs, seconds, core_hours, versions.*, ...; not the digests of the parameters)
    and of its config (batch_size, augmult, pretrained_run, ...; flattened without prefix) in
    alphabetic order; last `path`, the run folder relative to the argument. Counts are int64 (Int64 where some runs lack
    them), measures float64. Rows are sorted by kind, variant, epoch_budget, peak_lr, run_id.

    Unfinished and failed runs are left out: see status.py. with_diverged: but for those of pre-training that diverged, whose
    status says so, heldout_loss is NaN and what was measured is missing: a rate next to the best that is too high. A
    summary.json that is there but damaged, of another schema or contradictory is an error (RecordError naming the file); with
    damaged="skip" it is left out and named in one warning. Summaries are replaced atomically, so a damaged one was harmed from
    outside.
    Raises FileNotFoundError where `path` is no folder. No finished run gives an empty table with the leading columns.
    """
    import pandas as pd

    if damaged not in ("raise", "skip"):
        raise ValueError(f"damaged={damaged!r} must be 'raise' or 'skip'")
    root = existing_folder(path)
    rows, problems = [], []
    for folder in run_folders(root):
        if not (folder / SUMMARY).is_file():
            if with_diverged and (row := _diverged_row(folder, root)):
                rows.append(row)
            continue
        try:
            rows.append(_flat_row(folder, root))
        except RecordError as error:
            if damaged == "raise":
                raise
            problems.append(str(error))
    if problems:
        warnings.warn(f"{len(problems)} damaged record(s) left out: " + "; ".join(problems), stacklevel=2)
    table = pd.DataFrame(rows) if rows else pd.DataFrame(columns=[*_LEADING, "path"])
    first = [name for name in _LEADING if name in table]
    table = table[[*first, *sorted(table.columns.difference([*first, "path"])), "path"]]
    for name in table.columns:
        if name in _INTEGERS:
            table[name] = table[name].astype("Int64" if table[name].isna().any() else "int64")
        elif name in _FLOATS or name.endswith("_ema"):
            table[name] = table[name].astype("float64")
    return table.sort_values([name for name in _SORT if name in table], ignore_index=True, kind="stable")


def results_csv(df: "pd.DataFrame", path: str | os.PathLike) -> None:
    """Write a table as CSV (UTF-8, LF, exact floats, empty for missing), atomically; equal tables, equal bytes."""
    write_bytes(path, df.to_csv(index=False, lineterminator="\n").encode(), overwrite=True)


def counted(number: float | int, noun: str) -> str:
    """The number with its noun: 1 epoch, 0.5 epochs, 20 cells."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def scale(runs: "pd.DataFrame | Mapping[str, Any]") -> str:
    """What a figure of these runs (of `collect`), or of one summary, must say of their scale: "laptop scale" where CPUs ran all
    of them, otherwise the devices ("1 x NVIDIA H100 80GB HBM3"). Records that name no platform are of CPUs."""
    rows = [runs] if isinstance(runs, Mapping) else runs.to_dict("records")
    found = {
        f"{int(row.get('device_count') or 1)} x {row.get('device_kind') or row['platform']}"
        for row in rows
        if isinstance(row.get("platform"), str) and row["platform"] != "cpu"
    }
    return ", ".join(sorted(found)) or "laptop scale"


def capitalised(text: str) -> str:
    """As a sentence begins."""
    return text[:1].upper() + text[1:]


def headline(summary: Mapping[str, Any]) -> "pd.DataFrame":
    """The figures of one run that a reader looks for first, as a one-column table."""
    import pandas as pd

    rows = {
        "held-out loss (nats)": f"{summary['heldout_loss']:.4f}",
        "held-out top-1": f"{summary['heldout_top1']:.1%}",
        "held-out top-5": f"{summary['heldout_top5']:.1%}",
        "held-out calibration error": f"{summary.get('heldout_ece', float('nan')):.3f}",
        "training loss, last tenth": f"{summary['train_loss']:.4f}",
        "views seen": f"{summary['images_seen']:,}",
        "training FLOPs": f"{summary['train_flops']:.3g}",
        "images/s": f"{summary['images_per_second']:.0f}",
        "core-hours on this device": f"{summary['core_hours']:.3g} ({summary['device_kind']})",
        "TPU-v4 core-hours by formula": f"{summary['tpu_v4_core_hours']:.3g}",
        "commit": f"{(summary['git_commit'] or 'none')[:10]}{' (modified)' if summary['git_dirty'] else ''}",
    }
    return pd.DataFrame({summary["config"]["variant"]: rows})


def sentence(summary: Mapping[str, Any]) -> str:
    """One run in one sentence, from its numbers."""
    config = summary["config"]
    devices = capitalised(scale(summary))
    did = "pre-trained" if summary["kind"] == "pretrain" else "fine-tuned"
    return (
        f"{config['variant']} {did} on {config['dataset']} for {counted(config['epoch_budget'], 'epoch')} of "
        f"{config['examples_per_epoch']:,} images: held-out loss {summary['heldout_loss']:.3f}, "
        f"top-1 {summary['heldout_top1']:.1%}, at {summary['train_flops']:.2g} training FLOPs. {devices}."
    )
