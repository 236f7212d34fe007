"""Parameters, declared once: shape, logical axes and initializer; everything else is derived from
the declaration."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jspec.arguments import compute_dtype, instance, one_of, random_key, show, unmasked
from jspec.choices import DTYPES
from jspec.errors import InputError
from jspec.model.adapted import Adapted, is_quantised
from jspec.model.config import Lora, ModelConfig
from jspec.model.experts import EXPERT_AXES
from jspec.model.layers import fuse
from jspec.sharding import LAYOUTS, constrain_tree, spec_sharding
from pallas_kernels.implementation import REFERENCE, Implementation


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter. `axes` are logical names that `jspec.sharding` maps to mesh axes; masters are
    float32."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"  # normal | zeros | ones
    dtype: str = "float32"

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)


@struct.dataclass
class Policy:
    """A language model: weights and the static config that says how to use them.

    Training layout: `weights["layers"]` is one dict of arrays with a leading layer axis, float32.
    Rollout layout: `weights["layers"]` is a tuple with one dict a layer, fused (`layers.fuse`), in
    `dtype`.

    Attributes:
      weights: the tree that `param_specs(config)` declares.
      config: static.
      dtype: static; what is computed in ("float32" or "bfloat16"), over float32 masters.
      layout: static; the row of `jspec.sharding.LAYOUTS` that places weights and activations.
      kernels: static; which implementation of the kernels decoding runs. `jspec.rollout` sets it.
      adapters: the tree that `lora.adapter_specs` declares, float32, in the training layout only:
        what is trained in the place of `weights`. None: the weights are.
      lora: static; what adapters there are.
    """

    weights: Any
    config: ModelConfig = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False, default="float32")
    layout: str = struct.field(pytree_node=False, default="train")
    kernels: Implementation = struct.field(pytree_node=False, default=REFERENCE)
    adapters: Any = None
    lora: Lora | None = struct.field(pytree_node=False, default=None)

    @property
    def layers(self) -> Any:
        """The layers' weights, those that have adapters, or had some, as `Adapted`."""
        layers = self.weights["layers"]
        if self.lora is None:
            return layers
        none = dict.fromkeys("ab")
        pairs = self.adapters or {name: none for name, x in layers.items() if is_quantised(x)}
        return {**layers, **{name: Adapted(layers[name], pair["a"], pair["b"], self.lora.scale)
                             for name, pair in pairs.items()}}

    @property
    def stacked(self) -> bool:
        """True in the training layout."""
        return isinstance(self.weights["layers"], dict)


def check_weights(label: str, weights: Any, specs: Any) -> None:
    """Raise InputError, naming it, for the first array that `specs` declares and `weights` lack or
    have in another shape, masked, or not of floating-point numbers. What else is there is not
    judged."""
    flat, _ = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)
    for path, spec in flat:
        found = weights
        for step in path:
            key = getattr(step, "key", getattr(step, "idx", None))
            known = (range(len(found)) if isinstance(found, list | tuple) else found
                     if isinstance(found, dict) else ())
            found = found[key] if key in known else None
        shape, name = getattr(found, "shape",
                              None), jax.tree_util.keystr(path, simple=True, separator=".")
        if shape != spec.shape:
            has = "is missing" if shape is None else f"has shape {list(shape)}"
            raise InputError(f"weight {name} of {label} {has}; its config says {list(spec.shape)}")
        if not jnp.issubdtype(unmasked(f"weight {name} of {label}", found).dtype, jnp.floating):
            raise InputError(f"weight {name} of {label} is {show(found)}, and must be of "
                             "floating-point numbers")


def check_static(label: str, policy: Any) -> None:
    """Raise InputError for a policy that is none, or that has a static field which is none."""
    instance(Policy, "a policy, such as jspec.load(\"NAME\")")(label, policy)
    instance(ModelConfig, "a jspec.ModelConfig")(f"the config of {label}", policy.config)
    one_of(DTYPES)(f"the dtype of {label}", policy.dtype)
    one_of(LAYOUTS)(f"the layout of {label}", policy.layout)
    instance(Implementation, "what jspec.rollout sets")(f"kernels of {label}", policy.kernels)


def check_policy(label: str, policy: Any, stacked: bool = False) -> None:
    """`check_static`, and InputError for a policy whose weights are not those of its config.

    stacked: it must be in the training layout.
    """
    check_static(label, policy)
    model = policy.config
    specs, layers = (param_specs(model),
                     policy.weights.get("layers") if isinstance(policy.weights, dict) else None)
    if isinstance(layers, tuple):
        if stacked:
            raise InputError(f"{label} must be in the training layout, and this one is in "
                             "a rollout layout; give the policy that jspec.reshard was given")
        del specs["layers"]
        if len(layers) != model.num_layers:
            raise InputError(f"{label} has {len(layers)} layers; its config says "
                             f"{model.num_layers}")
    check_weights(label, policy.weights, specs)


