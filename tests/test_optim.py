"""Clipping, schedule, weight decay, SAM and losses against closed forms and independent computations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfnet_lib import models
from nfnet_lib.agc import adaptive_gradient_clip
from nfnet_lib.losses import in_top, softmax_cross_entropy
from nfnet_lib.optim import decay_mask, make_optimizer, update_ema, warmup_cosine


def noise_like(tree, seed, scale=1.0):
    rng = np.random.default_rng(seed)  # of NumPy: JAX would compile a program for every shape
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32), tree)


@pytest.fixture(scope="module")
def params():
    return noise_like(models.create("F1-mini", 7).param_shapes(), 0, 0.3)


def test_stacked_parameters_are_clipped_block_by_block(params):
    grads = noise_like(params, 1)
    clip = adaptive_gradient_clip(0.02, 1e-3)
    stacked, _ = jax.jit(clip.update)(grads, clip.init(params), params)
    one = adaptive_gradient_clip(0.02, 1e-3, stacked=lambda path: False)
    for stage in ("stage1", "stage2"):
        for block in range(2):
            pick = lambda tree, s=stage, b=block: jax.tree.map(lambda x: x[b], tree[s]["rest"])  # noqa: E731
            alone, _ = jax.jit(one.update)(pick(grads), None, pick(params))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), alone, pick(stacked))


def test_a_token_of_a_vit_is_a_vector():
    """And a weight of one input is not: its units are outputs."""
    shapes = {"cls": (1, 1, 50), "vector": (50,), "w": (1, 50)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    grads = {name: jnp.ones(shape) for name, shape in shapes.items()}
    clipped, _ = adaptive_gradient_clip(0.01, 1e-3).update(grads, None, params)
    norms = {name: float(jnp.linalg.norm(leaf)) for name, leaf in clipped.items()}
    assert norms["cls"] == pytest.approx(1e-5) and norms["vector"] == pytest.approx(1e-5)
    assert norms["w"] == pytest.approx(1e-5 * 50**0.5)


def test_unstacked_clipping_is_optax_and_the_head_weight_is_free(params):
    params = {name: params[name] for name in ("stem", "final_conv", "head")}
    grads = noise_like(params, 1)
    ours, _ = jax.jit(adaptive_gradient_clip(0.01, 1e-3).update)(grads, None, params)
    library = optax.adaptive_grad_clip(0.01, 1e-3)
    theirs, _ = jax.jit(library.update)(grads, library.init(params), params)
    np.testing.assert_array_equal(ours["head"]["w"], grads["head"]["w"])
    assert not np.allclose(theirs["head"]["w"], grads["head"]["w"])
    ours["head"].pop("w"), theirs["head"].pop("w")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1.0), st.floats(1e-3, 1.0), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_no_unit_exceeds_its_share(clip, eps, scale, seed):
    params = {"conv": {"w": jax.random.normal(jax.random.key(seed), (3, 3, 2, 4))}}
    grads = jax.tree.map(lambda p: scale * jax.random.normal(jax.random.key(seed + 1), p.shape), params)
    out, _ = adaptive_gradient_clip(clip, eps).update(grads, None, params)
    norm = lambda x: np.linalg.norm(np.asarray(x["conv"]["w"]).reshape(-1, 4), axis=0)  # noqa: E731
    allowed = clip * np.maximum(norm(params), eps)
    assert (norm(out) <= allowed * (1 + 1e-4)).all()
    untouched = norm(grads) <= allowed
    np.testing.assert_array_equal(
        np.asarray(out["conv"]["w"])[..., untouched], np.asarray(grads["conv"]["w"])[..., untouched]
    )


def test_clipping_needs_parameters():
    with pytest.raises(ValueError, match="params"):
        adaptive_gradient_clip().update({"w": jnp.ones(2)}, None)


def test_decay_acts_on_weights_only(params):
    for path, decayed in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        assert decayed == (str(path[-1].key) == "w"), path


def test_first_update_is_nesterov_on_clipped_gradient_plus_decay():
    params = {"head": {"w": jnp.full((2, 3), 2.0), "b": jnp.full(3, 5.0)}}
    grads = {"head": {"w": jnp.full((2, 3), 7.0), "b": jnp.full(3, 1e-4)}}
    optimizer = make_optimizer(0.5, momentum=0.9, weight_decay=0.1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["head"]["w"], -0.5 * 1.9 * (7.0 + 0.1 * 2.0), rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["b"], -0.5 * 1.9 * 1e-4, rtol=1e-5)


def test_schedule_warms_up_peaks_and_ends_at_zero():
    lr = np.array([warmup_cosine(s, 0.8, 10, 110) for s in range(111)])
    assert lr[0] == 0 and lr[110] == pytest.approx(0, abs=1e-7)
    np.testing.assert_allclose(lr[:11], 0.8 * np.arange(11) / 10, rtol=1e-6)
    assert lr[60] == pytest.approx(0.4) and (np.diff(lr[10:]) < 0).all()
    assert warmup_cosine(0, 0.8, 0, 100) == pytest.approx(0.8)


def test_ema_starts_fast_and_ends_at_its_decay():
    first = update_ema({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, jnp.int32(0), 0.99)
    assert float(first["w"][0]) == pytest.approx(0.9)
    late = update_ema({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, jnp.int32(10**6), 0.99)
    assert float(late["w"][0]) == pytest.approx(0.01)


def test_losses_match_optax_and_numpy():
    logits = jax.random.normal(jax.random.key(0), (32, 9))
    labels = jnp.arange(32) % 9
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(softmax_cross_entropy(logits, labels), plain, rtol=1e-5)
    smooth = optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, 9), 0.1))
    np.testing.assert_allclose(softmax_cross_entropy(logits, labels, 0.1), smooth, rtol=1e-5)
    order = np.argsort(-np.asarray(logits), axis=1)
    for k in (1, 5):
        np.testing.assert_array_equal(
            in_top(logits, labels, k), [label in row[:k] for label, row in zip(labels, order, strict=True)]
        )
    assert not in_top(jnp.zeros((1, 9)), jnp.zeros(1, jnp.int32), 5).any(), "a constant model has no hits"


def test_scores_that_are_no_numbers_are_no_hits():
    logits = jnp.asarray([[jnp.nan] * 9, [jnp.nan, *range(8)], [*range(8), jnp.nan]])
    labels = jnp.asarray([0, 8, 8])
    assert in_top(logits, labels, 1).tolist() == [False, False, False]
    assert in_top(logits, labels, 5).tolist() == [False, True, False]
    assert not in_top(jnp.full((2, 4), jnp.nan), jnp.asarray([0, 1]), 5).any(), "of fewer classes than five, too"
