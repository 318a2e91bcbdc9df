"""Figures and tables of data: classes, views, class balance, what restarts cost; no JAX."""

import itertools

import numpy as np
import pandas as pd
from jaxtyping import UInt8
from matplotlib.figure import Figure

from nfnet_lib.loader import train_batches
from nfnet_lib.plot_style import figure_function, new_figure
from nfnet_lib.plots import contact_sheet
from nfnet_lib.sampler import ExactlyOnceSampler
from nfnet_lib.sources import Source

LABELS_READ = 20_000  # examples of which the labels are counted


def labels_of(source: Source, most: int = LABELS_READ, *, skip_bad: bool = False) -> list[tuple[int, ...]]:
    """The labels of the first `most` examples, images left undecoded where the source allows.

    skip_bad: without those that can't be read, of sources that read one by one.
    """
    ids = range(min(len(source), most))
    if hasattr(source, "labels"):
        return [(int(label),) for label in source.labels[: len(ids)]]
    if hasattr(source, "batch"):
        return [(int(label),) for label in source.batch(np.array(ids))[1]]
    read = source.encoded if hasattr(source, "encoded") else source.__getitem__
    labels = []
    for i in ids:
        try:
            labels.append(read(i)[1])
        except Exception:  # sources are users' code: whatever they raise is about this example
            if not skip_bad:
                raise
    return [label if isinstance(label, tuple) else (int(label),) for label in labels]


def picture(source: Source, index: int) -> UInt8[np.ndarray, "H W 3"]:
    """An example's pixels; a grey square where they can't be read, as training leaves such examples out."""
    try:
        return source[index][0]
    except Exception:  # sources are users' code: whatever they raise is about this example
        return np.full((8, 8, 3), 128, np.uint8)


def class_name(source: Source, label: int) -> str:
    """Its name where the source knows it, or else its number."""
    names = getattr(source, "class_names", None)
    return names[label] if names else str(label)


def balance_table(source: Source) -> pd.DataFrame:
    """class, name, examples: how many of the examples counted have the label; most first."""
    labels = [label for example in labels_of(source) for label in example]
    counts = np.bincount(labels, minlength=source.num_classes)
    table = pd.DataFrame({"class": range(len(counts)), "examples": counts})
    table.insert(1, "name", [class_name(source, label) for label in table["class"]])
    return table.sort_values("examples", ascending=False, ignore_index=True)


@figure_function
def balance(table: pd.DataFrame, note: str | None = None) -> Figure:
    """Examples of each class, most first."""
    figure, axes = new_figure(size=(9, 3), note=note)
    axes.bar(np.arange(len(table)), table["examples"], width=0.9, color="0.45")
    axes.set(xlabel="class, most examples first", ylabel="examples", xlim=(-0.7, len(table) - 0.3))
    if len(table) <= 24:
        axes.set_xticks(np.arange(len(table)), table["name"], rotation=60, ha="right", fontsize=8)
    axes.grid(False, axis="x")
    return figure


def balance_sentence(table: pd.DataFrame) -> str:
    """The spread of a balance table."""
    counts = table["examples"]
    empty = f"; {(counts == 0).sum()} classes have none" if (counts == 0).any() else ""
    return (
        f"{len(table)} classes of {counts.min()} to {counts.max()} examples each, {counts.sum()} labels in all{empty}."
    )


def classes_sheet(source: Source, size: int = 64, columns: int = 12) -> Figure:
    """One example of each of the first classes, by class."""
    first: dict[int, int] = {}
    for index, labels in enumerate(labels_of(source, 5000)):
        for label in labels:
            first.setdefault(label, index)
    chosen = [first[label] for label in sorted(first)][: 4 * columns]
    return contact_sheet(_squares(source, chosen, size), columns=columns, note="one example of each class, by class")


def _squares(source: Source, ids: list[int], size: int) -> np.ndarray:
    import cv2

    images = [np.ascontiguousarray(picture(source, i)) for i in ids]
    return np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images])


def views_sheet(source: Source, resolution: int, seed: int = 0, rows: int = 4, **augmentation) -> Figure:
    """Each row: one example at full size, then views of it as training would show them (`augment.Augmentation`)."""
    columns = 10
    sampler = ExactlyOnceSampler(len(source), seed)
    stream = train_batches(
        source, sampler, batch_size=rows * columns, augmult=columns, resolution=resolution, seed=seed, workers=0,
        **augmentation,
    )  # fmt: skip
    batch = next(stream)
    views = batch.images.reshape(rows, columns, resolution, resolution, 3)
    whole = _squares(source, batch.ids.tolist(), resolution)[:, None]
    sheet = np.concatenate([whole, views], axis=1).reshape(-1, resolution, resolution, 3)
    return contact_sheet(sheet, columns=columns + 1, note="left: the whole example; then its views")


def restarts_table(
    num_examples: int = 20_000, restarts: tuple[int, ...] = (0, 1, 2, 3, 5, 8, 12), seed: int = 0
) -> pd.DataFrame:
    """restarts, reshuffled, exactly_once: the share of an epoch's examples that is never seen.

    reshuffled: a loader that begins a new shuffle at every restart, restarts being evenly spread, as the paper's did
    (section 2: "examples were under-sampled" in restarted runs); exactly_once: `ExactlyOnceSampler`, stopped and resumed.
    """
    rows, rng = [], np.random.default_rng(seed)
    for number in restarts:
        stops = np.linspace(0, num_examples, number + 2).astype(int)
        legs = np.diff(stops)
        reshuffled = np.concatenate([rng.permutation(num_examples)[:leg] for leg in legs])
        sampler = ExactlyOnceSampler(num_examples, seed)
        ours = np.concatenate([sampler.example_ids(int(a), int(b)) for a, b in itertools.pairwise(stops)])
        unseen = [1 - len(np.unique(ids)) / num_examples for ids in (reshuffled, ours)]
        rows.append((number, *unseen))
    return pd.DataFrame(rows, columns=["restarts", "reshuffled", "exactly_once"])


def restarts_sentences(table: pd.DataFrame) -> list[str]:
    """What a restarts table shows."""
    worst = table.iloc[-1]
    return [
        f"With {worst.restarts:.0f} restarts in an epoch a loader that shuffles anew never shows {worst.reshuffled:.1%} of the "
        f"examples (expected: up to 36.8%), the sampler of this library {table.exactly_once.max():.1%}, whatever the restarts."
    ]


@figure_function
def restarts(table: pd.DataFrame) -> Figure:
    """Examples never seen in an epoch against the number of restarts in it."""
    figure, axes = new_figure(size=(8, 3.6))
    x = np.linspace(table["restarts"].min(), table["restarts"].max(), 200)
    axes.plot(x, 100 * (1 - 1 / (x + 1)) ** (x + 1), color="0.7", label="expected: (1 - 1/(r + 1))^(r + 1)")
    axes.plot(table["restarts"], 100 * table["reshuffled"], "o", color="C3", label="new shuffle at each restart")
    axes.plot(table["restarts"], 100 * table["exactly_once"], "s", color="C0", label="ExactlyOnceSampler")
    axes.set(xlabel="restarts in an epoch", ylabel="examples never seen (%)")
    axes.legend(frameon=False)
    return figure
