"""Fractals, sources, views and batches: deterministic, disjoint, and each example where it belongs."""

import hashlib
import io
import tarfile
import tracemalloc

import cv2
import numpy as np
import pytest

import nfnet_lib
from nfnet_lib import data
from nfnet_lib.augment import DRAWS_PER_VIEW, crop_box, eval_views, train_views
from nfnet_lib.config import ConfigError, PretrainConfig
from nfnet_lib.decode import decode_image
from nfnet_lib.fractals import HELDOUT_INSTANCE, FractalGenerator
from nfnet_lib.loader import LoaderError, eval_batches, train_batches
from nfnet_lib.sampler import ExactlyOnceSampler, uniforms
from nfnet_lib.sources import ArraySource, FractalSource, cached, load_source
from nfnet_lib.variants import get_variant


def test_a_fractal_is_a_function_of_seed_class_and_instance():
    generator = FractalGenerator(20, 32, seed=3)
    classes, instances = np.arange(20), np.arange(20) * 7
    together = generator.render(classes, instances)
    alone = FractalGenerator(20, 32, seed=3).render(classes[13:14], instances[13:14])
    np.testing.assert_array_equal(together[13], alone[0])
    assert (FractalGenerator(20, 32, seed=4).render(classes, instances) != together).mean() > 0.5
    assert all((together[i] != together[j]).any() for i in range(20) for j in range(i))


def test_golden_fractals():
    """Changes only with fractals.VERSION: the images are the data set, and published results name it."""
    images = FractalGenerator(10, 32, 0).render(np.arange(10), np.arange(10))
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "f85554c9014c8fc5"


def test_classes_are_told_apart_by_shape_but_not_by_pixels():
    """1-nearest-neighbour on pixels: far above chance (1 in 20), far below certainty."""
    generator, per_class = FractalGenerator(20, 24, 0), 15
    classes = np.repeat(np.arange(20), per_class)
    images = generator.render(classes, np.tile(np.arange(per_class), 20)).reshape(len(classes), -1).astype(np.float32)
    distances = ((images[:, None] - images[None]) ** 2).sum(-1) + np.diag(np.full(len(images), np.inf))
    accuracy = (classes[distances.argmin(1)] == classes).mean()
    assert 0.1 < accuracy < 0.8


def test_hue_spread_makes_colour_a_cue():
    def hue_deviation(spread):
        images = FractalGenerator(1, 32, 0, spread).render(np.zeros(60, int), np.arange(60))
        bright = np.stack([image.reshape(-1, 3)[image.sum(-1).argmax()] for image in images]).astype(float)
        return (bright / np.linalg.norm(bright, axis=1, keepdims=True)).std(0).sum()

    assert hue_deviation(0.02) < 0.6 * hue_deviation(1.0)


def test_training_and_heldout_fractals_are_disjoint_instances():
    options = {"num_examples": 40, "num_classes": 8, "image_size": 16}
    train, heldout = (load_source("fractals", split, **options) for split in ("train", "heldout"))
    images, labels = train.batch(np.arange(40))
    assert np.bincount(labels).tolist() == [5] * 8
    others, _ = heldout.batch(np.arange(40))
    assert not {i.tobytes() for i in images} & {i.tobytes() for i in others}
    assert HELDOUT_INSTANCE > 2**30 and train.fingerprint != heldout.fingerprint


def test_long_tailed_fractals_follow_zipf_and_their_own_address():
    options = {"num_classes": 100, "image_size": 8, "seed": 3}
    train = load_source("fractals-lt", "train", num_examples=8000, **options)
    wanted = np.arange(1, 101) ** -1.25
    wanted *= 8000 / wanted.sum()
    for split in ("train", "heldout"):
        labels = load_source("fractals-lt", split, num_examples=8000, **options).batch(np.arange(8000))[1]
        counts = np.bincount(labels, minlength=100)
        assert ((counts - wanted) ** 2 / wanted).sum() < 150, "chi-squared of 99 degrees of freedom, 99.9%: 148"
    assert (labels != train.batch(np.arange(8000))[1]).mean() > 0.5, "held-out classes are other draws"
    assert {image.tobytes() for image in train.batch(np.arange(50))[0]}.isdisjoint(
        image.tobytes() for image in load_source("fractals-lt", "heldout", num_examples=50, **options).batch(np.arange(50))[0]
    )
    fewer = load_source("fractals-lt", "train", num_examples=700, **options)
    some = np.array([699, 3, 250])
    for one, other in zip(fewer.batch(some), train.batch(some), strict=True):
        np.testing.assert_array_equal(one, other)
    image, label = train[250]
    np.testing.assert_array_equal(image, train.batch(some)[0][2])
    assert label == train.batch(some)[1][2]
    others = load_source("fractals-lt", "train", num_examples=8000, **options | {"seed": 4})
    assert (others.batch(np.arange(8000))[1] != train.batch(np.arange(8000))[1]).mean() > 0.5
    balanced = load_source("fractals", "train", num_examples=8000, **options)
    assert balanced.fingerprint != train.fingerprint and np.ptp(np.bincount(balanced.batch(np.arange(8000))[1])) == 0


