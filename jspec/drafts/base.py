"""What a drafter is: a value, a `Drafter` of pure functions, as an optimizer is in optax.

A file in this folder holds the drafter of its name (`mtp.py` has `mtp`), which `jspec.drafts.NAME`
makes drafts with. One of a user's own is in any file (`examples/drafter.py` is one), and a config
names it as `path/to/file.py:NAME`.

A `DraftState` depends on the draft and on committed tokens only (what `propose` leaves in it beyond
them, `observe` overwrites). Siblings' committed tokens count too: they were made without the noise
that judges this row's drafts. What is remembered of a rollout was made with its noise: it must not
be drafted from in a rollout with the same key.

In shapes: B rows that are decoded or trained together, P prompts of L positions, S positions of a
sequence, T tokens of a response, K drafted tokens, D the policy's hidden size.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from jspec.choices import DRAFTERS
from jspec.drafts.types import (
    Committed,
    DraftBatch,
    DraftState,
    Observation,
    Prefill,
    Proposal,
    Sampler,
)
from jspec.errors import InputError
from jspec.model import Experts, KeyValues, ModelConfig, Policy, RopeConfig

Metrics = dict[str, jax.Array]
"""Sums over trained tokens by name, such as "overlap": float32 [depths]."""

UNLIKE = ("stop_tokens", "pad_token", "tokenless", "max_position_embeddings", "initializer_range")
"""Fields of a ModelConfig that a draft and its policy need not share."""
RUN_AWAY = 1e6
"""Weights of a model that computes anything are smaller."""


class Init(Protocol):
    def __call__(self, policy: Policy, *key: Any, **options: Any) -> Draft:
        """(policy, key, **options): a fresh draft for a policy in the training layout, on the mesh
        of `jax.set_mesh`.

        Args:
          key: typed, of float32 masters. If it has a default nothing is drawn at random.
          options: by name, each with a default: what `draft.options` sets. They are checked here.

        Raises InputError. Must run under `jax.eval_shape` too.
        """


class Features(Protocol):
    def __call__(self, config: Any) -> tuple[int, ...]:
        """The depths of the policy's trunk that a draft of this config reads (see `model.Trunk`),
        besides its last hidden states, which always come. Default: none."""


class Specs(Protocol):
    def __call__(self, config: Any) -> Any:
        """The weights of a draft of this config, a tree of `model.ParamSpec`: how they are placed
        on a mesh, and read from files. Default: {}."""


class Model(Protocol):
    def __call__(self, config: Any) -> ModelConfig:
        """The ModelConfig whose heads and widths the weights of a draft of this config have, by
        which they are split on a mesh. Default: its policy's."""


class Prepare(Protocol):
    def __call__(self, policy: Policy, draft: Draft) -> Draft:
        """The draft as a rollout uses it, once a rollout: its weights cast and fused. Jittable.
        Here and below the policy is in its rollout layout. Default: as it is."""


class Start(Protocol):
    def __call__(self, policy: Policy, draft: Draft, prefill: Prefill) -> tuple[Any, KeyValues]:
        """(rows, key_values) of P prompts. Default: ({}, ()).

        rows: a tree of arrays [P, ...], which the rollout copies to the prompts' sequences.
        key_values: a pair [P, L, KV heads, head_dim] for each layer that keeps some, which the
        rollout writes to the draft's own pool of blocks.
        """


class Propose(Protocol):
    def __call__(self, policy: Policy, draft: Draft, state: DraftState, committed: Committed,
                 sampler: Sampler) -> tuple[Proposal, DraftState]:
        """`sampler.k` tokens for each of B rows, int32 [B, K], to follow the committed ones.

        Either sampled, each by `sampler.draw`, and with the distributions that they were drawn
        from; or deterministic, and without.
        """


class Observe(Protocol):
    def __call__(self, policy: Policy, draft: Draft, state: DraftState,
                 observation: Observation) -> DraftState:
        """The state with what the verifier has just computed, [B, K + 1, ...], folded in.
        Default: as it is."""


