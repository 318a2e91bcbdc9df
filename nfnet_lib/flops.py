"""Parameters and multiply-accumulates (MACs) by group, and the training FLOPs that follow.

Conventions: a MAC is one multiply and one add (2 FLOPs); only convolutions and dense layers count, padding included;
published NFNet "FLOPs" are MACs at the test resolution. Training costs 3 forward passes (backward = 2 forward), so
6 FLOPs a MAC and image; SAM takes two gradients of the whole batch and doubles that.
"""

from nfnet_lib.variants import STAGE_STRIDES, STEM_CHANNELS, Variant


def count(
    variant: Variant, resolution: int, num_classes: int = 1000, bottleneck_rule: str = "published"
) -> dict[str, dict[str, int]]:
    """{"params": {group: n}, "macs": {group: n}} of one image of resolution x resolution pixels.

    Groups: stem, stage0 to stage3, final_conv, head. Their sums are the model's totals.
    """
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
    for outputs, stride in zip((*STEM_CHANNELS, variant.width[0] // 2), (2, 1, 1, 2), strict=True):
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


def forward_macs(variant: Variant, resolution: int, num_classes: int, bottleneck_rule: str = "published") -> int:
    """MACs of one image's forward pass."""
    return sum(count(variant, resolution, num_classes, bottleneck_rule)["macs"].values())


def num_params(variant: Variant, num_classes: int, bottleneck_rule: str = "published") -> int:
    """Number of parameters."""
    return sum(count(variant, 32, num_classes, bottleneck_rule)["params"].values())


def train_flops(macs: int, images_seen: int, rho: float = 0.0) -> float:
    """Training FLOPs of images_seen views: 6 a MAC, twice that with SAM (rho > 0)."""
    return 6.0 * macs * images_seen * (2 if rho > 0 else 1)


def describe(config):
    """What a run will do, as a one-column table: size, steps, FLOPs. `config` is a config.RunConfig.

    The number of classes is the config's: for a source that states its own, the head differs slightly.
    """
    import pandas as pd

    from nfnet_lib.paper import tpu_v4_core_hours
    from nfnet_lib.variants import get_variant

    variant = get_variant(config.variant)
    macs = forward_macs(variant, config.resolution, config.num_classes, config.bottleneck_rule)
    views = config.steps * config.batch_size
    total = train_flops(macs, views, config.rho)
    rows = {
        "run": config.run_id,
        "parameters": f"{num_params(variant, config.num_classes, config.bottleneck_rule):,}",
        f"MACs of one image, {config.resolution} px": f"{macs:,}",
        "steps": f"{config.steps:,} ({config.warmup_steps:,} of warm-up)",
        "views seen": f"{views:,} of {config.steps * config.unique_per_step:,} draws",
        "training FLOPs (6 a MAC and view" + (", twice for SAM)" if config.rho > 0 else ")"): f"{total:.3g}",
        "TPU-v4 core-hours by formula": f"{tpu_v4_core_hours(total):.3g}",
    }
    return pd.DataFrame({"value": rows})


def published_table():
    """Every full variant: our counts (1,000 classes) beside the published ones, in millions and billions."""
    import pandas as pd

    from nfnet_lib.variants import VARIANTS

    rows = []
    for name, variant in VARIANTS.items():
        if not name.endswith("-mini"):
            params, macs = num_params(variant, 1000), forward_macs(variant, variant.test_px, 1000)
            published = (variant.published_params, variant.published_macs)
            rows.append(
                {
                    "variant": name, "width": variant.width, "depth": variant.depth,
                    "train/test px": f"{variant.train_px}/{variant.test_px}", "parameters (M)": round(params / 1e6, 1),
                    "published (M)": published[0] and published[0] / 1e6, "GMACs at test px": round(macs / 1e9, 2),
                    "published (G)": published[1] and published[1] / 1e9,
                }
            )  # fmt: skip
    return pd.DataFrame(rows).set_index("variant")


def published_agreement(table) -> str:
    """How far `published_table` is from the published figures, in one sentence."""
    known = table.dropna(subset=["published (M)", "published (G)"])
    params = (known["parameters (M)"] / known["published (M)"] - 1).abs().max()
    macs = (known["GMACs at test px"] / known["published (G)"] - 1).abs().max()
    return (
        f"{len(known)} of {len(table)} variants have published counts; the largest relative difference is "
        f"{params:.2%} in parameters and {macs:.2%} in MACs (the published figures are rounded)."
    )


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
