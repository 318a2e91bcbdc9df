"""How long a short run takes, start to end, once its programs are compiled: kept whole, and by JAX's cache alone.

    python benchmarks/start.py --variant F0-mini --rounds 5

Each run is a process of its own with two steps; both ways in turns, after one run of each that compiles. Told: seconds of the
process, and those until the step was ready, of both; the ratio with its median, smallest and largest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nfnet_lib import PROJECT
from nfnet_lib.cell import MALLOC_SETTINGS
from nfnet_lib.files import write_json

WAYS = {
    "kept whole": "",
    "JAX's cache": "from nfnet_lib import program_store; program_store.path_of = lambda *_: None;",
}


def timed(way: str, folder: Path, number: int) -> tuple[float, float]:
    """(seconds of a run's process, seconds that it waited for its programs)."""
    out, cache = folder / f"{way} {number}", folder / f"cache of {way}"
    code = f"import sys; {WAYS[way]} from nfnet_lib import train; sys.exit(train.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder / "params.json"), "--out", str(out), "--cache-dir", str(cache)]
    environment = os.environ | {"GLIBC_TUNABLES": MALLOC_SETTINGS}  # as notebooks have it that are executed
    clock = time.perf_counter()
    subprocess.run(command, cwd=PROJECT, env=environment, check=True, capture_output=True)
    seconds = time.perf_counter() - clock
    return seconds, json.loads((out / "summary.json").read_text())["compile_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="F0-mini")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--resolution", type=int, default=16, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / "params.json", {
            "kind": "pretrain", "variant": arguments.variant, "batch_size": arguments.batch_size, "peak_lr": 0.01,
            "resolution": arguments.resolution, "eval_resolution": arguments.resolution, "image_size": arguments.resolution,
            "examples_per_epoch": 2 * arguments.batch_size, "heldout_examples": 64, "num_classes": 4,
        })  # fmt: skip
        for way in WAYS:
            print(f"{way}: compiled in {timed(way, folder, 0)[1]:.1f} s", flush=True)
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for number in range(1, arguments.rounds + 1):
            for way in WAYS:
                found[way].append(timed(way, folder, number))
        for way, times in found.items():
            whole, waited = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"{way}: {whole:.1f} s, programs ready after {waited:.1f} s")
        ratios = [kept[0] / cached[0] for kept, cached in zip(*found.values(), strict=True)]
        print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
