"""The `nfnet` command. Exit codes: 0 success, 1 something failed, 2 bad input (nothing was written), 130 interrupted."""

import argparse
import math
import os
import sys
from pathlib import Path

from nfnet_lib import PROJECT, study_commands
from nfnet_lib.config import ConfigError
from nfnet_lib.files import no_room
from nfnet_lib.records import RecordError


def _data_show(arguments: argparse.Namespace) -> int:
    import cv2

    from nfnet_lib.data_plots import class_name, labels_of, picture
    from nfnet_lib.dedup import open_set
    from nfnet_lib.explore import tiles
    from nfnet_lib.sources import FRACTALS

    if arguments.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"out: {arguments.out} must end in .png or .jpg")
    if not arguments.out.parent.is_dir():
        raise ConfigError(f"out: {arguments.out.parent} is not a folder")
    fractals = arguments.name.partition("@")[0] in FRACTALS  # which have no end
    source = open_set(arguments.name, "train", arguments.data_dir, 64 if fractals else None)
    shown = range(min(64, len(source)))
    captions = [", ".join(class_name(source, label) for label in labels) for labels in labels_of(source, len(shown))]
    if not cv2.imwrite(str(arguments.out), tiles([picture(source, i) for i in shown], captions)[..., ::-1]):
        raise OSError(f"out: {arguments.out} can't be written")
    size = "endless" if fractals else f"{len(source)} examples"
    print(f"{source.name}: {size}, {source.num_classes} classes; the first {len(shown)}: {arguments.out}")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from nfnet_lib.predict import predict

    table = predict(
        arguments.image, arguments.weights, arguments.labels, resolution=arguments.resolution, top=arguments.top
    )
    if not arguments.labels:
        table = table.drop(columns="label")
    print(table.to_string(index=False, float_format="{:.4f}".format))
    return 0


