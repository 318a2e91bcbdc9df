"""Weight files: what the released code wrote is read exactly, what is written is read back to the bit, and nothing is run."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import dill
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from released import rule, rule_params

from nfnet_lib import models
from nfnet_lib.pretrained import WeightsError, load_deepmind, load_timm, save_deepmind, save_timm
from nfnet_lib.weights import load_weights

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tiny.json").read_text())


def released_file(path: Path, **options) -> Path:
    """A file as DeepMind's are: dill, {module: {array name: array}}, the names and shapes measured on the released code."""
    modules: dict = {}
    for name, shape in GOLDEN["leaves"].items():
        module, array = name.rsplit("/", 1)
        modules.setdefault(module, {})[array] = rule(name, tuple(shape))
    with path.open("wb") as file:
        dill.dump(modules, file, **options)
    return path


def equal(a: dict, b: dict) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return jax.tree.all(same)


def test_a_released_file_gives_the_released_logits(tmp_path):
    variant, params = load_deepmind(released_file(tmp_path / "F0_haiku.npz"))
    assert variant == "F0-mini"
    shape = (GOLDEN["batch"], GOLDEN["res"], GOLDEN["res"], 3)
    images = jnp.asarray(np.random.default_rng(7).standard_normal(shape).astype(np.float32))
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(models.create(variant).apply)(params, images)
    np.testing.assert_allclose(logits, GOLDEN["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path, protocol):
    _, params = load_deepmind(released_file(tmp_path / "file.npz", protocol=protocol))
    assert equal(params, load_deepmind(released_file(tmp_path / "other.npz"))[1])


@pytest.mark.parametrize(
    ("name", "rule_name", "classes"),
    [
        ("F0-mini", "published", 10),
        ("F2-mini", "published", 3),
        ("F1+-mini", "published", 7),
        ("F0+-mini", "released", 1000),
    ],
)
def test_save_then_load_is_bit_identical(tmp_path, name, rule_name, classes):
    params = rule_params(models.create(name, classes, bottleneck_rule=rule_name))
    for save, load, suffix in ((save_deepmind, load_deepmind, "npz"), (save_timm, load_timm, "safetensors")):
        path = tmp_path / f"weights.{suffix}"
        save(params, name, path)
        variant, again = load(path)
        assert variant == name and variant.num_classes == classes
        assert equal(params, again)
        model = models.create(variant)  # as it is
        assert model.num_classes == classes
        assert jax.tree.map(jnp.shape, again) == jax.tree.map(lambda leaf: leaf.shape, model.param_shapes())
        assert load_weights(path)[0] == name


def test_dill_reads_what_is_written(tmp_path):
    save_deepmind(load_deepmind(released_file(tmp_path / "a.npz"))[1], "F0-mini", tmp_path / "b.npz")
    with (tmp_path / "a.npz").open("rb") as a, (tmp_path / "b.npz").open("rb") as b:
        before, after = dill.load(a), dill.load(b)
    assert {m: set(arrays) for m, arrays in before.items()} == {m: set(arrays) for m, arrays in after.items()}
    for module, arrays in before.items():
        for name, array in arrays.items():
            assert array.dtype == after[module][name].dtype and np.array_equal(array, after[module][name])
            assert array.shape == after[module][name].shape


def test_nothing_on_disk_is_overwritten_unasked(tmp_path):
    params = rule_params(models.create("F0-mini", 5))
    path = tmp_path / "weights.npz"
    path.write_text("dear data")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_deepmind(params, "F0-mini", path)
    assert path.read_text() == "dear data"
    save_deepmind(params, "F0-mini", path, overwrite=True)
    assert equal(load_deepmind(path)[1], params)


class Payload:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {marker}",), "system"),
        (subprocess.call, (["touch", "{marker}"],), "subprocess.call"),
        (eval, ("open('{marker}', 'w')",), "builtins.eval"),
        (exec, ("open('{marker}', 'w')",), "builtins.exec"),
        (getattr, ("text", "upper"), "builtins.getattr"),
        (np.load, ("{marker}",), "load"),
        (np.fromfile, ("{marker}",), "fromfile"),
        (sys.exit, (), "sys.exit"),
    ],
)
@pytest.mark.parametrize("where", ["value", "key", "module", "top"])
def test_a_pickle_that_would_run_something_is_refused_by_name(tmp_path, function, arguments, name, where):
    marker = tmp_path / "ran"

    def fill(value):
        if isinstance(value, list):
            return [fill(v) for v in value]
        return value.replace("{marker}", str(marker)) if isinstance(value, str) else value

    evil = Payload(function, *map(fill, arguments))
    array = np.zeros(3, np.float32)
    content = {
        "value": {"NFNet/~/linear": {"w": evil}}, "key": {"NFNet/~/linear": {"w": array}, evil: {}},
        "module": {"NFNet/~/linear": evil}, "top": evil,
    }[where]  # fmt: skip
    path = tmp_path / "weights.npz"
    path.write_bytes(dill.dumps(content))
    with pytest.raises(WeightsError, match="refused"):
        load_deepmind(path)
    assert not marker.exists()


