"""Fine-tuning from weight files: one command, any data, and clear words for what does not fit."""

import json
import shutil

import cv2
import jax
import numpy as np
import pytest

from nfnet_lib import models
from nfnet_lib.cli import main
from nfnet_lib.config import ConfigError, FinetuneConfig
from nfnet_lib.finetune import finetune_config
from nfnet_lib.pretrained import save_deepmind
from nfnet_lib.train import run
from nfnet_lib.weights import load_params, load_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """F0-mini with 10 classes in DeepMind's format."""
    path = tmp_path_factory.mktemp("weights") / "F0-mini_haiku.npz"
    save_deepmind(models.create("F0-mini", num_classes=10).init(jax.random.key(3)), "F0-mini", path)
    return path


def picture_folder(root, classes):
    rng = np.random.default_rng(classes)
    for i in range(12 * classes):
        folder = root / f"class{i % classes:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = cv2.resize(rng.integers(0, 120, (3, 3, 3), np.uint8), (40, 36)) + np.uint8(i % classes * 12)
        cv2.imwrite(str(folder / f"{i}.jpg"), pixels)
    return f"folder:{root}"


def test_one_command_from_a_released_file_to_a_folder_of_ten_classes(weights, tmp_path, capsys):
    data, out = picture_folder(tmp_path / "pictures", 10), tmp_path / "run"
    arguments = ["finetune", "--weights", str(weights), "--data", data, "--epochs", "2", "--batch-size", "16"]
    assert main([*arguments, "--out", str(out), "-p", "resolution=32", "-p", "eval_resolution=32"]) == 0
    assert "F0-mini fine-tuned on folder:" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    config = summary["config"]
    assert config["rho"] == 0.05 and config["drop_rate"] == 0.25 and abs(config["epoch_budget"] - 2) < 0.1
    assert summary["heldout_quarantined"] == 0 and 0 <= summary["heldout_top1"] <= 1
    assert load_params(out)["head"]["b"].shape == (10,)
    assert (load_params(out)["head"]["w"] != load_weights(weights)[1]["head"]["w"]).all(), "a new head"
    start, end = load_weights(weights)[1]["stem"]["conv1"]["w"], load_params(out)["stem"]["conv1"]["w"]
    distance = float(np.linalg.norm(np.asarray(end) - start) / np.linalg.norm(start))
    assert 0 < distance < 0.5, "it began where the file says"


def test_a_head_is_kept_where_the_classes_are_the_same(weights, tmp_path):
    data = picture_folder(tmp_path / "ten", 10)
    options = {"epochs": 1, "batch_size": 16, "resolution": 32, "eval_resolution": 32, "peak_lr": 1e-6}
    config = finetune_config(weights, data, head="keep", **options)
    run(config, tmp_path / "kept", progress=False)
    np.testing.assert_allclose(
        load_params(tmp_path / "kept")["head"]["w"], load_weights(weights)[1]["head"]["w"], atol=1e-4
    )
    other = picture_folder(tmp_path / "five", 5)
    with pytest.raises(ConfigError, match=r"head: 'keep', but .* has 10 classes and the data 5"):
        run(finetune_config(weights, other, head="keep", **options), tmp_path / "no", progress=False)
    assert not (tmp_path / "no").exists()


def test_numbers_that_arrive_as_text_are_numbers(weights):
    """YAML 1.1 reads 1e2 as text."""
    config = finetune_config(weights, "digits", selection_examples="1e2", heldout_examples="5e1")
    assert (config.selection_examples, config.heldout_examples, config.examples_per_epoch) == (100, 50, 1337)


