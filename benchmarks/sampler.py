"""Nanoseconds an example id costs. Run: python benchmarks/sampler.py"""

import time

from nfnet_lib.sampler import ExactlyOnceSampler


def main() -> None:
    for num_examples in (1_281_167, 4_000_000_000, 2**32 + 1):
        for batch in (256, 4096, 65536):
            sampler, start = ExactlyOnceSampler(num_examples, seed=0), 0
            began = time.perf_counter()
            while (seconds := time.perf_counter() - began) < 0.5:
                sampler.example_ids(start, start + batch)
                start += batch
            print(f"N = {num_examples:>13,}  batch {batch:>6,}: {seconds / start * 1e9:6.0f} ns/id")


if __name__ == "__main__":
    main()
