"""Sections of a configuration that say what a run learns from, and how: prompts, rewards, the
objective."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from jspec.choices import (
    ADVANTAGES,
    AGGREGATIONS,
    BASE_DTYPES,
    CORRECTIONS,
    KL_ESTIMATES,
    LORA_TARGETS,
    MOST_SAMPLES,
    OBJECTIVES,
    AdvantageForm,
    Aggregation,
)
from jspec.optimizer_sections import OptimizerSection, ScheduleSection, StateMemorySection
from jspec.settings import setting


@dataclasses.dataclass(frozen=True)
class DataSection:
    """The prompts."""

    source: str | dict = setting(
        "arithmetic", "'arithmetic', a .jsonl file of {prompt, answer}, a .parquet file, a folder "
        "of those, a folder that datasets saved, or 'reasoning_gym:TASK'; or several by name, "
        "mixed by weight: {NAME: {source, weight, split, prompt_column, answer_column, options}, "
        "...}", filled=True, path=True, often=True, short="source")
    split: str | None = setting(None, "of a folder that has several; null: train, or the only one")
    prompt_column: str = setting("prompt", "of a file or folder: the key or column of the prompt, "
                                 "a text or messages {role, content}; where there is no prompt, "
                                 "messages are taken", filled=True)
    answer_column: str | None = setting("answer", "the one of the answer; null: there is none, and "
                                        "rewards are given an empty one")
    prompts_per_step: int = setting(4, "prompts a step, over all processes; different ones, but "
                                    "where two epochs meet", low=1, often=True)
    group_size: int = setting(4, "answers sampled for each prompt", low=1, high=MOST_SAMPLES,
                              often=True)
    max_prompt_tokens: int = setting(128, "a longer prompt is an error, or left out", low=1)
    too_long: str = setting("error", "skip: longer prompts are counted at the start and left out",
                            choices=("error", "skip"))
    system_prompt: str | None = setting(None, "first message of the chat; null: what the chat "
                                        "template does by itself")
    chat_template: bool = setting(True, "wrap prompts in the tokenizer's chat template")
    held_out: int = setting(0, "different prompts, of each source, that training never draws, "
                            "chosen by the seed: for evaluations", low=0)
    shuffle: bool = setting(True, "shuffle the prompts, anew at every epoch, by the run's seed")
    curriculum: bool = setting(False, "prompts that this run solves half of the time come again at "
                               "every pass over the data, and those that it always or never solves "
                               "in every curriculum_rest-th")
    curriculum_rest: float = setting(8.0, "passes after which a prompt comes again at the latest",
                                     low=1, high=1024)
    dynamic_sampling: int = setting(1, "rollouts of a step at most: while groups have one reward "
                                    "for all their answers, which teaches nothing, further prompts "
                                    "take their places; 1: none do", low=1, high=1024)
    over_sampling: float = setting(1.0, "so many times prompts_per_step are drawn, and a rollout "
                                   "ends when prompts_per_step of them have all their answers; "
                                   "the others are dropped, which are the long ones", low=1,
                                   high=1024)
    options: dict = setting({}, "further arguments of the task, such as reasoning_gym's parameters")

    @property
    def prompts_drawn(self) -> int:
        """Prompts of a rollout."""
        return math.ceil(round(self.prompts_per_step * self.over_sampling, 6))

    @property
    def drawing(self) -> str:
        """What says how many prompts a rollout has, and how many that are, for errors."""
        if self.over_sampling == 1:
            return f"data.prompts_per_step={self.prompts_per_step}"
        return (f"data.prompts_per_step x data.over_sampling={self.prompts_per_step} x "
                f"{self.over_sampling:g} = {self.prompts_drawn}")


@dataclasses.dataclass(frozen=True)
class RewardSection:
    """How answers are graded, on the host, by a pool of processes."""

    function: str | dict = setting(
        "math_verify", "'math_verify', 'reasoning_gym', 'soft_overlong', or your own as "
        "'path/to/file.py:function'; or several by name, whose weighted sum is learned from: "
        "{NAME: {function, weight, options, timeout_s, sources}, ...}", filled=True, path=True,
        often=True, short="function")
    workers: int = setting(2, "grading processes", low=1, high=1024)
    timeout_s: float = setting(10.0, "seconds after which a call of a function is killed, and what "
                               "it was to grade scores 0", above=0, high=1e6)
    concurrency: int = setting(32, "calls of an async function in flight at once", low=1,
                               high=65536)


@dataclasses.dataclass(frozen=True)
class EvaluationSection:
    """Answers to prompts that training does not draw, graded: while training, and by `jspec
    eval`."""

    every: int = setting(0, "steps between evaluations while training; 0: none", low=0, often=True)
    at_start: bool = setting(False, "with every: before the first step too")
    at_end: bool = setting(True, "with every: after the last step too")
    sources: tuple[str, ...] | dict = setting(
        (), "prompts to evaluate on, a list of files and the like or several by name, as "
        "data.source has them, with scores of each; none named: those that data.held_out kept from "
        "training", path=True, short="source")
    split: str | None = setting(None, "of those of the sources that are folders; null: what "
                                "training reads of a folder, and of others train, or the only one")
    prompts: int | None = setting(None, "how many prompts, of each source; null: 64, or all if "
                                  "there are fewer", low=1)
    samples: int = setting(4, "answers sampled for each prompt", low=1, high=MOST_SAMPLES)
    at: tuple[int, ...] = setting((), "the k of pass@k and maj@k, at most samples; none named: 1, "
                                  "2, 4, 8 ... samples", low=1)
    right_from: float = setting(1.0, "pass@k and maj@k: an answer is right whose reward is at "
                                "least this")
    temperature: float | None = setting(None, "divides the logits; 0: greedy; null, as below: what "
                                        "sampling has", low=0)
    top_k: int | None = setting(None, "keep the k likeliest tokens; 0: all", low=0)
    top_p: float | None = setting(None, "keep the smallest set of likeliest tokens with this much "
                                  "probability", above=0, high=1)
    min_p: float | None = setting(None, "cut off tokens less than min_p times as likely as the "
                                  "likeliest; 0: none", low=0, high=1)
    max_new_tokens: int | None = setting(None, "longest answer, in tokens", low=1)
    batch: int = setting(8, "prompts decoded together", low=1)

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k and maj@k, ascending."""
        powers = (2**i for i in range(self.samples.bit_length()))
        return tuple(sorted({*(self.at or (*powers, self.samples))}))

    @property
    def labels(self) -> tuple[str, ...]:
        """What the sources are called in metrics: their names, or those of their files or tasks,
        or as they were given where two have one name."""
        if isinstance(self.sources, dict):
            return tuple(self.sources)
        names = [Path(source).stem if source.endswith((".jsonl", ".parquet")) or ":" not in source
                 else source.rpartition(":")[2] for source in self.sources]
        return tuple(source if names.count(name) > 1 else name
                     for source, name in zip(self.sources, names, strict=True))

    def metrics(self, labels: Iterable[str]) -> tuple[str, ...]:
        """The names of what an evaluation while training says, in its order. labels: of its
        sources."""
        scores = (f"mean@{self.samples}", *(f"pass@{k}" for k in self.ks),
                  *(f"maj@{k}" for k in self.ks if k > 1))
        parts = ("", *(f"{label}/" for label in labels if label))
        return (*(f"eval/{part}{score}" for part in parts for score in scores),
                *(f"eval/{name}" for name in EVALUATED))


