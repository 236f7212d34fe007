"""What can be set of `jspec draft train` (`DraftTrainingConfig`); of a run, `jspec.config`."""

import dataclasses

from jspec.choices import LOG_LEVELS, RULES, SEED_HIGH
from jspec.config import check_shared, demand
from jspec.optimizer_sections import check_optimizer
from jspec.sections import DraftLearningSection, MeshSection, ModelSection, SamplingSection
from jspec.settings import setting


@dataclasses.dataclass(frozen=True)
class SamplesSection:
    """The policy's own answers, which a draft learns from."""

    sources: tuple[str, ...] = setting(("self", "arithmetic"), "where prompts come from, taken in "
                                       "turn: 'self' (instructions that the policy writes itself), "
                                       "and whatever data.source may be; one that is named twice "
                                       "has two turns", filled=True, path=True)
    count: int = setting(4096, "answers in all, one to a prompt; each file of them is filled up "
                         "with its own prompts again", low=1, often=True)
    batch: int = setting(32, "answers decoded together; also the rows of one file of samples",
                         low=1)
    temperatures: tuple[float, ...] = setting((), "of one file of samples after the other, in "
                                              "turn; none named: all at sampling.temperature",
                                              low=0)
    max_prompt_tokens: int = setting(256, "longer prompts are left out", low=1)
    system_prompt: str | None = setting(None, "first message of the chat; null: what the chat "
                                        "template does by itself")
    chat_template: bool = setting(True, "wrap prompts in the tokenizer's chat template")


@dataclasses.dataclass(frozen=True)
class TrainingSection:
    """How the draft is trained on the samples."""

    vocab_size: int = setting(0, "tokens that can be drafted, the most frequent of the samples; 0: "
                              "all, or those of the draft at draft.path", low=0)
    state_steps: int = setting(300, "steps on the policy's next states, before distributions are "
                               "compared: cheap", low=0)
    steps: int = setting(1000, "steps on draft.loss", low=1, often=True)
    rows: int = setting(8, "answers of a step", low=1)
    warmup_steps: int = setting(10, "over which the learning rate rises, in either stage; then it "
                                "falls by a cosine", low=0)
    checkpoint_every: int = setting(100, "steps between checkpoints", low=1)


@dataclasses.dataclass(frozen=True)
class ReportSection:
    """Acceptance on prompts that training never saw."""

    prompts: str | None = setting(None, "a .jsonl file of {prompt}; null: prompts of the sources "
                                  "that were left out", path=True)
    count: int = setting(32, "how many of them", low=1)
    k: int = setting(3, "tokens drafted a cycle", low=1, high=64)
    temperatures: tuple[float, ...] = setting((0.0, 1.0), "of the rollouts that are measured",
                                              low=0, filled=True)
    rules: tuple[str, ...] = setting(("rejection", "coupled"), "how drafts are judged in them",
                                     choices=RULES, filled=True)


@dataclasses.dataclass(frozen=True)
class DraftTrainingConfig:
    """One run of `jspec draft train`."""

    seed: int = setting(0, "of everything drawn", low=0, high=SEED_HIGH)
    output_dir: str = setting("runs/draft", "samples, checkpoints, report and the draft; the same "
                              "one again resumes", filled=True, path=True, often=True)
    log_level: str = setting("info", "how much is told", choices=LOG_LEVELS)
    model: ModelSection = ModelSection()
    draft: DraftLearningSection = DraftLearningSection()
    sampling: SamplingSection = SamplingSection()
    samples: SamplesSection = SamplesSection()
    training: TrainingSection = TrainingSection()
    mesh: MeshSection = MeshSection()
    report: ReportSection = ReportSection()

    def check(self) -> None:
        """Raise InputError for what no field can know by itself."""
        check_shared(self)
        check_optimizer("draft", self.draft)
        demand(self.draft.path is None or not self.training.vocab_size,
               "training.vocab_size is a fresh draft's, and the one at "
               f"draft.path={self.draft.path} has its own; set training.vocab_size=0")
        demand(self.sampling.max_new_tokens > 1, "sampling.max_new_tokens must be at least 2, not "
               "1: nothing is drafted after an answer's first token if that is its last")
