"""The rendered report: a static site from the executed notebooks of a study, readable offline from a file.

Nothing here computes results: tables and sentences come from the records, figures from the notebooks' outputs.
"""

import html
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nfnet_lib import PROJECT, paper
from nfnet_lib.files import write_json
from nfnet_lib.locks import exclusive
from nfnet_lib.records import FAILURE, RecordError, collect, counted, diverged, scale
from nfnet_lib.report_pages import finish_site, write_source
from nfnet_lib.status import failure_message

if TYPE_CHECKING:
    import pandas as pd

BUILD_SECONDS = 600  # that a build waits for another one of the same report
PUBLISHED = PROJECT / "outputs" / "published"


def open_study(study_dir: str = "") -> tuple["pd.DataFrame", Path]:
    """(records, diverged rates with them, folder for figures) of a study.

    study_dir: "" means outputs/laptop, or the published results where it has no runs.

    Relative folders are taken from the checkout. FileNotFoundError says how to make records where there are none.
    """
    import pandas as pd

    folder = PROJECT / (study_dir or "outputs/laptop")
    if any(folder.glob("*/summary.json")):
        return collect(folder, with_diverged=True), folder / "figures"
    published = folder if study_dir else PUBLISHED  # whose table is there without the runs
    if (published / "results.csv").exists():
        return pd.read_csv(published / "results.csv"), PROJECT / "outputs" / "by_hand" / "figures"
    raise FileNotFoundError(f"{study_dir or 'outputs/laptop'} holds no finished runs; `make reproduce` makes them")


def best_run(study_dir: str = "") -> Path | None:
    """Folder of the pre-training run with the lowest held-out loss of a study (as `open_study`); None without runs."""
    folder = PROJECT / (study_dir or "outputs/laptop")
    records = collect(folder) if folder.is_dir() else None
    if records is None or records.empty or not (records["kind"] == "pretrain").any():
        return None
    runs = records[records["kind"] == "pretrain"]
    return folder / runs.loc[runs["heldout_loss"].idxmin(), "path"]


def answer(records: "pd.DataFrame") -> list[str]:
    """Three sentences: does loss follow a law, should size and epochs grow together, what did fine-tuning give."""
    from nfnet_lib.scaling import finetune_table, frontier_analysis

    try:
        result = frontier_analysis(records)
    except ValueError as error:
        return [f"There is no answer yet: {error}."]
    law, interval = result.law, result.interval
    between = f" (90% interval {interval.low:.3f} to {interval.high:.3f})" if interval else ""
    sentences = [
        f"At {_scale(records)}, over {result.decades:.1f} decades of compute, the lowest held-out loss falls as compute to the"
        f" power -{law.exponent:.3f}{between}; the straight line on log-log axes "
        + (f"explains {law.r_squared:.1%} of it." if law.num_points > 2 else "is drawn through two points, no more.")
    ]
    points = result.points
    first, last = points.iloc[0], points.iloc[-1]
    order = list(dict.fromkeys(points["variant"]))
    sentences.append(
        f"Along that frontier the best model goes from {first['variant']} at {counted(first['epoch_budget'], 'epoch')} to "
        f"{last['variant']} at {counted(last['epoch_budget'], 'epoch')}; in order of compute the optimal sizes are "
        f"{', '.join(order)}."
    )
    tuned = finetune_table(records)
    if len(tuned):
        best = tuned.loc[tuned["top1_error_percent"].idxmin()]
        repeated = (
            f"{int(best['augmult'])} views of each image" if best["repeated_augmentation"] else "one view of each"
        )
        plain = tuned[~tuned["repeated_augmentation"]]["top1_error_percent"].mean()
        with_repeats = tuned[tuned["repeated_augmentation"]]["top1_error_percent"].mean()
        sentence = (
            f"Fine-tuned on {_datasets(records)}, {best['variant']} does best, with {best['top1_error_percent']:.2f}% top-1"
            f" error ({repeated})"
        )
        if with_repeats == with_repeats and plain == plain:
            sentence += (
                f"; mean error {plain:.2f}% without and {with_repeats:.2f}% with repeated augmentation, over {len(tuned)} runs"
            )
        sentences.append(sentence + ".")
    return sentences


def _scale(records: "pd.DataFrame") -> str:
    """`scale` after "at"."""
    found = scale(records)
    return found if found.endswith("scale") else f"the scale of {found}"


def _datasets(records: "pd.DataFrame") -> str:
    """Data sets of the fine-tuning runs."""
    return ", ".join(sorted(set(records.loc[records["kind"] == "finetune", "dataset"])))


def sentences(texts: list[str]):
    """A list of generated sentences, as a notebook shows it; names of data and classes in them stay text."""
    from IPython.display import Markdown

    return Markdown("\n".join(f"- {as_text(text)}" for text in texts))


def as_text(text: str) -> str:
    """Markdown that shows `text` as it is, with no tags or links of its own."""
    return html.escape(text, quote=False).replace("](", "]&#40;")