def _finetune(arguments: argparse.Namespace) -> int:
    from nfnet_lib.finetune import finetune_config
    from nfnet_lib.records import sentence
    from nfnet_lib.train import run

    others = study_commands.overrides(arguments.parameter)
    options = {"weights": "--weights", "dataset": "--data", "recipe": "--recipe", "epochs": "--epochs",
               "epoch_budget": "--epochs", "batch_size": "--batch-size"}  # fmt: skip
    if taken := sorted(options.keys() & others.keys()):
        raise ConfigError(f"-p: {taken[0]} has an option of its own, {options[taken[0]]}")
    config = finetune_config(
        arguments.weights, arguments.data, recipe=arguments.recipe, epochs=arguments.epochs,
        batch_size=arguments.batch_size, **others,
    )  # fmt: skip
    out = arguments.out or PROJECT / "outputs" / "by_hand" / config.run_id
    print(sentence(run(config, out)))
    print(f"the run is in {out}; nfnet predict photo.jpg --weights {out}")
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from nfnet_lib.config import PretrainConfig
    from nfnet_lib.profiling import profile_step

    overrides = {"variant": arguments.variant} | study_commands.overrides(arguments.parameter)
    config = PretrainConfig.from_params(overrides)
    profile = profile_step(config, steps=arguments.steps, trace_dir=arguments.trace)
    print(profile.sentence())
    print("\nshare of the time, in percent")
    print(profile.by_part().to_string(float_format="{:.1f}".format))
    print("\nslowest operations")
    print(profile.slowest().to_string(index=False, float_format="{:.2f}".format))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    import pandas as pd

    from nfnet_lib.evaluate import evaluate_weights, sentence
    from nfnet_lib.records import results_csv

    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise ConfigError(f"out: {arguments.out.parent} is not a folder")
    tables = [
        evaluate_weights(
            arguments.weights, name, arguments.resolutions, classes=arguments.classes, labels=arguments.labels,
            num_examples=arguments.examples, data_dir=arguments.data_dir, workers=arguments.workers,
        )
        for name in arguments.data or [""]
    ]  # fmt: skip
    table = pd.concat(tables, ignore_index=True)
    print(table.to_string(index=False, float_format="{:.4f}".format))
    print(sentence(table))
    if arguments.out is not None:
        results_csv(table, arguments.out)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from nfnet_lib.calibration import calibrated, recorded
    from nfnet_lib.tpus import cost
    from nfnet_lib.variants import get_variant

    what = {
        "num_classes": arguments.classes, "resolution": arguments.resolution, "remat": arguments.remat,
        "sharding": arguments.sharding, "rho": arguments.rho,
    }  # fmt: skip
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise ConfigError(f"price: {arguments.price:g} dollars; allowed: 0 or more")
    planned = cost(
        arguments.variant, arguments.topology, epochs=arguments.epochs, examples=arguments.examples,
        global_batch=arguments.batch, bottleneck_rule=arguments.bottleneck_rule, **what,
    )  # fmt: skip
    print("\n".join(planned.lines()))
    step = None
    if arguments.compile:
        from nfnet_lib.plan import cached_estimate

        if get_variant(arguments.variant).family == "NFNet":
            what["bottleneck_rule"] = arguments.bottleneck_rule
        found = cached_estimate(
            arguments.variant, arguments.cache_dir, topology=arguments.topology, global_batch=arguments.batch, **what
        )
        step = found.cycles / planned.chip.clock
        print(found.line(planned.chip.clock, planned.chip.memory / planned.chip.devices))
    elif arguments.rho > 0:
        print("the compiler's recorded estimates are of plain steps: --compile asks it about SAM's")
    elif kept := recorded(
        arguments.variant, arguments.topology, arguments.batch, arguments.resolution, arguments.bottleneck_rule,
        arguments.remat,
    ):  # fmt: skip
        step = kept[0]
        print(f"the compiler's recorded estimate: {step * 1e3:.1f} ms a step, from {kept[1]}; --compile asks it again")
    else:
        print(
            "no compiled figure of this variant, generation, resolution and remat is on record: --compile asks the compiler"
        )
    if step is None:
        print(planned.bill(None, arguments.price))
        return 0
    print(planned.bill(step, arguments.price))
    likely, low, high = calibrated(step, arguments.topology.split(":")[0])
    print(
        f"calibrated on published times: {likely * 1e3:.1f} ms a step ({low * 1e3:.1f} to {high * 1e3:.1f}),"
        f" {planned.core_hours(likely):,.1f} core-hours ({planned.core_hours(low):,.1f} to {planned.core_hours(high):,.1f}),"
        f" ${planned.dollars(likely, arguments.price):,.0f}"
    )
    return 0


def _cost(arguments: argparse.Namespace) -> int:
    from nfnet_lib.study_cost import cost_lines, write_header

    for path in arguments.files:
        lines = cost_lines(path)
        changed = arguments.write and write_header(path)
        print(f"{path}{': header written' if changed else ''}")
        print("\n".join(f"  {line}" for line in lines))
    return 0


def _params(arguments: argparse.Namespace) -> int:
    import yaml

    from nfnet_lib.config import FinetuneConfig
    from nfnet_lib.recipe import load_recipe

    params = load_recipe(arguments.recipe).params(arguments.variant)
    FinetuneConfig.from_params({"pretrained_run": "to-be-named"} | params)
    print(yaml.safe_dump(params, sort_keys=False), end="")
    return 0


