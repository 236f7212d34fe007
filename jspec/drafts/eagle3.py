"""EAGLE-3: a decoder block on three layers of the policy's trunk, with an output head of its own
(https://arxiv.org/abs/2503.01840).

The residual streams at three depths (or as many as a checkpoint has) are fused into one hidden
state by a projection. At position p the block reads that of position p - 1 and the embedding of
token p, and predicts token p + 1; its attention sees both, normed and side by side, and its
residual is the hidden state alone. A block of several layers goes on with ordinary ones. The next
depth reads the block's own state in the fused one's place. The first token has no hidden state
before it and no entry in the block's cache: entry i belongs to token i + 1.

Published checkpoints are read and written by `jspec.hub.eagle3`, whose names for the variants are
the options here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np

from jspec.drafts.base import (
    Committed,
    Draft,
    DraftBatch,
    Drafter,
    DraftState,
    Metrics,
    Observation,
    Prefill,
    Proposal,
    Sampler,
)
from jspec.drafts.parts import recursion
from jspec.drafts.parts.fusing import (
    FusedConfig,
    block_of,
    features,
    fresh_weights,
    fused,
    inside,
    logits,
    model,
    normed,
    prepare,
    settled,
    specs,
)
from jspec.drafts.parts.losses import loss_over_depths, state_loss
from jspec.drafts.parts.unroll import shift
from jspec.model import KeyValues, Policy, Trunk


@dataclasses.dataclass(frozen=True)
class Eagle3Config(FusedConfig):
    """See `parts.fusing.FusedConfig`."""


def init(policy: Policy, key: jax.Array, *, depths: int = 3,
         aux_depths: Sequence[int] | None = None, vocab: Sequence[int] | np.ndarray | None = None,
         layers: int = 1, window: int | Sequence[int] = 0, qk_norm: bool = False,
         norm_before_residual: bool = False, norm_before_fc: bool = False, fc_norm: bool = False,
         norm_output: bool = False, own_embed: bool = False) -> Draft:
    """A drafter from random initialisation, float32 masters, on the mesh of `jax.set_mesh` if there
    is one.

    The block has the policy's sizes and rope, and by default one layer and none of the policy's
    biases and query and key norms, so that vLLM and SGLang serve it. It starts as the identity (the
    two output projections of a layer are zero) on an even mix of the fused streams; the output
    norm, the output head and an own embedding start as the policy's.

    Args:
      policy: in the training layout.
      aux_depths: the depths to fuse; None: `parts.fusing.default_depths`.
      vocab: the token ids that may be drafted (`parts.vocabulary.most_frequent` of the policy's own
        rollouts), or None for all of them.
      layers: of the block. qk_norm: they norm queries and keys, as Qwen3's do.
      depths, window, norm_before_residual, norm_before_fc, fc_norm, norm_output, own_embed: see
      `Eagle3Config`.

    Raises InputError for depths that the policy does not have, options that exclude each other, a
    vocabulary that is none, or a policy in a rollout layout.
    """
    config, state = settled(Eagle3Config, policy, aux_depths, vocab, layers, qk_norm, depths=depths,
                            norm_before_residual=norm_before_residual, window=window,
                            norm_before_fc=norm_before_fc, fc_norm=fc_norm,
                            norm_output=norm_output, own_embed=own_embed)
    return Draft(fresh_weights(policy, config, specs(config), key, state.get("vocab")), state,
                 config, eagle3)


def start(policy: Policy, draft: Draft, prefill: Prefill) -> tuple[recursion.Rows, KeyValues]:
    """The block's state at each prompt's last token, and its keys and values over the prompts;
    after a prompt of one token the state is zeros, and the first draft's distribution is flat."""
    config, w = draft.config, draft.weights
    return recursion.start(inside(policy, config), [block_of(policy, config, w)],
                           fused(config, w, prefill.trunk.features),
                           recursion.next_tokens(prefill.tokens), prefill.lengths - 1)


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """K sampled tokens with the distributions they were drawn from (`parts.recursion.propose`)."""
    config, w, vocab = draft.config, draft.weights, draft.state.get("vocab")
    return recursion.propose(
        inside(policy, config), [block_of(policy, config, w)], state, committed.lengths - 1,
        sampler, partial(logits, policy, config, w, vocab), vocab)


def observe(policy: Policy, draft: Draft, state: DraftState,
            observation: Observation) -> DraftState:
    """Rewrite the cache of the committed positions from the verifier's states; keep the state at
    the last one."""
    config, w = draft.config, draft.weights
    return recursion.observe(inside(policy, config), [block_of(policy, config, w)], state,
                             observation.lengths - 1, fused(config, w, observation.trunk.features),
                             observation)


def unroll(policy: Policy, draft: Draft, trunk: Trunk, tokens: jax.Array,
           depths: int) -> list[jax.Array]:
    """The states [B, S, D] of each of the depths, of a trunk with this draft's features over tokens
    int32 [B, S]. Those at position p predict token p + 1; at position 0 they are zeros, as `start`
    has them."""
    config = draft.config
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    states = recursion.unroll(inside(policy, config), [block_of(policy, config, weights)],
                              fused(config, weights, trunk.features),
                              recursion.next_tokens(tokens), depths)
    return [shift(x) for x in states]


def loss(policy: Policy, draft: Draft, batch: DraftBatch,
         kind: str) -> tuple[jax.Array, jax.Array, Metrics]:
    """`parts.losses.loss_over_depths` of this drafter, its depths unrolled as at inference.

    policy: any layout; only its embedding and output head are read. Detach it before the call.
    draft: unprepared, float32 masters. kind: one of `choices.DRAFT_LOSSES`, or "states":
    `parts.losses.state_loss` of the first depth.
    """
    return loss_over(policy, draft, batch, kind, unroll)


def loss_over(policy: Policy, draft: Draft, batch: DraftBatch, kind: str,
              unroll: Callable[..., list[jax.Array]]) -> tuple[jax.Array, jax.Array, Metrics]:
    """See `loss`; `unroll` gives the states of the depths."""
    config, w, vocab = draft.config, draft.weights, draft.state.get("vocab")
    states = unroll(policy, draft, batch.trunk, batch.tokens,
                    1 if kind == "states" else config.depths)
    if kind == "states":
        return state_loss(policy, batch, [batch.predicting(normed(config, w, x)) for x in states])
    return loss_over_depths(policy, batch, [batch.predicting(x) for x in states],
                            partial(logits, policy, config, w, vocab), vocab, kind)


eagle3 = Drafter("eagle3", Eagle3Config, init, propose, features, specs, prepare, start, observe,
                 loss, model=model)
