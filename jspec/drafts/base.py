"""What a drafter is: a module of pure functions, as an optimizer is in optax. One file in this folder is one drafter.

A module `jspec/drafts/NAME.py` defines, and nothing else in the project changes:

    init(policy, key, **options) -> Draft        options checked here, by their names; becomes `jspec.drafts.NAME`
    features(config) -> tuple[int, ...]          trunk depths it asks for (see `model.Trunk`); hidden always comes
    specs(config) -> tree of ParamSpec           its weights, or {} (for placing and for checkpoints)
    prepare(policy, draft) -> Draft              once per rollout: cast, fuse
    start(policy, draft, prefill) -> (rows, key_values)     of the prompts; the rollout copies rows to sequences, and
        writes keys and values, one pair a layer that keeps them, to the draft's own pool of blocks
    propose(policy, draft, state, committed, sampler) -> (Proposal, DraftState)
    observe(policy, draft, state, observation) -> DraftState    fold in what the verifier just computed
    loss(policy, draft, batch, kind) -> (sum, count, metrics); None: not trained
    remember(draft, batch, rollout) -> Draft     optional: fold a rollout that is over (its `PromptBatch` and `Rollout`)
        into the draft's persistent state; jittable, every array keeps its shape. The training loop calls it each step
    Config: the static config's dataclass, for readers of files

A `DraftState` depends on the draft and on committed tokens only (what `propose` leaves in it beyond them, `observe`
overwrites). Siblings' committed tokens count too: they were made without the noise that judges this row's drafts. What
is remembered of a rollout was made with its noise: it must not be drafted from in a rollout with the same key.
"""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jspec.arguments import show
from jspec.config import DRAFTERS
from jspec.errors import InputError
from jspec.kernels import draw, whole_vocabulary
from jspec.model import Cache, KeyValues, ModelConfig, Policy, RopeConfig, Trunk
from jspec.model.pool import cache_of
from pallas_kernels.noise import Noise
from pallas_kernels.rejection_sampling import process_logits

UNLIKE = ("stop_tokens", "pad_token", "tokenless", "max_position_embeddings", "initializer_range")
"""Fields of a ModelConfig that a draft and its policy need not share."""
RUN_AWAY = 1e6
"""Weights of a model that computes anything are smaller."""


def drafter(name: Any) -> ModuleType:
    """The drafter's module of a name, which may come from a file: it is looked up among those that are there, and never
    imported. Raises InputError for another name."""
    module = sys.modules.get(f"jspec.drafts.{name}")
    if not hasattr(module, "propose"):
        raise InputError(f"{show(name)} is no drafter; there are {', '.join(DRAFTERS)}")
    return module


def unlike(made: ModelConfig, config: ModelConfig) -> str:
    """In words the first field in which a draft's policy differs from the policy it is used with; "" if none does."""
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(made, field.name), getattr(config, field.name)
        if a != b and field.name not in UNLIKE:
            return f"its {field.name} is {a}, the policy's is {b}"
    return ""


def model_config(fields: dict) -> ModelConfig:
    """A ModelConfig from what `dataclasses.asdict` and JSON left of it."""
    return ModelConfig(**fields | {"rope": RopeConfig(**fields["rope"]), "stop_tokens": tuple(fields["stop_tokens"])})


