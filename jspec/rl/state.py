"""Everything that training carries from one step to the next, as one pytree: its shape, and how it
begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jspec.drafts import Draft
from jspec.model import Policy, abstract_policy
from jspec.model.lora import abstract_adapted, trained
from jspec.model.params import abstract_weights
from jspec.rl.optimizers import optimizers
from jspec.rl.update_settings import UpdateSettings, trains_draft
from jspec.sharding import placement
from pallas_kernels.noise import key_words, seed_key


@struct.dataclass
class TrainState:
    """What an update takes and gives back; a checkpoint holds all of it.

    Attributes:
      policy: training layout, float32 masters; with adapters, those are what is trained.
      draft: float32 masters, or None for autoregressive rollouts.
      opt_state, draft_opt_state: of the two optimizers, which share nothing; the latter is () for a
        draft without weights to train. Between updates they may lie in host memory (`at_rest`).
      updates: int32 scalar, optimizer updates so far, skipped ones included; `updates_per_step` of
        them are a step.
      skipped, draft_skipped: int32 scalars, updates left out for a non-finite loss or gradient.
      skipped_in_row, draft_skipped_in_row: int32 scalars, how many of the latest updates in a row.
      key: the run's typed key. It never changes: a step folds its number into it.
      reference: what the KL is taken against where it moves (`kl_reference_every`), in the place of
        what is trained of the policy; else None.
    """

    policy: Policy
    draft: Draft | None
    opt_state: Any
    draft_opt_state: Any
    updates: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    draft_skipped: jax.Array
    draft_skipped_in_row: jax.Array
    key: jax.Array
    reference: Any = None


HOST = "pinned_host"
"""The memory of a host that its devices read and write by themselves."""
COUNTERS = ("updates", "skipped", "skipped_in_row", "draft_skipped", "draft_skipped_in_row")


def state_specs(policy: Policy, draft: Draft | None, settings: UpdateSettings) -> TrainState:
    """The state's shape at rest: `jax.ShapeDtypeStruct`s, each with its sharding on the mesh of
    `jax.set_mesh` (None without one). The moments are placed as the weights they belong to; what is
    no weight is everywhere.

    policy, draft: arrays, or `jax.ShapeDtypeStruct`s, of which only static config, shapes and
    dtypes are looked at.
    """
    lora, draft = policy.lora, draft_specs(draft)
    policy = abstract_policy(policy.config, policy.dtype)
    policy = policy if lora is None else abstract_adapted(policy, lora)
    optimizer, draft_optimizer = optimizers(settings)
    count = everywhere((), jnp.int32)
    return at_rest(TrainState(
        policy, draft, moments(optimizer, trained(policy)),
        moments(draft_optimizer, draft.weights) if trains_draft(draft, settings) else (),
        **dict.fromkeys(COUNTERS, count), key=everywhere((), seed_key(0).dtype),
        reference=trained(policy) if settings.kl_reference_every else None), settings)


def at_rest(state: TrainState, settings: UpdateSettings) -> TrainState:
    """A state, or its shape, as it lies between updates: in host memory the optimizers' whose
    `state_memory` says so. Of arrays the copies are only begun, and what is copied is given up."""
    return _moved(state, settings, HOST)


def at_work(state: TrainState, settings: UpdateSettings) -> TrainState:
    """The same as updates take it: all of it on the devices."""
    return _moved(state, settings, None)


def shapes_at_work(state: TrainState, settings: UpdateSettings) -> TrainState:
    """`at_work` of a state's shape; arrays stay where they are."""
    return at_work(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                                               sharding=x.sharding), state),
                   settings)


def _moved(state: TrainState, settings: UpdateSettings, kind: str | None) -> TrainState:
    optimizers = {"opt_state": settings, "draft_opt_state": settings.draft_optimizer}
    return state.replace(**{name: _in_memory(getattr(state, name), kind)
                            for name, of in optimizers.items() if of.state_memory == "host"})


def _in_memory(tree: Any, kind: str | None) -> Any:
    """A tree of arrays, or of shapes, in that memory of its devices; None: in their own."""
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda x: (x.sharding or default).with_memory_kind(kind), tree)

    def put(x: Any, sharding: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        moved = jax.device_put(x, sharding)
        if moved.sharding != x.sharding:  # else it is the same array
            x.delete()  # once it is copied: device_put has no donation from memory to memory
        return moved

    return jax.tree.map(put, tree, shardings)


def draft_specs(draft: Draft | None) -> Draft | None:
    """A draft's shape, of which only its static config and the shapes of its state are looked
    at."""
    if draft is None:
        return None
    drafter, config = draft.drafter, draft.config
    weights = abstract_weights(drafter.specs(config), drafter.model(config))
    return draft.replace(weights=weights,
                         state=jax.tree.map(lambda x: everywhere(x.shape, x.dtype), draft.state))


def everywhere(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array that every device holds whole."""
    return jax.ShapeDtypeStruct(shape, dtype,
                                sharding=placement(shape, "train", *(None,) * len(shape)))


def moments(optimizer: optax.GradientTransformation, weights: Any) -> Any:
    """The shape of an optimizer's state: of moments each where its weight is, of all else
    everywhere."""
    placed, shape = [], jax.eval_shape(optimizer.init, weights)
    whole = placement((), "train")

    def masked(x: Any) -> bool:  # of muon: the weights that the other rule has
        return isinstance(x, optax.MaskedNode)

    def place(x: Any, sharding: Any) -> Any:
        return x if masked(x) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def place_all() -> None:
        placed.append(optax.tree_map_params(
            optimizer, lambda x, weight: place(x, weight.sharding), shape, weights,
            transform_non_params=lambda x: place(x, whole), is_leaf=masked))

    # optax initialises a placeholder, which devices that are not here cannot do
    jax.eval_shape(place_all)
    return placed[0]


def init_state(policy: Policy, draft: Draft | None, settings: UpdateSettings,
               seed: int) -> TrainState:
    """The state before the first update, as `state_specs` has it."""
    specs = state_specs(policy, draft, settings)

    def made(make: Callable, spec: Any, *arguments: Any) -> Any:
        # zeros depend on nothing, so XLA would not place them by itself
        return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, spec))(*arguments)

    if draft is not None:  # what a drafter keeps may lie on one device yet
        draft = draft.replace(state=jax.tree.map(
            lambda x, spec: x if spec.sharding is None else jax.device_put(x, spec.sharding),
            draft.state, specs.draft.state))
    optimizer, draft_optimizer = optimizers(settings)
    draft_opt_state = () if specs.draft_opt_state == () else made(
        draft_optimizer.init, specs.draft_opt_state, draft.weights)
    # one buffer each, since the update donates them all
    counters = {name: made(lambda: jnp.zeros((), jnp.int32), getattr(specs, name))
                for name in COUNTERS}
    words = np.asarray(key_words(seed_key(seed)))
    key = jax.random.wrap_key_data(made(lambda: jnp.asarray(words), specs.key), impl="threefry2x32")
    return TrainState(policy, draft, made(optimizer.init, specs.opt_state, trained(policy)),
                      draft_opt_state, **counters, key=key,
                      reference=None if specs.reference is None else made(
                          lambda weights: jax.tree.map(lambda x: x + 0, weights), specs.reference,
                          trained(policy)))
