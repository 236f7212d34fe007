"""From a configuration to what a run starts from: checks, tokenizer, policy, reference, draft,
sampling."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jspec.base_model import BaseModel, with_tokenizer
from jspec.checkpoint import has_checkpoints
from jspec.choices import MIXED
from jspec.config import Config
from jspec.draft_config import DraftTrainingConfig
from jspec.drafts import Draft, Drafter, constructor, find
from jspec.errors import InputError
from jspec.heads import load_draft
from jspec.heads.models import NAME as DRAFT_MODEL
from jspec.heads.models import check_tokens, open_model
from jspec.learning_sections import DataSection
from jspec.loggers import check_installed
from jspec.model import Lora, ModelConfig, Policy, abstract_policy
from jspec.model.lora import full_rank, with_adapters
from jspec.purposes import DRAFT_KEY, LORA_KEY, purpose_key
from jspec.reward_parts import grading
from jspec.rl.prompts import PromptData
from jspec.rl.rewards import answer_check, check_columns, check_reward
from jspec.rl.state import TrainState, init_state, state_specs
from jspec.rl.update_settings import UpdateSettings
from jspec.sharding import batch_shards, check_mesh, check_rows
from jspec.source_parts import source_parts
from jspec.speculate import Batching, Sampling, Speculation
from jspec.speculate.arguments import check_batching, check_groups, check_stops
from jspec.speculate.schedule import MOST
from jspec.speculate.types import Schedule

AnyConfig = Config | DraftTrainingConfig
WITH_MODEL = (DRAFT_MODEL, MIXED)
"""Drafters whose draft at `draft.path` may be a model, with a tokenizer of its own."""


def check(config: Config, mesh: Mesh, base: BaseModel) -> None:
    """Raise InputError for what would fail later, without loading any weights."""
    check_installed(config.logging.loggers)
    check_rewards(config, config.data)
    # a draft model has to have the policy's tokens, and which those are the tokenizer says
    check_sizes(config, mesh, (base.shape if config.draft.name in WITH_MODEL else base).config)
    check_tokenizer(config, base.config, base.tokenizer)
    if not config.checkpoint.resume and has_checkpoints(config.output_dir):
        raise InputError(f"{config.output_dir} has checkpoints and checkpoint.resume is false; "
                         "choose another output_dir, or checkpoint.resume=true to go on from them")


def check_rewards(config: Config, data: DataSection) -> None:
    """Raise InputError for rewards that cannot work, or not of one of these sources."""
    for part in source_parts(data):
        check_reward(grading(config.reward.function, part.name), part.source,
                     config.sampling.max_new_tokens)


def make_prompts(config: Config, tokenizer: Any, data: DataSection | None = None,
                 **how: Any) -> PromptData:
    """The prompts that a run's rewards are to grade: those that it trains on, or of another
    section. how: further arguments of `PromptData`. Raises InputError as that does, and for prompts
    that do not say what a reward demands."""
    function = config.reward.function
    made = PromptData(data or config.data, tokenizer, **{"seed": config.seed} | how,
                      answer_check=lambda part: answer_check(grading(function, part.name),
                                                             part.source))
    for part, record in made.firsts():
        check_columns(grading(function, part.name), part.label, record)
    return made


def check_sizes(config: Config, mesh: Mesh, model: ModelConfig) -> None:
    """Raise InputError for settings that do not go together, or not with the mesh or the model."""
    check_unbiased(config)
    rows, layout = config.data.prompts_per_step * config.data.group_size, "train"
    check_rows(rows, mesh, layout)
    if config.grpo.mini_batches > 1:
        check_rows(rows // config.grpo.mini_batches, mesh, layout, "grpo.mini_batches")
    if config.grpo.micro_batch:
        check_rows(config.grpo.micro_batch, mesh, layout, "grpo.micro_batch")
    shards, data = batch_shards(rollout_layout(config), mesh), config.data
    if (groups := step_batching(config).groups) is not None:
        check_groups("data.over_sampling: data.prompts_per_step", groups, data.prompts_drawn,
                     shards)
    k = 0 if config.draft.name == "none" else make_speculation(config, MOST).most
    check_batching("rollout.", make_batching(config), shards, data.prompts_drawn * data.group_size,
                   data.group_size, data.max_prompt_tokens, config.sampling.max_new_tokens, k)
    check_mesh(model, mesh)
    check_stops(model, make_sampling(config))
    draft = check_draft(config, model)
    if config.draft.train is True and draft is not None and draft.drafter.loss is None:
        raise InputError(f"draft.train=true: {draft.name} has no weights to train; leave it out")
    check_lora(config, model)
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    if longest > model.max_position_embeddings:
        raise InputError(f"data.max_prompt_tokens + sampling.max_new_tokens = {longest} is more "
                         f"than the model's {model.max_position_embeddings} positions; lower one "
                         "of them")
    if k >= model.max_position_embeddings:
        raise InputError(f"speculation.k = {k} must be below the model's "
                         f"{model.max_position_embeddings} positions")


def check_lora(config: Config, model: ModelConfig) -> None:
    """Raise InputError for adapters that are more than what they are added to."""
    lora = make_lora(config)
    if lora is not None and lora.rank > (most := full_rank(model, lora)):
        raise InputError(f"lora.rank={lora.rank} is above {most}, the highest rank that a matrix "
                         "with adapters has: they would be larger than what they are added to; "
                         "lower it, or leave lora.rank out, which trains all weights")


def check_unbiased(config: Config) -> None:
    """Raise InputError if answers are not drawn from the distribution that the update takes them to
    be drawn from, the policy's own at a temperature above 0, and the configuration does not say
    that this is known."""
    sampling = config.sampling
    whole = not config.grpo.truncated_ratio
    cuts = {"top_k": whole and sampling.top_k > 0, "top_p": whole and sampling.top_p < 1,
            "min_p": whole and sampling.min_p > 0,
            "min_new_tokens": sampling.min_new_tokens > 0, "temperature": sampling.temperature == 0}
    named = [f"sampling.{name}={str(getattr(sampling, name)).removesuffix('.0')}"
             for name, holds in cuts.items() if holds]
    if named and not config.grpo.biased_sampling:
        raise InputError(f"{', '.join(named)}: answers would be drawn from another distribution "
                         "than the one whose gradient the update takes, which biases it; leave "
                         "that out" + " or grpo.truncated_ratio as it is" * whole
                         + ", or say grpo.biased_sampling=true")


def ends(config: Config, policy: ModelConfig, tokenizer: Any) -> str:
    """In words what ends an answer in a run, and how many ids have no token."""
    stops = (policy.stop_tokens if config.sampling.stop_tokens is None
             else config.sampling.stop_tokens)
    names = [token or str(i)
             for token, i in zip(tokenizer.convert_ids_to_tokens(list(stops)), stops, strict=True)]
    lacking = sum(stop - start for start, stop in policy.tokenless)
    return ((f"answers end with {', '.join(names)}" if names else "nothing but the cap ends an "
             "answer") + (f", {lacking} ids without a token are never sampled" if lacking else ""))


def needs_reference(config: Config) -> bool:
    """Whether a run keeps a copy of its first policy."""
    grpo = config.grpo
    return bool(grpo.kl_weight) and not config.lora.rank and not grpo.kl_reference_every


def make_lora(config: Config) -> Lora | None:
    """The adapters that a configuration asks for."""
    return Lora(**dataclasses.asdict(config.lora)) if config.lora.rank else None


def make_reference(config: Config, policy: Policy) -> Policy | None:
    """A frozen copy of the first policy, or of its shape, in its compute dtype, if the objective
    has a KL term. Beside adapters there is none: the base that they are added to is that."""
    if not needs_reference(config):
        return None
    if isinstance(policy.weights["embed"], jax.ShapeDtypeStruct):
        return policy.replace(weights=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, policy.dtype, sharding=x.sharding),
            policy.weights))
    # `+ 0` makes a buffer of its own: the policy's is donated
    copy = jax.jit(lambda weights: jax.tree.map(lambda x: (x + 0).astype(policy.dtype), weights),
                   out_shardings=jax.tree.map(lambda x: x.sharding, policy.weights))
    return policy.replace(weights=copy(policy.weights))


def make_draft(config: AnyConfig, policy: Policy) -> Draft | None:
    """The draft before the first step: fresh, or from `draft.path`. Raises InputError if it does
    not fit the policy."""
    section = config.draft
    if section.name == "none":
        return None
    drafter = named_drafter(config)
    if section.path is not None:
        draft = load_draft(policy, section.path, drafter,
                           make_tokenizer(config) if drafter.name in WITH_MODEL else None)
        return around(policy, draft, drafter, section.options or {}, "draft.options",
                      f"draft.path={section.path}")
    key = purpose_key(config.seed, DRAFT_KEY)
    return fresh_draft(policy, key, drafter, section.options or {}, "draft.options")


def named_drafter(config: AnyConfig) -> Drafter:
    """The drafter that `draft.name` names; a user's own file is run. Raises InputError where there
    is none."""
    return find(config.draft.name, f"draft.name={config.draft.name!r}")


def check_draft(config: AnyConfig, model: ModelConfig) -> Draft | None:
    """The draft before the first step with `jax.ShapeDtypeStruct`s for weights that nobody has
    trained. Raises InputError for options that a fresh draft refuses, or a trained one that is not
    there or does not fit."""
    section, shape = config.draft, abstract_policy(model)
    if section.name == "none":
        return None
    if section.path is not None and section.name != DRAFT_MODEL:
        return make_draft(config, shape)
    return check_fresh_draft(shape, named_drafter(config), fresh_options(config), "draft.options")


def fresh_options(config: AnyConfig) -> dict[str, Any]:
    """With what options a fresh draft has the shape of the configuration's; of a draft model at
    `draft.path` no weights are read for this."""
    section = config.draft
    if section.name == DRAFT_MODEL and section.path is not None:
        return {"model": open_model(section.path).config}
    return dict(section.options or {})


def check_tokenizer(config: AnyConfig, model: ModelConfig, tokenizer: Any) -> None:
    """Raise InputError if a draft model has another tokenizer than the policy, whose shape and
    tokenizer are given."""
    if config.draft.name == DRAFT_MODEL and config.draft.path is not None:
        check_tokens(open_model(config.draft.path), model, tokenizer)


def make_state(config: Config, policy: Policy) -> TrainState:
    """A run's state before the first step, whose policy is given."""
    draft, lora = make_draft(config, policy), make_lora(config)
    if lora is not None:
        policy = with_adapters(policy, lora, purpose_key(config.seed, LORA_KEY))
    return init_state(policy, draft, UpdateSettings.of(config), config.seed)


