"""What the TPU's compiler says of the programs that plans are made of; its answers are kept in nfnet_lib/tpu_estimates.csv.

    python benchmarks/tpu.py                     # those that the table lacks
    python benchmarks/tpu.py --redo --only F0    # these again

Needs libtpu (the [plan] extra) and no TPU. Each program is compiled in a process of its own, so that the host memory is its
own. `nfnet plan` reads the table where libtpu is not installed.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version

import pandas as pd
from tqdm.auto import tqdm

from nfnet_lib.tpus import ESTIMATE_KEYS, ESTIMATES

PAPER = {"topology": "v4:4x4x4", "global_batch": 4096, "num_classes": 30_000}
CORES = {"topology": "v4:2x2x1", "global_batch": 256, "num_classes": 1000, "megacore": False}
VIT = {"topology": "v4:4x4x8", "global_batch": 4096, "num_classes": 29_593}
V3 = {"topology": "v3:2x2", "global_batch": 256, "num_classes": 1000}
PROGRAMS = [
    *({"variant": variant, **PAPER} for variant in ("F7+", "F0", "F1", "F3", "F3+", "F7")),
    {"variant": "F7+", **PAPER, "bottleneck_rule": "released"},
    *({"variant": variant, **CORES} for variant in ("F0", "F1")),
    {"variant": "F0", "topology": "v4:2x2x1", "global_batch": 256, "num_classes": 1000},
    {"variant": "F7", "topology": "v4:2x2x1", "global_batch": 256, "num_classes": 1000},
    *({"variant": variant, **V3, "resolution": side}
      for variant, side in (("F0", 192), ("F1", 224), ("F2", 256), ("F3", 320), ("F4", 384), ("F5", 416))),
    *({"variant": variant, **VIT} for variant in ("g/14", "So400m/14", "G/14")),
]  # fmt: skip


def compile_one(program: dict) -> None:
    """Prints a row of the table, as JSON."""
    from nfnet_lib import plan

    started = time.monotonic()
    estimate = plan.estimate(plan.compile_train_step(**program))
    print(json.dumps(estimate._asdict() | {
        "compile_seconds": round(time.monotonic() - started),
        "host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "jax": version("jax"), "libtpu": version("libtpu"), "date": datetime.now(UTC).date().isoformat(),
    }))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="variants")
    parser.add_argument("--redo", action="store_true", help="also those that the table has")
    parser.add_argument("--program", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program:
        compile_one(json.loads(arguments.program))
        return 0
    failed = 0
    for program in tqdm([p for p in PROGRAMS if not arguments.only or p["variant"] in arguments.only]):
        key = {name: program.get(name, default) for name, default in ESTIMATE_KEYS.items()}
        table = pd.read_csv(ESTIMATES)
        same = (table[list(key)] == pd.Series(key)).all(axis=1)
        if same.any() and not arguments.redo:
            continue
        command = [sys.executable, __file__, "--program", json.dumps(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            failed += 1
            tqdm.write(f"{program}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
            continue
        row = key | json.loads(done.stdout.splitlines()[-1])
        tqdm.write(str(row))
        table = pd.concat([table[~same], pd.DataFrame([row])[table.columns]], ignore_index=True)
        table.sort_values(list(key), kind="stable").to_csv(ESTIMATES, index=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
