"""Faults made on purpose: disks that fill up, clocks that step back, hostile files and names, a long queue.

What kills processes and damages checkpoints is tested beside what it is about; tests/faults.py lists all of it.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import kill_study
import numpy as np
import psutil
import pytest
import yaml
from test_study import SMALLEST

from nfnet_lib import PROJECT, engine
from nfnet_lib.cell import CellFailed, execute
from nfnet_lib.cli import main
from nfnet_lib.config import ConfigError, FinetuneConfig, PretrainConfig, StudyConfig
from nfnet_lib.records import read_summary, write_json
from nfnet_lib.report import build_report

PARAMS = {
    "variant": "F0-mini", "num_classes": 4, "image_size": 16, "resolution": 16, "eval_resolution": 16,
    "examples_per_epoch": 512, "heldout_examples": 16, "batch_size": 16, "checkpoints": 4, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The parameters' file, and the folder of its undisturbed run."""
    folder = tmp_path_factory.mktemp("faults")
    write_json(folder / "params.json", PARAMS)
    assert train(folder / "params.json", folder / "run").returncode == 0
    return folder / "params.json", folder / "run"


def train(params, out, before=""):
    """One run in a process of its own, with the programs that an earlier one compiled; `before`: Python to run first."""
    code = f"{before}\nimport sys\nfrom nfnet_lib.train import main\nsys.exit(main(sys.argv[1:]))"
    options = ["--out", str(out), "--cache-dir", str(params.parent / ".cache")]
    command = [sys.executable, "-c", code, str(params), *options]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)


def same_end(one, other):
    """Whether two runs ended with the same parameters, losses and metrics, to the last digit."""
    found = [
        {key: value for key, value in read_summary(folder).items() if key not in kill_study.TIMES} for folder in (one, other)
    ]
    return found[0] == found[1] and kill_study.records(one.parent)[f"{one.name}/metrics"] == kill_study.records(
        other.parent
    )[f"{other.name}/metrics"]


# ------------------------------------------------------------------------------------------------------------ disks


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(megabytes): a file system of that size; called again it is resized, with 0 made read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    state = []

    def size(megabytes):
        options = "remount," * bool(state) + (f"size={megabytes}m,rw" if megabytes else "ro")
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        state.append(megabytes)
        return folder

    yield size
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_disk_that_fills_up_while_saving_loses_nothing(run_of, small_disk):
    params, undisturbed = run_of
    one = sum(file.stat().st_size for file in (undisturbed / "checkpoints").rglob("*") if file.is_file()) / 2**20 / 2
    disk = small_disk(int(1.6 * one) + 1)  # room for one checkpoint, not for two
    done = train(params, disk / "run")
    assert done.returncode not in (0, 2) and "No space left" in done.stderr
    assert not (disk / "run" / "summary.json").exists()
    small_disk(int(8 * one) + 64)
    done = train(params, disk / "run")
    assert done.returncode == 0, done.stderr
    assert same_end(undisturbed, disk / "run")


def test_a_full_disk_leaves_records_whole(small_disk, tmp_path):
    disk = small_disk(1)
    write_json(disk / "summary.json", {"value": 1})
    with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(b"x" * 4096)
    with pytest.raises(OSError, match="No space left"):
        write_json(disk / "summary.json", {"value": list(range(10_000))})
    assert json.loads((disk / "summary.json").read_text()) == {"value": 1}
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "summary.json"]
    notebook = PROJECT / "notebooks" / "08_explore.ipynb"
    with pytest.raises((CellFailed, OSError)):
        execute(notebook, disk / "out.ipynb", {})
    assert not (disk / "out.ipynb").exists()


def test_a_folder_that_can_not_be_written_is_one_clear_line(run_of, small_disk):
    params, _ = run_of
    disk = small_disk(1)
    small_disk(0)
    done = train(params, disk / "run")
    assert done.returncode == 2 and re.search(r"error: .*Read-only file system: '.*run'", done.stderr)
    assert main(["study", str(PROJECT / "params" / "smoke" / "study.yaml"), "--out", str(disk / "study")]) == 2


# ------------------------------------------------------------------------------------------- clocks, memory, numbers


def test_a_clock_that_steps_back_changes_no_number(run_of, tmp_path):
    params, undisturbed = run_of
    steps_back = "import time\nreal, begun = time.time, time.monotonic()\n\
time.time = lambda: real() - 3600 * int(time.monotonic() - begun)"
    done = train(params, tmp_path / "run", before=steps_back)
    assert done.returncode == 0, done.stderr
    assert same_end(undisturbed, tmp_path / "run")


