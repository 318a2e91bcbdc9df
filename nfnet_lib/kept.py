"""What the backward pass keeps of each block: its names, its bytes, and what suits TPUs. No jax here: plans need none."""

from nfnet_lib.variants import STAGE_STRIDES, STEM_STRIDE, Variant, ViTVariant

KEPT = {  # of a block's outputs but for the last, by `remat`
    "convs": ("entry", "middle", "last", "pooled"),
    "middle": ("entry", "middle", "pooled"),
    "entry": ("entry",),
    "full": (),
}
ENCODER_KEPT = ("query", "key", "value", "attended", "joined", "hidden")  # of a ViT's block, by "convs" and "by_stage"
REMAT = ("none", *KEPT, "by_stage")
_SCANNED = ("middle", "entry", "entry", "entry")  # of each stage what costs fewest cycles on TPU v4 in a scan (LOG.md)
_MOST_UNROLLED = 6  # blocks of a stage: each takes seconds to compile
_MOST_KEPT = 8 * 2**30  # bytes of all stages that are kept whole


def kept_bytes(
    variant: Variant, stage: int, images: int, height: int, width: int, remat: str, bottleneck_rule: str = "published"
) -> float:  # fmt: skip
    """Bytes of bfloat16 that the backward pass needs of a stage (0 to 3) with outputs of this size in pixels: an estimate.

    Of each block its input and the maps of KEPT, or ("none") of each activation its value and slope, and the last convolution's
    output.
    """
    outputs, narrow = variant.width[stage], variant.bottleneck(stage, bottleneck_rule)
    maps = [name for name in KEPT.get(remat, ()) if name != "pooled"]
    channels = 3 * outputs + 6 * narrow if remat == "none" else outputs + len(maps) * narrow
    return 2.0 * images * variant.depth[stage] * height * width * channels


def encoder_bytes(variant: ViTVariant, images: int, tokens: int, remat: str) -> float:
    """Bytes of bfloat16 that the backward pass needs of a ViT's blocks: an estimate.

    Of each block its input and ENCODER_KEPT, or ("none") all that autodiff keeps, norms and softmax in float32.
    """
    widths = 1.0
    if remat in ("convs", "by_stage"):
        widths = 6 + variant.mlp / variant.width
    elif remat == "none":
        widths = 18 + 5 * variant.mlp / variant.width + 3 * variant.heads * tokens / variant.width
    return 2.0 * images * variant.depth * tokens * variant.width * widths


def by_stage(
    variant: Variant, images: int, height: int, width: int, bottleneck_rule: str = "published"
) -> tuple[str, ...]:  # fmt: skip
    """`remat` of each stage with the fewest cycles on TPU v4, for a device's share of images of this size in pixels.

    Without a scan's stacks keeping everything is cheapest ("none"): short stages are unrolled as long as that fits (LOG.md).
    """
    chosen, room = [], _MOST_KEPT
    height, width = -(-height // STEM_STRIDE), -(-width // STEM_STRIDE)
    for stage, stride in enumerate(STAGE_STRIDES):
        height, width = -(-height // stride), -(-width // stride)
        whole = kept_bytes(variant, stage, images, height, width, "none", bottleneck_rule)
        fits = variant.depth[stage] <= _MOST_UNROLLED and whole <= room
        chosen.append("none" if fits else _SCANNED[stage])
        room -= whole if fits else 0
    return tuple(chosen)
