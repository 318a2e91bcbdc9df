"""Bad input is one line that names the parameter, the value and what is allowed; nothing is written."""

import pytest
import yaml

from nfnet_lib import PROJECT
from nfnet_lib.config import ConfigError, FinetuneConfig, PretrainConfig, StudyConfig, config_from_params
from nfnet_lib.recipe import load_recipe
from nfnet_lib.study_grid import pretrain_cells


@pytest.mark.parametrize(
    "params,words",
    [
        ({"peek_lr": 0.1}, "peek_lr: unknown.*peak_lr"),
        ({"peak_lr": "fast"}, "peak_lr: 'fast'"),
        ({"peak_lr": -1}, "peak_lr: -1.*greater than 0"),
        ({"peak_lr": float("nan")}, "peak_lr"),
        ({"batch_size": "many"}, "batch_size: 'many'"),
        ({"batch_size": 0.5}, "batch_size: 0.5"),
        ({"batch_size": True}, "batch_size: True"),
        ({"flip": "perhaps"}, "flip: 'perhaps'"),
        ({"variant": "F8-mini"}, "variant: unknown 'F8-mini'; did you mean"),
        ({"resolution": 30}, "resolution: 30 is not a multiple of 8.*24 or 32"),
        (
            {"variant": "F0", "resolution": 100, "eval_resolution": 128},
            "resolution: 100 is not a multiple of 32.*96 or 128",
        ),
        ({"batch_size": 9000}, "batch_size: 9000 is larger than the data.*8192"),
        ({"augmult": 3}, "augmult: 3 does not divide batch_size=32"),
        ({"epoch_budget": 0.3}, "epoch_budget: 0.3.*nearest budgets: 0.296875 or 0.300781"),
        ({"epoch_budget": 0.001}, "epoch_budget: 0.001.*nearest budgets: 0.00390625"),
        ({"kind": "pretraining"}, "kind: 'pretraining'"),
        ({"kind": "finetune"}, "pretrained_run"),
    ],
)
def test_bad_parameters_are_named(params, words):
    with pytest.raises(ConfigError, match=words) as error:
        config_from_params(params)
    assert "\n" not in str(error.value)


def test_yaml_numbers_that_arrive_as_text():
    params = yaml.safe_load("{peak_lr: 1e-1, examples_per_epoch: 8.192e3, weight_decay: 1e-6, flip: 'false'}")
    assert isinstance(params["peak_lr"], str) is isinstance(params["weight_decay"], str)
    config = PretrainConfig.from_params({**params, "examples_per_epoch": "8192e0"})
    assert (config.peak_lr, config.examples_per_epoch, config.weight_decay, config.flip) == (0.1, 8192, 1e-6, False)


def test_derived_counts():
    config = PretrainConfig(epoch_budget=0.25, examples_per_epoch=4096, batch_size=32, augmult=4)
    assert (config.steps, config.unique_per_step, config.warmup_steps) == (32, 8, 2)
    long = PretrainConfig(variant="F0", epoch_budget=1, examples_per_epoch=4096 * 10**6, batch_size=4096,
                          resolution=224, eval_resolution=256)  # fmt: skip
    assert (long.steps, long.warmup_steps) == (10**6, 5000)


def test_run_ids_differ_when_any_parameter_differs():
    base = PretrainConfig()
    ids = {base.run_id} | {
        PretrainConfig(**{name: value}).run_id
        for name, value in (("seed", 1), ("weight_decay", 0), ("peak_lr", 0.2), ("min_area", 0.5), ("unroll", 2))
    }
    assert len(ids) == 6
    assert PretrainConfig().run_id == base.run_id
    assert FinetuneConfig(pretrained_run="x").run_id.startswith("finetune_")


STUDY = {
    "name": "tiny", "pretrain": {"examples_per_epoch": 64, "batch_size": 16}, "variants": ["F0-mini"],
    "epoch_budgets": [0.25, 1], "lr_grid": [0.1, 0.2],
}  # fmt: skip


