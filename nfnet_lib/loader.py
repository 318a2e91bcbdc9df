"""Batches: ids from the sampler, images from a source, views from augment.py, made ahead by threads.

A batch is a pure function of (seed, position): the same for any number of workers and processes, and a run that was
killed goes on with exactly the examples it has not seen. An example that can't be read keeps its slot with weight 0 and is
named in the batch, so that nothing shifts; a worker that hangs surfaces with the id of the example that it holds.
"""

import atexit
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from nfnet_lib.augment import (
    DRAWS_PER_MIX,
    DRAWS_PER_VIEW,
    Augmentation,
    default_margin,
    eval_views,
    mixed,
    train_view,
)
from nfnet_lib.randaugment import DRAWS_PER_LAYER, rand_augment
from nfnet_lib.sampler import ExactlyOnceSampler, uniforms
from nfnet_lib.sources import Source

CHUNK = 64  # views that one worker makes at a time: enough to amortise its start, few enough to share a batch out
TOGETHER = 256, 2**19  # views, bytes: smaller batches are made some at a time, since handing over takes as long as ten views
EXIT_SECONDS = 5  # that the end of the process waits for threads at work
RETRY_SECONDS = (0.1, 0.5)  # waits before a failed read is tried again: network mounts hiccup


class BadExample(NamedTuple):
    """An example that could not be used. position: of the stream in training, -1 in evaluation."""

    id: int
    position: int
    reason: str


class Examples(NamedTuple):
    """What a training or evaluation step takes, in NumPy or on the device. L: labels an example can have.

    images: uint8 [B, H, W, 3]. labels: int32 [B, L]. label_weights: float32 [B, L], each label's share of the target, 0
    where there are fewer than L. weights: float32 [B], 1, or 0 for padding and for examples that could not be read.
    """

    images: Any
    labels: Any
    label_weights: Any
    weights: Any


class Batch(NamedTuple):
    """The views of this process, the views of one example adjacent; the first four as in `Examples`.

    ids: its U examples. position: unique examples consumed by the whole job once this batch is applied; in evaluation,
    examples read so far. bad: what could not be read.
    """

    images: UInt8[np.ndarray, "B H W 3"]
    labels: Int32[np.ndarray, "B L"]
    label_weights: Float32[np.ndarray, "B L"]
    weights: Float32[np.ndarray, " B"]
    ids: Int64[np.ndarray, " U"]
    position: int
    bad: tuple[BadExample, ...] = ()

    @property
    def examples(self) -> Examples:
        """The part that goes to the device."""
        return Examples(*self[:4])


class LoaderError(RuntimeError):
    """An example that can't be read and must not be skipped, or a worker that hangs; names the example."""


