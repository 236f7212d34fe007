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
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jspec.arguments import flag, settle, whole, whole_numbers
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
from jspec.drafts.parts.losses import loss_over_depths, state_loss
from jspec.drafts.parts.unroll import shift
from jspec.drafts.parts.vocabulary import check_vocab, table_logits
from jspec.errors import InputError
from jspec.model import (
    KeyValues,
    ModelConfig,
    ParamSpec,
    Policy,
    Trunk,
    check_policy,
    embed,
    init_weights,
    layer_specs,
    place_on_mesh,
)
from jspec.model.layers import decoder_layer, fuse, rms_norm
from jspec.model.linear import linear


@dataclasses.dataclass(frozen=True)
class Eagle3Config:
    """Which of the published variants this is.

    Attributes:
      block: the block as a model of its layers: their number, heads, rope, widths, biases and
        norms of queries and keys, which need not be the policy's.
      aux_depths: what is fused; depth i is the policy's residual stream after i layers (0: the
        embeddings).
      vocab_size: of the reduced vocabulary, 0: the policy's.
      depths: how many are unrolled in training; at inference k may be larger.
      norm_before_residual: the block's residual is the normed hidden state. norm_before_fc: one
        norm over the concatenated streams. fc_norm: one norm for each of them. norm_output: the
        next depth reads the normed state.
      window: of the trunk's entries each layer's attention sees the last so many, one number a
        layer (or one for all); 0: all of them.
      own_embed: the draft has an embedding of its own, which training leaves as it is; else it is
        the policy's.
      dtype: in which a checkpoint is written.
    """

    policy: ModelConfig
    block: ModelConfig
    aux_depths: tuple[int, ...]
    vocab_size: int = 0
    depths: int = 3
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    window: int | tuple[int, ...] = 0
    own_embed: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "own_embed")
        settle(self, "eagle3 draft: ", aux_depths=whole_numbers, vocab_size=whole(),
               depths=whole(1, 32), window=self._windows, **dict.fromkeys(flags, flag))
        n, hidden = self.policy.num_layers, self.policy.hidden_size
        if self.norm_before_fc and self.fc_norm:
            raise InputError("eagle3 draft: norm_before_fc and fc_norm exclude each other; set one "
                             "of them")
        if self.block.hidden_size != hidden:
            raise InputError(f"eagle3 draft: its hidden size is {self.block.hidden_size}, the "
                             f"policy's is {hidden}; take a draft made for this policy")
        if (not self.aux_depths or len(set(self.aux_depths) & set(range(n + 1)))
            < len(self.aux_depths)):
            raise InputError(f"eagle3 draft: auxiliary layers at depths {list(self.aux_depths)} of "
                             f"a policy of {n} layers; they must be distinct and from 0 (the "
                             f"embeddings) to {n}; set aux_depths, or take a draft made for this "
                             "policy")

    def _windows(self, label: str, value: Any) -> tuple[int, ...]:
        layers = self.block.num_layers
        if not isinstance(value, list | tuple):
            return (whole()(label, value),) * layers
        if len(value) != layers:
            raise InputError(f"{label} has {len(value)} numbers, and the block has {layers} layers;"
                             " give one for each")
        return whole_numbers(label, value)


