"""`jspec.rollout`: prefill each prompt once, then one `while_loop` of speculative cycles until every row is done."""

from __future__ import annotations

import logging
from functools import partial

import jax
import jax.numpy as jnp

from jspec.drafts.base import Draft, Prefill
from jspec.kernels import choose, picked
from jspec.model import Policy, prefill, to_rollout
from jspec.sharding import constrain
from jspec.speculate.arguments import answerable, check, in_32_bits
from jspec.speculate.cycle import RULES, Slots, cycle, split_features
from jspec.speculate.types import PromptBatch, Rollout, RolloutStats, Sampling, Speculation
from pallas_kernels.noise import key_words

# cache sizes are whole tiles of a TPU's memory, and beyond one block of attention whole blocks
_TILE, _BLOCK = 16, 128

log = logging.getLogger(__name__)


def _cache_size(prompt: int, max_new_tokens: int, k: int) -> int:
    """Positions that a row may touch: the last cycle writes up to k tokens beyond the cap."""
    size = prompt + max_new_tokens + k + 1
    unit = _TILE if size <= _BLOCK else _BLOCK
    return -(-size // unit) * unit


def start(policy: Policy, draft: Draft | None, batch: PromptBatch, sampling: Sampling, k: int,
          states: tuple[int, ...] | None = None) -> Slots:
    """Prefill every prompt once, and give each of its group's rows a copy of the keys and values. Rows that have no
    answer are done from the start."""
    prompts, length = batch.tokens.shape
    rows = prompts * batch.group_size
    live = answerable(policy.config, batch, sampling)
    batch = batch.replace(tokens=jnp.clip(batch.tokens, 0, policy.config.vocab_size - 1),  # of the others' rows
                          lengths=jnp.clip(batch.lengths, 1, length))
    size = _cache_size(length, sampling.max_new_tokens, k)
    features = () if draft is None else draft.module.features(draft.config)
    with jax.named_scope("prefill"):
        computed, cache = prefill(policy, batch.tokens, size, features=(*features, *(states or ())))
        trunk, kept = split_features(computed, len(features))
        kept = None if states is None else jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, size - length), (0, 0))), kept)
        state = None
        if draft is not None:
            prompts_seen = Prefill(trunk, batch.tokens, batch.lengths, key_words(batch.key))
            state = draft.module.start(policy, draft, prompts_seen, size)

        def share(x):
            names = ("batch", "kv_heads") if x.ndim == 4 else ("batch",)
            x = jnp.repeat(x, batch.group_size, axis=0)
            return constrain(x, policy.layout, *names, *(None,) * (x.ndim - len(names)))

        cache, state, kept, lengths, tokens = jax.tree.map(share, (cache, state, kept, batch.lengths, batch.tokens))
    by_row = partial(jnp.broadcast_to, shape=(rows,))
    done, stopped = (constrain(flags, policy.layout, "batch") for flags in (~live, jnp.zeros(rows, bool)))
    values = jnp.zeros((rows, sampling.max_new_tokens + k + 1), jnp.float32)
    return Slots(
        sequence_ids=batch.sequence_ids, prompt_lengths=lengths, lengths=lengths,
        tokens=jnp.pad(tokens, ((0, 0), (0, size - length))),
        logprobs=values, entropy=values, done=done, stopped=stopped,
        temperature=by_row(jnp.asarray(sampling.temperature, jnp.float32)),
        top_p=None if sampling.top_p is None else by_row(jnp.asarray(sampling.top_p, jnp.float32)),
        cache=cache, draft_state=state, trunk=kept,
        cycles=jnp.zeros(rows, jnp.int32), drafted=jnp.zeros(k, jnp.int32), accepted=jnp.zeros(k, jnp.int32),
        group_size=batch.group_size)


