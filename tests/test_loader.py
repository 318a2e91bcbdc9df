"""The loader: the same batches on any topology and after any kill, and nothing that a file holds stops or shifts it."""

import contextlib
import gc
import io
import json
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nfnet_lib import decode, loader
from nfnet_lib.config import PretrainConfig
from nfnet_lib.data import Quarantine
from nfnet_lib.decode import decode_image
from nfnet_lib.loader import BadExample, LoaderError, eval_batches, train_batches
from nfnet_lib.program import Programs, evaluate
from nfnet_lib.sampler import ExactlyOnceSampler
from nfnet_lib.sharding import make_mesh
from nfnet_lib.sources import ArraySource, load_source

FULL = {"mixup_alpha": 0.2, "cutmix": True, "randaugment_layers": 2}


def numbered(n):
    rng = np.random.default_rng(n)
    images = rng.integers(0, 255, (n, 12, 12, 3), np.uint8)
    return ArraySource("numbered", n, f"numbered{n}", images, np.arange(n))


def encoded(pixels, form, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def same(one, other):
    for name in ("images", "labels", "label_weights", "weights"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("options", [{}, {"augmult": 4}, {"augmult": 2, **FULL}])
def test_batches_are_the_same_for_any_workers(options):
    source, sampler = numbered(150), ExactlyOnceSampler(150, 5)
    streams = [
        train_batches(source, sampler, batch_size=240, resolution=10, seed=3, workers=workers, prefetch=3, **options)
        for workers in (0, 1, 2, 5)
    ]
    for _ in range(4):
        first, *others = [next(stream) for stream in streams]
        for other in others:
            same(first, other)
            assert first.position == other.position and (first.ids == other.ids).all()
    for stream in streams:
        stream.close()


def test_views_mixing_and_randaugment_do_not_depend_on_the_number_of_processes():
    source, sampler = numbered(100), ExactlyOnceSampler(100, 1)
    options = {"batch_size": 48, "augmult": 2, "resolution": 9, "seed": 8, "start": 60, "workers": 0, **FULL}
    whole = next(train_batches(source, sampler, **options))
    for count in (2, 3, 4):
        parts = [
            next(train_batches(source, sampler, process_index=i, process_count=count, **options)) for i in range(count)
        ]
        for name in ("images", "labels", "label_weights", "ids"):
            np.testing.assert_array_equal(getattr(whole, name), np.concatenate([getattr(p, name) for p in parts]))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_ten_kills_and_other_topologies_each_epoch_once(data):
    """What a checkpoint holds is the position of the last batch applied; batches made ahead are lost with the process."""
    n, seed = data.draw(st.integers(30, 120)), data.draw(st.integers(0, 1000))
    exclude = np.unique(np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=5)), np.int64))
    source, sampler = numbered(n), ExactlyOnceSampler(n, seed, exclude)
    seen, position, leg = [], 0, 0
    while position < 3 * len(sampler) or leg < 10:
        processes = (1, 2, 4, 3)[leg % 4]
        augmult = data.draw(st.sampled_from([1, 2, 4]))
        options = {
            "batch_size": augmult * processes * data.draw(st.integers(1, 6)), "augmult": augmult, "resolution": 4,
            "seed": seed, "start": position, "workers": data.draw(st.sampled_from([0, 2])), "prefetch": 2,
        }  # fmt: skip
        options["process_count"] = processes
        streams = [train_batches(source, sampler, process_index=i, **options) for i in range(processes)]
        with pytest.MonkeyPatch.context() as patch:  # how many small batches are made at a time changes none
            patch.setattr(loader, "TOGETHER", (data.draw(st.sampled_from([1, 20, 256])), 2**19))
            started = [next(stream) for stream in streams]
        for number in range(data.draw(st.integers(1, 6))):
            batches = [next(stream) for stream in streams] if number else started
            seen += [batch.ids for batch in batches]
            assert all(Counter(b.labels[:, 0].tolist()) == Counter({int(i): augmult for i in b.ids}) for b in batches
                       if len(set(b.ids.tolist())) == len(b.ids)), "K views of each example, on one process"  # fmt: skip
            position = batches[0].position
        for stream in streams:
            stream.close()
        leg += 1
    seen = np.concatenate(seen)
    kept = np.setdiff1d(np.arange(n), exclude)
    for epoch in range(len(seen) // len(kept)):
        np.testing.assert_array_equal(np.sort(seen[epoch * len(kept) : (epoch + 1) * len(kept)]), kept)


WORKER = """
import json, sys
sys.path[:0] = ['tests', '.']
from test_loader import *
n, seed, index, count, start, batch, augmult = map(int, sys.argv[1:8])
options = dict(batch_size=batch, augmult=augmult, resolution=6, seed=seed, start=start, workers=2)
with open(sys.argv[8], 'w') as log:
    for made in train_batches(numbered(n), ExactlyOnceSampler(n, seed), process_index=index, process_count=count, **options):
        log.write(json.dumps([made.position, made.ids.tolist()]) + chr(10))
        log.flush()
        time.sleep(0.01)
"""


@pytest.mark.slow
def test_ten_kills_of_real_processes(tmp_path):
    """SIGKILL at random moments, on 1, 2, 4, 3 processes in turn; resumed from a step that all of them had finished."""
    rng = np.random.default_rng(0)
    n, seed, position, seen = 997, 5, 0, []
    for leg in range(10):
        count, augmult = (1, 2, 4, 3)[leg % 4], int(rng.choice([1, 2]))
        batch = count * augmult * int(rng.integers(2, 9))
        logs = [tmp_path / f"{leg}_{index}" for index in range(count)]
        numbers = [[n, seed, index, count, position, batch, augmult] for index in range(count)]
        processes = [
            subprocess.Popen([sys.executable, "-c", WORKER, *map(str, of), str(log)], cwd=Path(__file__).parent.parent)
            for of, log in zip(numbers, logs, strict=True)
        ]
        deadline = time.monotonic() + 60
        while not all(log.exists() and log.read_text().count("\n") > 5 for log in logs) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(float(rng.uniform(0, 0.5)))
        for process in processes:
            process.kill()
            process.wait()
        steps = [[json.loads(line) for line in log.read_text().splitlines(True) if line.endswith("\n")] for log in logs]
        saved = int(rng.integers(4, min(map(len, steps)) + 1))  # the checkpoint is older than the kill
        seen += [ids for own in steps for _, ids in own[:saved]]
        position = steps[0][saved - 1][0]
    counts = Counter(i for ids in seen for i in ids)
    epochs, rest = divmod(position, n)
    assert sum(counts.values()) == position and epochs >= 1
    assert set(counts.values()) <= {epochs, epochs + 1} and sum(c == epochs + 1 for c in counts.values()) == rest


def test_grains_elastic_iterator_keeps_the_same_promise_under_the_same_restarts():
    """Both exactly once. (Grain's processes take strided slots, so its rows' order depends on their number; ours does not.)"""
    from grain.experimental import ElasticIterator
    from grain.python import MapDataset, ReadOptions, ShardOptions

    n, batch, legs = 60, 12, [(1, 3), (2, 2), (4, 4), (3, 5), (1, 1)]
    dataset = MapDataset.range(n).seed(7).shuffle().repeat(2)
    sampler, position, state = ExactlyOnceSampler(n, 7), 0, None
    ours, theirs = [], []
    for processes, steps in legs:
        iterators = [
            ElasticIterator(
                dataset, global_batch_size=batch, shard_options=ShardOptions(shard_index=i, shard_count=processes),
                read_options=ReadOptions(num_threads=0), multiprocessing_options=None,
            )
            for i in range(processes)
        ]  # fmt: skip
        for iterator in iterators:
            if state is not None:
                iterator.set_state(state)
        streams = [
            train_batches(numbered(n), sampler, batch_size=batch, resolution=4, seed=0, start=position, workers=0,
                          process_index=i, process_count=processes)
            for i in range(processes)
        ]  # fmt: skip
        for _ in range(min(steps, (2 * n - position) // batch)):
            theirs += [np.asarray(next(iterator)).ravel() for iterator in iterators]
            made = [next(stream) for stream in streams]
            ours += [b.ids for b in made]
            position = made[0].position
        state = iterators[0].get_state()
    for seen in (np.concatenate(ours), np.concatenate(theirs)):
        assert Counter(seen[:n].tolist()) == Counter(range(n)) == Counter(seen[n : 2 * n].tolist())


def test_evaluation_counts_each_example_once_on_any_number_of_processes():
    source = numbered(53)
    for count in (1, 2, 4):
        seen = []
        streams = [eval_batches(source, batch_size=16, resolution=8, process_index=i, process_count=count, workers=i % 3)
                   for i in range(count)]  # fmt: skip
        parts = [list(stream) for stream in streams]
        assert len({len(part) for part in parts}) == 1, "as many batches on each, or their collectives would hang"
        for batch in (b for part in parts for b in part):
            assert len(batch.images) == 16 // count
            seen += batch.labels[batch.weights > 0, 0].tolist()
        assert sorted(seen) == list(range(53))


def bad_files():
    rng = np.random.default_rng(0)
    pixels = cv2.resize(rng.integers(0, 255, (8, 9, 3), np.uint8), (90, 80))
    jpeg, png = encoded(pixels, "JPEG", quality=90), encoded(pixels, "PNG")
    huge = png[:16] + struct.pack(">II", 60_000, 60_000) + png[24:29]
    huge += struct.pack(">I", zlib.crc32(huge[12:29])) + png[33:]
    frame = jpeg.index(b"\xff\xc0") + 5
    return {
        "empty": b"", "text": b"<html>404</html>", "truncated": jpeg[: len(jpeg) // 2], "header only": jpeg[:30],
        "part missing": jpeg[: len(jpeg) // 2] + jpeg[len(jpeg) // 2 + 300 :],
        "start only": b"\xff\xd8", "png cut": png[: len(png) // 2], "pixel bomb": huge,
        "jpeg of no height": jpeg[:frame] + b"\0\0" + jpeg[frame + 2 :],
        "jpeg of 65535 x 65535": jpeg[:frame] + b"\xff\xff\xff\xff" + jpeg[frame + 4 :],
        "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "zeros": bytes(5000),
        "random": rng.bytes(3000), "jpeg then random": jpeg[:200] + rng.bytes(2000), "float": _tiff_float(),
    }  # fmt: skip


def _tiff_float():
    stream = io.BytesIO()
    Image.fromarray(np.ones((5, 5), np.float32)).save(stream, "TIFF")
    return stream.getvalue()


def good_files():
    rng = np.random.default_rng(1)
    pixels = cv2.resize(rng.integers(0, 255, (8, 9, 3), np.uint8), (90, 80))
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6

    def stored(form, converted=image, **options):
        stream = io.BytesIO()
        converted.save(stream, form, **options)
        return stream.getvalue()

    grey16 = Image.fromarray((np.arange(80 * 90, dtype=np.uint16).reshape(80, 90) * 9).astype(np.uint16))
    palette = image.quantize(16)
    palette.info["transparency"] = 3
    return {
        "jpeg": stored("JPEG"),
        "progressive": stored("JPEG", progressive=True),
        "grey jpeg": stored("JPEG", image.convert("L")),
        "cmyk": stored("JPEG", image.convert("CMYK")),
        "rotated": stored("JPEG", exif=exif),
        "grey 16": stored("PNG", grey16),
        "palette": stored("PNG", palette),
        "one bit": stored("PNG", image.convert("1")),
        "alpha": stored("PNG", image.convert("RGBA")),
        "grey alpha": stored("PNG", image.convert("LA")),
        **{form.lower(): stored(form) for form in ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")},
        "one pixel": encoded(np.full((1, 1, 3), 9, np.uint8), "JPEG"),
        "line": encoded(np.full((1, 3000, 3), 9, np.uint8), "PNG"),
    }


@pytest.mark.parametrize("name", good_files())
def test_every_kind_of_image_becomes_rgb(name):
    pixels = decode_image(good_files()[name], name)
    expected = {"one pixel": (1, 1, 3), "line": (1, 3000, 3)}.get(name, (80, 90, 3))
    assert pixels.shape == expected and pixels.dtype == np.uint8
    if name == "grey 16":
        assert abs(int(pixels.max()) - 80 * 90 * 9 / 257) < 2, "scaled, not clipped at 255"
    if name in ("png", "alpha", "bmp", "tiff", "ppm"):
        np.testing.assert_array_equal(pixels, decode_image(good_files()["png"], "png"))


@pytest.mark.parametrize("name", bad_files())
def test_every_kind_of_damage_is_an_error_that_names_the_example(name):
    with pytest.raises(ValueError, match=r"^example 7: not a readable image: ."):
        decode_image(bad_files()[name], "example 7")


def test_images_too_large_are_decoded_smaller_or_refused(monkeypatch):
    pixels = cv2.resize(np.random.default_rng(0).integers(0, 255, (4, 60, 3), np.uint8), (1200, 90))
    monkeypatch.setattr(decode, "MAX_PIXELS", 90 * 1200 // 5)
    assert decode_image(encoded(pixels, "JPEG")).shape == (23, 300, 3), "a quarter of each side"
    for bad in (encoded(pixels, "JPEG", progressive=True), encoded(pixels, "PNG")):
        with pytest.raises(ValueError, match="1200 x 90 pixels"):
            decode_image(bad)
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="at most 100"):
        decode_image(encoded(pixels, "JPEG"))


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """40 sound images in 2 classes, and every kind of damage."""
    root = tmp_path_factory.mktemp("dirty")
    rng = np.random.default_rng(2)
    for i in range(40):
        folder = root / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(
            encoded(cv2.resize(rng.integers(0, 255, (5, 5, 3), np.uint8), (50, 40)), "JPEG")
        )
    for i, data in enumerate(bad_files().values()):
        (root / "train" / "a" / f"bad{i}.jpg").write_bytes(data)
    return load_source(f"folder:{root}", "train", split_name="train")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_bad_examples_keep_their_slots_and_are_named(dirty, workers):
    sampler, seen, bad = ExactlyOnceSampler(len(dirty), 0), [], {}
    with contextlib.closing(
        train_batches(dirty, sampler, batch_size=11, resolution=16, seed=0, workers=workers)
    ) as batches:
        while len(seen) < len(dirty):
            batch = next(batches)
            seen += batch.ids.tolist()
            bad |= {b.id: b for b in batch.bad}
            for row, index in enumerate(batch.ids.tolist()):
                assert (batch.weights[row] == 0) == (index in {b.id for b in batch.bad})
                assert batch.images[row].any() == (batch.weights[row] == 1)
    assert sorted(seen[: len(dirty)]) == list(range(len(dirty))), "nothing shifts"
    assert {dirty.path(i).name for i in bad} == {f"bad{i}.jpg" for i in range(len(bad_files()))}
    assert all("not a readable image" in b.reason for b in bad.values())
    assert all(sampler.example_ids(b.position, b.position + 1) == b.id for b in bad.values())
    totals = [(batch.weights.sum(), len(batch.bad)) for batch in eval_batches(dirty, batch_size=16, resolution=16)]
    assert np.sum(totals, axis=0).tolist() == [40, len(bad_files())]


def test_a_mixed_view_whose_neighbour_is_bad_stays_as_it_is(dirty):
    sampler = ExactlyOnceSampler(len(dirty), 0)
    options = {"batch_size": 54, "resolution": 16, "seed": 0, "workers": 0}
    plain = next(train_batches(dirty, sampler, **options))
    mixed = next(train_batches(dirty, sampler, **options, mixup_alpha=0.5))
    for row in range(54):
        alone = plain.weights[row] and not plain.weights[row ^ 1]
        if alone:
            np.testing.assert_array_equal(mixed.images[row], plain.images[row])
        assert mixed.label_weights[row].sum() == pytest.approx(1.0 if mixed.weights[row] else 0.0, abs=1e-6)


def test_stop_policy_names_the_first_bad_example(dirty):
    with pytest.raises(LoaderError, match=r"example \d+ of folder:.* at position \d+: not a readable image"):
        sampler = ExactlyOnceSampler(len(dirty), 0)
        for batch in train_batches(dirty, sampler, batch_size=8, resolution=16, seed=0, on_bad="stop"):
            assert not batch.bad


class Faulty(ArraySource):
    """Reads one by one; example 7 does what `fault` does."""

    def __init__(self, fault):
        base = numbered(50)
        super().__init__("faulty", 50, "faulty", base.images, base.labels)
        self.fault = fault

    batch = property()  # no reading together

    def __getitem__(self, index):
        if index == 7:
            self.fault()
        return super().__getitem__(index)


def test_a_hanging_worker_surfaces_with_its_example():
    hold = threading.Event()
    began = time.monotonic()
    try:
        with pytest.raises(LoaderError, match=r"example 7 of faulty has been read for \d s"):
            for _ in train_batches(
                Faulty(hold.wait),
                ExactlyOnceSampler(50, 1),
                batch_size=10,
                resolution=8,
                seed=0,
                workers=2,
                stall_seconds=0.5,
            ):
                pass
    finally:
        hold.set()
    assert time.monotonic() - began < 20


def test_labels_out_of_range_are_bad_examples_not_clamped():
    base = numbered(20)
    labels = base.labels.copy()
    labels[[3, 11]] = -1, 20
    source = ArraySource("wrong", 20, "wrong", base.images, labels)
    for batches in (
        train_batches(source, ExactlyOnceSampler(20, 0), batch_size=20, resolution=8, seed=0, workers=0),
        eval_batches(source, batch_size=20, resolution=8),
    ):
        batch = next(batches)
        assert {(b.id, b.reason) for b in batch.bad} == {
            (3, "label -1 is not in 0 to 19"),
            (11, "label 20 is not in 0 to 19"),
        }
        assert batch.weights.sum() == 18 and not batch.label_weights[batch.weights == 0].any()


def test_a_storage_error_is_tried_again():
    calls = []

    def once():
        calls.append(1)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")

    stream = train_batches(Faulty(once), ExactlyOnceSampler(50, 1), batch_size=50, resolution=8, seed=0, workers=0)
    assert [next(stream).bad for _ in range(5)] == [()] * 5
    assert len(calls) == 6, "one visit an epoch, and the first of them twice"
    stream.close()


def test_threads_end_with_their_iterator():
    loaders = lambda: sum(t.name == "loader" for t in threading.enumerate())  # noqa: E731
    stream = train_batches(numbered(50), ExactlyOnceSampler(50, 1), batch_size=10, resolution=8, seed=0, workers=4)
    next(stream)
    assert loaders() >= 4
    stream.close()
    gc.collect()  # the iterators of other tests
    deadline = time.monotonic() + 10
    while loaders() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loaders()


@pytest.mark.parametrize("ending", ["next(stream)", "next(stream); stream.close()", "next(stream); del stream"])
def test_a_process_ends_cleanly_while_its_loader_is_at_work(ending):
    code = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "from test_loader import *\n"
        "stream = train_batches(numbered(400), ExactlyOnceSampler(400, 1), batch_size=4000, resolution=224, seed=0, augmult=10,"
        " workers=4)\n"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code + ending], check=True, timeout=60, cwd=Path(__file__).parent.parent)


def test_the_quarantine_is_written_once_each_and_stops_above_its_share(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 2000, 0.001)
    quarantine.add((BadExample(5, 40, "torn"), BadExample(5, 2040, "torn")))
    quarantine.add((BadExample(9, 50, "torn"),))
    again = Quarantine(path, 2000, 0.001)
    again.add((BadExample(9, 50, "torn"), BadExample(3, -1, "torn")), "heldout")
    assert again.ids == {"train": {5, 9}, "heldout": {3, 9}} and len(path.read_text().splitlines()) == 4
    with pytest.raises(
        LoaderError, match=r"max_bad_fraction: 3 of 2000 examples can't be read, more than 0\.001; .*example 8"
    ):
        again.add((BadExample(8, 60, "torn"),))
    Quarantine(tmp_path / "small.jsonl", 10, 0.001).add((BadExample(0, 0, "one is always allowed"),))


@pytest.mark.parametrize(
    "options,words",
    [
        ({"batch_size": 10, "augmult": 3}, "batch_size: 10 is not a multiple of augmult=3"),
        ({"batch_size": 9, "mixup_alpha": 0.2}, "batch_size: 9 examples .* even"),
        ({"batch_size": 8, "on_bad": "ignore"}, "on_bad: 'ignore'"),
        ({"batch_size": 8, "workers": -1}, "workers, prefetch: -1"),
    ],
)
def test_bad_requests(options, words):
    with pytest.raises(ValueError, match=words):
        next(train_batches(numbered(50), ExactlyOnceSampler(50, 1), resolution=8, seed=0, **options))


def bad_heldout(bad, of):
    """A source of which so many examples can't be read, and what `evaluate` makes of it, with a model that knows nothing."""

    class Torn:
        name, num_classes, fingerprint = "torn", 4, "torn"

        def __len__(self):
            return of

        def __getitem__(self, index):
            if index < bad:
                raise ValueError("torn")
            return np.zeros((16, 16, 3), np.uint8), 0

    def sums(_, examples):
        total = float(examples.weights.sum())
        return {"loss": total, "top1": 0.0, "top5": 0.0, "examples": total, "labelled": total, "calibration": np.zeros(15)}

    config = PretrainConfig(resolution=16, eval_resolution=16)
    program = Programs(make_mesh(), None, None, None, sums, 8)
    return evaluate(program, config, Torn(), Quarantine(None, 2000, 0.001), None, "heldout")


def test_held_out_numbers_are_never_of_a_fragment_of_the_set():
    """A mount that breaks during the last evaluation must not become a finished run."""
    assert bad_heldout(1, 30)["heldout_loss"] == 1
    with pytest.raises(LoaderError, match=r"max_bad_fraction: 2 of 30 heldout examples can't be read, more than 0\.001"):
        bad_heldout(2, 30)
    assert bad_heldout(3, 3000)["heldout_loss"] == 1
    with pytest.raises(LoaderError, match="torn: none of 1 heldout examples"):
        bad_heldout(1, 1)


@pytest.mark.parametrize("channels", [1, 4])
def test_pixels_that_are_not_rgb_are_bad_examples(channels):
    """OpenCV would leave the view as it was: black, or whatever was there."""

    class Own:
        name, num_classes, fingerprint = "own", 2, "own"

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return np.full((20, 20, channels), 90, np.uint8), 0

    (batch,) = eval_batches(Own(), batch_size=8, resolution=16)
    assert len(batch.bad) == 8 and not batch.weights.any() and f"[20, 20, {channels}]" in batch.bad[0].reason
