"""Where the cells of a study run: on this machine (`LocalEngine`), or on a Ray cluster (`RayEngine`).

An engine runs functions that can be imported, with arguments that can be pickled, and gives back futures; it knows nothing
of studies. Each call gets processor cores of its own as the keyword `cores`. What a call did is on disk, in the study's
folder, which all machines share: an engine that dies loses no finished work, and what it ran is resumed by the next.
"""

import contextlib
import fcntl
import functools
import math
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from nfnet_lib.cell import CellFailed, cells_stopping, heed_stopping, processes_kept
from nfnet_lib.config import ConfigError

ENGINES = ("local", "ray")
TOLD_SECONDS = 5


@runtime_checkable
class Engine(Protocol):
    """workers: calls at a time, as far as this process knows. at_once: calls to give it at a time. Used by one thread."""

    workers: int
    at_once: float

    def submit(self, function: Callable, *arguments: Any, **options: Any) -> Future:
        """Call `function(*arguments, **options, cores=...)` somewhere, as soon as there is room."""

    def close(self, grace: float | int = 0) -> None:
        """Give back what the engine holds. Calls that still run get `grace` seconds to end by themselves."""


@contextlib.contextmanager
def own_cores(count: int) -> Iterator[list[int]]:
    """`count` of the cores that this process may use, which no other call on this machine has; an empty list for 0.

    Who holds a core has its file locked, in the system's temporary folder: the lock ends with its holder, however that
    dies. Waits while there are too few; CellStopped where this process's cells are stopped meanwhile.
    """
    available = sorted(os.sched_getaffinity(0))
    folder = Path(tempfile.gettempdir()) / f"nfnet-cores-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    count, began = min(count, len(available)), time.monotonic()
    while True:
        with contextlib.ExitStack() as held:
            cores: list[int] = []
            for core in available:
                if len(cores) == count:
                    break
                file = held.enter_context((folder / str(core)).open("w"))
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    cores.append(core)
            if len(cores) == count:
                yield cores
                return
        heed_stopping("a cell that waits for processor cores")
        if time.monotonic() - began > TOLD_SECONDS:
            _tell_that_it_waits()
        time.sleep(0.2)


@functools.cache
def _tell_that_it_waits() -> None:
    """Once a process."""
    from tqdm.auto import tqdm

    tqdm.write("note: waiting for processor cores, which another study here has", file=sys.stderr)


def on_own_cores(function: Callable, count: int, arguments: tuple, options: dict[str, Any]) -> Any:
    """`function` with `count` cores of its own: what both engines call."""
    with own_cores(count) as cores:
        return function(*arguments, **options, cores=cores)


def room_for(workers: int, cores_per_run: int, memory_per_run_gb: float | int) -> int:
    """How many calls this machine has cores and memory for, at most `workers` unless that is 0."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    most = len(os.sched_getaffinity(0)) // cores_per_run if cores_per_run else workers
    return max(1, min(workers or most, most, int(memory_gb // memory_per_run_gb)))


class LocalEngine:
    """A few threads, each of which waits for one notebook's process at a time."""

    def __init__(self, workers: int, cores_per_run: int, memory_per_run_gb: float | int):
        self.workers, self._cores = room_for(workers, cores_per_run, memory_per_run_gb), cores_per_run
        self.at_once = self.workers
        self._pool, self._kept = ThreadPoolExecutor(self.workers, "cell"), contextlib.ExitStack()
        self._kept.enter_context(processes_kept())

    def submit(self, function: Callable, *arguments: Any, **options: Any) -> Future:
        return self._pool.submit(on_own_cores, function, self._cores, arguments, options)

    def close(self, grace: float | int = 0) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._kept, cells_stopping(grace):
            self._pool.shutdown()


# Of a driver that was killed Ray's agents live on. This waits until the driver is gone, then ends what its cluster left:
# what has the mark in its environment.
_REAPER = """
import os, sys, time

def read(pid, name):
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()

sys.stdin.read()
mark, idle = sys.argv[1].encode(), 0
while idle < 2:
    idle += 1
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark in read(pid, "environ").split(bytes(1)) and read(pid, "stat").rpartition(b")")[2].split()[0] != b"Z":
                os.kill(int(pid), 9)
                idle = 0
        except OSError:
            pass
    time.sleep(0.5)
"""
_CONNECT_SECONDS = 10
_CLUSTER = "NFNET_RAY_CLUSTER"  # in the environment of all processes of such a cluster


