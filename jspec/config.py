"""What can be set of a run (`Config`), as frozen dataclasses; of `jspec draft train` it is in
`jspec.draft_config`.

Every field carries its meaning and its bounds, so that `jspec train --help` can print the one and
reading can check the other; `jspec.settings` does both. What depends on more than one field is
a configuration's `check`.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jspec import settings
from jspec.choices import LOG_LEVELS, MIXED, OBJECTIVES, SEED_HIGH, UNCLIPPED
from jspec.errors import InputError
from jspec.learning_sections import (
    DataSection,
    EvaluationSection,
    GrpoSection,
    LoraSection,
    RewardSection,
)
from jspec.optimizer_sections import check_optimizer, check_schedule
from jspec.reward_parts import reward_parts
from jspec.sections import (
    CheckpointSection,
    DraftSection,
    LoggingSection,
    MeshSection,
    ProfileSection,
    RolloutSection,
    SamplingSection,
    SpeculationSection,
    TrainedModelSection,
)
from jspec.settings import Override, setting
from jspec.source_parts import evaluated, source_parts


@dataclasses.dataclass(frozen=True)
class Config:
    """One run of `jspec train`."""

    seed: int = setting(0, "of everything drawn: fresh weights, prompts' order, sampling noise",
                        low=0, high=SEED_HIGH)
    steps: int = setting(6, "GRPO steps in all, those before a resume included", low=1, often=True)
    output_dir: str = setting("runs/quickstart", "metrics, checkpoints and traces; the same one "
                              "again resumes", filled=True, path=True, often=True)
    log_level: str = setting("info", "how much is told", choices=LOG_LEVELS)
    model: TrainedModelSection = TrainedModelSection()
    draft: DraftSection = DraftSection()
    speculation: SpeculationSection = SpeculationSection()
    rollout: RolloutSection = RolloutSection()
    sampling: SamplingSection = SamplingSection()
    data: DataSection = DataSection()
    reward: RewardSection = RewardSection()
    evaluation: EvaluationSection = EvaluationSection()
    grpo: GrpoSection = GrpoSection()
    lora: LoraSection = LoraSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    profile: ProfileSection = ProfileSection()

    def chosen(self) -> "Config":
        """This, with what it leaves to its objective or drafter said."""
        advantage, aggregation = self.grpo.chosen()
        return dataclasses.replace(
            self, draft=dataclasses.replace(self.draft, train=self.draft.trains),
            grpo=dataclasses.replace(self.grpo, advantage=advantage, aggregation=aggregation))

    def check(self) -> None:
        """Raise InputError for what no field can know by itself."""
        check_shared(self)
        source_parts(self.data)
        check_reward_sources(self)
        check_evaluation(self)
        check_grpo(self)
        check_optimizers(self)
        data, k = self.data, self.speculation.k
        demand(data.curriculum or data.curriculum_rest == DataSection().curriculum_rest,
               "data.curriculum_rest is of a curriculum, and there is none: set "
               "data.curriculum=true, or leave it out")
        demand(data.group_size > 1, f"data.group_size must be at least 2, not {data.group_size}: "
               "an answer's advantage is measured against the others of its group")
        if isinstance(k, tuple):
            pairs = [pair for pair in k if len(pair) == 2 and pair[0] >= 1 and 0 <= pair[1] <= 64]
            demand(0 < len(k) == len(pairs) == len({rows for rows, _ in pairs}),
                   f"speculation.k={[list(pair) for pair in k]} is no schedule: pairs of [rows, "
                   "k], with k from 0 to 64 and no number of rows twice, such as [[4, 7], [16, "
                   "3]]")


def load_config(path: str | Path | None = None, overrides: Sequence[Override] = (),
                kind: type = Config) -> Any:
    """`settings.read` as a `kind`, then what its fields demand of each other (its `check`). Raises
    InputError."""
    config = settings.read(kind, path, overrides)
    config.check()
    return config


def demand(holds: bool, message: str) -> None:
    if not holds:
        raise InputError(message)


def check_grpo(config: Config) -> None:
    """What the objective's settings demand of each other and of the data's."""
    data, grpo = config.data, config.grpo
    demand(data.prompts_per_step % grpo.mini_batches == 0,
           f"grpo.mini_batches ({grpo.mini_batches}) are of whole prompts, so it must divide "
           f"data.prompts_per_step = {data.prompts_per_step}")
    rows = data.prompts_per_step // grpo.mini_batches * data.group_size
    parts = f" / grpo.mini_batches {grpo.mini_batches}" if grpo.mini_batches > 1 else ""
    demand(not grpo.micro_batch or rows % grpo.micro_batch == 0,
           f"grpo.micro_batch ({grpo.micro_batch}) must divide the rows of a step, "
           f"data.prompts_per_step x data.group_size{parts} = {rows}")
    longest = config.sampling.max_new_tokens
    demand(all(width <= longest for width in grpo.widths),
           f"grpo.widths is {list(grpo.widths)}, and no answer is longer than "
           f"sampling.max_new_tokens = {longest}: leave out what is above it")
    _, aggregation = grpo.chosen()
    demand(grpo.constant_length is None or aggregation == "constant_length",
           "grpo.constant_length is what grpo.aggregation=constant_length divides by, and "
           f"grpo.aggregation is {aggregation}; leave it out")
    demand(len(grpo.sapo_tau) == 2, f"grpo.sapo_tau is {list(grpo.sapo_tau)}: two numbers, for "
           "advantages above 0 and for the others")
    for key in ("correction_low", "correction_high"):
        demand(grpo.correction != "none" or getattr(grpo, key) is None, f"grpo.{key} bounds the "
               "weights of a correction, and there is none: set grpo.correction, or leave it out")
    for key, off in (("kl_in_reward", "false"), ("kl_reference_every", "0")):
        demand(not getattr(grpo, key) or grpo.kl_weight > 0, f"grpo.{key} is of the KL to a "
               f"reference, and there is none: set grpo.kl_weight above 0, or grpo.{key}={off}")
    demand(not grpo.mask_truncated or config.sampling.stop_tokens != (),
           "grpo.mask_truncated leaves answers that reach the cap out of the loss, and with "
           "sampling.stop_tokens=[] all do; name some, or set grpo.mask_truncated=false")
    demand(grpo.dual_clip is None or grpo.objective not in UNCLIPPED, "grpo.dual_clip bounds a "
           f"clipped loss, and grpo.objective={grpo.objective} is none; leave it out")
    tau = GrpoSection().sapo_tau
    demand(grpo.sapo_tau == tau or grpo.objective == "sapo" or grpo.objective not in OBJECTIVES,
           f"grpo.sapo_tau is of grpo.objective=sapo, and that is {grpo.objective}; leave it out")
    lora, unset = config.lora, LoraSection()
    for key in ("alpha", "targets", "base_dtype"):
        demand(bool(lora.rank) or getattr(lora, key) == getattr(unset, key), f"lora.{key} is of "
               "adapters, and there are none: set lora.rank above 0, or leave it out")
    demand(grpo.kl_reference_mix == 1 or grpo.kl_reference_every > 0,
           "grpo.kl_reference_mix says how far the reference moves, and it never does: set "
           "grpo.kl_reference_every, or leave it out")


def check_optimizers(config: Config) -> None:
    """What optimizers and schedules demand."""
    for name, section in (("grpo", config.grpo), ("draft", config.draft)):
        check_optimizer(name, section)
        check_schedule(name, section, config.steps)
    demand(config.grpo.optimizer != "muon" or not config.lora.rank, "grpo.optimizer=muon is of "
           "whole matrices, and lora.rank trains adapters of them; choose another optimizer")


def check_shared(config: Any) -> None:
    """What no field can know by itself, of sections that both kinds of configuration have."""
    sampling, model = config.sampling, config.model
    demand(sampling.min_new_tokens <= sampling.max_new_tokens,
           f"sampling.min_new_tokens ({sampling.min_new_tokens}) is above "
           f"sampling.max_new_tokens ({sampling.max_new_tokens})")
    demand((model.name == "random") == (model.architecture is not None),
           f"model.name is '{model.name}' and model.architecture is "
           f"{'not ' if model.architecture is None else ''}set: an architecture goes with the "
           "name 'random', which needs one")
    demand(model.name != "random" or model.tokenizer is not None,
           "model.name 'random' needs model.tokenizer, such as 'chars:0123456789+=' or a model's "
           "name")
    demand(config.draft.path is None or not config.draft.options or config.draft.name == MIXED,
           f"draft.options are a fresh draft's, and the one at draft.path={config.draft.path} has "
           "its own; set draft.options=null")
    demand(config.draft.name != "draft_model" or config.draft.path is not None
           or "model" in (config.draft.options or {}),
           "draft.name=draft_model drafts with a model, and none is named; set draft.path to one, "
           "any that model.name may be, or a run")
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.expert, config.mesh.tensor)
    demand(0 not in axes and axes.count(-1) <= 1,
           f"mesh.data, mesh.fsdp, mesh.expert and mesh.tensor are {axes}: each at least 1, and "
           "one of them at most may be -1")


def check_reward_sources(config: Config) -> None:
    """What rewards say of sources."""
    known = [name for source in (config.data.source, config.evaluation.sources)
             if isinstance(source, dict) for name in source]
    for part in reward_parts(config.reward.function):
        for name in part.sources or ():
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            demand(name in known, f"{part.key}.sources has {name!r}, and data.source names "
                   f"{', '.join(map(repr, known)) or 'none'}{hint}")


def check_evaluation(config: Config) -> None:
    """What no field can know by itself, of evaluations and of the best checkpoint by one."""
    section, best = config.evaluation, config.checkpoint.best
    most = max(section.ks)
    demand(most <= section.samples,
           f"evaluation.at has {most}, and {section.samples} answers to a prompt have no "
           f"pass@{most}: raise evaluation.samples={section.samples}, or leave {most} out")
    demand(not section.every or bool(section.sources) or config.data.held_out > 0,
           f"evaluation.every={section.every} needs prompts that training does not draw: set "
           "data.held_out or evaluation.sources")
    sources = list(section.sources)
    demand(len(set(section.labels)) == len(sources),
           f"evaluation.sources names {max(sources, key=sources.count, default='')} twice")
    metrics = section.metrics(evaluated(config.data, section))
    longest = section.max_new_tokens
    demand(longest is None or longest >= config.sampling.min_new_tokens,
           f"evaluation.max_new_tokens ({longest}) is below sampling.min_new_tokens "
           f"({config.sampling.min_new_tokens})")
    if best is not None and best.startswith("eval/"):
        demand(section.every > 0, f"checkpoint.best={best} is a metric of evaluations, and there "
               "are none: set evaluation.every")
        near = difflib.get_close_matches(best, metrics, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        demand(best in metrics, f"checkpoint.best={best} is no metric of this "
               f"evaluation{hint} (there are {', '.join(metrics)})")
