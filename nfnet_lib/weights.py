"""Weights of runs and of files under one roof: saved, loaded whatever their format, handed over from one run to another."""

import functools
import json
import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfnet_lib import located, models
from nfnet_lib.augment import MEAN_RGB, STDDEV_RGB
from nfnet_lib.big_vision import load_big_vision, refuse_bomb
from nfnet_lib.checkpoint import leaf_digests
from nfnet_lib.config import ConfigError, FinetuneConfig, config_from_params
from nfnet_lib.files import write_json
from nfnet_lib.pretrained import WeightsError, load_deepmind, load_timm
from nfnet_lib.records import CLASSES, SUMMARY, read_summary
from nfnet_lib.variants import LoadedVariant
from nfnet_lib.vit import resample_positions

TORCH_OF_OLD = pickle.dumps(0x1950A86A20F9469CFC6C, 2)[:-1]  # how files begin that are no zip archives


def load_weights(path: str | os.PathLike, *, num_classes: int | None = None) -> tuple[LoadedVariant, models.Params]:
    """(variant, params) of any file or run folder that this library knows, told apart by content.

    A finished run's folder, a released Haiku file, a timm file (.safetensors, torch) or a big_vision ViT (.npz), which gets a
    head of zeros for num_classes where it has none.
    """
    path = Path(path)
    if path.is_dir():
        config, params = config_from_params(read_summary(path)["config"]), load_params(path)
        return LoadedVariant(config.variant, num_classes=len(params["head"]["b"]), **config.model_settings), params
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if (kind := _kind(path)) == "npz":
        return load_big_vision(path, num_classes=num_classes)
    return load_deepmind(path) if kind == "pickle" else load_timm(path)


