"""The model against the released code's figures, and the properties that make an NFNet one."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from released import released_norms, rule_params

from nfnet_lib import convolution, flops, models
from nfnet_lib.convolution import (
    average_pool,
    convolve,
    for_backend,
    packed_padding,
    packed_weights,
    patches_convolve,
    standardise_weight,
    standardised,
    standardised_convolve,
    using,
)
from nfnet_lib.losses import softmax_cross_entropy
from nfnet_lib.nfnet import GELU_SCALE, Stage, activation, standardised_before
from nfnet_lib.optim import make_optimizer
from nfnet_lib.pretrained import released_names
from nfnet_lib.variants import VARIANTS, get_variant

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tiny.json").read_text())


@pytest.fixture(scope="module")
def tiny():
    with jax.default_matmul_precision("highest"):
        model = models.create("F0-mini", GOLDEN["classes"])
        shape = (GOLDEN["batch"], GOLDEN["res"], GOLDEN["res"], 3)
        images = jnp.asarray(np.random.default_rng(7).standard_normal(shape).astype(np.float32))
        labels = jnp.arange(GOLDEN["batch"]) % GOLDEN["classes"]
        yield model, rule_params(model), images, labels


def jitted(model):
    return jax.jit(model.apply, static_argnames="train")


def loss_of(model, images, labels):
    return lambda params: jnp.mean(softmax_cross_entropy(model.apply(params, images, train=True), labels))


def test_names_and_shapes_are_the_released_ones(tiny):
    model, params, *_ = tiny
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = "/".join(str(p.key) for p in path)
        for name in released_names(model)[path]:
            shapes[name] = list(leaf.shape[1:] if "/rest/" in path else leaf.shape)
    assert shapes == GOLDEN["leaves"]


def test_logits_and_features(tiny):
    model, params, images, _ = tiny
    logits, extra = jax.jit(model.apply_with_features)(params, images)
    np.testing.assert_allclose(logits, GOLDEN["logits"], atol=1e-4, rtol=0)
    assert float(extra["features"].mean()) == pytest.approx(GOLDEN["pool_mean"], abs=1e-5)
    assert float(extra["features"].std()) == pytest.approx(GOLDEN["pool_std"], abs=1e-5)


def test_gradients_and_three_updates(tiny):
    model, params, images, labels = tiny
    gradient = jax.jit(jax.value_and_grad(loss_of(model, images, labels)))
    norms = released_norms(model, gradient(params)[1])
    for name, norm in GOLDEN["grad_norm_at_start"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-3), name
    optimizer = make_optimizer(0.1, weight_decay=2e-5)
    state = optimizer.init(params)

    @jax.jit
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for expected in GOLDEN["losses_before_each_of_3_steps"]:
        loss, grads = gradient(params)
        assert float(loss) == pytest.approx(expected, rel=1e-4)
        params, state = update(grads, state, params)
    norms = released_norms(model, params)
    for name, norm in GOLDEN["param_norm_after_3_steps"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-4), name


@pytest.mark.parametrize("name", [v.name for v in VARIANTS.values() if v.family == "NFNet" and v.published_params])
def test_published_counts(name):
    variant = get_variant(name)
    assert flops.num_params(variant, 1000) == pytest.approx(variant.published_params, rel=1.2e-3)
    assert flops.forward_macs(variant, variant.test_px, 1000) == pytest.approx(variant.published_macs, rel=1.2e-3)


# Parameters (millions, 1,000 classes) and GMACs at 224, 256, 384 and 480 px, counted on the released code's modules;
# of "+" models with the first stage's bottleneck of each rule.
COUNTED = {
    ("F0", "released"): (71.5, 9.49, 12.38, 27.83, 43.48), ("F1", "released"): (132.6, 17.44, 22.76, 51.16, 79.90),
    ("F2", "released"): (193.8, 25.39, 33.14, 74.48, 116.33), ("F3", "released"): (254.9, 33.34, 43.52, 97.80, 152.76),
    ("F4", "released"): (316.1, 41.29, 53.89, 121.12, 189.19), ("F5", "released"): (377.2, 49.24, 64.27, 144.44, 225.62),
    ("F6", "released"): (438.4, 57.19, 74.65, 167.77, 262.05), ("F7", "released"): (499.5, 65.14, 85.03, 191.09, 298.48),
    ("F3+", "published"): (425.1, 56.92, None, 166.97, 260.80), ("F3+", "released"): (423.4, 51.72, None, None, None),
    ("F7+", "published"): (832.9, 111.18, 145.12, 326.12, 509.39), ("F7+", "released"): (829.6, 100.74, None, 295.43, None),
}  # fmt: skip


@pytest.mark.parametrize(("name", "rule"), COUNTED)
def test_counts_at_every_resolution(name, rule):
    variant = get_variant(name)
    params, *macs = COUNTED[name, rule]
    assert round(flops.num_params(variant, 1000, rule) / 1e6, 1) == params
    for px, wanted in zip((224, 256, 384, 480), macs, strict=True):
        counts = flops.count(variant, px, 1000, rule)["macs"]
        assert set(counts) == {"stem", "stage0", "stage1", "stage2", "stage3", "final_conv", "head"}
        if wanted:
            assert sum(counts.values()) / 1e9 == pytest.approx(wanted, abs=0.0051)


@pytest.mark.parametrize("name", ["F0", "F7", "F3+", "F0-mini", "F2+-mini", "F7+-mini", "F0-pico", "F3+-nano"])
@pytest.mark.parametrize("rule", ["published", "released"])
def test_counts_are_those_of_the_parameters(name, rule):
    model = models.create(name, 17, bottleneck_rule=rule)
    sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.param_shapes())]
    assert sum(sizes) == flops.num_params(get_variant(name), 17, rule)


def test_narrower_networks_are_the_mini_with_all_channels_divided():
    def outputs(name):
        leaves = jax.tree_util.tree_leaves_with_path(models.create(name, 8).param_shapes())
        paths = {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        return {path: shape[-1] for path, shape in paths.items() if path.endswith("['w']") and "head" not in path}

    for depth in ("F0", "F3+"):
        wide = outputs(f"{depth}-mini")
        assert len(wide) > 40
        for width, divisor in (("micro", 2), ("nano", 4), ("pico", 8)):
            name = f"{depth}-{width}"
            assert {path: divisor * size for path, size in outputs(name).items()} == wide
            assert get_variant(name).resolution_multiple == 8 and get_variant(name).blocks == get_variant(depth).blocks


def test_unroll_changes_neither_layout_nor_result():
    one, all_ = models.create("F0-mini", 5), models.create("F0-mini", 5, unroll=99)
    assert jax.tree.structure(one.param_shapes()) == jax.tree.structure(all_.param_shapes())
    params = rule_params(one)
    images = jnp.asarray(np.random.default_rng(1).standard_normal((2, 32, 32, 3)), jnp.float32)
    np.testing.assert_allclose(jitted(one)(params, images), jitted(all_)(params, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size,stride,groups,kernel", [
    (7, 1, 2, 3), (8, 2, 4, 3), (5, 2, 2, 3), (1, 1, 2, 3), (2, 1, 2, 3), (3, 2, 1, 1), (7, 1, 1, 3), (2, 1, 1, 3),
    (1, 1, 1, 3), (5, 1, 1, 2), (6, 2, 1, 3),
])  # fmt: skip
def test_every_form_of_a_convolution_is_the_convolution(size, stride, groups, kernel):
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.standard_normal((2, size, size + 3, 8)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((kernel, kernel, 8 // groups, 12)), jnp.float32)

    def library(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    def in_form(form, x, w):
        with using(form):
            return convolve(x, w, stride, groups)

    @functools.partial(jax.jit, static_argnums=0)
    def with_slopes(function, x, w):
        return function(x, w), jax.grad(lambda x, w: jnp.sum(jnp.sin(function(x, w))), argnums=(0, 1))(x, w)

    value, slopes = with_slopes(library, x, w)
    for function in (
        lambda x, w: patches_convolve(x, w, stride, groups),
        lambda x, w: convolve(x, w, stride, groups),
        lambda x, w: in_form("lax", x, w),
        lambda x, w: in_form("split", x, w),
    ):
        own, own_slopes = with_slopes(function, x, w)
        np.testing.assert_allclose(own, value, rtol=1e-4, atol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), own_slopes, slopes)


def test_standardised_weights_have_unit_fan_in():
    w = jnp.asarray(np.random.default_rng(0).normal(3, 5, (3, 3, 8, 6)), jnp.float32)
    out = np.asarray(standardise_weight(w, jnp.full(6, 2.0))).reshape(-1, 6)
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose((out**2).sum(0), 4.0, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_standardisation_has_the_gradient_that_autodiff_finds(backend):
    """Of the formula as it is written, also where the variance is at its floor; each block of a stack by itself."""
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(0.3, 1, (3, 3, 3, 4, 6)), jnp.float32).at[1, ..., 2].mul(1e-5).at[2, ..., 0].set(0.5)
    gain, slope = (jnp.asarray(rng.normal(1, 0.5, shape), jnp.float32) for shape in ((3, 6), w.shape))

    def formula(w, gain):
        mean, fan_in = w.mean((1, 2, 3), keepdims=True), w.shape[1] * w.shape[2] * w.shape[3]
        variance = jnp.maximum(((w - mean) ** 2).mean((1, 2, 3), keepdims=True), 1e-4 / fan_in)
        return (w - mean) / jnp.sqrt(variance * fan_in) * gain[:, None, None, None]

    with for_backend(backend):
        ours, pull = jax.vjp(standardise_weight, w, gain)
        ours = (ours, *pull(slope))
    theirs, pull = jax.vjp(formula, w, gain)
    for own, other in zip(ours, (theirs, *pull(slope)), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("size,stride,groups,kernel", [(5, 1, 1, 1), (5, 1, 2, 3), (6, 2, 4, 3), (1, 1, 2, 3), (4, 2, 1, 3)])
def test_large_weights_are_standardised_after_the_product(size, stride, groups, kernel, monkeypatch):
    """The same values and gradients; what is not differentiated never has standardised weights."""
    rng = np.random.default_rng(size)
    xs = [jnp.asarray(rng.normal(0.3, 1, (2, side, side, 8)), jnp.float32) for side in (size, 1)]
    w = jnp.asarray(rng.normal(0.5, 1, (kernel, kernel, 8 // groups, 100)), jnp.float32).at[..., 3].set(0)
    gain = jnp.asarray(rng.normal(1, 0.5, 100), jnp.float32)

    def loss(outs):
        return sum(jnp.sum(jnp.sin(out)) for out in outs)

    def plain(xs, w, gain):
        return [convolve(x, standardise_weight(w, gain), stride, groups) for x in xs]

    def after(xs, w, gain):
        return standardised_convolve(tuple(xs), w, gain, stride, groups)

    monkeypatch.setattr(convolution, "LARGE", 0)
    slopes = [jax.jit(jax.grad(lambda *a, f=f: loss(f(*a)), argnums=(0, 1, 2)))(xs, w, gain) for f in (after, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *slopes)
    wanted = plain(xs, w, gain)
    monkeypatch.delattr(convolution, "standardise_weight")
    for own, other in zip(after(xs, w, gain), wanted, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5)


def test_average_pool_counts_only_pixels_that_exist():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    np.testing.assert_allclose(average_pool(x)[0, :, :, 0], [[2.0, 3.5], [6.5, 8.0]])


@pytest.mark.parametrize("resolution", [16, 24, 32])
def test_an_example_does_not_depend_on_its_batch(resolution):
    """Found a wrong compilation of average pooling on CPU: 1x1 maps in batches of 128."""
    model = models.create("F0-mini", 5)
    params, images = rule_params(model), jax.random.normal(jax.random.key(1), (128, resolution, resolution, 3))
    apply = jax.jit(model.apply)
    alone = jnp.concatenate([apply(params, images[i : i + 16]) for i in range(0, 128, 16)])
    np.testing.assert_allclose(apply(params, images), alone, atol=1e-5)


def test_fresh_network_is_its_shortcut_path():
    """SkipInit: with zero gains the residual branches, and so their weights, don't matter."""
    model = models.create("F1-mini", 5)
    params = model.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    noise = jax.tree_util.tree_map_with_path(
        lambda path, p: p * 2 if any(str(k.key) == "conv1" for k in path) and "stem" not in str(path[0].key) else p,
        params,
    )
    apply = jitted(model)
    np.testing.assert_array_equal(apply(params, images), apply(noise, images))
    assert float(jnp.std(apply(params, images))) > 0


