"""What a drafter is: a module of pure functions, as an optimizer is in optax. One file in this folder is one drafter.

A module `jspec/drafts/NAME.py` defines, and nothing else in the project changes:

    init(policy, key, **options) -> Draft        options checked here, by their names; becomes `jspec.drafts.NAME`
    features(config) -> tuple[int, ...]          trunk depths it asks for (see `model.Trunk`); hidden always comes
    specs(config) -> tree of ParamSpec           its weights, or {} (for placing and for checkpoints)
    prepare(policy, draft) -> Draft              once per rollout: cast, fuse
    start(policy, draft, prefill, cache_size) -> state      rows are prompts; the rollout copies them to sequences
    propose(policy, draft, state, committed, sampler) -> (Proposal, state)
    observe(policy, draft, state, observation) -> state     fold in what the verifier just computed
    loss(policy, draft, trunk, tokens, response_start, mask, temperature, kind) -> (sum, count, metrics); None: not
        trained

State is a pytree whose leaves lead with rows, and depends on committed tokens only (what `propose` leaves in it beyond
them, `observe` overwrites).
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any

import jax
from flax import struct

from jspec.errors import InputError
from jspec.model import ModelConfig, Policy, Trunk
from pallas_kernels.noise import CoupledNoise, RejectionNoise
from pallas_kernels.rejection_sampling import draw, process_logits

UNLIKE = ("stop_tokens", "pad_token", "max_position_embeddings", "initializer_range")
"""Fields of a ModelConfig that a draft and its policy need not share."""


def unlike(made: ModelConfig, config: ModelConfig) -> str:
    """In words the first field in which a draft's policy differs from the policy it is used with; "" if none does."""
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(made, field.name), getattr(config, field.name)
        if a != b and field.name not in UNLIKE:
            return f"its {field.name} is {a}, the policy's is {b}"
    return ""


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
        return importlib.import_module(f"jspec.drafts.{self.config.name}")

    def check(self, policy: Policy) -> None:
        """Raise InputError if this draft was made for a policy of another architecture or vocabulary."""
        difference = unlike(self.config.policy, policy.config)
        if difference:
            raise InputError(f"this {self.config.name} draft was made for another policy: {difference}; "
                             f"make one with jspec.drafts.{self.config.name}(policy, ...)")


@struct.dataclass
class Prefill:
    """What the policy computed over P prompts: trunk [P, L, ...], tokens int32 [P, L], lengths int32 [P]."""

    trunk: Trunk
    tokens: jax.Array
    lengths: jax.Array


@struct.dataclass
class Committed:
    """Every row's tokens so far, prompt included: tokens int32 [N, S], garbage from lengths int32 [N] on."""

    tokens: jax.Array
    lengths: jax.Array


@struct.dataclass
class Proposal:
    """What is drafted, for the rule to judge.

    Attributes:
      tokens: int32 [N, K], ids of the policy's vocabulary.
      log_q: float32 [N, K, Vd], the normalised log-probabilities that they were drawn from; None: deterministic.
      vocab: int32 [Vd], the ids of a reduced vocabulary, outside of which q is 0; None: Vd is the policy's.
    """

    tokens: jax.Array
    log_q: jax.Array | None = None
    vocab: jax.Array | None = None


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
class Sampler:
    """The rule's noise and the sampling that a drafter draws with; a drafter never makes noise of its own.

    Attributes:
      noise: of this cycle.
      temperature: float32 [N]. top_p: float32 [N] or None. top_k, k: static.
    """

    noise: RejectionNoise | CoupledNoise
    temperature: jax.Array
    top_p: jax.Array | None
    top_k: int = struct.field(pytree_node=False)
    k: int = struct.field(pytree_node=False)

    def draw(self, logits: jax.Array, offset: int, vocab: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Draw draft token `offset`, int32 [N], from logits [N, Vd]; returns it with the log q it was drawn from.

        vocab: int32 [Vd], the ids of a reduced vocabulary; None: they are 0..Vd-1.
        """
        log_q = process_logits(logits, self.temperature, self.top_p, top_k=self.top_k)
        return draw(log_q, self.noise, offset, vocab), log_q
