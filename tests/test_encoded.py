"""Sources on disk: TFDS sets, folders, webdataset shards, through the loader and a whole run."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from nfnet_lib.config import ConfigError, PretrainConfig
from nfnet_lib.data import load_sources, make_sampler
from nfnet_lib.loader import LoaderError, eval_batches, train_batches
from nfnet_lib.sampler import ExactlyOnceSampler
from nfnet_lib.sources import load_source
from nfnet_lib.train import run

HERE = Path(__file__).parent


def jpeg(seed, label=0, side=(24, 30)):
    rng = np.random.default_rng(seed)
    pixels = np.clip(
        cv2.resize(rng.integers(0, 90, (4, 5, 3), np.uint8), side[::-1]) + 120 * np.eye(3)[label % 3], 0, 255
    )
    return cv2.imencode(".jpg", pixels.astype(np.uint8)[..., ::-1])[1].tobytes()


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, str(HERE / "write_tfds.py"), str(folder)], check=True)
    return folder


def test_a_tfds_set_is_read_without_tensorflow(tfds_dir):
    """Written by TFDS's own ArrayRecord writer from serialised examples; TensorFlow is in neither process."""
    script = (
        "import sys, json; from collections import Counter; from nfnet_lib.sources import load_source\n"
        "from nfnet_lib.sampler import ExactlyOnceSampler; from nfnet_lib.loader import train_batches\n"
        "source = load_source('tfds:tiny_shapes', 'train', data_dir=sys.argv[1])\n"
        "stream = train_batches(source, ExactlyOnceSampler(120, 0), batch_size=40, resolution=16, seed=0, workers=2)\n"
        "batches = [next(stream) for _ in range(3)]\n"
        "labels = Counter(int(l) for b in batches for l in b.labels[:, 0])\n"
        "agree = sum(int(i.reshape(-1, 3).mean(0).argmax()) == l[0] for b in batches for i, l in zip(b.images, b.labels))\n"
        "print(json.dumps([labels, int(agree), sum(len(b.bad) for b in batches), 'tensorflow' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tfds_dir)], check=True, capture_output=True, text=True,
                          cwd=HERE.parent)  # fmt: skip
    assert json.loads(done.stdout) == [{"0": 40, "1": 40, "2": 40}, 120, 0, False]


def test_tfds_splits_sizes_and_near_names(tfds_dir):
    heldout = load_source("tfds:tiny_shapes", "heldout", data_dir=tfds_dir)
    part = load_source("tfds:tiny_shapes", "train", data_dir=tfds_dir, split_name="train[:25%]")
    rest = load_source("tfds:tiny_shapes", "heldout", data_dir=tfds_dir, split_name="train[25%:]")
    assert (len(heldout), len(part), len(rest)) == (30, 30, 90) and part.fingerprint != rest.fingerprint
    assert not {part.encoded(i)[0] for i in range(30)} & {rest.encoded(i)[0] for i in range(90)}
    for arguments, words in (
        ({"split_name": "training"}, "no split 'training': train, test"),
        ({"num_examples": 121}, "has 120 train examples, 121 were asked"),
        ({"label_feature": "colour"}, "has features image, label: needs image and classes in 'colour'"),
    ):
        with pytest.raises(ValueError, match=words):
            load_source("tfds:tiny_shapes", "train", data_dir=tfds_dir, **arguments)
    with pytest.raises(ValueError, match=r"'tfds:tiny_shape' is not prepared .*tiny_shapes"):
        load_source("tfds:tiny_shape", "train", data_dir=tfds_dir)


@pytest.mark.parametrize(
    "name,words",
    [
        ("imagenet21k", "TFDS has no ImageNet-21k .* webdataset:DIR or folder:DIR"),
        ("i_naturalist2021", "lacks the label file .* tfds:i_naturalist2018"),
        ("laion400m/images", "captions and no classes"),
        ("imagenet2012", "tfds build imagenet2012 .* ILSVRC2012_img_train.tar"),
        ("places365_smal", "TFDS knows .*places365_small"),
        ("imagenet_resized/32x32", "tfds build imagenet_resized/32x32"),
    ],
)
def test_known_traps_say_what_to_do(tmp_path, name, words):
    with pytest.raises(ValueError, match=words):
        load_source(f"tfds:{name}", "train", data_dir=tmp_path)


