"""Several processes, each with devices of its own, as one job: how they find each other, and what they agree on.

Only the first process touches the run folder; what the others need of it they are told. On one process everything here is
the identity.
"""

import json
import os
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from nfnet_lib.config import ConfigError

AGREE_EVERY = 8  # steps between two questions whether any process was asked to stop


def start(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Join the job's other processes, before any other use of jax; must be called in each of them.

    coordinator: HOST:PORT of the first process, with num_processes and process_id. Without it they are found: on TPU pods
    through the metadata server, under Slurm, Open MPI and Kubernetes through the environment (jax.distributed), or else from
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. ConfigError where that is not enough to go by.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    arguments: dict[str, Any] = {}
    if coordinator:
        try:
            num_processes = num_processes or int(os.environ.get("JAX_NUM_PROCESSES", 0))
            process_id = process_id if process_id >= 0 else int(os.environ.get("JAX_PROCESS_ID", -1))
        except ValueError as error:
            raise ConfigError(f"JAX_NUM_PROCESSES, JAX_PROCESS_ID: {error}") from None
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"coordinator: {coordinator!r} is not HOST:PORT")
        if num_processes or process_id >= 0:
            if not 0 <= process_id < num_processes:
                raise ConfigError(
                    f"process_id: {process_id} is not in 0 to {num_processes - 1}, num_processes={num_processes}"
                )
            arguments = {"num_processes": num_processes, "process_id": process_id}
        arguments["coordinator_address"] = coordinator
    try:
        jax.distributed.initialize(**arguments)
    except ValueError as error:
        raise ConfigError(f"coordinator: none was found and none was given (HOST:PORT): {error}") from None


def is_primary() -> bool:
    """Whether this process is the one that reads and writes the run folder."""
    return jax.process_index() == 0


def told(value: Any = None) -> Any:
    """The first process's `value` (JSON) in all of them, who must all ask."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    content = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_primary() else np.zeros(0, np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(content))))
    content = content if is_primary() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(broadcast_one_to_all(content)).tobytes())


def told_arrays(tree: PyTree) -> PyTree:
    """The first process's NumPy arrays in all of them, each with a tree of those shapes; one array at a time."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental.multihost_utils import broadcast_one_to_all

    def one(leaf: np.ndarray) -> np.ndarray:  # as bytes: a sum would turn -0.0 into 0.0
        flat = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        return np.asarray(broadcast_one_to_all(flat)).view(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(lambda leaf: one(np.asarray(leaf)), tree)


def gathered(value: Any) -> list[Any]:
    """Every process's `value` (JSON), in all of them, by process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.int32(len(content)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(content)] = content
    rows = np.asarray(process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def host_copy(tree: PyTree) -> PyTree:
    """NumPy copies of global arrays, also of those that lie in parts on other processes' devices, one at a time."""

    def one(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)
