"""What goes into a rollout and what comes out: immutable pytrees, with every field's shape."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jspec.errors import InputError
from jspec.model import Trunk
from pallas_kernels.noise import seed_key

# prompt lengths are padded up to one of these, so that a new length is seldom a new compilation
BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768)


@struct.dataclass
class PromptBatch:
    """P prompts, each to be continued by `group_size` sequences; N = P x group_size, row i belongs to i // group_size.

    Attributes:
      tokens: int32 [P, L], right-padded.
      lengths: int32 [P], each at least 1.
      sequence_ids: int32 [N], global over all processes; together with `key` they name a sequence's noise.
      key: a typed key (`jax.random.key`). The same key gives the same noise: fold the step into it.
      group_size: static.
    """

    tokens: jax.Array
    lengths: jax.Array
    sequence_ids: jax.Array
    key: jax.Array
    group_size: int = struct.field(pytree_node=False)

    @classmethod
    def from_tokens(cls, prompts: Sequence[Sequence[int]], *, group_size: int, seed: int | jax.Array,
                    sequence_ids: Sequence[int] | None = None, buckets: Sequence[int] = BUCKETS,
                    pad_token: int = 0) -> PromptBatch:
        """Pad token lists to a bucket.

        Args:
          prompts: lists of token ids, none of them empty.
          group_size: sequences for each prompt.
          seed: an integer or a typed key. No default: a silent constant would give every step the same noise.
          sequence_ids: N distinct integers; 0..N-1 by default.
          buckets: ascending lengths to pad to.

        Raises InputError for an empty batch, an empty prompt, text, or a prompt longer than the largest bucket.
        """
        if not len(prompts) or group_size < 1:
            raise InputError(f"a batch needs prompts and group_size >= 1; got {len(prompts)} prompts, {group_size}")
        if isinstance(prompts[0], str):
            raise InputError("prompts must be lists of token ids, not text; encode them with the model's tokenizer")
        lengths = [len(p) for p in prompts]
        if min(lengths) == 0:
            raise InputError(f"prompt {lengths.index(0)} is empty; a prompt needs at least one token")
        bucket = next((b for b in buckets if b >= max(lengths)), None)
        if bucket is None:
            raise InputError(f"prompt {int(np.argmax(lengths))} has {max(lengths)} tokens, more than the longest "
                             f"bucket, {buckets[-1]}; shorten it or pass buckets=")
        tokens = np.full((len(prompts), bucket), pad_token, np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        rows = len(prompts) * group_size
        ids = np.arange(rows) if sequence_ids is None else np.asarray(sequence_ids)
        if ids.shape != (rows,) or len(np.unique(ids)) != rows:
            raise InputError(f"sequence_ids must be {rows} distinct integers (prompts x group_size); got shape "
                             f"{ids.shape}")
        key = seed_key(seed) if isinstance(seed, numbers.Integral) else seed
        return cls(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32), jnp.asarray(ids, jnp.int32), key, group_size)


@struct.dataclass
class Sampling:
    """How tokens are drawn. temperature and top_p are leaves, the rest is static.

    Attributes:
      max_new_tokens: the cap on generated tokens, the end token included.
      min_new_tokens: end tokens are banned until this many tokens have been generated.
      temperature: scalar or [N]; 0 (in any row) is greedy.
      top_k: 0 is off.
      top_p: scalar or [N], or None for off; a plain 1.0 is off too.
      stop_tokens: None means the checkpoint's end tokens; () means none.
    """

    temperature: Any = 1.0
    top_p: Any = None
    max_new_tokens: int = struct.field(pytree_node=False, default=256)
    min_new_tokens: int = struct.field(pytree_node=False, default=0)
    top_k: int = struct.field(pytree_node=False, default=0)
    stop_tokens: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

    def __post_init__(self):
        # off must be visible when tracing: truncation by top_p sorts the vocabulary
        if isinstance(self.top_p, numbers.Real) and self.top_p >= 1:
            object.__setattr__(self, "top_p", None)
        if isinstance(self.stop_tokens, list):
            object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))


@struct.dataclass
class Speculation:
    """How drafts are made and judged; all static.

    Attributes:
      k: drafted tokens a cycle, 0 for none.
      rule: "rejection", "block" or "coupled". All are lossless; block judges the drafts of a cycle together, and on
        average accepts as many as rejection or more; coupled also reproduces, token for token, what autoregressive
        decoding with the same key gives.
      kernels: "auto" is the chip's Pallas kernels where they take the shapes, else the reference; "reference" is plain
        JAX; "pallas" is the kernels or an error (a CPU interprets them, slowly). Or an `Implementation`.
      states: trunk depths (see `model.Trunk`) that the rollout returns as the verifier computed them, besides the final
        hidden states, so that a draft can be trained without another forward; None: it returns no states.
    """

    k: int = struct.field(pytree_node=False, default=3)
    rule: str = struct.field(pytree_node=False, default="rejection")
    kernels: Any = struct.field(pytree_node=False, default="auto")
    states: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class RolloutStats:
    """cycles: int32 [N], of each row; drafted, accepted: int32 [K], by draft position, over live rows' cycles."""

    cycles: jax.Array
    drafted: jax.Array
    accepted: jax.Array


@struct.dataclass
class Rollout:
    """N generated sequences of at most T = max_new_tokens tokens.

    Attributes:
      tokens: int32 [N, T], the pad token where `mask` is false.
      mask: bool [N, T], true for every generated token, the end token included.
      logprobs: float32 [N, T], log-softmax(logits / T) of each token over the whole vocabulary, with no truncation and
        no bans, from the verifier's own logits; at temperature 0 with T = 1. 0 where `mask` is false.
      loss_mask: bool [N, T], what the update trains; equal to `mask`, unless a caller leaves tokens out.
      entropy: float32 [N, T], nats, of the distribution that `logprobs` is taken from.
      lengths: int32 [N], generated tokens.
      finished: bool [N], false where the cap cut the sequence before an end token.
      stats: `RolloutStats`.
      trunk: with `Speculation.states`, a `Trunk` over [N, S] in the compute dtype: entry p of a row is the state at
        position p of prompt and output without a gap, zero from its last token on (which nothing came after).
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

    @property
    def acceptance_length(self) -> jax.Array:
        """Mean tokens emitted a cycle, float32 scalar: 1 for autoregressive decoding."""
        return self.lengths.sum() / jnp.maximum(self.stats.cycles.sum(), 1)
