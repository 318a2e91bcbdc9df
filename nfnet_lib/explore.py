"""Widgets for notebooks: page through a data set or the pairs that dedup found."""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from jaxtyping import UInt8

from nfnet_lib.data_plots import class_name, labels_of, picture
from nfnet_lib.sources import Source

PAGE = 24  # pictures
SIDE = 96  # pixels


def browse(source: Source):
    """A widget that pages through the examples of a source, of all classes or of one."""
    import ipywidgets as widgets

    labels = labels_of(source)
    present = sorted({label for example in labels for label in example})
    choice = widgets.Dropdown(
        options=[("all classes", -1), *((class_name(source, label), label) for label in present)], description="class"
    )

    def chosen() -> list[int]:
        return [i for i, own in enumerate(labels) if choice.value < 0 or choice.value in own]

    def page(number: int) -> UInt8[np.ndarray, "H W 3"]:
        ids = chosen()[number * PAGE : (number + 1) * PAGE]
        captions = [f"{i}: {', '.join(class_name(source, label) for label in labels[i])}" for i in ids]
        return tiles([picture(source, i) for i in ids], captions)

    return _pager(page, lambda: len(chosen()), choice)


def browse_pairs(pairs, source: Source, others: dict[str, Source]):
    """A widget that pages through the pairs of `dedup.read_pairs`, the surest first."""
    table = pairs.sort_values("correlation", ascending=False)

    def page(number: int) -> UInt8[np.ndarray, "H W 3"]:
        rows = table.iloc[number * PAGE // 2 : (number + 1) * PAGE // 2]
        images, captions = [], []
        for row in rows.itertuples():
            images += [source[row.train_id][0], others[row.against][row.against_id][0]]
            captions += [f"train {row.train_id}", f"{row.correlation:.3f} {'dup' if row.duplicate else 'no'}"]
        return tiles(images, captions)

    return _pager(page, lambda: 2 * len(table))


def _pager(page: Callable[[int], np.ndarray], count: Callable[[], int], *controls):
    """A slider over pages of pictures, and the picture of the page; `controls` change what there is to page through."""
    import ipywidgets as widgets

    def last() -> int:
        return max(0, (count() - 1) // PAGE)

    slider = widgets.IntSlider(value=0, min=0, max=last(), description="page", continuous_update=False)
    picture = widgets.Image(format="png")

    def show(*_) -> None:
        picture.value = cv2.imencode(".png", page(slider.value)[..., ::-1])[1].tobytes()

    def restart(*_) -> None:
        slider.max, slider.value = last(), 0
        show()

    slider.observe(show, "value")
    for control in controls:
        control.observe(restart, "value")
    show()
    return widgets.VBox([widgets.HBox([*controls, slider]), picture])


def tiles(images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures in a grid, each with its caption below."""
    rows = max(1, -(-len(images) // columns))
    sheet = np.full((rows * (SIDE + 18), columns * (SIDE + 6), 3), 255, np.uint8)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        top, left = i // columns * (SIDE + 18), i % columns * (SIDE + 6)
        small = cv2.resize(np.ascontiguousarray(image), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        sheet[top : top + SIDE, left : left + SIDE] = small
        ascii_only = caption.encode("ascii", "replace").decode()[:15]
        cv2.putText(
            sheet, ascii_only, (left, top + SIDE + 12), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (40, 40, 40), 1, cv2.LINE_AA
        )
    return sheet
