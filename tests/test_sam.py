"""SAM: closed form, equal to explicit loops on any number of devices, and to optax where the two mean the same."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnet_lib.sam import sam_gradient


def quadratic(params, batch, key):
    loss = 0.5 * jnp.sum(batch * params["w"] ** 2)
    return loss, {"key": jax.random.key_data(key)}


def network(params, batch, key):
    """Two layers with dropout on [B, 5] inputs: mean loss, and the mask's sum."""
    x, y = batch
    hidden = jnp.tanh(x @ params["a"])
    keep = jax.random.bernoulli(key, 0.8, hidden.shape)
    loss = jnp.mean((jnp.where(keep, hidden, 0) @ params["b"] - y) ** 2)
    return loss, jnp.sum(keep)


def smooth(params, batch, key):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2), None


def problem(seed, rows=16):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {"a": jax.random.normal(keys[0], (5, 7)), "b": jax.random.normal(keys[1], (7,))}
    return params, (jax.random.normal(keys[2], (rows, 5)), jax.random.normal(keys[3], (rows,)))


def by_hand(loss_fn, params, ascent, descent, keys, rho):
    """SAM in NumPy, but for the gradients."""
    gradient = jax.grad(lambda p, b, k: loss_fn(p, b, k)[0])
    first = jax.device_get(gradient(params, ascent, keys[0]))
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(first)))
    moved = jax.tree.map(lambda p, g: p + rho * g / norm, jax.device_get(params), first)
    return gradient(moved, descent, keys[1])


def assert_close(ours, theirs, rtol=1e-5):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(other))))


def test_on_a_quadratic_it_has_its_closed_form():
    params, curvature = {"w": jnp.array([1.0, -2.0, 0.5])}, jnp.array([3.0, 1.0, 0.2])
    (loss, _), grads = sam_gradient(quadratic, params, curvature, jax.random.key(0), 0.3)
    g = np.asarray(curvature * params["w"])
    np.testing.assert_allclose(grads["w"], curvature * (params["w"] + 0.3 * g / np.linalg.norm(g)), rtol=1e-5)
    assert float(loss) == pytest.approx(float(quadratic(params, curvature, jax.random.key(0))[0]))


@pytest.mark.parametrize("fraction", [1.0, 0.2])
def test_rho_zero_is_the_plain_gradient_to_the_bit(fraction):
    params, batch = problem(0)
    (loss, aux), grads = sam_gradient(network, params, batch, jax.random.key(1), 0.0, ascent_fraction=fraction)
    (plain, mask), expected = jax.value_and_grad(network, has_aux=True)(params, batch, jax.random.key(1))
    assert float(loss) == float(plain) and int(aux) == int(mask)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("seed,fraction,rows", [(0, 1.0, 16), (1, 0.2, 20), (2, 0.5, 7), (3, 0.01, 16)])
def test_it_is_two_gradients_with_two_dropout_keys(seed, fraction, rows):
    params, batch = problem(seed, rows)
    key = jax.random.key(seed)
    (loss, aux), grads = sam_gradient(network, params, batch, key, 0.1, ascent_fraction=fraction)
    part = jax.tree.map(lambda x: x[: max(1, round(fraction * rows))], batch)
    keys = jax.random.split(key)
    assert_close(grads, by_hand(network, params, part, batch, keys, 0.1))
    clean, mask = network(params, part, keys[0])
    assert float(loss) == pytest.approx(float(clean), rel=1e-6) and int(aux) == int(mask)
    assert float(network(params, batch, keys[0])[0]) != float(network(params, batch, keys[1])[0])


def test_it_agrees_with_optax_in_opaque_mode():
    params, batch = problem(5)
    theirs = optax.contrib.sam(
        optax.sgd(1.0), optax.chain(optax.contrib.normalize(), optax.sgd(0.07)), sync_period=2, opaque_mode=True
    )
    gradient = jax.grad(lambda p: smooth(p, batch, None)[0])
    updates, _ = theirs.update(gradient(params), theirs.init(params), params, grad_fn=lambda p, i: gradient(p))
    _, grads = sam_gradient(smooth, params, batch, jax.random.key(0), 0.07)
    assert_close(jax.tree.map(jnp.negative, updates), grads)


def test_a_zero_gradient_perturbs_nothing_and_bad_values_are_refused():
    params = {"w": jnp.zeros(3)}
    for fraction in (1.0, 0.4):
        _, grads = sam_gradient(quadratic, params, jnp.ones(3), jax.random.key(0), 0.1, ascent_fraction=fraction)
        np.testing.assert_array_equal(grads["w"], 0)
    with pytest.raises(ValueError, match="rho: -1"):
        sam_gradient(quadratic, params, jnp.ones(3), jax.random.key(0), -1)
    for fraction in (0, 1.5):
        with pytest.raises(ValueError, match=f"ascent_fraction: {fraction}"):
            sam_gradient(quadratic, params, jnp.ones(3), jax.random.key(0), 0.1, ascent_fraction=fraction)


