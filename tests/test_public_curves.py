"""Public curves: provenance and exactness of what is shipped, strict loaders, Epoch AI's filter and its published refit."""

import os

import numpy as np
import pandas as pd
import pytest

from nfnet_lib import captions, law_plots, plots, public_curves
from nfnet_lib.law_fits import fit_law
from nfnet_lib.public_curves import EPOCH_REFIT


@pytest.fixture(scope="module")
def curves():
    return public_curves.few_shot_curves()


@pytest.fixture(scope="module")
def fits(curves):
    return public_curves.curve_fits(curves)


# ----------------------------------------------------------------------------------------------------- JFT curves


def test_the_shipped_file_names_source_commit_licence_and_what_was_left_out():
    head = [line for line in public_curves.FEW_SHOT.read_text().splitlines() if line.startswith("#")]
    text = " ".join(head)
    commit = "9853680c781781bd8d3de20aa61c7373ce059913"
    for part in ("benchmark.vision.csv", commit, "CC BY 4.0", "arXiv 2209.06640", "left out"):
        assert part in text


def test_what_is_shipped_has_the_structure_of_its_source(curves):
    """Examples on a geometric grid, errors that fall strictly and smoothly, and those held out counts of 50,000 images."""
    assert curves["model"].unique().tolist() == ["ViT/S/16", "ViT/B/16", "BiT/50/1", "BiT/101/3", "MiX/B/16", "MiX/L/16"]
    for _, rows in curves.groupby("model"):
        fitted, held = rows[~rows["held_out"]], rows[rows["held_out"]]
        ratios = np.diff(np.log(fitted["examples_seen"].iloc[-40:]))
        np.testing.assert_allclose(ratios, ratios[-1], rtol=1e-6)
        errors = fitted["top1_error_percent"].to_numpy()
        assert (np.diff(errors) < 0).all()
        bends = errors[2:-2] - (errors[:-4] + errors[1:-3] + errors[3:-1] + errors[4:]) / 4
        assert (np.abs(bends[25:]) < 0.5).all()  # beyond 100M examples, in percent
        assert (held["examples_seen"] % 102_400_000 == 0).all() and len(held) >= 5
        wrong = held["top1_error_percent"] * 500
        np.testing.assert_allclose(wrong, wrong.round(), atol=0.005)
        assert held["examples_seen"].min() > fitted["examples_seen"].max()


def test_each_law_is_of_its_own_curve_and_carries_to_the_rows_held_out(curves, fits):
    laws = public_curves.curve_laws(curves, fits)
    assert (laws["r_squared"] > 0.99).all() and (laws["held_out_error_percent"].abs() < 5).all()
    assert laws["fitted_rows"].tolist() == [65, 67, 68, 60, 69, 66] and (laws["reach"] > 1.5).all()
    other = curves.assign(top1_error_percent=curves["top1_error_percent"].where(curves["model"] == "ViT/S/16", 50.0))
    assert public_curves.curve_fits(other)["ViT/S/16"].parameters == fits["ViT/S/16"].parameters
    no_held = curves.assign(top1_error_percent=curves["top1_error_percent"].mask(curves["held_out"], 1.0))
    assert public_curves.curve_fits(no_held)["BiT/50/1"].parameters == fits["BiT/50/1"].parameters


def test_the_figure_draws_every_point_and_says_that_it_is_published_data(curves, fits, tmp_path):
    figure = law_plots.published_curves(curves, fits)
    (axes,) = figure.axes
    for name, rows in curves.groupby("model"):
        drawn = [line for line in axes.lines if line.get_gid() == name]
        assert [line.get_markerfacecolor() == "white" for line in drawn] == [False, True]
        points = np.concatenate([line.get_xydata() for line in drawn])
        np.testing.assert_array_equal(points, rows[["examples_seen", "top1_error_percent"]])
    assert "published data, not ours" in figure.get_supxlabel()
    laws = public_curves.curve_laws(curves, fits)
    caption = captions.published_curves(curves, laws)
    paths = plots.save_figure(figure, tmp_path / "published_curves", table=curves, caption=caption)
    assert [path.suffix for path in paths] == [".svg", ".png", ".txt", ".csv"]
    assert len(pd.read_csv(tmp_path / "published_curves.csv")) == len(curves)


def test_the_caption_is_of_the_tables(curves, fits):
    laws = public_curves.curve_laws(curves, fits)
    text = captions.published_curves(curves, laws)
    assert text.startswith("Published data, not ours (arXiv 2209.06640, CC BY 4.0)") and "6 networks" in text
    assert f"lowest floor {laws['E'].min():.1f} %, MiX/L/16" in text and "nan" not in text
    fitted = curves[~curves["held_out"] & (curves["model"] == "ViT/S/16")]
    alone = captions.published_curves(fitted, public_curves.curve_laws(fitted, {"ViT/S/16": fits["ViT/S/16"]}))
    assert "1 network against" in alone and "Hollow" not in alone


HEAD = "Model,Seen Examples,Loss,Training\n"


