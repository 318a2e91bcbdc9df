"""Figures: what is drawn is what the tables say, labels do not collide, odd tables survive, files are reproducible."""

import itertools
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import synthetic

from nfnet_lib import paper, plots, scaling
from nfnet_lib.plot_style import VARIANT_LOOKS
from nfnet_lib.variants import VARIANTS


@pytest.fixture(scope="module")
def runs():
    return synthetic.table(synthetic.pretrain_summaries(noise=0.002))


@pytest.fixture(scope="module")
def result(runs):
    return scaling.frontier_analysis(runs, resamples=200)


@pytest.fixture(scope="module")
def finetuned(runs):
    origins = synthetic.pretrain_summaries(noise=0.002)[::5]
    return scaling.finetune_table(pd.concat([runs, synthetic.table(synthetic.finetune_summaries(origins))]))


def _line(axes, gid):
    return next(line for line in axes.lines if line.get_gid() == gid)


def _labels(axes):
    return [text for text in axes.texts if text.get_gid() == "label"]


def _assert_labels_apart(figure):
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for axes in figure.axes for label in _labels(axes)]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    page = figure.bbox
    for box in boxes:
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1


def test_figure2_draws_every_cell_the_frontier_and_the_law(result):
    figure = plots.figure2(result)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    for name, cells in result.cells.groupby("variant"):
        np.testing.assert_array_equal(_line(axes, name).get_xydata(), cells[["train_flops", "heldout_loss"]])
    assert {label.get_text() for label in _labels(axes)} == set(synthetic.VARIANTS)
    _assert_labels_apart(figure)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any(f"{result.law.exponent:.4f}" in text and f"{result.interval.low:.4f}" in text for text in legend)
    assert "FLOPs" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    assert "TPU-v4 core-hours" in axes.child_axes[0].get_xlabel()
    low, _ = axes.child_axes[0].get_xlim()
    assert low == pytest.approx(paper.tpu_v4_core_hours(axes.get_xlim()[0]))


def test_figure2_against_another_measure_has_its_own_unit_and_no_second_axis(runs):
    (axes,) = plots.figure2(scaling.frontier_analysis(runs, compute="tpu_v4_core_hours", resamples=100)).axes
    assert "core-hours" in axes.get_xlabel()
    assert not axes.child_axes


def test_figure3_marks_edges_hollow_and_keeps_equal_rates_apart(runs):
    cells = scaling.best_per_cell(runs)
    figure = plots.figure3(cells)
    (axes,) = figure.axes
    hollow = sum(len(line.get_xdata()) for line in axes.lines if line.get_markerfacecolor() == "white")
    assert hollow == (~cells["lr_is_interior"]).sum() == 1
    heights = [line.get_ydata()[-1] for line in axes.lines if line.get_gid() in synthetic.VARIANTS]
    assert len(set(np.round(heights, 6))) == len(synthetic.VARIANTS)
    for name in synthetic.VARIANTS:  # drawn nearer to their own rate than to the next
        drawn = _line(axes, name).get_ydata()
        np.testing.assert_array_less(np.abs(np.log2(drawn / cells.loc[cells["variant"] == name, "best_lr"])), 0.4)
    _assert_labels_apart(figure)


def test_figure1_fills_repeated_augmentation_only(finetuned):
    figure = plots.figure1(finetuned)
    (axes,) = figure.axes
    filled = [line for line in axes.lines if line.get_gid() and line.get_markerfacecolor() != "white"]
    drawn = sorted(value for line in filled for value in line.get_ydata())
    np.testing.assert_allclose(drawn, sorted(finetuned.loc[finetuned["repeated_augmentation"], "top1_error_percent"]))
    _assert_labels_apart(figure)


def test_published_points_stand_at_their_printed_values():
    points = paper.figure1_points()
    figure = plots.figure1_published(points)
    (axes,) = figure.axes
    drawn = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_gid()}
    assert drawn == set(zip(points["tpu_v4_core_hours"], points["top1_error_percent"], strict=True))
    assert "NFNet-F7+" in {label.get_text() for label in _labels(axes)}
    _assert_labels_apart(figure)