def train_batches(
    source: Source, sampler: ExactlyOnceSampler, *, batch_size: int, resolution: int, seed: int, augmult: int = 1,
    start: int = 0, process_index: int = 0, process_count: int = 1, workers: int = 1, prefetch: int = 2,
    on_bad: str = "quarantine", stall_seconds: float | int = 300,
    normalise_labels: bool = True, **augmentation: Any,
) -> Iterator[Batch]:  # fmt: skip
    """Training batches for ever from position `start`; epochs follow each other within a batch, nothing is dropped.

    batch_size: views over all processes, `augmult` of each example. workers: threads (0: none, in the caller's); memory
    is bounded by prefetch + 1 batches (half a MiB where they are smaller) and one decoded image a worker. on_bad:
    "quarantine" keeps the slot of an example that can't be read with weight 0 and names it in `Batch.bad`, "stop" raises
    LoaderError. stall_seconds: an example that takes longer raises LoaderError. normalise_labels: the weights of an example's
    labels sum to 1 (softmax) or are 1 each (sigmoid). augmentation: parameters of `augment.Augmentation`. Close the iterator
    to end its threads.
    """
    if augmult < 1 or process_count < 1 or batch_size < 1 or batch_size % (augmult * process_count):
        raise ValueError(f"batch_size: {batch_size} is not a multiple of augmult={augmult} x {process_count} processes")
    if workers < 0 or prefetch < 1:
        raise ValueError(f"workers, prefetch: {workers}, {prefetch}; expected at least 0 and 1")
    _check_policy(on_bad)
    how = Augmentation(resolution, **augmentation)
    unique = batch_size // augmult
    share = unique // process_count
    if how.mixes and share % 2:
        raise ValueError(f"batch_size: {share} examples a process and step can't be mixed in pairs; an even number can")
    reader = _Reader(source, on_bad, normalise_labels)
    chunk = max(2, CHUNK // augmult // 2 * 2)  # even: pairs that are mixed are made together

    most, size = TOGETHER
    many = max(1, min(most, size // (resolution**2 * 3)) // (share * augmult))  # batches

    def jobs() -> Iterator[_Job]:
        position = start
        while True:
            stretch = np.arange(position, position + many * unique).reshape(many, process_count, share)
            positions = stretch[:, process_index].ravel()
            ids = sampler.example_ids(position, position + many * unique).reshape(stretch.shape)[:, process_index].ravel()
            batch = _empty(len(ids) * augmult, resolution, reader.labels_per_example * (2 if how.mixes else 1))
            job = _Job(batch._replace(ids=ids, position=position), [])
            for begin in range(0, len(ids), chunk):
                rows = np.arange(begin, min(begin + chunk, len(ids)))
                job.parts.append(
                    lambda rows=rows, batch=job.batch, positions=positions: _fill(
                        reader, batch, rows, positions[rows], seed, augmult, how
                    )
                )
            yield job
            position += many * unique

    for made in _made_ahead(jobs(), reader, workers, prefetch, stall_seconds):
        for number in range(many):
            views = slice(number * share * augmult, (number + 1) * share * augmult)
            first = made.position + number * unique
            bad = tuple(example for example in made.bad if first <= example.position < first + unique)
            ids = made.ids[number * share : (number + 1) * share]
            yield Batch(*(array[views] for array in made.examples), ids, first + unique, bad)


def eval_batches(
    source: Source, *, batch_size: int, resolution: int, margin: int = -1, squash: bool = True,
    process_index: int = 0, process_count: int = 1, workers: int = 0, prefetch: int = 2, on_bad: str = "quarantine",
    stall_seconds: float | int = 300, normalise_labels: bool = True,
) -> Iterator[Batch]:  # fmt: skip
    """Every example once, in order; batch_size: over all processes, each of which gets as many batches.

    What is missing from the last batch is padding of weight 0. margin, squash: `eval_views`; -1 is `default_margin`.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size: {batch_size} does not divide among {process_count} processes")
    _check_policy(on_bad)
    margin = default_margin(resolution) if margin < 0 else margin
    reader, share = _Reader(source, on_bad, normalise_labels), batch_size // process_count

    def fill(batch: Batch, ids: np.ndarray, first: int) -> list[BadExample]:
        def make(image: Any, labels: tuple[int, ...], i: int) -> None:
            batch.images[first + i] = eval_views([image], resolution, margin, squash)[0]
            reader.label(batch, first + i, labels)

        return reader.each(ids, None, make)

    def jobs() -> Iterator[_Job]:
        for begin in range(0, len(source), batch_size):
            first = begin + process_index * share
            ids = np.arange(first, max(first, min(first + share, len(source))), dtype=np.int64)
            position = min(begin + batch_size, len(source))
            batch = _empty(share, resolution, reader.labels_per_example)._replace(ids=ids, position=position)
            parts = [
                lambda batch=batch, ids=ids, at=at: fill(batch, ids[at : at + CHUNK], at)
                for at in range(0, len(ids), CHUNK)
            ]
            yield _Job(batch, parts)

    yield from _made_ahead(jobs(), reader, workers, prefetch, stall_seconds)


def on_device(
    batches: Iterable[Batch], place: Callable[[Examples], Examples], ahead: int = 1
) -> Iterator[tuple[Batch, Examples]]:
    """(batch, its `examples` where `place` puts them), the copies started `ahead` batches early."""
    pending: deque = deque()
    for batch in batches:
        pending.append((batch, place(batch.examples)))
        if len(pending) > ahead:
            yield pending.popleft()
    yield from pending


class _Job(NamedTuple):
    """A batch to be filled by its parts, in any order; each returns its bad examples."""

    batch: Batch
    parts: list[Callable[[], list[BadExample]]]


class _Reader:
    """Reads examples of a source one by one and sorts out the bad ones; knows which example each thread holds."""

    def __init__(self, source: Source, on_bad: str, normalise_labels: bool):
        self.source, self.on_bad, self.normalise_labels = source, on_bad, normalise_labels
        self.labels_per_example = getattr(source, "labels_per_example", 1)
        self.busy: dict[int, tuple[int, float]] = {}  # thread -> (example, since when)

    def each(
        self, ids: np.ndarray, positions: np.ndarray | None, make: Callable[[Any, tuple[int, ...], int], None]
    ) -> list[BadExample]:
        """Call make(image, labels, i) for the i-th of `ids`; returns those for which that or the reading failed.

        LoaderError at the first of them if on_bad is "stop".
        """
        thread, bad, many = threading.get_ident(), [], self._many(ids)
        for i, index in enumerate(ids.tolist()):
            self.busy[thread] = (index, time.monotonic())
            try:
                image, label = many[i] if many is not None else self._one(index)
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:  # NaN would become some byte
                    raise ValueError(f"pixels are {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3]")
                make(image, label if isinstance(label, tuple) else (label,), i)
            except Exception as error:  # sources are users' code: whatever they raise is about this example
                example = BadExample(
                    index, -1 if positions is None else int(positions[i]), str(error) or type(error).__name__
                )
                if self.on_bad == "stop":
                    at = "" if positions is None else f" at position {example.position}"
                    raise LoaderError(f"example {index} of {self.source.name}{at}: {example.reason}") from error
                bad.append(example)
        self.busy.pop(thread, None)
        return bad

    def _many(self, ids: np.ndarray) -> list | None:
        """All at once, where the source makes images together; None where it doesn't, or one of them fails."""
        if not hasattr(self.source, "batch"):
            return None
        self.busy[threading.get_ident()] = (int(ids[0]), time.monotonic())
        try:
            images, labels = self.source.batch(ids)
        except Exception:  # whatever it is, the example at fault is found by reading them one by one
            return None
        return list(zip(images, labels.tolist(), strict=True))

    def _one(self, index: int) -> tuple[Any, Any]:
        for wait in RETRY_SECONDS:
            try:
                return self.source[index]
            except OSError:  # of storage; a damaged image is a ValueError
                time.sleep(wait)
        return self.source[index]

    def label(self, batch: Batch, row: int, labels: tuple[int, ...]) -> None:
        """Write the labels and the weight of a row; ValueError for a label that is none (XLA would clamp it)."""
        if wrong := [label for label in labels if not 0 <= label < self.source.num_classes]:
            raise ValueError(f"label {wrong[0]} is not in 0 to {self.source.num_classes - 1}")
        batch.weights[row] = 1.0 if labels or not self.normalise_labels else 0.0
        batch.labels[row, : len(labels)] = labels
        batch.label_weights[row, : len(labels)] = 1 / len(labels) if labels and self.normalise_labels else 1.0


def _fill(
    reader: _Reader, batch: Batch, rows: np.ndarray, positions: np.ndarray, seed: int, augmult: int, how: Augmentation
) -> list[BadExample]:
    """Make the views of some examples of a batch: rows of its ids, at consecutive positions."""
    views = np.tile(np.arange(augmult), len(rows))

    def draws(count: int, stream: str) -> list[list[float]]:
        return uniforms(seed, np.repeat(positions, augmult), views, count, stream).tolist()

    crops, first = draws(DRAWS_PER_VIEW, "augment"), int(rows[0]) * augmult

    def make(image: Any, labels: tuple[int, ...], i: int) -> None:
        for at in range(i * augmult, (i + 1) * augmult):
            train_view(image, crops[at], how, batch.images[first + at])
            reader.label(batch, first + at, labels)

    bad = reader.each(batch.ids[rows], positions, make)
    if how.mixes:
        _mix(batch, rows, positions, draws(DRAWS_PER_MIX, "mix"), augmult, how)
    if how.randaugment_layers:
        layers = draws(how.randaugment_layers * DRAWS_PER_LAYER, "randaugment")
        for row, own in enumerate(layers, first):
            batch.images[row] = rand_augment(batch.images[row], own, how.randaugment_layers, how.randaugment_magnitude)
    return bad


def _mix(
    batch: Batch, rows: np.ndarray, positions: np.ndarray, draws: list[list[float]], augmult: int, how: Augmentation
) -> None:
    """Mix each view with the same view of its neighbour in the stream; one whose neighbour is bad stays as it is."""
    labels = batch.labels.shape[1] // 2
    for i in range(0, len(rows), 2):
        for view in range(augmult):
            pair = [int(rows[i + j]) * augmult + view for j in range(2)]
            if not batch.weights[pair].all():
                continue
            images, own = batch.images[pair], batch.label_weights[pair, :labels].copy()
            for j, row in enumerate(pair):
                at = (i + j) * augmult + view
                batch.images[row], share = mixed(images[j], images[1 - j], draws[at], how, int(positions[i]) // 2)
                batch.labels[row, labels:] = batch.labels[pair[1 - j], :labels]
                batch.label_weights[row, :labels] = share * own[j]
                batch.label_weights[row, labels:] = (1 - share) * own[1 - j]


def _empty(size: int, resolution: int, labels: int) -> Batch:
    return Batch(
        np.zeros((size, resolution, resolution, 3), np.uint8), np.zeros((size, labels), np.int32),
        np.zeros((size, labels), np.float32), np.zeros(size, np.float32), np.zeros(0, np.int64), 0,
    )  # fmt: skip


def _check_policy(on_bad: str) -> None:
    if on_bad not in ("quarantine", "stop"):
        raise ValueError(f"on_bad: {on_bad!r} is not one of quarantine, stop")


def _made_ahead(
    jobs: Iterator[_Job], reader: _Reader, workers: int, prefetch: int, stall_seconds: float | int
) -> Iterator[Batch]:
    """The batches of `jobs` in order, `prefetch` of them in the making by `workers` threads."""
    if workers == 0:
        for job in jobs:
            yield _finished(job, [part() for part in job.parts])
        return
    pool = _Pool(workers)
    pending: deque[tuple[_Job, list[Future]]] = deque()
    try:
        while True:
            while len(pending) < prefetch and (job := next(jobs, None)) is not None:
                pending.append((job, [pool.submit(part) for part in job.parts]))
            if not pending:
                return
            job, futures = pending.popleft()
            yield _finished(job, [_result(future, reader, stall_seconds) for future in futures])
    finally:
        pool.close()


class _Pool:
    """Threads that a hanging read can't make the process wait for: concurrent.futures joins its threads for ever."""

    def __init__(self, workers: int):
        self.tasks: queue.SimpleQueue = queue.SimpleQueue()
        self.threads = [
            threading.Thread(target=_work, args=(self.tasks,), name="loader", daemon=True) for _ in range(workers)
        ]
        for thread in self.threads:
            thread.start()
        _POOLS.append(self)

    def submit(self, part: Callable[[], list[BadExample]]) -> Future:
        future: Future = Future()
        self.tasks.put((future, part))
        return future

    def close(self) -> None:
        """Forget what has not begun; the threads end with what they are at."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.tasks.get_nowait()
        for _ in self.threads:
            self.tasks.put(None)
        _POOLS[:] = [pool for pool in _POOLS if any(thread.is_alive() for thread in pool.threads)]


_POOLS: list[_Pool] = []  # with threads at work, also after they were closed


@atexit.register
def _close_pools() -> None:
    """A daemon thread that comes out of C++ code while the interpreter is taken down aborts the process."""
    deadline = time.monotonic() + EXIT_SECONDS
    for pool in list(_POOLS):
        pool.close()
        for thread in pool.threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _work(tasks: queue.SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        future, part = task
        try:
            future.set_result(part())
        except BaseException as error:
            future.set_exception(error)
        del task, future, part  # a waiting thread keeps no batch alive


def _result(future: Future, reader: _Reader, stall_seconds: float | int) -> list[BadExample]:
    while True:
        try:
            return future.result(timeout=min(1.0, stall_seconds))
        except TimeoutError:
            for index, since in list(reader.busy.values()):
                if (waited := time.monotonic() - since) > stall_seconds:
                    raise LoaderError(
                        f"example {index} of {reader.source.name} has been read for {waited:.0f} s; at most"
                        f" stall_seconds={stall_seconds:g} are allowed"
                    ) from None


def _finished(job: _Job, bad: list[list[BadExample]]) -> Batch:
    return job.batch._replace(bad=tuple(example for part in bad for example in part))