def test_noise_only_in_training_and_from_the_key():
    model = models.create("F0-mini", 5, stochdepth_rate=0.5, drop_rate=0.5)
    params, images = rule_params(model), jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    quiet, plain = (jitted(m).lower(params, images).as_text() for m in (model, models.create("F0-mini", 5)))
    assert quiet == plain, "but in training it is the same program"
    noisy = jax.jit(functools.partial(model.apply, train=True))
    once = noisy(params, images, key=jax.random.key(2))
    np.testing.assert_array_equal(once, noisy(params, images, key=jax.random.key(2)))
    assert not np.allclose(once, noisy(params, images, key=jax.random.key(3)))
    with pytest.raises(ValueError, match="key"):
        model.apply(params, images, train=True)


def test_stochastic_depth_at_full_rate_drops_the_later_blocks_more():
    """Rate r * index / blocks: the first block is never dropped, whatever the rate."""
    model = models.create("F0-mini", 5, stochdepth_rate=0.999)
    params, images = rule_params(model), jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    only_first = jax.tree_util.tree_map_with_path(
        lambda path, p: p * 0 if str(path[-1].key) == "skip_gain" and str(path[0].key) != "stage0" else p, params
    )
    apply = jitted(model)
    quiet = apply(only_first, images, train=True, key=jax.random.key(0))
    np.testing.assert_array_equal(quiet, apply(only_first, images, train=True, key=jax.random.key(9)))