def make_state_specs(config: Config, shape: Policy) -> TrainState:
    """A run's state as `jax.ShapeDtypeStruct`s, each with its sharding: what it is restored to,
    compiled for and what a checkpoint has to have room for, before any weights are read. shape: see
    `BaseModel.shape`."""
    return state_specs(shape.replace(lora=make_lora(config)), check_draft(config, shape.config),
                       UpdateSettings.of(config))


def fresh_draft(policy: Policy, key: jax.Array | None, drafter: Drafter, options: Mapping[str, Any],
                label: str) -> Draft:
    """A draft with weights that nobody trained. Raises InputError, which begins with `label`, for
    options that its drafter does not have or refuses."""
    _, _, *known = inspect.signature(drafter.init).parameters  # after policy and key
    for option in options.keys() - set(known):
        raise InputError(f"{label}.{option}: {drafter.name} has no such option, but "
                         f"{', '.join(known) or 'none at all'}; remove it")
    try:
        return constructor(drafter)(policy, key, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"{label}: {error}") from error


def around(policy: Policy, draft: Draft, drafter: Drafter, options: Mapping[str, Any], label: str,
           place: str) -> Draft:
    """A trained draft as it is; where `drafter` is `mixed` and it is not, a mixed one of it, with
    these options. Raises InputError, which begins with `label`, for those that it refuses, and for
    options of one that has its own; with `place`, where it was found, for one of another kind."""
    if drafter.name == MIXED and draft.name != MIXED:
        if (named := options.get("draft", draft.name)) != draft.name:
            raise InputError(f"{label}: draft = {named!r}, and the one that is there is a "
                             f"{draft.name} draft; leave it out")
        return fresh_draft(policy, None, drafter, {**options, "draft": draft}, label)
    if draft.name != drafter.name:
        raise InputError(f"{place} holds a draft of the kind {draft.name}, and {drafter.name} was "
                         f"asked for; ask for {draft.name}")
    if options:
        raise InputError(f"{label} are a fresh draft's, and the one that is there has its own; "
                         "leave them out")
    return draft


