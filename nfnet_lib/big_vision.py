"""ViT checkpoints of google-research/big_vision (`.npz`, flat names such as Transformer/encoderblock_0/LayerNorm_0/scale)."""

import math
import os
import re
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nfnet_lib import models
from nfnet_lib.pretrained import WeightsError
from nfnet_lib.variants import VARIANTS, LoadedVariant, ViTVariant

_MODULES = {
    "embedding": "embedding", "norm": "Transformer/encoder_norm", "head": "head",
    "norm0": "LayerNorm_0", "norm1": "LayerNorm_1", "attention": "MultiHeadDotProductAttention_0", "mlp": "MlpBlock_0",
    "dense0": "Dense_0", "dense1": "Dense_1", "query": "query", "key": "key", "value": "value", "out": "out",
}  # fmt: skip
_ARRAYS = {"w": "kernel", "b": "bias"}
_BLOCK = "Transformer/encoderblock"
# Names of checkpoints older than big_vision's present model (`fix_old_checkpoints` in its models/vit.py).
_OLD = {
    "Transformer/posembed_input/pos_embedding": "pos_embedding", "LayerNorm_2/": "LayerNorm_1/",
    "MultiHeadDotProductAttention_1/": "MultiHeadDotProductAttention_0/", "MlpBlock_3/": "MlpBlock_0/",
}  # fmt: skip


def load_big_vision(path: str | os.PathLike, *, num_classes: int | None = None) -> tuple[LoadedVariant, models.Params]:
    """(variant, params) of a big_vision ViT checkpoint; `models.create(variant)` takes its image size, pool and positions.

    Any prefix of the names ("params/", "opt/target/", "params/img/") is dropped, blocks may be stacked (scanned models),
    arrays float32, float16 or bfloat16 (stored as raw pairs of bytes). num_classes: of a zero head for a file without a
    head; one that is there is kept. WeightsError for a file that is damaged or fits no ViT in variants.VARIANTS.
    """
    path = Path(path)
    arrays = _read(path)
    variant = _recognise(arrays, path)
    if "head/kernel" not in arrays:
        if num_classes is None:
            raise WeightsError(f"{path.name} has no head: it can be fine-tuned, not evaluated")
        width = arrays["embedding/bias"].size
        arrays |= {"head/kernel": np.zeros((width, num_classes)), "head/bias": np.zeros(num_classes)}
    tokens = arrays["pos_embedding"].shape[1] if "pos_embedding" in arrays else 0
    architecture = VARIANTS[variant]
    settings = {
        "pool": "map" if "MAPHead_0/probe" in arrays else "tok" if "cls" in arrays else "gap",
        "position": "learned" if tokens else "sincos2d",
        "image_size": round(tokens**0.5) * architecture.patch if tokens else architecture.train_px,
    }
    loaded = LoadedVariant(variant, num_classes=arrays["head/bias"].size, pixels="unit", **settings)
    shapes = models.create(loaded).param_shapes()
    left, values = dict(arrays), []
    for tree_path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        parts = [str(p.key) for p in tree_path]
        stacked = parts[0] == "blocks"
        names = [_name(parts, index) for index in (range(leaf.shape[0]) if stacked else [0])]
        missing = [name for name in names if name not in left]
        if missing:
            raise WeightsError(f"{path.name}: {missing[0]} is missing, which {variant} has")
        given = [left.pop(name) for name in names]
        wanted = leaf.shape[stacked:]
        for name, array in zip(names, given, strict=True):
            if array.size != np.prod(wanted, dtype=int):
                raise WeightsError(f"{path.name}: {name} has shape {list(array.shape)}, which does not fit {variant}")
        given = [array.astype(np.float32).reshape(wanted) for array in given]  # heads and patches are flattened here
        values.append(jnp.asarray(np.stack(given) if stacked else given[0]))
    if left:
        raise WeightsError(f"{path.name}: {len(left)} arrays that {variant} does not have, such as {min(left)}")
    return loaded, jax.tree.unflatten(jax.tree.structure(shapes), values)


