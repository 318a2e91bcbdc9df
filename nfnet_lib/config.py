"""The parameters of a run: the one place where strings become numbers, and where impossible requests are refused.

Flat names, so that each is a papermill parameter; strict types and ranges; unknown names refused with near ones.
Derived counts (steps, warm-up) are computed and checked here as well.
"""

import ast
import dataclasses
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nfnet_lib import PROJECT
from nfnet_lib.variants import Variant, ViTVariant, get_variant

_THAT_TRAIN = {"02_pretrain", "03_finetune"}  # notebooks that are no analyses of a study
_OF_NOTEBOOKS = {"study_dir", "lr_grid", "comparison_seeds"}  # parameters that notebooks have beside a config's


class ConfigError(ValueError):
    """A parameter that can't be used: one line that names it, its value and what is allowed."""


class RunConfig(BaseModel):
    """What pre-training and fine-tuning have in common. Fractions of an epoch are fractions of `examples_per_epoch`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    variant: str = Field("F0-mini", description="architecture, see variants.VARIANTS")
    bottleneck_rule: Literal["published", "released"] = Field("published", description='first stage of "+" models')
    pool: Literal["", "gap", "map", "tok"] = Field("", description="of a ViT; empty: as published for the variant")
    position: Literal["learned", "sincos2d"] = Field("learned", description="position embedding of a ViT")
    dataset: str = Field("fractals", description="fractals | fractals-lt | digits | tfds:NAME | folder:DIR | webdataset:DIR")
    data_dir: str = Field("", description="folder of prepared TFDS data; empty: TFDS's default")
    train_split: str = Field("", description="what the training split is called, train[:90%] for example; empty: train")
    heldout_split: str = Field("", description="what the held-out split is called; empty: validation, val or test")
    label_feature: str = Field("", description="of TFDS sets with several kinds of label; empty: label, or the first")
    exclude: str = Field("", description="file of ids not to train on, as nfnet dedup writes it; empty: none")
    num_classes: int = Field(64, ge=2, le=100_000, description="classes of fractals; other sources state their own")
    image_size: int = Field(40, ge=8, le=4096, description="side in pixels at which fractals and digits are made")
    examples_per_epoch: int = Field(8192, ge=1, description="distinct training examples that make one epoch")
    heldout_examples: int = Field(2048, ge=1, description="examples of the held-out set")
    selection_examples: int = Field(
        0,
        ge=0,
        description="more of the training split, not trained on, by which the weights kept are chosen; 0: the last",
    )
    data_seed: int = Field(0, ge=0, lt=2**32, description="seed of the fractals' classes and images")
    hue_spread: float = Field(1.0, ge=0, le=1, description="of the fractals of a class; 1: colour says nothing of it")
    epoch_budget: float = Field(1.0, gt=0, le=10_000, description="epochs of compute: views / examples_per_epoch")
    batch_size: int = Field(32, ge=1, description="views a step, over all devices")
    augmult: int = Field(1, ge=1, le=256, description="views of each image in a batch (repeated augmentation)")
    min_area: float = Field(0.25, gt=0, le=1, description="smallest share of the image that a training crop covers")
    flip: bool = Field(True, description="mirror training images at random")
    mixup_alpha: float = Field(
        0.0, ge=0, le=100, description="MixUp of pairs, weights from Beta(alpha, alpha); 0: none"
    )
    cutmix: bool = Field(False, description="CutMix of pairs; with MixUp, each has half of the pairs")
    randaugment_layers: int = Field(0, ge=0, le=16, description="random operations on each view; 0: no RandAugment")
    randaugment_magnitude: float = Field(10.0, ge=0, le=30, description="strength of RandAugment's operations")
    resolution: int = Field(32, ge=8, le=4096, description="training image side in pixels")
    eval_resolution: int = Field(40, ge=8, le=4096, description="evaluation image side in pixels")
    eval_margin: int = Field(-1, ge=-1, description="evaluation resizes by this beyond its crop; -1: 32, or an eighth")
    peak_lr: float = Field(0.1, gt=0, le=1000, description="learning rate after warm-up")
    warmup_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of the steps with linear warm-up, if under 5,000"
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd: Nesterov momentum with AGC; adamw: for ViTs")
    momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov momentum; of adamw, b1")
    adam_b2: float = Field(0.999, ge=0, lt=1, description="of adamw: decay of the second moment")
    grad_clip: float = Field(1.0, gt=0, le=1e6, description="of adamw: largest global norm of a gradient")
    weight_decay: float = Field(1e-6, ge=0, le=1, description="not on gains and biases; sgd: coupled")
    agc_clip: float = Field(0.01, gt=0, le=1e6, description="adaptive gradient clipping, ratio of norms")
    agc_eps: float = Field(1e-3, gt=0, description="smallest parameter norm that clipping assumes")
    loss: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="sigmoid: each class by itself, for several labels"
    )
    head_bias: float = Field(0.0, ge=-100, le=100, description="where the head's bias starts; -10 suits sigmoid")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the training loss; evaluation has none")
    drop_rate: float = Field(0.0, ge=0, lt=1, description="dropout before the head")
    stochdepth_rate: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block")
    rho: float = Field(0.0, ge=0, le=10, description="radius of the SAM ascent step; 0: plain gradient")
    ascent_fraction: float = Field(1.0, gt=0, le=1, description="share of the batch from which SAM's ascent step comes")
    sam_perturbation: Literal["per_device", "global"] = Field(
        "per_device", description="whose gradient SAM climbs on several devices: each its own (m-SAM), or the mean"
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="exponential moving average of the parameters; 0: none")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of the activations")
    sharding: Literal["replicated", "fsdp"] = Field(
        "replicated", description="of parameters and optimizer state; fsdp: split over the devices"
    )
    remat: Literal["none", "convs", "middle", "entry", "full", "by_stage"] = Field(
        "none",
        description="what the backward pass computes again; entry, middle and convs keep convolutions, by_stage suits TPU v4",
    )
    unroll: int = Field(1, ge=1, description="blocks a scan step")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the initialisation, the data order and the noise")
    loader_workers: int = Field(1, ge=0, le=512, description="threads that make batches; 0: none but the training's")
    on_bad: Literal["quarantine", "stop"] = Field("quarantine", description="of examples that can't be read")
    max_bad_fraction: float = Field(0.001, ge=0, le=1, description="stop when more of the examples than this are bad")
    evaluations: int = Field(
        1, ge=1, le=10**6, description="evaluations in a run, the last at its end; between, on selection_examples if any"
    )
    checkpoints: int = Field(4, ge=1, le=10**6, description="checkpoints in a run, the last at its end")
    log_points: int = Field(100, ge=1, le=10**6, description="lines in metrics.jsonl, at most one a step")

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> "RunConfig":
        """The config of a flat mapping (papermill's, YAML's). ConfigError in one line on the first thing wrong."""
        cls.refuse_unknown(params)
        try:
            return cls(**as_numbers(cls, params))
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:  # raised by a validator below: its message is complete
                raise ConfigError(str(first["ctx"]["error"])) from None
            name = str(first["loc"][0])
            raise ConfigError(f"{name}: {params.get(name)!r} is out of range; {first['msg'].lower()}") from None

    @classmethod
    def notebook_params(cls, scope: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of this config among a notebook's variables, `globals()`; also refuses names injected in vain.

        papermill only warns of a parameter that a notebook does not have, and the run goes on with the default. What
        it injected stands in IPython's history, `In`.
        """
        injected = [cell for cell in scope.get("In", ()) if cell.startswith("# Parameters\n")][-1:]
        nodes = [node for cell in injected for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
        cls.refuse_unknown({target.id for node in nodes for target in node.targets} - _OF_NOTEBOOKS)
        return {name: value for name, value in scope.items() if name in cls.model_fields}

    @classmethod
    def refuse_unknown(cls, names: Iterable[str]) -> None:
        unknown = sorted(set(map(str, names)) - set(cls.model_fields))
        if unknown:
            near = difflib.get_close_matches(unknown[0], cls.model_fields, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(cls.model_fields)}"
            raise ConfigError(f"{unknown[0]}: unknown parameter of {cls.__name__}; {hint}")

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        variant = get_variant(self.variant)
        for name in ("resolution", "eval_resolution"):
            if getattr(self, name) % variant.resolution_multiple:
                raise ValueError(
                    f"{name}: {getattr(self, name)} is not a multiple of {variant.resolution_multiple}, which"
                    f" {variant.name} needs; nearest: {_nearest(getattr(self, name), variant.resolution_multiple)}"
                )
        if self.batch_size > self.examples_per_epoch:
            raise ValueError(
                f"batch_size: {self.batch_size} is larger than the data (examples_per_epoch={self.examples_per_epoch});"
                f" allowed: 1 to {self.examples_per_epoch}"
            )
        if self.batch_size % self.augmult:
            raise ValueError(f"augmult: {self.augmult} does not divide batch_size={self.batch_size}")
        if (self.mixup_alpha or self.cutmix) and self.unique_per_step % 2:
            raise ValueError(
                f"batch_size: {self.unique_per_step} examples a step can't be mixed in pairs; allowed: even numbers"
            )
        if self.loss == "sigmoid" and self.label_smoothing:
            raise ValueError(f"label_smoothing: {self.label_smoothing} with loss='sigmoid'; allowed: 0")
        views = self.epoch_budget * self.examples_per_epoch
        steps = views / self.batch_size
        # Of many steps the last may be left out: 50 epochs of ImageNet are 31,278.5 steps of 2,048.
        if round(steps) < 1 or abs(steps - round(steps)) > max(1e-6, 1e-4 * steps):
            below = int(views // self.batch_size) * self.batch_size / self.examples_per_epoch
            above = below + self.batch_size / self.examples_per_epoch
            raise ValueError(
                f"epoch_budget: {self.epoch_budget} x examples_per_epoch={self.examples_per_epoch} is not a whole number"
                f" of batches of batch_size={self.batch_size}; nearest budgets: "
                + " or ".join(f"{b:g}" for b in (below, above) if b > 0)
            )
        return self

    @property
    def architecture(self) -> Variant | ViTVariant:
        """The variant, with a ViT's pool and position as set here."""
        variant = get_variant(self.variant)
        if isinstance(variant, ViTVariant):
            return dataclasses.replace(variant, pool=self.pool or variant.pool, position=self.position)
        return variant

    @property
    def model_settings(self) -> dict[str, Any]:
        """What `models.create` must be told for weights of this run to fit."""
        if isinstance(variant := self.architecture, ViTVariant):
            return {"pool": variant.pool, "position": variant.position, "image_size": self.resolution}
        return {"bottleneck_rule": self.bottleneck_rule}

    @property
    def steps(self) -> int:
        """Parameter updates of the whole run; the same whatever augmult is."""
        return round(self.epoch_budget * self.examples_per_epoch / self.batch_size)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up: the 5,000 of arXiv 2102.06171 A.5, or warmup_fraction of a shorter run."""
        return min(5000, round(self.warmup_fraction * self.steps))

    @property
    def unique_per_step(self) -> int:
        """Examples drawn a step: batch_size / augmult."""
        return self.batch_size // self.augmult

    @property
    def config_hash(self) -> str:
        """16 hex digits of every parameter; equal configs make equal runs."""
        return _digest(self.model_dump(mode="json"))

    @property
    def run_id(self) -> str:
        """Folder name of the run: what a reader looks for first, then the hash."""
        return self._name(f"lr{self.peak_lr:g}", self.config_hash)

    @property
    def cell_id(self) -> str:
        """Name of the cell to which the runs belong that differ in nothing but peak_lr."""
        return self._name("tuned", _digest(self.model_dump(mode="json", exclude={"peak_lr"})))

    def _name(self, lr: str, digest: str) -> str:
        plain = (re.sub(r"[^A-Za-z0-9+._-]", "-", text) for text in (self.variant, self.dataset))
        names = [text[-60:] for text in plain]  # the hash tells apart what is cut
        parts = [self.kind, *names, f"ep{self.epoch_budget:g}"]
        parts += [lr, f"s{self.seed}"] + ([f"ra{self.augmult}"] if self.augmult > 1 else [])
        return "_".join([*parts, digest[:6]])


class PretrainConfig(RunConfig):
    """Pre-training as in the paper, section 2: SGD with momentum, AGC, cosine decay over the run's own length."""

    kind: Literal["pretrain"] = "pretrain"


class FinetuneConfig(RunConfig):
    """Fine-tuning as in the paper, section 3: SAM, stochastic depth, dropout, higher resolution, repeated augmentation."""

    kind: Literal["finetune"] = "finetune"
    pretrained_run: str = Field("", description="run_id of the pre-training run whose body is taken over")
    pretrained_weights: str = Field("", description="or a file of released, timm or big_vision weights")
    head: Literal["new", "keep"] = Field("new", description="keep: of the same classes, its head is taken over, too")
    compared_as: str = Field(
        "", description="the way of fine-tuning that a run stands for in a comparison; empty: in none"
    )

    @model_validator(mode="after")
    def _check_origin(self) -> "FinetuneConfig":
        if not re.fullmatch(r"[A-Za-z0-9+_-][A-Za-z0-9+._-]*|", self.pretrained_run):
            raise ValueError(f"pretrained_run: {self.pretrained_run!r} is not a run's name; allowed: its folder's name alone")
        if bool(self.pretrained_run) == bool(self.pretrained_weights):
            raise ValueError(
                f"pretrained_run: {self.pretrained_run!r} with pretrained_weights={self.pretrained_weights!r}; name one of them"
            )
        return self


def config_from_params(params: Mapping[str, Any]) -> PretrainConfig | FinetuneConfig:
    """PretrainConfig or FinetuneConfig, as `kind` says, or else by whether anything pre-trained is named."""
    pretrained = {"pretrained_run", "pretrained_weights"} & set(params)
    kind = params.get("kind", "finetune" if pretrained else "pretrain")
    if kind not in ("pretrain", "finetune"):
        raise ConfigError(f"kind: {kind!r} is not one of pretrain, finetune")
    return (FinetuneConfig if kind == "finetune" else PretrainConfig).from_params(params)


class FamilyConfig(BaseModel):
    """What one family of variants has of its own in a study: parameters, learning rates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pretrain: dict[str, Any] = Field(default_factory=dict, description="PretrainConfig parameters")
    finetune: dict[str, Any] = Field(default_factory=dict, description="FinetuneConfig parameters")
    lr_grid: list[float] = Field(default_factory=list, description="default: the study's")
    lr_start: dict[float, float] = Field(default_factory=dict, description="default: the study's, with its lr_grid")


class StudyConfig(BaseModel):
    """A study: a grid of pre-training cells, the learning rates tried in each, and fine-tuning of the winners."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="folder under outputs/")
    pretrain: dict[str, Any] = Field(description="PretrainConfig parameters that all cells share")
    variants: list[str] = Field(min_length=1, description="one curve each")
    epoch_budgets: list[float] = Field(min_length=1)
    variant_epoch_budgets: dict[str, list[float]] = Field(
        default_factory=dict, description="instead of epoch_budgets, for single variants"
    )
    lr_grid: list[float] = Field(min_length=1, description="peak learning rates, ascending, factors of 2")
    seeds: list[int] = Field(
        default_factory=list, description="each is a cell of its own, tuned by itself; default: pretrain's seed"
    )
    lr_search: Literal["bracket", "grid", "two_trials"] = Field(
        "bracket",
        description="grid: try all; bracket: walk downhill from lr_start until a minimum is bracketed; two_trials: two rates"
        " proposed from the best ones of smaller cells (rules.propose_lr), the smallest cell bracketed",
    )
    lr_start: dict[float, float] = Field(
        default_factory=dict, description="where the search begins, by epoch budget; default: the grid's middle"
    )
    families: dict[Literal["NFNet", "ViT"], FamilyConfig] = Field(
        default_factory=dict, description="what differs between the families of the variants"
    )
    finetune: dict[str, Any] | None = Field(
        None, description="FinetuneConfig parameters, a recipe file's path, or none"
    )
    finetune_variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="what differs for single variants"
    )
    finetune_augmults: list[int] = Field(default_factory=lambda: [1], description="fine-tuning runs of each winner")
    finetune_cells: Literal["winners", "all"] = Field(
        "winners",
        description="winners: the best pre-training run of each variant is fine-tuned; all: that of every cell",
    )
    comparison_seeds: int = Field(
        0, ge=0, le=100, description="seeds of a comparison of ways of fine-tuning the first variant; 0: none"
    )
    notebooks: list[str] = Field(default_factory=list, description="analysis notebooks, executed at the end")
    workers: int = Field(0, ge=0, le=100_000, description="runs at a time; 0: as many as there are cores for")
    cores_per_run: int = Field(1, ge=0, le=100_000, description="processor cores that a run gets to itself; 0: all, shared")
    memory_per_run_gb: float = Field(2.0, ge=0.001, le=1e6)
    gpus_per_run: float = Field(
        0, ge=0, description="that Ray sets apart for a run; below 1, with any engine, its share of the GPU's memory"
    )
    tpu_slice: str = Field("", pattern=r"^(v\w+:\d+(x\d+)+)?$", description="that Ray sets apart for a cell, v4:2x2x4 for"
                           " example; empty: runs use the machine's own devices")  # fmt: skip
    platform: Literal["cpu", "cuda", "tpu"] = Field("cpu", description="what JAX must run on, or the run fails")
    timeout_minutes: float = Field(120, gt=0, le=1e7, description="of one cell")
    retries: int = Field(3, ge=0, le=100, description="of a cell whose process, kernel or machine was lost; it resumes")

    @classmethod
    def from_file(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "StudyConfig":
        """The study of a YAML file; ConfigError in one line otherwise. Every cell is validated here.

        overrides: {key: value} over what the file says; a dot leads into a mapping ("pretrain.num_classes").
        """
        from nfnet_lib.strict_yaml import read_mapping

        path = Path(path)
        if not path.is_file():
            near = difflib.get_close_matches(str(path), [str(p) for p in Path("params").glob("*/*.yaml")], n=3)
            raise ConfigError(f"study file: {path} does not exist" + (f"; near: {', '.join(near)}" if near else ""))
        content = read_mapping(path, "study file")
        if set(content) != {"study"} or not isinstance(content["study"], dict):
            raise ConfigError(f"study file: {path} must hold one mapping called study")
        for key, value in (overrides or {}).items():
            _override(content["study"], key, value)
        unknown = sorted(set(map(str, content["study"])) - set(cls.model_fields))
        if unknown:
            near = difflib.get_close_matches(unknown[0], cls.model_fields, n=2, cutoff=0.5) or list(cls.model_fields)
            raise ConfigError(f"{unknown[0]}: unknown key of a study; did you mean {' or '.join(near)}?")
        if isinstance(recipe := content["study"].get("finetune"), str):
            from nfnet_lib.recipe import load_recipe

            loaded = load_recipe(path.parent / recipe)
            own = content["study"].get("finetune_variants") or {}
            if not isinstance(own, dict) or not all(isinstance(values, dict) for values in own.values()):
                raise ConfigError(f"finetune_variants: {own!r} is not a mapping of variants to parameters")
            merged = {name: {**loaded.variants.get(name, {}), **own.get(name, {})} for name in {**loaded.variants, **own}}
            content["study"] |= {"finetune": loaded.finetune, "finetune_variants": merged}
        try:
            study = cls(**content["study"])
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{where or 'study'}: {first.get('input')!r} is out of range; {first['msg']}") from None
        study.validate_cells()
        return study

    def validate_cells(self) -> None:
        """ConfigError on the first run that can't be: before anything is written."""
        for name in ("variants", "epoch_budgets", "seeds", "finetune_augmults"):
            if len(set(values := getattr(self, name))) != len(values):
                raise ConfigError(f"{name}: {values} has repeats")
        known = sorted({path.stem for path in (PROJECT / "notebooks").glob("*.ipynb")} - _THAT_TRAIN)
        for name in self.notebooks:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=2, cutoff=0.4) or known
                hint = f"did you mean {' or '.join(near)}?"
                raise ConfigError(f"notebooks: {name!r} is not one of the analyses in notebooks/; {hint}")
        for variant, budgets in self.variant_epoch_budgets.items():
            if variant not in self.variants or not budgets or len(set(budgets)) != len(budgets):
                raise ConfigError(
                    f"variant_epoch_budgets: {variant}: {budgets}; allowed: budgets without repeats, for some of"
                    f" {', '.join(self.variants)}"
                )
        if self.comparison_seeds and (self.finetune is None or 1 not in self.finetune_augmults or self.tpu_slice):
            raise ConfigError(
                f"comparison_seeds: {self.comparison_seeds}; allowed: 0, or else with finetune, 1 among finetune_augmults,"
                " and no tpu_slice"
            )
        for variant in self.finetune_variants:
            try:
                get_variant(variant)
            except ValueError as error:
                raise ConfigError(f"finetune_variants: {error}") from None
        known_budgets = {budget for variant in self.variants for budget in self.budgets_of(variant)}
        for variant in self.variants:
            lr_grid, lr_start = self.learning_rates(variant)
            if sorted(set(lr_grid)) != lr_grid:
                raise ConfigError(f"lr_grid: {lr_grid} must ascend without repeats")
            if self.lr_search == "two_trials" and len(lr_grid) < 2:
                raise ConfigError(f"lr_grid: {lr_grid} with lr_search='two_trials'; allowed: at least 2 rates")
            for budget, lr in lr_start.items():
                if budget not in known_budgets or lr not in lr_grid:
                    raise ConfigError(f"lr_start: {budget:g}: {lr} is not one of epoch_budgets with a value of lr_grid")
            for budget in self.budgets_of(variant):
                for lr, seed in itertools.product(lr_grid, self.seeds or [None]):
                    self.pretrain_config(variant, budget, lr, seed)
            if self.finetune is not None:
                for augmult in self.finetune_augmults:
                    self.finetune_config(variant, "to-be-found", augmult)
                trained = self.pretrain_config(variant, self.budgets_of(variant)[0], lr_grid[0])
                tuned = self.finetune_config(variant, "to-be-found", 1)
                for name, wanted in trained.model_settings.items():
                    if name != "image_size" and (own := tuned.model_settings[name]) != wanted:
                        raise ConfigError(
                            f"finetune: {name}: {own!r} for {variant}, pre-trained with {wanted!r}; allowed: the same"
                        )

    def budgets_of(self, variant: str) -> list[float]:
        """The epoch budgets of a variant: its own, or the study's."""
        return self.variant_epoch_budgets.get(variant, self.epoch_budgets)

    def learning_rates(self, variant: str) -> tuple[list[float], dict[float, float]]:
        """(lr_grid, lr_start) of a variant: its family's, or the study's."""
        own = self._family(variant)
        if own.lr_grid:
            return own.lr_grid, own.lr_start
        return self.lr_grid, own.lr_start or self.lr_start

    def _family(self, variant: str) -> FamilyConfig:
        try:
            return self.families.get(get_variant(variant).family, FamilyConfig())
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def pretrain_config(
        self, variant: str, epoch_budget: float | int, peak_lr: float | int, seed: int | None = None
    ) -> PretrainConfig:
        """The config of one run of one cell; seed: one of `seeds`, or None for that of `pretrain`."""
        cell = {"variant": variant, "epoch_budget": epoch_budget, "peak_lr": peak_lr} | (
            {} if seed is None else {"seed": seed}
        )
        return PretrainConfig.from_params({**self.pretrain, **self._family(variant).pretrain, **cell})

    def finetune_config(self, variant: str, pretrained_run: str, augmult: int) -> FinetuneConfig:
        """The config of one fine-tuning run of a winner."""
        cell = {"variant": variant, "pretrained_run": pretrained_run, "augmult": augmult}
        own = self._family(variant).finetune | self.finetune_variants.get(variant, {})
        return FinetuneConfig.from_params({**(self.finetune or {}), **own, **cell})


def _override(content: dict[str, Any], key: str, value: Any) -> None:
    """Set content["a"]["b"] for the key "a.b"; what lies between is made where it is missing."""
    *above, last = key.split(".")
    for name in above:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{key}: {name} is {content!r}, not a mapping; allowed: {name}={content!r} as a whole")
    content[last] = value


def as_numbers(cls: type[BaseModel], params: Mapping[str, Any]) -> dict[str, Any]:
    """YAML 1.1 reads 1e-3 and 4e9 as text: text that is a number becomes one where the field wants a number."""
    out = dict(params)
    for name, value in params.items():
        wanted = cls.model_fields[name].annotation
        if wanted in (int, float) and isinstance(value, bool):
            raise ConfigError(f"{name}: {value!r} is a truth value, not a number")
        if wanted is int and isinstance(value, str):
            try:
                out[name] = float(value)
            except ValueError:
                raise ConfigError(f"{name}: {value!r} is not a whole number") from None
    return out


def _digest(parameters: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]


def _nearest(value: int, multiple: int) -> str:
    below = value // multiple * multiple
    return " or ".join(str(n) for n in (below, below + multiple) if n > 0)