def test_digits_are_real_and_split_once():
    train, heldout = load_source("digits", "train", image_size=8), load_source("digits", "heldout", image_size=8)
    assert (len(train), len(heldout), train.num_classes) == (1437, 360, 10)
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in heldout.images) <= 2, "equal digits may exist, shared ones not"
    assert np.bincount(heldout.labels).min() >= 20


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("fractal", "train"), "unknown 'fractal'; did you mean fractals"),
        (("fractals", "test"), "split: 'test'"),
        (("fractals", "train"), "num_examples"),
        (("tfds:mnits", "train"), "'tfds:mnits' is not prepared.*TFDS knows mnist"),
    ],
)
def test_unknown_sources_are_named_with_near_ones(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        load_source(*arguments, data_dir=tmp_path)


def test_cached_images_are_the_rendered_ones_and_damage_is_repaired(tmp_path):
    source = FractalSource("train", 30, 5, 16, 0, 0.5)
    once = cached(source, tmp_path)
    again = cached(source, tmp_path)
    np.testing.assert_array_equal(once.images, source.batch(np.arange(30))[0])
    np.testing.assert_array_equal(once.images, again.images)
    (file,) = tmp_path.iterdir()
    for damage in (b"", file.read_bytes()[:-100], file.read_bytes()[:3000] + b"x" * 500 + file.read_bytes()[3500:]):
        file.write_bytes(damage)
        np.testing.assert_array_equal(cached(source, tmp_path).images, once.images)


def test_damaged_images_are_refused_with_their_name():
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    jpeg = cv2.imencode(".jpg", image)[1].tobytes()
    png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    assert decode_image(jpeg, "x").shape == (40, 50, 3)
    np.testing.assert_array_equal(decode_image(png, "x"), image)
    for bad in (jpeg[: len(jpeg) // 2], b"", b"<html>", png[:60]):
        with pytest.raises(ValueError, match="example 7"):
            decode_image(bad, "example 7")


def test_crops_lie_inside_and_cover_what_was_asked():
    rng = np.random.default_rng(0)
    for height, width in ((40, 40), (20, 90), (1, 1)):
        for draws in rng.random((200, 5)):
            top, left, h, w = crop_box(height, width, draws.tolist(), 0.3)
            assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h >= 1 and w >= 1
    image = rng.integers(0, 255, (1, 24, 24, 3), np.uint8)
    whole = np.array([[1.0 - 1e-9, 0.5, 0, 0, 0.9]])
    np.testing.assert_array_equal(train_views(image, whole, 24), image)
    whole[0, 4] = 0.1
    np.testing.assert_array_equal(train_views(image, whole, 24), image[:, :, ::-1])
    np.testing.assert_array_equal(train_views(image, whole, 24, flip=False), image)


def test_evaluation_takes_the_centre():
    image = np.zeros((1, 30, 50, 3), np.uint8)
    image[:, :, 10:40] = 255
    assert (eval_views(image, 30, squash=False) == 255).all()
    assert eval_views(image, 16, 4).shape == (1, 16, 16, 3)


def numbered(n):
    images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    return ArraySource("numbered", n, f"numbered{n}", images, np.arange(n))


def stream(**options):
    return train_batches(numbered(50), ExactlyOnceSampler(50, 1), resolution=8, seed=2, **options)


def test_batches_are_the_same_for_any_workers_and_restart():
    one, many = stream(batch_size=12), stream(batch_size=12, workers=3, prefetch=5)
    first = [next(one) for _ in range(10)]
    for batch, other in zip(first, many, strict=False):
        np.testing.assert_array_equal(batch.images, other.images)
        assert batch.position == other.position
    resumed = next(stream(batch_size=12, start=first[6].position))
    np.testing.assert_array_equal(resumed.images, first[7].images)
    one.close(), many.close()


def test_processes_share_a_batch_without_overlap_in_the_same_order():
    whole = next(stream(batch_size=24, augmult=2))
    parts = [next(stream(batch_size=24, augmult=2, process_index=i, process_count=3)) for i in range(3)]
    np.testing.assert_array_equal(whole.images, np.concatenate([part.images for part in parts]))
    assert whole.position == parts[0].position == 12


def test_repeated_augmentation_draws_fewer_examples_and_shows_each_more_often():
    batch = next(stream(batch_size=24, augmult=4))
    assert len(batch.ids) == 6 and batch.position == 6
    np.testing.assert_array_equal(batch.labels, np.repeat(batch.labels[::4], 4, axis=0))
    source = load_source("fractals", "train", num_examples=8, num_classes=4, image_size=24)
    views = next(train_batches(source, ExactlyOnceSampler(8, 0), batch_size=8, augmult=4, resolution=16, seed=0)).images
    assert all((views[0] != views[i]).any() for i in range(1, 4)), "the views of an image differ"


def test_a_failing_example_surfaces_with_its_id():
    class Broken(ArraySource):
        def batch(self, ids):
            if 7 in ids:
                raise ValueError("not these")
            return super().batch(ids)

        def __getitem__(self, index):
            if index == 7:
                raise ValueError("no image")
            return super().__getitem__(index)

    base = numbered(50)
    broken = Broken("broken", 50, "broken", base.images, base.labels)
    with pytest.raises(LoaderError, match=r"example 7 of broken at position \d+: no image"):
        for _ in train_batches(broken, ExactlyOnceSampler(50, 1), batch_size=10, resolution=8, seed=0, on_bad="stop"):
            pass


@pytest.mark.parametrize("n,batch", [(50, 16), (16, 16), (3, 8)])
def test_evaluation_counts_each_example_once(n, batch):
    batches = list(eval_batches(numbered(n), batch_size=batch, resolution=8))
    assert all(b.images.shape == (batch, 8, 8, 3) for b in batches)
    labels = np.concatenate([b.labels[b.weights > 0, 0] for b in batches])
    np.testing.assert_array_equal(labels, np.arange(n))


def test_views_draw_enough():
    assert uniforms(0, np.arange(3), 0, DRAWS_PER_VIEW).shape == (3, 5)


def test_relative_paths_are_found_from_notebooks_and_from_the_checkout(tmp_path, monkeypatch):
    """Kernels of open notebooks are in notebooks/, what trains beside them in the checkout."""
    checkout = tmp_path / "checkout"
    picture = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    for name in ("photos/train/a", "photos/val/a", "notebooks"):
        (checkout / name).mkdir(parents=True)
    for split in ("train", "val"):
        for number in range(4):
            (checkout / "photos" / split / "a" / f"{number}.png").write_bytes(picture)
    (checkout / "list.json").write_text('{"ids": [1], "dataset": "folder:photos"}')
    monkeypatch.setattr(nfnet_lib, "PROJECT", checkout)
    config = PretrainConfig(
        dataset="folder:photos", examples_per_epoch=4, heldout_examples=4, batch_size=2, exclude="list.json"
    )
    for place in ("notebooks", "."):
        monkeypatch.chdir(checkout / place)
        source, heldout = data.load_sources(config)
        assert len(data.make_sampler(config, source)) == 3 and heldout[3][0].shape == (8, 8, 3)
    (checkout / "notebooks" / "photos").mkdir()  # what is there goes before
    monkeypatch.chdir(checkout / "notebooks")
    with pytest.raises(ConfigError, match="has no train images"):
        data.load_sources(config)


def test_held_out_classes_are_those_that_are_trained_on(tmp_path):
    """By name, where splits are folders of names of their own; some may be missing from the held-out shards."""
    picture = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    for place in ("one/cat", "one/dog", "two/cat", "two/eel", "three/cat", "four/cat", "four/dog", "four/eel"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "0.png").write_bytes(picture)
    for shard, labels in (("a", (0, 1, 2)), ("b", (1, 0)), ("c", (3,))):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for number, label in enumerate(labels):
                for suffix, content in (("png", picture), ("cls", b"%d" % label)):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))

    def sources(kind, train, heldout):
        return data.load_sources(PretrainConfig(
            dataset=f"{kind}:{tmp_path}", train_split=train, heldout_split=heldout, examples_per_epoch=2, heldout_examples=1,
            batch_size=1,
        ))  # fmt: skip

    with pytest.raises(ConfigError, match="class 1 is 'dog' to train and 'eel' held out"):
        sources("folder", "one", "two")
    with pytest.raises(ConfigError, match="has 2 classes to train and 3 held out"):
        sources("folder", "one", "four")
    assert sources("folder", "one", "three")[0].num_classes == 2
    assert sources("webdataset", "a", "b")[0].num_classes == 3
    with pytest.raises(ConfigError, match="has 3 classes to train and 4 held out"):
        sources("webdataset", "a", "c")


def test_the_evaluation_view_is_that_of_the_family():
    """NFNets' ignores a picture's shape, as the release and timm do, and so sees more of it; ViTs' keeps it."""
    columns, rows = np.meshgrid(np.linspace(0, 255, 500), np.linspace(0, 255, 375))
    picture = np.stack([columns, rows, rows], -1).astype(np.uint8)
    seen = {squash: eval_views([picture], 256, 32, squash)[0].astype(float) / 255 for squash in (True, False)}
    share = 256 / 288
    for squash, wide in ((True, share), (False, share * 375 / 500)):
        left, right = seen[squash][:, 0, 0].mean(), seen[squash][:, -1, 0].mean()
        assert right - left == pytest.approx(wide, abs=0.01) and left + right == pytest.approx(1, abs=0.01)
        assert np.ptp(seen[squash][..., 1]) == pytest.approx(share, abs=0.01)
    square = picture[:, 62:437]
    np.testing.assert_array_equal(eval_views([square], 256, 32, True), eval_views([square], 256, 32, False))
    assert get_variant("F3-mini").squash and not get_variant("B/16").squash


@pytest.mark.parametrize("shape", [(1, 20_000, 3), (20_000, 1, 3), (2, 9001, 3)])
def test_very_long_pictures_take_no_more_memory(shape):
    tracemalloc.start()
    picture = np.full(shape, 200, np.uint8)
    assert all((eval_views([picture], 480, 32, squash) == 200).all() for squash in (True, False))
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
