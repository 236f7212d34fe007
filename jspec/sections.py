"""Sections of a configuration that say what runs, and where: policy, draft, rollout, mesh,
checkpoints. What a run learns from is in `jspec.learning_sections`."""

import dataclasses
from typing import Literal

from jspec.choices import (
    DRAFT_LOSSES,
    DRAFTERS,
    DTYPES,
    KERNELS,
    LOGGERS,
    MAX_NEW_TOKENS,
    RULES,
    Remat,
)
from jspec.optimizer_sections import OptimizerSection, ScheduleSection, StateMemorySection
from jspec.settings import setting


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The policy."""

    name: str = setting("smollm2-135m-instruct", "short name, hub id, safetensors directory, .gguf "
                        "file, or 'random'", filled=True, path=True, often=True)
    dtype: str = setting("auto", "what is computed in; auto: bfloat16 on accelerators, float32 on "
                         "the CPU", choices=("auto", *DTYPES))
    architecture: dict | None = setting(None, "ModelConfig fields of a policy drawn at random; "
                                        "only with name 'random'")
    tokenizer: str | None = setting(None, "another model's tokenizer, or 'chars:ALPHABET'; null: "
                                    "the model's own", path=True)


@dataclasses.dataclass(frozen=True)
class TrainedModelSection(ModelSection):
    """The policy, and how its gradient is computed."""

    remat: bool | Remat = setting(
        False, "what of a layer's activations the backward pass computes again. none: nothing; "
        "full (true): all, slower and far less memory; dots: all but products of matrices; "
        "dots_no_batch: all but those with weights")


@dataclasses.dataclass(frozen=True)
class DraftKeys:
    """The drafter, and what it learns from."""

    name: str = setting("mtp", "the drafter, or your own", choices=DRAFTERS, file=True, path=True)
    path: str | None = setting(None, "a trained draft to start from: a model whose draft ships "
                               "with jspec, a directory of a published draft, or the output_dir of "
                               "`jspec draft train` or of a run; of draft_model the model, any "
                               "that model.name may be, or a run; null: a fresh one", path=True)
    loss: str = setting("kl", "kl: forward KL from the policy; tv: total variation, 1 - overlap; "
                        "overlap: -log of the overlap, the likelihood of acceptance; ce: "
                        "cross-entropy with the policy's best token, as DFlash is published; "
                        "ce_tv: 0.1 ce + 0.9 tv, as DSpark is", choices=DRAFT_LOSSES)
    options: dict | None = setting({}, "further arguments of a fresh drafter, such as ngram's "
                                   "longest match; null: none, as beside draft.path, whose draft "
                                   "has its own")


@dataclasses.dataclass(frozen=True)
class DraftLearningSection(OptimizerSection, DraftKeys):
    """The drafter, and how it learns."""

    learning_rate: float = setting(1e-3, "the highest that the schedule comes to", low=0)


@dataclasses.dataclass(frozen=True)
class DraftSection(ScheduleSection, StateMemorySection, DraftLearningSection):
    """The drafter that makes rollouts fast; it never changes what they are distributed as."""

    name: str = setting("mtp", "the drafter, or your own; none: plain autoregressive rollouts",
                        choices=(*DRAFTERS, "none"), file=True, path=True, often=True)
    train: bool | Literal["auto"] = setting(
        "auto", "train the draft in the update step; auto: where it has weights, unless it is "
        "a draft model at draft.path, which others have trained")
    every_n_steps: int = setting(1, "train the draft at every n-th step", low=1)
    features: str = setting("update", "whose states of the policy the draft learns from. update: "
                            "the update's own forward; rollout: the verifier's, kept by the "
                            "rollout, so that the draft learns while rewards are computed, once "
                            "a rollout", choices=("update", "rollout"))

    @property
    def trains(self) -> bool:
        """Whether the draft is to be trained."""
        given = self.name == "draft_model" and self.path is not None
        return not given if self.train == "auto" else self.train

    @property
    def elsewhere(self) -> str | None:
        """Where the weights of a draft model lie that is not trained, which no checkpoint has
        a copy of; None: checkpoints have the draft's."""
        return self.path if self.name == "draft_model" and not self.trains else None