def provenance(records: "pd.DataFrame") -> "pd.DataFrame":
    """Where the records come from: commits, machine, versions, cost."""
    import pandas as pd

    def several(column: str) -> str:
        values = sorted({str(v) for v in records[column].dropna()}) if column in records else []
        return ", ".join(values) or "not recorded"

    lost = int(records["heldout_loss"].isna().sum())
    unfinished = f" ({lost} diverged)" if lost else ""
    rows = {
        "runs": f"{(records['kind'] == 'pretrain').sum()} of pre-training{unfinished}, "
        f"{(records['kind'] == 'finetune').sum()} of fine-tuning",
        "commit": several("git_commit"),
        "tracked files modified": several("git_dirty"),
        "device": several("device_kind"),
        "processor": several("processor"),
        "cores a run": several("host_cores"),
        "jax": several("versions.jax") if "versions.jax" in records else several("jax"),
        "training time": f"{records['seconds'].sum() / 3600:.2f} h, {records['core_hours'].sum():.2f} core-hours",
        "first start, last end": f"{several('started_at').split(', ')[0]}, {several('finished_at').split(', ')[-1]}",
    }
    return pd.DataFrame({"value": rows})


def comparison(records: "pd.DataFrame") -> "pd.DataFrame":
    """Paper | ours, one row a claim; the two scales differ by many orders of magnitude and are never one column."""
    import pandas as pd

    from nfnet_lib.scaling import best_per_cell, finetune_table, frontier_analysis

    cells, tuned = best_per_cell(records), finetune_table(records)
    try:
        result = frontier_analysis(records)
        law = f"exponent {result.law.exponent:.3f}, over {result.decades:.1f} decades, " + (
            f"R^2 {result.law.r_squared:.3f}" if result.law.num_points > 2 else "through two points"
        )
    except ValueError as error:
        law = f"not fitted: {error}"
    most = paper.points()["value"].max()
    rows = [
        ("largest pre-training compute, TPU-v4 core-hours", f"{110e3:,.0f} (abstract)",
         f"{records.loc[records['kind'] == 'pretrain', 'tpu_v4_core_hours'].max():.2g} by formula"),
        ("held-out loss against compute", "a straight line on log-log axes (Figure 2)",
         law),
        ("best learning rates", "0.4 to 1.6 (Figure 3)", f"{cells['best_lr'].min():g} to {cells['best_lr'].max():g}"),
        ("best fine-tuned top-1 error", "9.6%, ImageNet, F7+ with RA (text)",
         f"{tuned['top1_error_percent'].min():.2f}%, {_datasets(records)}" if len(tuned) else "none run"),
    ]  # fmt: skip
    assert most >= 110e3
    return pd.DataFrame(rows, columns=["what", "paper", f"ours ({scale(records)})"]).set_index("what")


def run_table(study_dir: Path) -> "pd.DataFrame":
    """Every run of a study with its state: finished ones from their records, diverged rates, failed ones with their error."""
    import pandas as pd

    records = collect(study_dir)
    columns = [
        "run_id",
        "kind",
        "variant",
        "epoch_budget",
        "peak_lr",
        "augmult",
        "heldout_loss",
        "heldout_top1",
        "seconds",
    ]
    table = records.reindex(columns=columns).assign(state="done")  # no run may be done
    failed = [
        {
            "run_id": path.parent.name,
            "state": "diverged" if diverged(path.parent) else f"failed: {failure_message(path)}",
        }
        for path in sorted(study_dir.glob(f"*/{FAILURE}"))
        if path.parent.name not in set(table["run_id"])
    ]
    return pd.concat([table, pd.DataFrame(failed)], ignore_index=True) if failed else table