def published_depths(num_layers: int) -> tuple[int, ...]:
    """The depths that a checkpoint fuses which names none; () where a policy does not have them."""
    depths = (2, num_layers // 2, num_layers - 3)
    there = 0 <= min(depths) and max(depths) <= num_layers and len(set(depths)) == 3
    return depths if there else ()


def default_depths(num_layers: int) -> tuple[int, ...]:
    """The depths that a new draft fuses: as published, where the policy has as many; else its
    embeddings, its middle and its last."""
    return published_depths(num_layers) or tuple(sorted({0, num_layers // 2, num_layers}))


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
      aux_depths: the depths to fuse; None: `default_depths`.
      vocab: the token ids that may be drafted (`parts.vocabulary.most_frequent` of the policy's own
        rollouts), or None for all of them.
      layers: of the block. qk_norm: they norm queries and keys, as Qwen3's do.
      depths, window, norm_before_residual, norm_before_fc, fc_norm, norm_output, own_embed: see
      `Eagle3Config`.

    Raises InputError for depths that the policy does not have, options that exclude each other, a
    vocabulary that is none, or a policy in a rollout layout.
    """
    check_policy("the policy of an eagle3 draft", policy, stacked=True)
    made = policy.config
    ids = None if vocab is None else check_vocab(vocab, made.vocab_size, "eagle3")
    family = "qwen3" if flag("eagle3 draft: qk_norm", qk_norm) else "llama"
    block = dataclasses.replace(made, family=family, qk_norm=qk_norm, qkv_bias=False,
                                num_layers=whole(1, 64)("eagle3 draft: layers", layers),
                                tie_embeddings=False, out_bias=False, mlp_bias=False,
                                stop_tokens=(), pad_token=0, tokenless=(), experts=None)
    fused = default_depths(made.num_layers) if aux_depths is None else cast(tuple, aux_depths)
    config = Eagle3Config(made, block, fused, 0 if ids is None else len(ids), depths,
                          norm_before_residual, norm_before_fc, fc_norm, norm_output,
                          cast(Any, window), own_embed)

    def fresh(key: jax.Array, theirs: dict) -> dict:
        weights = init_weights(specs(config), key, made.initializer_range)
        streams = len(config.aux_depths)
        mix = jnp.tile(jnp.eye(made.hidden_size, dtype=jnp.float32), (1, streams)) / streams
        table = theirs["embed" if made.tie_embeddings else "head"]
        # copies: training donates the policy's buffers and the draft's in one call
        own = {"embed": theirs["embed"] + 0} if own_embed else {}
        return {**weights, **own, "fc": weights["fc"] + mix, "norm": theirs["final_norm"] + 0,
                "head": (table if ids is None else table[ids]) + 0}

    theirs = {name: x for name, x in policy.weights.items() if name != "layers"}
    return Draft(weights=place_on_mesh(fresh, specs(config), block)(key, theirs), config=config,
                 drafter=eagle3, state={} if ids is None else {"vocab": jnp.asarray(ids)})


def features(config: Eagle3Config) -> tuple[int, ...]:
    return config.aux_depths


def specs(config: Eagle3Config) -> dict:
    """The drafter's parameters. A reduced vocabulary's rows lie on every device, as every device
    draws from all."""
    d, n = config.block.hidden_size, len(config.aux_depths)
    norm = ParamSpec((d,), ("norm",), "ones")
    further = layer_specs(config.block)
    for name in ("o", "down"):
        further[name] = dataclasses.replace(further[name], init="zeros")
    layer = {name: spec for name, spec in further.items() if name != "attn_norm"}
    for name in "qkv":
        layer[name] = dataclasses.replace(layer[name], shape=(layer[name].shape[0], 2 * d))
    out = {"fc": ParamSpec((d, n * d), ("embed", None)), "embed_norm": norm, "hidden_norm": norm,
           "layer": layer,
           "norm": norm, "head": ParamSpec((config.vocab_size or config.policy.vocab_size, d),
                                           (None if config.vocab_size else "vocab", "embed"))}
    if config.block.num_layers > 1:
        out["further"] = (further,) * (config.block.num_layers - 1)
    if config.norm_before_fc:
        out["input_norm"] = ParamSpec((n * d,), ("norm",), "ones")
    if config.fc_norm:
        out["fc_norm"] = (norm,) * n
    if config.own_embed:
        out["embed"] = ParamSpec((config.policy.vocab_size, d), ("vocab", "embed"))
    return out


def model(config: Eagle3Config) -> ModelConfig:
    return config.block


def prepare(policy: Policy, draft: Draft) -> Draft:
    """Cast to the policy's compute dtype, shard as the policy is, and fuse the block's
    projections."""
    weights = recursion.cast_and_split(policy, draft)
    first, *further = (fuse(draft.config.block, w, policy.layout) for w in _layers(weights))
    return draft.replace(weights={**weights, "layer": first, "further": tuple(further)})


def _layers(w: dict) -> list[dict]:
    """The weights of each of the block's layers."""
    return [w["layer"], *w.get("further", ())]


def _inside(policy: Policy, config: Eagle3Config) -> Policy:
    """The policy with the block's config in its own's place: what the block's heads and rope are
    read from."""
    return policy.replace(config=config.block)


def _fused(config: Eagle3Config, w: dict, trunk: Trunk) -> jax.Array:
    """The trunk's streams [B, T, D] at the auxiliary depths as one hidden state [B, T, D]."""
    streams, eps = trunk.features, config.block.rms_norm_eps
    if config.fc_norm:
        streams = [rms_norm(x, scale, eps) for x, scale in zip(streams, w["fc_norm"], strict=True)]
    x = jnp.concatenate(streams, axis=-1)
    return linear(rms_norm(x, w["input_norm"], eps) if config.norm_before_fc else x, w["fc"])


def _block(policy: Policy, config: Eagle3Config, w: dict) -> recursion.Block:
    """The block, as `parts.recursion` takes it."""
    eps = config.block.rms_norm_eps

    def run(hidden, tokens, rope, attends) -> tuple[jax.Array, list]:
        embedded = embed(policy.replace(weights={"embed": jax.lax.stop_gradient(w["embed"])})
                         if config.own_embed else policy, tokens)
        normed = rms_norm(hidden, w["hidden_norm"], eps)
        inputs = jnp.concatenate([rms_norm(embedded, w["embed_norm"], eps), normed], axis=-1)
        x, caches = normed if config.norm_before_residual else hidden, []
        for layer, attend in zip(_layers(w), attends, strict=True):
            x, cache, _ = decoder_layer(config.block, layer, x, rope, attend,
                                        None if caches else inputs)
            caches.append(cache)
        return (rms_norm(x, w["norm"], eps) if config.norm_output else x), caches

    return recursion.Block(run, tuple(window or None for window in cast(tuple, config.window)))


def logits(policy: Policy, config: Eagle3Config, w: dict, vocab: jax.Array | None,
           states: jax.Array) -> jax.Array:
    """Logits float32 [..., Vd] of the block's states [..., D], over the draft's vocabulary."""
    return table_logits(policy, w["head"].astype(policy.dtype), vocab, _normed(config, w, states))


def _normed(config: Eagle3Config, w: dict, states: jax.Array) -> jax.Array:
    return states if config.norm_output else rms_norm(states, w["norm"], config.block.rms_norm_eps)


def start(policy: Policy, draft: Draft, prefill: Prefill) -> tuple[recursion.Rows, KeyValues]:
    """The block's state at each prompt's last token, and its keys and values over the prompts;
    after a prompt of one token the state is zeros, and the first draft's distribution is flat."""
    config, w = draft.config, draft.weights
    return recursion.start(_inside(policy, config), [_block(policy, config, w)],
                           _fused(config, w, prefill.trunk), recursion.next_tokens(prefill.tokens),
                           prefill.lengths - 1)


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """K sampled tokens with the distributions they were drawn from (`parts.recursion.propose`)."""
    config, w, vocab = draft.config, draft.weights, draft.state.get("vocab")
    return recursion.propose(
        _inside(policy, config), [_block(policy, config, w)], state, committed.lengths - 1,
        sampler, partial(logits, policy, config, w, vocab), vocab)


def observe(policy: Policy, draft: Draft, state: DraftState,
            observation: Observation) -> DraftState:
    """Rewrite the cache of the committed positions from the verifier's states; keep the state at
    the last one."""
    config, w = draft.config, draft.weights
    return recursion.observe(_inside(policy, config), [_block(policy, config, w)], state,
                             observation.lengths - 1, _fused(config, w, observation.trunk),
                             observation)


def unroll(policy: Policy, draft: Draft, trunk: Trunk, tokens: jax.Array,
           depths: int) -> list[jax.Array]:
    """The states [B, S, D] of each of the depths, of a trunk with this draft's features over tokens
    int32 [B, S]. Those at position p predict token p + 1; at position 0 they are zeros, as `start`
    has them."""
    config = draft.config
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    states = recursion.unroll(_inside(policy, config), [_block(policy, config, weights)],
                              _fused(config, weights, trunk), recursion.next_tokens(tokens), depths)
    return [shift(x) for x in states]


def loss(policy: Policy, draft: Draft, batch: DraftBatch,
         kind: str) -> tuple[jax.Array, jax.Array, Metrics]:
    """`parts.losses.loss_over_depths` of this drafter, its depths unrolled as at inference.

    policy: any layout; only its embedding and output head are read. Detach it before the call.
    draft: unprepared, float32 masters. kind: one of `choices.DRAFT_LOSSES`, or "states":
    `parts.losses.state_loss` of the first depth.
    """
    config, w, vocab = draft.config, draft.weights, draft.state.get("vocab")
    states = unroll(policy, draft, batch.trunk, batch.tokens,
                    1 if kind == "states" else config.depths)
    if kind == "states":
        return state_loss(policy, batch, [batch.predicting(_normed(config, w, x)) for x in states])
    return loss_over_depths(policy, batch, [batch.predicting(x) for x in states],
                            partial(logits, policy, config, w, vocab), vocab, kind)


eagle3 = Drafter("eagle3", Eagle3Config, init, propose, features, specs, prepare, start, observe,
                 loss, model=model)
