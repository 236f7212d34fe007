"""A multi-token-prediction head: one decoder block of its own on the policy's trunk, embedding and output head.

At position p it reads the trunk's normed hidden state of position p - 1 and the embedding of token p, and predicts
token p + 1; for more than one draft it is applied recursively, its own state standing in for the trunk's
(https://arxiv.org/abs/2404.19737, https://arxiv.org/abs/2412.19437; unrolled in training as at inference,
https://arxiv.org/abs/2503.01840). After each cycle its keys and values are rewritten from the verifier's states.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jspec.drafts.base import Committed, Draft, Observation, Prefill, Sampler
from jspec.errors import InputError
from jspec.kernels import attend as attend_cached
from jspec.model import ModelConfig, ParamSpec, Policy, embed, init_weights, layer_specs, logits, place_on_mesh
from jspec.model.attention import causal_attention, to_cache
from jspec.model.chunks import sum_over_chunks
from jspec.model.layers import decoder_layer, fuse, linear, rms_norm, rope_table
from jspec.sharding import constrain, constrain_tree


@dataclasses.dataclass(frozen=True)
class MtpConfig:
    """depths: how many recursive applications the loss unrolls; at inference k may be larger."""

    policy: ModelConfig
    depths: int = 2
    name: str = "mtp"


def init(policy: Policy, key: jax.Array, *, depths: int = 2) -> Draft:
    """A head from random initialisation, float32 masters, on the mesh of `jax.set_mesh` if there is one.

    The block starts as the identity (its two output projections are zero) on an even mix of both inputs.
    Raises InputError if depths < 1.
    """
    if depths < 1:
        raise InputError(f"mtp draft: depths = {depths} must be at least 1")
    config = MtpConfig(policy.config, depths)
    d = policy.config.hidden_size

    def make(key):
        weights = init_weights(specs(config), key, policy.config.initializer_range)
        weights["proj"] = weights["proj"] + 0.5 * jnp.concatenate([jnp.eye(d), jnp.eye(d)], axis=1)
        return weights

    return Draft(weights=place_on_mesh(make, specs(config), policy.config)(key), state={}, config=config)


def features(config: MtpConfig) -> tuple[int, ...]:
    return ()


def specs(config: MtpConfig) -> dict:
    """The head's parameters; embedding and output head are the policy's."""
    d = config.policy.hidden_size
    layer = layer_specs(config.policy)
    for name in ("o", "down"):
        layer[name] = dataclasses.replace(layer[name], init="zeros")
    return {"embed_norm": ParamSpec((d,), ("norm",), "ones"), "hidden_norm": ParamSpec((d,), ("norm",), "ones"),
            "proj": ParamSpec((d, 2 * d), ("embed", None)), "layer": layer,
            "final_norm": ParamSpec((d,), ("norm",), "ones")}


def prepare(policy: Policy, draft: Draft) -> Draft:
    """Cast to the policy's compute dtype, shard as the policy is, and fuse the block's projections."""
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    weights = constrain_tree(weights, specs(draft.config), policy.config, policy.layout)
    return draft.replace(weights={**weights, "layer": fuse(policy.config, weights["layer"])})


def _block(policy: Policy, w: dict, hidden: jax.Array, tokens: jax.Array, rope, attend):
    """hidden [B, T, D] of the positions before those of tokens [B, T] -> the head's normed states [B, T, D]."""
    eps = policy.config.rms_norm_eps
    x = jnp.concatenate([rms_norm(embed(policy, tokens), w["embed_norm"], eps),
                         rms_norm(hidden, w["hidden_norm"], eps)], axis=-1)
    x, cache = decoder_layer(policy.config, w["layer"], linear(x, w["proj"]), rope, attend)
    return rms_norm(x, w["final_norm"], eps), cache


def _shift(hidden: jax.Array) -> jax.Array:
    """[B, S, D] moved one position later; position 0 has no predecessor and reads zeros."""
    return jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def start(policy: Policy, draft: Draft, prefill: Prefill, cache_size: int) -> dict:
    """The head's cache over the prompts, and its state at each prompt's last token."""
    rope = rope_table(policy.config, jnp.arange(prefill.tokens.shape[1])[None])

    def attend(q, k, v):
        return causal_attention(q, k, v), (to_cache(k, cache_size), to_cache(v, cache_size))

    states, (k, v) = _block(policy, draft.weights, _shift(prefill.trunk.hidden), prefill.tokens, rope, attend)
    last = jnp.take_along_axis(states, prefill.lengths[:, None, None] - 1, axis=1)
    return {"k": k, "v": v, "hidden": last}


def _extend(policy: Policy, draft: Draft, state: dict, hidden: jax.Array, tokens: jax.Array, lengths: jax.Array):
    """Run tokens [N, T] at positions lengths .. lengths + T - 1 through the block, writing its cache."""
    rope = rope_table(policy.config, lengths[:, None] + jnp.arange(tokens.shape[1])[None])

    def attend(q, k, v):
        out, new_k, new_v = attend_cached(policy, q, k, v, state["k"], state["v"], lengths)
        return out, (new_k, new_v)

    states, (k, v) = _block(policy, draft.weights, hidden, tokens, rope, attend)
    return states, {**state, "k": k, "v": v}


