"""The mesh, the table of logical axes, the training and rollout layouts, and the reshard between
them.

Everything runs the same on one device and on many: the mesh is found through `jax.set_mesh`, and
without one nothing is split. Whether there is one is asked here alone (`current_mesh`,
`placement`). Mesh axes are Auto: XLA's partitioner propagates from the constraints given here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jspec.arguments import whole, wrong
from jspec.errors import InputError

AXES = ("data", "fsdp", "expert", "tensor")

T = TypeVar("T")

_TENSOR = dict.fromkeys(("vocab", "q_heads", "kv_heads", "mlp", "expert_mlp"), ("tensor",))
_WIDE = dict.fromkeys(_TENSOR, ("fsdp", "tensor"))

# logical axis -> mesh axes, by layout; a logical axis that is not listed is replicated. Rows are
# split over `expert` as well: attention is data-parallel there, and only the experts are not
LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {"batch": ("data", "fsdp", "expert"), "embed": ("fsdp", "expert"),
              "expert": ("expert",), "expert_embed": ("fsdp",), **_TENSOR},
    "rollout": {"batch": ("data", "fsdp", "expert"), "expert": ("expert",), **_TENSOR},
    "rollout_wide": {"batch": ("data", "expert"), "expert": ("expert",), **_WIDE},
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None,
              expert: int = 1) -> Mesh:
    """A mesh with axes (data, fsdp, expert, tensor), all Auto. One of the sizes may be -1: what the
    others leave.

    Of several slices of TPUs, `data` goes over them first: all else stays within one.

    Raises InputError if the sizes do not multiply to the number of devices, or data not to that of
    slices.
    """
    devices = jax.devices() if devices is None else devices
    is_list = isinstance(devices, list | tuple | np.ndarray) and len(devices)
    if not is_list or not all(hasattr(device, "device_kind") for device in devices):
        raise wrong("devices", devices, "a list of devices, at least one, such as jax.devices()")
    sizes = mesh_sizes((data, fsdp, expert, tensor), len(devices))
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        try:
            return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
        except NotImplementedError:  # no axis is whole axes of the torus: they are split
            split = create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
            return Mesh(split, AXES, axis_types=types)
    check_slices(sizes, slices)
    within, between = (sizes[0] // slices, *sizes[1:]), (slices, *(1,) * (len(AXES) - 1))
    hybrid = create_hybrid_device_mesh(within, between, list(devices),
                                       allow_split_physical_axes=True)
    return Mesh(hybrid, AXES, axis_types=types)


def check_slices(sizes: Sequence[int], slices: int) -> None:
    """Raise InputError if `data`, the first of a mesh's sizes, cannot go over so many slices."""
    if sizes[0] % slices:
        raise InputError(f"mesh.data = {sizes[0]} is not divided by the {slices} slices that the "
                         "devices are of; set it to a multiple, so that no other axis leaves one")


def configured_mesh(section: Any, devices: Any = None) -> Mesh:
    """The mesh of a config's section `mesh`."""
    return make_mesh(section.data, section.fsdp, section.tensor, devices, section.expert)


def mesh_sizes(sizes: Sequence[int], devices: int) -> tuple[int, ...]:
    """The sizes of `AXES` on so many devices, which need not be here; -1 becomes what the others
    leave. Raises as `make_mesh` does."""
    sizes = [whole(-1)(f"mesh {name}", size) for name, size in zip(AXES, sizes, strict=True)]
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise InputError("mesh sizes must be positive, at most one of them -1; got "
                         f"{', '.join(AXES)} = {sizes}")
    known = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if int(np.prod(sizes)) != devices:
        raise InputError(f"mesh {' x '.join(AXES)} = {' x '.join(map(str, sizes))} does not fit "
                         f"{devices} devices; set {', '.join(f'mesh.{name}' for name in AXES)} so "
                         "that the product does")
    return tuple(sizes)


