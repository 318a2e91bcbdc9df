"""Papermill's traps, each sprung on purpose; and what it is liked for still works by hand."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import papermill
import psutil
import pytest
import yaml

from nfnet_lib import PROJECT, cell
from nfnet_lib.cell import CellFailed, command, execute
from nfnet_lib.config import ConfigError, PretrainConfig
from nfnet_lib.locks import holder

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


def notebook(path, *cells, parameters="x: int = 1  # a number"):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")])
    book.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    book.cells += [nbformat.v4.new_code_cell(text) for text in cells]
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_help_notebook_shows_every_parameter_with_type_and_meaning(path, capsys):
    from click.testing import CliRunner
    from papermill.cli import papermill as papermill_command

    shown = CliRunner().invoke(papermill_command, ["--help-notebook", str(path)])
    assert shown.exit_code == 0
    text = " ".join(shown.output.split())
    found = papermill.inspect_notebook(str(path))
    assert found
    for name, parameter in found.items():
        assert parameter["inferred_type_name"] in ("str", "int", "float", "bool", "list"), name
        assert parameter["help"].strip(), name
        assert f"{name}: {parameter['inferred_type_name']}" in text, name


def test_unknown_names_texts_for_numbers_and_truth_values(tmp_path):
    """By papermill's own command line, as a user types it; nothing is written where it is refused."""
    base = [sys.executable, "-m", "papermill", "notebooks/02_pretrain.ipynb", str(tmp_path / "out.ipynb"), "--no-progress-bar"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for options, words in [
        (["-p", "peak_lrr", "0.1"], "peak_lrr: unknown parameter of PretrainConfig; did you mean peak_lr"),
        (["-p", "flip", "maybe"], "flip: 'maybe' is out of range"),
    ]:
        options = [*options, "-p", "study_dir", str(tmp_path / "study")]
        done = subprocess.run([*base, *options], cwd=PROJECT, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 1 and words in done.stderr
        assert not (tmp_path / "study").exists()
    injected = {"peak_lr": "1e-3", "flip": "false", "examples_per_epoch": "4e9"}  # as -f and -p leave them
    config = PretrainConfig.from_params(injected)
    assert (config.peak_lr, config.flip, config.examples_per_epoch) == (1e-3, False, 4_000_000_000)
    with pytest.raises(ConfigError, match="batch_size: 'many' is not a whole number"):
        PretrainConfig.from_params({"batch_size": "many"})
    with pytest.raises(ConfigError, match="batch_size: True is a truth value"):
        PretrainConfig.from_params({"batch_size": True})


def test_a_dead_kernel_is_told_and_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a notebook: no escape codes in what is told
    path = notebook(tmp_path / "in.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "print('after')")
    with pytest.raises(CellFailed) as failure:
        execute(path, tmp_path / "out.ipynb", {})
    assert failure.value.lost and not (tmp_path / "out.ipynb").exists()
    path = notebook(tmp_path / "in.ipynb", "raise ValueError('no')")
    with pytest.raises(CellFailed, match=r"^ValueError: no$") as failure:
        execute(path, tmp_path / "out.ipynb", {})
    assert not failure.value.lost
    without = "class Full(OSError):\n    def _render_traceback_(self):\n        return []\nraise Full('no file can be opened')"
    with pytest.raises(CellFailed, match=r"^Full: no file can be opened$"):  # where IPython could not make a traceback
        execute(notebook(tmp_path / "in.ipynb", without), tmp_path / "out.ipynb", {})


def test_one_process_executes_many_notebooks(tmp_path, monkeypatch):
    """Each as if it were the first: with its figures, without what an earlier one left, whatever became of that."""
    monkeypatch.setenv("MPLCONFIGDIR", "/dev/null/none")  # so that matplotlib makes a folder for as long as the process lives
    by = "import builtins, os, psutil\nprint(psutil.Process(os.getppid()).ppid(), hasattr(builtins, 'left'))"
    draw = "import matplotlib.pyplot as plt, numpy as np\nplt.plot([1, 2])\nbuiltins.left = 1\nprint(np.random.rand())"
    path = notebook(tmp_path / "in.ipynb", by, draw)
    dies = notebook(tmp_path / "dies.ipynb", "import os; os.kill(os.getpid(), 9)")
    (tmp_path / "broken.ipynb").write_text("{")

    def executed(name):
        """What it said of its process and what was left to it, and the number that it drew."""
        execute(path, tmp_path / f"{name}.ipynb", {})
        outputs = [o for c in nbformat.read(tmp_path / f"{name}.ipynb", 4).cells for o in c.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert "Ctrl-C" not in (tmp_path / f"{name}.log").read_text()
        said = [output.text.strip() for output in outputs if output.output_type == "stream"]
        return said[0].split(), float(said[1])

    with cell.processes_kept():
        (process, left), drawn = executed("first")
        with pytest.raises(CellFailed) as failure:
            execute(dies, tmp_path / "dead.ipynb", {})
        assert failure.value.lost, failure.value.log
        for _ in range(5):
            with pytest.raises(CellFailed, match="NotJSONError"):
                execute(tmp_path / "broken.ipynb", tmp_path / "never.ipynb", {})
        with ThreadPoolExecutor(1) as pool:  # whose thread ends, and its process with it
            (another, _), _ = pool.submit(executed, "in a thread").result()
        (again, left_again), drawn_again = executed("last")
    assert process == again != another and left == left_again == "False" and drawn != drawn_again
    assert not psutil.pid_exists(int(process)) and not psutil.pid_exists(int(another))


def test_a_kernel_that_can_not_start_is_lost(tmp_path, monkeypatch):
    (tmp_path / "profile_default").mkdir()
    (tmp_path / "profile_default" / "ipython_kernel_config.py").write_text("raise SystemExit(1)")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    with pytest.raises(CellFailed, match="Kernel died") as failure:
        execute(notebook(tmp_path / "in.ipynb", "print('never')"), tmp_path / "out.ipynb", {})
    assert failure.value.lost and not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize("length", [10, 120])
def test_kernels_need_no_ports_of_which_two_could_be_given_the_same(length, tmp_path, monkeypatch):
    """Wherever temporary files go: the name of a socket may have some 100 characters only."""
    (tmp_path / ("t" * length)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("t" * length)))
    code = "import json; from ipykernel.connect import get_connection_info; info = json.loads(get_connection_info())"
    path = notebook(tmp_path / "in.ipynb", code, "print(info['transport'], info['ip'])")
    execute(path, tmp_path / "out.ipynb", {})
    (output,) = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    transport, place = output.text.split()
    assert transport == "ipc" and "/nfnet-kernel-" in place
    assert not os.path.exists(os.path.dirname(place)), "sockets go with their kernel"


def test_a_notebook_that_is_half_written_is_not_taken_for_done(tmp_path):
    """Papermill writes in place: who kills it while it does leaves an empty file, under another name than the result's."""
    folder = tmp_path / "pretrain_x"
    folder.mkdir()
    (folder / "run.partial.ipynb").write_text("")
    path = notebook(tmp_path / "in.ipynb", "print('whole')")
    execute(path, folder / "run.ipynb", {"x": 2}, timeout=60 * 600_000)  # what params/paper/study.yaml gives a cell
    assert not (folder / "run.partial.ipynb").exists()
    assert "whole" in json.dumps(nbformat.read(folder / "run.ipynb", 4))


def test_floods_of_output_are_cut_and_the_log_has_them(tmp_path):
    path = notebook(tmp_path / "in.ipynb", "for i in range(60_000): print('line', i)")
    execute(path, tmp_path / "out.ipynb", {})
    assert (tmp_path / "out.ipynb").stat().st_size < 3 * cell.LONGEST_OUTPUT
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    (output,) = outputs
    assert output.text.startswith("line 0\n") and output.text.endswith("line 59999\n") and "left out" in output.text
    assert "line 30000\n" in (tmp_path / "out.log").read_text()


def test_an_executed_notebook_says_how_to_do_it_by_hand(tmp_path):
    path = notebook(tmp_path / "in.ipynb", "print(x, y)", parameters="x: float = 1.0  # a number\ny: str = 'a'  # a text")
    execute(path, tmp_path / "out.ipynb", {"x": 1e-6, "y": "it's"})
    text = nbformat.read(tmp_path / "out.ipynb", 4).cells[1].source
    line = re.search(r"```\n(papermill .*)\n```", text)[1]
    assert line == command(path, {"x": 1e-6, "y": "it's"})
    arguments = shlex.split(line)
    assert yaml.safe_load(arguments[arguments.index("-y") + 1]) == {"x": 1e-6, "y": "it's"}, "a number stays a number"
    arguments[2] = str(tmp_path / "by_hand.ipynb")
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=PROJECT, capture_output=True, check=False)
    assert done.returncode == 0 and "1e-06 it's" in (tmp_path / "by_hand.ipynb").read_text()
    assert "-y" not in command(path, {"x": 1.0, "y": "a"}), "defaults need no naming"


WATCHED = """
import os, signal
os.environ["JPY_SESSION_NAME"] = "open.ipynb"
from pathlib import Path
from nfnet_lib import background
from nfnet_lib.config import PretrainConfig
from nfnet_lib.locks import holder
config = PretrainConfig.from_params({"variant": "Ti/4-mini", "optimizer": "adamw", "peak_lr": 0.002, "num_classes": 4,
    "image_size": 16, "resolution": 16, "eval_resolution": 16, "examples_per_epoch": 16384, "heldout_examples": 16,
    "batch_size": 16, "checkpoints": 1})
folder = Path(work)
"""


def test_a_run_outlives_the_notebook_that_started_it(tmp_path):
    """An open notebook starts a run, its kernel is killed; another finds the run, stops it, goes on with it and shows it."""
    folder = tmp_path / "study"
    folder.mkdir()
    parameters = "work: str = ''  # folder"
    first = notebook(tmp_path / "first.ipynb", WATCHED, "background.start(config, [], folder)",
                     "os.kill(os.getpid(), 9)", parameters=parameters)  # fmt: skip
    with pytest.raises(CellFailed):
        execute(first, tmp_path / "first_out.ipynb", {"work": str(folder)})
    (run,) = folder.iterdir()
    for _ in range(600):
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size:
            break
        time.sleep(0.1)
    at_work = holder(run / ".background").pid
    os.kill(at_work, signal.SIGSTOP)  # or it may be done before the second notebook has started
    second = notebook(
        tmp_path / "second.ipynb", WATCHED, "again = background.start(config, [], folder)",
        "background.stop(config, [], folder)\nos.kill(holder(again).pid, signal.SIGCONT)\n"
        "try:\n    background.tune(config, [], folder, seconds=0.2)\n"
        "except Exception as error:\n    print('ended by', type(error).__name__)",
        "tuned = background.tune(config, [], folder, seconds=0.2)\nprint('loss', tuned.summary['heldout_loss'])",
        "background.panel(folder)", parameters=parameters,
    )  # fmt: skip
    try:
        execute(second, tmp_path / "second_out.ipynb", {"work": str(folder)})
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(at_work, signal.SIGCONT)
    outputs = json.dumps(nbformat.read(tmp_path / "second_out.ipynb", 4))
    assert "ended by CellStopped" in outputs and "loss " in outputs and "1 runs: 1 done" in outputs
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 1024 and steps == sorted(set(steps)) and (run / "summary.json").exists()


def test_a_cell_does_not_wait_for_a_grammar_that_it_does_not_need():
    code = (
        "import sys; from nfnet_lib.notebook_process import papermill; papermill(); import nbformat, jsonschema;"
        " print([name for name, module in sys.modules.items() if name.split('.')[0] in ('rfc3987_syntax', 'lark') and module])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
