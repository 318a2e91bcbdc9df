"""The rendered report: a static site from the executed notebooks of a study, readable offline from a file.

Nothing here computes results: tables and sentences come from the records, figures from the notebooks' outputs.
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfnet_lib import PROJECT, paper
from nfnet_lib.records import FAILURE, RecordError, collect, write_json

if TYPE_CHECKING:
    import pandas as pd

PUBLISHED = PROJECT / "outputs" / "published"
ALL_RUN_PAGES = 40  # a study with more runs gets pages for its winners and its fine-tuning runs only
FIGURES = {
    "figure1": "Figure 1: fine-tuned error against pre-training compute, ours and the paper's points apart",
    "figure2": "Figure 2: held-out loss against compute",
    "figure3": "Figure 3: the best learning rate against the epoch budget",
}


def open_study(study_dir: str = "") -> tuple["pd.DataFrame", Path]:
    """(records, folder for figures) of a study; "" means outputs/laptop, or the published results where it has no runs.

    Relative folders are taken from the checkout. FileNotFoundError says how to make records where there are none.
    """
    import pandas as pd

    folder = PROJECT / (study_dir or "outputs/laptop")
    if any(folder.glob("*/summary.json")):
        return collect(folder), folder / "figures"
    if not study_dir and (PUBLISHED / "results.csv").exists():
        return pd.read_csv(PUBLISHED / "results.csv"), PROJECT / "outputs" / "by_hand" / "figures"
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

    result = frontier_analysis(records)
    law, interval = result.law, result.interval
    between = f" (90% interval {interval.low:.3f} to {interval.high:.3f})" if interval else ""
    sentences = [
        f"At laptop scale, over {result.decades:.1f} decades of compute, the lowest held-out loss falls as compute to the"
        f" power -{law.exponent:.3f}{between}; the straight line on log-log axes explains {law.r_squared:.1%} of it."
    ]
    points = result.points
    first, last = points.iloc[0], points.iloc[-1]
    order = list(dict.fromkeys(points["variant"]))
    sentences.append(
        f"Along that frontier the best model goes from {first['variant']} at {first['epoch_budget']:g} epochs to "
        f"{last['variant']} at {last['epoch_budget']:g} epochs; in order of compute the optimal sizes are "
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
            f"Fine-tuned on digits, {best['variant']} does best, with {best['top1_error_percent']:.2f}% top-1 error "
            f"({repeated})"
        )
        if with_repeats == with_repeats and plain == plain:
            sentence += (
                f"; mean error {plain:.2f}% without and {with_repeats:.2f}% with repeated augmentation, one seed each"
            )
        sentences.append(sentence + ".")
    return sentences


def sentences(texts: list[str]):
    """A list of generated sentences, as a notebook shows it."""
    from IPython.display import Markdown

    return Markdown("\n".join(f"- {text}" for text in texts))


def provenance(records: "pd.DataFrame") -> "pd.DataFrame":
    """Where the records come from: commits, machine, versions, cost."""
    import pandas as pd

    def several(column: str) -> str:
        values = sorted({str(v) for v in records[column].dropna()}) if column in records else []
        return ", ".join(values) or "not recorded"

    rows = {
        "runs": f"{(records['kind'] == 'pretrain').sum()} of pre-training, "
        f"{(records['kind'] == 'finetune').sum()} of fine-tuning",
        "commit": several("git_commit"),
        "tracked files modified": several("git_dirty"),
        "device": several("device_kind"),
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

    result, tuned = frontier_analysis(records), finetune_table(records)
    cells = best_per_cell(records)
    most = paper.points()["value"].max()
    rows = [
        ("largest pre-training compute, TPU-v4 core-hours", f"{110e3:,.0f} (abstract)",
         f"{records.loc[records['kind'] == 'pretrain', 'tpu_v4_core_hours'].max():.2g} by formula"),
        ("held-out loss against compute", "a straight line on log-log axes (Figure 2)",
         f"exponent {result.law.exponent:.3f}, R^2 {result.law.r_squared:.3f} over {result.decades:.1f} decades"),
        ("best learning rates", "0.4 to 1.6 (Figure 3)", f"{cells['best_lr'].min():g} to {cells['best_lr'].max():g}"),
        ("best fine-tuned top-1 error", "9.6%, ImageNet, F7+ with RA (text)",
         f"{tuned['top1_error_percent'].min():.2f}%, handwritten digits" if len(tuned) else "none run"),
    ]  # fmt: skip
    assert most >= 110e3
    return pd.DataFrame(rows, columns=["what", "paper", "ours (laptop scale)"]).set_index("what")


def run_table(study_dir: Path) -> "pd.DataFrame":
    """Every run of a study with its state: finished ones from their records, failed ones with their error."""
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
    table = records[columns].assign(state="done")
    failed = [
        {"run_id": path.parent.name, "state": f"failed: {json.loads(path.read_text())['error']}"}
        for path in sorted(study_dir.glob(f"*/{FAILURE}"))
        if path.parent.name not in set(table["run_id"])
    ]
    return pd.concat([table, pd.DataFrame(failed)], ignore_index=True) if failed else table


def clean_notebook(notebook: dict[str, Any], roots: tuple[Path, ...] = (PROJECT,)) -> dict[str, Any]:
    """`notebook` (its JSON) without machine paths: papermill's metadata dropped, `roots` and the interpreter's cut."""
    notebook.get("metadata", {}).pop("papermill", None)
    for cell in notebook.get("cells", []):
        cell.get("metadata", {}).pop("papermill", None)
    text = json.dumps(notebook)
    for root in sorted({str(Path(r).resolve()) for r in (*roots, sys.prefix)}, key=len, reverse=True):
        text = text.replace(json.dumps(root)[1:-1] + "/", "").replace(json.dumps(root)[1:-1], ".")
    text = re.sub(r"/[\w/]+/ipykernel_\d+/\d+\.py", "cell", text)
    return json.loads(text)


def build_report(study_dir: str | Path) -> Path:
    """Build `study_dir`/report from the executed notebooks and return its index.html; the old report stays on failure.

    RuntimeError with Sphinx's words if a page or a link is broken.
    """
    study_dir = Path(study_dir)
    if not any(study_dir.glob("*/summary.json")) and not any(study_dir.glob(f"*/{FAILURE}")):
        raise FileNotFoundError(f"{study_dir}: no runs to report; `nfnet study` makes them")
    with tempfile.TemporaryDirectory(dir=study_dir, prefix=".report-") as temporary:
        source, site = Path(temporary) / "source", Path(temporary) / "site"
        (source / "runs").mkdir(parents=True)
        pages = _copy_pages(study_dir, source)
        runs = _copy_runs(study_dir, source)
        (source / "runs.md").write_text(_runs_page(study_dir, runs))
        (source / "index.md").write_text(_front_page(study_dir, source, pages))
        (source / "conf.py").write_text(_CONF)
        (source / "_static").mkdir()
        (source / "_static" / "report.css").write_text(_CSS)
        (source / "_static" / "none.js").touch()
        done = subprocess.run(
            [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(source), str(site)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"report of {study_dir.name}: {done.stderr.strip()[-2000:]}")
        shutil.rmtree(site / "_sources", ignore_errors=True)
        shutil.rmtree(site / ".doctrees", ignore_errors=True)
        shutil.rmtree(site / "_static" / "locales", ignore_errors=True)
        for path in site.rglob("*.map"):  # for debugging the theme's scripts: a third of the site
            path.unlink()
        for page in site.rglob("*.html"):
            page.write_text(_describe_images(page.read_text()))
        target, old = study_dir / "report", Path(temporary) / "old"
        if target.exists():
            target.rename(old)
        site.rename(target)
    return target / "index.html"


def publish(study_dir: str | Path, target: Path = PUBLISHED) -> Path:
    """Replace `target` by a finished study's results.csv, study.json, figures, report and provenance.json.

    RecordError unless all its runs were made from one commit without local changes, and its report is there.
    """
    study_dir = Path(study_dir)
    records = collect(study_dir)
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
            target.rename(Path(temporary) / "old")
        fresh.rename(target)
    return target


def _copy_pages(study_dir: Path, source: Path) -> list[str]:
    """The executed analysis notebooks, cleaned; returns their names, the front one first."""
    pages = []
    for path in sorted((study_dir / "analysis").glob("[!.]*.ipynb")):
        if not path.name.endswith(".partial.ipynb"):
            _write_clean(
                path, source / f"{path.stem}.ipynb" if path.stem != "index" else source / "overview.ipynb", study_dir
            )
            pages.append("overview" if path.stem == "index" else path.stem)
    return sorted(pages, key=lambda name: (name != "overview", name != "04_scaling_laws", name))


def _copy_runs(study_dir: Path, source: Path) -> dict[str, str]:
    """Pages of runs, {run_id: page}; all of them, or in a large study the winners and the fine-tuning runs."""
    records = collect(study_dir)
    wanted = set(records["run_id"])
    if len(wanted) > ALL_RUN_PAGES:
        tuned = records[records["kind"] == "finetune"]
        winners = records.sort_values("heldout_loss").groupby(["kind", "variant", "epoch_budget"]).head(1)
        wanted = set(tuned["run_id"]) | set(winners["run_id"])
    notebooks = {}
    for row in records.to_dict("records"):
        for name in (row["run_id"], row.get("cell_id")):  # a run's own notebook, or that of the search it belongs to
            if name and (study_dir / name / "run.ipynb").exists():
                notebooks[row["run_id"]] = name
    made = {name for run_id, name in notebooks.items() if run_id in wanted}
    for name in made:
        _write_clean(study_dir / name / "run.ipynb", source / "runs" / f"{name}.ipynb", study_dir, title=name)
    return {run_id: name for run_id, name in notebooks.items() if name in made}


def _write_clean(path: Path, target: Path, study_dir: Path, title: str | None = None) -> None:
    notebook = clean_notebook(json.loads(path.read_text()), (PROJECT, study_dir.parent))
    for cell in notebook["cells"]:
        outputs = cell.get("outputs", [])  # progress bars and warnings are for the run's log, not for a page
        cell["outputs"] = [o for o in outputs if o.get("name") != "stderr"] if cell["cell_type"] == "code" else None
        if cell["cell_type"] != "code":
            cell.pop("outputs")
    first = notebook["cells"][0]
    if title and first["cell_type"] == "markdown":
        text = first["source"] if isinstance(first["source"], str) else "".join(first["source"])
        first["source"] = re.sub(r"^# .*", f"# {title}", text, count=1)
    target.write_text(json.dumps(notebook))


def _runs_page(study_dir: Path, pages: dict[str, str]) -> str:
    table = run_table(study_dir)
    lines = [
        "# Every run",
        "",
        "Laptop scale. A run is linked to the executed notebook that made it.",
        "",
    ]
    names = [c for c in table.columns if c != "run_id"]
    lines += ["| run | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for row in table.itertuples(index=False):
        page = pages.get(row.run_id)
        values = [f"[{row.run_id}](runs/{page}.ipynb)" if page else f"`{row.run_id}`"]
        for name in names:
            value = getattr(row, name)
            text = "" if value != value else f"{value:.4g}" if isinstance(value, float) else str(value)
            values.append(html.escape(text).replace("|", "\\|").replace("\n", " "))
        lines.append("| " + " | ".join(values) + " |")
    if pages:
        lines += ["", "```{toctree}", ":hidden:", "", *(f"runs/{name}" for name in sorted(set(pages.values()))), "```"]
    return "\n".join(lines) + "\n"


def _front_page(study_dir: Path, source: Path, pages: list[str]) -> str:
    """The answer in generated sentences, the three figures, and the contents."""
    lines = [
        "# ConvNets at scale: a reproduction report", "",
        "The open companion to *ConvNets Match Vision Transformers at Scale* (arXiv 2310.16764), at laptop scale: the same",
        "protocol on a family of small NFNets and data that anyone can make. Every page is an executed notebook.", "",
    ]  # fmt: skip
    try:
        lines += [f"- {text}" for text in answer(collect(study_dir))]
    except ValueError as error:  # too few runs for a fit: the pages say what there is
        lines += [f"There is no answer yet: {error}"]
    for name, title in FIGURES.items():
        picture = study_dir / "figures" / f"{name}.png"
        if picture.exists():
            shutil.copy(picture, source / picture.name)
            lines += ["", f"## {title}", "", f"![{title}]({name}.png)"]
            if picture.with_suffix(".txt").exists():
                lines += ["", picture.with_suffix(".txt").read_text(encoding="utf-8").strip()]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *pages, "runs", "```", ""])


def _describe_images(page: str) -> str:
    """Alternative texts say which figure it is: the nearest heading before it."""
    heading = "figure"
    out = []
    for part in re.split(r"(<h[1-4][^>]*>.*?</h[1-4]>|<img [^>]*>)", page, flags=re.DOTALL):
        if part.startswith("<h"):
            heading = re.sub(r"<a class=\"headerlink\".*", "", part, flags=re.DOTALL)
            heading = html.escape(html.unescape(re.sub(r"<[^>]+>", "", heading)).strip(), quote=True)
        elif part.startswith("<img"):
            part = re.sub(r'alt="[^"]*(?:_images|png)[^"]*"', f'alt="Figure: {heading}"', part)
        out.append(part)
    return "".join(out)


_CONF = """
project = "ConvNets at scale"
author = "the companion's founders"
html_context = {"default_mode": "auto"}
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
html_theme = "sphinx_book_theme"
html_title = "ConvNets at scale: reproduction report"
html_static_path = ["_static"]
html_css_files = ["report.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False, "show_toc_level": 2}
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]
nb_ipywidgets_js = {}
nb_merge_streams = True
mathjax_path = "none.js"  # nothing is typeset, so nothing is fetched
"""
_CSS = """
table { display: block; overflow-x: auto; font-size: 0.85rem; }
img { max-width: 100%; }
pre { white-space: pre-wrap; }
"""
