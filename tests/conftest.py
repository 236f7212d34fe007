"""Fixtures that more than one folder of tests needs."""

import functools
import gc
import importlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.compiling import LEFT_OUT, compile_plainly


def pytest_configure(config):
    """What one process of a session compiles, the others and those that tests start read back. The
    next session starts anew; JAX_COMPILATION_CACHE_DIR in the environment names a folder that
    lasts, and empty none."""
    if not in_full(config):
        compile_plainly()
    gc.set_threshold(100_000, 50, 50)  # tracing makes many objects, and next to no circles of them
    # else set by the user, or for this worker by its controller
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = tempfile.mkdtemp(prefix="jspec-tests-compiled-")
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": directory,
                       "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))


def in_full(config):
    """Whether the full checks are asked for too: those see the code that users run."""
    return config.getoption("markexpr") != "not slow"


LONG = ["test_train.py", "speculate/test_enumeration.py", "speculate/test_chi_square.py",
        "test_sharding.py", "drafts/test_self.py", "speculate/test_rollout.py", "test_session.py",
        "test_kernels.py", "speculate/test_batching.py", "rl/test_update.py",
        "pallas_kernels/test_verify_attention_kernels.py", "speculate/test_coupled.py"]
"""What takes longest. A file is one process's, so these begin first: the end waits for none."""


def pytest_collection_modifyitems(items):
    """Long files first. The full version of a check may take its time, on a machine that others use
    too."""
    files = {Path(__file__).parent / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: files.get(item.path, len(files)))
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))


STRICT = ("drafts", "model", "pallas_kernels", "rl", "speculate")
PROMOTING = ("jax.nn:dot_product_attention", "optax.tree:bias_correction", "qwix:dot_general")


@pytest.fixture(scope="session")
def libraries_may_promote():
    """Functions of libraries that leave to JAX what two dtypes make go on doing so."""
    for name in PROMOTING:
        module, _, function = name.partition(":")
        module = importlib.import_module(module)
        setattr(module, function, loosely(getattr(module, function)))


def loosely(function):
    """The function as it runs where nothing is strict."""
    import jax

    @functools.wraps(function)
    def run(*arguments, **options):
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **options)

    return run


@pytest.fixture(scope="module", autouse=True)
def strict_promotion(request):
    """In the folders of `STRICT`, where two dtypes meet the code says which one it means; JAX never
    chooses. Elsewhere the code is that of users, and so it is in the processes that tests start."""
    import jax

    strict = request.path.relative_to(Path(__file__).parent).parts[0] in STRICT
    if strict:
        request.getfixturevalue("libraries_may_promote")
    jax.config.update("jax_numpy_dtype_promotion", "strict" if strict else "standard")


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request):
    """Most tests compile for longer than they run, so by default they go without most of XLA's
    optimizations. Not so modules marked `optimized`, which run for longer, and not the full
    checks."""
    import jax

    full = in_full(request.config) or request.node.get_closest_marker("optimized")
    jax.config.update("jax_disable_most_optimizations", not full)
    os.environ[LEFT_OUT] = str(int(not full))
    yield
    if resident_bytes() > 2e9:  # of what a module compiled nothing goes by itself
        jax.clear_caches()


def resident_bytes():
    """The memory that this process has, where Linux tells; else 0."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.fixture(scope="session")
def smollm2():
    """The embedded SmolLM2-135M-Instruct: float32, training layout. Fetched into the user's cache
    the first time."""
    import jspec.hub

    return jspec.hub.load("smollm2-135m-instruct", dtype="float32")


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    import jspec.hub

    return jspec.hub.load_tokenizer("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A directory with a model of characters, drawn at random."""
    import jax

    import jspec
    from jspec.hub import character_tokenizer

    tokenizer = character_tokenizer("0123456789+= ")
    config = jspec.ModelConfig(
        family="llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
        num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, initializer_range=0.2,
        stop_tokens=(tokenizer.eos_token_id,), pad_token=tokenizer.pad_token_id)
    directory = tmp_path_factory.mktemp("model") / "tiny"
    jspec.export(jspec.init_policy(config, jax.random.key(0)), directory, tokenizer)
    return str(directory)
