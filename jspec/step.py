"""A training step, declared once: its programs, and how they follow each other on the device.

    reshard ─► rollout ─► draft (learning from the verifier's states) ─► remember
            ─► update, updates_per_rollout times for each mini-batch

`jspec train` takes it, `jspec profile` times it, and benchmarks and compilation for chips that are
not here lower it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

import jspec
from jspec.clock import Clock
from jspec.config import Config
from jspec.distributed import fetch
from jspec.drafts import Draft
from jspec.model import Policy, to_rollout
from jspec.prepare import make_sampling, make_speculation, rollout_layout, step_batching
from jspec.rl.advantages import advantages_of
from jspec.rl.batch import make_batch, without_truncated
from jspec.rl.groups import Drawn, merged, merged_on_host, picked, picked_on_host
from jspec.rl.penalty import penalised
from jspec.rl.rescore import own_logprobs
from jspec.rl.state import TrainState, at_rest, at_work, shapes_at_work
from jspec.rl.update import update, update_draft
from jspec.rl.update_settings import UpdateSettings, draft_due, learned_from, trains_draft
from jspec.sharding import batch_shards, place, placement
from jspec.speculate import Batching, PromptBatch, Rollout, Sampling, Speculation
from jspec.speculate.types import Schedule


class Graded(Protocol):
    """What grading a rollout gives."""

    @property
    def rewards(self) -> np.ndarray:
        """float32 [N], on the host."""


class Further(NamedTuple):
    """Another rollout of a step, whose groups may take the place of others.

    Attributes:
      prompts: as many as the step's. grade: as in `Step.take`.
      keep: (graded, graded of this one) -> (which groups of both go on, `groups.kept`; their
        grades).
    """

    prompts: PromptBatch
    grade: Callable[[Rollout, Drawn], Any]
    keep: Callable[[Any, Any], tuple[np.ndarray, Any]]


class Rolled(NamedTuple):
    """The groups of rollouts that go on: with their prompts, what is learned from, on the device;
    what the host looks at; and of each rollout what they were chosen from."""

    prompts: PromptBatch
    out: Rollout
    on_host: Rollout
    drawn: tuple[Drawn, ...]


class Taken(NamedTuple):
    """What a step did, besides its state.

    Attributes:
      rollout: on the host, without the verifier's states and routes.
      drawn: of each rollout there was.
      graded: as it was given.
      updates: the metrics of each update, on the host.
      draft: those of the draft's own update, {} without one.
      draft_learned: whether the draft was trained.
    """

    rollout: Rollout
    drawn: tuple[Drawn, ...]
    graded: Any
    updates: list[dict[str, np.ndarray]]
    draft: dict[str, np.ndarray]
    draft_learned: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """The programs of a step: jits that have not run (`declare`), or what they were compiled to
    (`compiled`).

    Attributes:
      settings, sampling: of the update, and of the rollout.
      speculation: of the rollout. Its k is what changes from step to step (`speculation.k=auto`).
      batching: of the rollout.
      reshard: policy -> policy in a rollout layout.
      rollout: (policy, draft, prompts, sampling, k) -> Rollout; k is static.
      draft: (state, prompts, rollout) -> (state, metrics), the state donated: the draft learns from
        the verifier's states. None: it learns in the update, or not at all.
      pick: (prompts, rollout, groups) -> (prompts, rollout), of the groups that are done. None:
        all are.
      merge: ((prompts, rollout), (prompts, rollout), groups) -> (prompts, rollout), of the groups
        that go on (`groups.merged`).
      remember: (draft, prompts, rollout) -> draft, the draft donated. None: the drafter remembers
        nothing.
      rescore: (state, prompts, rollout) -> rollout with the update's own log-probabilities. None:
        the update needs none from before it.
      penalise: (state, reference, prompts, rollout, rewards) -> (rewards less the KL, metrics).
        None: rewards stay as they are.
      update: (state, reference, prompts, rollout, rewards) -> (state, metrics), the state donated.
    """

    settings: UpdateSettings
    sampling: Sampling
    speculation: Speculation
    batching: Batching
    reshard: Callable[..., Policy]
    rollout: Callable[..., Rollout]
    draft: Callable[..., tuple[TrainState, dict]] | None
    pick: Callable[..., tuple[PromptBatch, Rollout]] | None
    merge: Callable[..., tuple[PromptBatch, Rollout]]
    remember: Callable[..., Draft] | None
    rescore: Callable[..., Rollout] | None
    penalise: Callable[..., tuple[jax.Array, dict]] | None
    update: Callable[..., tuple[TrainState, dict]]

    def take(self, state: TrainState, reference: Policy | None, prompts: PromptBatch, clock: Clock,
             *, choose: Callable[[Policy, Draft | None, PromptBatch], int | Schedule],
             grade: Callable[[Rollout, Drawn], Any],
             further: Callable[[Any], Further | None] | None = None) -> tuple[TrainState, Taken]:
        """Takes the step. Returns (state, what it did); of `state` only what was returned is to be
        used again.

        Args:
          reference: what the KL term is taken against, or None.
          clock: gets the seconds of the programs, and of `choose` and `reward`.
          choose: k, given the policy in its rollout layout, the draft and the prompts.
          grade: grades a rollout on the host, without the verifier's states, given also what its
            groups were chosen from. A draft that learns from those states does so meanwhile.
          further: from what has been graded to another rollout of the step, or None; it is asked
            again after that one. A draft learns from the verifier's states when there is none.
        """
        with clock("reshard"):
            policy = jax.block_until_ready(self.reshard(state.policy))
        with clock("moments"):
            jax.block_until_ready(state)  # what went to host memory leaves room for the rollout
        with clock("choose"):
            k = choose(policy, state.draft, prompts)
        due = (trains_draft(state.draft, self.settings)
               and draft_due(self.settings, int(state.updates)))
        learns, of_draft = self.draft is not None and due, {}
        rolled = self.roll(policy, state.draft, prompts, k, clock)
        if further is None:
            del policy  # the rollout's copy is gone before anything else needs the memory
            state = at_work(state, self.settings)  # begun here, while rewards are computed
        if learns and further is None:
            with clock("draft"):
                # only begun here: the host goes on to the rewards
                state, of_draft = self.draft(state, rolled.prompts, rolled.out)
        with clock("reward"):
            graded = grade(rolled.on_host, rolled.drawn[0])
        while further is not None and (more := further(graded)) is not None:
            rolled, graded = self.joined(rolled, graded, more, self.roll(
                policy, state.draft, more.prompts, k, clock), clock)
        policy, state = None, at_work(state, self.settings)
        prompts, out, on_host, drawn = rolled
        del rolled
        with clock("draft"):
            if learns and further is not None:
                state, of_draft = self.draft(state, prompts, out)
            jax.block_until_ready(of_draft)
        out = out.replace(trunk=None)
        with clock("remember"):
            if self.remember is not None:
                state = state.replace(draft=jax.block_until_ready(self.remember(state.draft,
                                                                                prompts, out)))
        with clock("moments"):
            jax.block_until_ready(state)
        with clock("update"):
            state, metrics = self.learn(state, reference, prompts, out, graded.rewards)
        state = at_rest(state, self.settings)  # begun here, until the next rollout
        return state, Taken(on_host, drawn, graded, metrics, jax.device_get(of_draft), due)

    def learn(self, state: TrainState, reference: Policy | None, prompts: PromptBatch, out: Rollout,
              rewards: np.ndarray) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
        """The updates of a rollout. Returns (state, the metrics of each on the host)."""
        placed, metrics, kl = place(rewards, "rollout", "batch"), [], {}
        if self.rescore is not None:
            out = self.rescore(state, prompts, out)
        if self.penalise is not None:
            placed, kl = self.penalise(state, reference, prompts, out, placed)
        for _ in range(self.settings.updates_per_step):
            state, of_update = self.update(state, reference, prompts, out, placed)
            metrics.append({**of_update, **kl})
        return state, jax.device_get(metrics)

    def roll(self, policy: Policy, draft: Draft | None, prompts: PromptBatch, k: int | Schedule,
             clock: Clock) -> Rolled:
        """A rollout, and of it the groups that go on."""
        with clock("rollout"):
            out = self.rollout(policy, draft, prompts, self.sampling, k)
            on_host, out = fetch(for_host(out)), to_learn_from(out)
            drawn = Drawn.of(on_host, prompts.tokens.shape[0], self.batching.groups,
                             batch_shards(policy.layout))
            if self.pick is not None:
                prompts, out = self.pick(prompts, out, drawn.kept)
                on_host = picked_on_host(on_host, drawn)
            return Rolled(prompts, out, on_host, (drawn,))

    def joined(self, rolled: Rolled, graded: Any, more: Further, other: Rolled,
               clock: Clock) -> tuple[Rolled, Any]:
        """What goes on of the rollouts so far, which have been graded, and `other`, whose prompts
        are those of `more`."""
        with clock("reward"):
            groups, graded = more.keep(graded, more.grade(other.on_host, other.drawn[0]))
        with clock("rollout"):
            prompts, out = self.merge(rolled[:2], other[:2], groups)
            on_host = merged_on_host(rolled.on_host, other.on_host, groups)
            return Rolled(prompts, out, on_host, (*rolled.drawn, *other.drawn)), graded


def for_host(out: Rollout) -> Rollout:
    """A rollout without the verifier's states and routes, which no host looks at."""
    return out.replace(trunk=None, routes=None, prompt_routes=None)


