"""`jspec.rollout`: prefill each prompt once, then a chain of loops of speculative cycles until all
is done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec

from jspec.drafts.base import Draft, DraftState, Prefill
from jspec.kernels import choose, picked
from jspec.model import Cache, KeyValues, Policy, Trunk, prefill, to_rollout
from jspec.model.experts import weight_specs
from jspec.model.pool import all_free, blocks_of, write_prompts
from jspec.sharding import batch_axes, batch_shards, constrain, current_mesh
from jspec.speculate.arguments import answerable, check, in_32_bits
from jspec.speculate.blocks import Blocks, prompts_of_shards
from jspec.speculate.collect import collect, collect_routes
from jspec.speculate.cycle import split_features
from jspec.speculate.loops import decode, loops
from jspec.speculate.pausing import none_paused
from jspec.speculate.results import Rollout, RolloutStats
from jspec.speculate.state import Counts, Prompts, Sequences, State, admit
from jspec.speculate.types import Batching, PromptBatch, Sampling, Speculation
from pallas_kernels.noise import key_words

log = logging.getLogger(__name__)


@struct.dataclass
class Prefilled:
    """What was computed of P prompts; every leaf leads with them.

    Attributes:
      tokens, lengths: as in the batch. key_values: the policy's. draft_rows, draft_key_values: what
        `start` of the drafter returned, None and () without one.
      trunk: the states to be returned, over [P, L], or None.
      routes: uint8 [P, L, sparse layers, top_k], None of a dense policy.
    """

    tokens: jax.Array
    lengths: jax.Array
    key_values: KeyValues
    draft_rows: Any
    draft_key_values: KeyValues
    trunk: Trunk | None
    routes: jax.Array | None = None


@struct.dataclass
class Asked:
    """What is asked of N sequences, see `Sequences`; done: those that have no answer. expected:
    int32 [N] or None, see `PromptBatch.expected_lengths`."""

    ids: jax.Array
    prompts: jax.Array
    done: jax.Array
    temperature: jax.Array
    top_p: jax.Array | None
    min_p: jax.Array | None
    limit: jax.Array
    expected: jax.Array | None


def prefill_prompts(policy: Policy, draft: Draft | None, batch: PromptBatch,
                    depths: tuple[int, ...] | None) -> Prefilled:
    """The prompts, computed. draft: prepared, or None. depths: see `Speculation`."""
    features = () if draft is None else draft.drafter.features(draft.config)
    length = batch.tokens.shape[1]
    tokens = jnp.clip(batch.tokens, 0, policy.config.vocab_size - 1)  # of rows that have no answer
    lengths = jnp.clip(batch.lengths, 1, length)
    computed, key_values = prefill(policy, tokens, depths=(*features, *(depths or ())))
    trunk, kept = split_features(computed, len(features))
    rows, of_draft = None, ()
    if draft is not None:
        rows, of_draft = draft.drafter.start(policy, draft,
                                             Prefill(trunk, tokens, lengths, key_words(batch.key)))
    return Prefilled(tokens, lengths, key_values, rows, of_draft, None if depths is None else kept,
                     computed.routes)


def _asked(policy: Policy, batch: PromptBatch, sampling: Sampling, shards: int) -> Asked:
    """Of all sequences; `prompts` counts from the first prompt of a sequence's own shard."""
    rows = batch.tokens.shape[0] * batch.group_size
    sequence = np.arange(rows)
    first = sequence // (rows // shards) * (rows // shards)
    limit = sampling.max_new_tokens if sampling.limit is None else sampling.limit

    def by_row(x, dtype) -> jax.Array:
        return constrain(jnp.broadcast_to(jnp.asarray(x, dtype), (rows,)), policy.layout, "batch")

    return Asked(by_row(batch.sequence_ids, jnp.int32),
                 by_row(sequence // batch.group_size - first // batch.group_size, jnp.int32),
                 by_row(~answerable(policy.config, batch, sampling), bool),
                 by_row(sampling.temperature, jnp.float32),
                 None if sampling.top_p is None else by_row(sampling.top_p, jnp.float32),
                 None if sampling.min_p is None else by_row(sampling.min_p, jnp.float32),
                 by_row(limit, jnp.int32), None if batch.expected_lengths is None
                 else by_row(jnp.repeat(batch.expected_lengths, batch.group_size), jnp.int32))


def begin(policy: Policy, prefilled: Prefilled, asked: Asked, *, cap: int, slots: int, k: int,
          chain: int, group_size: int, cuts: bool, kv_tokens: int | None = None,
          shards: int = 1) -> State:
    """The state before the first sequence has a slot.

    Args:
      cap: the most that a sequence generates. k: the most that a cycle drafts. chain: how many
        loops there will be.
      group_size: how many adjacent sequences continue one prompt, 1 where that is not known.
      kv_tokens: of the pools of all shards, see `Batching`. shards: how many there are of this
        state. cuts: `Sampling.cuts`.
    """
    prompts, length = prefilled.tokens.shape
    rows = asked.ids.shape[0]
    counts = Blocks.of(prompts, length, cap, k)
    size, columns, (blocks,
                    away) = counts.size, counts.columns, counts.pool(slots, kv_tokens, shards)
    needed = blocks_of(prefilled.lengths, size)
    end = jnp.cumsum(needed, dtype=jnp.int32)
    column = jnp.arange(counts.prompt, dtype=jnp.int32)
    table = jnp.where(column < needed[:, None], (end - needed)[:, None] + column, blocks)
    empty = jnp.full((slots, columns), blocks, jnp.int32)

    def pool(key_values: KeyValues) -> Cache:
        cache = write_prompts(key_values, table, blocks, size).replace(table=empty)
        return jax.tree.map(lambda x: constrain(x, policy.layout, None, "kv_heads", None,
                                                None) if x.ndim == 4 else x, cache)

    draft = None
    if prefilled.draft_rows is not None:
        of_slots = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype),
                                prefilled.draft_rows)
        of_draft = prefilled.draft_key_values
        draft = DraftState(of_slots, pool(of_draft) if of_draft else None)

    def share(x) -> jax.Array:
        x = jnp.take(x, asked.prompts, axis=0)
        return jnp.pad(x, ((0, 0), (0, cap + k), *((0, 0),) * (x.ndim - 2)))

    lengths = prefilled.lengths[asked.prompts]
    values, model = jnp.zeros((rows, cap + k + 1), jnp.float32), policy.config
    routes = None if model.experts is None else jnp.zeros(
        (*values.shape, len(model.sparse_layers) * model.experts.top_k), jnp.uint8)
    sequences = Sequences(
        asked.ids, asked.prompts, lengths, lengths, share(prefilled.tokens), values, values,
        asked.done, jnp.zeros(rows, bool), asked.temperature, asked.top_p, asked.limit,
        jax.tree.map(share, prefilled.trunk), jnp.zeros(rows, jnp.int32), routes, asked.min_p,
        values if cuts else None, group_size=group_size)
    readers = jnp.zeros(prompts, jnp.int32).at[asked.prompts].add((~asked.done).astype(jnp.int32))
    cache = pool(prefilled.key_values)
    last = (asked.done if asked.expected is None
            else jnp.where(asked.done, 1, -jnp.maximum(asked.expected, 0)))
    waiting = jnp.argsort(last, stable=True).astype(jnp.int32)
    return State(Prompts(prefilled.lengths, table, readers, prefilled.draft_rows), sequences,
                 jnp.full(slots, rows, jnp.int32), cache, draft, all_free(end[-1], blocks, columns),
                 waiting, jnp.int32(0), (~asked.done).sum(dtype=jnp.int32),
                 Counts(*(jnp.zeros(n, jnp.int32) for n in (k, k, chain, chain))),
                 none_paused(cache, draft, waiting, away) if away else None)


