"""A decoder block on states of the policy's trunk and the embedding of the token after them, as
EAGLE-3 has it (https://arxiv.org/abs/2503.01840): what drafters that differ in what comes behind
its first state have in common.

The residual streams at some depths are fused into one hidden state by a projection. The block's
attention sees that and the embedding, normed and side by side, and its residual is the hidden state
alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jspec.arguments import flag, settle, whole, whole_numbers
from jspec.drafts.base import Draft
from jspec.drafts.parts import recursion
from jspec.drafts.parts.vocabulary import check_vocab, table_logits
from jspec.errors import InputError
from jspec.model import (
    ModelConfig,
    ParamSpec,
    Policy,
    check_policy,
    embed,
    init_weights,
    layer_specs,
    place_on_mesh,
)
from jspec.model.layers import decoder_layer, fuse, rms_norm
from jspec.model.linear import linear

MOST_LAYERS = 64
"""Of a draft; published ones have one, or a few."""


@dataclasses.dataclass(frozen=True)
class FusedConfig:
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
        settle(self, f"{self.kind} draft: ", aux_depths=whole_numbers, vocab_size=whole(),
               depths=whole(1, 32), window=self._windows, **dict.fromkeys(flags, flag))
        if self.norm_before_fc and self.fc_norm:
            raise InputError(f"{self.kind} draft: norm_before_fc and fc_norm exclude each other; "
                             "set one of them")
        check_fused(self.kind, self.policy, self.block, self.aux_depths)

    @property
    def kind(self) -> str:
        """The drafter's name, for messages."""
        return type(self).__name__.removesuffix("Config").lower()

    @property
    def trains_embed(self) -> bool:
        """Whether an own embedding is trained."""
        return False

    def _windows(self, label: str, value: Any) -> tuple[int, ...]:
        layers = self.block.num_layers
        if not isinstance(value, list | tuple):
            return (whole()(label, value),) * layers
        if len(value) != layers:
            raise InputError(f"{label} has {len(value)} numbers, and the block has {layers} layers;"
                             " give one for each")
        return whole_numbers(label, value)


def check_fused(kind: str, policy: ModelConfig, block: ModelConfig,
                depths: tuple[int, ...]) -> None:
    """Raise InputError where a draft's layers are not as wide as the policy, or `depths` are not
    depths of it, each once; `kind` is the drafter's name."""
    n = policy.num_layers
    if block.hidden_size != policy.hidden_size:
        raise InputError(f"{kind} draft: its hidden size is {block.hidden_size}, the policy's is "
                         f"{policy.hidden_size}; take a draft made for this policy")
    if not depths or len(set(depths) & set(range(n + 1))) < len(depths):
        raise InputError(f"{kind} draft: auxiliary layers at depths {list(depths)} of a policy of "
                         f"{n} layers; they must be distinct and from 0 (the embeddings) to {n}; "
                         "set aux_depths, or take a draft made for this policy")


