"""Published weights in and out: DeepMind's released NFNet files and timm's `dm_nfnet_f*` state dicts.

A released `F*_haiku.npz` is, despite its name, a dill pickle of {module: {array name: array}}. Unpickling can run any
code that the file's author chose, so the reader admits NumPy arrays and builtin containers and refuses everything else
by name. A timm file holds the same numbers under other names and in PyTorch's layout (convolutions OIHW).

The variant, its stage-1 bottleneck rule and the number of classes are recognised from names and shapes, so a file of
any depth and width in `variants.VARIANTS` is read without being told what it is.
"""

import codecs
import collections
import dataclasses
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfnet_lib import models
from nfnet_lib.config import ConfigError
from nfnet_lib.files import write_bytes
from nfnet_lib.variants import BOTTLENECK_RULES, VARIANTS, LoadedVariant, Variant, get_variant


class WeightsError(ConfigError):
    """A weight file that can't be read or written: one line that names the file and what is wrong with it."""


def load_deepmind(path: str | os.PathLike) -> tuple[LoadedVariant, models.Params]:
    """(variant, params) of a released Haiku file (google-deepmind/deepmind-research, nfnets/README.md).

    `variant` is the variant's name and remembers the file's bottleneck rule and number of classes, so that
    `models.create(variant).apply(params, images)` is the published network. WeightsError for a file that is not one,
    is truncated, holds anything but arrays, or whose arrays fit no variant. FileNotFoundError if there is none.
    """
    return _from_external(_read_pickle(Path(path)), _RELEASED, Path(path))


