"""Processes that execute notebooks, one after another: each notebook, and its kernel, is a fork of one that has imported all.

So a notebook of a study starts in a second, not in five (LOG.md), and what goes wrong with it is unknown to the next one.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import math
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from nfnet_lib import PROJECT

LONGEST_SOCKET_FOLDER = 70  # characters: a socket's whole name may have 103 (macOS) or 107 (Linux)
# What notebooks of runs and analysis import, themselves or through what they call. No backend of JAX must start here.
_IMPORTED = (
    "ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell", "ipywidgets", "matplotlib.pyplot",
    "nfnet_lib.background", "nfnet_lib.finetune", "nfnet_lib.plots", "nfnet_lib.train", "seaborn",
)  # fmt: skip
_LONGEST_WAIT = 86_400  # seconds; poll(2) counts milliseconds in 31 bits, and runs of F7+ are given a year
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class NotebookProcess:
    """A process with this environment, on so many processor cores (0: all). It ends with the thread that made it.

    prepared: whether it imports what cells need before its first notebook, for all to come. errors: for what goes wrong
    before that; later it is said in the log of the notebook at hand.
    """

    def __init__(self, environment: dict[str, str], cores: int, prepared: bool, errors: IO[str]):
        # Its maker is a part: threads of a pool end when they have nothing more to do, and their processes with them.
        self.made_for = (environment, cores, threading.current_thread())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nfnet_lib.notebook_process", str(os.getpid()), *(_IMPORTED if prepared else ())],
            # A session of its own: ctrl-C in a terminal asks the runs to stop (study.py), it does not kill them.
            start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment,
            cwd=PROJECT, bufsize=0,
        )  # fmt: skip

    def execute(
        self, notebook: Path, output: Path, parameters: dict[str, Any], cores: Sequence[int], log: Path,
        timeout: float | int | None,
    ) -> int:  # fmt: skip
        """The exit code of an execution, negative for a signal, its own or this process's. subprocess.TimeoutExpired."""
        request = {"notebook": str(notebook), "output": str(output), "parameters": parameters, "cores": list(cores)}
        try:
            self._process.stdin.write(json.dumps(request | {"log": str(log)}).encode() + b"\n")
        except BrokenPipeError:
            return self._process.wait()
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not multiprocessing.connection.wait([self._process.stdout], min(end - time.monotonic(), _LONGEST_WAIT)):
            if time.monotonic() >= end:
                raise subprocess.TimeoutExpired(str(notebook), timeout)
        answer = self._process.stdout.readline()
        return int(answer) if answer else self._process.wait()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End it, and with it what it executes."""
        self._process.kill()

    def close(self) -> None:
        """End it and give back what it holds."""
        with self._process:
            self._process.kill()


def papermill():
    """papermill, without jsonschema's check of IRIs: notebooks have none, and to build its grammar takes a second a process."""
    sys.modules.setdefault("rfc3987_syntax", None)
    return importlib.import_module("papermill")


def _forked(function: Callable, *arguments: Any) -> int:
    """The number of a fork that does this and ends, with 1 and a traceback where it fails.

    It leaves out what this process has to tidy up at its own end.
    """
    parent, pid = os.getpid(), os.fork()
    if not pid:
        code = 1
        try:
            end_with(parent)
            function(*arguments)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


class _Kernel:
    """A fork that becomes a kernel once it is told of which: like the Popen that jupyter_client expects.

    Forked before there are event loops and sockets, which it must not share.
    """

    stdin = stdout = stderr = None

    def __init__(self):
        self.returncode: int | None = None
        reading, self._writing = os.pipe()
        self.pid = _forked(self._become, reading)
        os.close(reading)
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)  # by both, for either may be first: jupyter_client signals the whole group

    def launch(self, command: list[str], *, env: dict[str, str], **_) -> "_Kernel":
        """For `jupyter_client.launcher.launch_kernel`: of the command only what is told to the kernel counts."""
        with contextlib.suppress(BrokenPipeError), open(self._writing, "wb") as pipe:  # it is dead, which papermill will find
            pickle.dump((command[command.index("-f") :], env), pipe)
        return self

    def _become(self, reading: int) -> None:
        os.close(self._writing)
        os.setpgid(0, 0)
        with open(reading, "rb") as pipe:
            told = pipe.read()
        if not told:  # there will be no kernel, and whoever knows why has said so
            return
        arguments, environment = pickle.loads(told)
        np.random.seed()  # noqa: NPY002, of it there is one, from which every notebook would draw the same
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["ipykernel_launcher.py", *arguments]
        from ipykernel import kernelapp

        # Whose kernel it is ipykernel reads from the environment, when it is imported: too early here.
        kernelapp.launch_new_instance(argv=[*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def end_with(parent: int) -> None:
    """End this process when its parent ends, or now where that is gone already."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent process is gone")


def _execute(request: dict[str, Any], answers: int) -> None:
    """In a fork: a notebook by papermill, its kernel another fork."""
    os.close(answers)  # or whatever it leaves behind would keep the reader waiting
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["cores"]:
        os.sched_setaffinity(0, request["cores"])
    kernel = _Kernel()
    from jupyter_client.provisioning import local_provisioner
    from traitlets.config import Config

    from nfnet_lib.cell import shorten_outputs, with_command

    local_provisioner.launch_kernel = kernel.launch
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").setLevel(logging.INFO)  # what cells print, as they do
    # Over sockets in the file system: of ports, two kernels that start at once are given the same now and then.
    short = None if len(tempfile.gettempdir()) < LONGEST_SOCKET_FOLDER else "/tmp"
    with tempfile.TemporaryDirectory(prefix="nfnet-kernel-", dir=short) as sockets:
        try:
            papermill().execute_notebook(
                with_command(Path(request["notebook"]), request["parameters"]), request["output"], request["parameters"],
                kernel_name="python3", progress_bar=False, log_output=True, start_timeout=180, coalesce_streams=True,
                shutdown_kernel="immediate",  # all it had to say is on disk; to take JAX down in good order takes a second
                config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}),
            )  # fmt: skip
        except papermill().exceptions.PapermillExecutionError as error:
            if not "".join(error.traceback).strip():  # IPython had none, as where it could open no file
                error.traceback = [f"{error.ename}: {error.evalue}"]
            raise
        finally:
            if Path(request["output"]).exists():
                shorten_outputs(Path(request["output"]))


def _main(parent: int, imported: list[str]) -> None:
    """Bound to its parent's life: a fork for each line of its input, whose exit code is written down in answer."""
    end_with(parent)
    # Of forks where there are threads. Those here are of BLAS libraries and of an allocator, which see to it themselves.
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork")
    answers, prepared = os.dup(1), False
    while line := sys.stdin.buffer.raw.readline():
        request = json.loads(line)
        with open(request["log"], "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if not prepared:
            if request["cores"]:
                os.sched_setaffinity(0, request["cores"])  # libraries count cores when they are imported
            # By which figures come into the notebook: matplotlib asks when it is imported, before there is a kernel to say so.
            os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
            papermill()
            for name in imported:
                importlib.import_module(name)
            gc.freeze()  # or a collection in a fork writes to all pages
            prepared = True
        code = os.waitstatus_to_exitcode(os.waitpid(_forked(_execute, request, answers), 0)[1])
        os.write(answers, f"{code}\n".encode())


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
