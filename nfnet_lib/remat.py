"""What the backward pass keeps of a network's blocks and what it computes again."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

REMAT = ("none", "convs", "entry", "full", "by_stage")


def rematerialised(function: Callable, remat: str) -> Callable:
    """`function`, of which the backward pass computes again what `remat` does not keep."""
    if remat == "none":
        return function
    kept = {"convs": ("entry", "conv"), "entry": ("entry",)}.get(remat)
    policy = jax.checkpoint_policies.save_only_these_names(*kept) if kept else None
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_recomputing(parts: tuple, unroll: int, params, x: Float[Array, "B ..."], others) -> Float[Array, "B ..."]:
    """x after equal blocks one after another, each a chain of parts; kept for the backward pass is the input of each part.

    A part is a function (own params, the block's x, the output of the part before or None, *own others) -> output; that of the
    last is the next block's x. params, others: stacked on a leading axis; no gradient comes back for others. The same as a scan
    over checkpointed blocks, but what is kept is written where it is computed: a scan copies it into its stack (LOG.md).
    """
    def body(x, scanned):
        return _outputs(parts, x, *scanned)[-1], None

    return jax.lax.scan(body, x, (params, others), unroll=unroll)[0]


def _outputs(parts: tuple, x, params, others) -> list:
    """Of each part of a block."""
    outputs = [None]
    for part in parts:
        outputs.append(part(params, x, outputs[-1], *others))
    return outputs[1:]


def _scan_forward(parts: tuple, unroll: int, params, x, others):
    count = len(jax.tree.leaves(params)[0])

    def body(carry, scanned):
        x, stacks = carry
        index, params, others = scanned
        outputs = _outputs(parts, x, params, others)
        places = [index] * (len(parts) - 1) + [index + 1]
        return (outputs[-1], [_write(*each) for each in zip(stacks, outputs, places, strict=True)]), None

    shapes = jax.eval_shape(functools.partial(_outputs, parts), x, *jax.tree.map(lambda leaf: leaf[0], (params, others)))
    lengths = [count] * (len(parts) - 1) + [count + 1]
    stacks = [jax.ShapeDtypeStruct((n, *out.shape), out.dtype) for n, out in zip(lengths, shapes, strict=True)]
    stacks = _empty_like(stacks, x)
    stacks[-1] = _write(stacks[-1], x, 0)
    (y, stacks), _ = jax.lax.scan(body, (x, stacks), (jnp.arange(count), params, others), unroll=unroll)
    return y, (params, stacks, others)


def _scan_backward(parts: tuple, unroll: int, residuals, gradient):
    params, stacks, others = residuals

    def body(carry, scanned):
        gradient, grads = carry
        index, params, others = scanned
        *inputs, x = (jax.lax.dynamic_index_in_dim(stack, index, keepdims=False) for stack in stacks)
        to_params, to_x = [], []
        for part, before in zip(reversed(parts), [*reversed(inputs), None], strict=True):
            _, pull = jax.vjp(lambda *arguments, part=part: part(*arguments, *others), params, x, before)
            own, direct, gradient = pull(gradient)
            to_params.append(own)
            to_x.append(direct)
        own = jax.tree.map(lambda *own: sum(own), *to_params)
        return (sum(to_x), jax.tree.map(lambda stack, one: _write(stack, one, index), grads, own)), None

    grads = _empty_like(params, gradient)
    scanned = (jnp.arange(len(stacks[-1]) - 1), params, others)
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
