"""TensorBoard's event files, beside metrics.jsonl and with the same numbers; written without TensorFlow."""

from pathlib import Path
from typing import Any


class EventWriter:
    """Writes what MetricsWriter writes as scalars to an event file in the run's folder.

    last_step: step of the checkpoint that the run resumes from: TensorBoard shows nothing later of earlier event files.
    """

    def __init__(self, folder: Path, last_step: int = 0):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1, flush_secs=10)

    def write(self, step: int, **metrics: Any) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()
