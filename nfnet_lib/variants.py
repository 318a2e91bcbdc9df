"""Every architecture as data: widths, depths, resolutions and the published counts that ours are checked against.

NFNets: Brock et al. 2021 (arXiv 2102.06171) Tables 1, 5 and 6; the released code google-deepmind/deepmind-research,
`nfnets/base.py` and its README. Published "FLOPs" of NFNets are multiply-adds (MACs) at the *test* resolution.
ViTs: google-research/big_vision `models/vit.py` (shapes), Zhai et al. 2021 (arXiv 2106.04560) Table 2 and Alabdulmohsin
et al. 2023 (arXiv 2305.13035) Table 1 (counts). Published "GFLOPs" of ViTs are *twice* the MACs.

The `-mini` families are this project's own laptop-scale copies. NFNets: one eighth of the width, group width 16, the same
depth pattern, block, stem and rules, so that every mechanism of the full family is exercised on a CPU. `-micro`, `-nano` and
`-pico` are a half, a quarter and an eighth as wide as `-mini`, stem and all, in groups of at least 4 channels: the widths among
which the compute of a laptop chooses (LOG.md). ViTs: 4x4 patches, shapes chosen so that Ti, S, B and L cost the MACs of F0-,
F1-, F3- and F7-mini at 32 px (within 3%).
"""

import dataclasses
import difflib