EVALUATED = ("length", "finished", "reward_failures", "prompts")
"""What an evaluation says beside its scores."""


@dataclasses.dataclass(frozen=True)
class ObjectiveSection:
    """What the policy minimises, and how that is computed."""

    objective: str = setting("grpo", "the loss of a token, or your own as "
                             "'path/to/file.py:function'", choices=tuple(OBJECTIVES), file=True,
                             path=True, often=True)
    aggregation: str | None = setting(
        None, "from tokens' losses to the batch's: the mean over tokens; over answers, or prompts, "
        "of each one's mean; or the sum over a constant; null: what the objective goes with",
        choices=AGGREGATIONS)
    constant_length: int | None = setting(None, "tokens of an answer that constant_length divides "
                                          "by; null: sampling.max_new_tokens", low=1)
    advantage: str | None = setting(
        None, "group: (reward - mean) / deviation in the group; dr_grpo: reward - mean; "
        "leave_one_out: reward - the others' mean; whitened: (reward - mean) / deviation over all "
        "tokens of the step; whitened_baseline: that of dr_grpo's; null: what the objective goes "
        "with", choices=ADVANTAGES)
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", low=0, high=1)
    clip_high: float = setting(0.28, "the ratio is clipped above 1 + clip_high", low=0)
    dual_clip: float | None = setting(None, "where the advantage is negative, the loss of a token "
                                      "is at most this times its size; null: not bounded", above=1)
    sapo_tau: tuple[float, ...] = setting((1.0, 1.05), "of objective sapo: its temperature for "
                                          "positive advantages, and for the others", above=0)
    kl_weight: float = setting(0.0, "weight of the KL to the reference, which is the first policy; "
                               "0: none is kept", low=0)
    kl_estimate: str = setting("k3", "of the KL, from a sampled token's log-ratio d to the "
                               "reference: k1: -d; k2: d^2 / 2; k3: exp(d) - d - 1",
                               choices=KL_ESTIMATES)
    kl_in_reward: bool = setting(False, "take the KL of an answer off its reward, before "
                                 "advantages are, and not into the loss")
    kl_reference_every: int = setting(0, "GRPO steps after which the reference moves to the "
                                      "policy; 0: it stays the first one", low=0)
    kl_reference_mix: float = setting(1.0, "how far it moves: 1: it is the policy from then on",
                                      above=0, high=1)
    entropy_weight: float = setting(0.0, "weight of the policy's entropy, which is to be large",
                                    low=0)
    correction: str = setting(
        "none", "for answers that the verifier computes otherwise than the update, in bfloat16 or "
        "quantised: weights of tokens by the gap. tis: clipped at the bounds; icepop: 0 outside of "
        "them; sequence_mask: 0 for answers whose mean gap is outside. The ratio is then to the "
        "update's own log-probabilities; none: to the verifier's", choices=tuple(CORRECTIONS))
    correction_low: float | None = setting(None, "lower bound of a weight; null: 0 for tis, 0.5 "
                                           "for icepop, 0.999 for sequence_mask", low=0, high=1)
    correction_high: float | None = setting(None, "upper bound; null: 2, 5, 1.002", low=1)
    mask_truncated: bool = setting(False, "leave answers that were cut off at the cap out of the "
                                   "loss; their rewards still count in their group's mean")
    updates_per_rollout: int = setting(1, "optimizer steps on each rollout, or on each of its "
                                       "mini-batches", low=1, high=1024)
    mini_batches: int = setting(1, "parts of a rollout, of whole prompts, that have optimizer "
                                "steps of their own", low=1)
    replay_routes: bool = setting(True, "compute answers with the experts that the rollout chose "
                                  "for each token; a dense model has none")
    micro_batch: int = setting(0, "rows per forward and backward; more need more memory, and fewer "
                               "are of more like length; 0: what keeps a device busy, one at least",
                               low=0)
    widths: tuple[int, ...] = setting(
        (), "tokens that answers are trimmed to, besides sampling.max_new_tokens, before the "
        "update computes them, those of like length together. Each is compiled: more of them waste "
        "less and compile longer; none named: up to five", low=1)
    truncated_ratio: bool = setting(True, "under sampling.top_k, top_p and min_p: learn the "
                                    "distribution that they leave, which answers are drawn from; "
                                    "false: the whole one, which biases the update")
    biased_sampling: bool = setting(False,
                                    "train although answers are drawn from another distribution "
                                    "than the one whose gradient is taken (min_new_tokens, "
                                    "temperature=0, truncated_ratio=false): the update is then "
                                    "biased")
    max_skipped: int = setting(5, "stop after this many updates in a row with a non-finite loss or "
                               "gradient", low=1)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on a rollout and all its parts."""
        return self.updates_per_rollout * self.mini_batches

    @property
    def correction_bounds(self) -> tuple[float, float]:
        """Of the correction's weights: those that are set, else what it goes with."""
        low, high = CORRECTIONS[self.correction]
        return (low if self.correction_low is None else self.correction_low,
                high if self.correction_high is None else self.correction_high)

    def chosen(self) -> tuple[AdvantageForm, Aggregation]:
        """Advantages and aggregation: those that are set, else what the objective goes with."""
        advantage, aggregation = OBJECTIVES.get(self.objective, OBJECTIVES["grpo"])
        return (cast(AdvantageForm, self.advantage or advantage),
                cast(Aggregation, self.aggregation or aggregation))


@dataclasses.dataclass(frozen=True)
class GrpoSection(ScheduleSection, StateMemorySection, OptimizerSection, ObjectiveSection):
    """The policy's objective and optimizer."""


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters, trained in the place of the policy's own weights, which stay as they are
    and are the KL's reference too."""

    rank: int = setting(0, "of the adapters; 0: there are none, and all weights are trained", low=0,
                        high=65536)
    alpha: float = setting(16.0, "an adapter's product is multiplied with alpha / rank", above=0,
                           high=1e6)
    targets: tuple[str, ...] = setting(tuple(LORA_TARGETS), "the matrices that have adapters, in "
                                       "experts too", choices=tuple(LORA_TARGETS), filled=True)
    base_dtype: str = setting("bfloat16", "what all other weights are kept in; int8, int4: the "
                              "matrices that have adapters in 8 or 4 bits, the rest in bfloat16",
                              choices=BASE_DTYPES)
