"""Widgets page through what there is, figures of data say what the data are, and 00_data runs on other data."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from nfnet_lib import data_plots, explore
from nfnet_lib.cell import execute
from nfnet_lib.cli import main
from nfnet_lib.sources import ArraySource, load_source

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "00_data.ipynb"


def shown(widget):
    return cv2.imdecode(np.frombuffer(widget.children[1].value, np.uint8), 1)


def test_paging_through_classes():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    labels[:10] = 0
    images = rng.integers(0, 255, (60, 20, 20, 3), np.uint8)
    widget = explore.browse(ArraySource("x", 3, "x", images, labels))
    choice, slider = widget.children[0].children
    first = shown(widget)
    assert slider.max == 2 and first.std() > 10
    slider.value = 2
    assert (shown(widget).shape != first.shape) or (shown(widget) != first).any()
    choice.value = 2
    assert slider.value == 0 and slider.max == 0, "17 of class 2 are one page"
    tile = cv2.resize(images[labels == 2][0], (explore.SIDE, explore.SIDE), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(shown(widget)[: explore.SIDE, : explore.SIDE, ::-1], tile)


def test_balance_counts_each_label_once():
    source = load_source("digits", "heldout", image_size=8)
    table = data_plots.balance_table(source)
    assert table["examples"].sum() == 360 and table["examples"].is_monotonic_decreasing
    counts = dict(zip(table["class"], table["examples"], strict=True))
    assert [counts[c] for c in range(10)] == np.bincount(source.labels).tolist()
    assert data_plots.balance_sentence(table).startswith(f"10 classes of {table['examples'].min()} to")
    (axes,) = data_plots.balance(table).axes
    assert [bar.get_height() for bar in axes.patches] == table["examples"].tolist()


def test_restarts_cost_a_reshuffling_loader_what_the_formula_says_and_ours_nothing():
    table = data_plots.restarts_table(5000, (0, 1, 4), seed=3)
    expected = [0, 0.25, 0.8**5]
    np.testing.assert_allclose(table["reshuffled"], expected, atol=0.02)
    assert (table["exactly_once"] == 0).all()


def test_the_notebook_on_digits(tmp_path):
    parameters = {"dataset": "digits", "examples": 300, "heldout_examples": 60, "image_size": 32, "resolution": 24}
    execute(NOTEBOOK, tmp_path / "00_data.ipynb", parameters)
    notebook = json.loads((tmp_path / "00_data.ipynb").read_text())
    text = json.dumps(notebook)
    assert "digits: 300 training and 60 held-out examples of 10 classes" in text
    assert "training pictures are near-duplicates" in text
    assert sum("image/png" in o.get("data", {}) for c in notebook["cells"] for o in c.get("outputs", [])) == 5


@pytest.mark.parametrize(
    "name,words", [("fractals", "fractals: endless, 64 classes"), ("digits@heldout", "digits: 360 examples")]
)
def test_data_show(name, words, tmp_path, capsys):
    assert main(["data", "show", name, "--out", str(tmp_path / "sheet.png")]) == 0
    assert words in capsys.readouterr().out and cv2.imread(str(tmp_path / "sheet.png")).std() > 10
    for out in ("sheet.txt", "none/sheet.png"):
        assert main(["data", "show", name, "--out", str(tmp_path / out)]) == 2
        assert "out: " in capsys.readouterr().err


def test_data_show_of_a_folder_with_a_picture_that_can_not_be_read(tmp_path):
    for number in range(16):
        path = tmp_path / "photos" / "a" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((20, 30, 3), 10 * number, np.uint8))
        if number % 2:
            path.write_bytes(b"no picture")
    assert main(["data", "show", f"folder:{tmp_path}/photos", "--out", str(tmp_path / "sheet.png")]) == 0
    assert (cv2.imread(str(tmp_path / "sheet.png")) == 128).any(), "a grey square stands for it"


def test_an_example_that_can_not_be_read_is_a_grey_picture_not_the_end_of_the_notebook():
    """Training leaves such examples out and goes on."""

    class Torn:
        name, num_classes, fingerprint = "torn", 2, "torn"

        def __len__(self):
            return 6

        def encoded(self, index):
            return b"", (index % 2,)

        def __getitem__(self, index):
            if index in (1, 4):
                raise ValueError("not a readable image")
            return np.full((20, 20, 3), 40 * index, np.uint8), (index % 2,)

    widget = explore.browse(Torn())
    tile = shown(widget)[: explore.SIDE, explore.SIDE + 6 : 2 * explore.SIDE + 6]
    assert (tile[2:10, 2:10] == 128).all()
    assert data_plots.classes_sheet(Torn()).axes
