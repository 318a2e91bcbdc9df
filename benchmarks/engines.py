"""One study through both engines: how long each takes, while Ray loses workers to SIGKILL on the way.

    python benchmarks/engines.py params/smoke/study.yaml
    python benchmarks/engines.py params/laptop/study.yaml --reference outputs/laptop --about 1000    # of a run before

Ray's workers are killed while a cell is at work, evenly spread over the time that the cells need. Told at the end: the
seconds of each engine, Ray's without its own start, the records that differ, and the processes that are left.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from nfnet_lib import PROJECT

sys.path.insert(0, str(PROJECT / "tests"))
import kill_study


def timed(study: Path, out: Path, engine: str, kill_at: list[float]) -> tuple[float, float, list[psutil.Process]]:
    """(seconds, seconds until the first cell was at work, what is left of it 10 s after its end)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "nfnet_lib.cli", "study", str(study), "--out", str(out), "--engine", engine]
    clock, family, first, kill_at = time.monotonic(), {}, 0.0, sorted(kill_at)
    with out.with_suffix(".log").open("w") as log:
        process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=PROJECT)
        while process.poll() is None:
            time.sleep(0.2)
            now = time.monotonic() - clock
            try:
                family |= {child.pid: child for child in process.children(recursive=True)}
                if not first and any("nfnet_lib.cell" in " ".join(child.cmdline()) for child in family.values()):
                    first = now
                if kill_at and now > kill_at[0]:
                    for child in family.values():
                        if child.is_running() and child.name().startswith("ray::on_own") and child.children():
                            child.kill()
                            print(f"killed a worker after {now:.0f} s", flush=True)
                            del kill_at[0]
                            break
            except psutil.NoSuchProcess:
                continue
    seconds = time.monotonic() - clock
    if process.returncode:
        raise RuntimeError(out.with_suffix(".log").read_text()[-2000:])
    return seconds, first, psutil.wait_procs(family.values(), timeout=10)[1]


def main() -> int:
    """0 where the records are equal and nothing is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=PROJECT / "params" / "smoke" / "study.yaml")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--about", type=float, help="seconds over which kills are spread; default: what the local engine took")
    parser.add_argument("--reference", type=Path, help="folder of the study, finished by the local engine; needs --about")
    parser.add_argument("--dir", type=Path, help="where the studies go; default: a new temporary folder")
    arguments = parser.parse_args()
    folder = arguments.dir or Path(tempfile.mkdtemp(prefix="engines_"))
    reference, about = arguments.reference, arguments.about
    if reference is None:
        reference = folder / "local"
        seconds, first, left = timed(arguments.study, reference, "local", [])
        about = about or seconds
        print(f"local: {seconds:.0f} s, the first cell after {first:.1f} s; {len(left)} processes left", flush=True)
    elif about is None:
        parser.error("--reference needs --about, the seconds that it took")
    kills = [(number + 1) / (arguments.kills + 1) * 0.8 * about for number in range(arguments.kills)]
    seconds, first, left = timed(arguments.study, folder / "ray", "ray", kills)
    expected, found = kill_study.records(reference), kill_study.records(folder / "ray")
    wrong = kill_study.differences(expected, found)
    print(f"ray: {seconds:.0f} s, the first cell after {first:.1f} s; {len(left)} processes left; "
          f"{len(expected)} records, {len(wrong)} differ" + "".join(f"\n  {name}" for name in wrong))  # fmt: skip
    print(f"ray / local: {(seconds - first) / about:.2f}, Ray's start apart")
    return 1 if wrong or left or not expected else 0


if __name__ == "__main__":
    sys.exit(main())
