"""ViTs: published counts, big_vision's numbers by an independent model with big_vision's own modules, and resampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from flax import linen as nn
from flax import traverse_util

from nfnet_lib import flops, models
from nfnet_lib.big_vision import load_big_vision
from nfnet_lib.convolution import for_backend
from nfnet_lib.pretrained import WeightsError
from nfnet_lib.variants import VARIANTS, ViTVariant, get_variant
from nfnet_lib.vit import resample_positions, sincos_positions
from nfnet_lib.weights import transfer

FULL = [name for name, variant in VARIANTS.items() if isinstance(variant, ViTVariant) and variant.published_params]


class LinenMLP(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(self.hidden)(x))  # first, so that it is Dense_0
        return nn.Dense(x.shape[-1])(y)


class LinenBlock(nn.Module):
    heads: int
    mlp: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y)
        return x + LinenMLP(self.mlp, name="MlpBlock_0")(nn.LayerNorm()(x))


class LinenEncoder(nn.Module):
    depth: int
    heads: int
    mlp: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = LinenBlock(self.heads, self.mlp, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class LinenMAPHead(nn.Module):
    heads: int
    mlp: int

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
        x = nn.MultiHeadDotProductAttention(num_heads=self.heads)(jnp.tile(probe, (len(x), 1, 1)), x)
        return (x + LinenMLP(self.mlp, name="MlpBlock_0")(nn.LayerNorm()(x)))[:, 0]


class LinenViT(nn.Module):
    """The oracle: Flax's own modules under big_vision's names."""

    variant: ViTVariant
    classes: int
    pool: str
    position: str

    @nn.compact
    def __call__(self, images):
        v = self.variant
        x = nn.Conv(v.width, (v.patch, v.patch), strides=(v.patch, v.patch), padding="VALID", name="embedding")(images)
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows * columns, width)
        if self.position == "learned":
            x = x + self.param("pos_embedding", nn.initializers.normal(0.5), (1, rows * columns, width))
        else:
            x = x + sincos_positions(rows, columns, width)
        if self.pool == "tok":
            cls = self.param("cls", nn.initializers.normal(0.5), (1, 1, width))
            x = jnp.concatenate([jnp.tile(cls, (batch, 1, 1)), x], axis=1)
        x = LinenEncoder(v.depth, v.heads, v.mlp, name="Transformer")(x)
        if self.pool == "map":
            x = LinenMAPHead(v.heads, v.mlp, name="MAPHead_0")(x)
        else:
            x = x.mean(1) if self.pool == "gap" else x[:, 0]
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.1), name="head")(x)


@functools.cache
def oracle_of(name, classes, pool, position, size):
    """The oracle's function of parameters and images, compiled once, and {name: shape and type} of its parameters."""
    oracle = LinenViT(get_variant(name), classes, pool, position)
    shapes = jax.eval_shape(oracle.init, jax.random.key(0), jnp.zeros((2, size, size, 3)))["params"]
    return jax.jit(oracle.apply), traverse_util.flatten_dict(shapes, sep="/")


def checkpoint(path, name, *, pool="gap", position="learned", size=32, classes=11, seed=0, prefix="params/", edit=None):
    """Writes the oracle's parameters as big_vision would; returns images and the oracle's logits."""
    apply, shapes = oracle_of(name, classes, pool, position, size)
    images = jax.random.normal(jax.random.key(seed), (2, size, size, 3))
    rng, flat = np.random.default_rng(seed + 2), {}
    for key, leaf in shapes.items():  # biases are not 0, scales not 1
        scale = 0.02 if leaf.ndim == 1 else (leaf.size / leaf.shape[-1]) ** -0.5
        noise = np.float32(scale) * rng.standard_normal(leaf.shape, np.float32)
        flat[key] = noise + np.float32(key.endswith("scale"))
    saved = {prefix + key: value for key, value in flat.items()}
    np.savez(path, **(edit(saved) if edit else saved))
    with jax.default_matmul_precision("highest"):
        return images, apply({"params": traverse_util.unflatten_dict(flat, sep="/")}, images)