class Loss(Protocol):
    def __call__(self, policy: Policy, draft: Draft, batch: DraftBatch,
                 kind: str) -> tuple[jax.Array, jax.Array, Metrics]:
        """(sum over trained tokens, their count, metrics), float32 scalars, differentiable in the
        draft's weights.

        Args:
          policy: detached, in any layout. draft: as it was made, not prepared.
          kind: one of `choices.DRAFT_LOSSES`, or "states", the distance of the draft's states from
            the policy's, with which `jspec draft train` begins.
        """


class Remember(Protocol):
    def __call__(self, draft: Draft, batch: Any, rollout: Any) -> Draft:
        """The draft with a rollout that is over, a `Rollout` of the `PromptBatch`, folded into its
        persistent state, which the training loop does at each step. Jittable; every array keeps its
        shape."""


class LeastSquares(Protocol):
    def __call__(self, policy: Policy, draft: Draft, batches: Iterable[DraftBatch]) -> Draft:
        """A fresh draft with what can be solved for in place of being learned; `jspec draft train`
        begins with it."""


def no_features(config: Any) -> tuple[int, ...]:
    """Of a drafter that reads nothing but the last hidden states."""
    return ()


def no_specs(config: Any) -> dict:
    """Of a drafter without weights."""
    return {}


def policys_own(config: Any) -> ModelConfig:
    """Of a drafter whose layers have the policy's heads."""
    return config.policy


def as_it_is(policy: Policy, draft: Draft) -> Draft:
    """Of a drafter with nothing to prepare."""
    return draft


def no_rows(policy: Policy, draft: Draft, prefill: Prefill) -> tuple[dict, KeyValues]:
    """Of a drafter that needs nothing but the committed tokens."""
    return {}, ()


def unmoved(policy: Policy, draft: Draft, state: DraftState,
            observation: Observation) -> DraftState:
    """Of a drafter that folds nothing of the verifier's into its state."""
    return state


class Drafter(NamedTuple):
    """The functions that make and use one kind of draft. What is left out is that of a drafter
    without weights: `bigram = Drafter("bigram", Config, init, propose)`.

    Attributes:
      name: an identifier, by which messages, files and checkpoints know the kind.
      Config: the static config's frozen dataclass. It has `policy`, the ModelConfig that the draft
        was made for, and otherwise what JSON can hold: numbers, texts, tuples, ModelConfigs.
      loss: None: it is not trained. remember, least_squares: None: there is none.
    """

    name: str
    Config: type
    init: Init
    propose: Propose
    features: Features = no_features
    specs: Specs = no_specs
    prepare: Prepare = as_it_is
    start: Start = no_rows
    observe: Observe = unmoved
    loss: Loss | None = None
    remember: Remember | None = None
    least_squares: LeastSquares | None = None
    model: Model = policys_own

    def __repr__(self) -> str:
        return f"<drafter {self.name}>"


OPTIONAL = ("loss", "remember", "least_squares")
"""Functions that a drafter may be without."""


def check_drafter(label: str, value: Any) -> Drafter:
    """The value, if it is a whole drafter. Raises InputError, which begins with `label`."""
    if not isinstance(value, Drafter):
        raise InputError(f"{label} is no drafter, but {type(value).__name__}; make one with "
                         "jspec.drafts.Drafter(name, Config, init, propose, ...)")
    if not isinstance(value.name, str) or not value.name.isidentifier():
        raise InputError(f"{label}: its name is {value.name!r}, and must be an identifier")
    if not isinstance(value.Config, type) or not dataclasses.is_dataclass(value.Config) or (
            "policy" not in (field.name for field in dataclasses.fields(value.Config))):
        raise InputError(f"{label}: its Config must be a frozen dataclass with a field `policy`")
    for name, function in zip(value._fields[2:], value[2:], strict=True):
        if not callable(function) and (function is not None or name not in OPTIONAL):
            raise InputError(f"{label} lacks a function: its {name} is {function!r}")
    try:
        inspect.signature(value.init).bind(None, None)
    except TypeError as error:
        raise InputError(f"{label}: its init must take (policy, key) and options with defaults: "
                         f"{error}") from None
    return value


def unlike(made: Any, used: Any, part: str = "") -> str:
    """In words the first field in which a draft's policy differs from the policy that it is used
    with, whose ModelConfigs are given, or what these have as `part`; "" if none does."""
    for field in dataclasses.fields(made):
        a, b = getattr(made, field.name), getattr(used, field.name)
        if a == b or field.name in UNLIKE:
            continue
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            return unlike(a, b, f"{part}{field.name}.")
        return f"its {part}{field.name} is {a}, the policy's is {b}"
    return ""