DEVICES = """
import sys
sys.path[:0] = ['tests', '.']
from test_sam import *
from jax.sharding import Mesh, PartitionSpec as P

count = int(sys.argv[1])
assert jax.device_count() == count
mesh = Mesh(np.array(jax.devices()), ('data',))
for seed, fraction, synchronised in ((0, 1.0, False), (1, 0.5, False), (2, 1.0, True)):
    params, batch = problem(seed, 32)
    key = jax.random.key(seed)

    def sharded(params, batch):
        (loss, _), grads = sam_gradient(network, params, batch, key, 0.05, ascent_fraction=fraction, axis_name='data',
                                        synchronised=synchronised)
        return loss, grads

    loss, grads = jax.jit(jax.shard_map(sharded, mesh=mesh, in_specs=(P(), P('data')), out_specs=P()))(params, batch)
    rows, keys = 32 // count, jax.random.split(key)
    own = [jax.tree.map(lambda x: x[i * rows : (i + 1) * rows], batch) for i in range(count)]
    part = [jax.tree.map(lambda x: x[: max(1, round(fraction * rows))], b) for b in own]
    mean = lambda trees: jax.tree.map(lambda *leaves: sum(leaves) / count, *trees)
    gradient = jax.jit(jax.grad(lambda p, b, k: network(p, b, k)[0]))
    ascents = [gradient(params, p, keys[0]) for p in part]
    if synchronised:
        ascents = [mean(ascents)] * count
    moved = [jax.tree.map(lambda w, g: w + 0.05 * g / optax.tree.norm(a), params, a) for a in ascents]
    assert_close(grads, mean([gradient(m, b, keys[1]) for m, b in zip(moved, own)]))
    assert_close(loss, mean([network(params, p, keys[0])[0] for p in part]))

from nfnet_lib.loader import Examples
from nfnet_lib.losses import softmax_cross_entropy
from nfnet_lib.sharding import batch_sharding
from nfnet_lib.step import Schedule, TrainState, normalise, train_step

class Linear:
    def apply(self, params, images, train=False, key=None):
        return images.reshape(len(images), -1) @ params['w']

rng = np.random.default_rng(3)
weights = (np.arange(32) % 5 != 0).astype(np.float32)
weights[: 32 // count] = [1] + [0] * (32 // count - 1)  # all but one of the first device's can't be read
examples = Examples(rng.integers(0, 255, (32, 2, 2, 3), np.uint8), rng.integers(0, 4, (32, 1)).astype(np.int32),
                    np.ones((32, 1), np.float32), weights)
start = {'w': jnp.asarray(rng.normal(size=(12, 4)), jnp.float32)}
state, schedule = TrainState(jnp.int32(0), start, (), None), Schedule(jnp.float32(1), jnp.int32(0), jnp.int32(9))

def total(params, some):
    each = softmax_cross_entropy(Linear().apply(params, normalise(some.images)), some.labels, 0.0, some.label_weights)
    return jnp.sum(each * some.weights) / weights.sum()

slope = jax.jit(jax.grad(total))
for per_device in (True, False):
    step = jax.jit(lambda state, examples: train_step(
        state, examples, schedule, jax.random.key(0), model=Linear(), optimizer=optax.identity(), loss='softmax',
        label_smoothing=0.0, rho=0.05, ascent_fraction=1.0, ema_decay=0.0, mesh=mesh, per_device=per_device))
    after, metrics = step(state, jax.device_put(examples, batch_sharding(mesh)))
    rows = 32 // count if per_device else 32
    own = [jax.tree.map(lambda x: x[i : i + rows], examples) for i in range(0, 32, rows)]
    ascents = [slope(start, part) for part in own]
    moved = [jax.tree.map(lambda w, g: w + 0.05 * g / optax.tree.norm(a), start, a) for a in ascents]
    summed = sum(slope(m, part)['w'] for m, part in zip(moved, own))
    assert_close(start['w'] - after.params['w'], summed)
    assert_close(metrics['loss'], total(start, examples))
"""


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_each_device_perturbs_for_itself(count):
    """Against an explicit loop over the devices' parts of the batch."""
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "PATH": ""}
    subprocess.run([sys.executable, "-c", DEVICES, str(count)], check=True, timeout=120, cwd=Path(__file__).parent.parent,
                   env=environment)  # fmt: skip