def _kind(path: Path) -> str:
    """What a file is, by its first bytes: pickle, torch, npz or safetensors; WeightsError otherwise."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(TORCH_OF_OLD):
        return "torch"
    if head[:1] == b"\x80":
        return "pickle"
    if head[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            return "torch" if any(name.endswith("data.pkl") for name in archive.namelist()) else "npz"
    if head[8:9] == b"{":
        return "safetensors"
    raise WeightsError(f"{path.name} is neither a pickle, a .npz, a torch nor a safetensors file")


def load_params(run_dir: str | Path) -> Any:
    """The parameters of a finished run, as models.create(...).apply takes them: the moving average where it has one."""
    summary = read_summary(run_dir)
    try:
        refuse_bomb(Path(run_dir) / "params.npz")
        with np.load(Path(run_dir) / "params.npz") as file:
            flat = dict(file)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{run_dir}: params.npz is damaged: {error}") from None
    for path, digest in summary["params_digests"].items():
        if path not in flat or leaf_digests({"": flat[path]})["['']"] != digest:
            raise ConfigError(f"{run_dir}: params.npz is damaged at {path}")
    tree: dict = {}
    for path, array in flat.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[last] = jnp.asarray(array)
    return tree


def save_params(out_dir: Path, params: Any) -> dict[str, str]:
    """params.npz with one array a parameter, written whole or not at all; returns a digest of each."""
    flat = {
        "/".join(str(p.key) for p in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    partial = out_dir / "params.partial.npz"
    with partial.open("wb") as file:
        np.savez(file, **flat)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(out_dir / "params.npz")
    return {path: leaf_digests({"": array})["['']"] for path, array in flat.items()}


def transfer(pretrained: Any, fresh: Any, *, keep_head: bool = False) -> Any:
    """`fresh` parameters with the body of `pretrained`, and its head where asked. ConfigError if shapes differ.

    A ViT's learned positions are resampled to the grid of `fresh`.
    """
    out = dict(fresh)
    for name, module in pretrained.items():
        if name == "head" and not keep_head:
            continue
        if name == "pos_embedding" and name in fresh:
            side = round(fresh[name].shape[1] ** 0.5)
            module = resample_positions(jnp.asarray(module), side, side)
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (module, fresh.get(name))]
        if shapes[0] != shapes[1]:
            raise ConfigError(f"pretrained weights: their {name} does not fit the variant")
        out[name] = jax.tree.map(jnp.asarray, module)
    return out


def save_classes(out_dir: Path, names: Sequence[str]) -> None:
    """classes.json, for `trained_classes`; nothing where classes have no names."""
    if names:
        write_json(out_dir / CLASSES, names)


def trained_classes(weights: str | os.PathLike) -> tuple[str, ...]:
    """Names of a run's classes, in the order of its head; none where they have none, or for a file."""
    path = Path(weights) / CLASSES
    if not path.is_file():
        return ()
    try:
        return tuple(str(name) for name in list(json.loads(path.read_text())))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def load_pretrained(
    config: FinetuneConfig, study_dir: Path, num_classes: int, class_names: Sequence[str] = ()
) -> models.Params:
    """What a fine-tuning run starts from: a file, or a finished run in study_dir.

    ConfigError if it does not fit the config, or its head, where that is kept, the data's classes.
    """
    if config.pretrained_weights:
        try:
            loaded, params = load_weights(located(config.pretrained_weights), num_classes=num_classes)
        except (OSError, WeightsError) as error:
            raise ConfigError(f"pretrained_weights: {error}") from None
        if loaded.pixels != "imagenet":
            params = with_imagenet_pixels(params)
        own = {"variant": str(loaded)} | loaded.settings
        wanted = {"variant": config.variant} | config.model_settings
        origin = config.pretrained_weights
    else:
        folder = study_dir / config.pretrained_run
        if not (folder / SUMMARY).exists():
            runs = sorted(path.parent.name for path in study_dir.glob(f"*/{SUMMARY}"))
            raise ConfigError(
                f"pretrained_run: {config.pretrained_run!r} is not a finished run in {study_dir.name}; "
                f"finished: {', '.join(runs[:5]) or 'none'}"
            )
        trained = config_from_params(read_summary(folder)["config"])
        own, wanted = ({"variant": run.variant} | run.model_settings for run in (trained, config))
        params, origin = load_params(folder), config.pretrained_run
    for name in wanted.keys() & own.keys() - {"image_size"}:
        if own[name] != wanted[name]:
            raise ConfigError(f"{name}: {wanted[name]!r} is not that of {origin}, {own[name]!r}")
    if config.head == "keep" and len(params["head"]["b"]) != num_classes:
        raise ConfigError(
            f"head: 'keep', but {origin} has {len(params['head']['b'])} classes and the data {num_classes}; allowed: new"
        )
    if config.head == "keep" and config.pretrained_run:
        known = trained_classes(study_dir / config.pretrained_run)
        if different := [names for names in zip(known, class_names, strict=False) if names[0] != names[1]]:
            raise ConfigError(f"head: 'keep', but what is {different[0][1]!r} in the data is {different[0][0]!r} to {origin}")
    return params


def with_imagenet_pixels(params: models.Params) -> models.Params:
    """The same ViT for pixels normalised by ImageNet's channels that these parameters are for pixels in [-1, 1].

    Such a pixel is (x deviation + mean) / 127.5 - 1 of the normalised x, and patches have no padding: the change goes into the
    patch embedding, whose inputs are pixels with the channels last, and its bias.
    """
    scale, shift = np.array(STDDEV_RGB) / 127.5, np.array(MEAN_RGB) / 127.5 - 1
    weights, bias = (np.asarray(params["embedding"][name], np.float64) for name in "wb")
    pixels = weights.reshape(-1, 3, bias.size)
    moved = {"w": (pixels * scale[:, None]).reshape(weights.shape), "b": bias + np.einsum("pcd,c->d", pixels, shift)}
    return params | {"embedding": {name: jnp.asarray(value, jnp.float32) for name, value in moved.items()}}
