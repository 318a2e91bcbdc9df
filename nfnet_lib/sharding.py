"""Devices as a mesh of one axis: the batch is split over it; the training state is copied to each device or split, too."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

DATA = "data"  # the axis
SMALLEST_SPLIT = 2**14  # elements: below that a gather costs more than the memory is worth


def make_mesh(devices: list | None = None) -> Mesh:
    """All devices of all processes (or those given) in a row."""
    return Mesh(np.array(devices or jax.devices()), (DATA,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, shapes: PyTree, sharding: str) -> PyTree:
    """Where each array of a training state lies: "replicated", or "fsdp": split over the devices (ZeRO, arXiv 1910.02054).

    An array is split along its longest axis that the number of devices divides; small ones and those without such an axis are
    copied. The step gathers the parameters before it uses them, so that nothing but the order of sums differs.
    """

    def place(leaf) -> NamedSharding:
        fitting = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if sharding == "replicated" or mesh.size == 1 or leaf.size < SMALLEST_SPLIT or not fitting:
            return replicated(mesh)
        axis = max(fitting, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(DATA if i == axis else None for i in range(leaf.ndim))))

    return jax.tree.map(place, shapes)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays of the host, the same in every process, as global arrays with these shardings."""

    def one(leaf, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree, shardings)