def layer_specs(model: ModelConfig, sparse: bool = False) -> dict[str, ParamSpec]:
    """The parameters of one decoder layer (no layer axis). Linear weights are [out, in], as
    checkpoints have them.

    sparse: of one with experts, stacked, where others have a dense feed-forward.
    """
    d, hd = model.hidden_size, model.head_dim
    q, kv = model.num_heads * hd, model.num_kv_heads * hd
    specs = {
        "attn_norm": ParamSpec((d,), ("norm",), "ones"),
        "q": ParamSpec((q, d), ("q_heads", "embed")),
        "k": ParamSpec((kv, d), ("kv_heads", "embed")),
        "v": ParamSpec((kv, d), ("kv_heads", "embed")),
        "o": ParamSpec((d, q), ("embed", "q_heads")),
        "mlp_norm": ParamSpec((d,), ("norm",), "ones"),
        **(expert_specs(model) if sparse else dense_specs(model)),
    }
    if model.qkv_bias:
        specs["q_bias"] = ParamSpec((q,), ("q_heads",), "zeros")
        specs["k_bias"] = ParamSpec((kv,), ("kv_heads",), "zeros")
        specs["v_bias"] = ParamSpec((kv,), ("kv_heads",), "zeros")
    if model.out_bias:
        specs["o_bias"] = ParamSpec((d,), ("norm",), "zeros")
    if model.qk_norm:
        specs["q_norm"] = ParamSpec((hd,), (None,), "ones")
        specs["k_norm"] = ParamSpec((hd,), (None,), "ones")
    return specs


def dense_specs(model: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters of a dense feed-forward."""
    d, f = model.hidden_size, model.intermediate_size
    specs = {
        "gate": ParamSpec((f, d), ("mlp", "embed")),
        "up": ParamSpec((f, d), ("mlp", "embed")),
        "down": ParamSpec((d, f), ("embed", "mlp")),
    }
    if model.mlp_bias:
        specs["gate_bias"] = ParamSpec((f,), ("mlp",), "zeros")
        specs["up_bias"] = ParamSpec((f,), ("mlp",), "zeros")
        specs["down_bias"] = ParamSpec((d,), ("norm",), "zeros")
    return specs


def expert_specs(model: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters of a mixture of experts: its router, and its experts' matrices, stacked."""
    experts, d = model.experts, model.hidden_size
    e, f = experts.count, experts.intermediate_size
    return {
        "router": ParamSpec((e, d), (None, "embed")),
        "expert_gate_up": ParamSpec((e, 2, f, d), EXPERT_AXES["expert_gate_up"]),
        "expert_down": ParamSpec((e, d, f), EXPERT_AXES["expert_down"]),
    }


def stacks(model: ModelConfig) -> dict[str, tuple[ParamSpec, tuple[int, ...]]]:
    """Every parameter of layers by name: its spec in one layer, and the layers that have it, in the
    order of its stack."""
    layers: dict[str, tuple[ParamSpec, tuple[int, ...]]] = {}
    for i in range(model.num_layers):
        for name, spec in layer_specs(model, i in model.sparse_layers).items():
            layers[name] = spec, (*layers.get(name, (spec, ()))[1], i)
    return layers


def layer_runs(model: ModelConfig, layers: dict[str, Any]) -> list[tuple[range, dict[str, Any]]]:
    """The longest runs of adjacent layers that have the same parameters, each with its part of the
    stacks `layers`: what one scan goes over. A model of one kind of layers is one run, and its
    stacks are taken as they are."""
    held = stacks(model)
    sparse = [i in model.sparse_layers for i in range(model.num_layers)]
    starts = [i for i in range(model.num_layers) if i == 0 or sparse[i] != sparse[i - 1]]
    runs = [range(a, b) for a, b in zip(starts, [*starts[1:], model.num_layers], strict=True)]
    if len(runs) == 1:
        return [(runs[0], layers)]

    def part(run: range) -> dict[str, Any]:
        at = {name: having.index(run[0]) for name, (_, having) in held.items() if run[0] in having}
        return {name: jax.tree.map(lambda x, i=i: x[i:i + len(run)], layers[name])
                for name, i in at.items()}

    return [(run, part(run)) for run in runs]


def param_specs(model: ModelConfig) -> dict[str, Any]:
    """The whole tree of parameters in the training layout (layers stacked along a leading axis)."""
    layers = {name: dataclasses.replace(spec, shape=(len(having), *spec.shape),
                                        axes=("layers", *spec.axes))
              for name, (spec, having) in stacks(model).items()}
    specs = {
        "embed": ParamSpec((model.vocab_size, model.hidden_size), ("vocab", "embed")),
        "layers": layers,
        "final_norm": ParamSpec((model.hidden_size,), ("norm",), "ones"),
    }
    if not model.tie_embeddings:
        specs["head"] = ParamSpec((model.vocab_size, model.hidden_size), ("vocab", "embed"))
    return specs


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def init_weights(specs: Any, key: jax.Array, scale: float) -> Any:
    """Arrays for a tree of `ParamSpec`; each leaf's key is folded from its path, so that trees can
    grow."""

    def drawn(path, spec: ParamSpec) -> jax.Array:
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, spec.dtype)
        if spec.init == "ones":
            return jnp.ones(spec.shape, spec.dtype)
        # crc32 and not hash(): the latter differs from process to process
        leaf_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return scale * jax.random.normal(leaf_key, spec.shape, spec.dtype)

    return jax.tree_util.tree_map_with_path(drawn, specs, is_leaf=is_spec)