def _name(parts: list[str], block: int) -> str:
    """big_vision's name of one of our parameters."""
    if parts[0] == "blocks":
        prefix, parts = f"{_BLOCK}_{block}/", parts[1:]
    elif parts[0] == "pool":
        prefix, parts = "MAPHead_0/", ["LayerNorm_0" if p == "norm" else p for p in parts[1:]]
    else:
        prefix = ""
    names = [_MODULES.get(part, part) for part in parts[:-1]]
    return prefix + "/".join([*names, _ARRAYS.get(parts[-1], parts[-1])])


def refuse_bomb(path: Path) -> None:
    """ValueError for a .npz that says it holds far more than weights ever shrink by; nothing is unpacked to find out."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > max(100 * path.stat().st_size, 2**28):
        raise ValueError(f"{path.stat().st_size:,} bytes that unpack to {size:,}")


# Where files keep the image tower's weights, beside optimizer moments of the same names.
_PREFIXES = ("params/img/", "params/", "opt/target/img/", "opt/target/", "img/", "")


def _read(path: Path) -> dict[str, np.ndarray]:
    """Arrays by big_vision's present names, blocks unstacked."""
    try:
        refuse_bomb(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise WeightsError(f"{path.name} is truncated, damaged or no .npz of arrays: {error}") from None
    anchors = [name for name in arrays if name.endswith("embedding/kernel")]
    if not anchors:
        raise WeightsError(f"{path.name} is not a big_vision ViT: it has no embedding/kernel")
    prefixes = [name.removesuffix("embedding/kernel") for name in anchors]
    prefix = next((known for known in _PREFIXES if known in prefixes), prefixes[0])
    if prefix not in _PREFIXES and len(prefixes) > 1:
        raise WeightsError(f"{path.name}: which are the weights, of {', '.join(map(repr, prefixes))}, is not known")
    out: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if not name.startswith(prefix):
            continue  # optimizer state, text tower
        if array.dtype.kind == "V" and array.dtype.itemsize == 2:
            array = array.view(jnp.bfloat16)
        name = name.removeprefix(prefix)
        for old, new in _OLD.items():
            name = name.replace(old, new)
        if name.startswith(f"{_BLOCK}/"):
            out |= {f"{_BLOCK}_{i}/{name.removeprefix(_BLOCK + '/')}": part for i, part in enumerate(array)}
        else:
            out[name] = array
    if "cls" in out and "pos_embedding" in out:
        tokens = out["pos_embedding"].shape[1]
        if math.isqrt(tokens) ** 2 != tokens:  # an old file's class token has a position of its own, the first
            out["cls"] = out["cls"] + out["pos_embedding"][:, :1]
            out["pos_embedding"] = out["pos_embedding"][:, 1:]
    return out


def _recognise(arrays: dict[str, np.ndarray], path: Path) -> str:
    try:
        patch, _, _, width = arrays["embedding/kernel"].shape
        _, heads, _ = arrays[f"{_BLOCK}_0/MultiHeadDotProductAttention_0/query/kernel"].shape
        mlp = arrays[f"{_BLOCK}_0/MlpBlock_0/Dense_0/kernel"].shape[1]
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path.name} is not a big_vision ViT: {error}") from None
    depth = len({match[0] for name in arrays if (match := re.match(rf"{_BLOCK}_\d+/", name))})
    shape = (width, depth, mlp, heads, patch)
    for name, v in VARIANTS.items():
        if isinstance(v, ViTVariant) and (v.width, v.depth, v.mlp, v.heads, v.patch) == shape:
            return name
    raise WeightsError(
        f"{path.name}: no ViT has width {width}, depth {depth}, MLP {mlp}, {heads} heads and {patch} px patches"
    )
