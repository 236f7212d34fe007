"""Rows of certain drafts among rows of sampled ones: what is drafted for certain was drawn from a q
that is 1 on it, so that one rule judges all rows of a batch alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jspec.drafts.base import Proposal


def with_certain(proposal: Proposal, tokens: jax.Array, rows: jax.Array,
                 vocab_size: int) -> Proposal:
    """A sampled proposal with `tokens` int32 [B, K], ids of the policy's vocabulary, in the `rows`
    bool [B].

    A reduced vocabulary of V ids grows by those that it does not have: by B K, or all `vocab_size`
    - V that there are, of which those that are not needed are `vocab_size`, which is no token's.
    """
    log_q, vocab = proposal.log_q, proposal.vocab
    ids = jnp.arange(log_q.shape[-1], dtype=jnp.int32)
    if vocab is not None:
        known = jnp.zeros(vocab_size, bool).at[vocab].set(True)
        more = jnp.unique(jnp.where(rows[:, None] & ~known[tokens], tokens, vocab_size),
                          size=min(tokens.size, vocab_size - len(vocab)), fill_value=vocab_size)
        ids = vocab = jnp.concatenate([vocab, more])
        log_q = jnp.pad(log_q, ((0, 0), (0, 0), (0, len(more))), constant_values=-jnp.inf)
    certain = jnp.where(ids == tokens[..., None], jnp.float32(0), -jnp.inf)
    return proposal.replace(tokens=jnp.where(rows[:, None], tokens, proposal.tokens), vocab=vocab,
                            log_q=jnp.where(rows[:, None, None], certain, log_q))
