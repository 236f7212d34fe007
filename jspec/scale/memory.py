"""Bytes on a device by kind: what shapes and shardings say, and what the compiler says of a
program."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jspec.model import KeyValues, Policy
from jspec.model.params import is_spec, rollout_specs
from jspec.rl.state import HOST, TrainState
from jspec.sharding import LAYOUTS, batch_shards, current_mesh, placement, spec_sharding
from jspec.speculate import Batching, PromptBatch
from jspec.speculate.blocks import Blocks, prompts_of_shards

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM")


def shard_bytes(tree: Any, host: bool = False) -> int:
    """Of a tree of arrays, or of `jax.ShapeDtypeStruct`s with shardings, what each device holds in
    its own memory, or in that of its host."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        if (getattr(sharding, "memory_kind", None) == HOST) is not host:
            continue
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        size = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        total += math.prod(shape) * size
    return total


def rollout_shape(policy: Policy, layout: str) -> Any:
    """The policy's copy in a rollout layout, as `jax.ShapeDtypeStruct`s; nothing of it is
    traced."""
    model = policy.config
    specs = rollout_specs(model)
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, policy.dtype, sharding=sharding),
        specs,
        spec_sharding(specs, model, layout),
        is_leaf=lambda x: hasattr(x, "axes"),
    )


@dataclasses.dataclass(frozen=True)
class Pools:
    """The keys and values of a rollout, on one device.

    Attributes:
      counts: of blocks. block_bytes: of a block in all layers of the policy, and of the draft.
      slots, shards: of all shards, and how many of these there are. kv_tokens: as configured.
      head_dims: of those who keep some.
    """

    counts: Blocks
    block_bytes: tuple[int, int]
    slots: int
    shards: int
    kv_tokens: int | None
    head_dims: tuple[int, ...]

    @classmethod
    def of(
        cls,
        policy: Policy,
        layout: str,
        of_draft: KeyValues,
        prompts: PromptBatch,
        cap: int,
        k: int,
        batching: Batching,
    ) -> Pools:
        """cap: the most that a sequence generates. k: the most that is drafted. of_draft: its keys
        and values of prompts, of whatever shape."""
        count, length = prompts.tokens.shape
        rows, shards = count * prompts.group_size, batch_shards(layout)
        mine = prompts_of_shards(rows, prompts.group_size, shards).shape[1]
        counts, model = Blocks.of(mine, length, cap, k), policy.config

        def block(heads: int, size: int) -> int:
            shape = (1, heads, counts.size, size)
            sharding = placement(shape, layout, None, "kv_heads", None, None)
            mine = math.prod(shape if sharding is None else sharding.shard_shape(shape))
            return 2 * mine * jnp.dtype(policy.dtype).itemsize

        drafted = sum(block(*keys.shape[2:]) for keys, _ in of_draft)
        return cls(
            counts,
            (block(model.num_kv_heads, model.head_dim) * model.num_layers, drafted),
            min(batching.slots or rows, rows),
            shards,
            batching.kv_tokens,
            tuple({model.head_dim, *(keys.shape[-1] for keys, _ in of_draft)}),
        )

    def is_pool(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of that shape is one layer's pool, of keys or of values."""
        return (
            len(shape) == 4
            and shape[2] == self.counts.size
            and shape[0] > 1
            and shape[3] in self.head_dims
        )

    def bytes(self, slots: int | None = None, kv_tokens: int | None = None) -> tuple[int, int, int]:
        """(of the policy's pool, of the draft's, of paused rows in host memory) with so many slots
        and positions;
        None: as configured."""
        blocks, away = self.counts.pool(
            (slots or self.slots) // self.shards, kv_tokens or self.kv_tokens, self.shards
        )
        return (
            blocks * self.block_bytes[0],
            blocks * self.block_bytes[1],
            away * sum(self.block_bytes),
        )


def prepared_bytes(policy: Any, draft: Any, layout: str) -> int:
    """Of a draft as cycles use it, what each device holds, if its weights are split as the policy's
    matrices are.

    policy, draft: shapes, the latter prepared, or None. What it takes of the policy as it is (its
      output head) is not counted, unless it declares such a table of its own.
    """
    if draft is None:
        return 0
    specs = jax.tree.leaves(draft.drafter.specs(draft.config), is_leaf=is_spec)
    declared = {spec.shape for spec in specs}
    theirs = {
        (x.shape, str(x.dtype))
        for x in (policy.weights["embed"], policy.weights.get("head"))
        if x is not None and x.shape not in declared
    }
    own = [x for x in jax.tree.leaves(draft.weights) if (x.shape, str(x.dtype)) not in theirs]
    degree = math.prod(dict(current_mesh().shape).get(axis, 1) for axis in LAYOUTS[layout]["mlp"])
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in own) // degree


def state_bytes(state: TrainState, reference: Policy | None) -> dict[str, int]:
    """What is there beside a rollout, of a state at rest, or beside an update, of one at work; by
    kind."""
    found = {
        "master weights": shard_bytes(state.policy),
        "optimizer": shard_bytes(state.opt_state),
        "draft": shard_bytes((state.draft, state.draft_opt_state))
        if state.draft is not None
        else 0,
    }
    kept = shard_bytes((state.reference, reference))
    return found | {"reference": kept} if kept else found


def host_bytes(state: TrainState, pools: Pools, out: Any, devices: int) -> dict[str, int]:
    """What a host of so many devices holds during the rollout, by kind. out: what it gives, for
    the host."""
    kinds = {"paused rows": pools.bytes()[2] * devices,
             "answers": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(out))}
    kept = shard_bytes(state, host=True) * devices
    return kinds | {"optimizer": kept} if kept else kinds


def needed(compiled: Any, platform: str) -> int:
    """Bytes of device memory that a compiled program takes, its arguments included.

    On a TPU the compiler's own peak, less what of it is host memory: the parts by themselves do not
    share what the program does. Elsewhere that peak lacks the temporaries, and the parts are
    summed.
    """
    stats = compiled.memory_analysis()
    parts = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
    if platform != "tpu":
        return parts
    host = (
        stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes
    )
    return min(parts, stats.peak_memory_in_bytes - host)


def refused(error: Exception, arguments: int) -> int | None:
    """Bytes that a program would have taken whose compilation failed for want of memory, as the
    compiler says them;
    None: it failed of something else. arguments: its own bytes of them."""
    said = str(error)
    if found := _USED.search(said):
        return int(float(found.group(1)) * _UNITS[found.group(2)])
    if found := _TEMPORARIES.search(said):
        return arguments + int(float(found.group(1)) * _UNITS[found.group(2)])
    return None