def place_on_mesh(build: Any, specs: Any, model: ModelConfig) -> Any:
    """`build` jitted, its result (a tree as `specs` declares it) placed in the training layout on
    the current mesh."""
    return jax.jit(build, out_shardings=spec_sharding(specs, model))


def init_policy(config: ModelConfig, key: jax.Array | int, dtype: str = "float32") -> Policy:
    """A policy from random initialisation (normal, `config.initializer_range`), in the training
    layout.

    Placed on the mesh of `jax.set_mesh`, if there is one; the values do not depend on it.

    Args:
      key: a typed key, or a seed.
      dtype: see `Policy`.

    Raises InputError for an argument of another kind, or where the mesh does not divide the model.
    """
    instance(ModelConfig, "a jspec.ModelConfig")("config", config)
    key, dtype = random_key("key", key), compute_dtype("dtype", dtype)

    def fresh(key) -> dict:
        return init_weights(param_specs(config), key, config.initializer_range)

    return Policy(place_on_mesh(fresh, param_specs(config), config)(key), config, dtype)


def abstract_policy(model: ModelConfig, dtype: str = "float32") -> Policy:
    """A policy in the training layout with `jax.ShapeDtypeStruct`s for weights, each with its
    sharding: all that can be known of it before any are read. Raises InputError where the mesh of
    `jax.set_mesh` does not divide the model."""
    return Policy(abstract_weights(param_specs(model), model), model, dtype)


def abstract_weights(specs: Any, model: ModelConfig) -> Any:
    """A tree of `ParamSpec` as `jax.ShapeDtypeStruct`s, placed in the training layout on the
    current mesh."""
    return jax.tree.map(lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype,
                                                                    sharding=sharding),
                        specs, spec_sharding(specs, model), is_leaf=is_spec)


def policy_sharding(model: ModelConfig, mesh: Any) -> Any:
    """NamedSharding of every weight in the training layout. Raises InputError where the mesh does
    not divide."""
    return spec_sharding(param_specs(model), model, mesh=mesh)


def rollout_specs(model: ModelConfig) -> dict[str, Any]:
    """The whole tree of parameters in a rollout layout, before a layer's are fused."""
    return {**param_specs(model), "layers": tuple(
        layer_specs(model, i in model.sparse_layers) for i in range(model.num_layers))}


def to_rollout(policy: Policy, layout: str = "rollout") -> Policy:
    """Training layout to rollout layout: one dict a layer, fused, in the compute dtype, sharded as
    `layout` has it.

    Jittable, and a no-op on a policy that is in a rollout layout already. `layout`: "rollout" is
    tensor parallel over the tensor axis, "rollout_wide" over fsdp x tensor; both replicate over the
    other axes.
    """
    if not policy.stacked:
        return policy
    model = policy.config
    weights = jax.tree.map(lambda x: x.astype(policy.dtype),
                           {**policy.weights, "layers": policy.layers},
                           is_leaf=lambda x: isinstance(x, Adapted))
    held = stacks(model)
    layers = tuple({name: weights["layers"][name][having.index(i)]
                    for name, (_, having) in held.items() if i in having}
                   for i in range(model.num_layers))
    weights = {**weights, "layers": layers}
    weights = constrain_tree(weights, rollout_specs(model), model, layout)
    weights["layers"] = tuple(fuse(model, w, layout) for w in weights["layers"])
    return policy.replace(weights=weights, layout=layout, adapters=None, lora=None)


_reshard = jax.jit(to_rollout, static_argnames="layout")


def reshard(policy: Policy, layout: str = "rollout") -> Policy:
    """`to_rollout`, jitted. Raises InputError for a policy that is none, and for another layout."""
    check_policy("policy", policy)
    return _reshard(policy,
                    layout=one_of(name for name in LAYOUTS if name != "train")("layout", layout))
