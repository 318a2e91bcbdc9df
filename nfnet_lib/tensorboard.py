"""TensorBoard's event files, beside metrics.jsonl and with the same numbers; written without TensorFlow."""

import os
import sys
import time
from typing import Any

FLUSH_SECONDS = 10


class EventWriter:
    """Writes what MetricsWriter writes as scalars to an event file in the run's folder. OSError where it can't be.

    By tensorboardX's file format, not its SummaryWriter: the thread that writes for that one ends at the first error, and the
    run would wait for it without end.

    last_step: step of the checkpoint that the run resumes from: TensorBoard shows nothing later of earlier event files.
    """

    def __init__(self, folder: str | os.PathLike, last_step: int = 0):
        EventsWriter, self._event, self._start = _event_types()
        self._file = EventsWriter(f"{folder}/events", f".{os.getpid()}.{last_step}")  # without this named by the second
        self._flushed = 0.0
        self._write(last_step + 1, session_log={"status": self._start})

    def write(self, step: int, **metrics: Any) -> None:
        values = [{"tag": name, "simple_value": float(value)} for name, value in metrics.items() if value is not None]
        self._write(step, summary={"value": values})

    def _write(self, step: int, **content: dict) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Force everything written so far to disk: before a checkpoint, after which a resumed run does not write it again."""
        self._file.flush()
        self._flushed = time.monotonic()

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _event_types() -> tuple[type, type, int]:
    """tensorboardX's writer, its events and the mark of a start, without PyTorch, which it imports where there is one: 4 s of
    a run, and nothing that scalars need."""
    hidden = sys.modules.setdefault("torch", None) is None
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
    finally:
        if hidden:
            del sys.modules["torch"]
    return EventsWriter, Event, SessionLog.START
