"""Compiled programs are kept whole: found again only by what they were made from, and never trusted when damaged."""

import gc
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nfnet_lib import PROJECT, program_store
from nfnet_lib.files import write_json
from nfnet_lib.program import Program
from nfnet_lib.records import read_metrics

TINY = {
    "variant": "Ti/4-mini", "optimizer": "adamw", "peak_lr": 0.002, "num_classes": 4, "image_size": 8, "resolution": 8,
    "eval_resolution": 8, "examples_per_epoch": 32, "heldout_examples": 8, "batch_size": 4, "kind": "pretrain",
}  # fmt: skip
WITHOUT_COMPILING = """
import sys, jax
from nfnet_lib import train
def refused(*_, **__):
    raise AssertionError("compiled again")
jax.stages.Lowered.compile = refused
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    yield tmp_path / "compiled"
    jax.config.update("jax_compilation_cache_dir", before)


def lowered(factor=2.0):
    state = {"x": jax.ShapeDtypeStruct((3,), jnp.float32), "count": jax.ShapeDtypeStruct((), jnp.int32)}
    step = jax.jit(lambda s: {"x": s["x"] * factor, "count": s["count"] + 1}, donate_argnums=0)
    return step.lower(state)


def made(path, factor=2.0):
    """The program, compiled, and kept where it is new, as runs do it."""
    program, new = program_store.compiled(lowered(factor), None)
    if new:
        program_store.keep(program, path)
    return program


def test_a_kept_program_computes_the_same(folder):
    path = program_store.path_of("step", (1, "a"))
    assert path.parent == folder and program_store.load(path) is None
    for program in (made(path), program_store.load(path)):
        given = {"x": jnp.arange(3.0), "count": jnp.int32(4)}
        result = program(given)
        assert result["x"].tolist() == [0, 2, 4] and result["count"] == 5
        assert given["x"].is_deleted(), "donated, as it was"


def test_one_program_is_traced_while_another_is_compiled(monkeypatch):
    traced, collecting = threading.Event(), []

    def second(x):
        collecting.append(gc.isenabled())
        traced.set()
        return x * 2

    def compiled(lowered, options):
        assert traced.wait(60), "the next program is not traced meanwhile"
        return lowered.compile(options), True

    monkeypatch.setattr(program_store, "compiled", compiled)
    x = jnp.arange(3.0)
    programs = [Program(None, False, jax.jit(function), x) for function in (lambda x: x + 1, second)]
    assert [program(x).tolist() for program in programs] == [[1, 2, 3], [0, 2, 4]]
    assert collecting == [False] and gc.isenabled()


def test_a_program_is_had_before_it_is_kept_and_what_stands_in_its_way_is_said(folder, monkeypatch, capsys):
    path, used = program_store.path_of("step", (1,)), threading.Event()
    written, serialize = threading.Event(), program_store.serialize_executable.serialize

    def late(program):
        assert used.wait(60), "who asked for the program waits until it is kept"
        written.set()
        return serialize(program)

    monkeypatch.setattr(program_store.serialize_executable, "serialize", late)
    x = jnp.arange(3.0)
    program = Program(path, False, jax.jit(lambda x: x - 1), x)
    assert program(x).tolist() == [-1, 0, 1]
    used.set()
    Program.all_kept()
    assert written.is_set() and program_store.load(path)(x).tolist() == [-1, 0, 1] and not capsys.readouterr().err

    def failing(program):
        raise RuntimeError("no serialisation")

    monkeypatch.setattr(program_store.serialize_executable, "serialize", failing)
    assert Program(path.with_name("other"), False, jax.jit(lambda x: x - 2), x)(x).tolist() == [-2, -1, 0]
    Program.all_kept()
    assert "note: compiled programs are not kept for other runs: no serialisation" in capsys.readouterr().err


def test_who_waits_for_a_program_is_told_why_there_is_none():
    failing, fine = (Program(None, False, jax.jit(function), jnp.ones(2)) for function in (lambda x: x.nothing, lambda x: x))
    with pytest.raises(AttributeError, match="nothing"):
        failing.wait()
    assert fine(jnp.ones(2)).tolist() == [1, 1] and gc.isenabled()


@pytest.mark.parametrize("damage", [b"", b"x" * 40, None, "flipped"])
def test_a_damaged_one_is_none(folder, damage):
    path = program_store.path_of("step", ())
    made(path)
    content = path.read_bytes()
    if damage == "flipped":
        middle = len(content) // 2
        damage = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    assert program_store.load(path) is None
    made(path)
    assert program_store.load(path) is not None, "and it is replaced"


def test_what_jax_s_cache_gave_is_not_kept(folder):
    """Written again it may lack functions, and that is found when it runs. The first of two processes at once makes it so."""
    settings = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in settings}
    path = program_store.path_of("step", ())
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        program_store.compiled(lowered(7.0), None)
        assert list(folder.glob("*-cache"))
        jax.clear_caches()
        made(path, 7.0)
        assert not path.exists()
        made(path, 8.0)
        assert path.exists()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_it_is_found_by_what_it_is_made_from_and_where(folder, monkeypatch):
    paths = {program_store.path_of("step", (1,)), program_store.path_of("step", (2,)), program_store.path_of("init", (1,))}
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    paths.add(program_store.path_of("step", (1,)))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with jax.default_matmul_precision("highest"):
        paths.add(program_store.path_of("step", (1,)))
    monkeypatch.setattr(program_store, "_CODE", "other code")
    paths.add(program_store.path_of("step", (1,)))
    monkeypatch.setattr(program_store, "_machine", lambda: "other machine")
    paths.add(program_store.path_of("step", (1,)))
    assert len(paths) == 7


def test_none_is_kept_without_a_cache_or_by_several_processes(folder, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert program_store.path_of("step", ()) is None
    monkeypatch.undo()
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert program_store.path_of("step", ()) is None
    jax.config.update("jax_compilation_cache_dir", None)
    assert program_store.path_of("step", ()) is None


def test_the_next_process_compiles_nothing_and_ends_with_the_same_digits(tmp_path):
    write_json(tmp_path / "params.json", TINY)

    def train(name, cache, *command):
        arguments = [str(tmp_path / "params.json"), "--cache-dir", str(tmp_path / cache), "--out", str(tmp_path / name)]
        command = [sys.executable, *command, *arguments]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)

    first = train("first", "cache", "-m", "nfnet_lib.train")
    assert first.returncode == 0, first.stderr
    second = train("second", "cache", "-c", WITHOUT_COMPILING)
    assert second.returncode == 0, second.stderr
    losses = [read_metrics(tmp_path / name)["loss"].tolist() for name in ("first", "second")]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert "compiled again" in train("third", "other", "-c", WITHOUT_COMPILING).stderr