def mesh_of_weights(model: Any, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices, for what names no mesh: rows are split over all of them, and the master weights
    in as many ways as the model's width (a ModelConfig's hidden_size) allows."""
    devices = jax.devices() if devices is None else devices
    fsdp = math.gcd(model.hidden_size, len(devices))
    return make_mesh(len(devices) // fsdp, fsdp, 1, devices)


def mesh_of_rows(model: Any, rows: int, devices: Sequence[Any] | None = None) -> Mesh:
    """As many devices as `rows` sequences can be decoded on: as many as rows can be split over, the
    rest by heads, hidden layer and vocabulary; fewer than there are where neither divides."""
    devices = jax.devices() if devices is None else devices
    most = len(devices)
    tensors = [n for n in range(1, most + 1) if _splits_heads(model, n)]
    pairs = [(n, tensor) for n in range(1, most + 1) if rows % n == 0 for tensor in tensors
             if n * tensor <= most]
    split, tensor = max(pairs, key=lambda pair: (pair[0] * pair[1], pair[0]))
    fsdp = math.gcd(model.hidden_size, split)
    return make_mesh(split // fsdp, fsdp, tensor, list(devices[:split * tensor]))


def _splits_heads(model: Any, degree: int) -> bool:
    """Whether `degree` tensor shards divide the model, as `check_mesh` asks it."""
    return all(size % degree == 0 for size in split_sizes(model).values()) and (
        degree > model.num_kv_heads or model.num_kv_heads % degree == 0)


def split_sizes(model: Any) -> dict[str, int]:
    """What tensor parallelism splits of a model, KV heads apart, by logical axis."""
    sizes = {"vocab": model.vocab_size, "q_heads": model.num_heads, "mlp": model.intermediate_size}
    return (sizes if model.experts is None
            else {**sizes, "expert_mlp": model.experts.intermediate_size})


def current_mesh() -> Mesh | AbstractMesh:
    """The mesh of `jax.set_mesh`, an abstract one where it is traced. Without one, a mesh of no
    axes and no devices: nothing is split over it."""
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # this is being traced
        return jax.sharding.get_abstract_mesh()


def _degree(mesh: Any, axes: tuple[str, ...]) -> int:
    return int(np.prod([mesh.shape[a] for a in axes if a in mesh.shape]))


def partition(mesh: Any, layout: str, shape: tuple[int, ...],
              axes: tuple[str | None, ...]) -> PartitionSpec:
    """Partition spec of an array with logical `axes`; mesh axes that do not divide a dimension are
    left out, and those that a `shard_map` around this has split already."""
    manual, entries = getattr(mesh, "manual_axes", ()), []
    for size, name in zip(shape, axes, strict=True):
        used: tuple[str, ...] = ()
        for axis in LAYOUTS[layout].get(name, ()) if name else ():
            if (axis in mesh.shape and axis not in manual and size % _degree(mesh, (*used, axis))
                == 0):
                used = (*used, axis)
        entries.append(used or None)
    return PartitionSpec(*entries)


def placement(shape: tuple[int, ...], layout: str, *axes: str | None,
              mesh: Any = None) -> NamedSharding | None:
    """Where an array with logical `axes` lies on a mesh (default: the current one). Without one,
    None: wherever JAX puts what nobody places."""
    mesh = mesh or current_mesh()
    return None if mesh.empty else NamedSharding(mesh, partition(mesh, layout, shape, axes))


def place(x: Any, layout: str, *axes: str | None) -> jax.Array:
    """An array that every process has whole, split over the mesh of `jax.set_mesh` by its logical
    axes."""
    x = np.asarray(x)
    sharding = placement(x.shape, layout, *axes)
    return (jnp.asarray(x) if sharding is None
            else jax.make_array_from_callback(x.shape, sharding, lambda at: x[at]))


def constrain(x: jax.Array, layout: str, *axes: str | None) -> jax.Array:
    """Constrain an intermediate array to `layout`'s sharding on the current mesh; no-op without
    one."""
    mesh = current_mesh()
    if mesh.size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition(mesh, layout, x.shape,
                                                                             axes)))


def filled(items: Sequence[T], shards: int, rows: int = 1) -> list[T]:
    """`items` of `rows` rows each, and as many of them once more at the end as it takes until all
    rows are divided by `shards`."""
    needed = -len(items) % (shards // math.gcd(shards, rows))
    return [*items, *itertools.islice(itertools.cycle(items), needed)]


def block_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x [R, ...], of each of its equal blocks those at index int32 [blocks, n] within it:
    [blocks x n, ...].

    Where the blocks are the shards that a batch is split into, every device takes from what it
    holds.
    """
    blocks = x.reshape(index.shape[0], -1, *x.shape[1:])
    rows = jax.vmap(lambda x, index: x.at[index].get(mode="promise_in_bounds"))(blocks, index)
    return rows.reshape(-1, *x.shape[1:])


