"""Notebooks are thin, stripped and parameterised like their configs; the analysis runs on any study's records."""

import ast
import json
from pathlib import Path

import nbformat
import pytest
from synthetic import summary, write_runs

from nfnet_lib.config import FinetuneConfig, PretrainConfig
from nfnet_lib.files import write_json
from nfnet_lib.records import RecordError
from nfnet_lib.report import build_report, front_page, publish
from nfnet_lib.report_pages import clean_notebook

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def parameters(path):
    notebook = nbformat.read(path, 4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return cell.source, {n.target.id: n for n in ast.parse(cell.source).body}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_thin_stripped_and_documented(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert notebook.cells[0].source.startswith("# ") and len(code) <= 12
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(c.outputs or c.execution_count for c in code)
    lines = [line for c in code if "parameters" not in c.metadata.get("tags", []) for line in c.source.splitlines()]
    assert len(lines) <= 80 and not any(line.startswith(("def ", "class ")) for line in lines)
    source, nodes = parameters(path)
    assert len(nodes) == len(source.splitlines()), "one a line"
    assert all("  # " in line and ": " in line for line in source.splitlines())


@pytest.mark.parametrize("name,config", [("02_pretrain", PretrainConfig), ("03_finetune", FinetuneConfig)])
def test_parameters_are_the_config(name, config):
    source, nodes = parameters(NOTEBOOKS[0].parent / f"{name}.ipynb")
    own = {"study_dir", "lr_grid" if name == "02_pretrain" else "comparison_seeds"}
    assert set(nodes) == set(config.model_fields) - {"kind"} | own
    defaults = {key: ast.literal_eval(node.value) for key, node in nodes.items() if key in config.model_fields}
    config.from_params({**defaults, "pretrained_run": "x"} if name == "03_finetune" else defaults)
    for key, node in nodes.items():
        if key in config.model_fields:
            assert config.model_fields[key].description in source
            wanted = {int: "int", float: "float", bool: "bool"}.get(config.model_fields[key].annotation, "str")
            assert node.annotation.id == wanted, key


def test_analysis_shows_figures_and_sentences(planted_study):
    for number in (1, 2, 3):
        assert all(
            (planted_study / "figures" / f"figure{number}.{suffix}").stat().st_size > 500 for suffix in ("svg", "png", "csv")
        )
    text = (planted_study / "analysis" / "04_scaling_laws.ipynb").read_text()
    assert text.count('"image/png"') == 3 and "Power law: loss" in text


def test_the_report_is_whole_and_needs_no_network(planted_study):
    index = build_report(planted_study)
    pages = {path.name: path.read_text() for path in index.parent.glob("*.html")}
    assert {"index.html", "overview.html", "04_scaling_laws.html", "05_compare.html", "runs.html"} <= set(pages)
    assert pages["index.html"].count("<img") >= 3
    for name, page in pages.items():
        for kind in ('src="http', 'src="//', '<link href="http', "url(http"):
            assert kind not in page, (name, kind)
        assert str(planted_study) not in page and str(Path.cwd()) not in page, name
        assert "<script>alert(1)" not in page
    assert "failed: &lt;script&gt;" in pages["runs.html"] or "failed: &amp;lt;script" in pages["runs.html"]
    assert build_report(planted_study) == index, "again, over the old one"


def test_cleaning_cuts_paths():
    cell = {"metadata": {"papermill": {}}, "source": "/a/b/c.py"}
    notebook = {"metadata": {"papermill": {"input_path": "x"}}, "cells": [cell]}
    cleaned = clean_notebook(notebook, (Path("/a/b"),))
    assert json.dumps(cleaned) == '{"metadata": {}, "cells": [{"metadata": {}, "source": "c.py"}]}'


def test_notebooks_that_failed_are_named_on_the_first_page(tmp_path):
    write_runs(tmp_path, [summary("a")])
    assert "what failed" not in front_page(tmp_path)
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "05_compare.partial.ipynb").write_text("{}")
    assert "05_compare: what failed in this notebook is in the logs" in front_page(tmp_path)


def test_only_a_whole_study_of_one_clean_commit_is_published(tmp_path):
    folder, target = tmp_path / "study", tmp_path / "published"
    folder.mkdir()
    with pytest.raises(RecordError, match="holds no finished runs"):
        publish(folder, target)
    write_runs(folder, [summary("a", git_commit="1" * 40), summary("b", git_commit="2" * 40)])
    with pytest.raises(RecordError, match="one clean commit"):
        publish(folder, target)
    write_json(folder / "b" / "summary.json", summary("b", git_commit="1" * 40, git_dirty=True))
    with pytest.raises(RecordError, match="local changes"):
        publish(folder, target)
    write_json(folder / "b" / "summary.json", summary("b", git_commit="1" * 40))
    with pytest.raises(RecordError, match=r"lacks results\.csv"):
        publish(folder, target)
    assert not target.exists()
    for name in ("figures", "report"):
        (folder / name).mkdir()
    for name in ("results.csv", "study.json", "report/index.html"):
        (folder / name).write_text(name)
    assert publish(folder, target) == target
    (target / "gpu").mkdir()
    for name in ("gpu/results.csv", "report/old.html"):
        (target / name).write_text("of an earlier study")
    assert publish(folder, target) == target
    assert (target / "gpu" / "results.csv").exists() and not (target / "report" / "old.html").exists()
    assert (target / "report" / "index.html").read_text() == "report/index.html"
    assert json.loads((target / "provenance.json").read_text())["git_commit"] == "1" * 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published", "study"]
