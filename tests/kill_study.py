"""Kill -9 a study at random moments, let it finish, and compare its records with those of an undisturbed one.

python tests/kill_study.py params/smoke/study.yaml --kills 10 --seed 0

Everything but times must be equal to the last digit: parameters' digests, losses, every line of metrics.jsonl.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMES = {
    "seconds", "compile_seconds", "wall_seconds", "images_per_second", "core_hours", "started_at", "finished_at", "time",
    "data_wait_seconds", "metrics_digest", "digest",  # digests are of times, too
}  # fmt: skip


def start(study: Path, out: Path) -> subprocess.Popen:
    """`nfnet study` in the background, its output in a file beside `out`."""
    log = out.with_suffix(".log").open("a")
    command = [sys.executable, "-m", "nfnet_lib.cli", "study", str(study), "--out", str(out)]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=Path(__file__).parent.parent)


def finish(study: Path, out: Path) -> None:
    """Run the study to its end; RuntimeError with the end of its output if it fails."""
    if start(study, out).wait() != 0:
        raise RuntimeError(out.with_suffix(".log").read_text()[-2000:])


def kill_at_random(study: Path, out: Path, *, kills: int, longest: float, seed: int) -> list[float]:
    """Start the study `kills` times, each time SIGKILL it after up to `longest` seconds; the delays."""
    delays = random.Random(seed)
    done = []
    for _ in range(kills):
        process = start(study, out)
        delay = delays.uniform(0.5, longest)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        done.append(delay)
        finished = len(list(out.glob("*/summary.json")))
        print(f"killed after {delay:.1f} s; {finished} runs finished", flush=True)
    return done


def records(out: Path) -> dict[str, object]:
    """What a study recorded, without its times."""

    def without_times(record: dict) -> dict:
        return {key: value for key, value in record.items() if key not in TIMES}

    found: dict[str, object] = {}
    for path in sorted(out.glob("*/summary.json")):
        found[f"{path.parent.name}/summary"] = without_times(json.loads(path.read_text()))
        lines = (path.parent / "metrics.jsonl").read_text().splitlines()
        found[f"{path.parent.name}/metrics"] = [without_times(json.loads(line)) for line in lines]
    return found


def differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    """Names of the records that differ or are on one side only."""
    return [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]


def main() -> int:
    """0 where all records are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, help="seconds to the latest kill; default: a quarter of a whole study")
    parser.add_argument("--dir", type=Path, help="where both studies go; default: a new temporary folder")
    arguments = parser.parse_args()
    folder = arguments.dir or Path(tempfile.mkdtemp(prefix="kill_study_"))
    folder.mkdir(parents=True, exist_ok=True)
    clock = time.monotonic()
    finish(arguments.study, folder / "undisturbed")
    whole = time.monotonic() - clock
    print(f"undisturbed: {whole:.0f} s; both studies: {folder}", flush=True)
    longest = arguments.longest or whole / 4
    kill_at_random(arguments.study, folder / "killed", kills=arguments.kills, longest=longest, seed=arguments.seed)
    finish(arguments.study, folder / "killed")
    expected, found = records(folder / "undisturbed"), records(folder / "killed")
    wrong = differences(expected, found)
    print(f"{len(expected)} records, {len(wrong)} differ" + "".join(f"\n  {name}" for name in wrong))
    return 1 if wrong or not expected else 0


if __name__ == "__main__":
    sys.exit(main())