@pytest.mark.parametrize("text,message", [
    ("Model,Seen Examples,Loss\nViT/B/16,1,0.5\n", r"lacks column\(s\) Training; it has Model, Seen Examples, Loss"),
    (HEAD, "holds no rows"),
    ("", "not a readable CSV table"),
    (HEAD + "ViT/B/16,10,0.5,1\nViT/B/16,20,1.5,1\n", "column 'Loss', row 2: 1.5; allowed: 1e-09 to 1"),
    (HEAD + "ViT/B/16,many,0.5,1\n", "column 'Seen Examples', row 1: many; allowed: 1 to 1e"),
    (HEAD + "ViT/B/16,10,,1\n", "column 'Loss', row 1: nan"),
    (HEAD + "NFNet,10,0.5,1\n", "column 'Model' holds 'NFNet'; allowed: ViT/"),
    (HEAD + "ViT/B/16,20,0.5,1\nViT/B/16,10,0.4,1\n", "'Seen Examples' of ViT/B/16 must rise"),
])  # fmt: skip
def test_a_table_of_another_kind_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "curves.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        public_curves.few_shot_curves(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------- Hoffmann's runs


def planted_runs(path, wild=True):
    """A table of Epoch AI's columns, runs laid by their refit with 0.5 % scatter, and five wild ones in its midst."""
    generator = np.random.default_rng(0)
    size = np.exp(generator.uniform(np.log(6e7), np.log(1.6e10), 240))
    tokens = np.exp(generator.uniform(np.log(2e9), np.log(3e11), 240))
    law = 1.817 + 482.0 * size**-0.348 + 2085.4 * tokens**-0.366
    runs = pd.DataFrame({"x": 1.0, "color": "#faebdd", "Model Size": size, "Training FLOP": 6 * size * tokens,
                         "loss": law * np.exp(0.005 * generator.standard_normal(240))})  # fmt: skip
    extra = runs.head(5).assign(**{"Model Size": 5e9, "Training FLOP": 1e19, "loss": [5.2, 6.0, 7.0, 5.5, 9.0]})
    empty = pd.DataFrame({"x": [1.0], "color": ["#000000"]})
    parts = [runs[:100], extra, empty, runs[100:]] if wild else [runs]
    pd.concat(parts).to_csv(path, index=False)
    return runs


def test_the_five_highest_losses_are_left_out_and_the_law_is_that_of_the_others(tmp_path):
    path = tmp_path / "runs.csv"
    laid = planted_runs(path)
    runs = public_curves.hoffmann_runs(path)
    assert len(runs) == 245 and runs.index[~runs["kept"]].tolist() == [100, 101, 102, 103, 104]
    np.testing.assert_allclose(6 * runs["parameters"] * runs["tokens"], runs["train_flops"])
    fit = public_curves.fit_hoffmann(runs)
    size, flops, loss = (laid[name].to_numpy() for name in ("Model Size", "Training FLOP", "loss"))
    alone = fit_law("surface", loss, delta=1e-3, size=size, data=flops / (6 * size))
    for name, value in alone.parameters.items():
        assert fit.parameters[name] == pytest.approx(value, rel=1e-6)
    assert public_curves.beside_epoch(fit)["within"].all()
    spoilt = public_curves.beside_epoch(public_curves.fit_hoffmann(runs.assign(kept=True)))
    assert not spoilt["within"].all(), "with the wild runs it is another law"


@pytest.mark.parametrize("column,value,message", [
    ("loss", 0.3, r"column 'loss', row 3: 0.3; allowed: 1 to 15"),
    ("Model Size", 70.0, r"column 'Model Size', row 3: 70.0; allowed: 1e\+06 to 1e\+13"),
    ("Training FLOP", "lots", r"column 'Training FLOP', row 3: lots"),
])  # fmt: skip
def test_a_run_out_of_range_is_named(tmp_path, column, value, message):
    path = tmp_path / "runs.csv"
    planted_runs(path, wild=False)
    table = pd.read_csv(path).astype({column: object})
    table.loc[2, column] = value
    table.to_csv(path, index=False)
    with pytest.raises(ValueError, match=message):
        public_curves.hoffmann_runs(path)


def test_missing_files_columns_and_too_few_runs_are_named(tmp_path):
    path = tmp_path / "runs.csv"
    with pytest.raises(ValueError, match=r"runs.csv: not a readable CSV table: .*No such file"):
        public_curves.hoffmann_runs(path)
    planted_runs(path, wild=False)
    table = pd.read_csv(path)
    table.head(5).to_csv(path, index=False)
    with pytest.raises(ValueError, match="5 rows; allowed: more than the 5 highest losses"):
        public_curves.hoffmann_runs(path)
    table.drop(columns="loss").to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"lacks column\(s\) loss; it has x, color, Model Size"):
        public_curves.hoffmann_runs(path)


if "HOFFMANN_CSV" in os.environ:  # a copy of Epoch AI's svg_extracted_data.csv, which no licence lets us ship

    def test_epoch_ais_own_table_gives_their_refit():
        runs = public_curves.hoffmann_runs(os.environ["HOFFMANN_CSV"])
        assert runs["kept"].sum() == 240  # as they print (arXiv 2404.10102)
        ratio = runs["tokens"] / runs["parameters"]
        assert set(runs.index[~runs["kept"]]) == set(ratio.nsmallest(5).index)
        fit = public_curves.fit_hoffmann(runs, resamples=500)
        assert public_curves.beside_epoch(fit)["within"].all()
        for name, (_, low, high) in EPOCH_REFIT.items():  # and known about as well: the 95 % intervals agree to a fifth
            ours = np.ptp(np.quantile(fit.draws[:, fit.form.parameters.index(name)], [0.025, 0.975]))
            assert ours == pytest.approx(high - low, rel=0.2)
        efficient = fit_law("surface", runs["loss"][runs["kept"]].to_numpy(), size=runs["parameters"][runs["kept"]].to_numpy(),
                            data=runs["tokens"][runs["kept"]].to_numpy())  # fmt: skip
        assert public_curves.beside_epoch(efficient)["within"].all(), "with this library's own choice of delta as well"
