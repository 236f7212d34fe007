"""A draft model: a smaller policy with the same tokenizer, one pass for each drafted token
(https://arxiv.org/abs/2211.17192).

It reads nothing but the committed tokens, and keeps keys and values of its own in the blocks that
the policy's cache has for the same rows. `seen` says how many positions at the front of a row they
are right for. A cycle drafts K tokens in K passes, none of which reads the last draft; so where all
of them were accepted, two committed tokens are missing in the next cycle, else one. The first pass
of a cycle therefore takes two: the missing ones, or the one and a position that the second pass
writes again. After cycles that drafted nothing more is missing, and is caught up with in passes of
K + 1 tokens: to keep up would cost a pass a token.

Its vocabulary may be padded otherwise than the policy's: ids that the policy has no token for, and
those beyond the model's own, are never drafted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jspec.arguments import instance, nearest, wrong
from jspec.drafts.base import (
    Committed,
    Draft,
    DraftBatch,
    Drafter,
    DraftState,
    Metrics,
    Observation,
    Prefill,
    Proposal,
    Sampler,
    model_config,
)
from jspec.drafts.parts.losses import loss_over_depths
from jspec.errors import InputError
from jspec.kernels import whole_vocabulary
from jspec.model import (
    Cache,
    KeyValues,
    ModelConfig,
    Policy,
    check_policy,
    init_weights,
    logits,
    param_specs,
    place_on_mesh,
    to_rollout,
    train_forward,
    verify,
)
from jspec.model import prefill as prefill_prompts
from jspec.model.forward import without_tokenless
from jspec.sharding import agreed, constrain

CATCH_UP = "catch_up"
"""The `jax.named_scope` of the passes that take no turn where every cycle drafts."""


@dataclasses.dataclass(frozen=True)
class DraftModelConfig:
    """model: what drafts, with heads, widths and layers of its own."""

    policy: ModelConfig
    model: ModelConfig

    def __post_init__(self) -> None:
        instance(ModelConfig, "a jspec.ModelConfig")("draft_model draft: model", self.model)
        last = last_token(self.policy)
        if last >= self.model.vocab_size:
            raise InputError(f"draft_model draft: the policy has a token of id {last}, and the "
                             f"model only {self.model.vocab_size} ids: they do not share a "
                             "tokenizer; take a model of the policy's own family")


def last_token(model: ModelConfig) -> int:
    """The highest id that a policy has a token for."""
    last = model.vocab_size - 1
    for start, stop in reversed(model.tokenless):
        last = start - 1 if start <= last < stop else last
    return last


def init(policy: Policy, key: jax.Array | None = None, *,
         model: Policy | ModelConfig | Mapping[str, Any] | None = None) -> Draft:
    """A draft with a model's weights, float32 masters, on the mesh of `jax.set_mesh` if there is
    one.

    Args:
      key: of a model drawn at random.
      model: a policy in the training layout, which must share the policy's tokenizer and whose
        weights are copied; or one to be drawn at random, as its ModelConfig or as those fields of
        it in which it differs from the policy's. None: the policy's with a quarter of the layers.

    Raises InputError for fields that no ModelConfig has, a model in a rollout layout or with
    adapters, a vocabulary that lacks tokens of the policy's, neither model nor key, and where the
    mesh does not divide the model.
    """
    if isinstance(model, Policy):
        check_policy("the model of a draft_model draft", model, stacked=True)
        if model.lora is not None:
            raise InputError("draft_model draft: the model has adapters; export it, and load what "
                             "was written")
        made = DraftModelConfig(policy.config, model.config)
        # copies: training donates a draft's buffers
        copy = place_on_mesh(lambda weights: jax.tree.map(lambda x: x + 0, weights), specs(made),
                             made.model)
        return of_weights(made, copy(model.weights))
    made = DraftModelConfig(policy.config, _model_config(policy.config, model))
    if key is None:
        raise InputError("draft_model draft: it drafts with a model, and none is given; give one, "
                         "model=jspec.load(NAME) (draft.path=NAME of a config), or a seed or a key "
                         "for one that is drawn at random")

    def fresh(key: jax.Array) -> dict:
        return init_weights(specs(made), key, made.model.initializer_range)

    return of_weights(made, place_on_mesh(fresh, specs(made), made.model)(key))


def of_weights(config: DraftModelConfig, weights: Any) -> Draft:
    """The draft with a model's weights as they are, in the training layout."""
    return Draft(weights=weights, state={}, config=config, drafter=draft_model)


