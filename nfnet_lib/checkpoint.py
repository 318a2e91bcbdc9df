"""Checkpoints: Orbax behind own guards.

Orbax is atomic under SIGKILL, but it restores flipped bits silently, takes an empty step folder for the latest step
and casts types without a word. So each checkpoint carries a checksum, shape and type of every leaf, and a record with a
checksum of its own that says of which run and step it is; a restore verifies them and falls back to the checkpoint
before, saying so.
"""

import hashlib
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from nfnet_lib import distributed
from nfnet_lib.records import RecordError, sealed

KEEP = 2
SCHEMA = 2  # of a checkpoint's record; 1 did not say of which run it was


class CheckpointError(RecordError):
    """No checkpoint in a folder could be used, though there are some."""


def leaf_digests(tree: PyTree) -> dict[str, str]:
    """{path: "dtype shape blake2b"} of every leaf."""
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()
        out[jax.tree_util.keystr(path)] = f"{array.dtype} {array.shape} {digest}"
    return out


def leaf_kinds(tree: PyTree) -> dict[str, str]:
    """{path: "dtype shape"} of every leaf."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype} {tuple(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _kind(digest: str | None) -> str | None:
    """The "dtype shape" of one of `leaf_digests`."""
    return digest.rpartition(" ")[0] if digest else None


class Checkpoints:
    """The checkpoints of one run, in `folder`/<step>; the newest two are kept. Saving goes on in the background.

    run: the parameters of the run, JSON values; what is of another is not restored.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder, self.run = Path(folder).resolve(), dict(run)
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEEP, cleanup_tmp_directories=True, create=False,
            # Threads that make folders wait for five minutes where one can't be made, and the run's end for them.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            # Of several processes only the one that calls this writes; Orbax would wait for the others.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(), active_processes={jax.process_index()}
            ),
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: PyTree, record: dict[str, Any]) -> None:
        """Start saving `state` and the JSON `record` of the same moment as checkpoint `step`."""
        state = jax.device_get(state)
        about = {"schema": SCHEMA, "step": step, "run": self.run, "digests": leaf_digests(state), "record": record}
        content = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state), record=self._ocp.args.JsonSave(sealed(about))
        )
        if not self._manager.save(step, args=content, force=True):
            raise CheckpointError(f"checkpoint {step} was not written: {self.folder} holds a newer one")

    def restore(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """(step, state, record) of the newest sound checkpoint; None where there is none at all.

        template: a tree with the shapes and types wanted. Checkpoints that are damaged, of another run or of an older schema
        are reported; CheckpointError, with what is wrong with the newest, if none is left.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        wrong = []
        for step in steps:
            try:
                return step, *self._verified(step, template)
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                wrong.append(_first_line(error))
                warnings.warn(f"checkpoint {step} in {self.folder.parent.name} can't be used, trying the one before: "
                              f"{wrong[-1]}", stacklevel=2)  # fmt: skip
        if steps:
            raise CheckpointError(
                f"no sound checkpoint among steps {steps} in {self.folder} ({wrong[0]}); remove them to start again"
            )
        return None

    def _verified(self, step: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        about = self._part(step, record=self._ocp.args.JsonRestore())
        if about.get("schema") != SCHEMA:
            raise CheckpointError(f"it is of schema {about.get('schema', 1)}; this version reads schema {SCHEMA}")
        if sealed(about)["digest"] != about["digest"]:
            raise CheckpointError("its record has been changed since it was written")
        if about["step"] != step:
            raise CheckpointError(f"it is of step {about['step']}")
        for name in sorted(self.run.keys() | about["run"].keys()):
            saved, now = about["run"].get(name), self.run.get(name)
            if saved != now:
                raise CheckpointError(f"it is of another run: {name} was {saved!r}, now {now!r}")
        wanted, kinds = about["digests"], leaf_kinds(template)
        if other := {path: kinds.get(path) for path in wanted | kinds if kinds.get(path) != _kind(wanted.get(path))}:
            path = min(other)
            raise CheckpointError(f"{len(other)} leaves differ: {path} was {_kind(wanted.get(path))}, now {other[path]}")
        state = self._part(step, state=self._ocp.args.StandardRestore(jax.device_get(template)))
        found = leaf_digests(state)
        for path, digest in wanted.items():
            if found.get(path) != digest:
                raise CheckpointError(f"{path}: saved as {digest}, read as {found.get(path)}")
        return state, about["record"]

    def _part(self, step: int, **wanted: Any) -> Any:
        (name,) = wanted
        return self._manager.restore(step, args=self._ocp.args.Composite(**wanted))[name]

    def wait(self) -> None:
        """Until what was started is on disk; raises what went wrong on the way."""
        self._manager.wait_until_finished()

    def discard_below(self, step: int) -> None:
        """Remove checkpoints older than `step`."""
        self.wait()
        for old in self._manager.all_steps():
            if old < step:
                self._manager.delete(old)

    def discard_above(self, step: int) -> None:
        """Remove damaged checkpoints newer than `step`, so that their numbers can be written again."""
        for newer in self.folder.iterdir():
            if newer.name.isdigit() and int(newer.name) > step:
                shutil.rmtree(newer) if newer.is_dir() else newer.unlink()
        self._manager.reload()

    def close(self) -> None:
        """Wait and release."""
        self._manager.close()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def restored(checkpoints: Checkpoints | None, state: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
    """(step, state, record) of the newest sound checkpoint, which the first process reads; None where there is none.

    CheckpointError, in all processes, as of `Checkpoints.restore`.
    """
    template = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    found, error = None, None
    if checkpoints is not None:
        try:
            found = checkpoints.restore(template)
        except CheckpointError as refused:
            error = str(refused)
    if error := distributed.told(error):
        raise CheckpointError(error)
    if found is not None:
        checkpoints.discard_above(found[0])
    told = distributed.told(None if found is None else {"step": found[0], "record": found[2]})
    if told is None:
        return None
    return told["step"], distributed.told_arrays(template if found is None else found[1]), told["record"]


def not_finite(tree: PyTree) -> str:
    """The path of the first leaf of NumPy arrays with a number that is none; empty where all are finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) and not np.isfinite(leaf).all():
            return jax.tree_util.keystr(path)
    return ""
