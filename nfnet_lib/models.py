"""`create` builds a model by name; its parameters are a plain nested dict, apart from the model."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from nfnet_lib import convolution
from nfnet_lib.compiler import options
from nfnet_lib.kept import REMAT
from nfnet_lib.nfnet import WHOLE, NFNet, Part, standardised_before
from nfnet_lib.variants import (
    BOTTLENECK_RULES,
    POOLS,
    POSITIONS,
    LoadedVariant,
    Variant,
    ViTVariant,
    get_variant,
)
from nfnet_lib.vit import ViT

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)  # each model is itself, so that JAX can tell whose program it has compiled
class Model:
    """A model definition without parameters.

    variant: its architecture as data. num_classes: outputs of the head. settings: the overrides it was created with.
    """

    variant: Variant | ViTVariant
    num_classes: int
    settings: dict[str, Any]
    _graphdef: Any
    _state: Any  # abstract: shapes and dtypes only

    @functools.partial(jax.jit, static_argnums=0)  # a third of the time that it takes operation by operation
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
        return self._call(params, images, train=train, key=key)[0]

    def apply_with_features(
        self, params: Params, images: Float[Array, "B H W 3"], *, train: bool = False, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B K"], dict[str, Array]]:
        """Logits, and {"features": pooled features [B, C], "signals": [blocks, 3] (see nfnet.signal_figures)}."""
        return self._call(params, images, train=train, key=key, signals=True)

    def _call(self, params: Params, images: Array, **options):
        return self._network(self.narrowed(self.standardised(params)), images, **options)

    def standardised(self, params: Params) -> Params:
        """The parameters with convolutions' weights standardised, float32 (`convolution.standardised`).

        As they are where the network does that itself (`nfnet.standardised_before`), and a ViT's.
        """
        if self.variant.family != "NFNet" or not standardised_before():
            return params
        with jax.named_scope("weights"):
            return convolution.standardised(params)

    def narrowed(self, weights: Params) -> Params:
        """Standardised weights in the activations' type but for the head's: half the bytes to send to other devices."""
        if not standardised_before():
            return weights
        return convolution.narrowed(weights, self.settings.get("dtype", jnp.float32))

    def apply_standardised(
        self, weights: Params, images: Float[Array, "B H W 3"], *, train: bool = False, key: Key[Array, ""] | None = None,
        part: Part = WHOLE,
    ) -> Float[Array, "B K"]:  # fmt: skip
        """`apply` with weights of `standardised`. part: (which, of how many) equal parts of a batch the images are."""
        return self._network(weights, images, train=train, key=key, part=part)[0]

    def _network(self, weights: Params, images: Array, **options):
        state = jax.tree.unflatten(jax.tree.structure(self._state), jax.tree.leaves(weights))
        return nnx.merge(self._graphdef, state)(images, **options)

    def param_shapes(self) -> Params:
        """The nested dict of `init` with jax.ShapeDtypeStruct leaves; nothing is computed."""
        return nnx.to_pure_dict(self._state)


_SETTINGS = {
    "NFNet": ("stochdepth_rate", "drop_rate", "bottleneck_rule", "dtype", "unroll", "remat"),
    "ViT": ("stochdepth_rate", "drop_rate", "image_size", "pool", "position", "dtype", "unroll", "remat"),
}
_CHOICES = {"bottleneck_rule": BOTTLENECK_RULES, "pool": POOLS, "position": POSITIONS, "remat": REMAT}


def create(name: str, num_classes: int | None = None, **settings: Any) -> Model:
    """The model called `name` (see variants.VARIANTS), with 1,000 classes unless said; of loaded weights, with theirs.

    settings: stochdepth_rate, drop_rate (rates in [0, 1), default 0), dtype of the activations (default float32), unroll
    (blocks a scan step), remat (what the backward pass computes again of a block: "none", "convs": all but the convolutions,
    "middle" and "entry": all but the first two or one of them, "full": everything, "by_stage": what costs fewest cycles on TPU
    v4, see `kept.by_stage`; of a ViT's blocks "convs" and "by_stage" keep `kept.ENCODER_KEPT`, "entry", "middle" and "full"
    nothing); of NFNets bottleneck_rule ("published" | "released"); of ViTs image_size (pixels, of the learned position grid),
    pool ("gap" | "map" | "tok", default as published), position ("learned" | "sincos2d"). ValueError for an
    unknown name, a setting that the family does not have, or a value out of range.
    """
    variant = get_variant(name)
    if isinstance(name, LoadedVariant):
        num_classes = name.num_classes if num_classes is None else num_classes
        settings = name.settings | settings
    num_classes = 1000 if num_classes is None else num_classes
    known = _SETTINGS[variant.family]
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{key}: not a setting of {variant.family}s; known: {', '.join(known)}")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ValueError(f"{key}: {value!r} is not one of {', '.join(_CHOICES[key])}")
    if num_classes < 1:
        raise ValueError(f"num_classes: {num_classes} is not at least 1")
    for rate in ("stochdepth_rate", "drop_rate"):
        if not 0 <= settings.get(rate, 0) < 1:
            raise ValueError(f"{rate}: {settings[rate]} is not in [0, 1)")
    if settings.get("image_size", variant.train_px) < variant.resolution_multiple:
        raise ValueError(f"image_size: {settings['image_size']} px is less than a patch of {name}")
    network, arguments = NFNet, settings
    if isinstance(variant, ViTVariant):
        choices = {key: value for key, value in settings.items() if key in ("pool", "position")}
        network, variant = ViT, dataclasses.replace(variant, **choices)
        arguments = {key: value for key, value in settings.items() if key not in choices}

    graphdef, state = nnx.split(nnx.eval_shape(lambda: network(variant, num_classes, **arguments)))
    return Model(variant, num_classes, settings, graphdef, state)


def signal_table(
    name: str, *, params: Params | None = None, skip_gain: float = 1.0, resolution: int | None = None,
    batch_size: int = 16, seed: int = 0,
):  # fmt: skip
    """Signal figures of each block of a variant on random normal images, as a DataFrame.

    Columns: block, stage, mean_squared, variance, branch_variance (`nfnet.signal_figures`). params: loaded weights, of a
    `name` from `weights.load_weights`; by default fresh ones, with skip_gain in place of the SkipInit gains, which are 0
    in a fresh network and would hide the branches.
    """
    import pandas as pd

    model = create(name)
    init_key, image_key = jax.random.split(jax.random.key(seed))
    if params is None:
        params = jax.tree_util.tree_map_with_path(
            lambda path, p: jnp.full_like(p, skip_gain) if str(path[-1].key) == "skip_gain" else p, model.init(init_key)
        )
    side = resolution or model.variant.train_px
    images = jax.random.normal(image_key, (batch_size, side, side, 3))
    signals = jax.jit(lambda p, x: model.apply_with_features(p, x)[1]["signals"], compiler_options=options(soon=True))
    depths = model.variant.depth if model.variant.family == "NFNet" else [model.variant.depth]
    stages = [stage for stage, depth in enumerate(depths) for _ in range(depth)]
    table = pd.DataFrame(jax.device_get(signals(params, images)), columns=["mean_squared", "variance", "branch_variance"])
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