def records_of(tfds_dir, tmp_path):
    """A copy of the prepared set, and its training records."""
    shutil.copytree(tfds_dir, tmp_path / "data")
    (path,) = (tmp_path / "data" / "tiny_shapes").rglob("*train*.array_record*")
    return path


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "not a record file"])
def test_damaged_array_records_are_refused_when_opened(tfds_dir, tmp_path, damage):
    path = records_of(tfds_dir, tmp_path)
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2]}.get(damage, b"x" * len(content)))
    config = PretrainConfig(dataset="tfds:tiny_shapes", data_dir=str(tmp_path / "data"), examples_per_epoch=120,
                            heldout_examples=30, batch_size=30)  # fmt: skip
    with pytest.raises(ConfigError, match=r"dataset: .tfds:tiny_shapes.: shard 0 of 1 can.t be read: "):
        load_sources(config)


def test_a_flipped_bit_of_an_array_record_costs_the_examples_it_hits(tfds_dir, tmp_path):
    path = records_of(tfds_dir, tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    source = load_source("tfds:tiny_shapes", "train", data_dir=tmp_path / "data")
    sound = load_source("tfds:tiny_shapes", "train", data_dir=tfds_dir)
    found, whole = (
        next(train_batches(s, ExactlyOnceSampler(120, 0), batch_size=120, resolution=16, seed=0, workers=0))
        for s in (source, sound)
    )
    bad = {b.id for b in found.bad}
    assert 1 <= len(bad) < 120
    for row, index in enumerate(found.ids.tolist()):
        if index not in bad:
            np.testing.assert_array_equal(found.images[row], whole.images[row])


def test_several_labels_an_example(tfds_dir):
    source = load_source("tfds:tiny_objects", "train", data_dir=tfds_dir)
    assert source.class_names == ("red", "green", "blue", "never") and source.labels_per_example > 1
    counts = [len(source[i][1]) for i in range(40)]
    assert sorted(counts) == [1] * 20 + [2] * 20 and all(3 not in source[i][1] for i in range(40))
    two = next(i for i in range(40) if len(source[i][1]) == 2)
    assert source[two][1][0] == (source[two][1][1] + 1) % 3, "the surest first"
    for normalise, total in ((True, 1), (False, 2)):
        (batch,) = eval_batches(source, batch_size=40, resolution=8, normalise_labels=normalise)
        assert batch.label_weights[two].sum() == total and (batch.weights == 1).all()
    with pytest.raises(ValueError, match="needs image and classes in 'confidence'"):
        load_source("tfds:tiny_objects", "train", data_dir=tfds_dir, label_feature="confidence")
    assert load_source("tfds:tiny_objects", "train", data_dir=tfds_dir, label_feature="objects")[0][1] == ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "pets"
    for i in range(200):
        path = root / ("cat", "dog", "eel")[i % 3] / f"{'deep/' * (i % 5 == 0)}{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i, i))
    (root / "cat" / ".hidden.jpg").write_bytes(b"")
    (root / "readme.txt").write_text("not a class")
    return root


def test_a_folder_of_class_folders(folder, tmp_path):
    train, heldout = (load_source(f"folder:{folder}", split) for split in ("train", "heldout"))
    assert train.class_names == ("cat", "dog", "eel") and len(train) + len(heldout) == 200 and 8 <= len(heldout) <= 35
    assert not {train.encoded(i)[0] for i in range(len(train))} & {heldout.encoded(i)[0] for i in range(len(heldout))}
    labels = [train[i][1][0] for i in range(40)]
    assert len(set(labels)) == 3, "the first are a sample of all classes"
    assert all(train[i][0].reshape(-1, 3).mean(0).argmax() == train[i][1][0] for i in range(20))
    copy = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    moved = load_source(f"folder:{copy}", "train")
    assert moved.fingerprint == train.fingerprint, "of the content, not of where it lies"
    (copy / "eel" / "new.jpg").write_bytes(jpeg(999, 2))
    assert {moved.path(i).name for i in range(len(moved))} <= {p.name for p in copy.rglob("*.jpg")}
    assert (
        load_source(f"folder:{copy}", "train").fingerprint != train.fingerprint
        or len(load_source(f"folder:{copy}", "heldout")) == len(heldout) + 1
    )


def test_what_is_no_file_neither_hangs_nor_hides(folder, tmp_path):
    copy = tmp_path / "pets"
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    os.mkfifo(copy / "cat" / "pipe.jpg")
    (copy / "cat" / "nowhere.jpg").symlink_to(tmp_path / "missing.jpg")
    (copy / "dog" / "loop").symlink_to(copy)
    (copy / "dog" / "a folder.jpg").mkdir()
    (copy / "eel" / os.fsdecode(b"\xff\xfe odd.jpg")).write_bytes(jpeg(1))
    sources = [load_source(f"folder:{copy}", split) for split in ("train", "heldout")]
    names = [source.path(i).name for source in sources for i in range(len(source))]
    assert len(names) == 202 and "pipe.jpg" not in names
    bad = [b for source in sources for batch in eval_batches(source, batch_size=64, resolution=8) for b in batch.bad]
    assert len(bad) == 1 and "No such file" in bad[0].reason


def test_a_folder_with_splits(tmp_path):
    for split, count in (("train", 6), ("val", 4), ("extra", 2)):
        for i in range(count):
            path = tmp_path / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i))
    name = f"folder:{tmp_path}"
    assert [len(load_source(name, s)) for s in ("train", "heldout")] == [6, 4]
    assert len(load_source(name, "heldout", split_name="extra")) == 2
    (tmp_path / "val" / "c").mkdir()
    with pytest.raises(ValueError, match="val has classes that train lacks: c"):
        load_source(name, "heldout")
    for bad, words in ((tmp_path / "none", "is not a folder"), (tmp_path / "train" / "a", "has no train images")):
        with pytest.raises(ValueError, match=words):
            load_source(f"folder:{bad}", "train")


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_webdataset_shards(tmp_path):
    for shard in range(2):
        members = []
        for i in range(10):
            key = f"sub/{shard}_{i:03d}"
            members += [(f"{key}.jpg", jpeg(i, i)), (f"{key}.cls", str(i % 3).encode())]
        write_shard(tmp_path / f"train-{shard:06d}.tar", members)
    write_shard(tmp_path / "val-000000.tar", [("a.json", b'{"label": 1}'), ("a.png", jpeg(3, 1)), ("b.jpg", jpeg(4))])
    told = [("a.jpg", jpeg(1)), ("a.cls", b"1"), ("a.json", b'{"width": 40}'), ("b.json", b'{"label": 2}'), ("b.cls", b"0"),
            ("b.jpg", jpeg(2)), ("c.jpg", jpeg(3)), ("c.json", b'{"height": 2}')]  # fmt: skip
    (tmp_path / "other").mkdir()
    write_shard(tmp_path / "other" / "train-000000.tar", told)
    other = load_source(f"webdataset:{tmp_path / 'other'}", "train")
    assert [other[i][1] for i in range(len(other))] == [(1,), (0,)], "a .cls is the label, a .json may be about other things"
    train, heldout = (load_source(f"webdataset:{tmp_path}", split) for split in ("train", "heldout"))
    assert (len(train), len(heldout), train.num_classes, heldout.num_classes) == (20, 1, 3, 3), "b has no label"
    assert train.encoded(13)[0] == jpeg(3, 3) and train[13][1] == (0,) and heldout[0][1] == (1,)
    assert len(load_source(f"webdataset:{tmp_path}", "train", split_name="train-000001")) == 10
    whole = (tmp_path / "train-000001.tar").read_bytes()
    for cut in (whole[:1800], b"", b"not a tar file at all" * 100):
        (tmp_path / "train-000001.tar").write_bytes(cut)
        with pytest.raises(ValueError, match=r"train-000001.tar"):
            load_source(f"webdataset:{tmp_path}", "train")
    with pytest.raises(ValueError, match="has no heldout shards"):
        (tmp_path / "val-000000.tar").unlink()
        load_source(f"webdataset:{tmp_path}", "heldout")