ALPHA = 0.2
"""Weight of each residual branch, h + alpha * f(h / beta) (arXiv 2102.06171 section 3)."""
STAGE_STRIDES = (1, 2, 2, 2)
STEM_CHANNELS = (16, 32, 64)
STEM_STRIDE = 4
TOTAL_STRIDE = 32
NARROWER = {"-micro": 2, "-nano": 4, "-pico": 8}
"""What the widths of a `-mini` are divided by."""
SMALL = ("-pico", "-nano", "-micro", "-mini")
"""How the names of this project's own variants end, narrow to wide."""
BOTTLENECK_RULES = ("published", "released")
POOLS = ("gap", "map", "tok")
POSITIONS = ("learned", "sincos2d")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One NFNet.

    width, depth: output channels and number of blocks of the four stages. group_width: channels per group of the
    3x3 convolutions. stem: output channels of the stem's first three. *_px: image sides in pixels. drop_rate: published
    dropout before the head. published_*: the counts of the 2021 paper with a 1,000-class head (parameters; MACs at test_px),
    or None where none is published. squash: whether evaluation ignores a picture's shape (`augment.eval_views`).
    """

    name: str
    width: tuple[int, int, int, int]
    depth: tuple[int, int, int, int]
    group_width: int
    train_px: int
    test_px: int
    drop_rate: float
    published_params: float | None = None
    published_macs: float | None = None
    finetune_px: int = 384
    finetune_test_px: int = 480
    stem: tuple[int, int, int] = STEM_CHANNELS
    family = "NFNet"
    squash = True

    @property
    def blocks(self) -> int:
        """Number of residual blocks."""
        return sum(self.depth)

    @property
    def resolution_multiple(self) -> int:
        """Image sides must be multiples of this: the total stride, or 8 for small ones, whose last maps round up."""
        return 8 if self.name.endswith(SMALL) else TOTAL_STRIDE

    def bottleneck(self, stage: int, rule: str = "published") -> int:
        """Channels of the 3x3 convolutions of a stage (0 to 3): half its width.

        Where that is not a whole number of groups (stage 0 of the "+" models) the sources disagree, so it is a setting:
        "published" keeps half the width in one group (192), which gives the published size of F4+ exactly (527M
        parameters, 367 GMACs at 512 px, arXiv 2102.06171 Table 5); "released" rounds down to whole groups (128), as
        `nfnets/nfnet.py` NFBlock does. All other stages of all variants are the same under both.
        """
        if rule not in BOTTLENECK_RULES:
            raise ValueError(f"bottleneck_rule: {rule!r} is not one of {', '.join(BOTTLENECK_RULES)}")
        half = self.width[stage] // 2
        return half if rule == "published" else self.groups(stage) * self.group_width

    def groups(self, stage: int) -> int:
        """Number of groups of the 3x3 convolutions of a stage."""
        return max(1, self.width[stage] // 2 // self.group_width)


@dataclasses.dataclass(frozen=True)
class ViTVariant:
    """One Vision Transformer.

    width: channels of a token. depth: encoder blocks. mlp: hidden channels of the MLPs. heads: attention heads. patch:
    side of a patch in pixels. pool: "gap" (mean of the tokens), "map" (attention pooling) or "tok" (class token); the
    published count includes what stands here. position: "learned" or "sincos2d". published_params: without the head.
    published_macs: of one image at test_px, half the published GFLOPs.
    """

    name: str
    width: int
    depth: int
    mlp: int
    heads: int
    patch: int
    pool: str
    train_px: int
    test_px: int
    finetune_px: int
    published_params: float | None = None
    published_macs: float | None = None
    position: str = "learned"
    family = "ViT"
    squash = False
    drop_rate = 0.0

    @property
    def blocks(self) -> int:
        """Number of encoder blocks."""
        return self.depth

    @property
    def finetune_test_px(self) -> int:
        """ViTs are tested at the resolution at which they are fine-tuned."""
        return self.finetune_px

    @property
    def resolution_multiple(self) -> int:
        """Image sides must be multiples of the patch."""
        return self.patch


class LoadedVariant(str):
    """The name of a variant that remembers what loaded weights need beside it; `models.create` takes it as it is.

    num_classes, settings: the number of classes and the `models.create` settings (bottleneck_rule, pool, ...) of the weights.
    pixels: what they expect of images: "imagenet" (zero mean, unit variance by ImageNet's channels) or "unit" ([-1, 1]).
    """

    def __new__(cls, name: str, *, num_classes: int, pixels: str = "imagenet", **settings):
        self = super().__new__(cls, name)
        self.num_classes, self.pixels, self.settings = num_classes, pixels, settings
        return self


# name: (train px, test px, dropout, published params, published MACs at test px); `nfnets/base.py`, README.
_FULL = {
    "F0": (192, 256, 0.2, 71.5e6, 12.38e9),
    "F1": (224, 320, 0.3, 132.6e6, 35.54e9),
    "F2": (256, 352, 0.4, 193.8e6, 62.59e9),
    "F3": (320, 416, 0.4, 254.9e6, 114.76e9),
    "F4": (384, 512, 0.5, 316.1e6, 215.24e9),
    "F5": (416, 544, 0.5, 377.2e6, 289.76e9),
    "F6": (448, 576, 0.5, 438.4e6, 377.28e9),
    "F7": (480, 608, 0.5, None, None),
}


def _build() -> dict[str, Variant]:
    variants = {}
    for plus in ("", "+"):
        for index, (name, (train_px, test_px, drop_rate, params, macs)) in enumerate(_FULL.items(), start=1):
            if plus:  # only F4+ has published counts (arXiv 2102.06171 Table 5: 527M, 367B at 512 px)
                params, macs = (527e6, 367e9) if name == "F4" else (None, None)
            depth = tuple(index * d for d in (1, 2, 6, 3))
            full = Variant(
                name + plus, (384, 768, 2048, 2048) if plus else (256, 512, 1536, 1536), depth, 128,
                train_px, test_px, drop_rate, params, macs,
            )  # fmt: skip
            mini = Variant(
                f"{name}{plus}-mini", (48, 96, 256, 256) if plus else (32, 64, 192, 192), depth, 16,
                32, 40, drop_rate, finetune_px=48, finetune_test_px=56,
            )  # fmt: skip
            variants |= {full.name: full, mini.name: mini}
    for mini in [variant for name, variant in variants.items() if name.endswith("-mini")]:
        for suffix, divisor in NARROWER.items():
            width, stem = (tuple(channels // divisor for channels in each) for each in (mini.width, mini.stem))
            name, group_width = mini.name.replace("-mini", suffix), max(4, mini.group_width // divisor)
            variants[name] = dataclasses.replace(mini, name=name, width=width, stem=stem, group_width=group_width)
    return variants


# name: (width, depth, mlp, heads, patch, pool, fine-tuning px, published parameters, published GFLOPs there)
_VIT = {
    "Ti/16": (192, 12, 768, 3, 16, "gap", 384, 5.5e6, 9.5),
    "S/16": (384, 12, 1536, 6, 16, "gap", 384, 22e6, 31.2),
    "B/16": (768, 12, 3072, 12, 16, "gap", 384, 86e6, 111.3),
    "L/16": (1024, 24, 4096, 16, 16, "gap", 384, 303e6, 382.8),
    "So400m/14": (1152, 27, 4304, 16, 14, "map", 518, 428e6, 1374),
    "g/14": (1408, 40, 6144, 16, 14, "gap", 518, 1011e6, 3208),
    "G/14": (1664, 48, 8192, 16, 14, "gap", 518, 1843e6, 5668),
}
_VIT_MINI = {
    "Ti/4-mini": (60, 3, 240, 4),
    "S/4-mini": (60, 4, 224, 4),
    "B/4-mini": (72, 4, 288, 4),
    "L/4-mini": (76, 6, 304, 4),
}


def _build_vits() -> dict[str, ViTVariant]:
    full = [
        ViTVariant(name, *shape, 224, px, px, published_params=params, published_macs=gflop * 1e9 / 2)
        for name, (*shape, px, params, gflop) in _VIT.items()
    ]
    minis = [
        ViTVariant(name, *shape, patch=4, pool="gap", train_px=32, test_px=40, finetune_px=48)
        for name, shape in _VIT_MINI.items()
    ]
    return {variant.name: variant for variant in (*full, *minis)}


VARIANTS: dict[str, Variant | ViTVariant] = _build() | _build_vits()
"""All by name: F0 to F7, F0+ to F7+, each also as -mini, -micro, -nano, -pico; Ti/16 to G/14, Ti/4-mini to L/4-mini."""


def get_variant(name: str) -> Variant | ViTVariant:
    """The variant called `name`; ValueError with near names otherwise."""
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        known = ", ".join(name for name in VARIANTS if not name.endswith(tuple(NARROWER)))
        raise ValueError(f"variant: unknown {name!r}; {hint}known: {known}, and narrower than -mini {', '.join(NARROWER)}")
    return VARIANTS[name]