def propose(policy: Policy, draft: Draft, state: dict, committed: Committed, sampler: Sampler):
    """K sampled tokens with the distributions they were drawn from; depth j + 1 reads depth j's state and token."""
    hidden, tokens, log_qs = state["hidden"], [], []
    for j in range(sampler.k):
        if j:
            hidden, state = _extend(policy, draft, state, hidden, tokens[-1][:, None], committed.lengths + j - 1)
        token, log_q = sampler.draw(logits(policy, hidden)[:, 0], j)
        tokens.append(token)
        log_qs.append(log_q)
    return jnp.stack(tokens, axis=1), jnp.stack(log_qs, axis=1), state


def observe(policy: Policy, draft: Draft, state: dict, observation: Observation) -> dict:
    """Rewrite the cache of the committed positions from the verifier's states; keep the state at the last one."""
    states, state = _extend(policy, draft, state, observation.trunk.hidden, observation.tokens, observation.lengths)
    at = jnp.maximum(observation.count - 1, 0)[:, None, None]
    last = jnp.take_along_axis(states, at, axis=1)
    live = (observation.count > 0)[:, None, None]
    return {**state, "hidden": constrain(jnp.where(live, last, state["hidden"]), policy.layout, "batch", None, None)}


def _unrolled_attention(earlier: list[tuple[jax.Array, jax.Array]]):
    """Attention of recursion depth d = len(earlier) + 1, as at inference, over all positions of a sequence at once.

    A query at p sees what a draft of depth d sees: depth 1 (from the trunk's states) up to position p - d + 1, then one
    position each of the depths since, the last its own. `earlier`: keys and values of depths 1 .. d - 1, grown here.
    """
    def attend(q, k, v):
        pairs = [*earlier, (k, v)]
        earlier.append((k, v))
        if len(pairs) == 1:
            return causal_attention(q, k, v), None
        b, s, kv_heads, hd = k.shape
        q = q.reshape(b, s, kv_heads, -1, hd) * hd**-0.5
        scores = jnp.einsum("bthgd,bshd->bhgts", q, pairs[0][0], preferred_element_type=jnp.float32)
        position = jnp.arange(s)
        visible = position[None, :] <= position[:, None] - (len(pairs) - 1)
        columns = [jnp.where(visible, scores, -jnp.inf)]
        shifted = []
        for i, (key, value) in enumerate(pairs[1:]):
            back = len(pairs) - 2 - i
            key, value = (jnp.pad(x, ((0, 0), (back, 0), (0, 0), (0, 0)))[:, :s] for x in (key, value))
            score = jnp.einsum("bthgd,bthd->bhgt", q, key, preferred_element_type=jnp.float32)
            columns.append(jnp.where(position >= back, score, -jnp.inf)[..., None])
            shifted.append(value)
        weights = jax.nn.softmax(jnp.concatenate(columns, axis=-1), axis=-1).astype(v.dtype)
        out = jnp.einsum("bhgts,bshd->bthgd", weights[..., :s], pairs[0][1])
        for i, value in enumerate(shifted):
            out = out + jnp.einsum("bhgt,bthd->bthgd", weights[..., s + i], value)
        return out.reshape(b, s, -1, hd), None

    return attend


def loss(policy: Policy, draft: Draft, hidden: jax.Array, tokens: jax.Array, response_start: jax.Array,
         mask: jax.Array, temperature: jax.Array):
    """Forward KL from the detached policy distribution at the sampling temperature, over recursive depths.

    Args:
      policy: any layout; only its embedding and output head are read. Detach it (and `hidden`) before the call.
      draft: unprepared, float32 masters.
      hidden: [B, S, D], the trunk's normed states over contiguous prompt + response rows, tokens int32 [B, S].
      response_start: int32 [B], position of the first response token, at least 1. mask: bool [B, T], tokens trained.
      temperature: float32 scalar or [B]; 0 counts as 1.

    Returns:
      (sum over trained tokens and depths / depths, count of trained tokens float32, metrics), where the metrics are
      sums over trained tokens: "overlap" float32 [depths], the probability that the draft of that depth is accepted.
    """
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    rope = rope_table(policy.config, jnp.arange(tokens.shape[1])[None])
    temperature = jnp.broadcast_to(jnp.where(jnp.asarray(temperature) == 0, 1.0, temperature), tokens.shape[:1])
    at = response_start[:, None] - 1 + jnp.arange(mask.shape[1])[None]

    def respond(x):
        return jnp.take_along_axis(x, at[:, :, None], axis=1, mode="clip")

    earlier: list = []
    states, outputs = hidden, []
    for _ in range(draft.config.depths):
        states, _ = _block(policy, weights, _shift(states), tokens, rope, _unrolled_attention(earlier))
        outputs.append(respond(states))

    def one(chunk):
        target, mask, *heads = chunk
        log_p = jax.nn.log_softmax(logits(policy, target) / temperature[:, None, None])
        p = jnp.exp(log_p)
        kl, overlap = [], []
        for head in heads:
            log_q = jax.nn.log_softmax(logits(policy, head) / temperature[:, None, None])
            kl.append(jnp.sum(jnp.sum(p * (log_p - log_q), -1), where=mask))
            overlap.append(jnp.sum(jnp.sum(jnp.minimum(p, jnp.exp(jax.lax.stop_gradient(log_q))), -1), where=mask))
        return sum(kl) / len(heads), jnp.stack(overlap)

    total, overlap = sum_over_chunks(one, (respond(hidden), mask, *outputs))
    return total, mask.sum().astype(jnp.float32), {"overlap": overlap}
