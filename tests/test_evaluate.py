"""Evaluation of finished weights: exact shares with a head that always says the same, classes matched by name."""

import dataclasses
import shutil

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from released import rule_params

from nfnet_lib import evaluate, models
from nfnet_lib.cli import main
from nfnet_lib.config import ConfigError
from nfnet_lib.loader import Examples
from nfnet_lib.pretrained import save_deepmind
from nfnet_lib.step import eval_step, means_of

WORDNET = ("n01440764", "n01443537", "n02119022", "n15075141")  # ImageNet's classes 0, 1, 277 and 999


def always(path, num_classes, *classes):
    """F0-mini in DeepMind's format, which prefers `classes` in this order whatever it sees."""
    params = rule_params(models.create("F0-mini", num_classes=num_classes))
    bias = np.zeros(num_classes, np.float32)
    bias[list(classes)] = np.arange(len(classes), 0, -1)
    params["head"] = {"w": jnp.zeros_like(params["head"]["w"]), "b": jnp.asarray(bias)}
    save_deepmind(params, "F0-mini", path)
    return path


def pictures(root, names, count):
    rng = np.random.default_rng(0)
    for name, number in zip(names, count, strict=True):
        (root / name).mkdir(parents=True)
        for i in range(number):
            cv2.imwrite(str(root / name / f"{i}.png"), rng.integers(0, 255, (20, 24, 3), np.uint8))


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    pictures(root / "train", WORDNET, [1, 1, 1, 1])
    pictures(root / "val", WORDNET, [2, 3, 4, 1])
    return f"folder:{root}@val"


