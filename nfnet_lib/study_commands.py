"""The `nfnet` commands that are about studies: run, plan, watch, report, publish."""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nfnet_lib import PROJECT
from nfnet_lib.config import ConfigError, StudyConfig
from nfnet_lib.engine import ENGINES


def _study(arguments: argparse.Namespace) -> int:
    from nfnet_lib.study import run_study

    study = StudyConfig.from_file(arguments.file, overrides(arguments.parameter))
    if arguments.workers is not None:
        if arguments.workers < 0:
            raise ConfigError(f"workers: {arguments.workers}; allowed: 0 or more")
        study = study.model_copy(update={"workers": arguments.workers})
    study_dir = arguments.out or PROJECT / "outputs" / study.name
    if arguments.dry_run:
        return _dry_run(study, study_dir, arguments.only)
    clock = time.monotonic()
    report, failures = run_study(
        study, study_dir, engine=arguments.engine, address=arguments.address, only=arguments.only
    )
    for line in _findings(study_dir) if report else ():
        print(line)
    for name, error in failures.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    took = f"{study.name} took {(time.monotonic() - clock) / 60:.1f} minutes"
    print(f"{took}; report: {report}" if report else took)
    return 1 if failures else 0


def _cells(arguments: argparse.Namespace) -> int:
    from nfnet_lib.study_grid import pretrain_cells

    print("\n".join(cell.name for cell in pretrain_cells(StudyConfig.from_file(arguments.file))))
    return 0


def _dry_run(study: StudyConfig, study_dir: Path, only: list[str]) -> int:
    import pandas as pd

    from nfnet_lib.engine import room_for
    from nfnet_lib.records import collect
    from nfnet_lib.report import PUBLISHED
    from nfnet_lib.study import refuse_unknown_cells
    from nfnet_lib.study_changes import refuse_other_study
    from nfnet_lib.study_plan import plan_sentence, plan_table

    refuse_other_study(study, study_dir)
    refuse_unknown_cells(study, only)
    timed = [collect(study_dir)] if study_dir.is_dir() else []
    if (PUBLISHED / "results.csv").exists():
        timed.append(pd.read_csv(PUBLISHED / "results.csv"))
    timed = [table[table["platform"] == study.platform] for table in timed if len(table)]
    table = plan_table(study, study_dir, next((t for t in timed if len(t)), None))
    table = table[table["cell"].isin(only)] if only else table
    shown = {"train_flops": "{:.3g}".format, "minutes": "{:.2g}".format, "core_hours": "{:.2g}".format}
    print(table.to_string(index=False, formatters=shown))
    print(plan_sentence(table, room_for(study.workers, study.cores_per_run, study.memory_per_run_gb)))
    return 0


def _findings(study_dir: Path) -> list[str]:
    """What the frontier fit says, in sentences; says so where there are too few cells to fit."""
    from nfnet_lib.records import collect
    from nfnet_lib.scaling import frontier_analysis

    try:
        return list(frontier_analysis(collect(study_dir, with_diverged=True)).sentences())
    except ValueError as error:
        return [f"no frontier fit: {error}"]


def _status(arguments: argparse.Namespace) -> int:
    from nfnet_lib import status

    if arguments.watch is None:
        print("\n".join(status.status_lines(arguments.dir)))
    elif not 0 < arguments.watch < math.inf:
        raise ConfigError(f"watch: {arguments.watch:g} seconds; allowed: above 0")
    else:
        status.watch(arguments.dir, arguments.watch)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from nfnet_lib.report import build_report

    print(build_report(arguments.dir))
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    from nfnet_lib.report import publish

    print(publish(arguments.dir))
    return 0


def overrides(texts: list[str]) -> dict:
    """{NAME: value} of NAME=VALUE, values as YAML reads them."""
    from nfnet_lib.strict_yaml import parse

    result = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"-p: {text!r} is not NAME=VALUE")
        result[name] = parse(value, f"-p: the value of {name}")
    return result


def add(command: Callable[[str, Callable, str, str], argparse.ArgumentParser]) -> None:
    """Add the commands, by cli.py's function that makes one."""
    sub = command("study", _study, "Run a study, or go on with it; ends by printing the report's path.",
                  "nfnet study params/laptop/study.yaml -p pretrain.seed=1 -p name=laptop_seed1")  # fmt: skip
    sub.add_argument("file", type=Path, help="study file (YAML)")
    sub.add_argument("--out", type=Path, help="study folder; default: outputs/<name of the study>")
    sub.add_argument("-p", "--parameter", action="append", default=[], metavar="KEY=VALUE",
                     help="over what the file says; a dot leads into a mapping: pretrain.num_classes=8")  # fmt: skip
    sub.add_argument(
        "--dry-run", action="store_true", help="show the cells, their cost and what is done; run nothing"
    )
    sub.add_argument("--engine", choices=ENGINES, default="local", help="where the cells run (default: this machine)")
    sub.add_argument("--address", default="", help="of a Ray cluster, with --engine ray; default: one of this machine")
    sub.add_argument(
        "--only", action="append", default=[], metavar="CELL", help="this pre-training cell, as --dry-run names it"
    )
    sub.add_argument("--workers", type=int, help="cells at a time; default: as many as there are cores for")
    sub = command("cells", _cells, "Name the pre-training cells of a study, for --only and for other schedulers.",
                  "nfnet cells params/laptop/study.yaml")  # fmt: skip
    sub.add_argument("file", type=Path, help="study file (YAML)")
    sub = command("status", _status, "Show every cell and run of a study: state, step, loss, images/s, ETA, host.",
                  "nfnet status outputs/laptop --watch")  # fmt: skip
    sub.add_argument("dir", type=Path, help="study folder")
    sub.add_argument("--watch", nargs="?", type=float, const=2.0, metavar="SECONDS", help="again every 2 seconds, or so many")
    sub = command("report", _report, "Build the report of a study again.", "nfnet report outputs/laptop")
    sub.add_argument("dir", type=Path, help="study folder")
    sub = command("publish", _publish, "Copy a study's results, figures and report to outputs/published, to be committed.",
                  "nfnet publish outputs/laptop")  # fmt: skip
    sub.add_argument("dir", type=Path, help="study folder, made from one clean commit")
