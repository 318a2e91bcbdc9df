"""Whole training steps of full variants on one GPU, bfloat16: this library in several forms, and timm under torch.compile.

    python benchmarks/gpu_step.py                          # F0 with 64 images of 224 px, F3 with 32
    python benchmarks/gpu_step.py --case F1:64:192 --engines ours:lax:none:1 timm

An engine of ours is ours:FORM:REMAT:UNROLL (convolution.FORMS, remat.REMAT, blocks a scan step): the step that `train.run`
compiles, with AGC and weight standardisation. timm's is dm_nfnet_f*, channels_last, autocast, cuDNN's autotuning, fused SGD
with Nesterov momentum; "timm" leaves AGC out, which favours it, "timm+agc" has timm's, "timm:blocks" is compiled by blocks,
since all of F3 takes minutes. Data lie on the device. Every engine compiles in a process of its own, all at once; then
they take turns, a few steps each, so that a ratio is between neighbours in time.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time

CLASSES = 1000
STEPS = 10  # a turn


def jax_step(variant: str, batch: int, side: int, form: str, remat: str, unroll: int):
    """A function that makes so many steps and waits for them; FLOPs of the forward pass of an image."""
    import jax
    import numpy as np

    from nfnet_lib import convolution, flops
    from nfnet_lib.config import PretrainConfig
    from nfnet_lib.loader import Examples
    from nfnet_lib.program import PROGRAM_PARAMETERS, programs

    config = PretrainConfig.from_params({
        "variant": variant, "batch_size": batch, "resolution": side, "eval_resolution": side, "examples_per_epoch": batch,
        "epoch_budget": 1, "dtype": "bfloat16", "remat": remat, "unroll": unroll,
    })  # fmt: skip
    values = tuple((name, getattr(config, name)) for name in PROGRAM_PARAMETERS)
    with convolution.using(form):
        program = programs(values, tuple(config.model_settings.items()), CLASSES, (1, 1), batch)
    init_key, noise_key = program.keys(0)
    schedule, state = program.schedule(0.1, 0, 10_000), program.init(init_key)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, (batch, 1)).astype(np.int32)
    examples = program.place_batch(Examples(images, labels, np.ones((batch, 1), np.float32), np.ones(batch, np.float32)))
    step = program.step.wait()

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, examples, schedule, noise_key)
        return float(jax.block_until_ready(metrics["loss"]))

    return run, 2 * flops.forward_macs(config.architecture, side, CLASSES, config.bottleneck_rule)


def timm_step(variant: str, batch: int, side: int, agc: bool, blocks: bool):
    import timm
    import torch
    from timm.utils.agc import adaptive_clip_grad

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    model = timm.create_model(f"dm_nfnet_{variant.lower()}", num_classes=CLASSES, drop_rate=0.0, drop_path_rate=0.0)
    model = model.cuda().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-6, fused=True)
    clipped = [p for name, p in model.named_parameters() if not name.startswith("head.fc.weight")]
    images = torch.randn(batch, 3, side, side, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (batch,), device="cuda")
    compiled = model if blocks else torch.compile(model)
    for part in (model.stem, *(block for stage in model.stages for block in stage), model.final_conv) if blocks else ():
        part.compile()

    def run(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(compiled(images), labels)
            loss.backward()
            if agc:
                adaptive_clip_grad(clipped, clip_factor=0.01, eps=1e-3)
            optimizer.step()
        torch.cuda.synchronize()
        return float(loss)

    return run, None


def peak_flops() -> float:
    """FLOP/s of a large bfloat16 matrix product on this card, the median of several turns."""
    import jax
    import jax.numpy as jnp

    size = 8192
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b).lower(a, b).compile()
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        for _ in range(20):
            out = product(a, b)
        out.block_until_ready()
        seconds.append((time.perf_counter() - began) / 20)
    return 2 * size**3 / statistics.median(seconds)


def serve(pipe, engine: str, case: tuple[str, int, int], trace: str) -> None:
    """A process of one engine: compiles, warms up, then makes steps when told and sends their seconds."""
    os.environ.update(XLA_PYTHON_CLIENT_PREALLOCATE="false", JAX_PLATFORMS="cuda")
    try:
        began = time.perf_counter()
        kind, *settings = engine.split(":")
        if kind == "ours":
            run, flop = jax_step(*case, settings[0], settings[1], int(settings[2]))
        else:
            run, flop = timm_step(*case, kind == "timm+agc", settings == ["blocks"])
        first = run(1)
        compiled = time.perf_counter() - began
        run(5)
        pipe.send(("ready", compiled, flop))
        while (told := pipe.recv()) != "stop":
            if told == "trace":
                import jax

                with jax.profiler.trace(trace):
                    run(3)
                pipe.send(0.0)
                continue
            began = time.perf_counter()
            loss = run(STEPS)
            pipe.send((time.perf_counter() - began) / STEPS)
        pipe.send((first, loss))
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {str(error)[:500]}", None))


def measure(case: tuple[str, int, int], engines: dict, rounds: int, peak: float, trace: str) -> None:
    variant, batch, side = case
    seconds: dict[str, list[float]] = {engine: [] for engine in engines}
    for _ in range(rounds):
        for engine, (pipe, *_) in engines.items():
            pipe.send("run")
            seconds[engine].append(pipe.recv())
    forward = next((flop for _, _, flop in engines.values() if flop), None)
    print(f"\n{variant}, {batch} images of {side} px, bfloat16, {rounds} turns of {STEPS} steps")
    for engine, values in seconds.items():
        rate = batch / statistics.median(values)
        line = f"{engine:>22}: {statistics.median(values) * 1e3:7.2f} ms ({min(values) * 1e3:.2f} to {max(values) * 1e3:.2f})"
        line += f", {rate:7.0f} images/s, {3 * forward * rate / peak:.1%} of the peak" if forward else ""
        for other in engines:
            if engine.startswith("ours") and other.startswith("timm"):
                ratios = sorted(b / a for a, b in zip(values, seconds[other], strict=True))
                line += f"; {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times {other}'s images/s"
        print(line + f"; first step after {engines[engine][1]:.0f} s", flush=True)
    if trace and (ours := [engine for engine in engines if engine.startswith("ours")]):
        best = min(ours, key=lambda engine: statistics.median(seconds[engine]))
        engines[best][0].send("trace")
        engines[best][0].recv()
        print(f"traced {best}")
    for engine, (pipe, *_) in engines.items():
        pipe.send("stop")
        first, last = pipe.recv()
        print(f"{engine:>22}: loss {first:.3f}, then {last:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="VARIANT:BATCH:PIXELS", help="default F0:64:224, F3:32:224")
    parser.add_argument("--engines", nargs="+", default=["ours:lax:none:1", "ours:pointwise:none:1", "timm:blocks"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--wait", type=float, default=300, help="seconds that compilation may take")
    parser.add_argument("--trace", default="", metavar="DIR", help="keep a profile of the fastest of ours in DIR/VARIANT")
    arguments = parser.parse_args()
    cases = [(v, int(b), int(s)) for v, b, s in (case.split(":") for case in arguments.case or ["F0:64:224", "F3:32:224"])]
    context, started, began = multiprocessing.get_context("spawn"), [], time.perf_counter()
    for case in reversed(cases):  # the largest first: it compiles longest
        for engine in arguments.engines:
            pipe, other = context.Pipe()
            trace = os.path.join(arguments.trace, case[0])
            process = context.Process(target=serve, args=(other, engine, case, trace))  # not daemonic: inductor has workers
            process.start()
            other.close()
            started.append((case, engine, pipe, process))
    ready: dict[tuple, dict] = {case: {} for case in cases}
    for case, engine, pipe, process in started:
        left = max(0.0, arguments.wait - (time.perf_counter() - began))
        told = ("failed", "not ready in time", None) if not pipe.poll(left) else pipe.recv()
        if told[0] == "ready":
            ready[case][engine] = (pipe, *told[1:])
        else:
            print(f"{case[0]} {engine}: {told[1]}", file=sys.stderr)
            process.kill()
    os.environ.update(XLA_PYTHON_CLIENT_PREALLOCATE="false")
    import jax

    peak = peak_flops()
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "peak_tflops": round(peak / 1e12, 1)}))
    for case in cases:
        if ready[case]:
            measure(case, ready[case], arguments.rounds, peak, arguments.trace)
    for *_, process in started:
        process.join(20)
        process.kill()


if __name__ == "__main__":
    main()
