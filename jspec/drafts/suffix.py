"""History: what followed when a sequence of this prompt last went like this - in the row itself, in
its siblings of the group, or in the rollouts of the same prompt before this one. No weights.

Suffix decoding (https://arxiv.org/abs/2411.04975) with a search in the place of its tree, so that
it runs on the device and inside the rollout's loop: the rows in which the row's last tokens
occurred vote on what comes next, the more of them match the more so.

A cycle costs (S + m S + h W) x max_match comparisons of integers a row: S positions a row, m
siblings that are looked at, h remembered rows of W = max_match + history_tokens. At 128 positions,
3 siblings and the default history that is 13,000, beside the 135 million multiplications by which a
small model computes one position.

Why it is exact. A deterministic draft is judged as q = 1, which is lossless if the draft was made
without looking at the noise that judges it. That noise is fresh at every cycle, and its own for
each sequence. A row's own tokens and those of its siblings, all committed in earlier cycles, were
made from earlier noise; so whatever is drafted from them, the tokens are the policy's, and a
group's sequences are as independent as without drafts. Under `coupled` the tokens are those of
autoregressive decoding whatever is drafted. History is of earlier rollouts, and a rollout with the
key of an earlier one has its noise: there the same noise would judge what was made from it. So each
remembered row has its rollout's key beside it, and is passed over in a rollout with that key. (The
training loop folds the step into the key: all its keys differ.)
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jspec.arguments import INT32, settle, whole
from jspec.drafts.base import Committed, Draft, Drafter, DraftState, Prefill, Proposal, Sampler
from jspec.drafts.parts.lookup import NOTHING, last_tokens, look_up, look_up_elsewhere, vote
from jspec.errors import InputError
from jspec.model import KeyValues, ModelConfig, ParamSpec, Policy, place_on_mesh
from jspec.sharding import constrain
from pallas_kernels.noise import key_words


@dataclasses.dataclass(frozen=True)
class SuffixConfig:
    """The arguments of `init`."""

    policy: ModelConfig
    max_match: int
    siblings: int
    history_prompts: int
    history_rows: int
    history_tokens: int

    def __post_init__(self) -> None:
        settle(self, "suffix draft: ", max_match=whole(1, 256), siblings=whole(),
               history_prompts=whole(), history_rows=whole(1), history_tokens=whole(1))
        tokens = self.history_prompts * self.history_rows * self.width
        if tokens > INT32:
            raise InputError(f"suffix draft: a history of {tokens} tokens is more than memory has "
                             "room for; lower history_prompts, history_rows or history_tokens")

    @property
    def width(self) -> int:
        """Tokens of a remembered row: the prompt's last ones, to be matched, and the output."""
        return self.max_match + self.history_tokens


def init(policy: Policy, key: jax.Array | None = None, *, max_match: int = 8, siblings: int = 8,
         history_prompts: int = 1024, history_rows: int = 4, history_tokens: int = 256) -> Draft:
    """A draft that remembers. Its history is empty, and replicated on the mesh of `jax.set_mesh` if
    there is one.

    Its state: `prompts` uint32 [C, 2], fingerprints; `written` int32 [C], in which order, 0: never;
    `tokens` int32 [C, H, W], the newest row first, `NOTHING` where there is none; `keys` uint32
    [C, H, 2], of the rollouts that they are of. 4 MiB by default. {} without a history.

    Args:
      key: not used, there is nothing random in it.
      max_match: the longest suffix that is looked up.
      siblings: how many of a row's siblings are looked at, the next ones in its group; 0: none.
      history_prompts: C, how many prompts are remembered; the one remembered longest ago is
        replaced. 0: no history.
      history_rows: H, how many outputs of a prompt, the newest ones.
      history_tokens: how many tokens of each, its first ones.

    Raises InputError for an argument that is no whole number or out of range.
    """
    config = SuffixConfig(policy.config, max_match, siblings, history_prompts, history_rows,
                          history_tokens)
    return Draft(weights={}, state=_empty(config), config=config, drafter=suffix)


def _empty(config: SuffixConfig) -> dict:
    prompts, rows = config.history_prompts, config.history_rows
    if not prompts:
        return {}
    shapes = {"prompts": ParamSpec((prompts, 2), (None, None), dtype="uint32"),
              "written": ParamSpec((prompts,), (None,), dtype="int32"),
              "tokens": ParamSpec((prompts, rows, config.width), (None, None, None), dtype="int32"),
              "keys": ParamSpec((prompts, rows, 2), (None, None, None), dtype="uint32")}

    def blank() -> dict:
        zeros = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in shapes.items()}
        return {**zeros, "tokens": zeros["tokens"] + NOTHING}

    return place_on_mesh(blank, shapes, config.policy)()


def fingerprint(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """uint32 [P, 2], a prompt's identity whatever it is padded to: polynomials of its tokens modulo
    2^32, in two bases.

    Prompts that differ in one token never share it; should others do, a row drafts from another
    prompt's history, and loses speed.
    """
    real = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens + 1,
                     0).astype(jnp.uint32)
    bases = jnp.array([0x9E3779B1, 0x85EBCA6B], jnp.uint32)
    powers = jnp.cumprod(jnp.broadcast_to(bases, (tokens.shape[1], 2)), axis=0, dtype=jnp.uint32)
    return jnp.sum(real[:, :, None] * powers, axis=1, dtype=jnp.uint32)


def _known(memory: dict, prompt: jax.Array) -> jax.Array:
    """Which entries of the history are of a prompt, by fingerprint [..., 2]; bool [..., C]."""
    return (memory["written"] > 0) & jnp.all(memory["prompts"] == prompt[..., None, :], axis=-1)


