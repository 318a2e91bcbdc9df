"""Both engines keep one promise: what is killed is done again, what fails is told and resumed, nothing is left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_study
import psutil
import pytest

from nfnet_lib import engine
from nfnet_lib.cell import CellStopped
from nfnet_lib.cli import main
from nfnet_lib.config import ConfigError, StudyConfig
from nfnet_lib.study_grid import pretrain_cells, search_of


def start(path, out, *options):
    """`nfnet study` in a process of its own, with the compiled programs of the undisturbed study."""
    command = [sys.executable, "-m", "nfnet_lib.cli", "study", str(path), "--out", str(out), *options]
    log = out.with_suffix(".log").open("w")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=Path(__file__).parent.parent)


def descendants(process, words):
    """Descendants whose command has one of `words`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any(word in " ".join(child.cmdline()) for word in words):
                found.append(child)
        except psutil.Error:  # it has just ended
            continue
    return found


def marked(process):
    """Whether the reaper will know it, unless it is the reaper or has just ended."""
    try:
        return engine._CLUSTER in " ".join(process.cmdline()) or engine._CLUSTER in process.environ()
    except psutil.NoSuchProcess:
        return True


def until(condition, seconds=120, process=None):
    """What `condition` gives as soon as it gives anything, while `process` lives."""
    for _ in range(int(20 * seconds)):
        if found := condition():
            return found
        assert process is None or process.poll() is None, "it ended before"
        time.sleep(0.05)
    raise AssertionError(f"nothing within {seconds} s")


def blocked_run(path, out):
    """Where the first run of the longer cell will want its folder."""
    study = StudyConfig.from_file(path)
    config, _ = search_of(study, pretrain_cells(study)[0], out)
    return out / config.run_id