def check_fresh_draft(shape: Policy, drafter: Drafter, options: Mapping[str, Any],
                      label: str) -> Draft:
    """`fresh_draft` without computing anything: the draft with `jax.ShapeDtypeStruct`s. Raises as
    that does."""
    return jax.eval_shape(lambda policy: fresh_draft(policy, purpose_key(0, DRAFT_KEY), drafter,
                                                     options, label), shape)


def make_tokenizer(config: AnyConfig) -> Any:
    """The tokenizer as the configuration has it, for one who wants nothing else of its model."""
    return BaseModel.of(config).tokenizer


def make_policy(config: AnyConfig, tokenizer: Any) -> Policy:
    """The policy before the first step, with this tokenizer's ids and ends. Raises as
    `BaseModel.policy` does."""
    return with_tokenizer(BaseModel.of(config).policy(), tokenizer)


def make_sampling(config: AnyConfig) -> Sampling:
    """`Sampling` as the configuration has it."""
    return Sampling(**dataclasses.asdict(config.sampling))


def rollout_layout(config: AnyConfig) -> str:
    """The row of `jspec.sharding.LAYOUTS` that rollouts are placed by."""
    return "rollout_wide" if config.mesh.rollout_tensor == "fsdp_tensor" else "rollout"


def make_batching(config: Config) -> Batching:
    """`Batching` as the configuration has it, of a rollout that answers every prompt."""
    return Batching(**dataclasses.asdict(config.rollout))


def step_batching(config: Config) -> Batching:
    """`Batching` of a step's rollouts, which may end early."""
    data = config.data
    return make_batching(config).replace(
        groups=data.prompts_per_step if data.prompts_drawn > data.prompts_per_step else None)


def make_speculation(config: Config, chosen: int | Schedule = 0) -> Speculation:
    """`Speculation` as the configuration has it. chosen: what is drafted where it says auto."""
    fields = dataclasses.asdict(config.speculation)
    return Speculation(**fields | {"k": chosen if fields["k"] == "auto" else fields["k"]})