@pytest.mark.parametrize(
    "arguments,settings,words",
    [
        (("F9",), {}, "F9.*did you mean"),
        (("F0", 0), {}, "num_classes: 0"),
        (("F0",), {"drop_rate": 1.0}, "drop_rate: 1.0"),
        (("F0",), {"dropout": 0.1}, "dropout.*drop_rate"),
        (("F0+",), {"bottleneck_rule": "wide"}, "bottleneck_rule: 'wide'.*released"),
    ],
)
def test_bad_input_is_named(arguments, settings, words):
    with pytest.raises(ValueError, match=words):
        models.create(*arguments, **settings)


@functools.cache
def stage_gradient(remat="none", unroll=1, masked=True, backend="cpu"):
    """Loss and gradient of a small stage of four blocks with these settings, traced as for a backend."""
    graphdef, state = nnx.split(Stage(8, 12, 8, 4, groups=2, stride=2, first_beta=1.0))
    leaves, structure = jax.tree.flatten(state)
    generator = np.random.default_rng(0)  # of NumPy: JAX would compile a program for every shape
    state = jax.tree.unflatten(structure, [np.asarray(generator.standard_normal(p.shape), np.float32) for p in leaves])
    x, masks = jax.random.normal(jax.random.key(1), (3, 8, 8, 8)), jnp.ones((4, 3, 1, 1, 1)).at[2, 1].set(0)
    masks = masks if masked else None

    def loss(state, x):
        if standardised_before():
            weights = standardised(nnx.to_pure_dict(state))
            state = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(weights))
        return jnp.sum(nnx.merge(graphdef, state)(x, masks, unroll=unroll, remat=remat)[0] ** 2)

    with for_backend(backend):
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x)


