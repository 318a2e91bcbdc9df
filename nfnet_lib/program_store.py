"""Compiled programs kept on disk whole, beside JAX's cache: the next process neither traces nor lowers them.

JAX's own cache is asked by the text of a lowered program, which takes longer to make than a narrow network takes to train.
Here the question is what the program is made from, and the code itself; JAX's cache still answers after the code has changed.
As with JAX's, who can write to the cache can make its readers run what they like.
"""

import hashlib
import os
import pickle
import platform
import re
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import jax
import jax.monitoring
from jax.experimental import serialize_executable

from nfnet_lib.files import write_bytes

_DIGEST = 16  # bytes of the content's, in front of it
_read_by_jax = threading.local()  # .count: programs that this thread's compilations took from JAX's cache


def _count(event: str, **_) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _read_by_jax.count = getattr(_read_by_jax, "count", 0) + 1


jax.monitoring.register_event_listener(_count)


def path_of(name: str, made_from: tuple) -> Path | None:
    """Where the program called `name`, made from these plain values, is kept; None where none are: JAX keeps no cache, several
    processes share the program, or it runs on something else than a CPU (untried).
    """
    folder = jax.config.jax_compilation_cache_dir
    if not folder or "://" in folder or jax.default_backend() != "cpu" or jax.process_count() > 1:
        return None
    surroundings = (_settings(), _machine(), _CODE, len(os.sched_getaffinity(0)))
    key = hashlib.blake2b(repr((made_from, *surroundings)).encode(), digest_size=_DIGEST).hexdigest()
    return Path(folder) / f"{name}-{key}.program"


def load(path: Path) -> jax.stages.Compiled | None:
    """The program kept there; None where there is none, or it is damaged."""
    try:
        content = path.read_bytes()
        if _digest(content[_DIGEST:]) != content[:_DIGEST]:
            return None
        return serialize_executable.deserialize_and_load(*pickle.loads(content[_DIGEST:]))
    except Exception:  # whatever a machine finds wrong with it, it can be made again
        return None


def compiled(lowered: jax.stages.Lowered, options: dict | None) -> tuple[jax.stages.Compiled, bool]:
    """The program, and whether the compiler made it: one that comes out of JAX's cache can't be kept, for written again it
    lacks some of its functions, which is found when it runs.
    """
    before = getattr(_read_by_jax, "count", 0)
    program = lowered.compile(compiler_options=options)
    return program, getattr(_read_by_jax, "count", 0) == before


def keep(program: jax.stages.Compiled, path: Path) -> None:
    """Write the program there, or do without and say so: a disk may be full."""
    try:
        content = pickle.dumps(serialize_executable.serialize(program))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, _digest(content) + content, overwrite=True)
    except Exception as error:  # whatever it is, the run goes on
        print(f"note: compiled programs are not kept for other runs: {error}", file=sys.stderr)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def _settings() -> tuple:
    """JAX's and XLA's, whatever they are set by; but not where the cache lies, which may be moved."""
    settings = sorted(item for item in jax.config.values.items() if item[0] != "jax_compilation_cache_dir")
    return settings, os.environ.get("XLA_FLAGS")


def _machine() -> tuple:
    """Devices, and what the processor can do: a program for another may end in an illegal instruction."""
    try:
        features = re.findall(r"^(?:model name|flags|Features)\s*:.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[:2]
    except OSError:
        features = []
    return [str(device) for device in jax.devices()], platform.machine(), platform.processor(), features


def _code() -> str:
    """Of everything that writes a program."""
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for package in ("jax", "jaxlib", "flax", "optax"):
        digest.update(version(package).encode())
    return digest.hexdigest()


_CODE = _code()  # of what is imported here, as far as that can be told: files may change under a process
