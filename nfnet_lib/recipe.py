"""Fine-tuning recipes: files of FinetuneConfig parameters, with what differs for single variants, that build on each other.

base: ../paper/finetune.yaml     # optional: the recipe that this one changes
finetune: {batch_size: 32}       # parameters
variants: {F7+: {sharding: fsdp}}   # and those of single variants, which win
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nfnet_lib.config import ConfigError, FinetuneConfig
from nfnet_lib.variants import get_variant

_KEYS = ("base", "finetune", "variants")
_DEEPEST = 8  # recipes that build on each other


@dataclass(frozen=True)
class Recipe:
    """finetune: parameters of all variants; variants: {variant: parameters that differ}."""

    finetune: dict[str, Any]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def params(self, variant: str) -> dict[str, Any]:
        """FinetuneConfig parameters of a variant. ConfigError for one that does not exist."""
        try:
            name = str(get_variant(variant).name)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return {**self.finetune, "variant": name, **self.variants.get(name, {})}


def load_recipe(path: str | Path, _depth: int = 0) -> Recipe:
    """The recipe of a YAML file. ConfigError in one line if it is none, or names an unknown parameter or variant."""
    from nfnet_lib.strict_yaml import read_mapping

    path = Path(path)
    content = read_mapping(path, "recipe")
    if set(content) - set(_KEYS) or not isinstance(content.get("finetune"), dict):
        raise ConfigError(
            f"recipe: {path} must hold finetune, and may hold base and variants; allowed: {', '.join(_KEYS)}"
        )
    base = Recipe({})
    if content.get("base"):
        if _depth == _DEEPEST:
            raise ConfigError(f"base: recipes build on each other more than {_DEEPEST} deep, at {path}")
        base = load_recipe(path.parent / str(content["base"]), _depth + 1)
    variants = dict(base.variants)
    if not isinstance(content.get("variants") or {}, dict):
        raise ConfigError(f"variants: {content['variants']!r} is not a mapping of variants to parameters")
    for name, own in ((str(key), value) for key, value in (content.get("variants") or {}).items()):
        try:
            get_variant(name)
        except ValueError as error:
            raise ConfigError(f"variants: {error}") from None
        if not isinstance(own, dict):
            raise ConfigError(f"variants: {name}: {own!r} is not a mapping of parameters")
        variants[name] = {**variants.get(name, {}), **own}
    for parameters in (content["finetune"], *variants.values()):
        FinetuneConfig.refuse_unknown(parameters)
    return Recipe({**base.finetune, **content["finetune"]}, variants)
