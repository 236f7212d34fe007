"""From a source of tensors to the policy's arrays: chunk by chunk, each straight to its place in
its shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from jspec.errors import InputError
from jspec.hub.tensors import StoredTensor, stored_tensors
from jspec.model.config import ModelConfig
from jspec.model.params import param_specs, policy_sharding

_CHUNK_BYTES = 4 << 20
_ALIGNMENT = 64  # bytes; what XLA's CPU client needs to take a host buffer as it is, without a copy

Bounds = tuple[tuple[int, int], ...]


class TensorSource(Protocol):
    """Tensors under transformers' names; a safetensors directory and a GGUF file are two of
    them."""

    @property
    def label(self) -> str:
        """What errors call it."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor that there is."""

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop along the first axis, in any float dtype."""


def check_shapes(source: TensorSource, tensors: list[StoredTensor]) -> list[str]:
    """The names that are left over. Raises InputError for the first tensor that is missing or of
    the wrong shape."""
    expected = {t.name: t.shape for t in tensors}
    shapes = source.shapes
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise InputError(f"{source.label}: tensor {missing[0]} is missing" + _more(missing))
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise InputError(f"{source.label}: tensor {name} has shape {list(shapes[name])}, "
                             f"but the config says {list(shape)}")
    return [name for name in shapes
            if name not in expected and not name.endswith("rotary_emb.inv_freq")]


def check_none_left(source: TensorSource, left: list[str], what: str) -> None:
    """Raise InputError if names are left over: they have no place in `what`."""
    if left:
        raise InputError(f"{source.label}: tensor {left[0]} has no place in {what}" + _more(left))


def check_layers(label: str, config: ModelConfig, tensors: int) -> None:
    """Raise InputError for more layers, or experts of all layers, than there are tensors, before
    anybody lists what 10^9 layers consist of."""
    count, what = config.num_layers, "layers"
    if count <= tensors and config.experts is not None:
        count, what = config.experts.count * len(config.sparse_layers), "experts in all layers"
    if count > tensors:
        raise InputError(f"{label}: the config says {count} {what}, and there are only {tensors} "
                         "tensors")


def check_tensors(source: TensorSource, config: ModelConfig) -> None:
    """Raise InputError for the first tensor that is missing, left over, or of the wrong shape."""
    check_layers(source.label, config, len(source.shapes))
    left = check_shapes(source, stored_tensors(config))
    if config.tie_embeddings and "lm_head.weight" in left:
        _check_tied(source)
        left.remove("lm_head.weight")
    check_none_left(source, left, f"a {config.family} model")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_tied(source: TensorSource) -> None:
    """A checkpoint may store a tied head twice; one that differs is a contradiction, not something
    to drop."""
    for start, stop in _chunks(source.shapes["lm_head.weight"]):
        names = ("lm_head.weight", "model.embed_tokens.weight")
        head, embed = (source.rows(name, start, stop) for name in names)
        if not np.array_equal(head, embed):
            raise InputError(f"{source.label}: lm_head.weight differs from the embedding, but the "
                             "config says tie_word_embeddings true; set it false")


def _chunks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    rows = max(1, _CHUNK_BYTES // (4 * max(1, int(np.prod(shape[1:], dtype=np.int64)))))
    return [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * 4
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start:start + size].view(np.float32).reshape(shape)


def _widen(rows: np.ndarray) -> np.ndarray:
    """To float32. bfloat16 is float32's upper half: shifting it is five times numpy's own cast."""
    if rows.dtype == ml_dtypes.bfloat16:
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)


def _fill(buffers: dict[Bounds, np.ndarray], source: TensorSource, tensor: StoredTensor) -> None:
    """Copy a stored tensor into every buffer that holds a part of it; chunks that none holds are
    not read."""
    places = []
    for bounds, buffer in buffers.items():
        leading, own = bounds[:len(tensor.place)], bounds[len(tensor.place):]
        at = tuple(i - low for i, (low, _) in zip(tensor.place, leading, strict=True))
        if all(low <= i < high for i, (low, high) in zip(tensor.place, leading, strict=True)):
            places.append((own, buffer[at]))
    for start, stop in _chunks(tensor.shape):
        wanted = [(b, t) for b, t in places if b[0][0] < stop and start < b[0][1]]
        if not wanted:
            continue
        rows = source.rows(tensor.name, start, stop)
        rows = _widen(rows)
        for (first, *rest), target in wanted:
            low, high = max(start, first[0]), min(stop, first[1])
            columns = tuple(slice(*b) for b in rest)
            target[low - first[0]:high - first[0]] = rows[(slice(low - start, high - start),
                                                           *columns)]


def assemble(source: TensorSource, tensors: list[StoredTensor], shape: tuple[int, ...],
             sharding: Any) -> jax.Array:
    """One parameter from its stored tensors, placed as `sharding` has it (None: the default
    device)."""
    if sharding is None:
        devices: dict[Any, Bounds] = {None: tuple((0, n) for n in shape)}
    else:
        devices = {d: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
                   for d, index in sharding.addressable_devices_indices_map(shape).items()}
    buffers = {bounds: _aligned(tuple(high - low for low, high in bounds))
               for bounds in set(devices.values())}
    for tensor in tensors:
        _fill(buffers, source, tensor)
    if sharding is None:
        return jax.device_put(buffers.popitem()[1])
    shards = [jax.device_put(buffers[bounds], device) for device, bounds in devices.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def read_weights(source: TensorSource, config: ModelConfig, mesh: Any = None) -> dict[str, Any]:
    """The tree that `param_specs(config)` declares: float32, layers stacked, on the mesh (default:
    the current one).

    Host memory holds the arrays being made and one chunk (4 MiB) of a stored tensor; each process
    reads only what its own devices hold. Raises InputError for a tensor missing, left over or of
    the wrong shape, for a file cut short, and if the mesh does not divide the model.
    """
    check_tensors(source, config)
    specs = param_specs(config)
    shardings = policy_sharding(config, mesh)
    groups: dict[tuple[str | int, ...], list[StoredTensor]] = {}
    for tensor in stored_tensors(config):
        groups.setdefault(tensor.key, []).append(tensor)
    weights: dict[str, Any] = {"layers": {}}
    spec: Any
    place: Any
    for key, tensors in groups.items():
        spec, sharding, place = specs, shardings, weights
        for part in key:
            spec, sharding = spec[part], sharding[part]
        for part in key[:-1]:
            place = place[part]
        place[key[-1]] = assemble(source, tensors, spec.shape, sharding)
    return weights
