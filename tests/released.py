"""Released names and rule-made values for the parameters of our models: the bridge to tests/golden/tiny.json."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from nfnet_lib import models


def rule(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the released parameter `name`, as tests/golden/README.md's figures were measured with."""
    r = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    last = name.split("/")[-1]
    if last == "w":
        return (r * np.prod(shape[:-1]) ** -0.5).astype(np.float32)
    return {"gain": 1 + 0.1 * r, "skip_gain": 0.5 + 0.1 * r}.get(last, 0.1 * r).astype(np.float32)


def leaf_names(model: models.Model) -> dict[str, list[str]]:
    """{our path: released names}, one name, or one a block for stacked parameters."""
    first_block = np.cumsum([0, *model.variant.depth])
    out = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.param_shapes()):
        parts = [str(p.key) for p in path]
        if parts[0] == "stem":
            names = [f"stem_{parts[1]}/{parts[2]}"]
        elif parts[0] in ("final_conv", "head"):
            names = ["/".join([parts[0].replace("head", "linear"), *parts[1:]])]
        else:
            start = first_block[int(parts[0].removeprefix("stage"))]
            blocks = [start] if parts[1] == "first" else start + 1 + np.arange(leaf.shape[0])
            inner = "/".join(parts[2:]).replace("squeeze_excite/", "squeeze_excite/~/")
            inner = inner if inner == "skip_gain" else f"~/{inner}"
            names = [f"nf_block{f'_{block}' if block else ''}/{inner}" for block in blocks]
        out["/".join(parts)] = [f"NFNet/~/{name}" for name in names]
    return out


def rule_params(model: models.Model) -> dict:
    """Parameters of `model` by the rule."""
    names = leaf_names(model)

    def value(path, leaf):
        path = "/".join(str(p.key) for p in path)
        if "/rest/" in path:
            return np.stack([rule(name, leaf.shape[1:]) for name in names[path]])
        return rule(names[path][0], leaf.shape)

    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(value(path, leaf)), model.param_shapes())


def released_norms(model: models.Model, tree: dict) -> dict[str, float]:
    """{released name: L2 norm} of parameters or gradients shaped like the model's."""
    names, out = leaf_names(model), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = "/".join(str(p.key) for p in path)
        arrays = leaf if "/rest/" in path else [leaf]
        for name, array in zip(names[path], arrays, strict=True):
            out[name] = float(np.linalg.norm(np.asarray(array)))
    return out