@dataclasses.dataclass(frozen=True)
class SpeculationSection:
    """How drafts are judged."""

    k: int | tuple[tuple[int, ...], ...] | Literal["auto"] = setting(
        "auto", "tokens drafted per cycle: a number; a schedule [[4, 7], [16, 3]] (up to 4 live "
        "rows draft 7, up to 16 draft 3, more none); or auto: what promises the most tokens "
        "a second, by what cycles are measured to cost here and by what earlier steps accepted, no "
        "drafts included. draft.name=none turns speculation off", low=1, high=64, often=True)
    rule: str = setting("rejection", "rejection: exact in distribution, each draft judged by "
                        "itself; block: exact in distribution, the drafts judged together, which "
                        "accepts no fewer on average; coupled: token for token what autoregressive "
                        "decoding with the same seed gives", choices=RULES)
    kernels: str = setting("auto", "auto: the chip's own (TPU, Hopper GPU) where they take the "
                           "shapes; reference: plain JAX; pallas: the kernels or an error (a CPU "
                           "interprets them, for checks). Top-k and top-p are always the "
                           "reference's", choices=KERNELS)


@dataclasses.dataclass(frozen=True)
class RolloutSection:
    """How a step's answers share the device while they are generated; it changes nothing of what
    they are."""

    slots: int | None = setting(None, "answers in flight at most, over all devices: one that ends "
                                "makes room for the next; null: all of the step's", low=1)
    kv_tokens: int | None = setting(None, "positions of keys and values on the devices, prompts "
                                    "included: where they do not suffice the answers begun last "
                                    "wait in host memory; null: what the slots need at worst",
                                    low=1)


@dataclasses.dataclass(frozen=True)
class SamplingSection:
    """What the policy is sampled with."""

    max_new_tokens: int = setting(MAX_NEW_TOKENS, "longest answer, in tokens", low=1, often=True)
    min_new_tokens: int = setting(0, "end tokens are banned before this many tokens", low=0)
    temperature: float = setting(1.0, "divides the logits; 0: greedy", low=0, often=True)
    top_k: int = setting(0, "keep the k likeliest tokens; 0: all", low=0)
    top_p: float = setting(1.0, "keep the smallest set of likeliest tokens with this much "
                           "probability", above=0, high=1)
    min_p: float = setting(0.0, "cut off tokens less than min_p times as likely as the likeliest; "
                           "0: none", low=0, high=1)
    stop_tokens: tuple[int, ...] | None = setting(None, "token ids that end an answer; null: the "
                                                  "checkpoint's own", low=0)


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """How the devices are laid out; one axis may be -1: whatever is left."""

    data: int = setting(-1, "replicas of the policy that split the rows", low=-1)
    fsdp: int = setting(1, "ways the weights are split in training, rows too", low=-1)
    expert: int = setting(1, "ways a sparse policy's experts are split, and rows too", low=-1)
    tensor: int = setting(1, "ways heads, hidden layers and vocabulary are split", low=-1)
    rollout_tensor: str = setting("tensor", "axes that split the weights during rollouts",
                                  choices=("tensor", "fsdp_tensor"))


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    """Checkpoints, under output_dir/checkpoints."""

    every: int = setting(1, "steps between checkpoints; the last step always has one", low=1)
    keep: int = setting(2, "how many are kept", low=1)
    best: str | None = setting(None, "a metric whose best step is kept beside them, such as "
                               "eval/pass@1 or reward: `RUN@best`; null: none")
    best_is: str = setting("max", "which value of it is the best", choices=("max", "min"))
    resume: bool = setting(True, "go on from output_dir's last checkpoint; false: refuse "
                           "a directory that has one")


@dataclasses.dataclass(frozen=True)
class LoggingSection:
    """Where a run is looked at, beside its output_dir, which always has metrics.jsonl."""

    loggers: tuple[str, ...] = setting(("tensorboard",), "each is given every step; wandb, mlflow "
                                       "and trackio need the extra of that name", often=True,
                                       choices=tuple(LOGGERS))
    project: str = setting("jspec", "of wandb and trackio; mlflow: the experiment", filled=True)
    name: str | None = setting(None, "of the run, in its project; null: output_dir's last part")
    samples: int = setting(8, "answers of each step that are written to output_dir/samples and "
                           "logged, whole groups first; 0: none", low=0)


@dataclasses.dataclass(frozen=True)
class ProfileSection:
    """Traces that XProf and Perfetto open."""

    trace_step: int = setting(-1, "the step of `jspec train` that is traced into output_dir/trace, "
                              "by the number that its line has; 0 and -1: none", low=-1)
    repeats: int = setting(2, "`jspec profile`: how many times the step (or draft.every_n_steps of "
                           "them) is timed, after one warm-up", low=1)
