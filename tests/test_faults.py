"""Faults made on purpose: disks that fill up, clocks that step back, hostile files and names, a long queue.

What kills processes and damages checkpoints is tested beside what it is about; tests/faults.py lists all of it.
"""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import audit
import cv2
import faults
import kill_study
import numpy as np
import psutil
import pytest
import yaml
from test_distributed import SMALL
from test_distributed import start as start_all
from test_engines import until
from test_papermill import notebook
from test_status import events

from nfnet_lib import PROJECT, engine, graph
from nfnet_lib.cell import NOTEBOOKS, CellFailed, execute
from nfnet_lib.cli import main
from nfnet_lib.config import ConfigError, FinetuneConfig, PretrainConfig, StudyConfig
from nfnet_lib.data import load_sources
from nfnet_lib.files import write_json
from nfnet_lib.records import collect, read_metrics, read_summary
from nfnet_lib.report import build_report
from nfnet_lib.sources import cached

SMALLEST = (Path(__file__).parent / "smallest.yaml").read_text()
LONG = os.environ.get("FAULTS") == "long"  # as `make faults` sets it; otherwise the same with fewer kills and runs
PARAMS = {
    "variant": "Ti/4-mini", "optimizer": "adamw", "peak_lr": 0.002, "num_classes": 4, "image_size": 16, "resolution": 16,
    "eval_resolution": 16, "examples_per_epoch": 512, "heldout_examples": 16, "batch_size": 16, "checkpoints": 4, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The parameters' file, and the folder of its undisturbed run."""
    folder = tmp_path_factory.mktemp("faults")
    write_json(folder / "params.json", PARAMS)
    assert train(folder / "params.json", folder / "run").returncode == 0
    return folder / "params.json", folder / "run"


def train(params, out, before="", cache=None, seconds=300):
    """One run in a process of its own, with the programs that an earlier one compiled; `before`: Python to run first."""
    code = f"{before}\nimport sys\nfrom nfnet_lib.train import main\nsys.exit(main(sys.argv[1:]))"
    options = ["--out", str(out), "--cache-dir", str(cache or params.parent / ".cache")]
    command = [sys.executable, "-c", code, str(params), *options]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=seconds, check=False)


def interrupted(params, out, before="", seconds=120):
    """A run in a process of its own, once it has a checkpoint."""
    code = f"{before}\nimport sys\nfrom nfnet_lib.train import main\nsys.exit(main(sys.argv[1:]))"
    options = ["--out", str(out), "--cache-dir", str(params.parent / ".cache")]
    process = subprocess.Popen([sys.executable, "-c", code, str(params), *options], cwd=PROJECT, stderr=subprocess.PIPE)
    until(lambda: any(p.name.isdigit() for p in (out / "checkpoints").glob("*")), seconds, process)
    return process


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
    """small_disk(megabytes, files): a file system of that size, for so many files (0: any number); called again it is resized,
    with 0 megabytes made read-only. Needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    state = []

    def size(megabytes, files=0):
        options = "remount," * bool(state) + (f"size={int(megabytes * 1024)}k,nr_inodes={files},rw" if megabytes else "ro")
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        state.append(megabytes)
        return folder

    yield size
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_disk_that_fills_up_while_saving_loses_nothing(run_of, small_disk):
    params, undisturbed = run_of
    one = sum(file.stat().st_size for file in (undisturbed / "checkpoints").rglob("*") if file.is_file()) / 2**20 / 2
    disk = small_disk(1.6 * one + 0.2)  # room for one checkpoint, not for two
    done = train(params, disk / "run")
    assert done.returncode not in (0, 2) and "No space left" in done.stderr
    assert not (disk / "run" / "summary.json").exists()
    small_disk(int(8 * one) + 64)
    done = train(params, disk / "run")
    assert done.returncode == 0, done.stderr
    assert same_end(undisturbed, disk / "run")


@pytest.mark.parametrize("files", [7, 9])
def test_a_disk_without_room_for_a_checkpoint_s_folders_ends_the_run(files, run_of, small_disk):
    """At once: threads that wait for a folder that was not made would hold its end up for five minutes."""
    params, undisturbed = run_of
    disk = small_disk(64, files)
    done = train(params, disk / "run", seconds=60)
    assert done.returncode == 1 and "error: [Errno 28] No space left on device" in done.stderr, done.stderr
    small_disk(64)
    done = train(params, disk / "run")
    assert done.returncode == 0 and same_end(undisturbed, disk / "run"), done.stderr


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


def test_a_disk_that_is_full_for_what_tensorboard_reads_ends_the_run(run_of, small_disk):
    """Whoever waited for a thread that writes it, and has ended, would wait without end."""
    params, undisturbed = run_of
    disk = small_disk(1)
    fills_up = f"""