class RayEngine:
    """Ray Core tasks: on a cluster (`address`), or on one that Ray makes of this machine for as long as the study runs.

    All machines must see this checkout and the study's folder under the same paths. A worker or machine that is lost takes
    its notebook with it, and Ray starts the call again elsewhere, up to `retries` times. Ray starts with the first call:
    a study that is done never waits for it. ConfigError where Ray is missing or the address doesn't answer.
    """

    def __init__(
        self, workers: int, cores_per_run: int, memory_per_run_gb: float | int, *, address: str = "",
        gpus_per_run: float | int = 0, retries: int = 0,
    ):  # fmt: skip
        self.workers, self._cores = room_for(workers, cores_per_run, memory_per_run_gb), cores_per_run
        self.at_once = math.inf  # a cluster grows by what waits
        self._address, self._retries, self._started = address, retries, False
        self._reaper: subprocess.Popen | None = None
        self._options = {
            "num_cpus": cores_per_run or 1, "num_gpus": gpus_per_run, "memory": int(memory_per_run_gb * 2**30),
            "max_retries": retries,
        }  # fmt: skip
        self._pending: set[Future] = set()
        try:
            import ray  # noqa: F401
        except ImportError:
            raise ConfigError(
                "engine: 'ray' needs the [ray] extra: pip install -e '.[ray]' -c constraints.txt"
            ) from None
        _refuse_silent(address)

    def _start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        room: dict[str, Any] = {}
        if self._address:  # something listens there; where it is not Ray, three questions are enough
            os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "3")
        else:  # reachable from this machine only, and by who knows this token
            name = secrets.token_hex(8)
            command = [sys.executable, "-c", _REAPER, f"{_CLUSTER}={name}"]
            self._reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            os.environ[_CLUSTER] = name
            os.environ["SPT_NOENV"] = "1"  # or the titles of Ray's agents overwrite their environment, and the mark
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            room = {
                "num_cpus": self.workers * (self._cores or 1),
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
            }
        import ray

        try:
            ray.init(address=self._address or "local", log_to_driver=False, logging_level="error", **room)
            self._call, self._started = ray.remote(on_own_cores), True
        except (ConnectionError, ValueError, RuntimeError) as error:
            there = f"address: {self._address!r}: no Ray cluster answers there"
            raise ConfigError(f"{there if self._address else 'engine: Ray does not start here'}: {error}") from None
        finally:
            os.environ.pop(_CLUSTER, None)
            if not self._started:
                self._reap()

    def submit(self, function: Callable, *arguments: Any, tpu_slice: str = "", **options: Any) -> Future:
        """tpu_slice: generation and topology ("v4:2x2x4") of the slice that a cell's runs get to themselves."""
        if not self._started:
            self._start()
        resources, cores = self._options, self._cores
        if tpu_slice:
            from nfnet_lib.ray_slices import on_slice

            function, arguments = on_slice, (tpu_slice, function, *arguments)
            resources, cores = {"num_cpus": 0, "max_retries": self._retries}, 0
        inner, outer = self._call.options(**resources).remote(function, cores, arguments, options).future(), Future()
        self._pending.add(outer)
        outer.add_done_callback(self._pending.discard)
        inner.add_done_callback(functools.partial(_pass_on, outer))
        return outer

    def close(self, grace: float | int = 0) -> None:
        if self._started:
            import ray

            wait_for(list(self._pending), timeout=grace)
            ray.shutdown()
            self._started = False
            self._reap()

    def _reap(self) -> None:
        """End what Ray left of a cluster of its own."""
        if self._reaper is not None:
            self._reaper.communicate()


def _refuse_silent(address: str) -> None:
    """ConfigError where nothing listens at HOST:PORT: Ray itself may ask for twenty minutes. Other addresses Ray judges."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"address: {address!r}: no Ray cluster answers there: {error}") from None


def _pass_on(outer: Future, inner: Future) -> None:
    """What Ray's future came to, without Ray's own wrapping; a lost worker is a lost cell."""
    import ray

    error = inner.exception()
    if isinstance(error, ray.exceptions.RayTaskError):
        error = getattr(error, "cause", error)
    elif isinstance(error, ray.exceptions.RayError):
        error = CellFailed(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}", str(error), lost=True)
    with contextlib.suppress(InvalidStateError):  # nobody waits for it any more
        outer.set_result(inner.result()) if error is None else outer.set_exception(error)


def make_engine(name: str, *, workers: int, cores_per_run: int, memory_per_run_gb: float | int, gpus_per_run: float | int = 0,
                retries: int = 0, address: str = "") -> Engine:  # fmt: skip
    """The engine of this name. ConfigError for another name, or an address with the local engine."""
    if name not in ENGINES:
        raise ConfigError(f"engine: {name!r} is not one of {', '.join(ENGINES)}")
    if name == "ray":
        return RayEngine(
            workers, cores_per_run, memory_per_run_gb, address=address, gpus_per_run=gpus_per_run, retries=retries
        )
    if address:
        raise ConfigError(f"address: {address!r} with engine='local'; a cluster needs engine='ray'")
    return LocalEngine(workers, cores_per_run, memory_per_run_gb)


def first_ended(futures: Iterable[Future]) -> set[Future]:
    """Those that have ended, once at least one has; looks up every second, so that a signal is heeded."""
    while not (ended := wait_for(list(futures), timeout=1, return_when=FIRST_COMPLETED).done):
        pass
    return ended
