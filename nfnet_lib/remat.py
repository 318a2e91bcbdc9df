"""Blocks whose backward pass computes again what it does not keep (`kept.py`)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nfnet_lib.convolution import backend
from nfnet_lib.kept import KEPT


def on_this_backend(remat: str) -> str:
    """`remat`, but on CPU "convs" for "none": an ordinary scan's stacks take longer than computing again (LOG.md)."""
    return "convs" if remat == "none" and backend() == "cpu" else remat


def rematerialised(function: Callable, remat: str) -> Callable:
    """`function`, of which the backward pass computes again what `remat` does not keep."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT.get(remat, ()))
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


@jax.custom_vjp
def gradients_together(x: Array, w: Array) -> tuple[Array, Array]:
    """The same two, of which the backward pass has both gradients before it goes on with either.

    A scan's gradient of x can be added to in place only where nothing else is still to be computed of it: without this
    TPU's compiler may put off the gradient of w and copy that of x (LOG.md).
    """
    return x, w


gradients_together.defvjp(lambda x, w: ((x, w), None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def scan_recomputing(
    steps: tuple, kept: tuple[str, ...], unroll: int, params, x: Float[Array, "B ..."], others
) -> Float[Array, "B ..."]:  # fmt: skip
    """x after equal blocks one after another, each a chain of steps; the backward pass computes again what is not kept.

    A step is a function (own params, the block's x, the outputs of the step before or None, *own others) -> {name: output}; the
    last's is the next block's x, which is kept, too. kept: names of outputs. params, others: stacked on a leading axis;
    no gradient comes back for others. The same as a scan over checkpointed blocks, but what is kept is written where it is
    computed: a scan copies it into its stack (LOG.md).
    """
    def body(x, scanned):
        return _outputs(steps, x, *scanned)[1], None

    return jax.lax.scan(body, x, (params, others), unroll=unroll)[0]


def _outputs(steps: tuple, x, params, others) -> tuple[dict[str, Array], Array]:
    """Those of a block's steps by name, and that of the last."""
    outputs, before = {}, None
    for step in steps[:-1]:
        before = step(params, x, before, *others)
        outputs |= before
    return outputs, steps[-1](params, x, before, *others)


def _scan_forward(steps: tuple, kept: tuple[str, ...], unroll: int, params, x, others):
    count = len(jax.tree.leaves(params)[0])

    def body(carry, scanned):
        x, stacks, inputs = carry
        index, params, others = scanned
        outputs, x = _outputs(steps, x, params, others)
        stacks = {name: _write(stack, outputs[name], index) for name, stack in stacks.items()}
        return (x, stacks, _write(inputs, x, index + 1)), None

    shapes, _ = jax.eval_shape(functools.partial(_outputs, steps), x, *jax.tree.map(lambda leaf: leaf[0], (params, others)))
    stacks = {name: jax.ShapeDtypeStruct((count, *shapes[name].shape), shapes[name].dtype) for name in kept}
    stacks, inputs = _empty_like((stacks, jax.ShapeDtypeStruct((count + 1, *x.shape), x.dtype)), x)
    carry = (x, stacks, _write(inputs, x, 0))
    (y, stacks, inputs), _ = jax.lax.scan(body, carry, (jnp.arange(count), params, others), unroll=unroll)
    return y, (params, stacks, inputs, others)


def _scan_backward(steps: tuple, kept: tuple[str, ...], unroll: int, residuals, gradient):
    params, stacks, inputs, others = residuals

    def body(carry, scanned):
        gradient, grads = carry
        index, params, others = scanned
        found, x = jax.tree.map(
            lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), (stacks, inputs)
        )
        before, pulls = None, []
        for step in steps:
            out, pull = jax.vjp(lambda *arguments, step=step: step(*arguments, *others), params, x, before)
            before = {name: found.get(name, one) for name, one in out.items()} if step is not steps[-1] else None
            pulls.append(pull)
        to_params, to_x = [], []
        for pull in reversed(pulls):
            own, direct, gradient = pull(gradient)
            to_params.append(own)
            to_x.append(direct)
        own = jax.tree.map(lambda *own: sum(own), *to_params)
        return (sum(to_x), jax.tree.map(lambda stack, one: _write(stack, one, index), grads, own)), None

    grads = _empty_like(params, gradient)
    scanned = (jnp.arange(len(inputs) - 1), params, others)
    (gradient, grads), _ = jax.lax.scan(body, (gradient, grads), scanned, reverse=True, unroll=unroll)
    return grads, gradient, jax.tree.map(jnp.zeros_like, others)


def _write(stack: Array, one: Array, index: Array | int) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, one, index, 0)


def _empty_like(shapes, neighbour: Array):
    """Arrays to be written whole, varying over the devices that `neighbour` does: a scan's own outputs start as zeros."""
    stacks = jax.tree.map(lambda leaf: jax.lax.empty(leaf.shape, leaf.dtype), shapes)
    if axes := tuple(jax.typeof(neighbour).manual_axis_type.varying):
        stacks = jax.tree.map(lambda stack: jax.lax.pcast(stack, axes, to="varying"), stacks)
    return stacks


scan_recomputing.defvjp(_scan_forward, _scan_backward)