from nfnet_lib import tensorboard
original = tensorboard.EventWriter.__init__
def begun(self, *arguments, **options):
    original(self, *arguments, **options)
    with open({str(disk / "filler")!r}, "wb") as filler:
        filler.write(bytes(2**20 - 2**16))
tensorboard.EventWriter.__init__ = begun
original_write = tensorboard.EventWriter.write
tensorboard.EventWriter.write = lambda self, step, **metrics: [original_write(self, step, **metrics) for _ in range(999)]
"""
    done = train(params, disk / "run", before=fills_up, seconds=60)
    assert done.returncode == 1 and "error: [Errno 28] No space left on device" in done.stderr, done.stderr
    small_disk(64)
    done = train(params, disk / "run")
    assert done.returncode == 0 and same_end(undisturbed, disk / "run"), done.stderr


def test_a_folder_that_can_not_be_written_is_one_clear_line(run_of, small_disk):
    params, _ = run_of
    disk = small_disk(1)
    small_disk(0)
    done = train(params, disk / "run")
    assert done.returncode == 2 and re.search(r"error: .*Read-only file system: '.*run'", done.stderr)
    assert main(["study", str(PROJECT / "params" / "smoke" / "study.yaml"), "--out", str(disk / "study")]) == 2


def test_a_full_disk_while_a_notebook_is_written(small_disk, tmp_path):
    """Room for the log and for the empty notebook, none for the executed one."""
    disk = small_disk(0.8)
    path = notebook(tmp_path / "in.ipynb", "import os\nfor _ in range(6000): print(os.urandom(50).hex())")
    with pytest.raises((CellFailed, OSError)):
        execute(path, disk / "out.ipynb", {})
    assert os.statvfs(disk).f_bavail == 0 and not (disk / "out.ipynb").exists()
    small_disk(16)
    execute(path, disk / "out.ipynb", {})
    assert len((disk / "out.ipynb").read_text()) > 150_000 and not (disk / "out.partial.ipynb").exists()


def test_a_full_disk_for_caches_costs_time_only(run_of, small_disk, tmp_path):
    params, undisturbed = run_of
    disk = small_disk(1)
    with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
        while True:
            filler.write(b"x" * 4096)
    config = PretrainConfig(**PARAMS)
    train_source, _ = load_sources(config)
    kept = cached(train_source, disk / "images")
    np.testing.assert_array_equal(kept.batch(np.arange(9))[0], train_source.batch(np.arange(9))[0])
    assert not list(disk.rglob("*.npz")) and not list(disk.rglob("*.partial"))
    done = train(params, tmp_path / "run", cache=disk)
    assert done.returncode == 0, done.stderr
    assert "note: rendered images are not kept for other runs: " in done.stderr and same_end(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("free", [0, 8192])
def test_a_study_on_a_full_disk_is_no_bad_input(free, small_disk):
    disk = small_disk(1)
    with (disk / "filler").open("wb") as filler:
        filler.write(bytes(2**20 - free))
    command = [sys.executable, "-m", "nfnet_lib.cli", "study", str(Path(__file__).parent / "smallest.yaml")]
    done = subprocess.run([*command, "--out", str(disk / "out")], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "error: [Errno 28] No space left" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and (disk / "filler").stat().st_size == 2**20 - free


def test_a_full_disk_while_lists_of_data_are_written(small_disk, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("train", "heldout"):
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
            cv2.imwrite(str(tmp_path / name / f"{i}.png"), cv2.resize(pixels, (80, 80)))
    disk = small_disk(1)
    with (disk / "filler").open("wb") as filler:
        filler.write(rng.bytes(2**20 - 8192))
    sets = [str(tmp_path / "train"), str(tmp_path / "heldout")]
    assert main(["dedup", *sets, "--out", str(disk / "out")]) == 1
    assert "No space left" in capsys.readouterr().err and not list((disk / "out").glob("*.p*ng"))
    small_disk(16)
    assert main(["dedup", *sets, "--out", str(disk / "other")]) == 0
    assert len(json.loads((disk / "other" / "exclude.json").read_text())["ids"]) == 12
    assert main(["data", "show", "digits", "--out", str(disk / "shown.png")]) == 0
    small_disk(0)
    assert main(["data", "show", "digits", "--out", str(disk / "other.png")]) == 2
    assert "other.png can't be written" in capsys.readouterr().err


def test_a_report_that_can_not_be_finished_leaves_the_old_one(planted_study, small_disk, tmp_path):
    """On a disk that is full, then killed in the middle; the next build leaves nothing behind."""
    disk = small_disk(200)
    study = Path(shutil.copytree(planted_study, disk / "study"))
    before = build_report(study).stat().st_mtime_ns
    used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*")) // 2**20
    small_disk(used + 3)
    with pytest.raises((OSError, RuntimeError), match=r"No space left|report of study"):
        build_report(study)
    assert (study / "report" / "index.html").stat().st_mtime_ns == before
    small_disk(200)
    command = [sys.executable, "-m", "nfnet_lib.cli", "report", str(study)]
    for wanted in ("source/index.md", "site/index.html"):
        process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE)
        until(lambda wanted=wanted: list(study.glob(f".report/*/{wanted}")), 60, process)
        everyone = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        psutil.wait_procs(everyone, timeout=60)  # Sphinx ends by itself
        assert (study / "report" / "index.html").stat().st_mtime_ns == before and list(study.glob(".report/*/"))
    assert build_report(study).stat().st_mtime_ns > before
    assert [path.name for path in (study / ".report").iterdir()] == [".lock"]


def test_a_slow_file_system_changes_no_number(run_of, tmp_path):
    params, undisturbed = run_of
    slow = """