@pytest.mark.parametrize(
    ("name", "pool", "position", "prefix"),
    [
        ("Ti/4-mini", "gap", "learned", "params/"), ("S/4-mini", "map", "learned", ""),
        ("B/4-mini", "tok", "sincos2d", "opt/target/"), ("L/4-mini", "map", "sincos2d", "params/img/"),
        ("Ti/16", "map", "learned", "params/"),
    ],
)  # fmt: skip
def test_a_big_vision_checkpoint_gives_its_logits(tmp_path, name, pool, position, prefix):
    images, wanted = checkpoint(
        tmp_path / "vit.npz", name, pool=pool, position=position, prefix=prefix, size=48 if name == "Ti/16" else 32
    )
    variant, params = load_big_vision(tmp_path / "vit.npz")
    assert variant == name and variant.num_classes == 11
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(models.create(variant).apply)(params, images)
    np.testing.assert_allclose(logits, wanted, atol=2e-5 * float(jnp.std(wanted)) + 1e-5)


def test_an_optimizer_s_moments_beside_the_weights_are_not_taken_for_them(tmp_path):
    def with_moments(flat):
        return {f"opt/0/mu/{name.removeprefix('params/')}": np.zeros_like(value) for name, value in flat.items()} | flat

    def moments_alone(flat):
        return {name.replace("params/", f"opt/0/{m}/"): value for name, value in flat.items() for m in ("mu", "nu")}

    checkpoint(tmp_path / "vit.npz", "Ti/4-mini")
    checkpoint(tmp_path / "whole.npz", "Ti/4-mini", edit=with_moments)
    wanted, found = (load_big_vision(tmp_path / name)[1] for name in ("vit.npz", "whole.npz"))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    checkpoint(tmp_path / "moments.npz", "Ti/4-mini", edit=moments_alone)
    with pytest.raises(WeightsError, match="which are the weights, of 'opt/0/mu/', 'opt/0/nu/'"):
        load_big_vision(tmp_path / "moments.npz")


def test_old_stacked_and_half_precision_files_are_read(tmp_path):
    images, wanted = checkpoint(tmp_path / "a.npz", "S/4-mini", pool="tok", prefix="")

    def old(flat):
        renamed = {}
        for name, array in flat.items():
            for now, then in (("LayerNorm_1/", "LayerNorm_2/"), ("MlpBlock_0/", "MlpBlock_3/"),
                              ("MultiHeadDotProductAttention_0/", "MultiHeadDotProductAttention_1/")):  # fmt: skip
                name = name.replace(now, then)
            renamed[name] = array
        positions = renamed.pop("pos_embedding")
        first = np.full_like(positions[:, :1], 0.25)  # the class token's own position
        renamed["Transformer/posembed_input/pos_embedding"] = np.concatenate([first, positions], axis=1)
        renamed["cls"] = renamed["cls"] - first
        return renamed

    checkpoint(tmp_path / "old.npz", "S/4-mini", pool="tok", prefix="", edit=old)

    def stacked(flat):
        blocks = sorted({name.split("/")[1] for name in flat if "encoderblock" in name})
        inner = {name.split("/", 2)[2] for name in flat if "encoderblock_0/" in name}
        kept = {name: array for name, array in flat.items() if "encoderblock" not in name}
        return kept | {
            f"Transformer/encoderblock/{name}": np.stack([flat[f"Transformer/{block}/{name}"] for block in blocks])
            for name in inner
        }

    checkpoint(tmp_path / "stacked.npz", "S/4-mini", pool="tok", prefix="", edit=stacked)

    def half(flat):
        return {name: np.asarray(jnp.asarray(array, jnp.bfloat16)).view("V2") for name, array in flat.items()}

    checkpoint(tmp_path / "half.npz", "S/4-mini", pool="tok", prefix="", edit=half)
    for file, tolerance in (("a", 1e-4), ("old", 1e-4), ("stacked", 1e-4), ("half", 0.1)):
        variant, params = load_big_vision(tmp_path / f"{file}.npz")
        logits = jax.jit(models.create(variant).apply)(params, images)
        np.testing.assert_allclose(logits, wanted, atol=tolerance * float(jnp.std(wanted)), err_msg=file)