def config_from_fields(name: str, fields: dict) -> Any:
    """A drafter's static config from what `dataclasses.asdict` and JSON left of it. Raises InputError for a name
    that is no drafter's."""
    kind = drafter(name).Config
    types = {field.name: field.type for field in dataclasses.fields(kind)}

    def back(key: str, value: Any) -> Any:
        if types.get(key) in ("ModelConfig", ModelConfig):
            return model_config(value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{key: back(key, value) for key, value in fields.items()})


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no array of a tree holds NaN or infinity, bool scalar. Jitted; whole numbers are finite."""
    flags = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array(flags, bool))


@jax.jit
def largest(tree: Any) -> jax.Array:
    """The largest absolute value of a tree of arrays, float32 scalar; nan where there is one."""
    return jnp.stack([jnp.abs(x).max().astype(jnp.float32) for x in jax.tree.leaves(tree)]).max()


def check_finite(label: str, weights: Any, remedy: str) -> None:
    """Raise InputError, naming the first one, if a weight is NaN or infinite, or so large that what it computes is."""
    if not jax.tree.leaves(weights) or float(largest(weights)) < RUN_AWAY:
        return
    path, bad = next((path, x) for path, x in jax.tree_util.tree_leaves_with_path(weights)
                     if not float(largest(x)) < RUN_AWAY)
    name, size = jax.tree_util.keystr(path, simple=True, separator="."), float(largest(bad))
    what = (f"has run away: its weight {name} holds numbers up to {size:.3g}" if all_finite(bad) else
            f"is not finite: its weight {name} holds NaN or infinity")
    raise InputError(f"{label} {what}; {remedy}")


@struct.dataclass
class Draft:
    """A drafter's weights, its persistent state (checkpointed), and a static config that names its module.

    The config is a frozen dataclass with at least `name` (the module's) and `policy` (the ModelConfig it was made for).
    """

    weights: Any
    state: Any
    config: Any = struct.field(pytree_node=False)

    @property
    def module(self) -> ModuleType:
        """The module of pure functions that this draft's config names."""
        return drafter(self.config.name)

    def check(self, policy: Policy) -> None:
        """Raise InputError if this draft was made for a policy of another architecture or vocabulary, or is none."""
        made = getattr(self.config, "policy", None)
        if not isinstance(made, ModelConfig):
            raise InputError(f"this draft's config is a {type(self.config).__name__} without the policy's; make one "
                             "with jspec.drafts.NAME(policy, ...)")
        difference = unlike(self.config.policy, policy.config)
        if difference:
            raise InputError(f"this {self.config.name} draft was made for another policy: {difference}; "
                             f"make one with jspec.drafts.{self.config.name}(policy, ...)")

    def check_finite(self, source: Any) -> None:
        """Raise InputError if a weight is NaN, infinite or has run away: every draft would be refused, and a rollout
        slower than without. source: what the draft was read from, for the message."""
        check_finite(f"the {self.config.name} draft of {source}", self.weights, "take a checkpoint from before, go "
                     "without a draft, or train it again with a lower learning rate")


@struct.dataclass
class Prefill:
    """What the policy computed over P prompts: trunk [P, L, ...], tokens int32 [P, L], lengths int32 [P].

    key: uint32 [2], of the batch: to know a rollout's noise again by, and not to make any.
    """

    trunk: Trunk
    tokens: jax.Array
    lengths: jax.Array
    key: jax.Array | None = None


@struct.dataclass
class DraftState:
    """A drafter's state of B rows.

    Attributes:
      rows: a pytree whose leaves lead with rows.
      cache: its own keys and values, in the blocks that the policy's cache has for the same rows; None: it keeps none.
    """

    rows: Any
    cache: Cache | None = None

    @classmethod
    def of_prompts(cls, rows: Any, key_values: KeyValues, positions: int) -> DraftState:
        """What `start` returned, as the state of rows that are the prompts, each with room for `positions`."""
        return cls(rows, cache_of(key_values, positions) if key_values else None)


@struct.dataclass
class Committed:
    """Every row's tokens so far, prompt included: tokens int32 [B, S], garbage from lengths int32 [B] on.

    Attributes:
      cache: the policy's. The last committed token is pending: its keys and values, at lengths - 1, are not there yet.
      all_tokens, all_lengths: int32 [N, S] and [N], the same of all sequences of the batch that are on this device,
        those that are not in a slot too; None: the rows are all there is.
      sequences: int32 [B], which of them each row is; None: row i is sequence i.
      group_size: static. Each group_size adjacent sequences, from the first one on, continue one prompt; 1: nothing is
        said of that.
    """

    tokens: jax.Array
    lengths: jax.Array
    cache: Cache | None = None
    all_tokens: jax.Array | None = None
    all_lengths: jax.Array | None = None
    sequences: jax.Array | None = None
    group_size: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class Proposal:
    """What is drafted, for the rule to judge.

    Attributes:
      tokens: int32 [N, K], ids of the policy's vocabulary.
      log_q: float32 [N, K, Vd], the normalised log-probabilities that they were drawn from; None: deterministic.
      vocab: int32 [Vd], the ids of a reduced vocabulary, outside of which q is 0; None: Vd is the policy's.
      cache: the policy's, if the drafter wrote to it, and then only at positions lengths - 1 .. lengths - 1 + K, which
        the verifier writes next (so that no copy of it is made); None: it did not.
    """

    tokens: jax.Array
    log_q: jax.Array | None = None
    vocab: jax.Array | None = None
    cache: Cache | None = None


@struct.dataclass
class Observation:
    """What a cycle computed and committed.

    Attributes:
      trunk: over the K + 1 verified positions, [N, K + 1, ...]; entry j is the state at position lengths - 1 + j.
      tokens: int32 [N, K + 1]; the first `count` are committed, at positions lengths .. lengths + count - 1.
      lengths: int32 [N], committed tokens when the cycle began.
      count: int32 [N], 0 for a row that was done.
    """

    trunk: Trunk
    tokens: jax.Array
    lengths: jax.Array
    count: jax.Array


@struct.dataclass
class DraftBatch:
    """What a draft is trained on: B rows of prompt and response without a gap, and what the policy computed of them.

    Attributes:
      trunk: [B, S, ...], the policy's states, with the features that the drafter asks for. Detached.
      tokens: int32 [B, S]. response_start: int32 [B], position of the first response token, at least 1.
      mask: bool [B, T], the response's tokens that are trained.
      logprobs: float32 [B, T], of the response's tokens, log-softmax(logits / temperature) over the whole vocabulary,
        from these very states.
      temperature: float32 scalar or [B], the sampling temperature; 0 counts as 1.
    """

    trunk: Trunk
    tokens: jax.Array
    response_start: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    temperature: jax.Array

    def predicting(self, x: jax.Array) -> jax.Array:
        """The entries of x [B, S, D] at the positions that predict the response's tokens, [B, T, D]."""
        at = self.response_start[:, None] - 1 + jnp.arange(self.mask.shape[1])[None]
        return jnp.take_along_axis(x, at[:, :, None], axis=1, mode="clip")

    def response(self) -> jax.Array:
        """The response's tokens, int32 [B, T]."""
        at = self.response_start[:, None] + jnp.arange(self.mask.shape[1])[None]
        return jnp.take_along_axis(self.tokens, at, axis=1, mode="clip")


@struct.dataclass
class Sampler:
    """The rule's noise and the sampling that a drafter draws with; a drafter never makes noise of its own.

    Attributes:
      noise: of this cycle.
      temperature: float32 [N]. top_p: float32 [N] or None. top_k, k: static.
      layout: of the policy, which says how rows and whole vocabularies are split.
    """

    noise: Noise
    temperature: jax.Array
    top_p: jax.Array | None
    top_k: int = struct.field(pytree_node=False)
    k: int = struct.field(pytree_node=False)
    layout: str = struct.field(pytree_node=False, default="rollout")

    def draw(self, logits: jax.Array, offset: int, vocab: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Draw draft token `offset`, int32 [N], from logits [N, Vd]; returns it with the log q it was drawn from.

        vocab: int32 [Vd], the ids of a reduced vocabulary; None: they are 0..Vd-1.
        """
        if self.top_k or self.top_p is not None:
            logits = whole_vocabulary(self.layout, logits)
        log_q = process_logits(logits, self.temperature, self.top_p, top_k=self.top_k)
        return draw(self.layout, log_q, self.noise, offset, vocab), log_q
