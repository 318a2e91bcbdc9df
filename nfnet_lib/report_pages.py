"""The pages of a study's report: their sources for Sphinx, and what is done to the site that it builds.

Nothing here computes results. The site needs no network and, by its content-security policy, asks none.
"""

import html
import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfnet_lib import PROJECT
from nfnet_lib.records import capitalised, collect, scale

if TYPE_CHECKING:
    import pandas as pd

ALL_RUN_PAGES = 40  # a study with more runs gets pages for its winners and its fine-tuning runs only


def write_source(study_dir: Path, source: Path, front: str, table: "pd.DataFrame") -> None:
    """Write everything that Sphinx reads to the new folder `source`. front: Markdown; table: of `report.run_table`."""
    (source / "runs").mkdir(parents=True)
    pages = _copy_pages(study_dir, source)
    runs = _copy_runs(study_dir, source)
    (source / "runs.md").write_text(_runs_page(table, runs, capitalised(scale(collect(study_dir)))))
    for picture in (study_dir / "figures").glob("*.png"):
        if f"]({picture.name})" in front:
            shutil.copy(picture, source / picture.name)
    contents = "\n".join(["```{toctree}", ":hidden:", "", *pages, "runs", "```", ""])
    (source / "index.md").write_text(f"{front}\n{contents}")
    (source / "conf.py").write_text(_CONF)
    (source / "_static").mkdir()
    (source / "_static" / "report.css").write_text(_CSS)
    (source / "_static" / "runs.js").write_text(_SORT_AND_SEARCH)
    (source / "_static" / "none.js").touch()


def finish_site(site: Path) -> None:
    """Leave out what no reader needs, describe the pictures, and forbid the pages all but their own files."""
    for folder in ("_sources", ".doctrees", "_static/locales"):
        shutil.rmtree(site / folder, ignore_errors=True)
    for path in site.rglob("*.map"):  # for debugging the theme's scripts: a third of the site
        path.unlink()
    for page in site.rglob("*.html"):
        text = _describe_images(page.read_text())
        page.write_text(re.sub(r"(<head[^>]*>)", lambda found: found[1] + _POLICY, text, count=1))


def clean_notebook(notebook: dict[str, Any], roots: tuple[Path, ...] = (PROJECT,)) -> dict[str, Any]:
    """`notebook` (its JSON) without machine paths: papermill's metadata dropped, `roots` and the interpreter's cut.

    Nor with the state of widgets: it would stand in the page as a script, which a label with </script> in it ends.
    """
    for name in ("papermill", "widgets"):
        notebook.get("metadata", {}).pop(name, None)
    for cell in notebook.get("cells", []):
        cell.get("metadata", {}).pop("papermill", None)
    text = json.dumps(notebook)
    for root in sorted({str(Path(r).resolve()) for r in (*roots, sys.prefix)}, key=len, reverse=True):
        text = text.replace(json.dumps(root)[1:-1] + "/", "").replace(json.dumps(root)[1:-1], ".")
    text = re.sub(r"/[\w/]+/ipykernel_\d+/\d+\.py", "cell", text)
    return json.loads(text)


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


def _runs_page(table: "pd.DataFrame", pages: dict[str, str], devices: str) -> str:
    lines = [
        "# Every run",
        "",
        f"{devices}. A run is linked to the executed notebook that made it. A click on a column's head sorts by it.",
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
html_js_files = ["runs.js"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False, "show_toc_level": 2}
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure"]
nb_ipywidgets_js = {}
nb_merge_streams = True
smartquotes = False  # names of runs and folders are shown as they are
mathjax_path = "none.js"  # nothing is typeset, so nothing is fetched
"""
_CSS = """
table { display: block; overflow-x: auto; font-size: 0.85rem; }
img { max-width: 100%; }
h1, h2, .prev-next-title, .bd-sidebar-primary a, #every-run a { overflow-wrap: anywhere; }
.prev-next-area .prev-next-info { min-width: 0; }
pre { white-space: pre-wrap; }
#every-run th { cursor: pointer; white-space: nowrap; }
#every-run th[aria-sort=ascending]::after { content: " \\2191"; }
#every-run th[aria-sort=descending]::after { content: " \\2193"; }
#every-run input { width: min(100%, 24rem); margin-bottom: 0.5rem; padding: 0.3rem 0.5rem; }
@media print {
  .bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article, .prev-next-footer, #every-run input {
    display: none !important;
  }
  table { display: table; font-size: 0.5rem; overflow-wrap: anywhere; }
  .cell_output, .output, .tableholder { overflow: visible !important; }
  img, tr { break-inside: avoid; }
}
"""
_SORT_AND_SEARCH = """
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("#every-run table");
  if (!table) return;
  const body = table.tBodies[0];
  const search = Object.assign(document.createElement("input"), { type: "search", placeholder: "find runs" });
  search.setAttribute("aria-label", "find runs");
  table.before(search);
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\\s+/);
    for (const row of body.rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
  const heads = [...table.tHead.rows[0].cells];
  const sort = (head, column) => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const text = (row) => row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const [x, y] = [text(a), text(b)];
      if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1);
      const by = x - y;
      return (up ? 1 : -1) * (Number.isNaN(by) ? x.localeCompare(y) : by);
    };
    body.append(...[...body.rows].sort(compare));
  };
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head, column));
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort(head, column));
  });
});
"""
_POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src 'self' file: data:;"
    " script-src 'self' file: 'unsafe-inline'; style-src 'self' file: 'unsafe-inline'; font-src 'self' file: data:\">"
)