def test_functions_that_dill_would_rebuild_are_refused(tmp_path):
    path = tmp_path / "weights.npz"
    path.write_bytes(dill.dumps({"NFNet/~/linear": {"w": lambda: 1}}, recurse=True))
    with pytest.raises(WeightsError, match=r"refused dill\._dill\._create_function"):
        load_deepmind(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_files_say_so(tmp_path, share):
    whole = released_file(tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "cut.npz"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match=r"cut\.npz"):
        load_deepmind(path)


def change(modules: dict, what: str) -> None:
    if what == "missing":
        del modules["NFNet/~/nf_block_3/~/conv1b"]["gain"]
    elif what == "extra":
        modules["NFNet/~/nf_block_3/~/conv9"] = {"w": np.zeros(3, np.float32)}
    elif what == "shape":
        modules["NFNet/~/final_conv"]["w"] = modules["NFNet/~/final_conv"]["w"][..., :-1]
    elif what == "integers":
        modules["NFNet/~/linear"]["w"] = modules["NFNet/~/linear"]["w"].astype(np.int32)
    elif what == "objects":
        modules["NFNet/~/linear"]["w"] = np.array([None, "x"], object)
    elif what == "blocks":
        for name in [name for name in modules if "nf_block_11" in name]:
            del modules[name]
    elif what == "flat":
        modules["NFNet/~/linear"] = modules["NFNet/~/linear"]["w"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "nf_block_3/~/conv1b/gain is missing"), ("extra", "conv9/w"), ("shape", "final_conv/w has shape"),
        ("integers", "int32"), ("objects", "refused|not an array"), ("blocks", "no variant has 11 blocks"),
        ("flat", "does not hold"),
    ],
)  # fmt: skip
def test_wrong_files_are_named_with_what_is_wrong(tmp_path, what, message):
    path = released_file(tmp_path / "weights.npz")
    with path.open("rb") as file:
        modules = dill.load(file)
    change(modules, what)
    path.write_bytes(pickle.dumps(modules))
    with pytest.raises(WeightsError, match=message):
        load_deepmind(path)


def test_other_files_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_deepmind(tmp_path / "none.npz")
    text = tmp_path / "text.npz"
    text.write_text("not weights")
    for load in (load_deepmind, load_timm, load_weights):
        with pytest.raises(WeightsError, match=r"text\.npz"):
            load(text)
    np.savez(tmp_path / "arrays.npz", w=np.zeros(3))
    with pytest.raises(WeightsError, match="not a pickle"):
        load_deepmind(tmp_path / "arrays.npz")
    with pytest.raises(WeightsError, match="embedding/kernel"):
        load_weights(tmp_path / "arrays.npz")


def test_params_that_do_not_fit_are_refused(tmp_path):
    params = rule_params(models.create("F0-mini", 5))
    for broken, message in (
        (params | {"head": {"w": params["head"]["w"][1:], "b": params["head"]["b"]}}, "head/w is"),
        (params | {"more": {"w": params["head"]["w"]}}, "has no more/w"),
        ({"head": params["head"]}, "not the parameters of an NFNet"),
    ):
        with pytest.raises(WeightsError, match=message):
            save_deepmind(broken, "F0-mini", tmp_path / "x.npz")
    with pytest.raises(WeightsError, match="but F1-mini has"):
        save_deepmind(params, "F1-mini", tmp_path / "x.npz")
    with pytest.raises(WeightsError, match=r"\.safetensors"):
        save_timm(params, "F0-mini", tmp_path / "x.npz")
    assert not list(tmp_path.iterdir())


def test_bfloat16_safetensors_are_read(tmp_path):
    from safetensors.numpy import load_file, save_file

    params = rule_params(models.create("F0-pico", 5))
    save_timm(params, "F0-pico", tmp_path / "whole.safetensors")
    halves = {name: array.astype(jnp.bfloat16) for name, array in load_file(tmp_path / "whole.safetensors").items()}
    save_file(halves, tmp_path / "halves.safetensors")
    _, read = load_weights(tmp_path / "halves.safetensors")
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, np.asarray(other).astype(jnp.bfloat16).astype(np.float32))
