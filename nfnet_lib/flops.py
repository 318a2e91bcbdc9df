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
