"""DFlash: all drafts in one pass of a few decoder layers over the last token and mask tokens, with
keys and values from the policy's own states (https://arxiv.org/abs/2602.06036).

The slots do not see what the others draw, so q is a product over positions; what a pass costs does
not depend on k. The pass itself is in `parts.one_pass`; published drafts are read and written by
`jspec.hub.block_drafts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jspec.arguments import whole
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
from jspec.drafts.parts import anchored, one_pass
from jspec.drafts.parts.fusing import MOST_LAYERS
from jspec.drafts.parts.losses import loss_over_slots, state_loss
from jspec.drafts.parts.vocabulary import check_vocab, output_table, table_logits
from jspec.model import ModelConfig, Policy, check_policy

Kind = TypeVar("Kind", bound=one_pass.OnePassConfig)
DECAY = 4.0
"""By how many slots the weight of a slot's loss falls to 1 / e, as published."""


@dataclasses.dataclass(frozen=True)
class DFlashConfig(one_pass.OnePassConfig):
    """See `parts.one_pass.OnePassConfig`."""


def init(policy: Policy, key: jax.Array, *, layers: int = 2, block_size: int = 8,
         aux_depths: Sequence[int] | None = None, vocab: Sequence[int] | np.ndarray | None = None,
         mask_token: int | None = None, window: int = 0, windows_causal: bool = True,
         sample_from_anchor: bool = False) -> Draft:
    """A drafter from random initialisation, float32 masters, on the mesh of `jax.set_mesh` if there
    is one.

    Args:
      policy: in the training layout.
      layers: how many, with the policy's sizes and rope, as Qwen3 has them.
      aux_depths: the depths to fuse; None: `one_pass.default_depths`.
      vocab: the token ids that may be drafted (`parts.vocabulary.most_frequent` of the policy's own
        rollouts), or None for all of them.
      mask_token: None: an id that no text has (`one_pass.default_mask_token`).
      window: of every layer, see `one_pass.OnePassConfig.windows`.
      block_size, windows_causal, sample_from_anchor: see `one_pass.OnePassConfig`.

    Raises InputError for depths or a mask token that the policy does not have, a vocabulary that is
    none, or a policy in a rollout layout.
    """
    config, ids = settled(DFlashConfig, policy, layers, aux_depths, vocab, mask_token, window,
                          block_size=block_size, windows_causal=windows_causal,
                          sample_from_anchor=sample_from_anchor)
    return Draft(one_pass.fresh_weights(policy, one_pass.specs(config), config, key), ids, config,
                 dflash)


def settled(kind: type[Kind], policy: Policy, layers: int, aux_depths: Sequence[int] | None,
            vocab: Sequence[int] | np.ndarray | None, mask_token: int | None, window: int,
            **options: Any) -> tuple[Kind, dict[str, jax.Array]]:
    """The config of a fresh draft, and its state: see `init`."""
    name = kind.__name__.removesuffix("Config").lower()
    check_policy(f"the policy of a {name} draft", policy, stacked=True)
    made = policy.config
    layers = whole(1, MOST_LAYERS)(f"{name} draft: layers", layers)
    window = whole()(f"{name} draft: window", window)
    ids = None if vocab is None else check_vocab(vocab, made.vocab_size, name)
    depths = (one_pass.default_depths(made.num_layers) if aux_depths is None
              else cast(tuple, aux_depths))
    mask = one_pass.default_mask_token(made) if mask_token is None else mask_token
    block = one_pass.default_block(made, layers)
    config = kind(made, block, depths, mask, windows=(window,) * layers if window else (),
                  vocab_size=0 if ids is None else len(ids), **options)
    return config, {} if ids is None else {"vocab": jnp.asarray(ids)}


def features(config: one_pass.OnePassConfig) -> tuple[int, ...]:
    return config.aux_depths


def model(config: one_pass.OnePassConfig) -> ModelConfig:
    return config.block


def table(policy: Policy, draft: Draft) -> jax.Array:
    """The output head [Vd, D] in the compute dtype: the draft's own, or the policy's rows."""
    own = draft.weights.get("head")
    return (output_table(policy, draft.state.get("vocab")) if own is None
            else own.astype(policy.dtype))


def prepare(policy: Policy, draft: Draft) -> Draft:
    """See `one_pass.prepare`; with the rows of the output head that are drafted from."""
    weights = one_pass.prepare(policy, draft)
    return draft.replace(weights={**weights, "table": table(policy, draft)})


def drafted(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            k: int) -> tuple[jax.Array, jax.Array, DraftState]:
    """Each row's last token int32 [B], the states [B, idle + k, D] of the slots behind it
    (`one_pass.draft_states`), and the drafter's state."""
    pending = jnp.take_along_axis(committed.tokens, committed.lengths[:, None] - 1, axis=1)[:, 0]
    states, cache = one_pass.draft_states(policy, draft.config, draft.weights, state.cache, pending,
                                          committed.lengths, k)
    return pending, states, state.replace(cache=cache)


def slot_logits(policy: Policy, draft: Draft, states: jax.Array) -> jax.Array:
    """Logits float32 [B, k, Vd] of the slots that predict, of states [B, idle + k, D]."""
    read = states[:, draft.config.idle:]
    # made as rows, as the policy's are in `speculate.cycle`
    scores = table_logits(policy, draft.weights["table"], draft.state.get("vocab"),
                          read.reshape(-1, read.shape[-1]))
    return scores.reshape(*read.shape[:2], -1)


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """K tokens, each drawn from its slot's own distribution."""
    vocab = draft.state.get("vocab")
    _, states, state = drafted(policy, draft, state, committed, sampler.k)
    scores = slot_logits(policy, draft, states)
    drawn = [sampler.draw(scores[:, j], j, vocab) for j in range(sampler.k)]
    tokens, log_q = (jnp.stack(x, axis=1) for x in zip(*drawn, strict=True))
    return Proposal(tokens, log_q, vocab), state


def loss(policy: Policy, draft: Draft, batch: DraftBatch,
         kind: str) -> tuple[jax.Array, jax.Array, Metrics]:
    """`parts.losses.loss_over_slots` of drafts that cover the answers once.

    policy: any layout; only its embedding and output head are read. Detach it before the call.
    draft: unprepared, float32 masters. kind: one of `choices.DRAFT_LOSSES`, or "states":
    `parts.losses.state_loss` of the slots.
    """
    config, vocab = draft.config, draft.state.get("vocab")
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    at, batch = anchored.spread(config, batch)
    states = anchored.predicting(config, anchored.slot_states(policy, config, weights, batch, at))
    if kind == "states":
        return state_loss(policy, batch, [states])
    head = partial(table_logits, policy, table(policy, draft), vocab)
    return loss_over_slots(policy, batch, states, config.predicted, head, vocab, kind, DECAY)


dflash = Drafter("dflash", DFlashConfig, init, propose, features, one_pass.specs, prepare,
                 one_pass.start, one_pass.observe, loss, model=model)
