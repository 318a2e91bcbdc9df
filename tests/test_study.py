"""The lr search, the runner's guards, and a study from end to end at the smallest size."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_study
import nbformat
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfnet_lib.cell import CellFailed, execute
from nfnet_lib.cli import main
from nfnet_lib.tuning import search_lr

GRID = [0.1 * 2**i for i in range(8)]


@given(st.permutations(range(8)), st.integers(0, 7))
def test_the_rate_found_is_bracketed_or_at_the_end(losses, start):
    tried = search_lr(GRID, GRID[start], lambda lr: float(losses[GRID.index(lr)]))
    best = min(tried, key=tried.get)
    index = GRID.index(best)
    assert all(GRID[i] in tried for i in (index - 1, index + 1) if 0 <= i < 8)
    assert GRID[start] in tried


@given(st.integers(0, 7), st.integers(0, 7))
def test_a_valley_is_found_from_anywhere(valley, start):
    tried = search_lr(GRID, GRID[start], lambda lr: float(abs(GRID.index(lr) - valley)))
    assert min(tried, key=tried.get) == GRID[valley] and len(tried) <= abs(valley - start) + 3


def notebook(path, *cells):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(book, path)
    return path


@pytest.mark.parametrize(
    "code,words", [("1 / 0", "ZeroDivisionError"), ("import os; os.kill(os.getpid(), 9)", "died|Dead|exit code")]
)
def test_a_cell_that_fails_is_kept_and_told(tmp_path, code, words):
    with pytest.raises(CellFailed, match=words):
        execute(notebook(tmp_path / "in.ipynb", "print('before')", code), tmp_path / "out.ipynb", {})
    assert not (tmp_path / "out.ipynb").exists() and "before" in (tmp_path / "out.partial.ipynb").read_text()


def test_too_long_is_ended(tmp_path):
    with pytest.raises(CellFailed, match="longer than"):
        execute(notebook(tmp_path / "in.ipynb", "import time; time.sleep(600)"), tmp_path / "out.ipynb", {}, timeout=5)


def test_nothing_outlives_the_process_that_started_it(tmp_path):
    started = tmp_path / "started"
    notebook(tmp_path / "in.ipynb", f"open({str(started)!r}, 'w').close()", "import time; time.sleep(600)")
    script = f"import pathlib; from nfnet_lib.cell import execute; p = pathlib.Path({str(tmp_path)!r}); \
execute(p / 'in.ipynb', p / 'out.ipynb', {{}})"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent.parent)
    for _ in range(600):
        if started.exists():
            break
        time.sleep(0.1)
    children = psutil.Process(parent.pid).children(recursive=True)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert len(children) >= 3 and not alive


def test_a_study_runs_skips_and_refuses_another(smallest_study, tmp_path, capsys):
    path, out = smallest_study
    assert (out / "report" / "index.html").exists()
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/summary.json")}
    assert len(stamps) == 4 and len(list(out.glob("pretrain_*_tuned_*/run.ipynb"))) == 2
    assert main(["study", str(path), "--out", str(out)]) == 0
    assert "report:" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/summary.json")} == stamps
    text = (out / "results.csv").read_text()
    assert text.count("\n") == 5 and str(out.parent) not in text
    other = tmp_path / "study.yaml"
    other.write_text(path.read_text().replace("num_classes: 4", "num_classes: 5"))
    assert main(["study", str(other), "--out", str(out)]) == 2
    assert "pretrain.num_classes: 5, but" in capsys.readouterr().err
    assert main(["study", str(tmp_path / "none.yaml")]) == 2
    assert main(["status", str(out)]) == 0 and json.loads((out / "study.json").read_text())["name"] == "smallest"


def test_a_study_of_which_every_cell_fails_is_told_and_reported(smallest_study, tmp_path, capsys):
    path, _ = smallest_study
    assert main(["study", str(path), "-p", "timeout_minutes=0.01", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "failed: Ti-4-mini_ep1: run took longer than 0.01 minutes" in said.out + said.err
    report = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "There is no answer yet" in report and "2 of this study" in report


def test_a_reader_that_goes_away_is_no_bad_input(smallest_study):
    path, out = smallest_study
    for command in (["study", str(path), "--out", str(out)], ["status", str(out)]):
        process = subprocess.Popen(
            [sys.executable, "-m", "nfnet_lib.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait() == 1 and "Traceback" not in error and "error:" not in error and "ignored" not in error, error


def test_a_study_killed_at_random_ends_with_the_same_records(smallest_study, tmp_path):
    path, undisturbed = smallest_study
    shutil.copytree(undisturbed / ".cache", tmp_path / "killed" / ".cache")
    kill_study.kill_at_random(path, tmp_path / "killed", kills=2, longest=25, seed=1)
    kill_study.finish(path, tmp_path / "killed")
    expected = kill_study.records(undisturbed)
    assert len(expected) == 8 and not kill_study.differences(expected, kill_study.records(tmp_path / "killed"))