def small(data, **changes):
    return PretrainConfig.from_params(
        {"dataset": data, "examples_per_epoch": 32, "heldout_examples": 8, "batch_size": 16, "resolution": 16,
         "eval_resolution": 16, "log_points": 2, "variant": "Ti/4-mini", "optimizer": "adamw", "peak_lr": 0.002} | changes
    )  # fmt: skip


def test_a_run_with_every_augmentation_on_a_folder_with_a_bad_file(folder, tmp_path):
    copy = tmp_path / "pets"
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    source, _ = load_sources(small(f"folder:{copy}"))
    source.path(5).write_bytes(b"damaged")
    every = {"mixup_alpha": 0.2, "cutmix": True, "randaugment_layers": 2, "loader_workers": 2}
    config = small(f"folder:{copy}", **every)
    summary = run(config, tmp_path / config.run_id, progress=False)
    assert summary["train_quarantined"] == 1 and summary["heldout_quarantined"] == 0
    (line,) = [json.loads(x) for x in (tmp_path / config.run_id / "quarantine.jsonl").read_text().splitlines()]
    assert line["id"] == 5 and line["split"] == "train" and "not a readable image" in line["reason"]
    source.path(6).write_bytes(b"damaged, too")
    for change, words in (({}, "max_bad_fraction: 2 of 32"), ({"on_bad": "stop"}, "example [56] of folder:pets")):
        with pytest.raises(LoaderError, match=words):
            run(small(f"folder:{copy}", **every, **change), tmp_path / f"other{len(change)}", progress=False)
    assert not (tmp_path / "other0" / "summary.json").exists()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_run_on_several_labels(tfds_dir, tmp_path, loss):
    config = small("tfds:tiny_objects", data_dir=str(tfds_dir), loss=loss, head_bias=-4.0 if loss == "sigmoid" else 0.0,
                   epoch_budget=2.0, peak_lr=0.05)  # fmt: skip
    summary = run(config, tmp_path / config.run_id, progress=False)
    assert np.isfinite(summary["heldout_loss"]) and 0 <= summary["heldout_top1"] <= summary["heldout_top5"] <= 1
    if loss == "sigmoid":  # four classes at probability 0.018 cost 4.0 nats a label that is there
        assert summary["heldout_loss"] < 8


