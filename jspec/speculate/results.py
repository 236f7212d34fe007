"""What comes out of a rollout: immutable pytrees, with every field's shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jspec.model import Trunk


@struct.dataclass
class RolloutStats:
    """Counts over live rows' cycles.

    Attributes:
      cycles: int32 [N], of each row.
      drafted: int32 [K], by draft position: drafts that could have been emitted. What lies after a
        drafted end token or beyond the cap could not, whatever the verdict, and is not counted.
      accepted: int32 [K], those of them that were emitted. accepted / drafted is an unbiased
        measure of the draft.
      loop_cycles: int32 [D, loops], of each loop of the chain on each of D shards of the batch
        axes, which do not wait for each other. loop_live: int32 [D, loops], the live rows of all
        those cycles.
      blocks: int32 [D], the most KV blocks that were in use at one time. pauses: int32 [D], how
        often a sequence had to leave the device.
      slots, ks: static, the rows that each loop is compiled for, and what it drafts.
    """

    cycles: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    loop_cycles: jax.Array | None = None
    loop_live: jax.Array | None = None
    blocks: jax.Array | None = None
    pauses: jax.Array | None = None
    slots: tuple[int, ...] = struct.field(pytree_node=False, default=())
    ks: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @property
    def occupancy(self) -> jax.Array:
        """Live rows over computed rows, float32 scalar: 1 where no cycle computes a row that is
        over."""
        return (self.loop_live.sum() / jnp.maximum((self.loop_cycles * jnp.array(self.slots)).sum(),
                                                   1))


@struct.dataclass
class Rollout:
    """N generated sequences of at most T = max_new_tokens tokens.

    Attributes:
      tokens: int32 [N, T], the pad token where `mask` is false.
      mask: bool [N, T], true for every generated token, the end token included.
      logprobs: float32 [N, T], log-softmax(logits / T) of each token over the whole vocabulary,
        with no truncation and no bans, from the verifier's own logits; at temperature 0 with T = 1.
        0 where `mask` is false.
      behaviour_logprobs: float32 [N, T], log-probability of each token under what it was drawn
        from: the distribution after end-token ban, temperature, top-k, top-p and min-p, normalised;
        0 at temperature 0, where it was certain, and where `mask` is false. None without top_k,
        top_p and min_p.
      own_logprobs: float32 [N, T]; None from a rollout. Where an update is to know them, what its
        own forward made of the tokens before its first step (`jspec.rl.rescore`).
      loss_mask: bool [N, T], what the update trains; equal to `mask`, unless a caller leaves tokens
        out.
      entropy: float32 [N, T], nats, of the distribution that `logprobs` is taken from.
      lengths: int32 [N], generated tokens.
      finished: bool [N], false where the cap cut the sequence before an end token.
      done: bool [N], false where the rollout ended before the sequence did (`Batching.groups`); of
        such a one the tokens so far are here.
      stats: `RolloutStats`.
      trunk: with `Speculation.depths`, a `Trunk` over [N, S] in the compute dtype: entry p of a row
        is the state at position p of prompt and output without a gap, zero from its last token on
        (which nothing came after).
      routes: uint8 [N, T, sparse layers, top_k], the experts that the verifier computed each token
        with, when it came after it; the last one it never had, and there, as outside of `mask`, the
        experts in turn. None of a dense policy. prompt_routes: uint8 [P, L, sparse layers, top_k],
        those of the prompts.
    """

    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    loss_mask: jax.Array
    entropy: jax.Array
    lengths: jax.Array
    finished: jax.Array
    stats: RolloutStats
    trunk: Trunk | None = None
    routes: jax.Array | None = None
    prompt_routes: jax.Array | None = None
    behaviour_logprobs: jax.Array | None = None
    own_logprobs: jax.Array | None = None
    done: jax.Array | None = None

    @property
    def acceptance_length(self) -> jax.Array:
        """Mean tokens emitted a cycle, float32 scalar: 1 for autoregressive decoding."""
        return self.lengths.sum() / jnp.maximum(self.stats.cycles.sum(), 1)
