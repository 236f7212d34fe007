"""What can be set of a run (`Config`), as frozen dataclasses; of `jspec draft train` it is in
`jspec.draft_config`.

Every field carries its meaning and its bounds, so that `jspec train --help` can print the one and
reading can check the other; `jspec.settings` does both. What depends on more than one field is
a configuration's `check`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jspec import settings
from jspec.choices import (
    ADVANTAGES,
    DRAFT_LOSSES,
    DRAFT_OPTIMIZERS,
    DRAFTERS,
    DTYPES,
    KERNELS,
    LOG_LEVELS,
    MAX_NEW_TOKENS,
    MOST_SAMPLES,
    RULES,
    SEED_HIGH,
)
from jspec.errors import InputError
from jspec.settings import Override, setting


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The policy."""

    name: str = setting("smollm2-135m-instruct", "short name, hub id, safetensors directory, .gguf "
                        "file, or 'random'", filled=True, path=True)
    dtype: str = setting("auto", "what is computed in; auto: bfloat16 on accelerators, float32 on "
                         "the CPU", choices=("auto", *DTYPES))
    architecture: dict | None = setting(None, "ModelConfig fields of a policy drawn at random; "
                                        "only with name 'random'")
    tokenizer: str | None = setting(None, "another model's tokenizer, or 'chars:ALPHABET'; null: "
                                    "the model's own", path=True)


@dataclasses.dataclass(frozen=True)
class TrainedModelSection(ModelSection):
    """The policy, and how its gradient is computed."""

    remat: bool = setting(False, "recompute each layer's activations in the backward pass: slower, "
                          "far less memory")


@dataclasses.dataclass(frozen=True)
class DraftLearningSection:
    """The drafter, and how it learns."""

    name: str = setting("mtp", "the drafter, or your own", choices=DRAFTERS, file=True, path=True)
    path: str | None = setting(None, "a trained draft to start from: a model whose draft ships "
                               "with jspec, a directory of a published draft, or the output_dir of "
                               "`jspec draft train` or of a run; null: a fresh one", path=True)
    loss: str = setting("kl", "kl: forward KL from the policy; tv: total variation, 1 - overlap; "
                        "overlap: -log of the overlap, the likelihood of acceptance",
                        choices=DRAFT_LOSSES)
    optimizer: str = setting("adamw", "the draft's own; muon: orthogonal updates of the matrices "
                             "inside blocks, AdamW for the rest", choices=DRAFT_OPTIMIZERS)
    learning_rate: float = setting(1e-3, "peak learning rate of the draft's own optimizer", low=0)
    clip: float = setting(1.0, "global-norm clip of the draft's gradient", above=0)
    options: dict | None = setting({}, "further arguments of a fresh drafter, such as ngram's "
                                   "longest match; null: none, as beside draft.path, whose draft "
                                   "has its own")


@dataclasses.dataclass(frozen=True)
class DraftSection(DraftLearningSection):
    """The drafter that makes rollouts fast; it never changes what they are distributed as."""

    name: str = setting("mtp", "the drafter, or your own; none: plain autoregressive rollouts",
                        choices=(*DRAFTERS, "none"), file=True, path=True)
    train: bool = setting(True, "train the draft in the update step (where it has weights)")
    every_n_steps: int = setting(1, "train the draft at every n-th step", low=1)
    features: str = setting("update", "whose states of the policy the draft learns from. update: "
                            "the update's own forward; rollout: the verifier's, kept by the "
                            "rollout, so that the draft learns while rewards are computed, once "
                            "a rollout", choices=("update", "rollout"))


@dataclasses.dataclass(frozen=True)
class SpeculationSection:
    """How drafts are judged."""

    k: int | tuple[tuple[int, ...], ...] | Literal["auto"] = setting(
        "auto", "tokens drafted per cycle: a number; a schedule [[4, 7], [16, 3]] (up to 4 live "
        "rows draft 7, up to 16 draft 3, more none); or auto: what promises the most tokens "
        "a second, by what cycles are measured to cost here and by what earlier steps accepted, no "
        "drafts included. draft.name=none turns speculation off", low=1, high=64)
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

    max_new_tokens: int = setting(MAX_NEW_TOKENS, "longest answer, in tokens", low=1)
    min_new_tokens: int = setting(0, "end tokens are banned before this many tokens", low=0)
    temperature: float = setting(1.0, "divides the logits; 0: greedy", low=0)
    top_k: int = setting(0, "keep the k likeliest tokens; 0: all", low=0)
    top_p: float = setting(1.0, "keep the smallest set of likeliest tokens with this much "
                           "probability", above=0, high=1)
    stop_tokens: tuple[int, ...] | None = setting(None, "token ids that end an answer; null: the "
                                                  "checkpoint's own", low=0)


@dataclasses.dataclass(frozen=True)
class DataSection:
    """The prompts."""

    source: str = setting("arithmetic", "'arithmetic', a .jsonl file of {prompt, answer}, or "
                          "'reasoning_gym:TASK'", filled=True, path=True)
    prompts_per_step: int = setting(4, "prompts a step, over all processes; different ones, but "
                                    "where two epochs meet", low=1)
    group_size: int = setting(4, "answers sampled for each prompt", low=1, high=MOST_SAMPLES)
    max_prompt_tokens: int = setting(128, "a longer prompt is an error", low=1)
    system_prompt: str | None = setting(None, "first message of the chat; null: what the chat "
                                        "template does by itself")
    chat_template: bool = setting(True, "wrap prompts in the tokenizer's chat template")
    held_out: int = setting(0, "different prompts that training never draws, chosen by the seed: "
                            "for `jspec eval`", low=0)
    shuffle: bool = setting(True, "shuffle the prompts, anew at every epoch, by the run's seed")
    options: dict = setting({}, "further arguments of the task, such as reasoning_gym's parameters")