def published_depths(num_layers: int) -> tuple[int, ...]:
    """The depths that a checkpoint fuses which names none; () where a policy does not have them."""
    depths = (2, num_layers // 2, num_layers - 3)
    there = 0 <= min(depths) and max(depths) <= num_layers and len(set(depths)) == 3
    return depths if there else ()


def default_depths(num_layers: int) -> tuple[int, ...]:
    """The depths that a new draft fuses: as published, where the policy has as many; else its
    embeddings, its middle and its last."""
    return published_depths(num_layers) or tuple(sorted({0, num_layers // 2, num_layers}))


Config = TypeVar("Config", bound=FusedConfig)


def settled(kind: type[Config], policy: Policy, aux_depths: Sequence[int] | None,
            vocab: Sequence[int] | np.ndarray | None, layers: int, qk_norm: bool,
            **options: Any) -> tuple[Config, dict[str, jax.Array]]:
    """The config of a fresh draft, and its state: see `init`."""
    name = kind.__name__.removesuffix("Config").lower()
    check_policy(f"the policy of a draft of {name}", policy, stacked=True)
    made = policy.config
    ids = None if vocab is None else check_vocab(vocab, made.vocab_size, name)
    family = "qwen3" if flag(f"{name} draft: qk_norm", qk_norm) else "llama"
    block = dataclasses.replace(made, family=family, qk_norm=qk_norm, qkv_bias=False,
                                num_layers=whole(1, MOST_LAYERS)(f"{name} draft: layers", layers),
                                tie_embeddings=False, out_bias=False, mlp_bias=False,
                                stop_tokens=(), pad_token=0, tokenless=(), experts=None)
    chosen = default_depths(made.num_layers) if aux_depths is None else cast(tuple, aux_depths)
    config = kind(made, block, chosen, 0 if ids is None else len(ids), **options)
    return config, {} if ids is None else {"vocab": jnp.asarray(ids)}


def fresh_weights(policy: Policy, config: FusedConfig, tree: dict, key: jax.Array,
                  ids: jax.Array | None) -> dict:
    """Weights of these specs from random initialisation: see `init`."""
    made, streams = policy.config, len(config.aux_depths)

    def fresh(key: jax.Array, theirs: dict) -> dict:
        weights = init_weights(tree, key, made.initializer_range)
        mix = jnp.tile(jnp.eye(made.hidden_size, dtype=jnp.float32), (1, streams)) / streams
        table = theirs["embed" if made.tie_embeddings else "head"]
        # copies: training donates the policy's buffers and the draft's in one call
        own = {"embed": theirs["embed"] + 0} if config.own_embed else {}
        return {**weights, **own, "fc": weights["fc"] + mix, "norm": theirs["final_norm"] + 0,
                "head": (table if ids is None else table[ids]) + 0}

    theirs = {name: x for name, x in policy.weights.items() if name != "layers"}
    return place_on_mesh(fresh, tree, config.block)(key, theirs)


def features(config: FusedConfig) -> tuple[int, ...]:
    return config.aux_depths


def specs(config: FusedConfig) -> dict:
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


def model(config: FusedConfig) -> ModelConfig:
    return config.block


def prepare(policy: Policy, draft: Draft) -> Draft:
    """Cast to the policy's compute dtype, shard as the policy is, and fuse the block's
    projections."""
    weights = recursion.cast_and_split(policy, draft)
    first, *further = (fuse(draft.config.block, w, policy.layout) for w in layers_of(weights))
    return draft.replace(weights={**weights, "layer": first, "further": tuple(further)})


def layers_of(w: dict) -> list[dict]:
    """The weights of each of the block's layers."""
    return [w["layer"], *w.get("further", ())]


def inside(policy: Policy, config: FusedConfig) -> Policy:
    """The policy with the block's config in its own's place: what the block's heads and rope are
    read from."""
    return policy.replace(config=config.block)


def fused(config: FusedConfig, w: dict, streams: Sequence[jax.Array]) -> jax.Array:
    """The trunk's streams [B, T, D] at the auxiliary depths as one hidden state [B, T, D]."""
    eps = config.block.rms_norm_eps
    if config.fc_norm:
        streams = [rms_norm(x, scale, eps) for x, scale in zip(streams, w["fc_norm"], strict=True)]
    x = jnp.concatenate(streams, axis=-1)
    return linear(rms_norm(x, w["input_norm"], eps) if config.norm_before_fc else x, w["fc"])


def block_of(policy: Policy, config: FusedConfig, w: dict) -> recursion.Block:
    """The block, as `parts.recursion` takes it."""
    eps = config.block.rms_norm_eps

    def run(hidden, tokens, rope, attends) -> tuple[jax.Array, list]:
        embedding = policy
        if config.own_embed:
            own = w["embed"] if config.trains_embed else jax.lax.stop_gradient(w["embed"])
            embedding = policy.replace(weights={"embed": own})
        embedded = embed(embedding, tokens)
        normed = rms_norm(hidden, w["hidden_norm"], eps)
        inputs = jnp.concatenate([rms_norm(embedded, w["embed_norm"], eps), normed], axis=-1)
        x, caches = normed if config.norm_before_residual else hidden, []
        for layer, attend in zip(layers_of(w), attends, strict=True):
            x, cache, _ = decoder_layer(config.block, layer, x, rope, attend,
                                        None if caches else inputs)
            caches.append(cache)
        return (rms_norm(x, w["norm"], eps) if config.norm_output else x), caches

    return recursion.Block(run, tuple(window or None for window in cast(tuple, config.window)))


def logits(policy: Policy, config: FusedConfig, w: dict, vocab: jax.Array | None,
           states: jax.Array) -> jax.Array:
    """Logits float32 [..., Vd] of the block's states [..., D], over the draft's vocabulary."""
    return table_logits(policy, w["head"].astype(policy.dtype), vocab, normed(config, w, states))


def normed(config: FusedConfig, w: dict, states: jax.Array) -> jax.Array:
    return states if config.norm_output else rms_norm(states, w["norm"], config.block.rms_norm_eps)
