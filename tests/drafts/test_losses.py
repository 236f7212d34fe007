"""The drafts' losses where a logit is -inf and where the temperature is nearly 0."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jspec.choices import DRAFT_LOSSES
from jspec.drafts.base import DraftBatch
from jspec.drafts.parts import losses
from jspec.drafts.parts.vocabulary import output_table, table_logits
from jspec.model import Trunk, logits
from jspec.rl.losses import token_logprobs
from tests.pallas_kernels.oracle import log_softmax
from tests.speculate import tiny

B, S, T = 2, 7, 4
LACKING = (3, 4, 10)


def make_lesson(temperature):
    """A policy without tokens for LACKING, a batch whose padding is one of them, and a draft's
    states of two depths."""
    policy = tiny.policy(11, tokenless=((3, 5), (10, 11)))
    a, b, c = jax.random.split(jax.random.key(0), 3)
    tokens = jnp.array([[1, 2, 5, 6, 7, 8, 9], [0, 1, 2, 10, 10, 10, 10]], jnp.int32)
    mask = jnp.array([[True] * 4, [True, True, False, False]])
    batch = DraftBatch(Trunk(jax.random.normal(a, (B, S, 16))), tokens, jnp.array([3, 1]), mask,
                       None, jnp.float32(temperature))
    logprobs, *_ = token_logprobs(policy, batch.predicting(batch.trunk.hidden), batch.response(),
                                 temperature)
    return policy, batch.replace(logprobs=logprobs), [jax.random.normal(key, (B, T, 16))
                                                      for key in (b, c)]


@partial(jax.jit, static_argnames="vocab")
def every_loss(policy, batch, states, vocab):
    """{kind: ((loss, (count, metrics)), its gradients by the states)}."""
    ids = None if vocab is None else jnp.array(vocab)
    head = partial(table_logits, policy, output_table(policy, ids), ids)

    def loss(states, kind):
        total, *rest = losses.loss_over_depths(policy, batch, states, head, ids, kind)
        return total, rest

    return {kind: jax.value_and_grad(loss, has_aux=True)(states, kind) for kind in DRAFT_LOSSES}


@pytest.mark.parametrize("vocab", [None, (0, 2, 3, 5, 7, 10)])
def test_ids_without_a_token_are_no_ones(vocab):
    policy, batch, states = make_lesson(1.0)
    got = every_loss(policy, batch, states, vocab)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    assert all(np.any(x) for _, grads in got.values() for x in grads)
    kept = [i for i in (range(11) if vocab is None else vocab) if i not in LACKING]
    table, trained = np.asarray(policy.weights["embed"], np.float64), np.asarray(batch.mask)
    p = np.exp(log_softmax(np.where(np.isin(range(11), LACKING), -np.inf, np.asarray(
        logits(policy, batch.predicting(batch.trunk.hidden)), np.float64))))[..., kept]
    q = [np.exp(log_softmax(np.asarray(x, np.float64) @ table[kept].T)) for x in states]
    overlaps = [np.minimum(p, x).sum(-1)[trained] for x in q]
    want = {"kl": [(p * np.log(p / x)).sum(-1)[trained].sum() for x in q],
            "tv": [(1 - a).sum() for a in overlaps],
            "overlap": [-np.log(a).sum() for a in overlaps],
            "ce": [-np.log(np.take_along_axis(x, p.argmax(-1)[..., None], -1))[trained].sum()
                   for x in q]}
    want["ce_tv"] = [0.1 * a + 0.9 * b for a, b in zip(want["ce"], want["tv"], strict=True)]
    for kind, ((loss, (_, metrics)), _) in got.items():
        np.testing.assert_allclose(loss, np.mean(want[kind]), rtol=1e-4)
        np.testing.assert_allclose(metrics["overlap"], [a.sum() for a in overlaps], rtol=1e-4)
    for (loss, (count, metrics)), _ in every_loss(*make_lesson(1e-12), vocab).values():
        assert np.isfinite(loss) and np.isfinite(metrics["overlap"]).all() and float(count) == 6