def save_deepmind(params: models.Params, variant: str, path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write float32 `params` of `variant` in the released format; `load_deepmind` gives back the same bits.

    FileExistsError if `path` exists, unless `overwrite`. WeightsError if params do not fit the variant.
    """
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, array in _to_external(params, variant, _RELEASED).items():
        module, array_name = name.rsplit("/", 1)
        modules.setdefault(module, {})[array_name] = array
    write_bytes(Path(path), pickle.dumps(modules, protocol=4), overwrite=overwrite)


def load_timm(path: str | os.PathLike) -> tuple[LoadedVariant, models.Params]:
    """(variant, params) of a timm `dm_nfnet_f*` state dict: .safetensors, or a torch file (which needs torch).

    Torch files are read with weights_only=True, which executes nothing; they may hold the dict itself or one under
    "state_dict", "model" or "model_ema". Errors as in `load_deepmind`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        read = _read_safetensors if file.read(9)[8:] == b"{" else _read_torch
    return _from_external(read(path), _TIMM, path)


def save_timm(params: models.Params, variant: str, path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write float32 `params` as a timm state dict: .safetensors, or .pth / .pt / .bin (which need torch).

    timm's own `dm_nfnet_f*` take F0 to F6; it has no model with the stem of a "+" or a mini. Errors as in `save_deepmind`.
    """
    path = Path(path)
    state = _to_external(params, variant, _TIMM)
    if path.suffix == ".safetensors":
        from safetensors.numpy import save

        content = save(state)
    elif path.suffix in (".pth", ".pt", ".bin"):
        import io

        torch = _torch(path)
        buffer = io.BytesIO()
        torch.save({name: torch.tensor(array) for name, array in state.items()}, buffer)
        content = buffer.getvalue()
    else:
        raise WeightsError(f"{path.name}: a timm file ends in .safetensors, .pth, .pt or .bin")
    write_bytes(path, content, overwrite=overwrite)


# ---- names and layouts -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How another library names and shapes the parameters of one of ours.

    name: (path of ours without the stage, stage, block in the stage, block in the network) -> its name; stage is None
    outside the stages. outward, inward: arrays of one block, ours to theirs and back, given our path.
    """

    title: str
    name: Callable[[list[str], int | None, int, int], str]
    outward: Callable[[str, np.ndarray], np.ndarray]
    inward: Callable[[str, np.ndarray], np.ndarray]


def _released_name(parts: list[str], stage: int | None, index: int, block: int) -> str:
    if stage is None:
        module = {"stem": f"stem_{parts[1]}", "head": "linear"}.get(parts[0], parts[0])
        return f"NFNet/~/{module}/{parts[-1]}"
    inner = "/".join(parts).replace("squeeze_excite/", "squeeze_excite/~/")
    return f"NFNet/~/nf_block{f'_{block}' if block else ''}/{inner if inner == 'skip_gain' else f'~/{inner}'}"


_TIMM_MODULES = {
    "conv0": "conv1", "conv1": "conv2", "conv1b": "conv2b", "conv2": "conv3", "conv_shortcut": "downsample.conv",
    "squeeze_excite/linear": "attn_last.fc1", "squeeze_excite/linear_1": "attn_last.fc2",
}  # fmt: skip
_TIMM_ARRAYS = {"w": "weight", "b": "bias"}


def _timm_name(parts: list[str], stage: int | None, index: int, block: int) -> str:
    array = _TIMM_ARRAYS.get(parts[-1], parts[-1])
    if parts[0] == "stem":
        return f"stem.conv{int(parts[1].removeprefix('conv')) + 1}.{array}"
    if stage is None:
        return f"{ {'head': 'head.fc'}.get(parts[0], parts[0]) }.{array}"
    prefix = f"stages.{stage}.{index}."
    return prefix + ("skipinit_gain" if array == "skip_gain" else f"{_TIMM_MODULES['/'.join(parts[:-1])]}.{array}")


def _timm_outward(path: str, array: np.ndarray) -> np.ndarray:
    if path.endswith("/gain"):
        return array.reshape(-1, 1, 1, 1)
    if not path.endswith("/w"):
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
    return array.T if path == "head/w" else array.T[:, :, None, None]  # squeeze-excite's are 1x1 convolutions there


def _timm_inward(path: str, array: np.ndarray) -> np.ndarray:
    if path.endswith("/gain"):
        return array.reshape(-1)
    if not path.endswith("/w"):
        return array
    if path == "head/w":
        return array.T
    return array[:, :, 0, 0].T if "squeeze_excite" in path else array.transpose(2, 3, 1, 0)


def _same(path: str, array: np.ndarray) -> np.ndarray:
    return array


_RELEASED = _Layout("a released Haiku NFNet", _released_name, _same, _same)
_TIMM = _Layout("a timm dm_nfnet", _timm_name, _timm_outward, _timm_inward)


def released_names(model: models.Model) -> dict[str, list[str]]:
    """{our path: names in a released file, "module/array"}: one name, or one a block where ours are stacked."""
    return {path: names for path, names, _ in _leaves(model, _RELEASED)}


def _leaves(model: models.Model, layout: _Layout) -> Iterator[tuple[str, list[str], jax.ShapeDtypeStruct]]:
    """(our path, external names in the order of the stack, our shape) of each parameter."""
    first_block = np.cumsum([0, *model.variant.depth])
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.param_shapes()):
        parts = [str(p.key) for p in path]
        if not parts[0].startswith("stage"):
            yield "/".join(parts), [layout.name(parts, None, 0, 0)], leaf
            continue
        stage = int(parts[0].removeprefix("stage"))
        inside = [0] if parts[1] == "first" else range(1, 1 + leaf.shape[0])
        names = [layout.name(parts[2:], stage, index, int(first_block[stage]) + index) for index in inside]
        yield "/".join(parts), names, leaf


def _from_external(
    arrays: Mapping[str, np.ndarray], layout: _Layout, path: Path
) -> tuple[LoadedVariant, models.Params]:
    variant = _recognise(arrays, layout, path)
    model = models.create(variant)
    left, values = dict(arrays), []
    for ours, names, leaf in _leaves(model, layout):
        stacked = "/rest/" in ours
        parts = []
        for name in names:
            if name not in left:
                raise WeightsError(f"{path.name}: {name} is missing, which {variant} has")
            array = left.pop(name)
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise WeightsError(f"{path.name}: {name} has type {array.dtype}, not a floating-point type")
            try:
                parts.append(layout.inward(ours, array).astype(np.float32))
            except (IndexError, ValueError):  # too few or too many axes
                parts.append(array)
            if parts[-1].shape != leaf.shape[stacked:]:
                raise WeightsError(f"{path.name}: {name} has shape {list(array.shape)}, which does not fit {variant}")
        values.append(jnp.asarray(np.stack(parts) if stacked else parts[0]))
    if left:
        raise WeightsError(f"{path.name}: {len(left)} arrays that {variant} does not have, such as {min(left)}")
    return variant, jax.tree.unflatten(jax.tree.structure(model.param_shapes()), values)


def _recognise(arrays: Mapping[str, np.ndarray], layout: _Layout, path: Path) -> LoadedVariant:
    """By the number of blocks and the stem's width; the loader then checks every other name and shape."""
    stem, head, first, gain = (
        layout.name(["stem", "conv3", "bias"], None, 0, 0), layout.name(["head", "b"], None, 0, 0),
        layout.name(["conv0", "bias"], 0, 0, 0), layout.name(["skip_gain"], 0, 0, 0).rsplit("/")[-1].rsplit(".")[-1],
    )  # fmt: skip
    for name in (stem, head, first):
        if name not in arrays:
            raise WeightsError(f"{path.name} is not {layout.title}: it has no {name}")
    blocks = sum(name.endswith(gain) for name in arrays)
    nfnets = [v for v in VARIANTS.values() if isinstance(v, Variant)]
    found = [v for v in nfnets if (v.blocks, v.width[0] // 2) == (blocks, arrays[stem].size)]
    rules = [(v, rule) for v in found for rule in BOTTLENECK_RULES if v.bottleneck(0, rule) == arrays[first].size]
    if not rules:
        raise WeightsError(
            f"{path.name}: no variant has {blocks} blocks, a stem of {arrays[stem].size} channels and a first bottleneck "
            f"of {arrays[first].size}"
        )
    variant, rule = rules[0]
    return LoadedVariant(variant.name, num_classes=arrays[head].size, bottleneck_rule=rule)


def _to_external(params: models.Params, variant: str, layout: _Layout) -> dict[str, np.ndarray]:
    try:
        classes, bottleneck = len(params["head"]["b"]), len(params["stage0"]["first"]["conv0"]["bias"])
    except (KeyError, TypeError) as error:
        raise WeightsError(f"params: not the parameters of an NFNet ({error} is missing)") from None
    known = get_variant(variant)
    if not isinstance(known, Variant):
        raise WeightsError(f"variant: {variant} is a {known.family}, and {layout.title} file holds an NFNet")
    rules = [rule for rule in BOTTLENECK_RULES if known.bottleneck(0, rule) == bottleneck]
    model = models.create(variant, classes, bottleneck_rule=(rules or ["published"])[0])
    given = {_join(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    out = {}
    for ours, names, leaf in _leaves(model, layout):
        if ours not in given or given[ours].shape != leaf.shape or given[ours].dtype != leaf.dtype:
            got = f"{given[ours].dtype} {list(given[ours].shape)}" if ours in given else "missing"
            raise WeightsError(f"params: {ours} is {got}, but {variant} has {leaf.dtype} {list(leaf.shape)}")
        array = given.pop(ours)
        for name, part in zip(names, array if "/rest/" in ours else [array], strict=True):
            out[name] = np.asarray(layout.outward(ours, np.asarray(part)), order="C")
    if given:
        raise WeightsError(f"params: {variant} has no {min(given)}")
    return out


def _join(path: tuple) -> str:
    return "/".join(str(p.key) for p in path)


# ---- readers that execute nothing ----------------------------------------------------------------------------------------


def _dill_array(function: Callable, arguments: tuple, state: tuple, attributes: Any = None) -> np.ndarray:
    """What dill's own wrapper of an array stands for; `function` has passed the same admission."""
    array = function(*arguments)
    array.__setstate__(state)
    return array


_CONTAINERS = {"DictType": dict, "ListType": list, "TupleType": tuple, "dict": dict, "list": list, "tuple": tuple}
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("dill._dill", "_load_type"): lambda name: _CONTAINERS[name],  # how dill refers to builtin types
    ("dill._dill", "_create_array"): _dill_array,
    ("_codecs", "encode"): codecs.encode,  # how Python 2's protocols write the bytes of an array
    **{("builtins", kind.__name__): kind for kind in (dict, list, tuple, set, frozenset)},
    **{
        (f"numpy.{core}.{module}", name): getattr(getattr(np._core, module), name)
        for core in ("core", "_core")  # before and after NumPy 2
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays and containers; the name of anything else is an error before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise WeightsError(f"refused {module}.{name}: only NumPy arrays and builtin containers are admitted")
        return _ADMITTED[module, name]


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    """{"module/array": array} of a pickled {module: {array name: array}}."""
    with path.open("rb") as file:
        if file.read(1) != b"\x80":
            raise WeightsError(f"{path.name} is not a pickle, which the released weight files are")
        file.seek(0)
        try:
            modules = _ArraysOnly(file).load()
        except WeightsError as error:
            raise WeightsError(f"{path.name}: {error}") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise WeightsError(f"{path.name} is truncated or damaged: {type(error).__name__}: {error}") from None
    if not isinstance(modules, Mapping) or not all(isinstance(arrays, Mapping) for arrays in modules.values()):
        raise WeightsError(f"{path.name} does not hold {{module: {{array name: array}}}}")
    flat = {f"{module}/{name}": array for module, arrays in modules.items() for name, array in arrays.items()}
    return _arrays_only(flat, path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(f"{path.name} is truncated or damaged: {error}") from None


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    torch = _torch(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds, and long texts
        raise WeightsError(f"{path.name} is not a readable torch file: {str(error).splitlines()[0]}") from None
    for key in ("state_dict", "model", "model_ema"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path.name} does not hold a state dict of tensors")
    return {name.removeprefix("module."): value.float().numpy() for name, value in state.items()}


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{path.name}: torch files need PyTorch (the [parity] extra); .safetensors does not"
        ) from None
    return torch


def _arrays_only(flat: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    for name, array in flat.items():
        if not isinstance(array, np.ndarray | np.generic) or array.dtype.hasobject:
            raise WeightsError(f"{path.name}: {name} is a {type(array).__name__}, not an array of numbers")
    return {name: np.asarray(array) for name, array in flat.items()}