def start(policy: Policy, draft: Draft, prefill: Prefill) -> tuple[dict, KeyValues]:
    """Prompts' lengths [P], and where there is a history what it holds of each, made with other
    keys: [P, H, W]."""
    state, memory = {"prompt_lengths": prefill.lengths}, draft.state
    if memory:
        known = _known(memory, fingerprint(prefill.tokens, prefill.lengths))
        at = jnp.argmax(known, axis=1)
        other = jnp.any(memory["keys"][at] != prefill.key, axis=-1)
        state["history"] = jnp.where((known.any(1)[:, None] & other)[..., None],
                                     memory["tokens"][at], NOTHING)
    return state, ()


def _siblings(committed: Committed, count: int) -> jax.Array:
    """The next `count` sequences of each row's group, round and round, int32 [B, count, S], NOTHING
    from their ends on.

    They may have ended, or not be in a slot yet: then their prompt is all there is of them.
    """
    tokens, lengths, sequences = committed.all_tokens, committed.all_lengths, committed.sequences
    if tokens is None:
        tokens, lengths = committed.tokens, committed.lengths
    if sequences is None:
        sequences = jnp.arange(committed.tokens.shape[0])
    first = sequences // committed.group_size * committed.group_size
    ahead = sequences[:, None] + 1 + jnp.arange(count) - first[:, None]
    others = first[:, None] + ahead % committed.group_size
    known = jnp.arange(tokens.shape[1]) < jnp.take(lengths, others, mode="clip")[..., None]
    return jnp.where(known, jnp.take(tokens, others, axis=0, mode="clip"), NOTHING)


def matches(draft: Draft, state: DraftState, committed: Committed,
            k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The latest longest match in each of M rows of the pool: how many tokens match, int32 [B, M],
    the k tokens after them, [B, M, k]; and each row's last token, [B].

    The pool is the row itself, then its siblings, then the history, the newest first. Of siblings
    and history only outputs are drafted from: their prompt is the row's own.
    """
    config = draft.config
    suffix = last_tokens(committed.tokens, committed.lengths, config.max_match)
    matched, going_on = look_up(committed.tokens, committed.lengths, config.max_match, k)
    pools = [(matched[:, None], going_on[:, None])]
    count = min(config.siblings, committed.group_size - 1)
    if count:
        pools.append(look_up_elsewhere(_siblings(committed, count), suffix,
                                       state.rows["prompt_lengths"], k))
    if "history" in state.rows:
        pools.append(look_up_elsewhere(state.rows["history"], suffix, config.max_match, k))
    matched, going_on = (jnp.concatenate(x, axis=1) for x in zip(*pools, strict=True))
    return matched, going_on, suffix[:, 0]


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """What most `matches` go on with (`parts.lookup.vote`). Deterministic: judged as q = 1. Where
    no match is left the token before is drafted again."""
    return Proposal(vote(*matches(draft, state, committed, sampler.k))[0]), state


def remember(draft: Draft, batch: Any, rollout: Any) -> Draft:
    """The draft with a rollout's outputs at the front of its prompts' histories. Jittable.

    A prompt that is new takes the place of the one remembered longest ago; of one that is known the
    oldest outputs go.

    Args:
      batch: the `PromptBatch`. rollout: the `Rollout` of it.
    """
    if not draft.state:
        return draft
    rows = _remembered(draft.config, batch, rollout)
    prompts = fingerprint(batch.tokens, batch.lengths)
    # in order, prompt by prompt: so a prompt that a batch holds twice is one
    new = jax.tree.map(lambda x: constrain(x, "rollout", *(None,) * x.ndim), (prompts, rows))
    write = partial(_write, key=key_words(batch.key))
    return draft.replace(state=jax.lax.scan(write, draft.state, new)[0])


def _remembered(config: SuffixConfig, batch: Any, rollout: Any) -> jax.Array:
    """Of each prompt the first outputs, after the prompt's last tokens: int32 [P, at most H, W]."""
    prompts = batch.tokens.shape[0]
    tail = last_tokens(batch.tokens, batch.lengths, config.max_match)[:, ::-1]
    outputs = jnp.where(rollout.mask, rollout.tokens, NOTHING)[:, :config.history_tokens]
    outputs = outputs.reshape(prompts, batch.group_size, -1)[:, :config.history_rows]
    tail = jnp.broadcast_to(tail[:, None], (*outputs.shape[:2], config.max_match))
    rows = jnp.concatenate([tail, outputs], axis=2)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, config.width - rows.shape[2])),
                   constant_values=NOTHING)


def _write(memory: dict, new: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[dict, None]:
    """Fold one prompt's fingerprint [2] and rows [R, W], made with `key` [2], in; a step of
    `jax.lax.scan`."""
    prompt, rows = new
    known, written = _known(memory, prompt), memory["written"]
    at = jnp.where(known.any(), jnp.argmax(known), jnp.argmin(written))
    before = jnp.where(known.any(), memory["tokens"][at], NOTHING)
    keys = jnp.broadcast_to(key, (len(rows), 2))

    def newest(new, old) -> jax.Array:
        return jnp.concatenate([new, old])[:len(old)]

    return {"prompts": memory["prompts"].at[at].set(prompt), "written": written.at[at]
            .set(written.max() + 1), "tokens": memory["tokens"].at[at].set(newest(rows, before)),
            "keys": memory["keys"].at[at].set(newest(keys, memory["keys"][at]))}, None


suffix = Drafter("suffix", SuffixConfig, init, propose, start=start, remember=remember)
