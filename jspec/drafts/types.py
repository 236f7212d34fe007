"""What passes between a rollout, an update and a drafter (`jspec.drafts.base`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jspec.kernels import draw, whole_vocabulary
from jspec.model import Cache, KeyValues, Trunk
from jspec.model.pool import cache_of
from pallas_kernels.noise import Noise
from pallas_kernels.rejection_sampling import process_logits


@struct.dataclass
class Prefill:
    """What the policy computed over P prompts: trunk [P, L, ...], tokens int32 [P, L], lengths
    int32 [P].

    key: uint32 [2], of the batch: to know a rollout's noise again by, and not to make any.
    """

    trunk: Trunk
    tokens: jax.Array
    lengths: jax.Array
    key: jax.Array | None = None


@struct.dataclass
class DraftState:
    """A drafter's state of B rows.

    Attributes:
      rows: a pytree whose leaves lead with rows.
      cache: its own keys and values, in the blocks that the policy's cache has for the same rows;
        None: it keeps none.
    """

    rows: Any
    cache: Cache | None = None

    @classmethod
    def of_prompts(cls, rows: Any, key_values: KeyValues, positions: int) -> DraftState:
        """What `start` returned, as the state of rows that are the prompts, each with room for
        `positions`."""
        return cls(rows, cache_of(key_values, positions) if key_values else None)


@struct.dataclass
class Committed:
    """Every row's tokens so far, prompt included: tokens int32 [B, S], garbage from lengths int32
    [B] on.

    Attributes:
      cache: the policy's. The last committed token is pending: its keys and values, at lengths - 1,
        are not there yet.
      all_tokens, all_lengths: int32 [N, S] and [N], the same of all sequences of the batch that are
        on this device, those that are not in a slot too; None: the rows are all there is.
      sequences: int32 [B], which of them each row is; None: row i is sequence i.
      group_size: static. Each group_size adjacent sequences, from the first one on, continue one
        prompt; 1: nothing is said of that.
    """

    tokens: jax.Array
    lengths: jax.Array
    cache: Cache | None = None
    all_tokens: jax.Array | None = None
    all_lengths: jax.Array | None = None
    sequences: jax.Array | None = None
    group_size: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class Proposal:
    """What is drafted, for the rule to judge.

    Attributes:
      tokens: int32 [B, K], ids of the policy's vocabulary.
      log_q: float32 [B, K, Vd], the normalised log-probabilities that they were drawn from; None:
        deterministic.
      vocab: int32 [Vd], the ids of a reduced vocabulary, outside of which q is 0; None: Vd is the
        policy's.
      cache: the policy's, if the drafter wrote to it, and then only at positions lengths - 1 ..
        lengths - 1 + K, which the verifier writes next (so that no copy of it is made); None: it
        did not.
    """

    tokens: jax.Array
    log_q: jax.Array | None = None
    vocab: jax.Array | None = None
    cache: Cache | None = None


@struct.dataclass
class Observation:
    """What a cycle computed and committed.

    Attributes:
      trunk: over the K + 1 verified positions, [B, K + 1, ...]; entry j is the state at position
        lengths - 1 + j.
      tokens: int32 [B, K + 1]; the first `count` are committed, at positions lengths .. lengths +
        count - 1.
      lengths: int32 [B], committed tokens when the cycle began.
      count: int32 [B], 0 for a row that was done.
    """

    trunk: Trunk
    tokens: jax.Array
    lengths: jax.Array
    count: jax.Array


@struct.dataclass
class DraftBatch:
    """What a draft is trained on: B rows of prompt and response without a gap, and what the policy
    computed of them.

    Attributes:
      trunk: [B, S, ...], the policy's states, with the features that the drafter asks for.
        Detached.
      tokens: int32 [B, S]. response_start: int32 [B], position of the first response token, at
        least 1.
      mask: bool [B, T], the response's tokens that are trained.
      logprobs: float32 [B, T], of the response's tokens, log-softmax(logits / temperature) over the
        whole vocabulary, from these very states.
      temperature: float32 scalar or [B], the sampling temperature; 0 counts as 1.
      turn: int32 scalar, how often the rows have been learned from, or anything else that differs:
        a drafter that learns from some positions only takes others in another turn.
    """

    trunk: Trunk
    tokens: jax.Array
    response_start: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    temperature: jax.Array
    turn: jax.Array | int = 0

    def predicting(self, x: jax.Array) -> jax.Array:
        """The entries of x [B, S, D] at the positions that predict the response's tokens,
        [B, T, D]."""
        at = self.response_start[:, None] - 1 + jnp.arange(self.mask.shape[1])[None]
        return jnp.take_along_axis(x, at[:, :, None], axis=1, mode="clip")

    def response(self) -> jax.Array:
        """The response's tokens, int32 [B, T]."""
        at = self.response_start[:, None] + jnp.arange(self.mask.shape[1])[None]
        return jnp.take_along_axis(self.tokens, at, axis=1, mode="clip")


@struct.dataclass
class Sampler:
    """The rule's noise and the sampling that a drafter draws with; a drafter never makes noise of
    its own.

    Attributes:
      noise: of this cycle.
      temperature: float32 [B]. top_p, min_p: float32 [B] or None. top_k, k: static.
      layout: of the policy, which says how rows and whole vocabularies are split.
    """

    noise: Noise
    temperature: jax.Array
    top_p: jax.Array | None
    top_k: int = struct.field(pytree_node=False)
    k: int = struct.field(pytree_node=False)
    layout: str = struct.field(pytree_node=False, default="rollout")
    min_p: jax.Array | None = None

    def draw(self, logits: jax.Array, offset: int,
             vocab: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Draw draft token `offset`, int32 [B], from logits [B, Vd]; returns it with the log q it
        was drawn from.

        vocab: int32 [Vd], the ids of a reduced vocabulary; None: they are 0..Vd-1.
        """
        if self.top_k or self.top_p is not None:
            logits = whole_vocabulary(self.layout, logits)
        log_q = process_logits(logits, self.temperature, self.top_p, top_k=self.top_k,
                               min_p=self.min_p)
        return draw(self.layout, log_q, self.noise, offset, vocab), log_q
