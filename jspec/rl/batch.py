"""What an update learns from: prompts and the sequences that continue them, with their
advantages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jspec.model import Trunk
from jspec.sharding import batch_shards, constrain
from jspec.speculate import PromptBatch, Rollout


@struct.dataclass
class TrainBatch:
    """P prompts and the N sequences that continue them, row i prompt i // (N // P).

    Attributes:
      prompts: int32 [P, L], right-padded. prompt_lengths: int32 [P].
      tokens: int32 [N, T], the responses.
      logprobs: float32 [N, T], of the responses' tokens, from the verifier.
      mask: bool [N, T], the responses' tokens that are trained.
      advantages: float32 [N], or [N, T] of its tokens. None where nothing but the draft learns.
      trunk: the verifier's states (`Rollout.trunk`), or None.
      routes, prompt_routes: the verifier's, as in `Rollout`; None of a dense policy.
      shares: float32 [N], what a trained token of a row counts in the loss
        (`aggregation.token_shares`); None before the update has found it.
      behaviour_logprobs: float32 [N, T], as in `Rollout`; None: they are `logprobs`.
      own_logprobs: float32 [N, T], as in `Rollout`.
    """

    prompts: jax.Array
    prompt_lengths: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    mask: jax.Array
    advantages: jax.Array | None
    trunk: Trunk | None = None
    routes: jax.Array | None = None
    prompt_routes: jax.Array | None = None
    shares: jax.Array | None = None
    behaviour_logprobs: jax.Array | None = None
    own_logprobs: jax.Array | None = None

    @property
    def group_size(self) -> int:
        """Sequences of one prompt."""
        return self.tokens.shape[0] // self.prompts.shape[0]


def make_batch(prompts: PromptBatch, rollout: Rollout, advantages: jax.Array | None) -> TrainBatch:
    """What a rollout gives the update to learn from. Jittable."""
    return TrainBatch(prompts.tokens, prompts.lengths, rollout.tokens, rollout.logprobs,
                      rollout.loss_mask, advantages, rollout.trunk, rollout.routes,
                      rollout.prompt_routes, behaviour_logprobs=rollout.behaviour_logprobs,
                      own_logprobs=rollout.own_logprobs)


def without_truncated(rollout: Rollout) -> Rollout:
    """The rollout with nothing to train in the rows that were cut off at the cap (DAPO's overlong
    filtering). Jittable."""
    return rollout.replace(loss_mask=rollout.loss_mask & rollout.finished[:, None])


def part_of(batch: TrainBatch, index: jax.Array | int, parts: int) -> TrainBatch:
    """The index-th of so many equal parts of a batch: whole prompts, and of every shard's as many,
    where there are that many. Jittable; only `parts` is static."""
    shards = batch_shards("train")
    blocks = shards if batch.prompts.shape[0] % (shards * parts) == 0 else 1

    def of_rows(x: jax.Array) -> jax.Array:
        split = x.reshape(blocks, parts, -1, *x.shape[1:])
        taken = jax.lax.dynamic_index_in_dim(split, index, axis=1, keepdims=False)
        return constrain(taken.reshape(-1, *x.shape[1:]), "train", "batch",
                         *(None,) * (x.ndim - 1))

    return batch if parts == 1 else jax.tree.map(of_rows, batch)


def join(prompts: jax.Array, lengths: jax.Array, responses: jax.Array) -> jax.Array:
    """Prompts [P, L, ...] and responses [N, T, ...] as rows [N, L + T, ...] without a gap, zeros
    after them."""
    group, length = responses.shape[0] // prompts.shape[0], prompts.shape[1]
    start, position = jnp.repeat(lengths, group)[:, None], jnp.arange(length + responses.shape[1])
    rows = jnp.concatenate([jnp.repeat(prompts, group, axis=0), responses], axis=1)
    # one column of padding, to read from
    rows = jnp.pad(rows, ((0, 0), (0, 1), *((0, 0),) * (rows.ndim - 2)))
    source = jnp.where(position < start, position,
                       jnp.minimum(length + position - start, rows.shape[1] - 1))
    rows = jnp.take_along_axis(rows, source.reshape(*source.shape, *(1,) * (rows.ndim - 2)), axis=1)
    return constrain(rows, "train", "batch", *(None,) * (rows.ndim - 1))
