"""What SAM costs a training step: full ascent and ascent on a fifth of the batch, beside the plain step.

    python benchmarks/sam.py --variant F0-mini --resolution 32 --batch-size 64

The compiled steps take turns; the ratio is between neighbours.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from nfnet_lib import models
from nfnet_lib.loader import Examples
from nfnet_lib.optim import make_optimizer
from nfnet_lib.step import Schedule, init_state, train_step

FORMS = {"plain": (0.0, 1.0), "SAM": (0.05, 1.0), "SAM, ascent on 0.2": (0.05, 0.2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="F0-mini")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    model, size, side = models.create(arguments.variant, 10), arguments.batch_size, arguments.resolution
    optimizer = make_optimizer(momentum=0.9, weight_decay=1e-5, agc_clip=0.01, agc_eps=1e-3)
    rng = np.random.default_rng(0)
    examples = Examples(
        rng.integers(0, 255, (size, side, side, 3), np.uint8), rng.integers(0, 10, (size, 1)).astype(np.int32),
        np.ones((size, 1), np.float32), np.ones(size, np.float32),
    )  # fmt: skip
    key, schedule = jax.random.key(0), Schedule(jnp.float32(0.01), jnp.int32(0), jnp.int32(1000))
    state = init_state(model, optimizer, key, ema=False)
    steps = {}
    for name, (rho, fraction) in FORMS.items():

        def step(state, examples, schedule, key, rho=rho, fraction=fraction):
            return train_step(
                state, examples, schedule, key, model=model, optimizer=optimizer, loss="softmax", label_smoothing=0.0,
                rho=rho, ascent_fraction=fraction, ema_decay=0.0,
            )  # fmt: skip

        began = time.perf_counter()
        steps[name] = jax.jit(step).lower(state, examples, schedule, key).compile()
        print(f"{name}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(step(state, examples, schedule, key))
            if number:
                times[name].append(time.perf_counter() - began)
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["plain"], strict=True)]
        print(
            f"{name:>19}: {statistics.median(seconds) * 1e3:7.1f} ms a step; {statistics.median(ratios):.2f}"
            f" ({min(ratios):.2f} to {max(ratios):.2f}) of the plain step"
        )


if __name__ == "__main__":
    main()
