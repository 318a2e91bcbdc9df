"""Released names and rule-made values for the parameters of our models: the bridge to tests/golden/tiny.json."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from nfnet_lib import models
from nfnet_lib.pretrained import released_names


def rule(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the released parameter `name`, as tests/golden/README.md's figures were measured with."""
    r = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    last = name.split("/")[-1]
    if last == "w":
        return (r * np.prod(shape[:-1]) ** -0.5).astype(np.float32)
    return {"gain": 1 + 0.1 * r, "skip_gain": 0.5 + 0.1 * r}.get(last, 0.1 * r).astype(np.float32)


def rule_params(model: models.Model) -> dict:
    """Parameters of `model` by the rule."""
    names = released_names(model)

    def value(path, leaf):
        path = "/".join(str(p.key) for p in path)
        if "/rest/" in path:
            return np.stack([rule(name, leaf.shape[1:]) for name in names[path]])
        return rule(names[path][0], leaf.shape)

    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(value(path, leaf)), model.param_shapes())


def released_norms(model: models.Model, tree: dict) -> dict[str, float]:
    """{released name: L2 norm} of parameters or gradients shaped like the model's."""
    names, out = released_names(model), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = "/".join(str(p.key) for p in path)
        arrays = leaf if "/rest/" in path else [leaf]
        for name, array in zip(names[path], arrays, strict=True):
            out[name] = float(np.linalg.norm(np.asarray(array)))
    return out
