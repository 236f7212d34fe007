"""P-EAGLE: EAGLE-3's block, all drafts in one pass (https://arxiv.org/abs/2602.01469).

The first draft is EAGLE-3's own. Each further one is an entry behind it, which reads the embedding
of a mask token and one learned state in the place of the trunk's, at the position where the entry
of the token before it will be; its attention sees the trunk's entries and those of the drafts
before it. So a draft knows how far ahead it is, and not which tokens were drafted.

Published checkpoints are read and written by `jspec.hub.eagle3`, as EAGLE-3's are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jspec.arguments import settle, whole
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
from jspec.drafts.eagle3 import loss_over, observe, start
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
    settled,
)
from jspec.drafts.parts.fusing import prepare as prepare_block
from jspec.drafts.parts.fusing import specs as block_specs
from jspec.drafts.parts.one_pass import check_mask_token, default_mask_token
from jspec.drafts.parts.unroll import shift, unrolled_attention
from jspec.model import ParamSpec, Policy, Trunk
from jspec.model.layers import rope_table


@dataclasses.dataclass(frozen=True)
class PeagleConfig(FusedConfig):
    """As `parts.fusing.FusedConfig`, where `depths` is how many drafts of a pass are trained, a
    window slides with the drafts, and an own embedding learns; and:

    Attributes:
      mask_token: whose embedding the drafts behind the first read.
    """

    mask_token: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, "peagle draft: ", mask_token=whole())
        check_mask_token(self.kind, self.policy, self.mask_token)

    @property
    def trains_embed(self) -> bool:
        return True


def init(policy: Policy, key: jax.Array, *, depths: int = 5,
         aux_depths: Sequence[int] | None = None, vocab: Sequence[int] | np.ndarray | None = None,
         layers: int = 1, window: int | Sequence[int] = 0, qk_norm: bool = False,
         norm_before_residual: bool = False, norm_before_fc: bool = False, fc_norm: bool = False,
         own_embed: bool = True, mask_token: int | None = None) -> Draft:
    """A drafter from random initialisation, float32 masters, on the mesh of `jax.set_mesh` if there
    is one, begun as `drafts.eagle3.init` has it.

    Args and errors: as there, and:
      mask_token: None: an id that no text has (`parts.one_pass.default_mask_token`).
    """
    mask = default_mask_token(policy.config) if mask_token is None else mask_token
    config, state = settled(PeagleConfig, policy, aux_depths, vocab, layers, qk_norm, depths=depths,
                            norm_before_residual=norm_before_residual, window=window,
                            norm_before_fc=norm_before_fc, fc_norm=fc_norm, own_embed=own_embed,
                            mask_token=mask)
    return Draft(fresh_weights(policy, config, specs(config), key, state.get("vocab")), state,
                 config, peagle)


def specs(config: PeagleConfig) -> dict:
    """The parameters of EAGLE-3, and the state of the drafts behind the first, before it is
    fused."""
    width = len(config.aux_depths) * config.block.hidden_size
    return {**block_specs(config), "mask_hidden": ParamSpec((1, 1, width), (None, None, None))}


def masked(config: PeagleConfig, w: dict) -> jax.Array:
    """The fused state [1, 1, D] that the drafts behind the first read."""
    return fused(config, w, jnp.split(w["mask_hidden"], len(config.aux_depths), axis=-1))


def prepare(policy: Policy, draft: Draft) -> Draft:
    """As EAGLE-3's; with what the drafts behind the first read."""
    draft = prepare_block(policy, draft)
    return draft.replace(weights={**draft.weights, "masked": masked(draft.config, draft.weights)})


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """K tokens, each drawn from its own distribution, of one pass over the entries behind the last.
    (They are overwritten once the verifier's states are known.)"""
    config, w, vocab = draft.config, draft.weights, draft.state.get("vocab")
    states, cache, behind = state.rows[0], state.cache, sampler.k - 1
    rows, width = states.shape[0], states.shape[-1]
    if behind:
        hidden = jnp.broadcast_to(w["masked"], (rows, behind, width))
        tokens = jnp.full((rows, behind), config.mask_token, jnp.int32)
        new, cache = recursion.extend(
            inside(policy, config), [block_of(policy, config, w)], 0, cache, hidden,
            tokens, committed.lengths - 1, late=False)
        states = jnp.concatenate([states, new], axis=1)
    # made as rows, as the policy's are in `speculate.cycle`
    scores = logits(policy, config, w, vocab, states.reshape(-1, width))
    scores = scores.reshape(rows, sampler.k, -1)
    drawn = [sampler.draw(scores[:, j], j, vocab) for j in range(sampler.k)]
    tokens, log_q = (jnp.stack(x, axis=1) for x in zip(*drawn, strict=True))
    return Proposal(tokens, log_q, vocab), state.replace(cache=cache)


def unroll(policy: Policy, draft: Draft, trunk: Trunk, tokens: jax.Array,
           depths: int) -> list[jax.Array]:
    """The states [B, S, D] of each of the drafts of a pass behind every position, of a trunk with
    this draft's features over tokens int32 [B, S]. Those at position p predict token p + 1; at
    position 0 they are zeros, as `start` has them."""
    config, out = draft.config, []
    w = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    block = block_of(policy, config, w)
    hidden, tokens = fused(config, w, trunk.features), recursion.next_tokens(tokens)
    rope = rope_table(config.block, jnp.arange(tokens.shape[1])[None])
    earlier: list[list] = [[] for _ in block.windows]
    for _ in range(depths):
        states, _ = block.run(hidden, tokens, rope,
                              [unrolled_attention(own, window, slides=True)
                               for own, window in zip(earlier, block.windows, strict=True)])
        out.append(shift(states))
        hidden = jnp.broadcast_to(masked(config, w), hidden.shape)
        tokens = jnp.full_like(tokens, config.mask_token)
    return out


def loss(policy: Policy, draft: Draft, batch: DraftBatch,
         kind: str) -> tuple[jax.Array, jax.Array, Metrics]:
    """As EAGLE-3's, over the drafts of a pass."""
    return loss_over(policy, draft, batch, kind, unroll)


peagle = Drafter("peagle", PeagleConfig, init, propose, features, specs, prepare,
                 start, observe, loss, model=model)
