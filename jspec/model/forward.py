"""The transformer's ways through: training (stacked, scanned), prefill and verification (unrolled,
cached)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from jspec.choices import Remat
from jspec.kernels import attend as attend_cached
from jspec.model.attention import causal_attention, continued_attention
from jspec.model.config import ModelConfig
from jspec.model.layers import decoder_layer, rms_norm, rope_table
from jspec.model.linear import linear
from jspec.model.params import Policy, layer_runs
from jspec.model.pool import Cache, KeyValues
from jspec.sharding import block_rows, constrain


@struct.dataclass
class Trunk:
    """What the layers computed, in the compute dtype.

    Attributes:
      hidden: [B, T, D], final-normed: the output head's input.
      features: one [B, T, D] for each requested depth; depth i is the residual stream after i
        layers (0: embeddings).
      routes: uint8 [B, T, sparse layers, top_k], the experts that each token chose, and that
        computed it unless others were replayed; None of a dense policy.
    """

    hidden: jax.Array
    features: tuple[jax.Array, ...] = ()
    routes: jax.Array | None = None


def embed(policy: Policy, tokens: jax.Array) -> jax.Array:
    """Token embeddings [..., D] in the compute dtype."""
    return jnp.take(policy.weights["embed"], tokens, axis=0, mode="clip").astype(policy.dtype)


def without_tokenless(model: ModelConfig, logits: jax.Array,
                      ids: jax.Array | None = None) -> jax.Array:
    """Logits [..., n] of `ids` int32 [n] (None: 0..n-1), -inf where the tokenizer has no token for
    an id.

    It is the policy itself that lacks them, so nothing normalised over the vocabulary counts them,
    and no rule of sampling has to ban them.
    """
    if not model.tokenless:
        return logits
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32) if ids is None else ids
    lacking = jnp.zeros(ids.shape, bool)
    for start, stop in model.tokenless:
        lacking |= (ids >= start) & (ids < stop)
    return jnp.where(lacking, -jnp.inf, logits)


def logits(policy: Policy, hidden: jax.Array) -> jax.Array:
    """Next-token logits, float32 [..., V], of final-normed hidden states [..., D]; -inf for
    `tokenless` ids."""
    with jax.named_scope("head"):
        table = policy.weights["embed" if policy.config.tie_embeddings else "head"]
        out = without_tokenless(policy.config, linear(hidden, table, out_dtype=jnp.float32))
        return constrain(out, policy.layout, "batch", *(None,) * (out.ndim - 2), "vocab")


def _final(policy: Policy, x: jax.Array, features: Sequence[jax.Array],
           routes: jax.Array | None) -> Trunk:
    hidden = rms_norm(x, policy.weights["final_norm"], policy.config.rms_norm_eps)
    return Trunk(hidden, tuple(features), routes)


def _scanned(policy: Policy, tokens: jax.Array, layer: Callable, by_layer: Any,
             depths: tuple[int, ...], remat: bool | Remat,
             routes: jax.Array | None) -> tuple[Trunk, Any]:
    """Scan `layer(weights, x, its entry of by_layer, its routes) -> (x, kept, routes)` over the
    stacked layers, one scan for each run of layers of one kind: a Trunk over `tokens`, and what the
    layers kept, stacked."""
    def step(carry, xs) -> tuple[Any, Any]:
        x, states = carry
        w, depth, entry, replayed = xs
        x, kept, taken = layer(w, x, entry, replayed)
        x = constrain(x, policy.layout, "batch", None, None)
        states = tuple(jnp.where(depth == i, x, old) for i, old in zip(depths, states, strict=True))
        return (x, states), (kept, taken)

    x = _embedded(policy, tokens)
    carry, kept, taken = (x, (x,) * len(depths)), [], []
    before = 0  # sparse layers that there were
    with jax.named_scope("trunk"):
        runs = layer_runs(policy.config, policy.layers)
        for run, weights in runs:
            entries = (by_layer if len(runs) == 1
                       else jax.tree.map(lambda x, run=run: x[run.start:run.stop], by_layer))
            replayed = None
            if "router" in weights:
                replayed = (None if routes is None
                            else jnp.moveaxis(routes, 2, 0)[before:before + len(run)])
                before += len(run)
            xs = (weights, 1 + jnp.arange(run.start, run.stop), entries, replayed)
            carry, (of_run, chosen) = jax.lax.scan(rematerialised(step, remat), carry, xs)
            kept.append(of_run)
            taken += [] if chosen is None else [chosen]
    x, states = carry
    routes = jnp.moveaxis(_joined(taken), 0, 2) if taken else None
    return _final(policy, x, states, routes), _joined(kept)


def rematerialised(step: Callable, remat: bool | Remat) -> Callable:
    """A layer whose backward pass computes again what `remat` says, and keeps the rest."""
    keeps = {"full": None, "dots": jax.checkpoint_policies.dots_saveable,
             "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    if remat in (False, "none"):
        return step
    return jax.checkpoint(step, policy=keeps["full" if remat is True else cast(str, remat)])


def _joined(parts: list[Any]) -> Any:
    """Trees of arrays with a leading axis of layers as one tree."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _embedded(policy: Policy, tokens: jax.Array) -> jax.Array:
    return constrain(embed(policy, tokens), policy.layout, "batch", None, None)