@pytest.mark.parametrize("name", engine.ENGINES)
def test_killed_failed_interrupted_and_resumed(name, smallest_study, tmp_path):
    path, reference = smallest_study
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(reference / ".cache", out / ".cache")
    blocked = blocked_run(path, out)
    blocked.write_text("a file where a folder must be")

    def at_work(cell, process):
        """Once a run of the cell has its lock: everything that the study has started."""
        until(lambda: any(file.read_text() for file in out.glob(f"pretrain_*{cell}_*/.lock")), process=process)
        return psutil.Process(process.pid).children(recursive=True)

    def left(processes):
        """The commands of those that are there after 20 s; of a zombie nothing is left but its number, until init comes by."""
        alive = psutil.wait_procs(processes, timeout=20)[1]
        return [(p.pid, p.status(), p.cmdline()) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    # The cells' processes are killed, and with Ray a worker: done again. What fails is told, the rest goes on.
    process = start(path, out, "--engine", name)
    for word in ["nfnet_lib.notebook_process"] if name == "local" else ["nfnet_lib.notebook_process", "ray::on_own_cores"]:
        at_work("ep1", process)
        for victim in until(lambda word=word: descendants(process, [word]), process=process):
            victim.kill()
    everyone = psutil.Process(process.pid).children(recursive=True)
    assert process.wait() == 1
    log = out.with_suffix(".log").read_text()
    assert "Ti-4-mini_ep2: FAILED: " in log and "Ti-4-mini_ep1: held-out loss" in log
    (failure,) = out.glob("*_tuned_*/failure.json")
    assert "FileExistsError" in failure.read_text() and "ep2" in failure.parent.name
    assert (failure.parent / "run.partial.ipynb").exists() and not (failure.parent / "run.ipynb").exists()
    assert not left(everyone)
    blocked.unlink()

    # Ctrl-C: the run saves where it is.
    process = start(path, out, "--engine", name)
    everyone = at_work("ep2", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 130 and not left(everyone) and not (out / "STOP").exists()
    assert list(out.glob("*ep2_lr*/checkpoints/[0-9]*")), "a run that was under way saved where it was"
    assert not list(out.glob("*ep2_lr*/summary.json")), "and did not go on to its end"
    assert "(skipped: already done)" in out.with_suffix(".log").read_text()

    # The driver is killed. Ray leaves whom the reaper does not know by the mark in their environment.
    process = start(path, out, "--engine", name)
    everyone = at_work("ep2", process)
    assert name == "local" or all(marked(p) for p in everyone)
    process.kill()
    process.wait()
    assert not left(everyone)

    assert start(path, out).wait() == 0
    assert not kill_study.differences(kill_study.records(reference), kill_study.records(out))
    assert not list(out.glob("*/failure.json"))


def test_a_cell_that_is_stopped_leaves_others_in_the_folder_alone(smallest_study, tmp_path, capsys):
    path, reference = smallest_study
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(reference / ".cache", out / ".cache")
    cells = {cell: start(path, out, "--only", f"Ti-4-mini_{cell}", "--workers", "1") for cell in ("ep2", "ep1")}
    for cell, process in cells.items():
        until(lambda: any(file.read_text() for file in out.glob(f"pretrain_*_{cell}_*/.lock")), process=process)  # noqa: B023
    cells["ep2"].send_signal(signal.SIGTERM)
    assert cells["ep2"].wait(90) == 130 and cells["ep1"].wait() == 0
    assert list(out.glob("*_ep1_tuned_*/run.ipynb"))
    assert not list(out.glob("*ep2_lr*/summary.json")) and list(out.glob("*ep2_lr*/checkpoints/[0-9]*"))
    assert not list(out.rglob("STOP"))
    (out / "STOP").touch()  # by hand, for all cells: those that start must not take it back
    assert main(["study", str(path), "--out", str(out), "--only", "Ti-4-mini_ep2"]) == 2
    assert "out/STOP asks what runs there to stop; remove it" in capsys.readouterr().err and (out / "STOP").exists()


def test_cores_belong_to_one_call_at_a_time():
    available = len(os.sched_getaffinity(0))
    with engine.own_cores(1) as first, engine.own_cores(0) as none:
        assert len(first) == 1 and none == []
        if available > 1:
            with engine.own_cores(1) as second:
                assert set(first).isdisjoint(second)
    with engine.own_cores(available + 5) as everything:
        assert sorted(everything) == sorted(os.sched_getaffinity(0))


def test_a_study_that_waits_for_cores_can_be_stopped(monkeypatch, capsys):
    """And says that it waits."""
    monkeypatch.setattr(engine, "TOLD_SECONDS", 0.1)
    with engine.own_cores(len(os.sched_getaffinity(0))):
        waiting = engine.make_engine("local", workers=2, cores_per_run=1, memory_per_run_gb=0.1)
        futures = [waiting.submit(time.sleep, 0) for _ in range(3)]
        time.sleep(0.5)
        began = time.monotonic()
        waiting.close(grace=60)
        assert time.monotonic() - began < 10
    assert all(future.cancelled() or isinstance(future.exception(), CellStopped) for future in futures)
    assert capsys.readouterr().err.count("note: waiting for processor cores") == 1


def test_engines_that_are_not():
    room = {"workers": 1, "cores_per_run": 1, "memory_per_run_gb": 1}
    with pytest.raises(ConfigError, match="engine: 'slurm' is not one of local, ray"):
        engine.make_engine("slurm", **room)
    with pytest.raises(ConfigError, match="address: 'x:1' with engine='local'"):
        engine.make_engine("local", address="x:1", **room)


def test_only_one_cell_and_slices_need_ray(smallest_study, tmp_path, capsys):
    path, _ = smallest_study
    assert main(["study", str(path), "--out", str(tmp_path / "a"), "--only", "Ti-4-mini_ep3"]) == 2
    assert "known: Ti-4-mini_ep2, Ti-4-mini_ep1" in capsys.readouterr().err
    assert main(["study", str(path), "--out", str(tmp_path / "a"), "-p", "tpu_slice=v4:2x2x2"]) == 2
    assert "set apart by engine='ray'" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