def test_damaged_files_are_named(tmp_path):
    def drop(flat):
        del flat["params/Transformer/encoderblock_1/MlpBlock_0/Dense_1/bias"]
        return flat

    def deeper(flat):
        more = {name.replace("block_0/", "block_9/"): array for name, array in flat.items() if "block_0/" in name}
        return flat | more

    def headless(flat):
        return {name: array for name, array in flat.items() if "head/" not in name}

    for edit, message in ((drop, "Dense_1/bias is missing"), (deeper, "no ViT has width 60, depth 4, MLP 240, 4 heads|block_9"),
                          (headless, "has no head")):  # fmt: skip
        checkpoint(tmp_path / "vit.npz", "Ti/4-mini", edit=edit)
        with pytest.raises(WeightsError, match=message):
            load_big_vision(tmp_path / "vit.npz")
    variant, params = load_big_vision(tmp_path / "vit.npz", num_classes=4)
    assert variant.num_classes == 4 and not params["head"]["w"].any()
    whole = (tmp_path / "vit.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"cut\.npz"):
        load_big_vision(tmp_path / "cut.npz")


@pytest.mark.parametrize("name", FULL)
def test_counts_are_the_published_ones(name):
    variant = get_variant(name)
    counts = flops.count(variant, 224)
    with_head = sum(counts["params"].values())
    body = with_head - counts["params"]["head"]
    # The tables round to whole millions (22 for S/16) and do not say whether a head is counted.
    assert min(abs(body / variant.published_params - 1), abs(with_head / variant.published_params - 1)) < 0.01
    assert flops.vit_gflops(variant, variant.test_px) == pytest.approx(2 * variant.published_macs / 1e9, rel=0.005)
    at_224 = {"Ti/16": 2.5, "S/16": 9.2, "B/16": 35.1, "L/16": 122.9, "So400m/14": 221, "g/14": 533.1, "G/14": 965.3}
    assert flops.vit_gflops(variant, 224) == pytest.approx(at_224[name], rel=0.01, abs=0.05)  # printed to 0.1


@pytest.mark.parametrize("settings", [{}, {"pool": "map"}, {"pool": "tok", "position": "sincos2d"}])
@pytest.mark.parametrize("name", ["Ti/4-mini", "L/4-mini", "S/16"])
def test_counted_parameters_are_the_model_s(name, settings):
    model = models.create(name, 10, image_size=64, **settings)
    total = sum(leaf.size for leaf in jax.tree.leaves(model.param_shapes()))
    assert total == flops.num_params(model.variant, 10, resolution=64)


def test_minis_cost_what_their_nfnets_cost():
    for vit, nfnet in (("Ti/4", "F0"), ("S/4", "F1"), ("B/4", "F3"), ("L/4", "F7")):
        macs = [flops.forward_macs(get_variant(f"{name}-mini"), 32, 64) for name in (vit, nfnet)]
        assert macs[0] == pytest.approx(macs[1], rel=0.03)


def test_a_fresh_head_is_zero_and_stochastic_depth_and_dropout_need_a_key():
    model = models.create("Ti/4-mini", 7, stochdepth_rate=0.5, drop_rate=0.5)
    params = model.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (3, 32, 32, 3))
    assert not model.apply(params, images).any()
    with pytest.raises(ValueError, match="key"):
        model.apply(params, images, train=True)
    params["head"]["w"] = jax.random.normal(jax.random.key(2), params["head"]["w"].shape)
    outputs = [model.apply(params, images, train=True, key=jax.random.key(i)) for i in range(2)]
    assert not jnp.allclose(*outputs)