def _model_config(policy: ModelConfig,
                  given: ModelConfig | Mapping[str, Any] | None) -> ModelConfig:
    if isinstance(given, ModelConfig):
        return given
    if given is None:
        given = {"num_layers": max(1, policy.num_layers // 4)}
    if not isinstance(given, Mapping):
        raise wrong("draft_model draft: model", given,
                    "a policy, a ModelConfig, or fields of one, such as {'num_layers': 2}")
    fields = dataclasses.asdict(policy)
    for name in given:
        if name not in fields:
            raise InputError(f"draft_model draft: a model has no {name!r}"
                             f"{nearest(str(name), fields)}; it has {', '.join(fields)}")
    try:
        return model_config(fields | dict(given))
    except (TypeError, ValueError) as error:
        raise InputError(f"draft_model draft: model: {error}") from None


def specs(config: DraftModelConfig) -> dict:
    """The model's parameters, in the training layout."""
    return param_specs(config.model)


def model(config: DraftModelConfig) -> ModelConfig:
    return config.model


def _model(policy: Policy, draft: Draft, layout: str) -> Policy:
    """The model as a policy that is computed as the policy is. Which ids are drafted is asked of
    the policy alone."""
    return Policy(draft.weights, dataclasses.replace(draft.config.model, tokenless=()),
                  policy.dtype, layout, policy.kernels)


def prepare(policy: Policy, draft: Draft) -> Draft:
    """The model in the policy's rollout layout, split as its own heads and widths are."""
    return draft.replace(weights=to_rollout(_model(policy, draft, "train"), policy.layout).weights)


def _logits(policy: Policy, small: Policy, hidden: jax.Array) -> jax.Array:
    """The model's logits float32 [..., V] over the policy's vocabulary, of hidden [..., D]."""
    out, size = logits(small, hidden), policy.config.vocab_size
    if out.shape[-1] != size:  # parts of another size: XLA would pass their edges around
        out = whole_vocabulary(small.layout, out)
        missing = [(0, 0)] * (out.ndim - 1) + [(0, max(0, size - out.shape[-1]))]
        out = jnp.pad(out[..., :size], missing, constant_values=-jnp.inf)
        out = whole_vocabulary(small.layout, out)
        out = constrain(out, small.layout, "batch", *(None,) * (out.ndim - 2), "vocab")
    return without_tokenless(policy.config, out)


def start(policy: Policy, draft: Draft, prefill: Prefill) -> tuple[dict, KeyValues]:
    """The model's keys and values over the prompts, all of which it has seen."""
    small = _model(policy, draft, policy.layout)
    return {"seen": prefill.lengths}, prefill_prompts(small, prefill.tokens)[1]


def _pass(small: Policy, cache: Cache, tokens: jax.Array, first: jax.Array,
          count: int) -> tuple[jax.Array, Cache]:
    """The model's states [B, count, D] over as many of a row's tokens [B, S] from position `first`
    int32 [B] on; their keys and values are written."""
    at = first[:, None] + jnp.arange(count)
    trunk, cache = verify(small, jnp.take_along_axis(tokens, at, axis=1, mode="clip"), cache, first)
    return trunk.hidden, cache


def _caught_up(small: Policy, cache: Cache, seen: jax.Array, committed: Committed,
               width: int) -> tuple[Cache, jax.Array]:
    """(cache, seen) where no live row lacks more than two of its committed tokens. A pass begins at
    a row's last token at the latest: `width` positions from there are the row's own."""
    live = cache.table[:, 0] < cache.blocks

    def goes_on(seen: jax.Array) -> jax.Array:
        return agreed(jnp.any(live & (seen < committed.lengths - 2)))

    def turn(carry: tuple[Cache, jax.Array, jax.Array]) -> tuple[Cache, jax.Array, jax.Array]:
        cache, seen, _ = carry
        first = jnp.minimum(seen, committed.lengths - 1)
        _, cache = _pass(small, cache, committed.tokens, first, width)
        seen = jnp.minimum(first + width, committed.lengths)
        return cache, seen, goes_on(seen)

    with jax.named_scope(CATCH_UP):
        cache, seen, _ = jax.lax.while_loop(lambda carry: carry[2], turn,
                                            (cache, seen, goes_on(seen)))
    return cache, seen


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """K sampled tokens with the distributions they were drawn from, each by one pass."""
    small, lengths = _model(policy, draft, policy.layout), committed.lengths
    cache, seen = _caught_up(small, state.cache, state.rows["seen"], committed, sampler.k + 1)
    # never before what is missing: the block before it may be shared with siblings
    first = jnp.minimum(seen, lengths - 1)
    hidden, cache = _pass(small, cache, committed.tokens, first, 2)
    hidden = jnp.take_along_axis(hidden, (lengths - 1 - first)[:, None, None], axis=1, mode="clip")
    tokens, log_qs = [], []
    for j in range(sampler.k):
        if j:
            trunk, cache = verify(small, tokens[-1][:, None], cache, lengths - 1 + j)
            hidden = trunk.hidden
        token, log_q = sampler.draw(_logits(policy, small, hidden[:, 0]), j)
        tokens.append(token)
        log_qs.append(log_q)
    proposal = Proposal(jnp.stack(tokens, axis=1), jnp.stack(log_qs, axis=1))
    return proposal, DraftState({"seen": seen}, cache)


def observe(policy: Policy, draft: Draft, state: DraftState,
            observation: Observation) -> DraftState:
    """How much is right now. Of a cycle that drafted nothing nothing was seen."""
    k = observation.tokens.shape[1] - 1
    if k == 0:
        return state
    # the pending token, and all drafts but the last; what was committed last is no draft
    right = observation.lengths + jnp.minimum(observation.count, k) - 1
    return state.replace(rows={"seen": jnp.where(observation.count > 0, right,
                                                 state.rows["seen"])})


def loss(policy: Policy, draft: Draft, batch: DraftBatch,
         kind: str) -> tuple[jax.Array, jax.Array, Metrics]:
    """`parts.losses.loss_over_depths` of one depth: a draft model drafts every token alike.

    policy: any layout; only its output head is read. Detach it before the call. draft: unprepared,
    float32 masters. kind: one of `choices.DRAFT_LOSSES`; "states" is "kl", as states of different
    widths have no distance.
    """
    small = _model(policy, draft, "train")
    hidden = train_forward(small, batch.tokens, remat="full").hidden
    return loss_over_depths(policy, batch, [batch.predicting(hidden)],
                            lambda states: _logits(policy, small, states), None,
                            "kl" if kind == "states" else kind)


draft_model = Drafter("draft_model", DraftModelConfig, init, propose, specs=specs, prepare=prepare,
                      start=start, observe=observe, loss=loss, model=model)