import builtins, os, time
def late(function, seconds):
    def call(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)
    return call
from nfnet_lib import train
os.fsync, os.replace, os.rename = (late(function, 0.3) for function in (os.fsync, os.replace, os.rename))
builtins.open = late(open, 0.01)
"""
    done = train(params, tmp_path / "run", before=slow)
    assert done.returncode == 0, done.stderr
    assert same_end(undisturbed, tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------- signals


SLOW_SAVE = """
import time
from nfnet_lib import checkpoint
original = checkpoint.leaf_digests
def late(tree):
    time.sleep(0.5)
    return original(tree)
checkpoint.leaf_digests = late
"""


def test_a_run_killed_between_two_checkpoints_resumes(run_of, tmp_path):
    params, undisturbed = run_of
    process = interrupted(params, tmp_path / "run", before=SLOW_SAVE)
    process.kill()
    process.communicate()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert train(params, tmp_path / "run").returncode == 0 and same_end(undisturbed, tmp_path / "run")
    written = {step for step, tag, _ in events(tmp_path / "run") if tag == "loss"}
    assert written == set(read_metrics(tmp_path / "run")["step"]), "TensorBoard has them all"


@pytest.mark.parametrize(
    "second,codes", [(signal.SIGTERM, {75}), (signal.SIGINT, {1, 75, 130, -2}), (signal.SIGKILL, {-9, 75})]
)
def test_a_second_signal_while_the_last_checkpoint_is_saved(second, codes, run_of, tmp_path):
    params, undisturbed = run_of
    process = interrupted(params, tmp_path / "run", before=SLOW_SAVE)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.25)
    process.send_signal(second)
    process.communicate()
    assert process.returncode in codes and not (tmp_path / "run" / "summary.json").exists()
    assert train(params, tmp_path / "run").returncode == 0 and same_end(undisturbed, tmp_path / "run")


def test_an_interrupted_notebook_goes_on_in_the_next_cell(run_of, tmp_path):
    params, undisturbed = run_of
    start = f"""
