"""Near-duplicates: the index misses nothing, planted copies are found, and nothing else is."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from nfnet_lib import explore
from nfnet_lib.cli import main
from nfnet_lib.dedup import HammingIndex, correlation, dedup, hashes, read_pairs, summary, thumbnail
from nfnet_lib.sources import load_source


@pytest.mark.parametrize("radius", [0, 1, 3, 6, 10, 13])
def test_the_index_finds_exactly_the_pairs_within_the_radius(radius):
    rng = np.random.default_rng(radius)
    words = rng.integers(0, 2**64, 3000, dtype=np.uint64)
    queries = np.concatenate([words[:200], rng.integers(0, 2**64, 50, dtype=np.uint64)])
    for i in range(200):  # planted at every distance about the radius
        for bit in rng.choice(64, i % 16, replace=False):
            queries[i] ^= np.uint64(1) << np.uint64(bit)
    distances = np.bitwise_count(queries[:, None] ^ words[None])
    rows, hits, found = HammingIndex(words, radius).query(queries)
    expected = np.argwhere(distances <= radius)
    np.testing.assert_array_equal(np.stack([rows, hits], axis=1), expected)
    np.testing.assert_array_equal(found, distances[rows, hits])
    assert len(expected) > 10


def test_hashes_are_imagehashs():
    import imagehash

    thumb = thumbnail(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    word = int(str(imagehash.phash(Image.fromarray(thumb))), 16)
    assert hashes(thumb, [(0, 0, 1.0)]).tolist() == [word]


def test_correlation_is_that_of_the_same_picture_only():
    source = load_source("fractals", "train", num_examples=40, num_classes=20, image_size=64)
    thumbs = [thumbnail(source[i][0]) for i in range(20)]
    assert correlation(thumbs[0], thumbs[0]) == pytest.approx(1, abs=1e-4)
    assert correlation(thumbs[1], thumbnail(source[1][0][2:62, 3:63])) > 0.95
    assert max(correlation(thumbs[0], other) for other in thumbs[1:]) < 0.9
    assert np.isfinite(correlation(np.zeros((64, 64), np.uint8), thumbs[0])), "a black picture"


CHANGES = {
    "quality": lambda i: cv2.imdecode(cv2.imencode(".jpg", i, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], 1),
    "half": lambda i: cv2.resize(i, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "double": lambda i: cv2.resize(i, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR),
    "crop": lambda i: i[: round(i.shape[0] * 0.95), round(i.shape[1] * 0.05) :],
    "bright": lambda i: cv2.convertScaleAbs(i, alpha=1.1),
    "mirror": lambda i: i[:, ::-1],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """48 fractals held out; each comes back in the training folder, changed, among 150 others and a broken file."""
    root = tmp_path_factory.mktemp("dedup")
    source = load_source("fractals", "train", num_examples=198, num_classes=66, image_size=72)
    (root / "train" / "sub").mkdir(parents=True)
    (root / "heldout").mkdir()
    for i in range(198):
        image = source[i][0][..., ::-1]
        if i < 48:
            cv2.imwrite(str(root / "heldout" / f"{i:02d}.png"), image)
            change = list(CHANGES)[i % 6]
            cv2.imwrite(str(root / "train" / "sub" / f"{i:02d}_{change}.png"), CHANGES[change](image))
        else:
            cv2.imwrite(str(root / "train" / f"{i}.jpg"), image)
    (root / "train" / "broken.jpg").write_bytes(b"no picture")
    return root


def test_planted_copies_between_two_folders(folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["dedup", str(folders / "train"), str(folders / "heldout"), "--out", str(out), "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "of 199 training pictures are near-duplicates of 48 held-out ones" in printed
    assert "1 pictures can't be read" in printed
    pairs = read_pairs(out)
    flagged = pairs[pairs.duplicate]
    right = flagged.train_file.str.extract(r"/(\d\d)_")[0] == flagged.against_file.str.extract(r"/(\d\d).png")[0]
    assert right.sum() >= 46 and (~right).sum() == 0, flagged[~right]
    mirrored = flagged[flagged.train_file.str.contains("mirror")]
    assert mirrored.mirrored.all()
    content = json.loads((out / "exclude.json").read_text())
    assert content["ids"] == sorted(flagged.train_id.unique().tolist()) and content["num_examples"] == 199
    sheet = cv2.imread(str(out / "borderline.png"))
    assert sheet is not None and sheet.std() > 10
    assert main(["dedup", str(folders / "train"), str(folders / "heldout"), "--out", str(out)]) == 2
    assert "already holds pairs.csv" in capsys.readouterr().err


def test_a_data_set_against_itself_names_every_example(tmp_path):
    text = dedup(
        "digits@heldout", ["digits@heldout"], tmp_path / "out", min_correlation=0.9999, against_examples=30,
        train_examples=60, progress=False,
    )  # fmt: skip
    pairs = read_pairs(tmp_path / "out")
    same = pairs[pairs.train_id == pairs.against_id]
    assert len(same) == 30 and same.duplicate.all() and (same.distance == 0).all() and "of 60 training pictures" in text
    assert json.loads((tmp_path / "out" / "exclude.json").read_text())["dataset"] == "digits"


def test_embeddings_as_a_last_stage(folders, tmp_path):
    from nfnet_lib.config import PretrainConfig
    from nfnet_lib.train import run

    config = PretrainConfig(
        variant="Ti/4-mini", optimizer="adamw", peak_lr=0.002, num_classes=4, examples_per_epoch=32, heldout_examples=16,
        batch_size=16, resolution=16, eval_resolution=16,
    )  # fmt: skip
    run(config, tmp_path / "run", progress=False)
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((folders / "train" / "sub").iterdir())[:6]:
        (few / path.name).write_bytes(path.read_bytes())
    dedup(
        str(few), [str(folders / "heldout")], tmp_path / "out", weights=tmp_path / "run", min_cosine=0.5, progress=False
    )
    pairs = read_pairs(tmp_path / "out")
    assert pairs.duplicate.sum() == 6 and (pairs[pairs.duplicate].cosine > 0.5).all() and (pairs.cosine <= 1.0001).all()
    dedup(
        str(few), [str(folders / "heldout")], tmp_path / "none", weights=tmp_path / "run", min_cosine=1, progress=False
    )
    assert read_pairs(tmp_path / "none").duplicate.sum() <= 1


def test_pictures_of_a_comparison_are_those_that_were_compared(tmp_path):
    """Not those of the held-out set that a notebook happens to look at, nor of the first of the training set."""
    sets = ["digits@train", "digits@heldout"]
    dedup("digits", sets, tmp_path / "out", train_examples=700, against_examples=300, progress=False)
    other = load_source("digits", "heldout", num_examples=5)
    found = summary(other, other, "digits", tmp_path / "out")
    assert len(found.train) == 700 and set(found.others) == set(sets) and found.pairs.train_id.max() >= 300
    same = found.pairs[(found.pairs.against == "digits@train") & (found.pairs.train_id == found.pairs.against_id)]
    assert len(same) == 300
    for row in same.itertuples():
        np.testing.assert_array_equal(found.train[row.train_id][0], found.others[row.against][row.against_id][0])
    assert explore.browse_pairs(found.pairs, found.train, found.others).children[1].value
    beside = summary(load_source("digits", "train", num_examples=40), other, "digits")
    assert set(beside.others) == {"heldout"} and len(beside.train) == 40


@pytest.mark.parametrize(
    "arguments,words",
    [
        ([], "train: name the training set"),
        (["fractls", "digits"], "unknown 'fractls'; did you mean fractals"),
        (["digits"], "against: no set"),
        (["digits", "digits", "--radius", "17"], "radius: 17"),
        (["digits", "digits", "--min-correlation", "2"], "min_correlation: 2"),
        (["digits", "digits", "--workers", "0"], "workers: 0"),
        (["digits", "digits@test"], "split: 'test' of digits; allowed: train, heldout"),
    ],
)
def test_bad_requests_write_nothing(arguments, words, tmp_path, capsys):
    assert main(["dedup", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_list_for_other_pictures_is_refused(tmp_path):
    """Ids of a folder count its files: with one more in front they mean others. Re-encoded and resized it is the same list."""
    from nfnet_lib import data
    from nfnet_lib.config import ConfigError, PretrainConfig
    from nfnet_lib.sources import load_source

    root, digits = tmp_path / "photos", load_source("digits", "train", num_examples=80, image_size=48)
    for split, numbers in (("train", range(60)), ("val", range(40, 80))):
        for number in numbers:
            path = root / split / "all" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), digits[number][0])
    name = f"folder:{root}"
    dedup(name, [f"{name}@val"], tmp_path / "out", min_correlation=0.9999, progress=False)
    listed = json.loads((tmp_path / "out" / "exclude.json").read_text())
    assert len(listed["ids"]) >= 20 and 0 < len(listed["hashes"]) <= 32
    config = PretrainConfig(
        dataset=name, examples_per_epoch=60, heldout_examples=40, batch_size=20, exclude=str(tmp_path / "out" / "exclude.json")
    )
    source, _ = data.load_sources(config)
    assert data.load_exclusions(config, source).tolist() == listed["ids"]
    for path in (root / "train" / "all").iterdir():
        image = cv2.resize(cv2.imread(str(path)), (40, 56), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(path), image, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert len(data.make_sampler(config, data.load_sources(config)[0])) == 60 - len(listed["ids"])
    cv2.imwrite(str(root / "train" / "all" / "000_new.png"), digits[61][0])
    with pytest.raises(ConfigError, match=r"exclude: .* is for other pictures: example .* run nfnet dedup again"):
        data.make_sampler(config, data.load_sources(config)[0])