def test_side_by_side_never_mixes_the_two_sources(finetuned):
    figure = plots.figure1_side_by_side(finetuned, paper.figure1_points())
    ours, published = figure.axes
    assert {line.get_gid() for line in ours.lines if line.get_gid()} == set(finetuned["variant"])
    assert {line.get_gid() for line in published.lines if line.get_gid()} == set(paper.figure1_points()["model"])
    assert "laptop scale" in ours.get_title(loc="left") and "published" in published.get_title(loc="left")
    assert "FLOPs" in ours.get_xlabel() and "core-hours" in published.get_xlabel()
    _assert_labels_apart(figure)


@pytest.mark.parametrize("count", [0, 1, 3, 14])
def test_learning_curves_of_any_number_of_runs(count):
    runs = {f"run {index}": synthetic.metrics(steps=20, seed=index) for index in range(count)}
    upper, lower = plots.learning_curves(runs).axes
    assert len(upper.lines) == len(lower.lines) == count
    for name, metrics in runs.items():
        np.testing.assert_array_equal(_line(upper, name).get_ydata(), metrics["loss"])


def test_learning_curves_without_a_column_or_with_gaps():
    metrics = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, np.nan, 2.0]})
    upper, lower = plots.learning_curves({"a": metrics}).axes
    assert _line(upper, "a").get_xdata().tolist() == [1, 3]
    assert not lower.lines
    with pytest.raises(ValueError, match=r"'b' lacks column.*step"):
        plots.learning_curves({"b": pd.DataFrame({"loss": [1.0]})})


