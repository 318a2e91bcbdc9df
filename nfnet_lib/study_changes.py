"""What a study's file may say otherwise where its folder holds records: it may grow, and run elsewhere."""

import json
from pathlib import Path
from typing import Any

from nfnet_lib.cell import project_relative
from nfnet_lib.config import ConfigError, FinetuneConfig, PretrainConfig, StudyConfig
from nfnet_lib.variants import get_variant

_FREE_TO_CHANGE = (
    "workers", "cores_per_run", "memory_per_run_gb", "gpus_per_run", "tpu_slice", "platform", "timeout_minutes", "retries",
    "notebooks", "finetune_cells", "comparison_seeds",
)  # fmt: skip
_OF_FINETUNING = ("finetune", "finetune_variants", "finetune_augmults")


def refuse_other_study(study: StudyConfig, study_dir: Path) -> None:
    """ConfigError, with the key and both values, where study_dir holds a study that differs in what records depend on."""
    path = study_dir / "study.json"
    if not path.exists():
        return
    now = study.model_dump(mode="json")
    try:
        known = {key: value for key, value in dict(json.loads(path.read_text())).items() if key in now}
        before = StudyConfig.model_validate(known).model_dump(mode="json")
    except (ValueError, TypeError) as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigError(f"study: {project_relative(path)} is damaged ({what}); remove it to go on: runs say whose they are")\
            from None
    free = _FREE_TO_CHANGE if any(study_dir.glob("finetune_*")) else _FREE_TO_CHANGE + _OF_FINETUNING
    for key in now:
        pair = [_with_defaults(key, content.get(key)) for content in (before, now)]
        if key not in free and not _only_grew(key, before, now) and (differs := _difference(key, *pair)):
            key, old, new = differs
            raise ConfigError(
                f"{key}: {new!r}, but {project_relative(study_dir)} holds a study with {old!r}; "
                "give the study another name or another --out"
            )


def _with_defaults(key: str, value: Any) -> Any:
    """Parameters of runs with those that a study's file leaves out."""
    of_runs = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    return of_runs[key].model_construct().model_dump(mode="json") | value if key in of_runs and value is not None else value


def _only_grew(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the runs that there were before are asked for now as well, whatever else is: dumps of two studies."""
    if key in ("epoch_budgets", "variant_epoch_budgets"):
        budgets = [lambda name, of=of: set(of["variant_epoch_budgets"].get(name, of["epoch_budgets"])) for of in (before, now)]
        return all(budgets[0](name) <= budgets[1](name) for name in before["variants"])
    if key in ("seeds", "finetune_augmults"):
        default = [before["pretrain"].get("seed", 0)] if key == "seeds" else []
        return bool(now[key]) and set(before[key] or default) <= set(now[key])
    if key == "families":  # of one that had no variants nothing is on record
        return all(before[key].get(name) == now[key].get(name) for name in {get_variant(v).family for v in before["variants"]})
    if key == "variants":  # the first one's ways of fine-tuning are compared
        return before[key][0] == now[key][0] and set(before[key]) <= set(now[key])
    if key == "lr_start":
        return before[key].items() <= now[key].items()
    return key == "finetune_variants" and all(before[key].get(name) == now[key].get(name) for name in before["variants"])


def _difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """(key, old value, new value) of the first thing that differs, a dot leading into mappings; None where nothing does."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*now, *sorted(before.keys() - now.keys())]
        found = (_difference(f"{key}.{name}", before.get(name), now.get(name)) for name in names)
        return next(filter(None, found), None)
    return None if before == now else (key, before, now)
