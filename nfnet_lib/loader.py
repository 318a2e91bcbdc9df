"""Batches: ids from the sampler, images from a source, views from augment.py, made ahead by threads.

A batch is a pure function of (seed, position), so it is the same for any number of workers and processes, and a run
that was killed goes on with exactly the examples it has not seen.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32, Int64, UInt8

from nfnet_lib.augment import DRAWS_PER_VIEW, MIN_AREA, default_margin, eval_views, train_views
from nfnet_lib.sampler import ExactlyOnceSampler, uniforms
from nfnet_lib.sources import Source


class Batch(NamedTuple):
    """images, labels: the views of this process, the views of one example adjacent; ids: its examples.

    position: unique examples consumed by the whole job once this batch is applied.
    """

    images: UInt8[np.ndarray, "B H W 3"]
    labels: Int32[np.ndarray, " B"]
    ids: Int64[np.ndarray, " U"]
    position: int


def train_batches(
    source: Source, sampler: ExactlyOnceSampler, *, batch_size: int, resolution: int, seed: int, augmult: int = 1,
    start: int = 0, process_index: int = 0, process_count: int = 1, flip: bool = True, min_area: float = MIN_AREA,
    workers: int = 1, prefetch: int = 2,
) -> Iterator[Batch]:  # fmt: skip
    """Training batches for ever from position `start`; epochs follow each other within a batch, nothing is dropped.

    batch_size: views over all processes, `augmult` of each example. A failing example raises RuntimeError here, naming
    its batch's ids. Close the iterator to end its threads.
    """
    if batch_size % (augmult * process_count):
        raise ValueError(f"batch_size: {batch_size} is not a multiple of augmult={augmult} x {process_count} processes")
    if workers < 1 or prefetch < 1:
        raise ValueError(f"workers, prefetch: {workers}, {prefetch} must be at least 1")
    unique = batch_size // augmult

    def make(position: int) -> Batch:
        ids = sampler.process_ids(position, position + unique, process_index, process_count)
        first = position + process_index * len(ids)
        positions = np.arange(first, first + len(ids), dtype=np.int64)
        try:
            images, labels = source.batch(ids)
            views = [
                train_views(images, uniforms(seed, positions, view, DRAWS_PER_VIEW), resolution, flip, min_area)
                for view in range(augmult)
            ]
        except Exception as error:
            raise RuntimeError(f"examples {ids.tolist()} at position {first}: {error}") from error
        stacked = np.stack(views, axis=1).reshape(-1, resolution, resolution, 3)
        return Batch(stacked, np.repeat(labels, augmult), ids, position + unique)

    with ThreadPoolExecutor(workers, thread_name_prefix="loader") as executor:
        pending: deque = deque()
        position = start
        try:
            while True:
                while len(pending) < max(prefetch, workers):
                    pending.append(executor.submit(make, position))
                    position += unique
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def eval_batches(
    source: Source, *, batch_size: int, resolution: int, margin: int = -1
) -> Iterator[tuple[UInt8[np.ndarray, "B H W 3"], Int32[np.ndarray, " B"], Float[np.ndarray, " B"]]]:
    """(images, labels, weights) of every example once, in order; the last batch is padded with weight 0.

    margin: `eval_views`; -1 is `default_margin`.
    """
    margin = default_margin(resolution) if margin < 0 else margin
    for start in range(0, len(source), batch_size):
        ids = np.arange(start, min(start + batch_size, len(source)), dtype=np.int64)
        images, labels = source.batch(ids)
        padding = batch_size - len(ids)
        views = np.pad(eval_views(images, resolution, margin), ((0, padding), (0, 0), (0, 0), (0, 0)))
        weights = np.concatenate([np.ones(len(ids), np.float32), np.zeros(padding, np.float32)])
        yield views, np.pad(np.asarray(labels, np.int32), (0, padding)), weights