def test_what_is_kept_for_the_backward_pass_changes_no_number():
    """With stochastic depth: against an ordinary scan that keeps everything, which on CPU no setting is."""

    def gradient(**settings):
        model = models.create("Ti/4-mini", 5, image_size=16, pool="tok", stochdepth_rate=0.5, **settings)
        leaves, structure = jax.tree.flatten(model.param_shapes())
        generator = np.random.default_rng(0)  # of NumPy: JAX would compile a program for every shape
        params = [np.asarray(0.3 * generator.standard_normal(leaf.shape), np.float32) for leaf in leaves]
        images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))

        def loss(params):
            return jnp.sum(model.apply(params, images, train=True, key=jax.random.key(2)) ** 2)

        return jax.jit(jax.value_and_grad(loss))(jax.tree.unflatten(structure, params))

    with for_backend("gpu"):
        expected, compared = gradient(remat="none")
    assert jnp.max(jnp.abs(compared["blocks"]["attention"]["key"].pop("b"))) < 1e-5
    for settings in ({}, {"remat": "convs", "unroll": 2}, {"remat": "full"}):
        loss, grads = gradient(**settings)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        del grads["blocks"]["attention"]["key"]["b"]  # a softmax does not see it: rounding alone
        for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(compared), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


def test_positions_resample_as_big_vision_does():
    grid = np.random.default_rng(0).standard_normal((1, 36, 5)).astype(np.float32)
    for rows, columns in ((6, 6), (9, 9), (4, 7), (1, 3)):
        out = resample_positions(jnp.asarray(grid), rows, columns)
        wanted = scipy.ndimage.zoom(grid.reshape(6, 6, 5), (rows / 6, columns / 6, 1), order=1)
        np.testing.assert_allclose(out.reshape(rows, columns, 5), wanted, atol=1e-5)


def test_another_resolution_and_pixels_beyond_the_last_patch():
    model = models.create("Ti/4-mini", 5, image_size=32)
    params = model.init(jax.random.key(0))
    params["head"]["w"] = jax.random.normal(jax.random.key(2), params["head"]["w"].shape)
    images = jax.random.normal(jax.random.key(1), (2, 50, 50, 3))
    np.testing.assert_array_equal(model.apply(params, images), model.apply(params, images[:, :48, :48]))
    larger = models.create("Ti/4-mini", 5, image_size=48)
    moved = transfer(params, larger.init(jax.random.key(3))) | {"head": params["head"]}
    np.testing.assert_allclose(
        larger.apply(moved, images), model.apply(params, images), atol=1e-5
    )  # resampled once, or where it is applied


def test_settings_of_the_other_family_are_refused():
    with pytest.raises(ValueError, match="bottleneck_rule: not a setting of ViTs"):
        models.create("Ti/4-mini", bottleneck_rule="published")
    with pytest.raises(ValueError, match="pool: not a setting of NFNets"):
        models.create("F0", pool="gap")
    with pytest.raises(ValueError, match="pool: 'mean' is not one of gap, map, tok"):
        models.create("S/16", pool="mean")


def test_weights_for_other_pixels_are_fine_tuned_as_what_they_are(tmp_path):
    """A big_vision file expects pixels in [-1, 1]; a run normalises by channel: the patch embedding takes up the change."""
    from nfnet_lib.config import FinetuneConfig
    from nfnet_lib.finetune import finetune_config
    from nfnet_lib.step import normalise
    from nfnet_lib.weights import load_pretrained

    checkpoint(tmp_path / "vit.npz", "Ti/4-mini", pool="tok")
    variant, params = load_big_vision(tmp_path / "vit.npz")
    config = FinetuneConfig(variant="Ti/4-mini", pool="tok", pretrained_weights=str(tmp_path / "vit.npz"))
    moved = load_pretrained(config, tmp_path, 11)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8))
    model = models.create(variant)
    wanted, found = (model.apply(p, normalise(images, kind)) for p, kind in ((params, "unit"), (moved, "imagenet")))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0)
    without = tmp_path / "headless.npz"
    checkpoint(without, "Ti/4-mini", edit=lambda flat: {name: array for name, array in flat.items() if "head/" not in name})
    config = finetune_config(without, "digits", batch_size=16, resolution=32)
    assert load_pretrained(config, tmp_path, 10)["head"]["w"].shape[-1] == 10
