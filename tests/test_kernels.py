"""Which kernels a rollout runs, and that they change nothing but its speed."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec import kernels
from jspec.errors import InputError
from pallas_kernels.implementation import REFERENCE, Implementation
from tests.pallas_kernels.interpreters import PLAIN
from tests.speculate import tiny
from tests.speculate.ties import assert_same

PROMPTS = [[1, 2, 1, 2, 1], [5], [7, 6, 7, 6, 7, 6], [4, 4, 4]]
GREEDY = dict(temperature=0.0)
MIXED = dict(temperature=jnp.tile(jnp.array([1.0, 0.0, 0.7, 1.3]), 8), min_new_tokens=4)


def run(implementation, draft="mtp", rule="coupled", k=3, **sampling):
    policy = tiny.policy(11, layers=2, heads=4, kv_heads=2, hidden=32, scale=0.25)
    made = {None: None, "ngram": jspec.drafts.ngram(policy),
            "mtp": tiny.shaken(jspec.drafts.mtp(policy, jax.random.key(1)), scale=0.1)}[draft]
    batch = jspec.PromptBatch.from_tokens(PROMPTS, group_size=8, seed=0, buckets=(8,))
    sampling = jspec.Sampling(max_new_tokens=12, stop_tokens=(3,), **sampling)
    out = jspec.rollout(policy, made, batch, sampling=sampling,
                        speculation=jspec.Speculation(k=k, rule=rule, kernels=implementation))
    return out, policy, batch, sampling


slow = pytest.mark.slow


@slow  # by default the enumeration has the kernels in
@pytest.mark.parametrize("draft, rule, k, sampling", [
    ("mtp", "coupled", 3, MIXED), ("mtp", "rejection", 3, {}), ("ngram", "rejection", 2, GREEDY),
    ("mtp", "block", 3, MIXED), ("ngram", "block", 3, MIXED), ("mtp", "block", 2, {"top_p": 0.9}),
    (None, "block", 0, {}), ("ngram", "coupled", 7, {}), ("ngram", "rejection", 3, MIXED),
    ("mtp", "rejection", 7, MIXED), (None, "coupled", 0, {}), (None, "rejection", 0, MIXED),
    ("mtp", "coupled", 1, GREEDY), ("mtp", "rejection", 2, {"top_k": 4}),
    ("mtp", "coupled", 2, {"top_p": 0.9})])
def test_a_rollout_emits_the_same_tokens(draft, rule, k, sampling):
    want, policy, batch, options = run("reference", draft, rule, k, **sampling)
    got = run("pallas", draft, rule, k, **sampling)[0]
    if rule == "coupled":
        assert_same(policy, batch, options, want, got)
    else:  # the same noise; what is not a tie is equal, and of 32 rows no more than one is
        assert (np.asarray(want.tokens) == got.tokens).all(1).sum() >= 31
    same = (np.asarray(want.tokens) == got.tokens) & np.asarray(want.mask)
    np.testing.assert_allclose(np.asarray(got.logprobs)[same], np.asarray(want.logprobs)[same],
                               atol=1e-5)


def test_the_platform_chooses(monkeypatch):
    def choose(platform, name):
        monkeypatch.setattr(kernels, "platform", lambda: platform)
        return kernels.choose(name), kernels.picked(name)

    assert choose("cpu", "auto") == (REFERENCE, "reference kernels")
    assert choose("cpu", "pallas") == (PLAIN, "tpu kernels, interpreted")
    assert choose("tpu", "reference") == (REFERENCE, "reference kernels")
    for platform, name in (("tpu", "tpu"), ("gpu", "gpu"), ("cuda", "gpu")):
        assert choose(platform, "auto") == (Implementation(name, fall_back=True), f"{name} kernels")
        assert choose(platform, "pallas")[0] == Implementation(name)
    assert choose("METAL", "auto")[0] == REFERENCE


@pytest.mark.parametrize("capability", ["8.0", "10.0", "gfx942", None])
def test_a_gpu_that_is_no_hopper(monkeypatch, capability):
    class Other:
        compute_capability, device_kind = capability, "another GPU"

    class Hopper:
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Other()])
    monkeypatch.setattr(jax, "local_devices", lambda: [Other()])
    assert kernels.choose("auto") == REFERENCE
    with pytest.raises(InputError,
                       match=r"needs a TPU or a Hopper GPU, and this is another GPU; set"):
        kernels.choose("pallas")
    monkeypatch.setattr(jax, "local_devices", lambda: [Hopper()])
    assert kernels.choose("auto").name == "gpu"


def test_what_was_picked_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, "jspec"):
        run("pallas", None, k=0, top_k=5)
    assert "compiling a rollout with tpu kernels, interpreted" in caplog.text


def test_an_unknown_name():
    with pytest.raises(InputError,
                       match="kernels 'triton' is unknown; known: auto, reference, pallas"):
        run("triton")


def test_a_kernel_that_refuses(caplog):
    """Asked for by name it is an error; where the platform chose it, the reference runs and the log
    says so."""
    x = jnp.zeros((1, 1, 1, 8), jnp.float16)
    cache, lengths = jnp.zeros((1, 1, 16, 8), jnp.float16), jnp.zeros(1, jnp.int32)
    table = jnp.zeros((1, 1), jnp.int32)
    policy = tiny.policy(11)
    with pytest.raises(InputError, match="not float16 and float16; set speculation.kernels=auto"):
        kernels.attend(policy.replace(kernels=Implementation("tpu")), x, x, x, cache, cache, table,
                       lengths)
    with caplog.at_level(logging.WARNING, "jspec"):
        out, *_ = kernels.attend(policy.replace(kernels=Implementation("tpu", fall_back=True)), x,
                                 x, x, cache, cache, table, lengths)
    assert out.shape == x.shape
    assert ("the reference takes the place of a tpu kernel" in caplog.text
            and "float16" in caplog.text)
