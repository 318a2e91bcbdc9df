"""Where a step's time goes: the arithmetic on a planted trace, and a real step."""

import pytest

from nfnet_lib import flops
from nfnet_lib.config import ConfigError, PretrainConfig
from nfnet_lib.profiling import operation_table, part_of, pass_of, profile_step

PROGRAM = """
%fused (p: f32[4]) -> f32[4] {
  ROOT %inner = f32[4] add(%p, %p), metadata={op_name="jit(train_step)/jvp(stage1)/add"}
}
  %dot.1 = f32[4] dot(%a, %b), metadata={op_name="jit(train_step)/transpose(jvp(stage2))/while/body/dot_general"}
  %while.3 = f32[4] while(%a), metadata={op_name="jit(train_step)/jvp(stage1)/while"}
  ROOT %sub = f32[4] subtract(%a, %b), metadata={op_name="jit(train_step)/optimizer/sub"}
"""


def test_time_within_an_operation_is_counted_once():
    events = [
        ("while.3", 1, 0.0, 100e6), ("inner", 1, 10e6, 20e6), ("inner", 1, 40e6, 30e6),  # within the loop
        ("dot.1", 1, 45e6, 5e6),  # within the second of those
        ("dot.1", 2, 0.0, 8e6),  # on another thread, at the same time
        ("sub", 1, 100e6, 2e6),
    ]  # fmt: skip
    table = operation_table(events, PROGRAM, steps=2).set_index("operation")
    assert table["ms"].to_dict() == {"while.3": 25.0, "inner": 22.5, "dot.1": 6.5, "sub": 1.0}
    assert table["calls"].to_dict() == {"while.3": 0.5, "inner": 1.0, "dot.1": 1.0, "sub": 0.5}
    assert table.loc["dot.1", ["part", "pass", "what"]].tolist() == ["stage2", "backward", "dot_general"]
    assert table.loc["sub", ["part", "pass"]].tolist() == ["optimizer", "update"]


@pytest.mark.parametrize("name,part,which", [
    ("jit(train_step)/transpose(jvp(stage3))/rematted_computation/tanh", "stage3", "recomputed"),
    ("jit(train_step)/jvp(weights)/integer_pow", "weights", "forward"),
    ("jit(train_step)/transpose(jvp(stage2))/while/body/transpose(jvp(weights))/mul", "weights", "backward"),
    ("jit(train_step)/transpose(jvp())/mul", "other", "backward"),
    ("", "other", "update"),
])  # fmt: skip
def test_origin_of_an_operation(name, part, which):
    assert (part_of(name), pass_of(name)) == (part, which)


def test_a_real_step_is_accounted_for():
    config = PretrainConfig(variant="F0-mini", num_classes=16, batch_size=8, resolution=32, eval_resolution=32)
    profile = profile_step(config, steps=2)
    shares = profile.by_part()
    assert shares["all"].sum() == pytest.approx(100)
    assert {"stem", "stage0", "stage1", "stage2", "stage3", "weights", "optimizer"} <= set(shares.index)
    assert (shares.loc[["stem", "stage2", "weights"], ["forward", "backward"]] > 0).all(axis=None)
    assert shares.loc["optimizer", "update"] > 0 and shares["all"].get("other", 0) < 25
    # Threads of two cores at most: what is traced fits in the time of the steps.
    assert 0.3 * profile.step_ms < profile.operations["ms"].sum() < 4 * profile.step_ms
    assert f"{profile.step_ms:.1f} ms" in profile.sentence()
    sam = profile._replace(config=config.model_copy(update={"rho": 0.05, "ascent_fraction": 0.5}), step_ms=1.0)
    rate = flops.run_flops(sam.config) / sam.config.steps * 1e3
    assert f"{rate / 1e9:,.0f} GFLOP/s of the network" in sam.sentence()


def test_steps_must_be_positive():
    with pytest.raises(ConfigError, match="steps: 0"):
        profile_step(PretrainConfig(), steps=0)
