"""Nanoseconds an example id costs. Run: python benchmarks/sampler.py"""

import time

import numpy as np

from nfnet_lib.sampler import ExactlyOnceSampler


def main() -> None:
    """With exclusions, beside the same without, in turn."""
    exclude = np.random.default_rng(0).choice(4_000_000_000, 1_000_000, replace=False)
    for num_examples, ids in ((1_281_167, None), (4_000_000_000, None), (4_000_000_000, exclude), (2**32 + 1, None)):
        sampler = ExactlyOnceSampler(num_examples, 0, ids)
        for batch in (256, 4096, 65536):
            start, began = 0, time.perf_counter()
            while (seconds := time.perf_counter() - began) < 0.5:
                sampler.example_ids(start, start + batch)
                start += batch
            what = f"N = {num_examples:>13,}, {sampler.excluded:>9,} excluded, batch {batch:>6,}"
            print(f"{what}: {seconds / start * 1e9:6.0f} ns/id")


if __name__ == "__main__":
    main()
