"""Parameters and multiply-accumulates (MACs) by group, and the training FLOPs that follow.

Conventions: a MAC is one multiply and one add (2 FLOPs); only convolutions, dense layers and attention's products count,
padding included; published NFNet "FLOPs" are MACs at the test resolution, published ViT "GFLOPs" are twice the MACs.
Training costs 3 forward passes (backward = 2 forward), so 6 FLOPs a MAC and image; SAM takes two gradients of the whole
batch and doubles that.
"""

from typing import TYPE_CHECKING

from nfnet_lib.variants import STAGE_STRIDES, Variant, ViTVariant

if TYPE_CHECKING:
    from nfnet_lib.config import RunConfig


def count(
    variant: Variant | ViTVariant, resolution: int, num_classes: int = 1000, bottleneck_rule: str = "published"
) -> dict[str, dict[str, int]]:
    """{"params": {group: n}, "macs": {group: n}} of one image of resolution x resolution pixels.

    Groups: stem, stage0 to stage3, final_conv, head; of a ViT (with learned positions for this resolution) embedding,
    positions, attention, mlp, norms, pool, head. Their sums are the model's totals.
    """
    if isinstance(variant, ViTVariant):
        return _count_vit(variant, resolution, num_classes)
    params: dict[str, int] = {}
    macs: dict[str, int] = {}

    def convolution(group: str, inputs: int, outputs: int, kernel: int, side: int, groups: int = 1) -> None:
        weights = kernel * kernel * inputs // groups * outputs
        params[group] = params.get(group, 0) + weights + 2 * outputs  # gain and bias
        macs[group] = macs.get(group, 0) + weights * side * side

    def dense(group: str, inputs: int, outputs: int) -> None:
        params[group] = params.get(group, 0) + inputs * outputs + outputs
        macs[group] = macs.get(group, 0) + inputs * outputs

    side, channels = resolution, 3
    for outputs, stride in zip((*variant.stem, variant.width[0] // 2), (2, 1, 1, 2), strict=True):
        side = -(-side // stride)
        convolution("stem", channels, outputs, 3, side)
        channels = outputs
    for index, (width, depth, stride) in enumerate(zip(variant.width, variant.depth, STAGE_STRIDES, strict=True)):
        group, bottleneck = f"stage{index}", variant.bottleneck(index, bottleneck_rule)
        for block in range(depth):
            convolution(group, channels, bottleneck, 1, side)
            if block == 0:
                side = -(-side // stride)
                convolution(group, channels, width, 1, side)  # shortcut
            convolution(group, bottleneck, bottleneck, 3, side, variant.groups(index))
            convolution(group, bottleneck, bottleneck, 3, side, variant.groups(index))
            convolution(group, bottleneck, width, 1, side)
            dense(group, width, width // 2)
            dense(group, width // 2, width)
            params[group] += 1  # skip gain
            channels = width
    convolution("final_conv", channels, 2 * channels, 1, side)
    dense("head", 2 * channels, num_classes)
    return {"params": params, "macs": macs}


def _count_vit(variant: ViTVariant, resolution: int, num_classes: int) -> dict[str, dict[str, int]]:
    width, depth, mlp = variant.width, variant.depth, variant.mlp
    tokens, patch = (resolution // variant.patch) ** 2, 3 * variant.patch**2
    one_attention, one_mlp = 4 * width * (width + 1), 2 * width * mlp + mlp + width
    pools, learned = variant.pool == "map", variant.position == "learned"
    return {
        "params": {
            "embedding": (patch + 1) * width, "positions": learned * tokens * width, "attention": depth * one_attention,
            "mlp": depth * one_mlp, "norms": (2 * depth + 1) * 2 * width,
            "pool": pools * (width + one_attention + 2 * width + one_mlp) + (variant.pool == "tok") * width,
            "head": (width + 1) * num_classes,
        },
        "macs": {
            "embedding": tokens * patch * width, "positions": 0,
            "attention": depth * (4 * tokens * width**2 + 2 * tokens**2 * width),
            "mlp": depth * 2 * tokens * width * mlp, "norms": 0,
            "pool": pools * (2 * (tokens + 1) * width**2 + 2 * tokens * width + 2 * width * mlp),
            "head": width * num_classes,
        },
    }  # fmt: skip


def vit_gflops(variant: ViTVariant, resolution: int, num_classes: int = 1000) -> float:
    """GFLOPs of one image as arXiv 2106.04560 Table 2 counts them: twice the MACs, and the elementwise operations.

    Of those 5 an attention score (softmax), 8 a normalised channel and 10 a hidden unit of the MLPs (GELU): our reading,
    which gives the printed figures. They weigh most in the smallest models, 1.4% of Ti/16.
    """
    tokens = (resolution // variant.patch) ** 2
    softmax = 5 * tokens**2 * variant.heads * variant.depth
    norms = 8 * tokens * variant.width * 2 * variant.depth
    gelu = 10 * tokens * variant.mlp * variant.depth
    return (2 * forward_macs(variant, resolution, num_classes) + softmax + norms + gelu) / 1e9


def forward_macs(
    variant: Variant | ViTVariant, resolution: int, num_classes: int, bottleneck_rule: str = "published"
) -> int:
    """MACs of one image's forward pass."""
    return sum(count(variant, resolution, num_classes, bottleneck_rule)["macs"].values())


def num_params(
    variant: Variant | ViTVariant, num_classes: int, bottleneck_rule: str = "published", resolution: int | None = None
) -> int:
    """Number of parameters; a ViT's positions are those of `resolution`, by default its training resolution."""
    return sum(count(variant, resolution or variant.train_px, num_classes, bottleneck_rule)["params"].values())


def train_flops(macs: int, images_seen: int, rho: float | int = 0.0, ascent_fraction: float | int = 1.0) -> float:
    """Training FLOPs of images_seen views: 6 a MAC, and with SAM (rho > 0) as much again for its share of ascent."""
    return 6.0 * macs * images_seen * (1 + (ascent_fraction if rho > 0 else 0))


def run_macs(config: "RunConfig") -> int:
    """Multiply-accumulates of a forward pass of one training image of a run, with the classes that its parameters name."""
    return forward_macs(config.architecture, config.resolution, config.num_classes, config.bottleneck_rule)


def run_flops(config: "RunConfig") -> float:
    """Training FLOPs of a whole run."""
    return train_flops(run_macs(config), config.steps * config.batch_size, config.rho, config.ascent_fraction)


def describe(config, num_classes: int | None = None):
    """What a run will do, as a one-column table: size, steps, FLOPs. `config` is a config.RunConfig.

    num_classes: of its data set, by default the config's, which only fractals heed.
    """
    import pandas as pd

    from nfnet_lib.paper import tpu_v4_core_hours

    variant, classes = config.architecture, num_classes or config.num_classes
    macs = forward_macs(variant, config.resolution, classes, config.bottleneck_rule)
    views = config.steps * config.batch_size
    total = train_flops(macs, views, config.rho, config.ascent_fraction)
    sam = f", {1 + config.ascent_fraction:g} times for SAM" if config.rho > 0 else ""
    rows = {
        "run": config.run_id,
        "parameters": f"{num_params(variant, classes, config.bottleneck_rule, config.resolution):,}",
        f"MACs of one image, {config.resolution} px": f"{macs:,}",
        "steps": f"{config.steps:,} ({config.warmup_steps:,} of warm-up)",
        "views seen": f"{views:,} of {config.steps * config.unique_per_step:,} draws",
        f"training FLOPs (6 a MAC and view{sam})": f"{total:.3g}",
        "TPU-v4 core-hours by formula": f"{tpu_v4_core_hours(total):.3g}",
    }
    return pd.DataFrame({"value": rows})


def published_table():
    """Every full variant: our counts beside the published ones, parameters in millions, MACs in billions at the test px.

    With 1,000 classes; ViTs' parameters without the head and their work in GFLOPs (`vit_gflops`), as they are published.
    """
    import pandas as pd

    from nfnet_lib.variants import SMALL, VARIANTS

    rows = []
    for name, variant in VARIANTS.items():
        if not name.endswith(SMALL):
            params, macs = num_params(variant, 1000), forward_macs(variant, variant.test_px, 1000)
            work, published = macs / 1e9, (variant.published_params, variant.published_macs)
            if isinstance(variant, ViTVariant):
                params -= count(variant, variant.train_px)["params"]["head"]
                work, published = vit_gflops(variant, variant.test_px), (published[0], 2 * published[1])
            rows.append(
                {
                    "variant": name, "family": variant.family, "width": variant.width, "depth": variant.depth,
                    "train/test px": f"{variant.train_px}/{variant.test_px}", "parameters (M)": round(params / 1e6, 1),
                    "published (M)": published[0] and published[0] / 1e6, "GMACs at test px": round(macs / 1e9, 2),
                    "counted as published (G)": round(work, 2), "published (G)": published[1] and published[1] / 1e9,
                }
            )  # fmt: skip
    return pd.DataFrame(rows).set_index("variant")


def size_table(resolution: int = 224):
    """Parameters (millions, 1,000 classes) and GMACs at one resolution of every full variant of both families."""
    import pandas as pd

    from nfnet_lib.variants import SMALL, VARIANTS

    full = [variant for name, variant in VARIANTS.items() if not name.endswith(SMALL)]
    return pd.DataFrame(
        {
            "variant": [variant.name for variant in full],
            "family": [variant.family for variant in full],
            "params_millions": [num_params(variant, 1000) / 1e6 for variant in full],
            "gmacs": [forward_macs(variant, resolution, 1000) / 1e9 for variant in full],
        }
    )


def published_agreement(table) -> str:
    """How far `published_table` is from the published figures, a sentence for each family."""
    sentences = []
    for family, rows in table.groupby("family", sort=False):
        known = rows.dropna(subset=["published (M)", "published (G)"])
        params = (known["parameters (M)"] / known["published (M)"] - 1).abs().max()
        macs = (known["counted as published (G)"] / known["published (G)"] - 1).abs().max()
        sentences.append(
            f"{len(known)} of {len(rows)} {family}s have published counts; the largest relative difference is "
            f"{params:.2%} in parameters and {macs:.2%} in work (the published figures are rounded)."
        )
    return " ".join(sentences)


def group_table(names: list[str], num_classes: int = 1000):
    """Share of parameters and MACs (at training resolution) in each group of the named variants, in percent."""
    import pandas as pd

    from nfnet_lib.variants import get_variant

    columns = {}
    for name in names:
        variant = get_variant(name)
        counts = count(variant, variant.train_px, num_classes)
        for what, label in (("params", "% of parameters"), ("macs", f"% of MACs at {variant.train_px} px")):
            total = sum(counts[what].values())
            columns[(name, label)] = {group: round(100 * n / total, 1) for group, n in counts[what].items()}
    return pd.DataFrame(columns)