def test_what_does_not_fit_is_said_before_anything_is_written(weights, tmp_path, capsys):
    tiny = {"dataset": "digits", "examples_per_epoch": 64, "heldout_examples": 16, "batch_size": 32}
    for params, words in (
        ({"pretrained_weights": str(weights), "variant": "F1-mini"}, "variant: 'F1-mini' is not that of .*, 'F0-mini'"),
        ({"pretrained_weights": str(tmp_path / "none.npz")}, "pretrained_weights: .*none.npz does not exist"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(FinetuneConfig.from_params(tiny | params), tmp_path / "out")
    for params in ({"kind": "finetune"}, {"pretrained_run": "a", "pretrained_weights": "b"}):
        with pytest.raises(ConfigError, match=r"pretrained_run: .* name one of them"):
            FinetuneConfig.from_params(tiny | params)
    (tmp_path / "junk.npz").write_bytes(b"junk")
    out = ["--out", str(tmp_path / "out")]
    for arguments, words in (
        (["--weights", str(tmp_path / "junk.npz"), "--data", "digits"], "junk.npz is neither"),
        (["--weights", str(weights), "--data", "digits", "--epochs", "nan"], "epochs, batch_size: nan"),
        (["--weights", str(weights), "--data", "digits", "--epochs", "inf"], "epochs, batch_size: inf"),
        (["--weights", str(weights), "--data", "digits", "--batch-size", "5000"], "5000 is larger than the data"),
        (["--weights", str(weights), "--data", "digit"], "unknown 'digit'; did you mean digits"),
        (["--weights", str(weights), "--data", "digits", "-p", "resolutoin=32"], "did you mean resolution"),
        (["--weights", str(weights), "--data", "digits", "-p", "resolution"], "is not NAME=VALUE"),
        (["--weights", str(weights), "--data", "digits", "-p", "batch_size=16"], "has an option of its own, --batch-size"),
        (["--weights", str(weights), "--data", "digits", "-p", "dataset=fractals"], "dataset has an option of its own, --data"),
    ):
        assert main(["finetune", *arguments, *out]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_class_names_are_remembered(tmp_path):
    """Another folder's classes are matched by them, and a head is kept for the same ones only."""
    from nfnet_lib.config import PretrainConfig
    from nfnet_lib.evaluate import evaluate_weights
    from nfnet_lib.weights import trained_classes

    data = picture_folder(tmp_path / "pictures", 3)
    settings = {"variant": "F0-pico", "examples_per_epoch": 20, "heldout_examples": 3, "batch_size": 10, "resolution": 16,
                "eval_resolution": 16}  # fmt: skip
    run(PretrainConfig(dataset=data, **settings), tmp_path / "trained", progress=False)
    assert trained_classes(tmp_path / "trained") == ("class00", "class01", "class02")
    shutil.copytree(tmp_path / "pictures", tmp_path / "others" / "val")
    (tmp_path / "others" / "val" / "class01").rename(tmp_path / "others" / "val" / "zebra")
    with pytest.raises(ConfigError, match="classes that the weights were not trained on, zebra; a labels file"):
        evaluate_weights(tmp_path / "trained", f"folder:{tmp_path}/others@val", progress=False)
    (tmp_path / "labels.txt").write_text("class00\nzebra\nclass02\n")
    sets = {"pictures": None, "others": tmp_path / "labels.txt"}
    shutil.move(tmp_path / "pictures", tmp_path / "val")
    shutil.copytree(tmp_path / "val", tmp_path / "pictures" / "val")
    rows = [
        evaluate_weights(tmp_path / "trained", f"folder:{tmp_path}/{name}@val", labels=labels, progress=False).iloc[0]
        for name, labels in sets.items()
    ]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6) and rows[0]["examples"] == 36
    kept = FinetuneConfig(dataset=f"folder:{tmp_path}/others", pretrained_run="trained", head="keep", **settings)
    with pytest.raises(ConfigError, match="what is 'class02' in the data is 'class01' to trained"):
        run(kept.model_copy(update={"train_split": "val", "heldout_split": "val"}), tmp_path / "tuned", progress=False)
    assert not (tmp_path / "tuned").exists()