def test_shares_are_exact_at_every_resolution(tmp_path, imagenet_like, capsys):
    weights = always(tmp_path / "w.npz", 1000, 277, 500, 1)
    table = evaluate.evaluate_weights(weights, imagenet_like, [32, 64], classes="all", batch_size=3, progress=False)
    assert list(table["resolution"]) == [32, 64] and set(table["classes"]) == {1000} and set(table["examples"]) == {10}
    np.testing.assert_allclose(table["top1"], 0.4)
    np.testing.assert_allclose(table["top5"], 0.4 + 0.3)
    logits = np.zeros(1000)
    logits[[277, 500, 1]] = 3, 2, 1
    expected = np.log(np.exp(logits).sum()) - np.mean([0, 0, 1, 1, 1, 3, 3, 3, 3, 0])
    np.testing.assert_allclose(table["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(table["ece"], abs(np.exp(3) / np.exp(logits).sum() - 0.4), rtol=1e-4)
    assert "top-1 40.0" in evaluate.sentence(table)
    command = [
        "evaluate",
        str(weights),
        "--data",
        imagenet_like,
        "--resolutions",
        "32",
        "--out",
        str(tmp_path / "t.csv"),
    ]
    assert main(command) == 0 and "4 classes" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "t.csv")["top1"].tolist() == [0.4]


def test_only_classes_that_are_present_compete(tmp_path, imagenet_like, caplog):
    weights = always(tmp_path / "w.npz", 1000, 500, 1, 277)
    everything = evaluate.evaluate_weights(weights, imagenet_like, [32], classes="all", batch_size=3, progress=False)
    evaluate._step.cache_clear()  # of other tests
    with jax.log_compiles(), caplog.at_level("WARNING"):
        present = evaluate.evaluate_weights(weights, imagenet_like, [32], progress=False)  # fewer classes than the head's
        words = "Finished tracing eval_step", "Compiling jit(eval_step)"
        assert len([r for r in caplog.messages if r.startswith(words)]) == 2
        caplog.clear()
        evaluate.evaluate_weights(weights, imagenet_like.replace("@val", "@train"), [32], progress=False)
        assert not [r for r in caplog.messages if r.startswith(words)], "the next set needs no other program"
    assert everything["top1"].item() == 0 and present["top1"].item() == pytest.approx(0.3)
    assert present["classes"].item() == 4


class Several:
    """ReaL's form: some examples have several right labels, some none."""

    name, num_classes, labels_per_example, fingerprint = "several", 5, 3, "several"
    labels = ((0,), (1, 2), (), (4, 0, 2), (3,))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return np.full((16, 16, 3), 40 * index, np.uint8), self.labels[index]


def test_any_right_label_counts_and_examples_without_one_do_not(tmp_path, monkeypatch):
    weights = always(tmp_path / "w.npz", 5, 2, 0)
    monkeypatch.setattr(evaluate, "open_set", lambda *_: Several())
    row = evaluate.evaluate_weights(weights, "tfds:imagenet2012_real", [32], progress=False).iloc[0]
    assert row["examples"] == 4 and row["top1"] == pytest.approx(2 / 4) and row["top5"] == 1


def test_classes_are_matched_by_name_or_refused(tmp_path):
    class Named(Several):
        name, num_classes, class_names = "named", 3, ("cat", "dog", "owl")

    (tmp_path / "labels.txt").write_text("owl\nfox\ncat\ndog\n")
    np.testing.assert_array_equal(evaluate.class_mapping(Named(), 4, tmp_path / "labels.txt"), [2, 3, 0])
    np.testing.assert_array_equal(evaluate.class_mapping(Named(), 3), [0, 1, 2])
    with pytest.raises(ConfigError, match="named has 3 classes, the weights 1000"):
        evaluate.class_mapping(Named(), 1000)
    Named.class_names = ("cat", "emu", "owl")
    with pytest.raises(ConfigError, match="lacks classes of named, which has emu"):
        evaluate.class_mapping(Named(), 4, tmp_path / "labels.txt")


def test_the_order_of_imagenets_classes_is_that_of_the_published_weights():
    names = evaluate._imagenet_names()
    assert len(names) == 1000 and names == sorted(names)
    assert [names.index(name) for name in WORDNET] == [0, 1, 277, 999]


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    weights = always(tmp_path / "w.npz", 10, 3)
    for arguments, words in (
        ([], "dataset: '' is none"), (["--data", "digits", "--resolutions", "33"], "33 is not a multiple of"),
        (["--data", "digitz"], "unknown 'digitz'"), (["--data", "digits", "--out", "/no/t.csv"], "is not a folder"),
    ):  # fmt: skip
        assert main(["evaluate", str(weights), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert evaluate.sweep_resolutions(weights, "64, 32") == [64, 32]
    with pytest.raises(ConfigError, match="resolutions: 'x' is not"):
        evaluate.sweep_resolutions(weights, "x")


def test_with_a_sigmoid_loss_examples_without_a_label_count_for_the_loss_alone():
    """They are negatives of every class; there is nothing of which they could be a hit."""
    logits = 5 * jax.nn.one_hot(jnp.asarray([0, 1, 2, 3]), 4) - 2

    class Says(models.Model):
        def apply(self, *_):
            return logits

    model = Says(**{field.name: getattr(models.create("F0-pico", 4), field.name) for field in dataclasses.fields(models.Model)})
    examples = Examples(
        jnp.zeros((4, 8, 8, 3), jnp.uint8), jnp.asarray([[0], [1], [0], [0]]),
        jnp.asarray([[1.0], [1.0], [0.0], [0.0]]), jnp.ones(4),
    )  # fmt: skip
    means = means_of(eval_step({}, examples, model=model, loss="sigmoid"))
    assert means["top1"] == means["top5"] == 1
    assert means["ece"] == pytest.approx(1 - 1 / (1 + np.exp(-3)), rel=1e-5)
    positive, negative = np.log1p(np.exp(-3)), np.log1p(np.exp(-2))
    expected = (2 * (positive + 3 * negative) + 2 * (np.log1p(np.exp(3)) + 3 * negative)) / 4
    assert means["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_example_that_can_not_be_read_is_left_out_whatever_competes(tmp_path, imagenet_like):
    root = tmp_path / "set"
    shutil.copytree(imagenet_like.removeprefix("folder:").removesuffix("@val"), root)
    (root / "val" / WORDNET[0] / "junk.png").write_bytes(b"junk")
    (root / "val" / WORDNET[0] / "link.png").symlink_to(tmp_path / "nowhere.png")
    weights = always(tmp_path / "w.npz", 1000, 277, 500, 1)
    for classes in ("all", "present"):
        row = evaluate.evaluate_weights(weights, f"folder:{root}@val", [32], classes=classes, progress=False).iloc[0]
        assert row["examples"] == 10 and row["top1"] == pytest.approx(0.4)
