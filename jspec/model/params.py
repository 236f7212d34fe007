"""Parameters, declared once: shape, logical axes and initializer; everything else is derived from the declaration."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jspec.model.config import ModelConfig
from jspec.model.layers import fuse
from jspec.sharding import constrain_tree, current_mesh, spec_sharding
from pallas_kernels.implementation import REFERENCE, Implementation


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter. `axes` are logical names that `jspec.sharding` maps to mesh axes; masters are float32."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"  # normal | zeros | ones
    dtype: str = "float32"

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)


@struct.dataclass
class Policy:
    """A language model: weights and the static config that says how to use them.

    Training layout: `weights["layers"]` is one dict of arrays with a leading layer axis, float32.
    Rollout layout: `weights["layers"]` is a tuple with one dict a layer, fused (`layers.fuse`), in `dtype`.

    Attributes:
      weights: the tree that `param_specs(config)` declares.
      config: static.
      dtype: static; what is computed in ("float32" or "bfloat16"), over float32 masters.
      layout: static; the row of `jspec.sharding.RULES` that places weights and activations.
      kernels: static; which implementation of the kernels decoding runs. `jspec.rollout` sets it.
    """

    weights: Any
    config: ModelConfig = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False, default="float32")
    layout: str = struct.field(pytree_node=False, default="train")
    kernels: Implementation = struct.field(pytree_node=False, default=REFERENCE)

    @property
    def stacked(self) -> bool:
        """True in the training layout."""
        return isinstance(self.weights["layers"], dict)


def layer_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters of one decoder layer (no layer axis). Linear weights are [out, in], as checkpoints have them."""
    d, f, hd = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * hd, config.num_kv_heads * hd
    specs = {
        "attn_norm": ParamSpec((d,), ("norm",), "ones"),
        "q": ParamSpec((q, d), ("q_heads", "embed")),
        "k": ParamSpec((kv, d), ("kv_heads", "embed")),
        "v": ParamSpec((kv, d), ("kv_heads", "embed")),
        "o": ParamSpec((d, q), ("embed", "q_heads")),
        "mlp_norm": ParamSpec((d,), ("norm",), "ones"),
        "gate": ParamSpec((f, d), ("mlp", "embed")),
        "up": ParamSpec((f, d), ("mlp", "embed")),
        "down": ParamSpec((d, f), ("embed", "mlp")),
    }
    if config.qkv_bias:
        specs["q_bias"] = ParamSpec((q,), ("q_heads",), "zeros")
        specs["k_bias"] = ParamSpec((kv,), ("kv_heads",), "zeros")
        specs["v_bias"] = ParamSpec((kv,), ("kv_heads",), "zeros")
    if config.out_bias:
        specs["o_bias"] = ParamSpec((d,), ("norm",), "zeros")
    if config.qk_norm:
        specs["q_norm"] = ParamSpec((hd,), (None,), "ones")
        specs["k_norm"] = ParamSpec((hd,), (None,), "ones")
    if config.mlp_bias:
        specs["gate_bias"] = ParamSpec((f,), ("mlp",), "zeros")
        specs["up_bias"] = ParamSpec((f,), ("mlp",), "zeros")
        specs["down_bias"] = ParamSpec((d,), ("norm",), "zeros")
    return specs


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """The whole tree of parameters in the training layout (layers stacked along a leading axis)."""
    layers = {
        name: dataclasses.replace(s, shape=(config.num_layers, *s.shape), axes=("layers", *s.axes))
        for name, s in layer_specs(config).items()
    }
    specs = {
        "embed": ParamSpec((config.vocab_size, config.hidden_size), ("vocab", "embed")),
        "layers": layers,
        "final_norm": ParamSpec((config.hidden_size,), ("norm",), "ones"),
    }
    if not config.tie_embeddings:
        specs["head"] = ParamSpec((config.vocab_size, config.hidden_size), ("vocab", "embed"))
    return specs


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def init_weights(specs: Any, key: jax.Array, scale: float) -> Any:
    """Arrays for a tree of `ParamSpec`; each leaf's key is folded from its path, so that trees can grow."""

    def make(path, spec: ParamSpec):
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, spec.dtype)
        if spec.init == "ones":
            return jnp.ones(spec.shape, spec.dtype)
        # crc32 and not hash(): the latter differs from process to process
        leaf_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return scale * jax.random.normal(leaf_key, spec.shape, spec.dtype)

    return jax.tree_util.tree_map_with_path(make, specs, is_leaf=is_spec)


def place_on_mesh(make: Any, specs: Any, config: ModelConfig) -> Any:
    """`make` jitted, its result (a tree as `specs` declares it) placed in the training layout on the current mesh."""
    mesh = current_mesh()
    return jax.jit(make, out_shardings=None if mesh is None else spec_sharding(specs, config, mesh))


def init_policy(config: ModelConfig, key: jax.Array, dtype: str = "float32") -> Policy:
    """A policy from random initialisation (normal, `config.initializer_range`), in the training layout.

    Placed on the mesh of `jax.set_mesh`, if there is one; the values do not depend on it.
    """
    def make(key):
        return init_weights(param_specs(config), key, config.initializer_range)

    return Policy(place_on_mesh(make, param_specs(config), config)(key), config, dtype)


def policy_sharding(config: ModelConfig, mesh: Any) -> Any:
    """NamedSharding of every weight in the training layout. Raises InputError where the mesh does not divide."""
    return spec_sharding(param_specs(config), config, mesh, "train")


def to_rollout(policy: Policy, layout: str = "rollout") -> Policy:
    """Training layout to rollout layout: one dict a layer, fused, in the compute dtype, sharded as `layout` has it.

    Jittable, and a no-op on a policy that is in a rollout layout already. `layout`: "rollout" is tensor parallel over
    the tensor axis, "rollout_wide" over fsdp x tensor; both replicate over the other axes.
    """
    if not policy.stacked:
        return policy
    config = policy.config
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), policy.weights)
    layers = tuple(jax.tree.map(lambda x, i=i: x[i], weights["layers"]) for i in range(config.num_layers))
    weights = {**weights, "layers": layers}
    specs = {**param_specs(config), "layers": (layer_specs(config),) * config.num_layers}
    weights = constrain_tree(weights, specs, config, layout)
    weights["layers"] = tuple(fuse(config, w) for w in weights["layers"])
    return policy.replace(weights=weights, layout=layout)


reshard = jax.jit(to_rollout, static_argnames="layout")
