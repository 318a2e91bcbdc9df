"""Planning by arithmetic: published figures, what fits, what is refused; and reading the compiler's program."""

import re

import pytest
from flax import nnx
from jax.experimental import topologies

from nfnet_lib import paper, plan
from nfnet_lib.cli import main
from nfnet_lib.config import ConfigError
from nfnet_lib.convolution import for_backend
from nfnet_lib.nfnet import NFNet
from nfnet_lib.plan import estimated_cycles
from nfnet_lib.tpus import CHIPS, activation_bytes, cost, parse_topology
from nfnet_lib.variants import get_variant

F7_PLUS = {"epochs": 8, "examples": 4e9, "global_batch": 4096, "num_classes": 29_593}


def test_a_chips_clock_and_matrix_units_make_its_peak():
    units = {
        "v3": (4, 128),
        "v4": (8, 128),
        "v5e": (4, 128),
        "v5p": (8, 128),
        "v6e": (4, 256),
    }  # of a chip, side of one
    for name, chip in CHIPS.items():
        count, side = units[name]
        assert chip.flops == pytest.approx(2 * count * side**2 * chip.clock, rel=0.01), name


def test_topologies():
    assert parse_topology("v4:4x4x4") == (CHIPS["v4"], 64) and parse_topology("v5e:4x8")[1] == 32
    for text in ("v4:4x4", "v5e:2x2x2", "v4-8", "v7:2x2x1", "v4:0x1x1", ""):
        with pytest.raises(ConfigError, match=re.escape(f"topology: {text!r}")):
            parse_topology(text)


def test_the_papers_run_costs_what_its_utilisation_says():
    """110k core-hours are 39.5% of the peak: the floor is that share of them."""
    planned = cost("F7+", "v4:4x4x4", **F7_PLUS)
    assert planned.steps == 7_812_500
    assert planned.core_hours() / paper.PAPER_UTILISATION == pytest.approx(110_000, rel=0.01)
    assert planned.core_hours(2 * planned.floor_seconds) == pytest.approx(2 * planned.core_hours())
    assert planned.dollars(price=1.0) == pytest.approx(planned.core_hours() / 2)
    on_v3 = cost("F7+", "v3:8x8", **F7_PLUS)
    assert on_v3.core_hours() / planned.core_hours() == pytest.approx(275 / 123), "of equal numbers of cores a chip"


def test_memory_by_part_and_what_makes_it_fit():
    all_kept = cost("F7+", "v4:4x4x4", **F7_PLUS)
    lean = cost("F7+", "v4:4x4x4", **F7_PLUS, remat="convs")
    split = cost("F7+", "v4:4x4x4", **F7_PLUS, remat="convs", sharding="fsdp")
    assert not all_kept.fits and lean.fits and "remat" in all_kept.advice()
    assert split.memory["params"] == pytest.approx(lean.memory["params"] / 64)
    assert lean.memory["params"] / 4 == pytest.approx(832.9e6 + 117.2e6, rel=1e-3), (
        "1,000 classes, and what the head adds"
    )
    assert "remat" not in cost("F7+", "v4:2x2x1", **F7_PLUS | {"remat": "full"}).advice(), "which it has already"
    by_stage = cost("F7+", "v4:2x2x1", **F7_PLUS | {"remat": "by_stage"})
    assert not by_stage.fits and by_stage.advice().startswith("remat full, a smaller")
    big = cost("G/14", "v5e:1x1", epochs=1, examples=1e6, global_batch=1)
    assert not big.fits and "fsdp" in big.advice() and any("does not fit" in line for line in big.lines())


@pytest.mark.parametrize("found,hint", [(None, r"install the \[plan\] extra"), (object(), "is it one of the TPU's")])
def test_what_is_missing_to_compile_is_said(monkeypatch, found, hint):
    """Words as jax 0.10.2 has them where libtpu is not installed, and where it does not know a topology."""
    def refuse(**asked):
        raise NotImplementedError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ConfigError, match=rf"topology: 'v4:2x2x1' can't be compiled for \({hint}"):
        plan.devices_of("v4:2x2x1")


def test_what_convolutions_leave_behind_counted_by_hand():
    """F0 at 32 px, 1 image: the stem's 16, 8 px; stages at 8, 4, 2, 1 px."""
    variant = get_variant("F0")
    by_hand = 16**2 * (16 + 32 + 64) + 64 * (256 + 3 * 128) + 2 * 16 * (512 + 3 * 256) + 27 * (1536 + 3 * 768)
    assert activation_bytes(variant, 1, 32, "convs") == 2 * by_hand
    kept = [activation_bytes(variant, 4, 224, remat) for remat in ("full", "entry", "middle", "convs", "none")]
    assert kept == sorted(kept) and kept[0] * 2 < kept[3]