def test_excluded_ids_are_never_seen_and_lists_for_other_data_refused(folder, tmp_path):
    path = tmp_path / "exclude.json"
    path.write_text(json.dumps({"dataset": f"folder:{folder}", "ids": [3, 1, 77, 100_000]}))
    config = small(f"folder:{folder}", exclude=str(path))
    source, _ = load_sources(config)
    sampler = make_sampler(config, source)
    assert len(sampler) == 30 and set(sampler.example_ids(0, 90).tolist()) == set(range(32)) - {1, 3}
    batch = next(train_batches(source, sampler, batch_size=30, resolution=8, seed=0))
    assert not {1, 3} & set(batch.ids.tolist())
    other_split = json.dumps({"dataset": f"folder:{folder}", "split": "val", "ids": []})
    for content, words in (
        ("{", "not a list of ids"),
        ('{"dataset": "digits", "ids": []}', "is for 'digits'"),
        (other_split, "is for the split 'val', the run's train_split is 'train'"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=words):
            run(config, tmp_path / "nothing", progress=False)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"mixup_alpha": 0.2, "batch_size": 5, "epoch_budget": 5.0}, "batch_size: 5 examples a step can't be mixed"),
        ({"loss": "sigmoid", "label_smoothing": 0.1}, "label_smoothing: 0.1 with loss='sigmoid'"),
        ({"loader_workers": -1}, "loader_workers: -1"),
        ({"on_bad": "skip"}, "on_bad: 'skip'"),
        ({"dataset": "webdataset:"}, "unknown 'webdataset:'"),
    ],
)
def test_bad_parameters(changes, words):
    with pytest.raises(ConfigError, match=words):
        load_sources(small("fractals", **changes))


def test_a_million_exclusions_of_four_thousand_million():
    exclude = np.random.default_rng(0).choice(4_000_000_000, 1_000_000, replace=False)
    sampler = ExactlyOnceSampler(4_000_000_000, 1, exclude)
    ids = sampler.example_ids(len(sampler) - 50_000, len(sampler) + 50_000)
    assert len(np.unique(ids[:50_000])) == 50_000 and not np.isin(ids, exclude).any() and ids.max() < 4_000_000_000
