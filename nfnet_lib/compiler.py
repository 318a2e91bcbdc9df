"""How XLA compiles: on a CPU, where compiling takes longer than much of what is compiled, with less care (LOG.md)."""

import functools

import jax

# LLVM's higher levels take a fifth longer to compile steps that are no faster.
_ON_CPU = {"xla_backend_optimization_level": 1}
# False compiles in 0.6 to 0.8 of the time what runs seldom or is hardly slower: SAM's steps take 0.97 to 1.07, evaluations 1.0
# to 1.3, plain steps up to 1.15. jax 0.12 has no such option any more.
_NEWER_EMITTERS = "xla_cpu_use_fusion_emitters"


def options(soon: bool) -> dict[str, int | bool]:
    """`compiler_options` of jax.jit for this backend. soon: what is compiled sooner may be slower, as what runs seldom may."""
    if jax.default_backend() != "cpu":
        return {}
    return _ON_CPU | ({_NEWER_EMITTERS: False} if soon and knows(_NEWER_EMITTERS) else {})


@functools.cache
def knows(option: str) -> bool:
    """Whether this backend's compiler has a switch of this name: those of XLA come and go, and unknown ones are errors."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={option: False})
    except jax.errors.JaxRuntimeError:
        return False
    return True
