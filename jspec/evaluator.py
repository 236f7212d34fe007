"""An evaluation: answers to prompts that training does not draw, graded and scored. `jspec train`
takes one every few steps, `jspec eval` one of any policy.

Its noise is a purpose of its own, and the same every time: what two evaluations of a run differ in
is the policy, and one that is taken again says the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jspec.answering import batch_on_mesh, decoded
from jspec.config import Config
from jspec.drafts import Draft
from jspec.errors import InputError
from jspec.model import Policy
from jspec.prepare import (
    check_rewards,
    make_batching,
    make_prompts,
    make_sampling,
    make_speculation,
    rollout_layout,
)
from jspec.progress import say
from jspec.purposes import EVAL_KEY, purpose_key, purpose_seed
from jspec.reward_parts import reward_parts
from jspec.rl import scores
from jspec.rl.answers import answer_text
from jspec.rl.grading import grade
from jspec.rl.prompts import Prompt, PromptData
from jspec.rl.rewards import RewardPool
from jspec.rl.votes import vote_of
from jspec.sharding import batch_shards
from jspec.source_parts import evaluated
from jspec.speculate import PromptBatch, Sampling, Speculation
from jspec.speculate.arguments import check, check_batching
from jspec.speculate.schedule import MOST
from jspec.speculate.types import BUCKETS

PROMPTS = 64
"""How many prompts of a source, if nothing is said and it has as many."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked: P prompts, and them again as batches.

    Attributes:
      prompts: in their order, those of one source together.
      labels: [P], what each one's source is called; "" where there is only one.
      batches: what is decoded together, and the prompts of it, all batches of one shape. The last
        one is filled up with the first prompts.
    """

    prompts: Sequence[Prompt]
    labels: Sequence[str]
    batches: Sequence[tuple[Sequence[Prompt], PromptBatch]]


@dataclasses.dataclass(frozen=True)
class Answered:
    """The answers to P prompts, n each, and their grades.

    Attributes:
      labels: of `Asked`.
      rewards: float32 [P, n]. lengths: int32 [P, n], in tokens. finished: bool [P, n].
      votes: [P][n], see `votes.vote_of`.
      by_name: float32 [P, n] of each reward function by itself, NaN where it does not apply.
      failures: how many could not be graded.
    """

    labels: Sequence[str]
    rewards: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    votes: Sequence[Sequence[scores.Vote]]
    by_name: dict[str, np.ndarray]
    failures: int

    def by_source(self, config: Config) -> dict[str, dict[str, np.ndarray]]:
        """`scores.by_prompt` of all prompts, as "", and of each source where there are several."""
        section = config.evaluation
        every = scores.by_prompt(self.rewards, self.votes, section.ks, section.right_from)
        labels = np.array(self.labels)
        return {"": every} | {
            label: {name: values[labels == label] for name, values in every.items()}
            for label in dict.fromkeys(self.labels) if label}

    def by_function(self) -> dict[str, float | None]:
        """Where there are several reward functions, the mean of each over the answers that it
        applies to; None: over none."""
        applied = {name: values[~np.isnan(values)] for name, values in self.by_name.items()}
        return {name: float(values.mean(dtype=np.float64)) if values.size else None
                for name, values in applied.items()} if len(applied) > 1 else {}

    def record(self, config: Config) -> dict[str, float | int | None]:
        """What a step's metrics say of it: `EvaluationSection.metrics`, and where there are several
        reward functions the mean of each."""
        means: dict[str, float | int | None] = {
            f"eval/{label and label + '/'}{name}": float(values.mean())
            for label, table in self.by_source(config).items() for name, values in table.items()}
        means |= {f"eval/reward/{name}": mean for name, mean in self.by_function().items()}
        return means | {"eval/length": float(self.lengths.mean()),
                        "eval/finished": float(self.finished.mean()),
                        "eval/reward_failures": self.failures, "eval/prompts": len(self.rewards)}


def eval_sampling(config: Config) -> Sampling:
    """`make_sampling`, with what the evaluation has of its own."""
    names = [field.name for field in dataclasses.fields(config.sampling)]
    own = {name: value for name, value in dataclasses.asdict(config.evaluation).items()
           if name in names and value is not None}
    return make_sampling(dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, **own)))


def streams(config: Config, tokenizer: Any) -> dict[str, PromptData]:
    """The prompts to answer by what their source is called, one a step: those of
    `evaluation.sources`, in an order of their own, else those that data.held_out keeps from
    training, else, of who trains nothing, the training's.

    Raises InputError as `make_prompts` and `check_rewards` do.
    """
    data, section = config.data, config.evaluation
    held_out = data.held_out > 0 and not section.sources
    seed = config.seed if held_out else purpose_seed(config.seed, EVAL_KEY)
    of, made = evaluated(data, section), {}
    for label, source in of.items():
        check_rewards(config, source)
        made[label] = make_prompts(config, tokenizer, source, seed=seed, held_out=held_out,
                                   setting="evaluation.sources" if section.sources
                                   else "data.source")
        if made[label].left_out:
            say("evaluation: "
                + made[label].records.said_of_left_out(data.max_prompt_tokens))
    return made


def drawn(config: Config, data: PromptData, setting: str = "evaluation.prompts=") -> list[Prompt]:
    """The prompts of a source to answer. Raises InputError for more than there are, which begins
    with `setting`."""
    wanted, available = config.evaluation.prompts, len(data.records)
    if wanted is not None and wanted > available:
        held_out = " held out (data.held_out)" if data.config.held_out else ""
        raise InputError(f"{setting}{wanted} is more than {data.records.parts[0].source} "
                         f"has{held_out}: {available}")
    count = min(PROMPTS, available) if wanted is None else wanted
    return [prompt for _ in range(count) for prompt in next(data)]


def asked(config: Config, prompts: dict[str, list[Prompt]], shape: Policy, draft: Draft | None,
          speculation: Speculation, layout: str) -> Asked:
    """The batches of `prompts` by source, on the current mesh, each with as many more as the mesh
    needs to split its rows.

    Args:
      shape, draft: `jax.ShapeDtypeStruct`s will do.
      speculation: with as many drafts as there may be.
      layout: of the rollout.

    Raises InputError for what a rollout of them would refuse, so that it is said before any weights
    are read.
    """
    section, key = config.evaluation, purpose_key(config.seed, EVAL_KEY)
    every = [prompt for of_one in prompts.values() for prompt in of_one]
    labels = [label for label, of_one in prompts.items() for _ in of_one]
    longest = max(len(prompt.tokens) for prompt in every)
    bucket = next((b for b in BUCKETS if b >= longest), longest)  # one for all: compiled once
    made = []
    for step, chosen in enumerate(_chunks(every, min(section.batch, len(every)))):
        batch = batch_on_mesh([prompt.tokens for prompt in chosen], layout,
                              group_size=section.samples, seed=jax.random.fold_in(key, step),
                              buckets=(bucket,))
        made.append((chosen, batch))
    sampling, batching, batch = eval_sampling(config), make_batching(config), made[0][1]
    rows = len(batch.sequence_ids)
    # `check` would not name the setting
    check_batching("rollout.", batching, batch_shards(layout), rows, section.samples,
                   batch.tokens.shape[1], sampling.max_new_tokens,
                   0 if draft is None else speculation.most)
    cap, room = sampling.max_new_tokens, shape.config.max_position_embeddings
    if longest + cap > room:
        whose = "sampling" if section.max_new_tokens is None else "evaluation"
        raise InputError(f"an evaluation's prompt of {longest} tokens and {whose}.max_new_tokens="
                         f"{cap} do not fit the model's {room} positions; lower it, or leave out "
                         "longer prompts (data.max_prompt_tokens, data.too_long=skip)")
    for _, batch in made:
        check(shape, draft, batch, sampling, speculation, batching)
    return Asked(every, labels, made)


def _chunks(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """`prompts`, `size` at a time; the last ones are filled up with the first."""
    for start in range(0, len(prompts), size):
        chosen = list(prompts[start:start + size])
        yield [*chosen, *itertools.islice(itertools.cycle(prompts), size - len(chosen))]


def answered(config: Config, tokenizer: Any, pool: RewardPool, policy: Policy, draft: Draft | None,
             ask: Asked, speculation: Speculation,
             told: Callable[[Answered], None] = lambda so_far: None) -> Answered:
    """Answers all that is asked, and grades it. All processes call it.

    Args:
      policy: in the rollout layout.
      told: is called with what there is after every batch.
    """
    how = {"sampling": eval_sampling(config), "speculation": speculation,
           "batching": make_batching(config)}
    samples, parts, left = config.evaluation.samples, [], len(ask.prompts)
    math = any(part.function == "math_verify" for part in reward_parts(config.reward.function))
    for chosen, batch in ask.batches:
        out = decoded(policy, draft, batch, len(chosen) * samples, **how)
        graded = grade(pool, tokenizer, chosen, out)
        keep = min(len(chosen), left)
        votes = [vote_of(answer_text(tokenizer, out, row), chosen[row // samples].answer,
                         bool(out.finished[row]), math=math) for row in range(keep * samples)]
        rewards, lengths, finished, *by_name = (
            np.asarray(x).reshape(len(chosen), samples)[:keep]
            for x in (graded.rewards, out.lengths, out.finished, *graded.by_name.values()))
        labels = ask.labels[len(ask.prompts) - left:][:keep]
        parts.append(Answered(labels, rewards, lengths, finished,
                              [votes[i:i + samples] for i in range(0, len(votes), samples)],
                              dict(zip(graded.by_name, by_name, strict=True)), graded.failed))
        left -= keep
        told(joined(parts))
    return joined(parts)


def joined(parts: Sequence[Answered]) -> Answered:
    """The answers of several batches as those of one."""
    def whole(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return Answered([label for part in parts for label in part.labels], whole("rewards"),
                    whole("lengths"), whole("finished"),
                    [votes for part in parts for votes in part.votes],
                    {name: np.concatenate([part.by_name[name] for part in parts])
                     for name in parts[0].by_name}, sum(part.failures for part in parts))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluations of a training run.

        evaluation = Evaluation.of(config, tokenizer, pool, shape, draft)   # None: there are none
        if evaluation.due(step):
            record |= evaluation.record(policy, draft, k)                   # eval/...
    """

    config: Config
    tokenizer: Any
    pool: RewardPool
    ask: Asked

    @classmethod
    def of(cls, config: Config, tokenizer: Any, pool: RewardPool, shape: Policy,
           draft: Draft | None) -> Evaluation | None:
        """As a configuration has it. Raises InputError for what no evaluation could be made of,
        before any weights are read. shape, draft: with `jax.ShapeDtypeStruct`s."""
        if not config.evaluation.every:
            return None
        prompts = {label: drawn(config, data) for label, data in streams(config, tokenizer).items()}
        ask = asked(config, prompts, shape, draft, make_speculation(config, MOST),
                    rollout_layout(config))
        return cls(config, tokenizer, pool, ask)

    def due(self, step: int) -> bool:
        """Whether there is one after so many steps."""
        section, last = self.config.evaluation, step == self.config.steps
        if step == 0:
            return section.at_start
        return step % section.every == 0 or (last and section.at_end)

    def record(self, policy: Policy, draft: Draft | None, k: Any) -> dict[str, float | int | None]:
        """The fields `eval/...` of a step's record.

        Args:
          policy: in the rollout layout. k: what is drafted where speculation.k is auto.
        """
        speculation = make_speculation(self.config, k)
        return answered(self.config, self.tokenizer, self.pool, policy, draft, self.ask,
                        speculation).record(self.config)
