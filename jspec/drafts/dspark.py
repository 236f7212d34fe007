"""DSpark: DFlash's one pass, and a small head that lets each draft depend on those before it
(https://arxiv.org/abs/2607.05147).

The pass gives every slot its logits at once; the Markov head adds to them a bias of low rank that
follows from the token drawn before, w2 (w1[token]). So q of a token given the ones before it is
known exactly, for the price of one pass and k products of that rank. Three heads are published:
vanilla, as above; gated by the slot's state; and a recurrent one over the slots.

A confidence head, if there is one, learns how likely each draft is to be accepted. A rollout does
not ask it: the policy verifies all k in one pass, which costs the same with fewer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jspec.arguments import flag, one_of, settle, whole
from jspec.drafts.base import (
    Committed,
    Draft,
    DraftBatch,
    Drafter,
    DraftState,
    Metrics,
    Proposal,
    Sampler,
)
from jspec.drafts.dflash import (
    DECAY,
    drafted,
    features,
    model,
    prepare,
    settled,
    slot_logits,
    table,
)
from jspec.drafts.parts import anchored, one_pass
from jspec.drafts.parts.losses import loss_over_slots, state_loss
from jspec.drafts.parts.vocabulary import table_logits
from jspec.model import ParamSpec, Policy
from jspec.model.linear import linear

MARKOV_HEADS = ("vanilla", "gated", "rnn")


@dataclasses.dataclass(frozen=True)
class DSparkConfig(one_pass.OnePassConfig):
    """As `parts.one_pass.OnePassConfig`, and:

    Attributes:
      markov_rank: of the bias; 0: none. markov_head: one of MARKOV_HEADS.
      confidence: there is a confidence head. confidence_with_markov: it reads w1[token] too.
    """

    sample_from_anchor: bool = True
    markov_rank: int = 256
    markov_head: str = "vanilla"
    confidence: bool = False
    confidence_with_markov: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, "dspark draft: ", markov_rank=whole(), markov_head=one_of(MARKOV_HEADS),
               confidence=flag, confidence_with_markov=flag)


def init(policy: Policy, key: jax.Array, *, layers: int = 2, block_size: int = 8,
         aux_depths: Sequence[int] | None = None, vocab: Sequence[int] | np.ndarray | None = None,
         mask_token: int | None = None, window: int = 0, windows_causal: bool = True,
         sample_from_anchor: bool = True, markov_rank: int = 256, markov_head: str = "vanilla",
         confidence: bool = False) -> Draft:
    """A drafter from random initialisation, float32 masters, on the mesh of `jax.set_mesh` if there
    is one. Its bias starts at zero.

    Args and errors: as `jspec.drafts.dflash` has them; the others are fields of `DSparkConfig`.
    """
    config, ids = settled(
        DSparkConfig, policy, layers, aux_depths, vocab, mask_token, window, block_size=block_size,
        windows_causal=windows_causal, sample_from_anchor=sample_from_anchor,
        markov_rank=markov_rank, markov_head=markov_head, confidence=confidence)
    return Draft(one_pass.fresh_weights(policy, specs(config), config, key), ids, config, dspark)


def specs(config: DSparkConfig) -> dict:
    """The parameters of `one_pass.specs`, and of the heads; w1 has a row for each of the policy's
    tokens, w2 for each that may be drafted."""
    d, r, model = config.block.hidden_size, config.markov_rank, config.policy
    out = one_pass.specs(config)
    if r:
        vd = config.vocab_size or model.vocab_size
        markov = {"w1": ParamSpec((model.vocab_size, r), ("vocab", None)),
                  "w2": ParamSpec((vd, r), (None if config.vocab_size else "vocab", None), "zeros")}
        wide = {"gated": (r, d + r), "rnn": (3 * r, 2 * r + d)}.get(config.markov_head)
        if wide:
            markov |= {"proj": ParamSpec(wide, (None, None)),
                       "bias": ParamSpec(wide[:1], (None,), "zeros")}
        out["markov"] = markov
    if config.confidence:
        wide = d + (r if config.confidence_with_markov else 0)
        out["confidence"] = {"proj": ParamSpec((1, wide), (None, None), "zeros"),
                             "bias": ParamSpec((1,), (None,), "zeros")}
    return out


def latent(config: DSparkConfig, w: dict, memory: jax.Array, states: jax.Array,
           before: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What w2 makes a slot's bias of, [..., r], and the head's memory [..., r] after it: of the
    slot's state [..., D] and w1 of the token before, [..., r]. Memory is zeros at the anchor's
    slot, which goes through the recurrent head, the only one that has a memory, whether it predicts
    or not; before it the anchor itself counts as the token."""
    if config.markov_head == "vanilla":
        return before, memory
    if config.markov_head == "gated":
        gate = linear(jnp.concatenate([states, before], axis=-1), w["proj"], w["bias"])
        return jax.nn.sigmoid(gate) * before, memory
    joint = linear(jnp.concatenate([memory, before, states], axis=-1), w["proj"], w["bias"])
    gate, candidate, out = jnp.split(joint, 3, axis=-1)
    gate = jax.nn.sigmoid(gate)
    return jnp.tanh(out), gate * memory + (1 - gate) * jnp.tanh(candidate)


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """K tokens, each drawn from its slot's distribution given the token drawn before it."""
    config, w, vocab = draft.config, draft.weights, draft.state.get("vocab")
    token, states, state = drafted(policy, draft, state, committed, sampler.k)
    scores = slot_logits(policy, draft, states)
    memory = jnp.zeros((states.shape[0], config.markov_rank), states.dtype)
    tokens, log_qs = [], []
    for slot in range(states.shape[1]):
        if config.markov_rank:
            markov = w["markov"]
            found, memory = latent(config, markov, memory, states[:, slot],
                                   jnp.take(markov["w1"], token, axis=0, mode="clip"))
        j = slot - config.idle
        if j < 0:
            continue
        logits = scores[:, j]
        if config.markov_rank:
            logits += linear(found, markov["w2"], out_dtype=jnp.float32)
        token, log_q = sampler.draw(logits, j, vocab)
        tokens.append(token)
        log_qs.append(log_q)
    return Proposal(jnp.stack(tokens, axis=1), jnp.stack(log_qs, axis=1), vocab), state


