"""`nfnet predict`: a photograph in, its likeliest classes out; clear errors for what can't be read."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from PIL import Image
from released import rule_params
from sklearn.datasets import load_sample_image

from nfnet_lib import models
from nfnet_lib.augment import default_margin, eval_views
from nfnet_lib.cli import main
from nfnet_lib.config import ConfigError
from nfnet_lib.decode import decode_image
from nfnet_lib.predict import eval_margin, loss_of, predict, read_image, read_labels
from nfnet_lib.pretrained import save_deepmind
from nfnet_lib.step import normalise

CLASSES = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    Image.fromarray(load_sample_image("china.jpg")).save(folder / "photo.jpg", quality=90)
    params = rule_params(models.create("F0-mini", CLASSES))
    save_deepmind(params, "F0-mini", folder / "weights.npz")
    (folder / "labels.txt").write_text("".join(f"thing {i}\n" for i in range(CLASSES)))
    return folder, params


def test_a_photograph_gets_the_model_s_classes(files, capsys):
    folder, params = files
    arguments = ["predict", str(folder / "photo.jpg"), "--weights", str(folder / "weights.npz")]
    assert main([*arguments, "--labels", str(folder / "labels.txt"), "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4

    pixels = np.asarray(Image.open(folder / "photo.jpg").convert("RGB"))
    model = models.create("F0-mini", CLASSES)
    view = eval_views([pixels], model.variant.test_px, default_margin(model.variant.test_px), model.variant.squash)
    wanted = np.asarray(jax.nn.softmax(jax.jit(model.apply)(params, normalise(jnp.asarray(view)))[0]))
    for line, index in zip(lines[1:], np.argsort(-wanted)[:3], strict=True):
        assert f"thing {index}" in line and f"{wanted[index]:.4f}" in line
    assert main(arguments) == 0
    assert "thing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"photo.jpg": "none.jpg"}, "image: .*none.jpg does not exist"),
        ({"photo.jpg": "labels.txt"}, "not a readable picture"),
        ({"weights.npz": "none.npz"}, "none.npz does not exist"),
        ({"weights.npz": "labels.txt"}, "labels.txt is neither"),
        ({"--top": "13"}, "top: 13 is out of range; allowed: 1 to 12"),
        ({"--resolution": "43"}, "resolution: 43 is not a multiple of 8"),
        ({"labels.txt": "photo.jpg"}, "labels: .* can't be read"),
        ({"labels.txt": "none.txt"}, "labels: .* can't be read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(files, capsys, change, message):
    folder, _ = files
    names = {name: change.get(name, name) for name in ("photo.jpg", "weights.npz", "labels.txt")}
    arguments = ["predict", str(folder / names["photo.jpg"]), "--weights", str(folder / names["weights.npz"])]
    arguments += ["--labels", str(folder / names["labels.txt"])]
    arguments += [text for key, value in change.items() if key.startswith("--") for text in (key, value)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error


def test_a_program_that_calls_itself_a_picture_is_not_run(tmp_path):
    """Pillow hands EPS to Ghostscript, which runs it."""
    (tmp_path / "picture.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(ConfigError, match="cannot identify image file"):
        read_image(tmp_path / "picture.jpg")


def test_label_files_of_every_kind(tmp_path):
    names = ["ant", "bee", "cat"]
    for content in ("ant\nbee\ncat\n", json.dumps(names), json.dumps(dict(enumerate(names))),
                    json.dumps({str(i): [f"n{i}", name] for i, name in enumerate(names)})):  # fmt: skip
        (tmp_path / "labels").write_text(content)
        assert read_labels(tmp_path / "labels", 3) == names
    with pytest.raises(ValueError, match="3 names; the weights have 4 classes"):
        read_labels(tmp_path / "labels", 4)


def test_a_photograph_is_turned_upright(tmp_path):
    pixels = load_sample_image("flower.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by a quarter to see it upright
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "print.jpg", exif=exif)
    trained_on = decode_image((tmp_path / "print.jpg").read_bytes())
    np.testing.assert_array_equal(read_image(tmp_path / "print.jpg"), np.rot90(trained_on, -1))


def test_a_run_folder_is_weights_too(tmp_path):
    from nfnet_lib import train
    from nfnet_lib.config import PretrainConfig
    from nfnet_lib.predict import example_picture

    config = PretrainConfig(
        variant="Ti/4-mini", num_classes=5, examples_per_epoch=64, heldout_examples=32, batch_size=16, resolution=16,
        eval_resolution=24, image_size=24, optimizer="adamw", peak_lr=0.001, position="sincos2d", pool="map",
    )  # fmt: skip
    folder = tmp_path / config.run_id
    summary = train.run(config, folder, progress=False)
    assert np.isfinite(summary["heldout_loss"])
    pixels, origin = example_picture(folder)
    assert pixels.shape == (24, 24, 3) and "fractals" in origin
    table = predict(pixels, folder)
    assert len(table) == 5 and table["probability"].sum() == pytest.approx(1, abs=1e-5)


def test_fewer_than_five_classes_are_all_listed(tmp_path):
    save_deepmind(rule_params(models.create("F0-mini", 3)), "F0-mini", tmp_path / "weights.npz")
    assert len(predict(np.zeros((40, 40, 3), np.uint8), tmp_path / "weights.npz", resolution=32)) == 3


def test_sixteen_bit_pictures_are_scaled_as_in_training(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = read_image(tmp_path / "deep.png")
    np.testing.assert_array_equal(pixels, decode_image((tmp_path / "deep.png").read_bytes()))
    assert len(np.unique(pixels)) > 50


def test_pixels_that_are_not_rgb_are_refused(files):
    folder, _ = files
    for shape in ((64, 64), (64, 64, 1), (64, 64, 4)):
        with pytest.raises(ConfigError, match=r"image: pixels are uint8 .*; expected uint8 \[H, W, 3\]"):
            predict(np.zeros(shape, np.uint8), folder / "weights.npz")


def test_a_run_s_margin_and_loss_are_those_of_its_evaluation(tmp_path):
    config = {"eval_margin": 6, "eval_resolution": 24, "loss": "sigmoid"}
    synthetic.write_runs(tmp_path, [synthetic.summary("own", config=config), synthetic.summary("plain")])
    own = tmp_path / "own"
    assert (eval_margin(own, 24), eval_margin(own, 48), loss_of(own)) == (6, 12, "sigmoid")
    assert (eval_margin(tmp_path / "plain", 32), loss_of(tmp_path / "plain")) == (default_margin(32), "softmax")
    assert eval_margin(tmp_path / "weights.npz", 256) == 32