def test_signal_propagation_shows_the_three_statistics_and_the_stages():
    table = pd.DataFrame({"block": range(1, 13), "stage": np.repeat([1, 2, 3, 4], [1, 2, 6, 3]),
                          "mean_squared": 0.1, "variance": np.linspace(1, 2, 12), "branch_variance": 1.0})  # fmt: skip
    axes = plots.signal_propagation(table).axes
    for panel, column in zip(axes, ("mean_squared", "variance", "branch_variance"), strict=True):
        np.testing.assert_array_equal(_line(panel, column).get_ydata(), table[column])
        assert panel.get_ylim()[1] > table[column].max()
    assert [text.get_text() for text in axes[0].texts] == [f"stage {number}" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("epochs", [(1.0, 2.0), (0.25, 8.0)])
def test_one_variant_with_two_cells(epochs):
    runs = synthetic.table(synthetic.pretrain_summaries(variants={"F1": (1e6, 2e6)}, epochs=epochs, lrs=(0.8,)))
    _assert_labels_apart(plots.figure2(scaling.frontier_analysis(runs, resamples=50)))
    _assert_labels_apart(plots.figure3(scaling.best_per_cell(runs)))


def test_missing_cells_and_unknown_variants(runs):
    odd = runs.sample(40, random_state=0).replace({"variant": {"F3-mini": "a-network-of-your-own"}})
    result = scaling.frontier_analysis(odd, resamples=50)
    assert _line(plots.figure2(result).axes[0], "a-network-of-your-own")
    plots.figure3(result.cells)


def test_one_fine_tuned_run_and_none(finetuned):
    _assert_labels_apart(plots.figure1(finetuned.head(1)))
    assert not _labels(plots.figure1(finetuned.head(0)).axes[0])


def test_tables_without_a_needed_column_are_named(finetuned, runs):
    with pytest.raises(ValueError, match="top1_error_percent"):
        plots.figure1(finetuned.drop(columns="top1_error_percent"))
    with pytest.raises(ValueError, match="lr_is_interior"):
        plots.figure3(runs)


def test_the_papers_variants_differ_in_colour_marker_and_line():
    styles = [plots.variant_style(name) for name in ("F0", "F1", "F3", "F3+", "F7", "F7+")]
    for key in ("color", "marker", "linestyle"):
        assert len({str(style[key]) for style in styles}) == 6
    assert plots.variant_style("F3+-mini") == plots.variant_style("F3+")
    assert len({str(plots.variant_style(name)) for name in VARIANT_LOOKS}) == len(VARIANT_LOOKS)


def test_no_two_vits_or_laptop_networks_share_a_colour():
    names = [name for name, variant in VARIANTS.items() if variant.family == "ViT" and not name.endswith("-mini")]
    assert len({str(plots.variant_style(name)["color"]) for name in names}) == len(names) > 5

    for width in ("mini", "nano"):
        laptop = ("F0-pico", "F0-nano", "F0-micro", "F0-mini", f"F1-{width}", f"F3-{width}", f"F3+-{width}")
        assert len({str(plots.variant_style(name)["color"]) for name in laptop}) == 7


def test_labels_stay_off_the_markers_of_others():
    table = pd.DataFrame({
        "variant": ["F0-mini", "F1-mini", "F3-mini"], "pretrain_compute": [1e11, 1.2e11, 9e11],
        "top1_error_percent": [4.0, 4.0, 9.0], "repeated_augmentation": False,
    })  # fmt: skip
    figure = plots.figure1(table)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    box = {label.get_text(): label.get_window_extent() for label in _labels(axes)}["F0-mini"]
    x, y = axes.transData.transform((1.2e11, 4.0))
    assert box.x0 < x < box.x1 and not box.y0 - 3 < y < box.y1 + 3


def test_labels_stay_off_markers_at_their_ends():
    @plots.figure_function
    def drawn(x):
        figure, axes = plots.new_figure()
        axes.set(xlim=(0, 10), ylim=(0, 10))
        axes.plot([1, x], [5, 5], linestyle="", marker="o", markersize=8)
        plots.label_point(axes, "F0-pico", 1, 5, "black")
        return figure

    def extent(figure):
        (label,) = _labels(figure.axes[0])
        return label.get_window_extent()

    figure = drawn(9)
    x, _ = figure.axes[0].transData.inverted().transform((extent(figure).x1 + 4, 0))  # half of the marker is beside it
    figure = drawn(x)
    box, (_, y) = extent(figure), figure.axes[0].transData.transform((x, 5))
    assert not box.y0 - 3 < y < box.y1 + 3


def test_pictures_of_any_shape_are_shown_whole():
    images = np.random.default_rng(0).integers(0, 255, (3, 20, 50, 3), np.uint8)
    figure = plots.contact_sheet(images, columns=2)
    (shown,) = figure.axes[0].images
    sheet = np.asarray(shown.get_array())
    np.testing.assert_array_equal(sheet[22:42, :50], images[2])
    assert sheet.shape == (44, 104, 3)


def test_the_note_is_on_the_figure_and_global_settings_are_untouched(result):
    before = dict(mpl.rcParams)
    figure = plots.figure2(result, note="two laptops")
    assert figure.get_supxlabel() == "two laptops"
    assert dict(mpl.rcParams) == before
    import matplotlib.pyplot as plt

    assert not plt.get_fignums()


def test_equal_figures_give_equal_files(result, tmp_path):
    for name in ("a", "b"):
        plots.save_figure(plots.figure2(result), tmp_path / "folder" / name, result.cells)
    for ending in ("svg", "png", "csv"):
        first, second = ((tmp_path / "folder" / f"{name}.{ending}").read_bytes() for name in "ab")
        assert first == second and len(first) > 500
    assert len(pd.read_csv(tmp_path / "folder" / "a.csv")) == len(result.cells)
    assert b"<dc:date>" not in (tmp_path / "folder" / "a.svg").read_bytes()


def test_analysis_imports_no_accelerator_library():
    code = (
        "import sys, nfnet_lib.paper, nfnet_lib.records, nfnet_lib.scaling, nfnet_lib.plots;"
        "print({'jax', 'flax', 'tensorflow', 'seaborn', 'pandas', 'scipy'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