def start(policy: Policy, draft: Draft | None, batch: PromptBatch, sampling: Sampling, k: int,
          depths: tuple[int, ...] | None = None) -> State:
    """The state before the first cycle, on one device: the prompts prefilled, each sequence in a
    slot of its own."""
    rows = batch.tokens.shape[0] * batch.group_size
    state = begin(policy, prefill_prompts(policy, draft, batch, depths),
                  _asked(policy, batch, sampling, 1), cap=sampling.max_new_tokens, slots=rows, k=k,
                  chain=1, group_size=batch.group_size, cuts=sampling.cuts)
    return admit(state, k)


def _by_shard(prefilled: Prefilled, policy: Policy, group_size: int, rows: int,
              shards: int) -> Prefilled:
    """The prompts that the sequences of each shard continue, one shard's after the other's."""
    index = prompts_of_shards(rows, group_size, shards).ravel()
    if np.array_equal(index, np.arange(rows // group_size)):
        return prefilled
    return jax.tree.map(lambda x: constrain(x[index], policy.layout, "batch",
                                            *(None,) * (x.ndim - 1)), prefilled)


def _adjacent(rows: int, group_size: int) -> int:
    """How many adjacent ones of a shard's sequences continue one prompt; 1 where groups lie across
    its edges."""
    if rows % group_size == 0:
        return group_size
    return rows if group_size % rows == 0 else 1


def _on_shards(policy: Policy, run: Callable[..., Any], *args: Any) -> Any:
    """run(policy, draft, prefilled, asked, key) on every shard of the batch axes by itself: inside
    there are no collectives across them, so none waits for the longest row of another before the
    end. Those along the axis `expert` compute each other's tokens, and agree on how often they do
    (`sharding.agreed`).

    Axes of one device belong to none of it, and are taken along: then kernels have nothing left to
    split.
    """
    if batch_shards(policy.layout) == 1:
        return run(policy, *args)
    over = batch_axes(policy.layout)
    alone = {name for name, size in current_mesh().shape.items() if size == 1}
    rows, draft = PartitionSpec(over), args[0]
    weights = (weight_specs((policy, draft)) if "expert" in over
               else (PartitionSpec(), PartitionSpec()))
    return jax.shard_map(run, in_specs=(*weights, rows, rows, PartitionSpec()), out_specs=rows,
                         axis_names={*over, *alone}, check_vma=False)(policy, *args)


def continue_prompts(policy: Policy, draft: Draft | None, prefilled: Prefilled, batch: PromptBatch,
                     sampling: Sampling, speculation: Speculation, batching: Batching) -> Rollout:
    """All of a rollout after the prompts. policy, draft: as cycles use them; no draft:
    `speculation` drafts nothing."""
    rows, shards = batch.tokens.shape[0] * batch.group_size, batch_shards(policy.layout)
    slots = min(batching.slots or rows, rows) // shards
    chain = loops(slots, speculation.k, sampling.max_new_tokens)
    stops = policy.config.stop_tokens if sampling.stop_tokens is None else sampling.stop_tokens
    of_prompts, lengths = prefilled.routes, prefilled.lengths
    with jax.named_scope("prefill"):
        prefilled = _by_shard(prefilled.replace(routes=None), policy, batch.group_size, rows,
                              shards)
        asked = _asked(policy, batch, sampling, shards)
    # the leaves are the sequences' own
    static = sampling.replace(temperature=1.0, top_p=None, min_p=None, limit=None)

    def run(policy, draft, prefilled, asked, key) -> tuple[Any, ...]:
        state = begin(policy, prefilled, asked, cap=static.max_new_tokens, slots=slots,
                      k=speculation.most,
                      chain=len(chain), group_size=_adjacent(rows // shards, batch.group_size),
                      kv_tokens=batching.kv_tokens, shards=shards, cuts=sampling.cuts)
        state = decode(policy, draft, state, key, chain, sampling=static, stop_tokens=stops,
                       rule=speculation.rule, depths=speculation.depths,
                       groups=batching.groups and batching.groups // shards)
        used = state.cache.blocks - state.free.fewest
        pauses = jnp.int32(0) if state.paused is None else state.paused.pauses
        return state.sequences, *jax.tree.map(lambda x: x[None], (state.counts, used, pauses))

    with jax.named_scope("decode"):
        sequences, counts, used, pauses = _on_shards(policy, run, draft, prefilled, asked,
                                                     key_words(batch.key))
    with jax.named_scope("collect"):
        stats = RolloutStats(sequences.cycles, counts.drafted.sum(0, dtype=jnp.int32),
                             counts.accepted.sum(0, dtype=jnp.int32), counts.loop_cycles,
                             counts.loop_live, used, pauses, slots=tuple(rows for rows, _ in chain),
                             ks=tuple(k for _, k in chain))
        out = collect(sequences, sampling.max_new_tokens, policy.config.pad_token, stats)
        return out if of_prompts is None else out.replace(**collect_routes(
            policy.config, of_prompts, sequences, lengths, sampling.max_new_tokens))


def ready(params: Policy, draft: Draft | None,
          speculation: Speculation) -> tuple[Policy, Draft | None]:
    """Policy and draft as cycles use them: in a rollout layout, with its kernels, and prepared."""
    with jax.named_scope("prepare"):
        policy = to_rollout(params).replace(kernels=choose(speculation.kernels))
        return policy, None if draft is None else draft.drafter.prepare(policy, draft)


@partial(jax.jit, static_argnames=("speculation", "batching"))
def _rollout(params: Policy, draft: Draft | None, batch: PromptBatch, sampling: Sampling,
             speculation: Speculation, batching: Batching) -> Rollout:
    log.debug("compiling a rollout with %s", picked(speculation.kernels))
    policy, draft = ready(params, draft, speculation)
    if draft is None or speculation.most == 0:
        draft, speculation = None, speculation.without_drafts()
    with jax.named_scope("prefill"):
        prefilled = prefill_prompts(policy, draft, batch, speculation.depths)
    return continue_prompts(policy, draft, prefilled, batch, sampling, speculation, batching)


def rollout(params: Policy, draft_params: Draft | None, batch: PromptBatch, *,
            sampling: Sampling | None = None,
            speculation: Speculation | None = None, batching: Batching | None = None) -> Rollout:
    """Continue every prompt, with exactly the policy's distribution and as few passes over its
    weights as drafts allow.

    Pure, and jitted already: it compiles anew for another shape of the batch, another layout of the
    weights, and other static settings (all of `speculation` and `batching`; `max_new_tokens`,
    `min_new_tokens`, `top_k`, `stop_tokens`, `group_size`). Inside a caller's own `jax.jit` the
    policy, the draft and the batch are arguments, `temperature`, `top_p`, `min_p` and `limit` may
    be, and those settings must be Python values; the mesh is found by `jax.set_mesh`.

    Args:
      params: the policy, in the training or a rollout layout.
      draft_params: a draft (`jspec.drafts`), or None for autoregressive decoding under the same
        rule.
      batch: prompts, sequence ids and the key.
      sampling: defaults to `Sampling()`.
      speculation: defaults to `Speculation()`.
      batching: how sequences share the device, defaults to `Batching()`. Slots and pool change no
        token under `coupled`, and no distribution under any rule; with `groups`, the sequences that
        are done are the short ones.

    Returns:
      `Rollout` with N = prompts x group_size rows. What is refused below cannot be seen where it is
      traced: a row whose prompt length, tokens, temperature, top_p, min_p or limit turn out to be
      none then comes back empty, with nothing in its mask. Weights are not judged, which would read
      them all once more: where they hold NaN the log-probabilities are NaN and the tokens mean
      nothing, and an update from them is skipped for its loss (`jspec.rl.update`).

    Raises InputError for a bad argument, a prompt that does not fit the model's positions, a batch
    or slots that the mesh does not divide, and a draft made for another policy.
    """
    sampling = Sampling() if sampling is None else sampling
    speculation = Speculation() if speculation is None else speculation
    batching = Batching() if batching is None else batching
    check(params, draft_params, batch, sampling, speculation, batching)
    return _rollout(params, draft_params, *in_32_bits(batch, sampling), speculation, batching)