@pytest.mark.parametrize(
    "change,words",
    [
        ({"variants": ["F0-mini", "Z1"]}, "variant: unknown 'Z1'"),
        ({"epoch_budgets": [0.3]}, "epoch_budget: 0.3"),
        ({"variant_epoch_budgets": {"F1-mini": [1]}}, "variant_epoch_budgets: F1-mini: .*some of F0-mini"),
        ({"variant_epoch_budgets": {"F0-mini": []}}, "variant_epoch_budgets: F0-mini: "),
        ({"variant_epoch_budgets": {"F0-mini": [1, 1.0]}}, "variant_epoch_budgets: F0-mini: .*repeats"),
        ({"variant_epoch_budgets": {"F0-mini": [0.3]}}, "epoch_budget: 0.3"),
        ({"variant_epoch_budgets": {"F0-mini": [1]}, "lr_start": {0.25: 0.1}}, "lr_start: 0.25"),
        ({"lr_grid": [0.2, 0.1]}, "lr_grid.*ascend"),
        ({"lr_start": {1: 0.3}}, "lr_start.*0.3"),
        ({"name": "../out"}, "name: '../out'"),
        ({"varaints": ["F0-mini"]}, "varaints: unknown.*variants"),
        ({"pretrain": {"batchsize": 4}}, "batchsize: unknown.*batch_size"),
        ({"finetune": {"rho": -1}}, "rho: -1"),
    ],
)
def test_bad_studies_are_refused_whole(tmp_path, change, words):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"study": {**STUDY, **change}}))
    with pytest.raises(ConfigError, match=words):
        StudyConfig.from_file(path)


def test_single_variants_have_budgets_of_their_own():
    study = StudyConfig(**STUDY | {"variants": ["F1-mini", "F0-mini"], "variant_epoch_budgets": {"F0-mini": [2, 4]}})
    study.validate_cells()
    assert {cell.name for cell in pretrain_cells(study)} == {"F1-mini_ep0.25", "F1-mini_ep1", "F0-mini_ep2", "F0-mini_ep4"}
    StudyConfig(**study.model_dump() | {"lr_start": {4: 0.1, 0.25: 0.2}}).validate_cells()


def test_unreadable_study_files(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        StudyConfig.from_file(tmp_path / "none.yaml")
    for text in ("study: [", "a: 1", "!!python/object/apply:os.system ['true']"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match="study file"):
            StudyConfig.from_file(tmp_path / "bad.yaml")


def test_a_name_that_papermill_injected_in_vain_is_refused():
    scope = {
        "variant": "F1-mini",
        "helper": 3,
        "In": ["", "variant = 'F0-mini'", "# Parameters\nvariant = 'F1-mini'\n"],
    }
    assert PretrainConfig.notebook_params(scope) == {"variant": "F1-mini"}
    scope["In"].append("# Parameters\nstudy_dir = 'x'\nvarient = 'F1-mini'\n")
    with pytest.raises(ConfigError, match="varient: unknown parameter of PretrainConfig; did you mean variant"):
        PretrainConfig.notebook_params(scope)


@pytest.mark.parametrize(
    "path", sorted(PROJECT.glob("params/*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_params_file_is_valid_and_says_what_it_is(path):
    text = path.read_text()
    assert all(word in text.split("\nstudy:")[0] for word in ("# ", "Source:", "Cost", "Command:"))
    if "\nfinetune:" in text:
        FinetuneConfig.from_params(load_recipe(path).params("F3") | {"pretrained_run": "x"})
    elif "\nstudy:" in text:
        assert StudyConfig.from_file(path).name == (path.parent.name if path.stem == "study" else path.stem)
    else:
        config_from_params(yaml.safe_load(text) | ({"pretrained_run": "x"} if path.stem == "finetune" else {}))
