"""Low-rank adapters on a policy's matrices: what there is of them, and how a policy gets them
(https://arxiv.org/abs/2106.09685; over a quantised base https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from jspec.choices import LORA_TARGETS
from jspec.model.adapted import is_quantised
from jspec.model.config import Lora, ModelConfig
from jspec.model.params import (
    ParamSpec,
    Policy,
    abstract_weights,
    is_spec,
    param_specs,
    place_on_mesh,
    stacks,
)

TILE = 32
"""Inputs that share one scale of a quantised base, where they are divided by it."""


def adapted_names(model: ModelConfig, lora: Lora) -> tuple[str, ...]:
    """The stacks of layers that have adapters."""
    wanted = {name for target in lora.targets for name in LORA_TARGETS[target]}
    return tuple(name for name in stacks(model) if name in wanted)


def adapter_specs(model: ModelConfig, lora: Lora) -> dict[str, dict[str, ParamSpec]]:
    """The parameters that are trained, stacked as the matrices that they are added to: of each A
    [*lead, rank, in] and B [*lead, out, rank]."""
    specs = param_specs(model)["layers"]

    def pair(spec: ParamSpec) -> dict[str, ParamSpec]:
        (*lead, rows, columns), (*axes, of_rows, of_columns) = spec.shape, spec.axes
        return {"a": ParamSpec((*lead, lora.rank, columns), (*axes, None, of_columns)),
                "b": ParamSpec((*lead, rows, lora.rank), (*axes, of_rows, None), "zeros")}

    return {name: pair(specs[name]) for name in adapted_names(model, lora)}


def full_rank(model: ModelConfig, lora: Lora) -> int:
    """The highest rank that the product of an adapter can have, in any of the matrices."""
    specs = param_specs(model)["layers"]
    return max((min(specs[name].shape[-2:]) for name in adapted_names(model, lora)),
               default=lora.rank)


def base_specs(model: ModelConfig, lora: Lora) -> dict[str, Any]:
    """`param_specs` as they are kept where they are not trained: all in bfloat16 or float32, or
    with layers' matrices that have adapters in 8 or 4 bits."""
    bits = lora.base_dtype.startswith("int")
    dtype = "bfloat16" if bits else lora.base_dtype
    specs = jax.tree.map(lambda spec: dataclasses.replace(spec, dtype=dtype), param_specs(model),
                         is_leaf=is_spec)
    if bits:
        for name in adapted_names(model, lora):
            specs["layers"][name] = _quantised_spec(specs["layers"][name], lora.base_dtype)
    return specs


def _quantised_spec(spec: ParamSpec, dtype: str) -> Any:
    import qwix

    scales = (*spec.shape[:-1], spec.shape[-1] // math.gcd(spec.shape[-1], TILE))
    return qwix.QArray(dataclasses.replace(spec, dtype=dtype),
                       dataclasses.replace(spec, shape=scales, dtype="float32"),
                       qtype=jnp.dtype(dtype))


def as_base(weights: Any, specs: Any) -> Any:
    """Weights as `base_specs` has them."""
    def kept(spec: Any, x: jax.Array) -> Any:
        if is_spec(spec):
            return x.astype(spec.dtype)
        import qwix

        return qwix.quantize(x.astype(jnp.float32), spec.qtype,
                             channelwise_axes=range(x.ndim - 1),
                             tiled_axes={x.ndim - 1: math.gcd(x.shape[-1], TILE)})

    return jax.tree.map(kept, specs, weights, is_leaf=_is_matrix)


def _is_matrix(x: Any) -> bool:
    """Whether this is one weight of a tree, quantised or not."""
    return is_spec(x) or is_quantised(x)


def fresh_adapters(model: ModelConfig, lora: Lora, key: jax.Array) -> Any:
    """A uniform within 1 / sqrt(in) as PEFT draws it, and B zero: the policy is still its base."""
    def drawn(path: tuple, spec: ParamSpec) -> jax.Array:
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, spec.dtype)
        bound = spec.shape[-1] ** -0.5
        leaf = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return jax.random.uniform(leaf, spec.shape, spec.dtype, -bound, bound)

    return jax.tree_util.tree_map_with_path(drawn, adapter_specs(model, lora), is_leaf=is_spec)


def with_adapters(policy: Policy, lora: Lora, key: jax.Array) -> Policy:
    """A policy in the training layout whose adapters are what is trained from now on, on the mesh
    of `jax.set_mesh` if there is one. Its own weights become the frozen base."""
    model = policy.config
    base, adapters = base_specs(model, lora), adapter_specs(model, lora)
    weights = place_on_mesh(lambda weights: as_base(weights, base), base, model)(policy.weights)
    made = place_on_mesh(lambda key: fresh_adapters(model, lora, key), adapters, model)(key)
    return policy.replace(weights=weights, adapters=made, lora=lora)


def abstract_adapted(policy: Policy, lora: Lora) -> Policy:
    """`with_adapters`, with `jax.ShapeDtypeStruct`s: nothing is computed."""
    model = policy.config
    return policy.replace(weights=abstract_weights(base_specs(model, lora), model),
                          adapters=abstract_weights(adapter_specs(model, lora), model), lora=lora)


def merge(policy: Policy) -> Policy:
    """The policy with its adapters added to its weights, float32 masters, in the training layout:
    what it is without them is gone. Jittable, and a no-op without adapters."""
    if policy.adapters is None:
        return policy
    layers = {name: x.astype(jnp.float32) for name, x in policy.layers.items()}
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), {**policy.weights, "layers": layers})
    return policy.replace(weights=weights, adapters=None, lora=None)


def trained(policy: Policy) -> Any:
    """What an update changes of a policy: its adapters, or all of its weights."""
    return policy.weights if policy.adapters is None else policy.adapters


def with_trained(policy: Policy, tree: Any) -> Policy:
    """The policy with another `trained`."""
    return (policy.replace(weights=tree) if policy.adapters is None
            else policy.replace(adapters=tree))


def trained_specs(policy: Policy) -> Any:
    """The declaration of `trained`."""
    return (param_specs(policy.config) if policy.lora is None
            else adapter_specs(policy.config, policy.lora))
