"""Forward and forward-and-backward of full variants on this machine's CPU: this library, with XLA's own convolutions, timm.

    python benchmarks/step.py                              # F0 8x96, F1 4x128, as in README
    python benchmarks/step.py --case F3:2:96 --rounds 9

timm has no minis: `nfnet profile F0-mini` says how many images/s a training step of those makes.

Each runs in its own process with the same number of threads, float32; they take turns, and the others wait meanwhile;
a ratio is between neighbours in time. Memory is the highest resident size while stepping. Programs are made as those of runs
are, by other processes before, and read as all but the first runs of a study do (`program_store`). Needs PyTorch and timm
(`make .venv/.parity`); without them only our two forms are compared.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import time

ENGINES = ("ours", "lax.conv", "timm")
PASSES = ("forward", "forward+backward")
CLASSES = 1000


def jax_passes(variant: str, batch: int, side: int, form: str) -> dict:
    import jax
    import jax.numpy as jnp

    from nfnet_lib import models, program_store
    from nfnet_lib.convolution import using
    from nfnet_lib.losses import softmax_cross_entropy
    from nfnet_lib.program import Program

    model = models.create(variant, CLASSES)

    def program(name: str, function, *arguments) -> Program:
        kept = program_store.path_of(name, (variant, batch, side, form))
        return Program(kept, name == "init", jax.jit(function), *arguments)

    params = program("init", model.init, jax.random.key(0))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (batch, side, side, 3))
    labels = jnp.arange(batch)[:, None] % CLASSES

    def forward(params, images):
        return model.apply(params, images)

    def loss(params, images):
        return jnp.mean(softmax_cross_entropy(forward(params, images), labels, 0.0, jnp.ones(labels.shape)))

    with contextlib.nullcontext() if form == "ours" else using("lax"):
        made = [program(name, f, params, images).wait() for name, f in zip(PASSES, (forward, jax.grad(loss)), strict=True)]
    return {
        name: lambda compiled=compiled: jax.block_until_ready(compiled(params, images))
        for name, compiled in zip(PASSES, made, strict=True)
    }


def timm_passes(variant: str, batch: int, side: int, threads: int) -> dict:
    import torch

    torch.set_num_threads(threads)
    for name in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        if not hasattr(torch.ops.torchvision, name):  # torchvision of another build: its Python part is enough
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
    import timm

    model = timm.create_model(f"dm_nfnet_{variant.lower()}", num_classes=CLASSES, drop_rate=0.0, drop_path_rate=0.0)
    model.train()
    images, labels = torch.randn(batch, 3, side, side), torch.arange(batch) % CLASSES

    def forward():
        with torch.no_grad():
            model(images)

    def both():
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(images), labels).backward()

    return dict(zip(PASSES, (forward, both), strict=True))


def serve(pipe, engine: str, case: tuple[str, int, int], threads: int) -> None:
    """A process of one engine: warms up, then runs the pass that it is told and sends seconds and the peak of memory."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    passes = timm_passes(*case, threads) if engine == "timm" else jax_passes(*case, engine)
    for run in passes.values():
        run()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pipe.send("ready")
    while (name := pipe.recv()) != "stop":
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak counts from here
        began = time.perf_counter()
        passes[name]()
        seconds = time.perf_counter() - began
        with open("/proc/self/status") as file:
            peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
        pipe.send((seconds, peak / 1024))


def compile_all(case: tuple[str, int, int], engines: list[str], cache: str) -> None:
    """The programs of our engines into a cache that processes started from now on read."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    for engine in engines:
        if engine != "timm":
            compiler = multiprocessing.get_context("spawn").Process(target=jax_passes, args=(*case, engine))
            compiler.start()
            compiler.join()


def compare(case: tuple[str, int, int], engines: list[str], rounds: int, threads: int) -> None:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for engine in engines:
        pipes[engine], other = context.Pipe()
        processes.append(context.Process(target=serve, args=(other, engine, case, threads), daemon=True))
        processes[-1].start()
        other.close()
        pipes[engine].recv()
    variant, batch, side = case
    print(f"\n{variant}, {batch} images of {side} px, float32, {threads} threads, {rounds} rounds")
    for name in PASSES:
        results: dict[str, list] = {engine: [] for engine in engines}
        for _ in range(rounds):
            for engine in engines:
                pipes[engine].send(name)
                results[engine].append(pipes[engine].recv())
                time.sleep(0.2)  # threads that spin after their work fall asleep
        for engine, values in results.items():
            seconds = [value[0] for value in values]
            line = f"{name:>17} {engine:>9}: {statistics.median(seconds) * 1e3:8.1f} ms, {max(v[1] for v in values):6.0f} MiB"
            for other in engines:
                if engine == "ours" and other != engine:
                    ratios = sorted(a / b[0] for a, b in zip(seconds, results[other], strict=True))
                    line += f"; {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of {other}'s"
            print(line, flush=True)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send("stop")
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="VARIANT:BATCH:PIXELS", help="default F0:8:96 and F1:4:128")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    engines = [e for e in arguments.engines if e != "timm" or importlib.util.find_spec("timm")]
    for case in arguments.case or ["F0:8:96", "F1:4:128"]:
        variant, batch, side = case.split(":")
        case = (variant, int(batch), int(side))
        with tempfile.TemporaryDirectory() as cache:
            compile_all(case, engines, cache)
            compare(case, engines, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