def _gather(slots: Slots, max_new_tokens: int, pad_token: int) -> Rollout:
    """The generated part of every row, with nothing but zeros and padding outside the mask."""
    lengths = slots.lengths - slots.prompt_lengths
    mask = jnp.arange(max_new_tokens) < lengths[:, None]
    columns = jnp.minimum(slots.prompt_lengths[:, None] + jnp.arange(max_new_tokens), slots.tokens.shape[1] - 1)
    tokens = jnp.where(mask, jnp.take_along_axis(slots.tokens, columns, axis=1), pad_token)
    logprobs, entropy = (jnp.where(mask, x[:, :max_new_tokens], 0.0) for x in (slots.logprobs, slots.entropy))
    known = jnp.arange(slots.tokens.shape[1]) < slots.lengths[:, None] - 1
    trunk = jax.tree.map(lambda x: jnp.where(known[..., None], x, 0), slots.trunk)
    return Rollout(tokens, mask, logprobs, mask, entropy, lengths, slots.stopped,
                   RolloutStats(slots.cycles, slots.drafted, slots.accepted), trunk)


@partial(jax.jit, static_argnames="speculation")
def _rollout(params, draft, batch: PromptBatch, sampling: Sampling, speculation: Speculation) -> Rollout:
    log.debug("compiling a rollout with %s", picked(speculation.kernels))
    with jax.named_scope("prepare"):
        policy = to_rollout(params).replace(kernels=choose(speculation.kernels))
        if draft is not None:
            draft = draft.module.prepare(policy, draft)
    k = 0 if draft is None else speculation.k
    if k == 0:
        draft = None
    stops = policy.config.stop_tokens if sampling.stop_tokens is None else sampling.stop_tokens
    key = key_words(batch.key)
    make_noise = RULES[speculation.rule]

    def body(slots: Slots) -> Slots:
        with jax.named_scope("noise"):
            noise = make_noise(key, slots.sequence_ids, slots.lengths, k)
        return cycle(policy, draft, slots, noise, sampling=sampling, stop_tokens=stops, k=k, states=speculation.states)

    slots = start(policy, draft, batch, sampling, k, speculation.states)
    with jax.named_scope("decode"):
        slots = jax.lax.while_loop(lambda s: ~jnp.all(s.done), body, slots)
    with jax.named_scope("collect"):
        return _gather(slots, sampling.max_new_tokens, policy.config.pad_token)


def rollout(params: Policy, draft_params: Draft | None, batch: PromptBatch, *, sampling: Sampling | None = None,
            speculation: Speculation | None = None) -> Rollout:
    """Continue every prompt, with exactly the policy's distribution and as few passes over its weights as drafts allow.

    Pure, and jitted already: it compiles anew for another shape of the batch, another layout of the weights, and other
    static settings (all of `speculation`; `max_new_tokens`, `min_new_tokens`, `top_k`, `stop_tokens`, `group_size`).
    Inside a caller's own `jax.jit` the policy, the draft and the batch are arguments, `temperature` and `top_p` may be,
    and those settings must be Python values; the mesh is found by `jax.set_mesh`.

    Args:
      params: the policy, in the training or a rollout layout.
      draft_params: a draft (`jspec.drafts`), or None for autoregressive decoding under the same rule.
      batch: prompts, sequence ids and the key.
      sampling: defaults to `Sampling()`.
      speculation: defaults to `Speculation()`.

    Returns:
      `Rollout` with N = prompts x group_size rows. What is refused below cannot be seen where it is traced: a row whose
      prompt length, tokens, temperature or top_p turn out to be none then comes back empty, with nothing in its mask.
      Weights are not judged, which would read them all once more: where they hold NaN the log-probabilities are NaN and
      the tokens mean nothing, and an update from them is skipped for its loss (`jspec.rl.update`).

    Raises InputError for a bad argument, a prompt that does not fit the model's positions, a batch that the mesh does
    not divide, and a draft made for another policy.
    """
    sampling = Sampling() if sampling is None else sampling
    speculation = Speculation() if speculation is None else speculation
    check(params, draft_params, batch, sampling, speculation)
    return _rollout(params, draft_params, *in_32_bits(batch, sampling), speculation)
