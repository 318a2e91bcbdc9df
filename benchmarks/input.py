"""Images a second and core of the input pipeline, beside tf.data pipelines of the same work.

    python benchmarks/input.py                     needs tensorflow for the comparison: pip install -e '.[tfds-build]'
    python benchmarks/input.py --memory 200000     resident memory over so many images
    python benchmarks/input.py --photos DIR        on the JPEGs of a folder, as they are
    python benchmarks/input.py --quality 97        on denser JPEGs (default: 90)

The work: decode a JPEG, random-resized crop to 224 px, mirror, batch of 64 as uint8. tf.data: decode whole images, as ours must
to notice damage anywhere, bilinear; "fused": decode only what the crop needs; "released": fused and bicubic, as
nfnets/dataset.py. Rounds of all pipelines alternate, each in a process of its own pinned to the same cores; the ratio of a
round is between neighbours, so that a busy machine slows both.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

BATCH, RESOLUTION = 64, 224


def jpegs(photos: Path | None, quality: int, count: int = 200) -> list[bytes]:
    """Parts of scikit-learn's two photographs as JPEGs of about 500 x 375 pixels, or the files of a folder."""
    if photos:
        return [path.read_bytes() for path in sorted(photos.rglob("*.jp*g"))[:count]]
    import cv2
    import simplejpeg
    from sklearn.datasets import load_sample_images

    rng, out, images = np.random.default_rng(0), [], load_sample_images().images
    for i in range(count):
        image, share = images[i % 2], rng.uniform(0.6, 1.0)
        height, width = (int(side * share) for side in image.shape[:2])
        top, left = int(rng.integers(image.shape[0] - height + 1)), int(rng.integers(image.shape[1] - width + 1))
        size = (int(rng.integers(440, 560)), int(rng.integers(330, 420)))
        part = cv2.resize(image[top : top + height, left : left + width], size, interpolation=cv2.INTER_AREA)
        out.append(simplejpeg.encode_jpeg(np.ascontiguousarray(part), quality=quality, colorsubsampling="420"))
    return out


class InMemory:
    """The encoded images as a source."""

    name, num_classes, fingerprint = "jpegs", 2, "benchmark"

    def __init__(self, encoded: list[bytes]):
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int):
        from nfnet_lib.decode import decode_image

        return decode_image(self.encoded[index]), 0


def ours(encoded: list[bytes], threads: int, augmult: int = 1):
    from nfnet_lib.loader import train_batches
    from nfnet_lib.sampler import ExactlyOnceSampler

    source = InMemory(encoded)
    return train_batches(
        source, ExactlyOnceSampler(len(source), 0), batch_size=BATCH, resolution=RESOLUTION, seed=0, augmult=augmult,
        workers=threads,
    )  # fmt: skip


def tf_data(encoded: list[bytes], threads: int, form: str):
    """form: "", "fused" or "released"."""
    import tensorflow as tf

    def view(data):
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data), tf.zeros([1, 0, 4]), min_object_covered=0.0, area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3), max_attempts=10, use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        if form:
            window = tf.concat([begin[:2], size[:2]], axis=0)
            image = tf.image.decode_and_crop_jpeg(data, window, channels=3, dct_method="INTEGER_ACCURATE")
        else:
            image = tf.slice(tf.image.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE"), begin, size)
        image = tf.image.resize(image, (RESOLUTION, RESOLUTION), "bicubic" if form == "released" else "bilinear")
        return tf.cast(tf.clip_by_value(tf.image.random_flip_left_right(image), 0, 255), tf.uint8)

    data = tf.data.Dataset.from_tensor_slices(encoded).repeat().shuffle(len(encoded))
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    data = data.map(view, num_parallel_calls=threads).batch(BATCH).prefetch(2).with_options(options)
    return data.as_numpy_iterator()


def measure(pipeline, seconds: float) -> float:
    """Images a second, after a start of two batches."""
    next(pipeline), next(pipeline)
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        batch = next(pipeline)
        count += len(batch) if isinstance(batch, np.ndarray) else len(batch.images)
    return count / elapsed


def one(arguments: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))[: arguments.cores]
    os.sched_setaffinity(0, cores)
    encoded = jpegs(arguments.photos, arguments.quality)
    name, _, form = arguments.one.partition(" ")
    if name == "ours":
        pipeline = ours(encoded, len(cores), int(form.removeprefix("K=") or 1))
    else:
        pipeline = tf_data(encoded, len(cores), form)
    print(json.dumps(measure(pipeline, arguments.seconds) / len(cores)))


def memory(arguments: argparse.Namespace) -> None:
    import psutil

    process, seen, mark = psutil.Process(), 0, 0
    with contextlib.closing(ours(jpegs(arguments.photos, arguments.quality), arguments.cores)) as batches:
        for batch in batches:
            seen += len(batch.images)
            if seen >= mark or seen >= arguments.memory:
                print(f"{seen:>8,} images: {process.memory_info().rss / 2**20:.0f} MiB", flush=True)
                mark += arguments.memory // 10
            if seen >= arguments.memory:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(arguments)
    if arguments.memory:
        return memory(arguments)
    names = ["ours", "tf.data", "tf.data fused", "tf.data released", "ours K=4", "ours K=16"]
    if importlib.util.find_spec("tensorflow") is None:
        print("tensorflow is not installed: no comparison (pip install -e '.[tfds-build]')")
        names = [name for name in names if name.startswith("ours")]
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
            environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            rates[name].append(float(done.stdout.splitlines()[-1]))
    encoded = jpegs(arguments.photos, arguments.quality)
    size = statistics.mean(map(len, encoded)) / 1e3
    print(f"{len(encoded)} JPEGs of {size:.0f} KB, {arguments.cores} core(s), {arguments.rounds} rounds: median (range)")
    for name in names:
        pairs = list(zip(rates["ours"], rates[name], strict=True))
        ratios = [a / b if name.startswith("tf") else b / a for a, b in pairs]
        what = "ours is faster by" if name.startswith("tf") else "views for one of ours"
        print(
            f"{name:>17}: {spread(rates[name], '.0f')} views/s and core"
            + (f"; {what} {spread(ratios, '.2f')}" if name != "ours" else "")
        )


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
