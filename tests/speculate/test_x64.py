"""`jax_enable_x64`, as code that needs float64 elsewhere turns it on, changes no dtype and no
token."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

import jspec
from jspec.rl.batch import TrainBatch
from jspec.rl.state import init_state
from jspec.rl.update import update
from jspec.rl.update_settings import OptimizerSettings, UpdateSettings
from tests.speculate import drafters
from tests.speculate.ties import generated


@contextmanager
def sixty_four_bits():
    """Under it, that two dtypes meet is what is tested."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def wide():
    with sixty_four_bits():
        yield


def make(name):
    policy = drafters.policy(name, 11, hidden=32, stop_tokens=(3,))
    return policy, drafters.make(name, policy, seed=1, scale=0.1)


def make_batch(group_size=2):
    return jspec.PromptBatch.from_tokens([[1, 2, 1, 2, 1], [5]], group_size=group_size, seed=0,
                                         buckets=(8,))


def doubles(jaxpr):
    """The float64 matrices that a program computes. (Numbers are Python's own, and the optimizer's
    coefficients.)"""
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            if getattr(out.aval, "dtype", None) == jnp.float64 and out.aval.ndim > 1:
                yield f"{equation.primitive} {out.aval.str_short()}"
        for inner in jaxprs_in_params(equation.params):
            yield from doubles(inner)


def traced(function, *args):
    """The jaxpr of a program, and what it gives, neither of them with a float64."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    assert not list(doubles(jaxpr.jaxpr))
    return shapes


KINDS = {"tokens": "int32", "logprobs": "float32", "entropy": "float32", "lengths": "int32",
         "mask": "bool"}


DEFAULT = {("mtp", "rejection"), ("eagle3-reduced", "block"), ("self", "coupled"),
           ("suffix", "block"), ("ngram", "coupled")}
EVERY = [(name, rule) for name in drafters.NAMES for rule in ("rejection", "block", "coupled")]


@pytest.mark.parametrize("name, rule", [pytest.param(*case, marks=() if case in DEFAULT
                                                     else pytest.mark.slow) for case in EVERY])
def test_rollouts_keep_their_dtypes(name, rule, wide):
    policy, draft = make(name)
    assert {x.dtype.name for x in jax.tree.leaves(draft.weights)} <= {"float32"}

    def program(policy, draft, batch, temperature, top_p):
        sampling = jspec.Sampling(temperature=temperature, top_p=top_p, top_k=5, max_new_tokens=4,
                                  min_new_tokens=2)
        return jspec.rollout(policy, draft, batch, sampling=sampling,
                             speculation=jspec.Speculation(k=2, rule=rule, depths=(0,)))

    out = traced(program, policy, draft, make_batch(), 1.0, 0.9)
    assert {field: getattr(out, field).dtype.name for field in KINDS} == KINDS
    assert {x.dtype.name for x in jax.tree.leaves(out.stats)} == {"int32"}


def test_the_tokens_are_the_same():
    policy, draft = make("ngram")
    plain = jspec.rollout(policy, draft, make_batch(), sampling=jspec.Sampling(max_new_tokens=6))
    with sixty_four_bits():
        out = jspec.rollout(*make("ngram"), make_batch(), sampling=jspec.Sampling(max_new_tokens=6))
    assert generated(out) == generated(plain)


@pytest.mark.parametrize("name, options", [
    ("mtp", dict(draft_loss="kl", warmup_steps=3)),
    pytest.param("mtp-reduced", dict(draft_loss="tv", micro_batch=2), marks=pytest.mark.slow),
    ("eagle3", dict(draft_loss="overlap", draft_optimizer=OptimizerSettings(optimizer="muon")))])
def test_updates_keep_their_dtypes(name, options, wide):
    policy, draft = make(name)
    settings = UpdateSettings(temperature=0.7, **options)
    state = init_state(policy, draft, settings, 2**40)
    tokens, mask = jnp.ones((4, 5), jnp.int32), jnp.ones((4, 5), bool)
    batch = TrainBatch(jnp.ones((2, 8), jnp.int32), jnp.array([5, 1], jnp.int32), tokens,
                       jnp.zeros((4, 5), jnp.float32), mask, jnp.ones(4, jnp.float32))
    new, _ = traced(lambda state, batch: update(state, None, batch, settings), state, batch)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