@pytest.mark.parametrize(
    "settings",
    [
        ("none",), ("convs",), ("convs", 2), ("middle", 1, False), ("entry", 3), ("full",), ("none", 1, True, "tpu"),
        ("entry", 1, True, "tpu"),
    ],
)  # fmt: skip
def test_what_is_kept_for_the_backward_pass_changes_no_number(settings):
    """Against an ordinary scan that keeps everything, which on CPU no setting is."""
    (loss, grads), (expected, plain) = (
        stage_gradient(*settings), stage_gradient(masked=settings[2:3] != (False,), backend="gpu")
    )  # fmt: skip
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("side", [(4, 4), (5, 4), (7, 7), (1, 1)])
def test_pooling_is_the_same_on_every_backend(side):
    x = jax.random.normal(jax.random.key(0), (2, *side, 3))
    weights = jax.random.normal(jax.random.key(1), average_pool(x).shape)

    def both(x):
        return jnp.sum(average_pool(x) * weights)

    value, grad = jax.value_and_grad(both)(x)
    with for_backend("tpu"):
        np.testing.assert_allclose(average_pool(x)[0, 0, 0], x[0, :2, :2].mean((0, 1)), rtol=1e-5)
        other, other_grad = jax.value_and_grad(both)(x)
    assert float(value) == pytest.approx(float(other), rel=1e-5)
    np.testing.assert_allclose(grad, other_grad, rtol=1e-5)


