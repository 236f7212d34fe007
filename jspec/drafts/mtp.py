"""Multi-token-prediction heads: decoder blocks of their own on the policy's trunk, embedding and output head.

At position p a block reads the trunk's hidden state of position p - 1 and the embedding of token p, and predicts token
p + 1. The next depth reads the state of the depth before in the trunk's place: with a block of its own
(https://arxiv.org/abs/2404.19737, https://arxiv.org/abs/2412.19437), or, where there are fewer blocks than depths, with
the last block once more (unrolled in training as at inference, https://arxiv.org/abs/2503.01840). After each cycle the
keys and values of committed positions are rewritten from the verifier's states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jspec.drafts.base import Committed, Draft, Observation, Prefill, Proposal, Sampler
from jspec.drafts.parts.losses import loss_over_depths, predicting
from jspec.drafts.parts.unroll import shift, unrolled_attention
from jspec.drafts.parts.vocabulary import check_vocab, output_table, table_logits
from jspec.errors import InputError
from jspec.kernels import attend as attend_cached
from jspec.model import ModelConfig, ParamSpec, Policy, Trunk, embed, init_weights, layer_specs, place_on_mesh
from jspec.model.attention import causal_attention, to_cache
from jspec.model.layers import decoder_layer, fuse, linear, rms_norm, rope_table
from jspec.sharding import constrain, constrain_tree


@dataclasses.dataclass(frozen=True)
class MtpConfig:
    """A head's shape, and the conventions by which published heads differ (`jspec.hub.mtp_heads`).

    Raises InputError if not 1 <= blocks <= depths.

    Attributes:
      policy: of the policy that it drafts for.
      depths: how many are unrolled in training; at inference k may be larger.
      blocks: how many depths have a block of their own.
      vocab_size: of the reduced vocabulary, 0: the policy's.
      hidden_first: the order in which hidden state and embedding are concatenated.
      normed_trunk: the first depth reads the trunk's state after its final norm; False: before it.
      first: the first position that later ones attend to; 1 (with one block only): position 0, which has no state
        before it, is left out, as in a head that was trained on pairs of a state and the next token.
      dtype: in which a published layout stores the weights; here they are float32 masters.
    """

    policy: ModelConfig
    depths: int = 2
    blocks: int = 1
    vocab_size: int = 0
    hidden_first: bool = False
    normed_trunk: bool = True
    first: int = 0
    dtype: str = "float32"
    name: str = "mtp"

    def __post_init__(self):
        if not 1 <= self.blocks <= self.depths:
            raise InputError(f"mtp draft: blocks = {self.blocks} must be at least 1 and at most depths = {self.depths}")
        assert self.first == 0 or self.blocks == 1, "every further block would begin one position later"


def init(policy: Policy, key: jax.Array, *, depths: int = 2, blocks: int = 1,
         vocab: Sequence[int] | np.ndarray | None = None) -> Draft:
    """A head from random initialisation, float32 masters, on the mesh of `jax.set_mesh` if there is one.

    A block starts as the identity (its two output projections are zero) on an even mix of both inputs.

    Args:
      policy: in the training layout.
      depths: how many are unrolled in training.
      blocks: the first depths that have a block of their own; the last one serves the depths after it too.
      vocab: the token ids that may be drafted (`parts.vocabulary.most_frequent` of the policy's own rollouts), or None
        for all of them.

    Raises InputError if not 1 <= blocks <= depths, or for a vocabulary that is none.
    """
    ids = None if vocab is None else check_vocab(vocab, policy.config.vocab_size, "mtp")
    config = MtpConfig(policy.config, depths, blocks, 0 if ids is None else len(ids))
    d = policy.config.hidden_size

    def make(key):
        weights = init_weights(specs(config), key, policy.config.initializer_range)
        for block in weights["blocks"]:
            block["proj"] = block["proj"] + 0.5 * jnp.concatenate([jnp.eye(d), jnp.eye(d)], axis=1)
        return weights

    return Draft(weights=place_on_mesh(make, specs(config), policy.config)(key), config=config,
                 state={} if ids is None else {"vocab": jnp.asarray(ids)})


def features(config: MtpConfig) -> tuple[int, ...]:
    return () if config.normed_trunk else (config.policy.num_layers,)


def _trunk_states(config: MtpConfig, trunk: Trunk) -> jax.Array:
    """What the first depth reads, [B, T, D]."""
    return trunk.hidden if config.normed_trunk else trunk.features[0]


def specs(config: MtpConfig) -> dict:
    """The head's parameters; embedding and output head are the policy's."""
    d = config.policy.hidden_size
    layer = layer_specs(config.policy)
    for name in ("o", "down"):
        layer[name] = dataclasses.replace(layer[name], init="zeros")
    block = {"embed_norm": ParamSpec((d,), ("norm",), "ones"), "hidden_norm": ParamSpec((d,), ("norm",), "ones"),
             "proj": ParamSpec((d, 2 * d), ("embed", None)), "layer": layer,
             "final_norm": ParamSpec((d,), ("norm",), "ones")}
    return {"blocks": (block,) * config.blocks}


def prepare(policy: Policy, draft: Draft) -> Draft:
    """Cast to the policy's compute dtype, shard as the policy is, fuse the blocks' projections, and gather the rows of
    the output head that are drafted from."""
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    weights = constrain_tree(weights, specs(draft.config), policy.config, policy.layout)
    blocks = tuple({**w, "layer": fuse(policy.config, w["layer"])} for w in weights["blocks"])
    return draft.replace(weights={"blocks": blocks, "table": output_table(policy, draft.state.get("vocab"))})


def _block(policy: Policy, config: MtpConfig, w: dict, hidden: jax.Array, tokens: jax.Array, rope, attend):
    """hidden [B, T, D] of the positions before those of tokens [B, T] -> the block's normed states [B, T, D]."""
    eps = policy.config.rms_norm_eps
    inputs = [rms_norm(embed(policy, tokens), w["embed_norm"], eps), rms_norm(hidden, w["hidden_norm"], eps)]
    x = jnp.concatenate(inputs[::-1] if config.hidden_first else inputs, axis=-1)
    x, cache = decoder_layer(policy.config, w["layer"], linear(x, w["proj"]), rope, attend)
    return rms_norm(x, w["final_norm"], eps), cache


def start(policy: Policy, draft: Draft, prefill: Prefill, cache_size: int) -> tuple[dict, ...]:
    """Of every block, its cache over the prompts and its state at each prompt's last token."""
    rope, first = rope_table(policy.config, jnp.arange(prefill.tokens.shape[1])[None]), draft.config.first

    def attend(q, k, v):
        return causal_attention(q, k, v, first), tuple(to_cache(x[:, first:], cache_size) for x in (k, v))

    states, out = _trunk_states(draft.config, prefill.trunk), []
    for w in draft.weights["blocks"]:
        states, (k, v) = _block(policy, draft.config, w, shift(states), prefill.tokens, rope, attend)
        last = jnp.take_along_axis(states, prefill.lengths[:, None, None] - 1, axis=1)
        out.append({"k": k, "v": v, "hidden": last})
    return tuple(out)


def _extend(policy: Policy, draft: Draft, index: int, state: dict, hidden: jax.Array, tokens: jax.Array,
            lengths: jax.Array):
    """Run tokens [N, T] at positions lengths .. lengths + T - 1 through a block, writing its cache."""
    rope = rope_table(policy.config, lengths[:, None] + jnp.arange(tokens.shape[1])[None])

    def attend(q, k, v):
        # a cache holds no positions before the first, so that the kernel needs to know nothing of them
        out, new_k, new_v = attend_cached(policy, q, k, v, state["k"], state["v"], lengths - draft.config.first)
        return out, (new_k, new_v)

    states, (k, v) = _block(policy, draft.config, draft.weights["blocks"][index], hidden, tokens, rope, attend)
    return states, {**state, "k": k, "v": v}


def propose(policy: Policy, draft: Draft, state: tuple[dict, ...], committed: Committed, sampler: Sampler):
    """K sampled tokens with the distributions they were drawn from; depth j + 1 reads depth j's states and tokens.

    A block of its own has to catch up first: at depth j it has not yet seen the j - 1 tokens drafted before.
    """
    vocab, last = draft.state.get("vocab"), draft.config.blocks - 1
    state, tokens, log_qs = list(state), [], []
    states = state[0]["hidden"]  # of the current depth's block, from position lengths - 1 on
    for j in range(sampler.k):
        if 0 < j <= last:
            new, state[j] = _extend(policy, draft, j, state[j], states, jnp.stack(tokens, axis=1), committed.lengths)
            states = jnp.concatenate([state[j]["hidden"], new], axis=1)
        elif j:
            states, state[last] = _extend(policy, draft, last, state[last], states[:, -1:], tokens[-1][:, None],
                                          committed.lengths + j - 1)
        scores = table_logits(policy, draft.weights["table"], states[:, -1], whole=vocab is None)
        token, log_q = sampler.draw(scores, j, vocab)
        tokens.append(token)
        log_qs.append(log_q)
    return Proposal(jnp.stack(tokens, axis=1), jnp.stack(log_qs, axis=1), vocab), tuple(state)


def observe(policy: Policy, draft: Draft, state: tuple[dict, ...], observation: Observation) -> tuple[dict, ...]:
    """Rewrite the caches of the committed positions from the verifier's states; keep the states at the last one."""
    at = jnp.maximum(observation.count - 1, 0)[:, None, None]
    live = (observation.count > 0)[:, None, None]
    hidden, out = _trunk_states(draft.config, observation.trunk), []
    for index, before in enumerate(state):
        states, new = _extend(policy, draft, index, before, hidden, observation.tokens, observation.lengths)
        last = jnp.where(live, jnp.take_along_axis(states, at, axis=1), before["hidden"])
        out.append({**new, "hidden": constrain(last, policy.layout, "batch", None, None)})
        hidden = jnp.concatenate([before["hidden"], states[:, :-1]], axis=1)
    return tuple(out)


def loss(policy: Policy, draft: Draft, trunk: Trunk, tokens: jax.Array, response_start: jax.Array, mask: jax.Array,
         temperature: jax.Array, kind: str):
    """`parts.losses.loss_over_depths` of this head, its depths unrolled as at inference.

    Args:
      policy: any layout; only its embedding and output head are read. Detach it (and `trunk`) before the call.
      draft: unprepared, float32 masters.
      trunk: over contiguous prompt + response rows [B, S, D], tokens int32 [B, S].
      response_start: int32 [B], position of the first response token, at least 1. mask: bool [B, T], tokens trained.
      temperature: float32 scalar or [B]; 0 counts as 1. kind: one of `parts.losses.LOSSES`.
    """
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    rope = rope_table(policy.config, jnp.arange(tokens.shape[1])[None])
    states, outputs = _trunk_states(draft.config, trunk), []
    for depth in range(draft.config.depths):
        if depth < draft.config.blocks:
            w, earlier = weights["blocks"][depth], []
        states, _ = _block(policy, draft.config, w, shift(states), tokens, rope,
                           unrolled_attention(earlier, draft.config.first))
        outputs.append(predicting(states, response_start, mask.shape[1]))
    vocab = draft.state.get("vocab")
    table = output_table(policy, vocab)
    return loss_over_depths(policy, predicting(trunk.hidden, response_start, mask.shape[1]), outputs,
                            lambda x: table_logits(policy, table, x, whole=vocab is None), vocab, mask, temperature,
                            kind)
