"""Checkpoints: Orbax behind own guards.

Orbax is atomic under SIGKILL, but it restores flipped bits silently, takes an empty step folder for the latest step
and casts types without a word. So each checkpoint carries a checksum, shape and type of every leaf; a restore verifies
them and falls back to the checkpoint before, saying so.
"""

import hashlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

KEEP = 2


class CheckpointError(RuntimeError):
    """No checkpoint in a folder could be used, though there are some."""


def leaf_digests(tree: PyTree) -> dict[str, str]:
    """{path: "dtype shape blake2b"} of every leaf."""
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()
        out[jax.tree_util.keystr(path)] = f"{array.dtype} {array.shape} {digest}"
    return out


class Checkpoints:
    """The checkpoints of one run, in `folder`/<step>; the newest two are kept. Saving goes on in the background."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEEP, cleanup_tmp_directories=True, create=False,
            # Of several processes only the one that calls this writes; Orbax would wait for the others.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(), active_processes={jax.process_index()}
            ),
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: PyTree, record: dict[str, Any]) -> None:
        """Start saving `state` and the JSON `record` of the same moment as checkpoint `step`."""
        state = jax.device_get(state)
        content = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state),
            record=self._ocp.args.JsonSave({**record, "digests": leaf_digests(state)}),
        )
        if not self._manager.save(step, args=content, force=True):
            raise CheckpointError(f"checkpoint {step} was not written: {self.folder} holds a newer one")

    def restore(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """(step, state, record) of the newest sound checkpoint; None where there is none at all.

        template: a tree with the shapes and types wanted. Unsound checkpoints are reported and removed; CheckpointError
        if none is left.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return step, *self._verified(step, template)
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                warnings.warn(f"checkpoint {step} in {self.folder.parent.name} is damaged, trying the one before: "
                              f"{_first_line(error)}", stacklevel=2)  # fmt: skip
        if steps:
            raise CheckpointError(
                f"no sound checkpoint among steps {steps} in {self.folder}; remove them to start again"
            )
        return None

    def _verified(self, step: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardRestore(jax.device_get(template)), record=self._ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=args)
        record = dict(restored.record)
        wanted = record.pop("digests")
        found = leaf_digests(restored.state)
        for path, digest in wanted.items():
            if found.get(path) != digest:
                raise CheckpointError(f"{path}: saved as {digest}, read as {found.get(path)}")
        if set(found) != set(wanted):
            raise CheckpointError(f"leaves differ: {sorted(set(found) ^ set(wanted))[:3]}")
        return restored.state, record

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
                shutil.rmtree(newer)
        self._manager.reload()

    def close(self) -> None:
        """Wait and release."""
        self._manager.close()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
