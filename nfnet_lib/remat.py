"""What the backward pass keeps of a network's blocks and what it computes again."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nfnet_lib.variants import STAGE_STRIDES, STEM_STRIDE, Variant

KEPT = {  # of a block's outputs but for the last, by `remat`
    "convs": ("entry", "middle", "last", "pooled"),
    "middle": ("entry", "middle", "pooled"),
    "entry": ("entry",),
    "full": (),
}
REMAT = ("none", *KEPT, "by_stage")
_SCANNED = ("middle", "entry", "entry", "entry")  # of each stage what costs fewest cycles on TPU v4 in a scan (LOG.md)
_MOST_UNROLLED = 6  # blocks of a stage: each takes seconds to compile
_MOST_KEPT = 8 * 2**30  # bytes of all stages that are kept whole


def kept_bytes(
    variant: Variant, stage: int, images: int, height: int, width: int, remat: str, bottleneck_rule: str = "published"
) -> float:  # fmt: skip
    """Bytes of bfloat16 that the backward pass needs of a stage (0 to 3) with outputs of this size in pixels: an estimate.

    Of each block its input and the maps of KEPT, or ("none") of each activation its value and slope, and the last convolution's
    output.
    """
    outputs, narrow = variant.width[stage], variant.bottleneck(stage, bottleneck_rule)
    maps = [name for name in KEPT.get(remat, ()) if name != "pooled"]
    channels = 3 * outputs + 6 * narrow if remat == "none" else outputs + len(maps) * narrow
    return 2.0 * images * variant.depth[stage] * height * width * channels


def by_stage(
    variant: Variant, images: int, height: int, width: int, bottleneck_rule: str = "published"
) -> tuple[str, ...]:  # fmt: skip
    """`remat` of each stage with the fewest cycles on TPU v4, for a device's share of images of this size in pixels.

    Without a scan's stacks keeping everything is cheapest ("none"): short stages are unrolled as long as that fits (LOG.md).
    """
    chosen, room = [], _MOST_KEPT
    height, width = -(-height // STEM_STRIDE), -(-width // STEM_STRIDE)
    for stage, stride in enumerate(STAGE_STRIDES):
        height, width = -(-height // stride), -(-width // stride)
        whole = kept_bytes(variant, stage, images, height, width, "none", bottleneck_rule)
        fits = variant.depth[stage] <= _MOST_UNROLLED and whole <= room
        chosen.append("none" if fits else _SCANNED[stage])
        room -= whole if fits else 0
    return tuple(chosen)


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
