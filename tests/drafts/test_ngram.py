"""Look-up against a plain search, and the folder's promise that a drafter is a file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.drafts import base
from tests.speculate import tiny

POLICY = tiny.policy(5)


def search(tokens, k, max_ngram):
    """The rule in words: the longest suffix that occurred before, its latest occurrence, and what
    followed it."""
    end = len(tokens) - 1
    best = None
    for n in range(1, max_ngram + 1):
        for at in range(n - 1, end):
            if tokens[at - n + 1:at + 1] == tokens[end - n + 1:end + 1]:
                best = at  # longer beats shorter, later beats earlier
    out = []
    period = 1 if best is None else end - best
    for j in range(k):
        out.append(tokens[end - period + 1 + j % period])
    return out


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_equals_a_plain_search(max_ngram):
    rng = np.random.default_rng(max_ngram)
    lengths = rng.integers(1, 15, 200)
    rows = [rng.integers(0, 4, n).tolist() for n in lengths]
    padded = jnp.array([r + rng.integers(0, 4, 16 - len(r)).tolist() for r in rows], jnp.int32)
    draft = jspec.drafts.ngram(POLICY, max_ngram=max_ngram)
    sampler = base.Sampler(None, jnp.ones(200), None, 0, 4)
    empty = base.DraftState({})
    propose = jax.jit(lambda t, n: draft.drafter.propose(POLICY, draft, empty, base.Committed(t, n),
                                                         sampler)[0])
    proposal = propose(padded, jnp.asarray(lengths))
    got, log_q = proposal.tokens, proposal.log_q
    assert log_q is None  # deterministic: judged as q = 1
    assert got.tolist() == [search(r, 4, max_ngram) for r in rows]


def test_a_repeating_sequence_is_drafted_whole():
    draft = jspec.drafts.ngram(POLICY)
    tokens = jnp.array([[1, 2, 3, 1, 2, 3, 1, 0, 0, 0]])
    got, _ = draft.drafter.propose(POLICY, draft, base.DraftState({}),
                                   base.Committed(tokens, jnp.array([7])),
                                  base.Sampler(None, jnp.ones(1), None, 0, 7))
    assert got.tokens.tolist() == [[2, 3, 1, 2, 3, 1, 2]]


@pytest.mark.parametrize("name", jspec.drafts.DRAFTERS)
def test_every_drafter_is_whole(name):
    draft = getattr(jspec.drafts, name)(POLICY, jax.random.key(0))
    assert base.check_drafter(name, draft.drafter) is jspec.drafts.find(name) and draft.name == name
    assert hash((draft.config, draft.drafter)) is not None
    shapes = jax.tree.map(lambda s: s.shape, draft.drafter.specs(draft.config),
                          is_leaf=lambda s: hasattr(s, "axes"))
    assert jax.tree.map(jnp.shape, draft.weights) == shapes
