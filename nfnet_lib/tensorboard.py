"""TensorBoard's event files, beside metrics.jsonl and with the same numbers; written without TensorFlow."""

import sys
from pathlib import Path
from typing import Any


class EventWriter:
    """Writes what MetricsWriter writes as scalars to an event file in the run's folder.

    last_step: step of the checkpoint that the run resumes from: TensorBoard shows nothing later of earlier event files.
    """

    def __init__(self, folder: Path, last_step: int = 0):
        SummaryWriter = _summary_writer()
        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1, flush_secs=10)

    def write(self, step: int, **metrics: Any) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()


def _summary_writer() -> type:
    """tensorboardX's, without PyTorch, which it imports where there is one: 4 s of a run, and nothing that scalars need."""
    hidden = sys.modules.setdefault("torch", None) is None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter
