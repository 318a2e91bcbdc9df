"""Published points of "ConvNets Match Vision Transformers at Scale" (arXiv 2310.16764) and of what it compares with.

Every row carries its `source` (arXiv id), `where` it stands in the source and `read`, how the number was obtained:

    text       a number printed in the running text or the abstract
    table      a number printed in a table
    axis       a tick, a plotted range or a legend entry of a figure; never the height of a curve
    computed   arithmetic on printed numbers, spelled out in `note`

The authors published neither tables nor data files of their curves, so nothing here was digitised from a figure: what
is missing is missing because it was not printed. Conventions: top-1 error in percent of the ImageNet validation set,
compute in TPU-v4 *core*-hours (one v4 chip = 2 cores = 1 JAX device).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

PAPER = "arXiv 2310.16764"
ZHAI = "arXiv 2106.04560"  # Scaling Vision Transformers: ViT-g/14, ViT-G/14
SOVIT = "arXiv 2305.13035"  # Getting ViT in Shape: SoViT-400m/14
BROCK = "arXiv 2102.06171"  # High-Performance Large-Scale Image Recognition Without Normalization
FORT = "arXiv 2105.13343"  # Drawing Multiple Augmentation Samples Per Image

TPU_V4_CORE_FLOPS = 137.5e12  # peak bfloat16 FLOP/s of one TPU-v4 core: half of a chip's 275e12
PAPER_UTILISATION = 0.395
"""Share of that peak the paper's F7+ run reached, with the published 192-channel first stage of "+" models: 8 epochs of
4e9 images at 224 px, 6 * 111.2e9 FLOPs an image, in 110k core-hours: 0.390 to 0.394 by as much as is printed of those. At 0.395
it is 109.2k. Computed, not printed."""

V3_STEP_MS = {
    "F0": (192, 73.3), "F1": (224, 158.5), "F2": (256, 295.8), "F3": (320, 532.2), "F4": (384, 1033.3), "F5": (416, 1398.5),
}  # fmt: skip
"""{variant: (training px, ms a step)} of the released NFNet code on TPU v3, 32 images a core: the table in the README of
deepmind-research nfnets/."""

POINT_COLUMNS = ("model", "family", "quantity", "value", "unit", "setting", "source", "where", "read", "note")

_HOURS, _ERROR = "pretrain compute", "top-1 error"
_V4H, _PCT = "TPU-v4 core-hours", "% of ImageNet validation"
_RA = "repeated augmentation"
# One row per published number; the columns are POINT_COLUMNS.
_POINTS = (
    (
        "F7+",
        "NFNet",
        _HOURS,
        110e3,
        _V4H,
        "8 epochs",
        PAPER,
        "abstract, text",
        "text",
        "largest budget of the abstract",
    ),
    (
        "F7+",
        "NFNet",
        _ERROR,
        9.7,
        _PCT,
        "8 epochs",
        PAPER,
        "text, Figure 1",
        "text",
        "100 - 90.3; pre-trained at 224 px, fine-tuned at 384 px, tested at 480 px",
    ),
    (
        "F7+",
        "NFNet",
        _ERROR,
        9.6,
        _PCT,
        f"8 epochs, {_RA}",
        PAPER,
        "abstract, Figure 1",
        "text",
        "100 - 90.4; 4 views of each image",
    ),
    ("F7+", "NFNet", "fine-tune compute", 1.6e3, _V4H, "50 epochs", PAPER, "text", "text", ""),
    ("g/14", "ViT", _HOURS, 120e3, _V4H, "", PAPER, "text, Figure 1", "text", "the paper's conversion of 210k TPU-v3"),
    ("g/14", "ViT", _HOURS, 210e3, "TPU-v3 core-hours", "", PAPER, "text", "text", ""),
    ("g/14", "ViT", _ERROR, 9.8, _PCT, "518 px", ZHAI, "text", "text", "100 - 90.2"),
    ("G/14", "ViT", _HOURS, 280e3, _V4H, "", PAPER, "text, Figure 1", "text", "the paper's conversion of >500k TPU-v3"),
    ("G/14", "ViT", _HOURS, 500e3, "TPU-v3 core-hours", "", PAPER, "text", "text", "a lower bound: more than 500k"),
    ("G/14", "ViT", _ERROR, 9.55, _PCT, "518 px", ZHAI, "text", "text", "100 - 90.45 (+-0.03)"),
    ("G/14", "ViT", "10-shot error", 15.14, _PCT, "10 images a class", ZHAI, "abstract", "text", "100 - 84.86"),
    (
        "So400m/14",
        "ViT",
        _HOURS,
        130e3,
        _V4H,
        "",
        PAPER,
        "text, Figure 1",
        "text",
        "the paper's conversion of 230k TPU-v3",
    ),
    ("So400m/14", "ViT", _HOURS, 230e3, "TPU-v3 core-hours", "", PAPER, "text", "text", ""),
    ("So400m/14", "ViT", _ERROR, 9.7, _PCT, "518 px", SOVIT, "text", "text", "100 - 90.3"),
    ("So400m/14", "ViT", _ERROR, 10.0, _PCT, "384 px", SOVIT, "text", "text", "100 - 90.0"),
    ("So400m/14", "ViT", _ERROR, 11.1, _PCT, "224 px", SOVIT, "text", "text", "100 - 88.9"),
    ("F4+", "NFNet", _ERROR, 10.8, _PCT, "JFT-300M, 20 epochs", BROCK, "Section 6.2", "text", "100 - 89.2"),
    ("F4", "NFNet", _ERROR, 10.8, _PCT, "JFT-300M, 40 epochs", BROCK, "Section 6.2", "text", "100 - 89.2"),
    ("F5", "NFNet", _ERROR, 13.7, _PCT, "ImageNet only, SAM", BROCK, "Table 3", "table", "100 - 86.3"),
    (
        "F6",
        "NFNet",
        _ERROR,
        13.5,
        _PCT,
        "ImageNet only, SAM",
        BROCK,
        "README of the released code",
        "table",
        "100 - 86.5",
    ),
    (
        "F5",
        "NFNet",
        _ERROR,
        13.22,
        _PCT,
        f"ImageNet only, SAM, {_RA} 16",
        FORT,
        "text",
        "text",
        "100 - 86.78, as listed by a public leaderboard",
    ),
)

# figure, axis, quantity, unit, low, high, models, note
_AXES = (
    ("Figure 1", "x", _HOURS, _V4H, 1e3, 1e5, "F1 F3 F3+ F7 F7+", "labelled ticks; log; compute estimated by eye"),
    ("Figure 1", "y", _ERROR, _PCT, 10.0, 14.0, "F1 F3 F3+ F7 F7+", "labelled ticks; log"),
    ("Figure 2", "x", _HOURS, _V4H, 0.4e3, 110e3, "F0 F1 F3 F3+ F7 F7+", "compute budgets of the abstract; log"),
    ("Figure 2", "y", "held-out loss", "nats", 2.4, 3.0, "F0 F1 F3 F3+ F7 F7+", "labelled ticks; log"),
    ("Figure 3", "x", "epoch budget", "epochs of JFT-4B", 0.25, 8.0, "F0 F3 F7+", "tried values, factors of 2"),
    ("Figure 3", "y", "best learning rate", "peak learning rate at batch 4096", 0.4, 1.6, "F0 F3 F7+", "tried values"),
)

_BUDGETS = (
    ("epoch budget, smallest", 0.25, "epochs of JFT-4B", PAPER, "Figure 3", "axis", ""),
    ("epoch budget, largest", 8.0, "epochs of JFT-4B", PAPER, "Figure 3", "axis", ""),
    ("compute budget, smallest", 0.4e3, _V4H, PAPER, "abstract", "text", ""),
    ("compute budget, largest", 110e3, _V4H, PAPER, "abstract", "text", "F7+, 8 epochs"),
    ("compute above which the best epoch budget exceeds 1", 5e3, _V4H, PAPER, "text", "text", "approximate"),
    ("held-out images", 130e3, "images", PAPER, "text", "text", ""),
    ("steps of 1 epoch at batch 4096", 977e3, "steps", PAPER, "", "computed", "4.0e9 images an epoch / 4096"),
    (
        "fine-tuning epochs",
        50.0,
        "epochs of ImageNet compute",
        PAPER,
        "text",
        "text",
        "12.5 passes over the images when each is shown 4 times",
    ),
)

_LEARNING_RATES = (
    ("tried learning rates are a factor of 2 apart", "0.4 0.8 1.6", "F0 F3 F7+", "Figure 3", "axis"),
    ("best learning rate at short epoch budgets", "1.6", "F0 F3 F7+", "Figure 3", "axis"),
    ("best learning rate at long epoch budgets and for large models", "0.8 0.4", "F0 F3 F7+", "Figure 3", "axis"),
    ("tuned separately for each epoch budget on a small logarithmic grid", "", "all", "text", "text"),
)


def tpu_v4_core_hours(train_flops, utilisation: int | float = PAPER_UTILISATION):
    """Hours of one TPU-v4 core for `train_flops` FLOPs (number or array) at a share `utilisation` of its bfloat16 peak.

    `train_flops` counts 2 FLOPs a multiply-accumulate and 3 forward passes a step, that is 6 * MACs * images. A
    formula, not a measurement: F7+ for 8 epochs of 4e9 images at 224 px gives the paper's 110k.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation={utilisation} must be in (0, 1]")
    return train_flops / (3600 * TPU_V4_CORE_FLOPS * utilisation)


def train_flops_of_core_hours(core_hours, utilisation: int | float = PAPER_UTILISATION):
    """Inverse of `tpu_v4_core_hours`: training FLOPs that `core_hours` (number or array) of one TPU-v4 core perform."""
    return core_hours / tpu_v4_core_hours(1.0, utilisation)


def _table(rows, columns) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(list(rows), columns=list(columns))


def points() -> "pd.DataFrame":
    """Every published number, one row each, columns `POINT_COLUMNS`."""
    return _table(_POINTS, POINT_COLUMNS)


def figure1_points() -> "pd.DataFrame":
    """The points of Figure 1 whose compute *and* error are printed somewhere, one row a point, cheapest first.

    Columns: model, family (NFNet or ViT), tpu_v4_core_hours, top1_error_percent, repeated_augmentation (bool), setting,
    source (of the error), where, read, note.
    """
    table = points()
    hours = table[(table["quantity"] == _HOURS) & (table["unit"] == _V4H)].set_index("model")["value"]
    # SoViT's 384 and 224 px rows are the same network tested at lower resolution and not points of Figure 1.
    chosen = (
        (table["quantity"] == _ERROR) & table["model"].isin(hours.index) & ~table["setting"].isin(["384 px", "224 px"])
    )
    result = table[chosen].rename(columns={"value": "top1_error_percent"})
    result.insert(2, "tpu_v4_core_hours", result["model"].map(hours))
    result.insert(4, "repeated_augmentation", result["setting"].str.contains(_RA))
    result = result.drop(columns=["quantity", "unit"])
    return result.sort_values(["tpu_v4_core_hours", "top1_error_percent"], ignore_index=True)


def axis_ranges() -> "pd.DataFrame":
    """What the axes of Figures 1 to 3 show: figure, axis, quantity, unit, low, high, models, note, source, read."""
    table = _table(_AXES, ("figure", "axis", "quantity", "unit", "low", "high", "models", "note"))
    return table.assign(source=PAPER, read="axis")


def budgets() -> "pd.DataFrame":
    """Epoch and compute budgets of the study: name, value, unit, source, where, read, note."""
    return _table(_BUDGETS, ("name", "value", "unit", "source", "where", "read", "note"))


def learning_rate_facts() -> "pd.DataFrame":
    """What Figure 3 and the text say about the best learning rate: fact, learning_rates, models, where, read, source.

    The best value of each single (model, epochs) cell can only be seen in the figure and is not repeated here.
    """
    return _table(_LEARNING_RATES, ("fact", "learning_rates", "models", "where", "read")).assign(source=PAPER)
