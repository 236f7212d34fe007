"""What goes into a rollout: immutable pytrees, with every field's shape; what comes out is in
`results.py`."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jspec.arguments import (
    INT32,
    is_whole,
    one_of,
    optional,
    random_key,
    settle,
    show,
    unmasked,
    whole,
    whole_numbers,
    wrong,
)
from jspec.choices import MAX_NEW_TOKENS, MOST_SAMPLES
from jspec.errors import InputError
from pallas_kernels import noise
from pallas_kernels.rejection_sampling import is_cut

NOISE = {"rejection": noise.rejection_noise, "block": noise.block_noise,
         "coupled": noise.coupled_noise}
"""Of every rule the noise that it judges by, which is all that tells one from another."""

# prompt lengths are padded up to one of these, so that a new length is seldom a new compilation
BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144,
           8192, 16384, 32768)


_GROUP = whole(1, MOST_SAMPLES)

Schedule = tuple[tuple[int, int], ...]
"""(rows, k): up to that many live rows draft k."""


def _drafted(label: str, value: Any) -> int | Schedule:
    """A number of drafts, or a schedule: sorted by rows."""
    if isinstance(value, str) and value == "auto":
        raise InputError(f"{label} = 'auto' is for configurations; give what "
                         "jspec.choose_k(params, draft_params, batch) finds to be best here")
    if not isinstance(value, list | tuple):
        return whole(hint="; 0 turns speculation off")(label, value)
    if not value or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value):
        raise wrong(label, value,
                    "a number or a schedule of (rows, k) pairs, such as ((4, 7), (16, 3))")
    pairs = sorted((whole(1)(f"{label}: rows", rows), whole()(f"{label}: k", k))
                   for rows, k in value)
    if len({rows for rows, _ in pairs}) < len(pairs):
        raise InputError(f"{label}: a schedule gives one k for each number of rows; {pairs} has "
                         "two")
    return tuple(pairs)


@struct.dataclass
class PromptBatch:
    """P prompts, each to be continued by `group_size` sequences; N = P x group_size, row i belongs
    to i // group_size.

    Attributes:
      tokens: int32 [P, L], right-padded.
      lengths: int32 [P], each at least 1.
      sequence_ids: int32 [N], global over all processes; together with `key` they name a sequence's
        noise.
      key: a typed key (`jax.random.key`). The same key gives the same noise: fold the step into it.
      group_size: static.
      expected_lengths: int32 [P], how long the outputs of each prompt are thought to become, or
        None. Where sequences wait for a slot (`Batching`) those of the longest get one first, else
        they get it in order: nothing else follows from it.
    """

    tokens: jax.Array
    lengths: jax.Array
    sequence_ids: jax.Array
    key: jax.Array
    group_size: int = struct.field(pytree_node=False)
    expected_lengths: jax.Array | None = None

    def __post_init__(self) -> None:
        settle(self, "", group_size=_GROUP)

    @classmethod
    def from_tokens(cls, prompts: Sequence[Sequence[int]], *, group_size: int,
                    seed: int | jax.Array, sequence_ids: Sequence[int] | None = None,
                    buckets: Sequence[int] = BUCKETS, pad_token: int = 0,
                    expected_lengths: Sequence[int] | None = None) -> PromptBatch:
        """Pad token lists to a bucket.

        Args:
          prompts: lists or integer arrays of token ids, none of them empty.
          group_size: sequences for each prompt.
          seed: a whole number from 0 to 2**64 - 1 or a typed key. No default: a silent constant
            would give every step the same noise.
          sequence_ids: N distinct whole numbers below 2**31; 0..N-1 by default.
          buckets: ascending lengths to pad to.
          expected_lengths: one for each prompt, or None.

        Raises InputError for an empty batch, an empty prompt, text, masked arrays, ids that are no
        whole numbers or do not fit int32, a prompt longer than the largest bucket, and an argument
        of another kind. Ids that the policy does not have, those below 0 among them, are refused by
        the rollout, which knows its vocabulary.
        """
        rows, group_size = _token_rows(prompts), _GROUP("group_size", group_size)
        buckets, pad_token = whole_numbers("buckets", buckets), whole()("pad_token", pad_token)
        if not buckets or list(buckets) != sorted(buckets):
            raise InputError("buckets must be lengths to pad to, ascending")
        lengths = [len(row) for row in rows]
        bucket = next((b for b in buckets if b >= max(lengths)), None)
        if bucket is None:
            raise InputError(f"prompt {int(np.argmax(lengths))} has {max(lengths)} tokens, more "
                             f"than the longest bucket, {buckets[-1]}; shorten it or pass buckets=")
        tokens = np.full((len(rows), bucket), pad_token, np.int32)
        for to, row in zip(tokens, rows, strict=True):
            to[: len(row)] = row
        ids = (range(len(rows) * group_size) if sequence_ids is None
               else whole_numbers("sequence_ids", sequence_ids))
        if len(ids) != len(rows) * group_size or len(set(ids)) != len(ids):
            raise InputError(f"sequence_ids must be {len(rows) * group_size} distinct integers "
                             f"(prompts x group_size); got {len(ids)}, {len(set(ids))} of them "
                             "distinct")
        expected = (None if expected_lengths is None
                    else whole_numbers("expected_lengths", expected_lengths))
        if expected is not None and len(expected) != len(rows):
            raise InputError(f"expected_lengths must be one number for each of the {len(rows)} "
                             f"prompts; got {len(expected)}")
        return cls(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32),
                   jnp.asarray(ids, jnp.int32), random_key("seed", seed), group_size,
                   None if expected is None else jnp.asarray(expected, jnp.int32))


def _token_rows(prompts: Any) -> list[np.ndarray]:
    """Integer arrays [length], one a prompt."""
    expected = "lists of token ids, such as [[1, 2, 3], [4, 5]]"
    if isinstance(prompts, Mapping) and "input_ids" in prompts:  # what a tokenizer returns
        raise InputError(f"prompts is a {type(prompts).__name__}, and must be {expected}; give its "
                         "[\"input_ids\"]")
    if isinstance(prompts, str | bytes | Mapping | Set):
        raise wrong("prompts", prompts, expected)
    unmasked("prompts", prompts)
    try:
        prompts = list(np.asarray(prompts) if isinstance(prompts, jax.Array) else prompts)
    except Exception:  # no collection, one that is traced, or what an object's own methods raise
        raise wrong("prompts", prompts, expected) from None
    if not prompts:
        raise InputError(f"a batch needs prompts, and there are 0 prompts; they must be {expected}")
    return [_token_row(i, prompt) for i, prompt in enumerate(prompts)]


def _token_row(i: int, prompt: Any) -> np.ndarray:
    if isinstance(prompt, str | bytes):
        raise InputError(f"prompt {i} is {show(prompt)}; prompts must be lists of token ids, not "
                         "text; encode them with the model's tokenizer")
    if isinstance(prompt, numbers.Number | np.generic):
        raise InputError(f"prompt {i} is the number {show(prompt)}, and must be a list of token "
                         "ids; a single prompt is a batch too: [[1, 2, 3]]")
    unmasked(f"prompt {i}", prompt)
    try:
        row = np.asarray(prompt)
        empty = len(prompt) == 0
        has_flag = (isinstance(prompt, list | tuple)
                    and any(isinstance(token, bool | np.bool_) for token in prompt))
    except Exception:
        # lists of different lengths, traced values, or what an object's own methods raise
        raise wrong(f"prompt {i}", prompt, "a list of token ids") from None
    if empty:
        raise InputError(f"prompt {i} is empty; a prompt needs at least one token")
    if row.ndim != 1 or not (is_whole(row.dtype) or row.dtype == object):
        raise InputError(f"prompt {i} must be a list of token ids, whole numbers, and not "
                         f"{row.dtype} of shape {row.shape}")
    if row.dtype == object or has_flag or row.max() > INT32 or row.min() < -INT32:
        raise InputError(f"prompt {i} holds what is no token id: they are whole numbers from 0 to "
                         f"{INT32}")
    return row


@struct.dataclass
class Sampling:
    """How tokens are drawn. temperature, top_p, min_p and limit are leaves, the rest is static.

    Attributes:
      max_new_tokens: the cap on generated tokens, the end token included.
      min_new_tokens: end tokens are banned until this many tokens have been generated.
      temperature: scalar or [N]; 0 (in any row) is greedy.
      top_k: 0 is off.
      top_p: scalar or [N], or None for off; a plain 1.0 is off too.
      min_p: scalar or [N], or None for off; a plain 0.0 is off too. Tokens less than min_p times as
        likely as the likeliest that top_k and top_p left are cut off.
      stop_tokens: ids in any collection; None means the checkpoint's end tokens; () means none.
      limit: scalar or [N], each sequence's own cap, from 1 to max_new_tokens; None: max_new_tokens.

    Raises InputError for a static field that is of another type or out of range. Leaves are judged
    by the rollout.
    """

    temperature: Any = 1.0
    top_p: Any = None
    max_new_tokens: int = struct.field(pytree_node=False, default=MAX_NEW_TOKENS)
    min_new_tokens: int = struct.field(pytree_node=False, default=0)
    top_k: int = struct.field(pytree_node=False, default=0)
    stop_tokens: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    limit: Any = None
    min_p: Any = None

    def __post_init__(self) -> None:
        settle(self, "sampling ", max_new_tokens=whole(1), min_new_tokens=whole(),
               top_k=whole(hint="; 0 turns it off"), stop_tokens=optional(whole_numbers))
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError("sampling needs 0 <= min_new_tokens <= max_new_tokens >= 1; got "
                             f"{self.min_new_tokens} and {self.max_new_tokens}")
        # off must be visible when tracing: truncation by top_p sorts the vocabulary
        for name, off in (("top_p", 1), ("min_p", 0)):
            value = getattr(self, name)
            if isinstance(value, numbers.Real) and value == off and not isinstance(value, bool):
                object.__setattr__(self, name, None)

    @property
    def cuts(self) -> bool:
        """Whether unlikely tokens are cut off: known when tracing."""
        return is_cut(self.top_k, self.top_p, self.min_p)


@struct.dataclass
class Speculation:
    """How drafts are made and judged; all static.

    Attributes:
      k: drafted tokens a cycle, 0 for none; or a schedule of them by live rows (of one shard of the
        batch axes): ((4, 7), (16, 3)): up to 4 rows draft 7, up to 16 draft 3, more draft none.
      rule: "rejection", "block" or "coupled". All are lossless; block judges the drafts of a cycle
        together, and on average accepts as many as rejection or more; coupled also reproduces,
        token for token, what autoregressive decoding with the same key gives.
      kernels: "auto" is the chip's Pallas kernels where they take the shapes, else the reference;
        "reference" is plain JAX; "pallas" is the kernels or an error (a CPU interprets them,
        slowly). Or an `Implementation`.
      depths: of the trunk (see `model.Trunk`): the rollout returns their states as the verifier
        computed them, besides the final hidden states, so that a draft can be trained without
        another forward. (): the final ones alone; None: no states.

    Raises InputError for a field of another type, an unknown rule, a k below 0, and a schedule that
    is none.
    """

    k: int | Schedule = struct.field(pytree_node=False, default=3)
    rule: str = struct.field(pytree_node=False, default="rejection")
    kernels: Any = struct.field(pytree_node=False, default="auto")
    depths: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        settle(self, "speculation ", k=_drafted, rule=one_of(NOISE), depths=optional(whole_numbers))

    @property
    def most(self) -> int:
        """The most that a cycle drafts."""
        return self.k if isinstance(self.k, int) else max(k for _, k in self.k)

    def without_drafts(self) -> Speculation:
        """The same with nothing drafted; the loops that a schedule names stay."""
        return self.replace(k=0 if isinstance(self.k, int)
                            else tuple((rows, 0) for rows, _ in self.k))


@struct.dataclass
class Batching:
    """How sequences share the device; all static.

    Attributes:
      slots: sequences in flight at most, over all shards of the batch axes; one that ends makes
        room for the next. None: all of them.
      kv_tokens: positions of keys and values on the device, in blocks, over all shards of the batch
        axes and for the prompts too. Where they do not suffice the youngest sequences wait in host
        memory; nothing is computed twice. None: what the slots need at worst.
      groups: the rollout ends as soon as so many prompts have all their answers; the rest is as far
        as it came (`Rollout.done`). On several shards of the batch axes each ends when its share is
        done, by itself. What ends early is short: those groups are no fair sample of the policy's
        answers. None: all of them.

    Raises InputError for what is no whole number of at least 1.
    """

    slots: int | None = struct.field(pytree_node=False, default=None)
    kv_tokens: int | None = struct.field(pytree_node=False, default=None)
    groups: int | None = struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        settle(self, "batching ", slots=optional(whole(1)), kv_tokens=optional(whole(1)),
               groups=optional(whole(1)))