def train_forward(policy: Policy, tokens: jax.Array, *, depths: tuple[int, ...] = (),
                  remat: bool | Remat = False, routes: jax.Array | None = None) -> Trunk:
    """All positions of tokens int32 [B, S], causal, positions 0..S-1, differentiable. Training
    layout only.

    Rows are right-padded: padding can only influence positions after it. `remat`
    (`jspec.choices.Remat`): what the backward pass computes again; with "full" only one residual
    stream a layer is kept. `routes`, of a
    sparse policy: the experts that compute each token, as `Trunk.routes` has them; None: the tokens
    choose.
    """
    return _causal(policy, tokens, lambda k, v: None, depths, remat, routes)[0]


def prompt_forward(policy: Policy, tokens: jax.Array, *, depths: tuple[int, ...] = (),
                   remat: bool | Remat = False,
                   routes: jax.Array | None = None) -> tuple[Trunk, tuple[jax.Array, jax.Array]]:
    """`train_forward` of prompts, with their keys and values of all layers,
    [layers, B, S, kv_heads, head_dim] each, for `response_forward` to continue."""
    return _causal(policy, tokens, lambda k, v: (k, v), depths, remat, routes)


def _causal(policy: Policy, tokens: jax.Array, keep: Callable, depths: tuple[int, ...],
            remat: bool | Remat, routes: jax.Array | None) -> tuple[Trunk, Any]:
    rope = rope_table(policy.config, jnp.arange(tokens.shape[1])[None])

    def layer(w, x, _, replayed) -> tuple[jax.Array, Any, jax.Array | None]:
        return decoder_layer(policy.config, w, x, rope,
                             lambda q, k, v: (causal_attention(q, k, v), keep(k, v)),
                             routes=replayed, layout=policy.layout)

    return _scanned(policy, tokens, layer, None, depths, remat, routes)


def response_forward(policy: Policy, tokens: jax.Array, lengths: jax.Array,
                     keys_values: tuple[jax.Array, jax.Array],
                     prompts: jax.Array, *, depths: tuple[int, ...] = (),
                     remat: bool | Remat = False, routes: jax.Array | None = None) -> Trunk:
    """What `train_forward` computes of responses after their prompts, the prompts being computed
    already.

    Responses int32 [N, T]; lengths int32 [N], of each one's prompt; keys_values: of all prompts
    (`prompt_forward`); prompts int32 [blocks, N // blocks], which of them each row continues, as
    `block_rows` has it. Returns the Trunk over [N, T].
    """
    rope = rope_table(policy.config, lengths[:, None] + jnp.arange(tokens.shape[1])[None])

    def layer(w, x, before, replayed) -> tuple[jax.Array, Any, jax.Array | None]:
        k_before, v_before = (
            constrain(block_rows(x, prompts), policy.layout, "batch", None, "kv_heads", None)
            for x in before)

        def attend(q, k, v) -> tuple[jax.Array, None]:
            return continued_attention(q, k, v, k_before, v_before, lengths), None

        return decoder_layer(policy.config, w, x, rope, attend, routes=replayed,
                             layout=policy.layout)

    return _scanned(policy, tokens, layer, keys_values, depths, remat, routes)[0]


def _unrolled(policy: Policy, tokens: jax.Array, positions: jax.Array, depths: tuple[int, ...],
              attend: Callable[[int], Callable]) -> tuple[Trunk, tuple]:
    """Run the layers one by one; `attend(i)` gives layer i's attention. Returns (Trunk, a pair of
    keys and values, or of their pools, a layer)."""
    model = policy.config
    rope = rope_table(model, positions)
    x = _embedded(policy, tokens)
    residual, kept, taken = [x], [], []
    for i, w in enumerate(policy.weights["layers"]):
        x, pair, routes = decoder_layer(model, w, x, rope, attend(i), layout=policy.layout)
        x = constrain(x, policy.layout, "batch", None, None)
        residual.append(x)
        kept.append(pair)
        taken += [] if routes is None else [routes]
    routes = jnp.stack(taken, axis=2) if taken else None
    return _final(policy, x, [residual[i] for i in depths], routes), tuple(kept)


def prefill(policy: Policy, tokens: jax.Array, *,
            depths: tuple[int, ...] = ()) -> tuple[Trunk, KeyValues]:
    """Whole prompts, tokens int32 [P, L], right-padded. Rollout layout only.

    Returns (Trunk over [P, L], keys and values of every layer, each [P, L, kv_heads, head_dim]).
    """
    def causal(q, k, v) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k, v = (constrain(x, policy.layout, "batch", None, "kv_heads", None) for x in (k, v))
        return causal_attention(q, k, v), (k, v)

    return _unrolled(policy, tokens, jnp.arange(tokens.shape[1])[None], depths, lambda _: causal)


def verify(policy: Policy, tokens: jax.Array, cache: Cache, lengths: jax.Array, *,
           depths: tuple[int, ...] = ()) -> tuple[Trunk, Cache]:
    """T new tokens a row, int32 [B, T], at positions lengths .. lengths+T-1 after the cached ones.
    Rollout layout only.

    Returns (Trunk over [B, T], Cache with the new keys and values written at those positions).
    """
    def attend(i) -> Callable:
        def ragged(q, k, v) -> tuple[jax.Array, list[jax.Array]]:
            out, *pools = attend_cached(policy, q, k, v, cache.k[i], cache.v[i], cache.table,
                                        lengths)
            return out, pools
        return ragged

    positions = lengths[:, None] + jnp.arange(tokens.shape[1])[None]
    trunk, pools = _unrolled(policy, tokens, positions, depths, attend)
    return trunk, cache.replace(k=tuple(k for k, _ in pools), v=tuple(v for _, v in pools))