def build_report(study_dir: str | Path) -> Path:
    """Build `study_dir`/report from the executed notebooks and return its index.html; the old report stays on failure.

    RuntimeError with Sphinx's words if a page or a link is broken.
    """
    study_dir = Path(study_dir)
    if not any(study_dir.glob("*/summary.json")) and not any(study_dir.glob(f"*/{FAILURE}")):
        raise FileNotFoundError(f"{study_dir}: no runs to report; `nfnet study` makes them")
    building = study_dir / ".report"
    with exclusive(building, "report", BUILD_SECONDS), tempfile.TemporaryDirectory(dir=building) as temporary:
        for old in building.iterdir():  # of builds that were killed
            if old.is_dir() and old != Path(temporary):
                shutil.rmtree(old, ignore_errors=True)
        source, site = Path(temporary) / "source", Path(temporary) / "site"
        write_source(study_dir, source, front_page(study_dir), run_table(study_dir))
        done = subprocess.run(
            [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(source), str(site)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"report of {study_dir.name}: {done.stderr.strip()[-2000:]}")
        finish_site(site)
        target, old = study_dir / "report", Path(temporary) / "old"
        if target.exists():
            target.rename(old)
        site.rename(target)
    return target / "index.html"


QUESTION = (
    "Do ConvNets need to give way to vision transformers at scale? The paper pre-trained NFNets on JFT-4B, with the learning"
    " rate tuned for every size and epoch budget, and says no. Its code, tables, weights and data were never released; here the"
    " same protocol runs on small NFNets and data that anyone can make."
)
FIGURES = {
    "figure1": (
        "Figure 1: fine-tuned error against pre-training compute",
        "fine-tuned NFNets match vision transformers of equal pre-training compute on ImageNet (Figure 1). Its points and ours"
        " are drawn apart: the scales differ by many orders of magnitude.",
    ),
    "figure2": (
        "Figure 2: held-out loss against compute",
        "held-out loss falls as a straight line in compute on log-log axes; model size and epochs grow together (Figure 2).",
    ),
    "figure3": (
        "Figure 3: the best learning rate against the epoch budget",
        "the best learning rate is easy to predict: it falls slowly with the epoch budget and with size (Figure 3).",
    ),
}
NOT_REPRODUCED = (
    "Anything at the scale of JFT-4B: the data set and the weights are not public.",
    "The match with vision transformers at equal compute after fine-tuning on ImageNet: that needs both families pre-trained at"
    " scale; 06_families compares small ones of our own.",
    "Times on TPUs: core-hours of TPU v4 are by the paper's own formula.",
)


def front_page(study_dir: Path) -> str:
    """The first page in Markdown: question, answer, figures beside the paper's claims, what is missing, provenance."""
    records = collect(study_dir, with_diverged=True)
    lines = [
        "# ConvNets at scale: a reproduction report", "",
        f"The open companion to *ConvNets Match Vision Transformers at Scale* (arXiv 2310.16764), at {_scale(records)}.", "",
        "## The question", "", QUESTION, "", "## The answer", "",
    ]  # fmt: skip
    try:
        lines += [f"- {as_text(text)}" for text in answer(records)]
        table = _markdown(comparison(records))
    except ValueError as error:  # no pre-training run that is done: the pages say what there is
        lines += [f"There is no answer yet: {error}."]
        table = ""
    for name, (title, claim) in FIGURES.items():
        picture = study_dir / "figures" / f"{name}.png"
        if picture.exists():
            lines += ["", f"## {title}", "", f"The paper: {claim}", "", f"![{title}]({name}.png)"]
            if picture.with_suffix(".txt").exists():
                lines += ["", f"Ours: {picture.with_suffix('.txt').read_text(encoding='utf-8').strip()}"]
    if table:
        lines += ["", "## Paper and ours", "", table]
    lines += ["", "## Not reproduced", "", *(f"- {text}" for text in NOT_REPRODUCED)]
    failed = run_table(study_dir).query("state.str.startswith('failed')")
    lines += [f"- {len(failed)} of this study's cells failed: see [every run](runs.md)."] if len(failed) else []
    if broken := sorted(path.name.split(".")[0] for path in (study_dir / "analysis").glob("*.partial.ipynb")):
        lines += [f"- {', '.join(broken)}: what failed in {'these notebooks' if broken[1:] else 'this notebook'} is in the logs"
                  " in the study's analysis folder."]  # fmt: skip
    if len(records):
        lines += ["", "## Where the numbers come from", "", _markdown(provenance(records))]
    return "\n".join([*lines, ""])


def _markdown(table: "pd.DataFrame") -> str:
    """A table of texts with its index first."""
    rows = [[table.index.name or "", *table.columns], ["-"] * (len(table.columns) + 1)]
    rows += [[str(name), *map(str, values)] for name, values in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(html.escape(text).replace("|", "\\|") for text in row) + " |" for row in rows)


def publish(study_dir: str | Path, target: Path = PUBLISHED) -> Path:
    """Put a finished study's results.csv, study.json, figures, report and provenance.json into `target`, for any there.

    What else lies in `target` stays. RecordError unless all the study's runs were made from one commit without local
    changes, and its report is there.
    """
    study_dir = Path(study_dir)
    records = collect(study_dir)
    if records.empty:
        raise RecordError(f"{study_dir}: holds no finished runs; only a finished study is published")
    commits = sorted({str(commit) for commit in records["git_commit"]})
    if len(commits) != 1 or commits == ["None"] or records["git_dirty"].any():
        raise RecordError(f"{study_dir}: only runs from one clean commit are published; found {', '.join(commits)}"
                          + (", with local changes" if records["git_dirty"].any() else ""))  # fmt: skip
    parts = ("results.csv", "study.json", "figures", "report")
    if missing := [name for name in parts if not (study_dir / name).exists()]:
        raise RecordError(f"{study_dir}: lacks {', '.join(missing)}; run the study to its end first")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".publish-") as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        for name in parts:
            source = study_dir / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, fresh / name)
        write_json(fresh / "provenance.json", {
            "git_commit": commits[0], "runs": len(records), "device_kind": sorted(set(records["device_kind"])),
            "first_run_started_at": records["started_at"].min(), "last_run_finished_at": records["finished_at"].max(),
        })  # fmt: skip
        if target.exists():
            for other in [entry for entry in target.iterdir() if not (fresh / entry.name).exists()]:
                (shutil.copytree if other.is_dir() else shutil.copy)(other, fresh / other.name)
            target.rename(Path(temporary) / "old")
        fresh.rename(target)
    return target
