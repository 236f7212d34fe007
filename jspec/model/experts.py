"""A mixture of experts in the place of a dense feed-forward: the router, and the products of each token with the
experts that it chose. Dropless: every token is computed by all of its experts, whatever the others chose.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jspec.model.config import Experts, ModelConfig
from jspec.model.grouped import grouped
from jspec.model.linear import linear


def route(experts: Experts, router: jax.Array, x: jax.Array,
          routes: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(which experts compute each token, uint8 [..., top_k], with which gates, float32 [..., top_k],
    and which ones x itself chooses, uint8 [..., top_k]).

    Softmax over all experts, in float32, and the top_k of it, ties to the lowest; the gates are scaled to sum to one
    where the config says so.

    Args:
      router: [E, D]. x: [..., D].
      routes: uint8 [..., top_k], to be taken as they are; the gates are those that x gives them. None: x chooses.
    """
    probs = jax.nn.softmax(linear(x.astype(jnp.float32), router.astype(jnp.float32)), axis=-1)
    chosen = jax.lax.top_k(probs, experts.top_k)[1].astype(jnp.uint8)
    routes = chosen if routes is None else routes
    # gathered from the probabilities for replayed routes too: the gates' gradients are of live logits
    gates = jnp.take_along_axis(probs, routes.astype(jnp.int32), axis=-1)
    if experts.renormalize:
        gates = gates / gates.sum(-1, keepdims=True)
    return routes, gates, chosen


def compute(w: dict[str, Any], x: jax.Array, routes: jax.Array, gates: jax.Array) -> jax.Array:
    """Tokens x [R, D] through their experts, routes uint8 [R, top_k] with gates float32 [R, top_k]: [R, D].

    A token's experts are added up in the order of its routes, in float32.
    """
    count, top_k = routes.shape
    chosen = routes.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=w["expert_down"].shape[0]).astype(jnp.int32)
    y = grouped(x[order // top_k], w["expert_gate_up"], sizes)
    y = grouped(jax.nn.silu(y[:, 0]) * y[:, 1], w["expert_down"], sizes)
    y = jnp.zeros_like(y).at[order].set(y).reshape(count, top_k, -1)
    return jnp.sum(y.astype(jnp.float32) * gates[..., None], axis=1).astype(x.dtype)


def mixture(model: ModelConfig, w: dict[str, Any], x: jax.Array,
            routes: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The feed-forward of a sparse layer: x [B, T, D] to ([B, T, D], the routes uint8 [B, T, top_k] that x chooses).

    routes: of a forward before, to be taken again; None: those that x chooses are taken.
    """
    routes, gates, chosen = route(model.experts, w["router"], x, routes)
    rows = (x.shape[0] * x.shape[1], -1)
    y = compute(w, x.reshape(rows), routes.reshape(rows), gates.reshape(rows))
    return y.reshape(x.shape), chosen