def model_config(fields: dict) -> ModelConfig:
    """A ModelConfig from what `dataclasses.asdict` and JSON left of it."""
    parts = {"rope": RopeConfig(**fields["rope"]), "stop_tokens": tuple(fields["stop_tokens"])}
    if fields.get("experts") is not None:  # which files of before do not have
        parts["experts"] = Experts(**fields["experts"])
    return ModelConfig(**fields | parts)


def config_from_fields(drafter: Drafter, fields: dict) -> Any:
    """A draft's static config from what `dataclasses.asdict` and JSON left of it. (In files of
    before, a config had its drafter's name, which is left aside.)"""
    types = {field.name: field.type for field in dataclasses.fields(drafter.Config)}

    def back(key: str, value: Any) -> Any:
        if types.get(key) in ("ModelConfig", ModelConfig):
            return model_config(value)
        return tuple(value) if isinstance(value, list) else value

    fields = {key: value for key, value in fields.items() if key != "name" or key in types}
    return drafter.Config(**{key: back(key, value) for key, value in fields.items()})


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no array of a tree holds NaN or infinity, bool scalar. Jitted; whole numbers are
    finite."""
    numbers = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in numbers], bool))


def maximum(x: jax.Array) -> jax.Array:
    """The maximum of an array, float32 scalar; nan where there is one.

    XLA's CPU compiler loses NaN in a maximum over 4,096 float32 numbers or more
    (findings/max_loses_nan_cpu.sh), so it is asked for.
    """
    return jnp.where(jnp.isnan(x).any(), jnp.nan, x.max().astype(jnp.float32))


@jax.jit
def largest(tree: Any) -> jax.Array:
    """The largest absolute value of a tree of arrays, float32 scalar; nan where there is one."""
    sizes = [maximum(jnp.abs(x)) for x in jax.tree.leaves(tree)]
    return maximum(jnp.stack(sizes))


def check_finite(label: str, weights: Any, remedy: str) -> None:
    """Raise InputError, naming the first one, if a weight is NaN or infinite, or so large that what
    it computes is."""
    if not jax.tree.leaves(weights) or float(largest(weights)) < RUN_AWAY:
        return
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    path, bad = next((path, x) for path, x in leaves if not float(largest(x)) < RUN_AWAY)
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    what = (f"has run away: its weight {name} holds numbers up to {float(largest(bad)):.3g}"
            if all_finite(bad) else f"is not finite: its weight {name} holds NaN or infinity")
    raise InputError(f"{label} {what}; {remedy}")


@struct.dataclass
class Draft:
    """A draft's weights, its persistent state (checkpointed), a static config, and its drafter.

    A compiled program is known again by the config's fields and the drafter's functions.
    """

    weights: Any
    state: Any
    config: Any = struct.field(pytree_node=False)
    drafter: Drafter = struct.field(pytree_node=False)

    @property
    def name(self) -> str:
        """Of its drafter."""
        return self.drafter.name

    def check(self, policy: Policy) -> None:
        """Raise InputError if this is no draft, or was made for a policy of another architecture
        or vocabulary."""
        check_drafter("the drafter of this draft", self.drafter)
        made = getattr(self.config, "policy", None)
        if not isinstance(made, ModelConfig):
            raise InputError(f"this draft's config is a {type(self.config).__name__} without the "
                             "policy's; make one with jspec.drafts.NAME(policy, ...)")
        difference = unlike(made, policy.config)
        if difference:
            own = self.name in DRAFTERS
            maker = f"jspec.drafts.{self.name}(policy, ...)" if own else "its drafter's init"
            raise InputError(f"this {self.name} draft was made for another policy: {difference}; "
                             f"make one with {maker}")

    def check_finite(self, source: Any) -> None:
        """Raise InputError if a weight is NaN, infinite or has run away: every draft would be
        refused, and a rollout slower than without. source: what the draft was read from, for the
        message."""
        check_finite(f"the {self.name} draft of {source}", self.weights,
                     "take a checkpoint from before, go without a draft, or train it again with a "
                     "lower learning rate")