def test_memory_that_runs_out_is_told_and_the_run_resumes(run_of, tmp_path):
    params, undisturbed = run_of
    little = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1500 * 2**20, 1500 * 2**20))"
    done = train(params, tmp_path / "run", before=little)
    assert done.returncode != 0 and not (tmp_path / "run" / "summary.json").exists()
    assert train(params, tmp_path / "run").returncode == 0 and same_end(undisturbed, tmp_path / "run")


def test_a_number_that_is_none_stops_the_run_and_keeps_its_checkpoints(run_of, tmp_path):
    """Parameters turn into NaN in the middle, as a broken device would make them."""
    params, undisturbed = run_of
    poison = """
import jax, numpy as np
from nfnet_lib import program
original, calls = program.Programs.place_batch, []
def place(self, examples):
    calls.append(1)
    placed = original(self, examples)
    if len(calls) == 20:
        placed = placed._replace(weights=placed.weights * np.float32("nan"))
    return placed
program.Programs.place_batch = place
"""
    done = train(params, tmp_path / "run", before=poison)
    assert done.returncode == 3 and "the loss is nan at step 20" in done.stderr
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["diverged"]
    assert train(params, tmp_path / "run").returncode == 0 and same_end(undisturbed, tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ hostile input


def test_yaml_that_runs_code_does_not(tmp_path, capsys):
    evil = f"study: !!python/object/apply:os.system ['touch {tmp_path / 'pwned'}']\n"
    (tmp_path / "evil.yaml").write_text(evil)
    assert main(["study", str(tmp_path / "evil.yaml")]) == 2
    assert main(["params", str(tmp_path / "evil.yaml"), "F0"]) == 2
    assert main(["study", str(PROJECT / "params/smoke/study.yaml"), "--dry-run", "-p", f"name={evil[7:]}"]) == 2
    assert train(tmp_path / "evil.yaml", tmp_path / "run").returncode == 2
    assert not (tmp_path / "pwned").exists() and "Traceback" not in capsys.readouterr().err


def test_parameters_with_code_in_them_stay_text(tmp_path):
    from test_papermill import notebook

    code = f"'); import os; os.system('touch {tmp_path / 'pwned'}') #\n\"\"\"\n'''"
    path = notebook(tmp_path / "in.ipynb", "print(repr(x))", parameters="x: str = ''  # a text")
    execute(path, tmp_path / "out.ipynb", {"x": code})
    assert not (tmp_path / "pwned").exists()
    outputs = [o for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"] for o in c.get("outputs", [])]
    assert "".join(outputs[0]["text"]).strip() == repr(code)


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "", "x" * 65, ".hidden", "\uff26\uff10", "a\x00b"])
def test_names_that_lead_elsewhere_are_refused(name, tmp_path):
    content = {"name": name, "pretrain": {}, "variants": ["F0-mini"], "epoch_budgets": [1], "lr_grid": [0.1]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"study": content}))
    with pytest.raises(ConfigError, match="name: "):
        StudyConfig.from_file(tmp_path / "study.yaml")
    if "/" in name:
        with pytest.raises(ConfigError, match="pretrained_run: "):
            FinetuneConfig.from_params({"pretrained_run": name})


def test_long_names_and_look_alikes():
    long = PretrainConfig.from_params({"dataset": "folder:/" + "é" * 5000})
    assert len(os.fsencode(long.run_id)) < 200 and len(os.fsencode(long.cell_id)) < 200
    other = PretrainConfig.from_params({"dataset": "folder:/" + "é" * 5001})
    assert long.run_id != other.run_id
    with pytest.raises(ConfigError, match="F0\u2010mini"):  # not the hyphen of the keyboard
        PretrainConfig.from_params({"variant": "F0\u2010mini"})
    with pytest.raises(ConfigError, match="peak_lr"):
        PretrainConfig.from_params({"peak_lr": "\u0660\u066b\u0661"})