import os, signal, threading, time
from pathlib import Path
from nfnet_lib.config import PretrainConfig
from nfnet_lib.train import run
config, folder = PretrainConfig(**{PARAMS}), Path({str(tmp_path)!r}) / "run"
def interrupt():
    while not any(path.name.isdigit() for path in (folder / "checkpoints").glob("*")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
{SLOW_SAVE}
threading.Thread(target=interrupt).start()
try:
    run(config, folder, cache_dir={str(params.parent / ".cache")!r}, progress=False)
except KeyboardInterrupt:
    print("interrupted", (folder / "summary.json").exists())
"""
    again = "run(config, folder, progress=False)['steps']"
    execute(notebook(tmp_path / "in.ipynb", start, again), tmp_path / "out.ipynb", {})
    text = (tmp_path / "out.ipynb").read_text()
    assert "interrupted False" in text and same_end(undisturbed, tmp_path / "run")


@pytest.mark.long
def test_of_two_processes_one_dies_or_hangs_and_the_other_ends(tmp_path):
    """JAX notices it by heartbeats: within 100 seconds, here within 20. Two runs at once, to wait once."""
    impatient = "import functools, jax\n\
jax.distributed.initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=20)"
    settings = {"processes": 2, "before": impatient}
    runs = {number: tmp_path / number.name for number in (signal.SIGKILL, signal.SIGSTOP)}
    pairs = {number: start_all(folder, SMALL | {"epoch_budget": 2500}, **settings) for number, folder in runs.items()}
    try:
        for number, folder in runs.items():
            until(lambda folder=folder: (folder / "metrics.jsonl").exists(), 120, pairs[number][0])
            pairs[number][1].send_signal(number)
        assert all(first.wait(timeout=240) != 0 for first, _ in pairs.values())
    finally:
        for process in (process for pair in pairs.values() for process in pair):
            process.kill()
            process.wait()
    assert not any((folder / "summary.json").exists() for folder in runs.values())


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


def test_a_device_without_memory_is_told_with_advice(tmp_path):
    config = {**PARAMS, "resolution": 96, "batch_size": 1024, "examples_per_epoch": 1024}
    write_json(tmp_path / "params.json", config | {"variant": "Ti/4-mini", "optimizer": "adamw"})
    little = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))"
    done = train(tmp_path / "params.json", tmp_path / "run", before=little)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and re.search(r"Out of memory .* A smaller batch_size or resolution needs less", line)
    assert not list((tmp_path / "run" / "checkpoints").iterdir()) and not (tmp_path / "run" / "summary.json").exists()


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
    """Four gigabytes of zeros in four megabytes, as a run's weights and as a released file."""
    import zipfile

    import synthetic

    from nfnet_lib.big_vision import load_big_vision
    from nfnet_lib.pretrained import WeightsError
    from nfnet_lib.weights import load_params

    folder = tmp_path / "run"
    synthetic.write_runs(tmp_path, [synthetic.summary("run")])
    with zipfile.ZipFile(folder / "params.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,), }"
        with archive.open("stem.npy", "w", force_zip64=True) as member:
            member.write(header.ljust(127) + b"\n")
            for _ in range(400):
                member.write(bytes(10_000_000))
    before = psutil.Process().memory_info().rss
    with pytest.raises(ConfigError, match=r"params\.npz is damaged: [\d,]+ bytes that unpack to 4,000,000,128"):
        load_params(folder)
    with pytest.raises(WeightsError, match=r"bytes that unpack to 4,000,000,128"):
        load_big_vision(folder / "params.npz")
    assert psutil.Process().memory_info().rss < before + 2**28


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


MARKUP = ("<svg onload=alert(2)>", "<img src=x onerror=alert(3)>")


@pytest.fixture(scope="module")
def contested(tmp_path_factory):
    """(folder, ends of two studies started on it at once), over a data set whose classes and folder are called like markup."""
    folder = tmp_path_factory.mktemp("contested")
    data = folder / "<b onclick=alert(4)>"
    for i in range(60):
        (data / MARKUP[i % 2]).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(data / MARKUP[i % 2] / f"{i}.png"), np.random.default_rng(i).integers(0, 255, (20, 20, 3), np.uint8))
    study = yaml.safe_load(SMALLEST)
    study["study"]["pretrain"] |= {"dataset": f"folder:{data}", "examples_per_epoch": 32, "heldout_examples": 2}
    study["study"] |= {"epoch_budgets": [1], "lr_grid": [0.05]}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "nfnet_lib.cli", "study", str(folder / "study.yaml"), "--out", str(folder / "out")]
    environment = os.environ | {"PLANTED_TOKEN": "s3cret-value-of-the-environment"}
    both = [subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    until(lambda: any(process.poll() is not None for process in both), 120)  # the one that is refused has read the file
    study["study"]["pretrain"]["peak_lr"] = 0.5  # while the other runs
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    looked_at = {"dataset": f"folder:{data}", "examples": 54, "heldout_examples": 6}
    execute(NOTEBOOKS / "00_data.ipynb", folder / "out" / "analysis" / "00_data.ipynb", looked_at)
    names = f"from nfnet_lib import report\nimport pandas as pd\nnames = {list(MARKUP)}\nreport.sentences(names)"
    shown = notebook(folder / "names.ipynb", names, "pd.DataFrame({'class': names})")
    execute(shown, folder / "out" / "analysis" / "names.ipynb", {})
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in both]
    build_report(folder / "out")
    return folder / "out", ended


