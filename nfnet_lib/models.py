"""`create` builds a model by name; its parameters are a plain nested dict, apart from the model."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from nfnet_lib.nfnet import NFNet
from nfnet_lib.variants import Variant, get_variant

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model definition without parameters.

    variant: its architecture as data. num_classes: outputs of the head. settings: the overrides it was created with.
    """

    variant: Variant
    num_classes: int
    settings: dict[str, Any]
    _graphdef: Any
    _state: Any  # abstract: shapes and dtypes only

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters: a nested dict; the repeated blocks of a stage are stacked on a leading axis.

        All values come from one draw: a draw for each parameter takes ten times as long to compile.
        """
        params, structure = jax.tree.flatten(self._state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        sizes = [math.prod(p.shape) if p.std else 0 for p in params]
        draws = jax.random.normal(key, (sum(sizes),))
        values, start = [], 0
        for p, size in zip(params, sizes, strict=True):
            value = jnp.full(p.shape, p.mean, jnp.float32)
            values.append(value + p.std * draws[start : start + size].reshape(p.shape) if size else value)
            start += size
        return nnx.to_pure_dict(jax.tree.unflatten(structure, values))

    def apply(
        self, params: Params, images: Float[Array, "B H W 3"], *, train: bool = False, key: Key[Array, ""] | None = None
    ) -> Float[Array, "B K"]:
        """Float32 logits [B, num_classes] of normalised NHWC images. train=True: stochastic depth and dropout, from key."""
        return self.apply_with_features(params, images, train=train, key=key)[0]

    def apply_with_features(
        self, params: Params, images: Float[Array, "B H W 3"], *, train: bool = False, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B K"], dict[str, Array]]:
        """Logits, and {"features": pooled features [B, C], "signals": [blocks, 3] (see nfnet.signal_figures)}."""
        state = jax.tree.unflatten(jax.tree.structure(self._state), jax.tree.leaves(params))
        return nnx.merge(self._graphdef, state)(images, train=train, key=key)

    def param_shapes(self) -> Params:
        """The nested dict of `init` with jax.ShapeDtypeStruct leaves; nothing is computed."""
        return nnx.to_pure_dict(self._state)


def create(name: str, num_classes: int = 1000, **settings: Any) -> Model:
    """The model called `name` (see variants.VARIANTS).

    settings: stochdepth_rate, drop_rate (rates in [0, 1), default 0), bottleneck_rule ("published" | "released"),
    dtype of the activations (default float32), unroll (blocks a scan step). ValueError for an unknown name, setting
    or a value out of range.
    """
    variant = get_variant(name)
    known = ("stochdepth_rate", "drop_rate", "bottleneck_rule", "dtype", "unroll")
    for key in settings:
        if key not in known:
            raise ValueError(f"{key}: not a setting of a model; known: {', '.join(known)}")
    if num_classes < 1:
        raise ValueError(f"num_classes: {num_classes} is not at least 1")
    for rate in ("stochdepth_rate", "drop_rate"):
        if not 0 <= settings.get(rate, 0) < 1:
            raise ValueError(f"{rate}: {settings[rate]} is not in [0, 1)")
    variant.bottleneck(0, settings.get("bottleneck_rule", "published"))

    graphdef, state = nnx.split(nnx.eval_shape(lambda: NFNet(variant, num_classes, **settings)))
    return Model(variant, num_classes, settings, graphdef, state)


def signal_table(
    name: str, *, skip_gain: float = 1.0, resolution: int | None = None, batch_size: int = 16, seed: int = 0
):
    """Signal figures of each block of a freshly initialised variant on random normal images, as a DataFrame.

    Columns: block, stage, mean_squared, variance, branch_variance (`nfnet.signal_figures`). skip_gain replaces the
    SkipInit gains, which are 0 in a fresh network and would hide the branches.
    """
    import pandas as pd

    model = create(name, num_classes=10)
    init_key, image_key = jax.random.split(jax.random.key(seed))
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.full_like(p, skip_gain) if str(path[-1].key) == "skip_gain" else p, model.init(init_key)
    )
    side = resolution or model.variant.train_px
    images = jax.random.normal(image_key, (batch_size, side, side, 3))
    signals = jax.jit(lambda p, x: model.apply_with_features(p, x)[1]["signals"])(params, images)
    stages = [stage for stage, depth in enumerate(model.variant.depth) for _ in range(depth)]
    table = pd.DataFrame(jax.device_get(signals), columns=["mean_squared", "variance", "branch_variance"])
    table.insert(0, "stage", stages)
    table.insert(0, "block", range(len(stages)))
    return table


def signal_sentence(table) -> str:
    """What a signal table shows, in one sentence."""
    low, high = table["variance"].min(), table["variance"].max()
    return (
        f"Over {len(table)} blocks the mean channel variance stays between {low:.2f} and {high:.2f}, the residual "
        f"branches' between {table['branch_variance'].min():.2f} and {table['branch_variance'].max():.2f}."
    )
