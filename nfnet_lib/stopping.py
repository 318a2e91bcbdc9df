"""How a run is asked to stop: SIGTERM, as a pre-empted machine sends it, or a file called STOP."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import jax

from nfnet_lib import distributed


def asked_to_stop(asked: threading.Event, stop_files: list[Path], number: int) -> bool:
    """Whether this step is to be the last for now; several processes ask each other every few steps."""
    own = asked.is_set() or (distributed.is_primary() and any(file.exists() for file in stop_files))
    if jax.process_count() == 1:
        return own
    return number % distributed.AGREE_EVERY == 0 and any(distributed.gathered(own))


@contextlib.contextmanager
def heeding_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, as a pre-empted machine sends it; where signals can be handled, in the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, previous)
