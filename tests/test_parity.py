"""timm's PyTorch NFNets as an independent oracle: same weights, same logits, same gradients.

`dm_nfnet_f*` is timm's port of the released weights. How it is made to mean exactly the same here:

- eps: timm standardises with 1/sqrt(var + eps), the released code with 1/sqrt(max(var, 1e-4 / fan_in)); std_conv_eps=1e-12
  makes both the same, since no output unit of these weights has so small a variance.
- activation: timm's "gelu" is exact, the released one the tanh form: act_layer="gelu_tanh",
  for which timm has no factor of its own.
- gamma: timm's dm_ models put the activation's factor in the activation (gamma_in_act), as we do; its others do not.
- stem: timm's widths are 16, 32, 64, 128 for stem_chs=128, fixed; right for F0 to F7, not for the "+" models (whose stems
  would be 24, 48, 96, 192), so none of those is compared.
- channel rounding: group and squeeze-excite widths of F0 to F7 are multiples of 8 already; timm's rounding is idle.
- squeeze-excite: timm's activation is ReLU, as in the released code.
- stochastic depth: off on both sides (timm rescales by the keep rate, the released code does not).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from nfnet_lib import models  # noqa: E402
from nfnet_lib.losses import softmax_cross_entropy  # noqa: E402
from nfnet_lib.pretrained import load_timm, save_timm  # noqa: E402
from nfnet_lib.weights import load_weights  # noqa: E402

CLASSES = 50


@pytest.fixture(scope="module")
def timm():
    # torchvision's compiled operators may be missing or of another build; timm imports its Python part alone.
    for name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
    timm = pytest.importorskip("timm")
    gammas = timm.models.nfnet._nonlin_gamma
    gammas["gelu_tanh"] = gammas["gelu"]
    return timm


def random_params(name: str) -> dict:
    """Every parameter away from its initial value, so that gains, biases and skip gains matter."""
    params = models.create(name, CLASSES).init(jax.random.key(3))
    rng = np.random.default_rng(4)

    def shake(path, p):
        if path[-1].key == "w":
            return p
        noise = 0.1 * rng.standard_normal(p.shape).astype(np.float32)
        return np.asarray(p) + noise + (0.5 if path[-1].key == "skip_gain" else 0)

    return jax.tree_util.tree_map_with_path(shake, params)


def as_timm(timm, name: str, path):
    model = timm.create_model(
        f"dm_nfnet_{name.lower()}", num_classes=CLASSES, act_layer="gelu_tanh", std_conv_eps=1e-12, drop_path_rate=0.0
    )
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def images(resolution: int) -> np.ndarray:
    return np.random.default_rng(resolution).standard_normal((2, resolution, resolution, 3)).astype(np.float32)


def test_torch_files_of_the_old_kind_are_told_from_pickles(tmp_path):
    params = models.create("F0-pico", CLASSES).init(jax.random.key(0))
    save_timm(params, "F0-pico", tmp_path / "new.pth")
    state = torch.load(tmp_path / "new.pth", weights_only=True)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("new.pth", "old.pth"):
        variant, again = load_weights(tmp_path / name)
        assert variant == "F0-pico" and jax.tree.all(jax.tree.map(np.array_equal, params, again))


@pytest.mark.parametrize("name", ["F0", "F1"])
def test_logits_equal_timm_s(timm, tmp_path, name):
    params = random_params(name)
    save_timm(params, name, tmp_path / "w.pth")
    variant, again = load_timm(tmp_path / "w.pth")
    assert variant == name
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
    theirs = as_timm(timm, name, tmp_path / "w.pth")
    apply = jax.jit(models.create(variant).apply)
    for resolution in (64, 96):
        x = images(resolution)
        with torch.no_grad():
            wanted = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
        assert wanted.std() > 0.05
        np.testing.assert_allclose(apply(params, jnp.asarray(x)), wanted, atol=1e-3 * min(1, wanted.std()), rtol=0)


def test_gradients_equal_timm_s(timm, tmp_path):
    params = random_params("F0")
    save_timm(params, "F0", tmp_path / "w.pth")
    theirs = as_timm(timm, "F0", tmp_path / "w.pth")
    x, labels = images(64), np.array([7, 31])
    loss = torch.nn.functional.cross_entropy(theirs(torch.tensor(x.transpose(0, 3, 1, 2))), torch.tensor(labels))
    loss.backward()
    torch.save({name: p.grad for name, p in theirs.named_parameters()}, tmp_path / "grads.pth")
    _, wanted = load_timm(tmp_path / "grads.pth")

    model = models.create("F0", CLASSES)

    def our_loss(params):
        return jnp.mean(softmax_cross_entropy(model.apply(params, jnp.asarray(x)), jnp.asarray(labels)))

    ours, grads = jax.jit(jax.value_and_grad(our_loss))(params)
    assert float(ours) == pytest.approx(float(loss), abs=1e-4)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted), strict=True):
        error = float(jnp.linalg.norm(g - w) / jnp.linalg.norm(w))
        assert error < 1e-3, (jax.tree_util.keystr(path), error)