def to_learn_from(out: Rollout) -> Rollout:
    """A rollout without its statistics, whose shapes are those of k: no other program depends on
    that."""
    return out.replace(stats=None)


def declare(state: TrainState, settings: UpdateSettings, *, sampling: Sampling | None = None,
            speculation: Speculation | None = None, batching: Batching | None = None,
            layout: str = "rollout") -> Step:
    """The step's programs as jits that have not run.

    Args:
      state: arrays, or `jax.ShapeDtypeStruct`s with shardings: every program takes it and gives it
        back as it is placed here, the optimizers' on the devices.
      speculation: its `depths` are set here: they follow from what the draft learns from.
      layout: of the rollout's weights.
    """
    batching = Batching() if batching is None else batching
    speculation = (Speculation() if speculation is None else speculation).replace(
        depths=learned_from(state.draft, settings))
    shardings = jax.tree.map(lambda x: x.sharding, shapes_at_work(state, settings))

    def rollout(policy, draft, prompts, sampling, k) -> Rollout:
        return jspec.rollout(policy, draft, prompts, sampling=sampling,
                             speculation=speculation.replace(k=k), batching=batching)

    def learn_draft(state, prompts, out) -> tuple[TrainState, Any]:
        return update_draft(state, make_batch(prompts, out, None), settings)

    def learn(state, reference, prompts, out, rewards) -> tuple[TrainState, Any]:
        if settings.mask_truncated:
            out = without_truncated(out)
        advantages = advantages_of(rewards, out.loss_mask, prompts.group_size, settings.advantage)
        return update(state, reference, make_batch(prompts, out, advantages), settings)

    def rescore(state, prompts, out) -> Rollout:
        return out.replace(own_logprobs=own_logprobs(state, make_batch(prompts, out, None),
                                                     settings))

    def penalise(state, reference, prompts, out, rewards) -> tuple[jax.Array, Any]:
        return penalised(state, reference, make_batch(prompts, out, None), rewards, settings)

    learning = partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    remember = None if state.draft is None else state.draft.drafter.remember
    return Step(
        settings, Sampling() if sampling is None else sampling, speculation, batching,
        reshard=jax.jit(partial(to_rollout, layout=layout)),
        rollout=jax.jit(rollout, static_argnums=4),
        draft=None if speculation.depths is None else learning(learn_draft),
        pick=None if batching.groups is None else jax.jit(
            partial(picked, shards=batch_shards(layout))),
        merge=jax.jit(merged),
        remember=remember and jax.jit(remember, donate_argnums=0, out_shardings=shardings.draft),
        rescore=jax.jit(rescore) if settings.rescores else None,
        penalise=jax.jit(penalise) if settings.kl_in_reward else None, update=learning(learn))