def test_what_a_vit_keeps_and_its_two_moments_counted_by_hand():
    """Ti/16 at 64 px, 2 images: 16 tokens of width 192, MLP of 768, 12 blocks."""
    variant = get_variant("Ti/16")
    assert activation_bytes(variant, 2, 64, "by_stage") == 2 * 2 * 12 * 16 * (6 * 192 + 768)
    kept = [activation_bytes(variant, 2, 224, remat) for remat in ("full", "by_stage", "none")]
    assert kept == sorted(kept) and kept[0] * 5 < kept[1] < kept[2] / 2
    memory = cost("Ti/16", "v4:2x2x1", epochs=1, examples=1e6, global_batch=64).memory
    assert memory["optimizer"] == 2 * memory["params"]


def test_short_stages_are_kept_whole_as_long_as_that_fits():
    def planned(name, images, backend="tpu"):
        with for_backend(backend):
            network = nnx.eval_shape(lambda: NFNet(get_variant(name), 10, remat="by_stage"))
            return network.plan_stages(images, 224, 224)

    assert planned("F0", 64) == [(1, "none"), (2, "none"), (6, "none"), (3, "none")]
    assert planned("F7+", 64) == [(1, "middle"), (1, "entry"), (1, "entry"), (1, "entry")]
    assert [kept for _, kept in planned("F1", 64)] == ["none", "none", "entry", "none"]
    assert [kept for _, kept in planned("F0", 1024)] == ["middle", "entry", "entry", "none"]
    assert all(unroll == 1 for unroll, _ in planned("F0", 64, "gpu"))
    bytes_of = lambda images, remat: activation_bytes(get_variant("F0"), images, 224, remat)  # noqa: E731
    assert bytes_of(64, "by_stage") < bytes_of(64, "none") and bytes_of(1024, "by_stage") < bytes_of(1024, "convs")


@pytest.mark.parametrize(
    "wrong,words",
    [
        ({"variant": "F9"}, "unknown 'F9'"), ({"epochs": 0}, "epochs: 0 is not above 0"), ({"examples": -1}, "examples: -1"),
        ({"rho": -1.0}, "rho: -1"), ({"rho": float("nan")}, "rho: nan"), ({"examples": 0.5}, "examples: 0.5 is not at least"),
        ({"epochs": float("inf")}, "epochs: inf"), ({"num_classes": 0}, "num_classes: 0"),
        ({"resolution": 200}, r"resolution: 200 is not a multiple of 32, which F0 needs"),
        ({"global_batch": 100}, "global_batch: 100 does not divide among the 64 devices of v4:4x4x4"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused(wrong, words):
    arguments = {"variant": "F0", "topology": "v4:4x4x4", **F7_PLUS, **wrong}
    with pytest.raises(ConfigError, match=words):
        cost(arguments.pop("variant"), arguments.pop("topology"), **arguments)


def test_the_command_prints_steps_memory_and_the_bill(capsys):
    line = ["plan", "F1", "--epochs", "1", "--examples", "1.28e6", "--batch", "1024", "--topology", "v4:2x2x1"]
    assert main([*line, "--price", "2"]) == 0
    out = capsys.readouterr().out
    assert "1,250 steps" in out and "4 chips" in out and "$2 a chip-hour" in out and "core-hours" in out
    assert main([*line[:-1], "v4:2x2"]) == 2 and "topology: 'v4:2x2'" in capsys.readouterr().err
    assert main([*line, "--price", "-2"]) == 2 and "price: -2 dollars" in capsys.readouterr().err


PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %a = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"999"}
}

%body.1 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]) parameter(0)
  %f = f32[8]{0} fusion(%g), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %inner = (s32[], f32[8]) while(%t), condition=%cond.2, body=%body.2
}

%cond.1 (t: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body.2 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f2 = f32[8]{0} fusion(%g), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"2"}
}

%cond.2 (t: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%x), condition=%cond.1, body=%body.1
  %w2 = (s32[], f32[8]) while(%x), condition=%cond.2, body=%body.2, backend_config={"known_trip_count":{"n":"7"}}
  %c = f32[8]{0} convolution(%x, %y), backend_config={"estimated_cycles":"100"}
}
"""


def test_cycles_of_loops_count_as_often_as_they_run():
    program = PROGRAM.replace("while(%t), condition=%cond.2, body=%body.2", 'while(%t), condition=%cond.2, body=%body.2, '
                              'backend_config={"known_trip_count":{"n":"3"}}')  # fmt: skip
    assert estimated_cycles(program) == 5 * (10 + 3 * 2) + 7 * 2 + 100


def test_the_compiler_is_asked_once_for_a_request(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "compile_train_step", lambda variant, **request: asked.append((variant, request)))
    monkeypatch.setattr(plan, "estimate", lambda compiled: plan.Estimate(1e6 * len(asked), 1, 2, 3, 4, 5))
    first = plan.cached_estimate("F0", tmp_path, topology="v4:2x2x1", global_batch=256)
    assert first.cycles == 1e6 and first.peak == 1 + 2 - 3 + 4 + 5
    assert plan.cached_estimate("F0", tmp_path, topology="v4:2x2x1", global_batch=256) == first and len(asked) == 1
    assert plan.cached_estimate("F0", tmp_path, topology="v4:2x2x1", global_batch=512).cycles == 2e6
    for path in tmp_path.iterdir():
        path.write_text("{")
    assert plan.cached_estimate("F0", tmp_path, topology="v4:2x2x1", global_batch=256).cycles == 3e6