def test_pickles_in_weight_files_run_no_code(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    from nfnet_lib.pretrained import load_deepmind

    for content in (Evil(), {"module": {"w": Evil()}}, {"module": {"w": np.array([Evil()], dtype=object)}}):
        (tmp_path / "weights.npz").write_bytes(pickle.dumps(content))
        with pytest.raises(Exception, match=r"(?i)system|pickle|not allowed|refus|unexpected"):
            load_deepmind(tmp_path / "weights.npz")
    assert not (tmp_path / "pwned").exists()


def test_archives_with_ways_out_write_nothing(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "val"):
        with tarfile.open(data / f"{name}.tar", "w") as archive:
            for member in ("../../out.jpg", "../../out.cls", "/abs.jpg", "/abs.cls"):
                (tmp_path / "file").write_text("0")
                archive.add(tmp_path / "file", member)
    config = {**PARAMS, "dataset": f"webdataset:{data}", "examples_per_epoch": 16}
    write_json(tmp_path / "params.json", config)
    before = sorted(path for path in tmp_path.parent.rglob("out.*"))
    done = train(tmp_path / "params.json", tmp_path / "run")
    assert done.returncode in (1, 2) and "error: " in done.stderr
    assert sorted(path for path in tmp_path.parent.rglob("out.*")) == before and not Path("/abs.jpg").exists()


def test_zip_bombs_are_not_unpacked(tmp_path):
    import zipfile

    from nfnet_lib.weights import load_params

    folder = tmp_path / "run"
    folder.mkdir()
    with zipfile.ZipFile(folder / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,), }"
        archive.writestr("stem.npy", header.ljust(127) + b"\n" + b"\0" * 50_000_000)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(Exception):  # noqa: B017  any error but running out of memory
        load_params(folder)
    assert psutil.Process().memory_info().rss < 6 * 2**30 and resource.getrlimit(resource.RLIMIT_AS) == limit


def test_markup_in_errors_and_captions_is_text_in_the_report(planted_study):
    site = build_report(planted_study).parent
    pages = {path: path.read_text() for path in site.rglob("*.html") if "_static" not in path.parts}
    assert pages and all("<script>alert(1)" not in page for page in pages.values())
    assert all('http-equiv="Content-Security-Policy" content="default-src \'none\'' in page for page in pages.values())


# --------------------------------------------------------------------------------------------------------- set-up


def test_servers_listen_here_only_and_want_a_token():
    text = (PROJECT / "Makefile").read_text()
    lab, app = (next(line for line in text.splitlines() if f"$(BIN)/{name}" in line) for name in ("jupyter-lab", "voila"))
    assert "--ip=127.0.0.1" in lab and "token" not in lab, "JupyterLab makes a token of its own"
    assert "--Voila.ip=127.0.0.1" in app and "--token" in app
    assert not re.search(r"token=''|token=\"\"|ip=0\.0\.0\.0|ip=\*", text)


def test_no_secret_of_the_environment_gets_into_records_or_reports(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", "s3cret-value-of-the-environment")
    (tmp_path / "study.yaml").write_text(SMALLEST.replace("epoch_budgets: [1, 2]", "epoch_budgets: [1]"))
    assert main(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]) == 0
    checked = 0
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and ".cache" not in path.parts:
            checked += 1
            assert b"s3cret-value" not in path.read_bytes(), path
    assert checked > 20


def test_two_studies_in_one_folder_never_mix(tmp_path, capsys):
    from nfnet_lib import locks

    (tmp_path / "study.yaml").write_text(SMALLEST)
    with locks.exclusive(tmp_path / "out", "study"):
        assert main(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert f"another process is running out (process {os.getpid()} on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "study.json").exists()


# -------------------------------------------------------------------------------------------------------------- load


def note(folder, number, cores=()):
    """A cell that does almost nothing: a line of its own in a file of its own."""
    with (folder / f"{number}.txt").open("a") as file:
        file.write(f"{len(cores)}\n")
    return number


def test_two_thousand_cells_leave_memory_and_handles_flat(tmp_path):
    local, process = engine.LocalEngine(0, 1, 0.1), psutil.Process()
    seen = []
    try:
        waiting = []
        for number in range(2000):
            waiting.append(local.submit(note, tmp_path, number))
            if len(waiting) == 100:
                assert [future.result() for future in waiting] == list(range(number - 99, number + 1))
                waiting.clear()
                seen.append((process.num_fds(), process.memory_info().rss))
    finally:
        local.close()
    assert len(list(tmp_path.iterdir())) == 2000
    assert all(path.read_text() == "1\n" for path in tmp_path.iterdir()), "each once, on a core of its own"
    assert seen[-1][0] <= seen[0][0] + 2 and seen[-1][1] <= seen[0][1] + 20 * 2**20
    shutil.rmtree(tmp_path)