def test_of_two_studies_started_at_once_on_a_folder_one_runs(contested):
    out, ended = contested
    assert sorted(code for _, code in ended) == [0, 2], ended
    assert any(re.search(r"error: study: another process is running out \(process \d+ on ", text) for text, _ in ended)
    assert len(collect(out)) == 1 and not list(out.glob("*/failure.json"))


def test_a_study_file_that_changes_while_it_runs_changes_nothing(contested, capsys):
    out, _ = contested
    assert "peak_lr" not in json.loads((out / "study.json").read_text())["pretrain"]
    assert main(["study", str(out.parent / "study.yaml"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: pretrain.peak_lr: ")


def test_markup_in_names_of_classes_and_folders_is_text_in_the_report(contested):
    out, _ = contested
    pages = {path: path.read_text() for path in (out / "report").rglob("*.html") if "_static" not in path.parts}
    shown = "".join(pages.values())
    assert len(pages) >= 4 and all(f"alert({number})" in shown for number in (2, 3, 4)), "the names are there"
    for path, text in pages.items():
        assert not re.search(r"<(svg|img|b)\b[^>]*alert", text), path


def test_no_secret_of_the_environment_gets_into_records_or_reports(contested):
    checked = 0
    for path in contested[0].rglob("*"):
        if path.is_file() and ".cache" not in path.parts:
            checked += 1
            assert b"s3cret-value" not in path.read_bytes(), path
    assert checked > 20


@pytest.mark.parametrize("text", ["", "[1]", "{", "3", '{"name": "x"}', '{"variants": 3}'])
def test_a_damaged_study_json_is_one_line(text, tmp_path, capsys):
    (tmp_path / "study.yaml").write_text(SMALLEST)
    (tmp_path / "study.json").write_text(text)
    assert main(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "is damaged" in error and error.count("\n") == 1


STUDIES = {  # what is added to a study's file, what is said
    "a notebook from elsewhere": ("  notebooks: [../../etc/passwd]", "notebooks: '../../etc/passwd' is not one of"),
    "a key twice": ("  lr_grid: [0.1]\n  lr_grid: [0.2]", "lr_grid stands twice"),
    "a number as a key": ("  5: 3", "5: unknown key of a study"),
    "no key": ("  null: 3", "None: unknown key of a study"),
    "infinite memory": ("  memory_per_run_gb: .inf", "memory_per_run_gb: inf"),
    "hardly any memory": ("  memory_per_run_gb: 1.0e-320", "memory_per_run_gb: 1e-320"),
    "no time": ("  timeout_minutes: .nan", "timeout_minutes: nan"),
    "a negative seed": ("  seeds: [-1]", "seed: -1"),
    "a seed without end": (f"  seeds: [{'9' * 5000}]", "is not YAML"),
    "a recipe that is a folder": ("  finetune: .", "recipe: "),
    "a recipe that is no mapping": ("  finetune: study.txt", "recipe: "),
}


@pytest.mark.parametrize("name", STUDIES)
def test_hostile_study_files_are_one_line(name, tmp_path, capsys):
    text, words = STUDIES[name]
    study = "\n".join(line for line in SMALLEST.splitlines() if line.split(":")[0] not in text.replace("\n", ":").split(":"))
    (tmp_path / "study.txt").write_text("[1, 2]")
    (tmp_path / "study.yaml").write_text(f"{study}\n{text}\n")
    assert main(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "out").exists()


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


TINY = {
    "variant": "Ti/4-mini", "optimizer": "adamw", "peak_lr": 0.002, "num_classes": 2, "image_size": 8, "resolution": 8,
    "eval_resolution": 8, "examples_per_epoch": 4, "heldout_examples": 2, "batch_size": 4, "checkpoints": 1,
}  # fmt: skip


def tiny_run(folder, seed, cores=()):
    """A real run of one step, in a folder of its own, and a note that it was made."""
    from nfnet_lib.train import run

    config = PretrainConfig(**TINY, seed=seed)
    if not (folder / config.run_id / "summary.json").exists():
        with (folder / "made.txt").open("a") as file:
            file.write(f"{seed}\n")
    return run(config, folder / config.run_id, cache_dir=folder / ".cache", progress=False)


def test_soak_of_tiny_runs_through_the_engine_of_studies(tmp_path):
    """`make faults`: 2,000 runs; otherwise 200."""
    number = 2000 if LONG else 200
    process, seen = psutil.Process(), []

    def told(summary, took):
        return f"{summary['run_id']}"

    def progress():
        seen.append((process.num_fds(), process.num_threads(), process.memory_info().rss))

    steps = [
        graph.Step(str(seed), (), lambda seed=seed: graph.Work(tiny_run, (tmp_path, seed % number), {}), told)
        for seed in range(number)
    ]
    local = engine.LocalEngine(2, 1, 0.1)
    try:
        assert graph.run_graph(steps, local, lambda text: None, progress) == {}
    finally:
        local.close()
    table = collect(tmp_path)
    assert len(table) == number and sorted(table["seed"]) == list(range(number)), "none lost"
    made = sorted(map(int, (tmp_path / "made.txt").read_text().split()))
    assert made == list(range(number)), "none done twice"
    begin, end = seen[len(seen) // 4], seen[-1]
    assert end[0] <= begin[0] + 8 and end[1] <= begin[1] + 4 and end[2] <= begin[2] + 60 * 2**20, (begin, end)
    for folder in tmp_path.glob("*_s*"):  # what the process compiles later has its cache in this folder, too
        shutil.rmtree(folder)


@pytest.mark.long
def test_a_study_killed_fifty_times_ends_with_the_records_of_an_undisturbed_one(tmp_path):
    """At random moments: compile, step, evaluation, checkpoint, record, notebook, report."""
    (tmp_path / "study.yaml").write_text(SMALLEST)
    kill_study.finish(tmp_path / "study.yaml", tmp_path / "undisturbed")
    expected = kill_study.records(tmp_path / "undisturbed")
    for seed, kills in enumerate((17, 17, 16)):  # so many see a study from its first compilation to its report
        out = tmp_path / f"killed{seed}"
        kill_study.kill_at_random(tmp_path / "study.yaml", out, kills=kills, longest=7, seed=seed)
        kill_study.finish(tmp_path / "study.yaml", out)
        assert len(expected) == 8 and not kill_study.differences(expected, kill_study.records(out))
        assert (out / "report" / "index.html").exists()


# -------------------------------------------------------------------------------------------------------- the suite


def test_every_fault_names_tests_that_exist_and_the_page_lists_it():
    known = {
        f"{path.name}::{node.name}"
        for path in faults.TESTS.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert not {test.partition("[")[0] for test in faults.all_tests()} - known
    page = faults.TABLE.read_text()
    listed = page.partition(faults.BEGIN)[2].partition(faults.END)[0]
    assert re.sub(r"\| [^|]*\|$", "|", listed, flags=re.MULTILINE).split() == (
        re.sub(r"\| [^|]*\|$", "|", faults.table({}), flags=re.MULTILINE).split()
    ), "python tests/faults.py --dry-run writes it"
    assert "FAILED" not in listed and sum(map(len, faults.FAULTS.values())) >= 60


@pytest.mark.parametrize(
    "dependencies,code,words",
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "1 pinned versions, no known vulnerability"),
        ([{"name": "a", "skip_reason": "not found"}], 3, "none could be looked up: a: not found"),
        ([{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "x"}], 3, "1 of 2 could not be looked up"),
        ([{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}], 1, "a 1: CVE-1, fixed in 2"),
        ([], 3, "none could be looked up"),
    ],
)
def test_what_an_audit_says(dependencies, code, words, capsys):
    assert audit.verdict(dependencies) == code
    assert words in " ".join(capsys.readouterr())
    assert "tests/audit.py" in (PROJECT / "Makefile").read_text()


@pytest.mark.parametrize("withdrawn,ecosystem,version,code", [
    (False, "PyPI", "", 1), (True, "PyPI", "", 2), (False, "npm", "", 2), (False, "PyPI", "0.0.1", 0),
])  # fmt: skip
def test_an_audit_without_network(withdrawn, ecosystem, version, code, tmp_path, capsys, monkeypatch):
    import zipfile

    pinned = re.search(r"^typing-extensions==(\S+)", audit.CONSTRAINTS.read_text(), re.MULTILINE)[1]
    package = {"name": "Typing_Extensions", "ecosystem": ecosystem}
    affected = {"package": package, "versions": [version or pinned], "ranges": [{"events": [{"fixed": "99"}]}]}
    advisory = {"id": "PYSEC-1", "affected": [affected]} | ({"withdrawn": "2026-01-01"} if withdrawn else {})
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("PYSEC-1.json", json.dumps(advisory))
    monkeypatch.setattr(sys, "argv", ["audit.py", str(tmp_path / "all.zip")])
    assert audit.main() == code
    said = " ".join(capsys.readouterr())
    assert {0: "no known vulnerability", 1: f"{pinned}: PYSEC-1, fixed in 99", 2: "holds no advisory"}[code] in said