def check_mesh(model: Any, mesh: Any, layout: str = "train") -> None:
    """`check_divides`, and InputError for an axis that splits experts where a policy has none."""
    if model.experts is None and _degree(mesh, ("expert",)) > 1:
        raise InputError(f"mesh.expert = {mesh.shape['expert']} splits experts, and this model has "
                         "none; set it to 1")
    check_divides(model, mesh, layout)


def check_divides(model: Any, mesh: Any, layout: str = "train") -> None:
    """Raise InputError, naming the axis, if the mesh does not divide the model, a policy or what
    drafts for one. More shards than KV heads is fine."""
    rules, experts = LAYOUTS[layout], model.experts
    sizes = {**({} if experts is None else {"expert": experts.count}), **split_sizes(model),
             "embed": model.hidden_size}
    for name, size in sizes.items():
        degree = _degree(mesh, rules.get(name, ()))
        if size % degree:
            raise InputError(f"mesh axes {rules[name]} of {degree} shards do not divide the "
                             f"model's {name} = {size}; use a divisor")
    degree = _degree(mesh, rules["kv_heads"])
    if model.num_kv_heads % degree and degree <= model.num_kv_heads:
        raise InputError(f"mesh axes {rules['kv_heads']} of {degree} shards do not divide "
                         f"num_kv_heads = {model.num_kv_heads}; use a divisor, or more shards than "
                         "heads (they are then replicated)")


def heads_replicated(model: Any, layout: str, mesh: Any = None) -> bool:
    """Whether `layout` splits heads over more shards than the model has KV heads, so that every
    shard holds all of those. Another layout on the same mesh may split them."""
    return model.num_kv_heads % _degree(mesh or current_mesh(), LAYOUTS[layout]["kv_heads"]) != 0


def spec_sharding(specs: Any, model: Any, layout: str = "train", mesh: Any = None) -> Any:
    """Where every leaf of a tree with `shape` and `axes` (see `model.ParamSpec`) lies, as
    `placement` says it.

    mesh: default the current one. Raises InputError where it does not divide the model.
    """
    mesh = mesh or current_mesh()
    check_divides(model, mesh, layout)
    replicated = heads_replicated(model, layout, mesh)

    def of_spec(spec) -> NamedSharding | None:
        axes = (None if replicated and axis == "kv_heads" else axis for axis in spec.axes)
        return placement(spec.shape, layout, *axes, mesh=mesh)

    return jax.tree.map(of_spec, specs, is_leaf=lambda x: hasattr(x, "axes"))


def constrain_tree(tree: Any, specs: Any, model: Any, layout: str) -> Any:
    """Constrain weights to `layout`'s sharding on the current mesh; no-op without one."""
    mesh = current_mesh()
    if mesh.size <= 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, spec_sharding(specs, model, layout, mesh))


def agreed(flag: jax.Array) -> jax.Array:
    """flag bool scalar; inside a `shard_map` over `expert`: whether it is true on any shard along
    that axis, whose programs must run a loop with collectives over it equally often."""
    mesh = current_mesh()
    if mesh.shape.get("expert", 1) == 1 or "expert" not in mesh.manual_axes:
        return flag
    return jax.lax.pmax(flag.astype(jnp.int32), "expert") > 0


def batch_axes(layout: str) -> tuple[str, ...]:
    """The current mesh's axes that split a batch's rows."""
    return tuple(axis for axis in LAYOUTS[layout]["batch"] if axis in current_mesh().shape)


def batch_shards(layout: str, mesh: Any = None) -> int:
    """Over how many shards the mesh (default: the current one, if any) splits a batch's rows."""
    return _degree(mesh or current_mesh(), LAYOUTS[layout]["batch"])


def check_rows(rows: int, mesh: Any = None, layout: str = "train",
               of: str = "prompts_per_step, group_size") -> None:
    """Raise InputError if `rows` sequences cannot be split evenly over the mesh's batch axes. of:
    what says how many they are."""
    degree = batch_shards(layout, mesh)
    if rows % degree:
        raise InputError(f"a batch of {rows} sequences is not divided by the mesh's {degree} batch "
                         f"shards ({' x '.join(LAYOUTS[layout]['batch'])}); change {of} or the "
                         "mesh")