def declared(config: Config, state: TrainState) -> Step:
    """`declare`, as a configuration has it. Where it says k=auto, the speculation's k is 0:
    `Step.take` asks for it."""
    return declare(state, UpdateSettings.of(config), sampling=make_sampling(config),
                   speculation=make_speculation(config), batching=step_batching(config),
                   layout=rollout_layout(config))


def compiled(step: Step, state: TrainState, reference: Policy | None, prompts: PromptBatch,
             k: int | Schedule, compile: Callable[[str, jax.stages.Wrapped, tuple], Any]
             | None = None) -> tuple[Step, dict[str, Any]]:
    """The step with every program compiled, for one k and one shape of the prompts. Nothing runs.

    Args:
      state, reference, prompts: arrays, or `jax.ShapeDtypeStruct`s with shardings.
      compile: from a program's name, its jit and its arguments to a `jax.stages.Compiled`; None:
        for the devices here.

    Returns (step, the `jax.stages.Compiled`s by name).
    """
    compile = compile or (lambda name, program, arguments: program.lower(*arguments).compile())
    programs: dict[str, Any] = {}

    def made(name: str, *arguments: Any) -> Any:
        """What the program of that name gives, as shapes."""
        programs[name] = compile(name, getattr(step, name), arguments)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding,
                                                           weak_type=x.weak_type),
                            programs[name].out_info)

    policy, state = made("reshard", state.policy), shapes_at_work(state, step.settings)
    out = to_learn_from(made("rollout", policy, state.draft, prompts, step.sampling, k))
    if step.pick is not None:
        kept = jax.ShapeDtypeStruct((step.batching.groups,), np.int32)
        prompts, out = made("pick", prompts, out, kept)
    if step.draft is not None:
        made("draft", state, prompts, out)
    out = out.replace(trunk=None)
    if step.remember is not None:
        made("remember", state.draft, prompts, out)
    rows = out.lengths.shape
    rewards = jax.ShapeDtypeStruct(rows, np.float32, sharding=placement(rows, "rollout", "batch"))
    if step.rescore is not None:
        out = made("rescore", state, prompts, out)
    if step.penalise is not None:
        rewards, _ = made("penalise", state, reference, prompts, out, rewards)
    made("update", state, reference, prompts, out, rewards)

    def rollout(policy, draft, prompts, sampling, _) -> Rollout:
        return programs["rollout"](policy, draft, prompts, sampling)

    return dataclasses.replace(step, **programs | {"rollout": rollout}), programs