def _dedup(arguments: argparse.Namespace) -> int:
    from nfnet_lib.dedup import dedup

    sets = [*arguments.sets]
    train = arguments.train or (sets.pop(0) if sets else None)
    if train is None:
        raise ConfigError("train: name the training set: nfnet dedup TRAIN AGAINST, or --train TRAIN --against SET")
    print(
        dedup(
            train, [*sets, *arguments.against], arguments.out, radius=arguments.radius,
            min_correlation=arguments.min_correlation, weights=arguments.weights, min_cosine=arguments.min_cosine,
            workers=arguments.workers, data_dir=arguments.data_dir, train_examples=arguments.train_examples,
            against_examples=arguments.against_examples,
        )
    )  # fmt: skip
    use = "of files by path; for a run's `exclude` compare folder:DIR" if Path(train).is_dir() else "for a run's `exclude`"
    print(f"pairs.csv, exclude.json ({use}) and borderline.png are in {arguments.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nfnet", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function, description: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=description, description=description, epilog=f"example: {example}")
        sub.set_defaults(function=function)
        return sub

    study_commands.add(command)
    sub = command("predict", _predict, "Name what a picture shows.",
                  "nfnet predict photo.jpg --weights F0_haiku.npz --labels imagenet_classes.txt")  # fmt: skip
    sub.add_argument("image", type=Path, help="picture (JPEG, PNG, ...)")
    sub.add_argument("--weights", type=Path, required=True,
                     help="released Haiku file, timm file, big_vision .npz, or the folder of a finished run")  # fmt: skip
    sub.add_argument("--labels", type=Path, help="class names: one a line, or JSON")
    sub.add_argument("--resolution", type=int, help="in pixels; default: that at which the variant is tested")
    sub.add_argument("--top", type=int, help="classes to print (default: 5, or all of fewer)")
    sub = command("finetune", _finetune, "Fine-tune weights from a file on a data set, by the published recipe.",
                  "nfnet finetune --weights F0_haiku.npz --data folder:pets --epochs 5 -p resolution=128")  # fmt: skip
    sub.add_argument("--weights", type=Path, required=True, help="released Haiku file, timm file, or big_vision .npz")
    sub.add_argument(
        "--data", default="", help="digits | tfds:NAME | folder:DIR | webdataset:DIR; default: the recipe's"
    )
    sub.add_argument("--recipe", type=Path, help="recipe file, params/paper/finetune.yaml for example; default: its rates, fit"
                                                 " to the data")  # fmt: skip
    sub.add_argument("--epochs", type=float, help="epochs of compute (default: the recipe's, or 10)")
    sub.add_argument("--batch-size", type=int, help="views a step (default: the recipe's, or 32)")
    sub.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="any other parameter")
    sub.add_argument("--out", type=Path, help="run folder; default: outputs/by_hand/<run id>")
    sub = command("profile", _profile, "Where the time of a training step goes on this machine, by part of the network.",
                  "nfnet profile F0-mini -p batch_size=16 -p resolution=32")  # fmt: skip
    sub.add_argument("variant", help="architecture, F0-mini for example")
    sub.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="of pre-training")
    sub.add_argument("--steps", type=int, default=5, help="to trace (default: 5)")
    sub.add_argument("--trace", type=Path, help="folder in which to keep the trace, for TensorBoard or Perfetto")
    sub = command("evaluate", _evaluate, "Top-1, top-5, loss and calibration of weights on labelled sets.",
                  "nfnet evaluate F0_haiku.npz --data tfds:imagenet_v2@test tfds:imagenet_a --resolutions 256 320")  # fmt: skip
    sub.add_argument("weights", type=Path, help="as for nfnet predict")
    sub.add_argument(
        "--data", nargs="+", metavar="NAME[@SPLIT]", help="data sets; default: what a run was evaluated on"
    )
    sub.add_argument(
        "--resolutions", nargs="+", type=int, default=[], help="in pixels; default: that of the weights' test"
    )
    sub.add_argument("--classes", default="auto", choices=["auto", "all", "present"],
                     help="which of the weights' compete; auto: present for ImageNet-A, -R and sets of fewer")  # fmt: skip
    sub.add_argument("--labels", type=Path, help="names of the weights' classes, to match the set's by")
    sub.add_argument("--examples", type=int, help="only the first of each set")
    sub.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that read pictures (default: cores)")
    sub.add_argument("--data-dir", help="folder of prepared TFDS data")
    sub.add_argument("--out", type=Path, help="CSV file to write the table to")
    sub = command("plan", _plan, "What a training run costs on a TPU slice: by arithmetic, and by the TPU's compiler.",
                  "nfnet plan F7+ --epochs 8 --examples 4e9 --batch 4096 --topology v4:4x4x4 --classes 30000")  # fmt: skip
    sub.add_argument("variant", help="architecture, F3 for example")
    sub.add_argument("--epochs", type=float, required=True)
    sub.add_argument("--examples", type=float, required=True, help="of an epoch, 4e9 for example")
    sub.add_argument("--batch", type=int, default=4096, help="images a step, over all chips (default: 4096)")
    sub.add_argument("--topology", default="v4:2x2x1", help="generation and sides of the slice (default: v4:2x2x1)")
    sub.add_argument("--classes", type=int, default=1000, help="of the head (default: 1000)")
    sub.add_argument("--resolution", type=int, default=224, help="in pixels (default: 224)")
    sub.add_argument("--remat", default="by_stage", choices=["none", "convs", "middle", "entry", "full", "by_stage"],
                     help="what the backward pass computes again (default: what costs fewest cycles)")  # fmt: skip
    sub.add_argument("--sharding", default="fsdp", choices=["replicated", "fsdp"], help="of the training state")
    sub.add_argument("--bottleneck-rule", default="published", choices=["published", "released"],
                     help='first stage of "+" models')  # fmt: skip
    sub.add_argument("--rho", type=float, default=0.0, help="of SAM; 0: plain steps")
    sub.add_argument("--price", type=float, help="dollars a chip-hour (default: an old list's)")
    sub.add_argument("--compile", action="store_true", help="ask the TPU's compiler ([plan] extra; minutes)")
    sub.add_argument("--cache-dir", type=Path, default=PROJECT / "outputs" / ".cache" / "plan",
                     help="where its answers are kept")  # fmt: skip
    sub = command("cost", _cost, "What a study costs on the TPU slice that its file names.",
                  "nfnet cost params/tpu/*.yaml --write")  # fmt: skip
    sub.add_argument("files", nargs="+", type=Path, help="study files with a line '# Slice: TOPOLOGY, N classes'")
    sub.add_argument("--write", action="store_true", help="put the cost into their headers")
    sub = command("params", _params, "Print a recipe's parameters for one variant, as papermill's -f takes them.",
                  "nfnet params params/paper/finetune.yaml F7+ > f7plus.yaml")  # fmt: skip
    sub.add_argument("recipe", type=Path, help="recipe file (YAML)")
    sub.add_argument("variant", help="architecture, F3 for example")
    sub = command("dedup", _dedup, "Find near-duplicates of held-out pictures in a training set.",
                  "nfnet dedup --train tfds:places365_small --against tfds:imagenet_v2@test digits --out dedup")  # fmt: skip
    sets = "a folder of pictures, or NAME[@SPLIT] of a data set"
    sub.add_argument("sets", nargs="*", help=f"training set, then held-out sets: {sets}")
    sub.add_argument("--train", help="training set, the same way")
    sub.add_argument("--against", nargs="+", default=[], help="held-out sets, the same way")
    sub.add_argument("--out", type=Path, default=Path("dedup"), help="folder for what is found (default: dedup)")
    sub.add_argument("--radius", type=int, default=10, help="bits of 64 by which hashes may differ (default: 10)")
    sub.add_argument("--min-correlation", type=float, default=0.93, help="of the laid-over pictures (default: 0.93)")
    sub.add_argument("--weights", type=Path, help="weights as for nfnet predict: compare pooled features as well")
    sub.add_argument("--min-cosine", type=float, default=0.9, help="of the pooled features (default: 0.9)")
    sub.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that read pictures (default: cores)")
    sub.add_argument("--train-examples", type=int, help="only the first of the training set; fractals need a number")
    sub.add_argument("--against-examples", type=int, help="only the first of each held-out set")
    sub.add_argument("--data-dir", help="folder of prepared TFDS data")
    data = commands.add_parser("data", help="Look at data sets.", epilog="example: nfnet data show fractals")
    data_commands = data.add_subparsers(dest="data_command", required=True)
    sub = data_commands.add_parser("show", help="Write a contact sheet.", epilog="example: nfnet data show digits")
    sub.set_defaults(function=_data_show)
    sub.add_argument(
        "name", help="fractals | fractals-lt | digits | tfds:NAME | folder:DIR | webdataset:DIR, and @SPLIT if not train"
    )
    sub.add_argument("--out", type=Path, default=Path("sheet.png"), help="picture to write (default: sheet.png)")
    sub.add_argument("--data-dir", help="folder of prepared TFDS data")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.function(arguments)
        sys.stdout.flush()  # or it is found too late that its reader has gone
        return code
    except BrokenPipeError:  # who read what is said has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 1
    except (ConfigError, RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if no_room(error) else 2
    except RuntimeError as error:  # a report that can't be built
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
