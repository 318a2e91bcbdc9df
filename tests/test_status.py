"""Watching: locks that say who holds them, the table of a study's runs, TensorBoard's files, the panel."""

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading

import pandas as pd
import pytest
import synthetic

from nfnet_lib import PROJECT, background, locks, status
from nfnet_lib.cli import main
from nfnet_lib.config import ConfigError
from nfnet_lib.files import write_json
from nfnet_lib.tensorboard import EventWriter


def holding(folder):
    """A process that holds a folder's lock, once it does."""
    program = f"import time, pathlib\nfrom nfnet_lib.locks import exclusive\n\
with exclusive(pathlib.Path({str(folder)!r}), 'test'):\n    print('held', flush=True)\n    time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    process = holding(tmp_path / "run")
    try:
        found = locks.holder(tmp_path / "run")
        assert found == (socket.gethostname(), process.pid) and found.alive
        with pytest.raises(ConfigError, match=rf"out_dir: another process is running run \(process {process.pid} on "):
            with locks.exclusive(tmp_path / "run", "out_dir"):
                pass
        assert locks.holder(tmp_path / "run").pid == process.pid, "who was refused changed nothing"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not locks.holder(tmp_path / "run").alive
    with locks.exclusive(tmp_path / "run", "out_dir"):
        assert locks.holder(tmp_path / "run").pid == os.getpid()
    assert locks.holder(tmp_path / "run") is None, "given back"
    with locks.exclusive(tmp_path / "s", "a", shared=True), locks.exclusive(tmp_path / "s", "b", shared=True):
        with pytest.raises(ConfigError, match="c: another"), locks.exclusive(tmp_path / "s", "c"):
            pass


def test_a_lock_is_not_held_by_a_zombie_or_by_who_has_its_holder_s_number_now(tmp_path):
    """Whoever watches a run in the background would watch without end."""
    assert locks.held(tmp_path / "run") is None
    process = holding(tmp_path / "run")
    assert locks.held(tmp_path / "run") is True
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert locks.holder(tmp_path / "run").alive and locks.held(tmp_path / "run") is False
    process.wait()
    (tmp_path / "run" / locks.LOCK).write_text(f"{socket.gethostname()} {os.getpid()}\n")
    assert locks.held(tmp_path / "run") is False
    (tmp_path / "run" / locks.LOCK).write_text("elsewhere 1\n")
    assert locks.held(tmp_path / "run") is None


@pytest.mark.parametrize("before", ["", "{host} {dead}\n"], ids=["no name", "the name of one that was killed"])
def test_who_is_refused_a_lock_just_taken_is_told_who_took_it(before, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = tmp_path / locks.LOCK
    path.write_text(before.format(host=socket.gethostname(), dead=dead.pid))
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        names_itself = threading.Timer(0.6, lambda: path.write_text(f"{socket.gethostname()} {os.getpid()}\n"))
        names_itself.start()
        with pytest.raises(ConfigError, match=rf"another process is running .* \(process {os.getpid()} on "):
            with locks.exclusive(tmp_path, "study"):
                pass
        names_itself.join()


@pytest.fixture
def running(tmp_path):
    """A study with a finished run, one at work, and one whose process was killed a moment ago."""
    synthetic.write_runs(tmp_path, [synthetic.summary("done")])
    processes = [holding(tmp_path / name) for name in ("at_work", "killed")]
    for name in ("at_work", "killed"):
        params = {"epoch_budget": 2.0, "examples_per_epoch": 1000, "batch_size": 10}
        write_json(tmp_path / name / "params.json", params)
        line = {"step": 50, "loss": 2.5, "lr": 0.1, "images_per_second": 100.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    processes[1].kill()
    processes[1].wait()
    yield tmp_path
    processes[0].kill()
    processes[0].wait()


def test_state_rate_time_left_and_host(running, capsys):
    table = status.status_table(running).set_index("path")
    assert table["state"].to_dict() == {"done": "done", "at_work": "running", "killed": "unfinished"}
    row = table.loc["at_work"]
    assert (row["step"], row["steps"], row["loss"], row["images_per_second"]) == (50, 200, 2.5, 100)
    assert row["seconds_left"] == 150 * 10 / 100 and row["host"] == socket.gethostname()
    assert main(["status", str(running)]) == 0
    shown = capsys.readouterr().out
    for words in ("50/200", "0:15", socket.gethostname(), "3 runs: "):
        assert words in shown
    assert main(["status", str(running), "--watch", "0"]) == 2
    assert status.duration(3909) == "1:05:09"
    early = status.shown(table.reset_index().assign(step=pd.array([pd.NA] * 3, "Int64")))
    assert early["step"].str.match("-/[0-9]+$|$").all(), "no step is done yet"


def test_watching_goes_on_until_ctrl_c(running):
    command = [sys.executable, "-m", "nfnet_lib.cli", "status", str(running), "--watch", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    seen = 0
    for line in process.stdout:
        seen += "3 runs:" in line
        if seen == 3:
            break
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    assert seen == 3 and process.wait(20) == 0


def test_the_panel_shows_states_and_curves_and_renews(running, monkeypatch):
    import asyncio

    monkeypatch.setenv("JPY_SESSION_NAME", "open.ipynb")

    async def shown():
        widget = background.panel(running, seconds=0.1)
        table, picture = widget.children
        assert "at_work" in table.value and bytes(picture.value).startswith(b"\x89PNG")
        with (running / "at_work" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 60, "loss": 2.25, "lr": 0.1, "images_per_second": 100.0}\n')
        for _ in range(100):
            await asyncio.sleep(0.1)
            if "60/200" in table.value:
                break
        widget.renewing.cancel()
        return table.value

    assert "2.2500" in asyncio.run(shown())
    assert "no_such is not there yet" in background.panel("no_such").children[0].value


def events(folder):
    """(step, tag or session marker, value) of every event, read without a library: length, checksum, protocol buffer."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                found.append((event.step, "start", event.session_log.status))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_gets_the_same_numbers_and_forgets_what_a_resumed_run_repeats(tmp_path):
    with EventWriter(tmp_path) as writer:
        writer.write(1, loss=2.5, lr=None)
        writer.write(2, loss=2.0)
        writer.sync()
        assert [event[0] for event in events(tmp_path) if event[1] == "loss"] == [1, 2], "also if it is killed now"
    with EventWriter(tmp_path, last_step=1) as writer:
        writer.write(2, loss=1.5)
    found = events(tmp_path)
    assert [event for event in found if event[1] == "loss"] == [(1, "loss", 2.5), (2, "loss", 2.0), (2, "loss", 1.5)]
    assert [event[0] for event in found if event[1] == "start"] == [1, 2], "TensorBoard drops what came from there on"


def test_tensorboard_does_not_bring_pytorch_with_it(tmp_path):
    """Which takes seconds to import where it is installed; afterwards it can be."""
    program = (
        "import importlib.util, sys; from nfnet_lib.tensorboard import EventWriter\n"
        f"with EventWriter({str(tmp_path)!r}) as writer: writer.write(1, loss=2.5)\n"
        "assert not any(name.split('.')[0] == 'torch' for name in sys.modules); importlib.util.find_spec('torch')"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT, timeout=60).returncode == 0
    assert list(tmp_path.glob("events.*"))