@dataclasses.dataclass(frozen=True)
class RewardSection:
    """How answers are graded, on the host, by a pool of processes."""

    function: str = setting("math_verify", "'math_verify', 'reasoning_gym', or your own as "
                            "'path/to/file.py:function'", filled=True, path=True)
    workers: int = setting(2, "grading processes", low=1, high=1024)
    timeout_s: float = setting(10.0, "seconds after which an answer's grading is killed and scores "
                               "0", above=0, high=1e6)


@dataclasses.dataclass(frozen=True)
class GrpoSection:
    """The policy's objective and optimizer."""

    advantage: str = setting("group", "group: (reward - mean) / deviation in the group; dr_grpo: "
                             "reward - mean", choices=ADVANTAGES)
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", low=0, high=1)
    clip_high: float = setting(0.28, "the ratio is clipped above 1 + clip_high", low=0)
    kl_weight: float = setting(0.0, "weight of the k3 KL to the frozen first policy; 0: no "
                               "reference is kept", low=0)
    updates_per_rollout: int = setting(1, "optimizer steps on each rollout", low=1)
    replay_routes: bool = setting(True, "compute answers with the experts that the rollout chose "
                                  "for each token; a dense model has none")
    micro_batch: int = setting(0, "rows per forward and backward; more need more memory, and fewer "
                               "are of more like length; 0: what keeps a device busy, one at least",
                               low=0)
    widths: tuple[int, ...] = setting(
        (), "tokens that answers are trimmed to, besides sampling.max_new_tokens, before the "
        "update computes them, those of like length together. Each is compiled: more of them waste "
        "less and compile longer; none named: up to five", low=1)
    learning_rate: float = setting(1e-6, "peak learning rate of the policy's AdamW", low=0)
    clip: float = setting(1.0, "global-norm clip of the policy's gradient", above=0)
    weight_decay: float = setting(0.0, "decoupled weight decay", low=0)
    warmup_steps: int = setting(0, "GRPO steps over which the learning rate rises linearly", low=0)
    biased_sampling: bool = setting(False,
                                    "train although answers are drawn from another distribution "
                                    "than the one whose gradient is taken (sampling.top_k, top_p, "
                                    "min_new_tokens, temperature=0): the update is then biased")
    max_skipped: int = setting(5, "stop after this many updates in a row with a non-finite loss or "
                               "gradient", low=1)


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
    resume: bool = setting(True, "go on from output_dir's last checkpoint; false: refuse "
                           "a directory that has one")


@dataclasses.dataclass(frozen=True)
class ProfileSection:
    """Traces that XProf and Perfetto open."""

    trace_step: int = setting(-1, "the step of `jspec train` that is traced into output_dir/trace, "
                              "by the number that its line has; 0 and -1: none", low=-1)
    repeats: int = setting(2, "`jspec profile`: how many times the step (or draft.every_n_steps of "
                           "them) is timed, after one warm-up", low=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run of `jspec train`."""

    seed: int = setting(0, "of everything drawn: fresh weights, prompts' order, sampling noise",
                        low=0, high=SEED_HIGH)
    steps: int = setting(6, "GRPO steps in all, those before a resume included", low=1)
    output_dir: str = setting("runs/quickstart", "metrics, checkpoints and traces; the same one "
                              "again resumes", filled=True, path=True)
    log_level: str = setting("info", "how much is told", choices=LOG_LEVELS)
    model: TrainedModelSection = TrainedModelSection()
    draft: DraftSection = DraftSection()
    speculation: SpeculationSection = SpeculationSection()
    rollout: RolloutSection = RolloutSection()
    sampling: SamplingSection = SamplingSection()
    data: DataSection = DataSection()
    reward: RewardSection = RewardSection()
    grpo: GrpoSection = GrpoSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()
    profile: ProfileSection = ProfileSection()

    def check(self) -> None:
        """Raise InputError for what no field can know by itself."""
        check_shared(self)
        data, grpo, k = self.data, self.grpo, self.speculation.k
        rows = data.prompts_per_step * data.group_size
        demand(data.group_size > 1, f"data.group_size must be at least 2, not {data.group_size}: "
               "an answer's advantage is measured against the others of its group")
        if isinstance(k, tuple):
            pairs = [pair for pair in k if len(pair) == 2 and pair[0] >= 1 and 0 <= pair[1] <= 64]
            demand(0 < len(k) == len(pairs) == len({rows for rows, _ in pairs}),
                   f"speculation.k={[list(pair) for pair in k]} is no schedule: pairs of [rows, "
                   "k], with k from 0 to 64 and no number of rows twice, such as [[4, 7], [16, "
                   "3]]")
        demand(not grpo.micro_batch or rows % grpo.micro_batch == 0,
               f"grpo.micro_batch ({grpo.micro_batch}) must divide the rows of a step, "
               f"data.prompts_per_step x data.group_size = {rows}")
        longest = self.sampling.max_new_tokens
        demand(all(width <= longest for width in grpo.widths),
               f"grpo.widths is {list(grpo.widths)}, and no answer is longer than "
               f"sampling.max_new_tokens = {longest}: leave out what is above it")


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
    demand(config.draft.path is None or not config.draft.options,
           f"draft.options are a fresh draft's, and the one at draft.path={config.draft.path} has "
           "its own; set draft.options=null")
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.expert, config.mesh.tensor)
    demand(0 not in axes and axes.count(-1) <= 1,
           f"mesh.data, mesh.fsdp, mesh.expert and mesh.tensor are {axes}: each at least 1, and "
           "one of them at most may be -1")
