"""How the default suite compiles: for a short time, not for fast programs."""

import contextlib
import importlib.metadata
import os

FLAG = "--xla_cpu_use_fusion_emitters=false"
LEFT_OUT = "JAX_DISABLE_MOST_OPTIMIZATIONS"
"""Tells this process, and those that tests start, whether to go without most optimizations."""


def compile_plainly():
    """Of the time that XLA compiles for a CPU, 40% goes into its newer emitters of fusions. JAX
    0.12 has no others, and ends at a flag that it does not know. Optimizations are those that a
    module is marked for; it is imported without."""
    os.environ[LEFT_OUT] = "1"
    jax_version = tuple(map(int, importlib.metadata.version("jax").split(".")[:2]))
    if jax_version < (0, 11) and FLAG not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()


def as_users_compile():
    """`compiler_options` of programs that are read, or must agree with others to the bit: the older
    emitters round a part of a program by what is fused with it."""
    plainly = FLAG in os.environ.get("XLA_FLAGS", "")
    return {"xla_cpu_use_fusion_emitters": True} if plainly else {}


@contextlib.contextmanager
def quickly():
    """Without most optimizations, whatever the module is marked: what runs once, such as the
    drawing of weights, whose optimized program takes 15 seconds to compile."""
    import jax

    before = os.environ.get(LEFT_OUT) == "1"
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
