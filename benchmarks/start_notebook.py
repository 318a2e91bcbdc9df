"""How long a notebook takes that imports what those of runs import, and no more: in a new process, and in one kept for it.

    python benchmarks/start_notebook.py --rounds 5

Both ways in turns on one core, as cells of a study run. Told: seconds of both; the ratio with its median, smallest and largest.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import nbformat

from nfnet_lib.cell import execute, processes_kept


def timed(folder: Path) -> float:
    clock = time.perf_counter()
    execute(folder / "in.ipynb", folder / "out.ipynb", {}, cores=sorted(os.sched_getaffinity(0))[:1])
    return time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        notebook = nbformat.v4.new_notebook()
        notebook.cells = [
            nbformat.v4.new_code_cell("", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("import seaborn\nfrom nfnet_lib import background, finetune, plots, train"),
        ]
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / "in.ipynb")
        found: list[tuple[float, float]] = []
        for number in range(arguments.rounds + 1):
            new = timed(folder)
            with processes_kept():
                timed(folder)
                kept = timed(folder)
            found += [(new, kept)] if number else []  # the first round reads files that were not read before
        ratios = [kept / new for new, kept in found]
        for name, times in zip(("new process", "kept process"), zip(*found, strict=True), strict=True):
            print(f"{name}: {statistics.median(times):.2f} s")
        print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