def tokens_before(config: DSparkConfig, tokens: jax.Array, at: jax.Array) -> jax.Array:
    """The token before that which each slot predicts, int32 [B, A, block_size], of anchors at
    positions int32 [B, A] of tokens [B, S]; of a slot that predicts nothing the anchor."""
    offsets = jnp.maximum(jnp.arange(config.block_size) - config.idle, 0)
    places = (at[..., None] + offsets).reshape(at.shape[0], -1)
    return jnp.take_along_axis(tokens, places, axis=1, mode="clip").reshape(*at.shape, -1)


def teacher_forced(config: DSparkConfig, w: dict, states: jax.Array,
                   before: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """`latent` of whole drafts, whose tokens are known: [B, A, n, r] from states [B, A, n, D] of
    all slots and the tokens before, int32 [B, A, n]; and confidence logits float32 [B, A, n] or
    None."""
    found = jnp.zeros((*states.shape[:-1], 0), states.dtype)
    read = states
    if config.markov_rank:
        markov = w["markov"]
        looked_up = jnp.take(markov["w1"], before, axis=0, mode="clip").astype(states.dtype)
        memory, parts = jnp.zeros_like(looked_up[:, :, 0]), []
        for j in range(states.shape[2]):
            part, memory = latent(config, markov, memory, states[:, :, j], looked_up[:, :, j])
            parts.append(part)
        found = jnp.stack(parts, axis=2)
        if config.confidence_with_markov:
            read = jnp.concatenate([states, looked_up], axis=-1)
    if not config.confidence:
        return found, None
    head = w["confidence"]
    return found, linear(read, head["proj"], head["bias"], out_dtype=jnp.float32)[..., 0]


def loss(policy: Policy, draft: Draft, batch: DraftBatch,
         kind: str) -> tuple[jax.Array, jax.Array, Metrics]:
    """As DFlash's, each slot given the answer's token before it; and the confidence head's, if
    there is one."""
    config, vocab, d = draft.config, draft.state.get("vocab"), draft.config.block.hidden_size
    w = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    at, batch = anchored.spread(config, batch)
    slots = anchored.slot_states(policy, config, w, batch, at)
    states = anchored.predicting(config, slots)
    if kind == "states":
        return state_loss(policy, batch, [states])
    found, confidence = teacher_forced(config, w, slots, tokens_before(config, batch.tokens, at))
    rows = table(policy, draft)

    def head(x: jax.Array) -> jax.Array:
        out = table_logits(policy, rows, vocab, x[..., :d])
        if config.markov_rank:
            out += linear(x[..., d:], w["markov"]["w2"], out_dtype=jnp.float32)
        return out

    read = jnp.concatenate([states, anchored.predicting(config, found)], axis=-1)
    if confidence is not None:
        confidence = anchored.predicting(config, confidence)
    return loss_over_slots(policy, batch, read, config.predicted, head, vocab, kind, DECAY,
                           confidence)


dspark = Drafter("dspark", DSparkConfig, init, propose, features, specs, prepare,
                 one_pass.start, one_pass.observe, loss, model=model)
