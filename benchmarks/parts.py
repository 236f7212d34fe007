"""The parts of a rollout as programs of their own, so that each can be timed: prefill, drafting,
verification, verdict.

A part that writes a cache runs several times within its program, each time one position further and
on what the time before left, as in the rollout's own loop. Called once by itself it would copy the
caches that the loop writes in place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jspec
from jspec.drafts import Draft
from jspec.drafts.base import Observation, Proposal
from jspec.kernels import judge
from jspec.model import Policy, Trunk, logits, verify
from jspec.speculate.cycle import propose
from jspec.speculate.rollout import start
from jspec.speculate.state import State, grow, rows_in_slots
from jspec.speculate.types import NOISE
from pallas_kernels.rejection_sampling import Verdict


def prepare(policy: Policy, draft: Draft | None) -> Draft | None:
    """The draft as cycles use it."""
    return None if draft is None else draft.drafter.prepare(policy, draft)


@partial(jax.jit, static_argnames="k")
def prefill(policy: Policy, draft: Draft | None, batch: jspec.PromptBatch, sampling: jspec.Sampling,
            k: int) -> State:
    """All that a rollout does before its first cycle. The draft is not prepared yet."""
    return start(policy, prepare(policy, draft), batch, sampling, k)


def _repeated(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, times: int) -> Any:
    """The last `out` of `step(i, state) -> (state, out)`."""
    out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                       jax.eval_shape(lambda s: step(0, s)[1], state))
    return jax.lax.fori_loop(0, times, lambda i, carry: step(i, carry[0]), (state, out))[1]


def _one_longer(state: State, k: int) -> State:
    """The state with one more token committed in every row, and blocks for it."""
    return grow(
        state.replace(sequences=state.sequences.replace(lengths=state.sequences.lengths + 1)), k)


@partial(jax.jit, static_argnames=("k", "features", "times"))
def verification(policy: Policy, state: State, *, k: int, features: tuple[int, ...],
                 times: int) -> tuple[Trunk, jax.Array]:
    """`times` passes over the weights with K + 1 positions a row, output head included.

    times: at most the sampling's max_new_tokens, which is what the pool has room for.
    Returns the last pass's trunk [N, K + 1, D] and logits float32 [N, K + 1, V].
    """
    def step(i, state):
        tokens = (state.sequences.tokens[:, :k + 1] + i) % policy.config.vocab_size
        trunk, cache = verify(policy, tokens, state.cache, state.sequences.lengths - 1,
                              depths=features)
        scores = logits(policy, trunk.hidden.reshape(-1, trunk.hidden.shape[-1]))
        return _one_longer(state.replace(cache=cache),
                           k), (trunk, scores.reshape(*tokens.shape, -1))

    return _repeated(step, state, times)


@partial(jax.jit, static_argnames=("rule", "k", "times"))
def drafting(policy: Policy, draft: Draft, state: State, trunk: Trunk, key: jax.Array, *, rule: str,
             k: int, times: int) -> Proposal:
    """`times` proposals of K tokens, each followed by what the drafter does once they are judged:
    of every proposal the first token is committed. Returns the last one.

    Args:
      draft: prepared; `state` holds its own over the prompts, and the policy's cache.
      trunk: what it is shown of the verification, [N, K + 1, ...]. key: raw, of the noise.
    """
    def step(_, state):
        rows = rows_in_slots(state)
        proposal, after = propose(policy, draft, state, rows,
                                  NOISE[rule](key, rows.ids, rows.lengths, k), 0, k)
        tokens = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
        observation = Observation(trunk, tokens, rows.lengths, jnp.ones_like(rows.lengths))
        of = state.sequences
        at_end = jnp.arange(of.tokens.shape[1]) == rows.lengths[:, None]
        state = state.replace(draft=draft.drafter.observe(policy, draft, after, observation),
                              sequences=of.replace(tokens=jnp.where(at_end, tokens[:, :1],
                                                                    of.tokens)),
                              cache=state.cache if proposal.cache is None else proposal.cache)
        return _one_longer(state, k), proposal.replace(cache=None)

    return _repeated(step, state, times)


@partial(jax.jit, static_argnames="rule")
def verdict(policy: Policy, state: State, scores: jax.Array, proposal: Proposal, key: jax.Array, *,
            rule: str) -> Verdict:
    """The verdict on one proposal, over logits that are there already; its noise is made here
    too."""
    rows = rows_in_slots(state)
    noise = NOISE[rule](key, rows.ids, rows.lengths, proposal.tokens.shape[1])
    return judge(policy, scores, proposal.tokens, proposal.log_q, noise, rows.temperature,
                 rows.top_p, draft_vocab=proposal.vocab)


def by_position(stats: Any) -> np.ndarray:
    """float [K], the share of cycles in which the draft at each position was accepted."""
    return np.asarray(stats.accepted) / np.maximum(np.asarray(stats.drafted), 1)
