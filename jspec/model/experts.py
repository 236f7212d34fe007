"""A mixture of experts in the place of a dense feed-forward: the router, and the products of each
token with the experts that it chose. Dropless: every token is computed by all of its experts,
whatever the others chose.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jspec.model.adapted import Adapted
from jspec.model.config import Experts, ModelConfig
from jspec.model.grouped import grouped
from jspec.model.linear import linear
from jspec.model.quantized import Quantized
from jspec.sharding import current_mesh, partition

EXPERT_AXES: dict[str, tuple[str | None, ...]] = {
    "expert_gate_up": ("expert", None, "expert_mlp", "expert_embed"),
    "expert_down": ("expert", "expert_embed", "expert_mlp")}
"""The logical axes of the experts' matrices."""


def route(experts: Experts, router: jax.Array, x: jax.Array,
          routes: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(which experts compute each token, uint8 [..., top_k], with which gates, float32
    [..., top_k], and which ones x itself chooses, uint8 [..., top_k]).

    Softmax over all experts, in float32, and the top_k of it, ties to the lowest; the gates are
    scaled to sum to one where the config says so.

    Args:
      router: [E, D]. x: [..., D].
      routes: uint8 [..., top_k], to be taken as they are; the gates are those that x gives them.
        None: x chooses.
    """
    probs = jax.nn.softmax(linear(x.astype(jnp.float32), router.astype(jnp.float32)), axis=-1)
    chosen = jax.lax.top_k(probs, experts.top_k)[1].astype(jnp.uint8)
    routes = chosen if routes is None else routes
    # gathered from the probabilities for replayed routes too: the gates' gradients are of live
    # logits
    gates = jnp.take_along_axis(probs, routes.astype(jnp.int32), axis=-1)
    if experts.renormalize:
        gates = gates / gates.sum(-1, keepdims=True)
    return routes, gates, chosen


def weight_specs(tree: Any) -> Any:
    """How a `shard_map` over the axis `expert` takes a tree of weights in a rollout layout: experts
    split, quantised or not, and all else whole."""
    def of_leaf(path: tuple, x: Any) -> Any:
        if not any(getattr(key, "key", None) in EXPERT_AXES for key in path):
            return PartitionSpec()
        split = PartitionSpec("expert")
        if not isinstance(x, Quantized):
            return split
        whole = None if x.chosen is None else PartitionSpec()
        return jax.tree.map(lambda _: split, x).replace(chosen=whole)

    return jax.tree_util.tree_map_with_path(of_leaf, tree,
                                            is_leaf=lambda x: isinstance(x, Quantized))


def compute(w: dict[str, Any], x: jax.Array, routes: jax.Array, gates: jax.Array,
            first: jax.Array | int = 0) -> jax.Array:
    """Tokens x [R, D] through those of their experts that are in w, which are `first` and what
    follows it: float32 [R, D], of the others nothing. routes uint8 [R, top_k], gates float32
    [R, top_k].

    A token's experts are added up in the order of its routes.
    """
    (count, top_k), held = routes.shape, w["expert_down"].shape[0]
    chosen = routes.reshape(-1).astype(jnp.int32) - first
    chosen = jnp.where((chosen >= 0) & (chosen < held), chosen, held)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=held + 1)[:held].astype(jnp.int32)
    y = grouped(x[order // top_k], w["expert_gate_up"], sizes)
    y = grouped(jax.nn.silu(y[:, 0]) * y[:, 1], w["expert_down"], sizes)
    y = jnp.zeros_like(y).at[order].set(y).reshape(count, top_k, -1)
    return jnp.sum(y.astype(jnp.float32) * gates[..., None], axis=1)


def _split(mesh: Any, layout: str, w: dict[str, Any]) -> dict[str, Any]:
    """How the mesh splits the experts' matrices, quantised or not: PartitionSpecs. Groups of
    quantised inputs stay whole, and so does what makes those inputs."""
    down, names = w["expert_down"], dict(EXPERT_AXES)
    groups = getattr(down, "chosen", None)
    if groups is not None and not partition(mesh, layout, groups.shape[:1], ("expert_mlp",))[0]:
        names = {name: tuple(None if axis == "expert_mlp" else axis for axis in axes)
                 for name, axes in names.items()}

    def of_matrix(x: Any, axes: tuple[str | None, ...]) -> Any:
        if not isinstance(x, Quantized):
            return partition(mesh, layout, x.shape, axes)
        split = jax.tree.map(lambda a: partition(mesh, layout, a.shape, axes),
                             x.replace(chosen=None))
        return split if x.chosen is None else split.replace(
            chosen=partition(mesh, layout, x.chosen.shape, (axes[-1], None, None)))

    return {name: of_matrix(w[name], axes) for name, axes in names.items()}


def _on_mesh(layout: str, w: dict[str, Any], x: jax.Array, routes: jax.Array,
             gates: jax.Array) -> jax.Array:
    """`compute` of x [B, T, D] on the shards of a mesh: all of a group of shards along `expert`
    get all of the group's tokens, compute what their experts make of them, and get the sums of
    their own tokens back. A `shard_map` around this may have split `expert`, and rows over it."""
    mesh = current_mesh()
    rows, weights = partition(mesh, layout, x.shape[:1], ("batch",))[0], _split(mesh, layout, w)
    several = mesh.shape.get("expert", 1) > 1
    spread = several and ("expert" in mesh.manual_axes or "expert" in (rows or ()))

    def run(w, x, routes, gates, embed=None, mlp=None) -> jax.Array:
        shape = x.shape
        x, routes, gates = (a.reshape(shape[0] * shape[1], -1) for a in (x, routes, gates))
        if spread:
            x, routes, gates = (jax.lax.all_gather(a, "expert", tiled=True)
                                for a in (x, routes, gates))
        # what training splits once more is whole where it is used, and its gradient split again
        if embed is not None:
            w = {name: jax.lax.all_gather(w[name].astype(x.dtype), embed, axis=at, tiled=True)
                 for name, at in (("expert_gate_up", 3), ("expert_down", 1))}
        first = jax.lax.axis_index("expert") * w["expert_down"].shape[0] if several else 0
        y = compute(w, x, routes, gates, first)
        if spread:
            y = jax.lax.psum_scatter(y, "expert", tiled=True)
        elif several:
            y = jax.lax.psum(y, "expert")
        y = y if mlp is None else jax.lax.psum(y, mlp)
        return y.reshape(shape)

    experts = {name: w[name] for name in EXPERT_AXES}
    if all(size == 1 or name in mesh.manual_axes for name, size in mesh.shape.items()):
        return run(experts, x, routes, gates)
    # named only inside a `shard_map`: they may be axes of one device, which is as well not in one
    down, tokens = weights["expert_down"], PartitionSpec(rows)
    _, embed, mlp = down.array.qvalue if isinstance(down, Quantized) else down
    return jax.shard_map(partial(run, embed=embed, mlp=mlp),
                         in_specs=(weights, tokens, tokens, tokens), out_specs=tokens,
                         check_vma=False)(experts, x, routes, gates)


def mixture(model: ModelConfig, layout: str, w: dict[str, Any], x: jax.Array,
            routes: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The feed-forward of a sparse layer: x [B, T, D] to ([B, T, D], the routes uint8 [B, T, top_k]
    that x chooses).

    layout: of the weights. routes: of a forward before, to be taken again; None: those that
    x chooses are taken.
    """
    routes, gates, chosen = route(model.experts, w["router"], x, routes)
    w = {name: each.astype(x.dtype) if isinstance(each, Adapted) else each
         for name, each in w.items()}
    return _on_mesh(layout, w, x, routes, gates).astype(x.dtype), chosen