def test_the_activation_and_its_slope_in_closed_form():
    """Against the definition in float64, and against jax's GELU."""
    x = np.linspace(-8, 8, 2001)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    gate, slope = 0.5 * (1 + np.tanh(inner)), 0.5 / np.cosh(inner) ** 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    value, grad = jax.vmap(jax.value_and_grad(activation))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(value, GELU_SCALE * x * gate, atol=2e-6)
    np.testing.assert_allclose(grad, GELU_SCALE * (gate + x * slope), atol=1e-5)
    np.testing.assert_allclose(value, GELU_SCALE * jax.nn.gelu(jnp.asarray(x, jnp.float32)), atol=2e-6)


@pytest.mark.parametrize("side,size", [((32, 48), 2), ((30, 44), 1)])
def test_a_packed_stem_is_the_same_network(side, size):
    """Logits and gradients as traced for a TPU, whose stem is packed where the sides are multiples of 4, and for a GPU."""
    model = models.create("F0-mini", 10)
    params, images = rule_params(model), jax.random.normal(jax.random.key(0), (size, *side, 3))

    def loss(params):
        return jnp.mean(jnp.sin(model.apply(params, images)))

    with for_backend("gpu"):
        plain, grads = jax.jit(jax.value_and_grad(loss))(params)
    with for_backend("tpu"):
        packed, other = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    assert float(packed) == pytest.approx(float(plain), rel=1e-4)
    for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4 * np.abs(two).max() + 1e-9)


@pytest.mark.parametrize("stride,before,after", [(2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 4, 4), (1, 1, 4), (2, 4, 2)])
def test_packed_weights_against_the_plain_convolution(stride, before, after):
    x, w = jax.random.normal(jax.random.key(0), (2, 16, 24, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
    plain = jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def pack(x, by):
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // by, by, width // by, by, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, height // by, width // by, -1)

    step = stride * after if before == 1 else 1
    out = jax.lax.conv_general_dilated(
        pack(x, before), packed_weights(w, stride, before, after), (step, step),
        [packed_padding(3, stride, before, after)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(out, pack(plain, after), rtol=1e-4, atol=1e-4)
