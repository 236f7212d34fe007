"""The training loop: data, reshard, rollout, rewards, advantages, update, metrics, checkpoint, and again.

Everything that the user may have got wrong is looked for first, in the order of what it costs to look.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from rich.console import Console

from jspec.checkpoint import COUNTERS, Checkpoints, check_config, run_plan
from jspec.choosing import Chooser, Plan
from jspec.config import Config
from jspec.console import PlainConsole
from jspec.distributed import any_process, fetch, is_main
from jspec.drafts import Draft
from jspec.drafts.base import RUN_AWAY, largest
from jspec.health import Trouble, all_failed, never_varied, troubles
from jspec.kernels import picked
from jspec.metrics import Clock, Metrics, phase_table, table
from jspec.model import Policy, reshard
from jspec.output_dir import claimed
from jspec.prepare import (
    check,
    ends,
    make_batching,
    make_draft,
    make_policy,
    make_reference,
    make_sampling,
    make_speculation,
    make_tokenizer,
)
from jspec.profiling import trace
from jspec.progress import telling
from jspec.rl.advantages import group_advantages
from jspec.rl.answers import answer_text, reward_inputs  # noqa: F401 - answer_text is imported from here
from jspec.rl.prompts import Prompt, PromptData
from jspec.rl.rewards import FAILURES, RewardPool, answer_check
from jspec.rl.state import TrainState
from jspec.rl.update import (
    UpdateSettings,
    draft_due,
    init_state,
    learned_from,
    make_batch,
    trains_draft,
    update,
    update_draft,
)
from jspec.session import session
from jspec.sharding import make_mesh, partition
from jspec.speculate import PromptBatch, Rollout, rollout
from jspec.speculate.types import BUCKETS
from jspec.stopping import StopSignal

log = logging.getLogger(__name__)

def train(config: Config) -> int:
    """Run or resume the training that `config` describes, with metrics and checkpoints in its output_dir.

    Returns the exit code: 0 when all steps are done, 1 when the last of them taught nothing (`jspec.health`), 2 when a
    prompt of a later step cannot be used, 128 + n after signal n, with a checkpoint of sound weights to go on from
    unless they ran away before the first one was due. Raises InputError for what the user can put right, before
    anything expensive is done, and where the output_dir can no longer be written to.
    """
    stop = StopSignal()

    def make_console() -> Console:
        return PlainConsole(stop.closed_output, quiet=not is_main(), width=None if sys.stdout.isatty() else 120)

    with session(config.log_level, make_console) as opened:
        console, stack = opened.console, opened.stack
        mesh = opened.use(make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
        check(config, mesh)
        stack.enter_context(stop)
        pool = stack.enter_context(RewardPool(config.reward.function, config.reward.workers, config.reward.timeout_s))
        with telling(f"reading {config.data.source}"):
            tokenizer = make_tokenizer(config)
            data = PromptData(config.data, tokenizer, seed=config.seed,
                              check_answer=answer_check(config.reward.function, config.data.source))
        stack.enter_context(claimed(config.output_dir))
        check_config(config)
        with telling(f"loading {config.model.name}"):
            policy = make_policy(config, tokenizer)
            reference = make_reference(config, policy)
            draft = make_draft(config, policy)
        settings = UpdateSettings.of(config)
        checkpoints = stack.enter_context(Checkpoints(config.output_dir, config.checkpoint.keep))
        done, state = resume(config, checkpoints, data, init_state(policy, draft, settings, config.seed))
        if done < config.steps:
            checkpoints.check_room(state)
        del policy, draft
        metrics = stack.enter_context(Metrics(config.output_dir, done, config.steps, console, write=is_main()))
        metrics.say(opening(config, mesh, done, ends(config, state.policy.config, tokenizer)))
        run = Run(config, mesh, tokenizer, data, pool, checkpoints, metrics, stop)
        ending = loop(run, state, reference, done)
    console.print(table(metrics.records))
    console.print(phase_table(metrics.records))
    console.print(closing(config, ending), soft_wrap=True)
    return ending.code


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has besides its state: where prompts come from and where results go."""

    config: Config
    mesh: Mesh
    tokenizer: Any
    data: PromptData
    pool: RewardPool
    checkpoints: Checkpoints
    metrics: Metrics
    stop: StopSignal


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended: its exit code, steps done in all, the step of its newest checkpoint (0: none), and what was
    wrong with its last step."""

    code: int
    steps: int
    newest: int
    troubles: Sequence[Trouble] = ()


def loop(run: Run, state: TrainState, reference: Policy | None, done: int) -> Ending:
    """The steps from `done` on, with every checkpoint on disk in the end."""
    config, sampling, batching = run.config, make_sampling(run.config), make_batching(run.config)
    speculation = make_speculation(config).replace(states=learned_from(state.draft, UpdateSettings.of(config)))
    auto = config.speculation.k == "auto" and state.draft is not None
    plan = run_plan(config.output_dir) if auto else Plan()
    chooser = Chooser(sampling, speculation, batching, config.steps, run.metrics.say)
    layout = "rollout_wide" if config.mesh.rollout_tensor == "fsdp_tensor" else "rollout"
    learn, learn_draft = make_learn(config, state), make_learn_draft(config, state)
    remember = make_remember(state.draft)
    code, saving, rewardless, found = 0, 0.0, 0, []
    if done >= config.steps:
        code, found = as_it_ended(run, state)
    first = done  # which compiles
    for step in range(first, config.steps):
        clock = run.metrics.clock()
        with traced(config, step):
            with clock("data"):
                prompts = next(run.data)
                batch = make_prompt_batch(run, prompts, jax.random.fold_in(state.key, step))
            with clock("reshard"):
                weights = jax.block_until_ready(reshard(state.policy, layout=layout))
            with clock("choose"):
                if auto:
                    plan = chooser.before(plan, step, weights, state.draft, batch)
                    speculation = speculation.replace(k=plan.k)
            if step == first:
                run.metrics.say("compiling the rollout")
            with clock("rollout"):
                out = rollout(weights, state.draft, batch, sampling=sampling, speculation=speculation,
                              batching=batching)
                on_host = fetch(out.replace(trunk=None))
                out = out.replace(stats=None)  # whose shapes are those of k: no other program depends on that
            plan = plan.after(on_host) if auto else plan
            del weights  # the rollout's copy of the policy is gone before the update needs the memory
            state, of_draft = learn_draft(state, batch, out)  # only begun here: the host goes on to the rewards
            with clock("reward"):
                rewards, failures, no_rewards = grade(run, prompts, on_host)
            with clock("draft"):
                jax.block_until_ready(of_draft)
            out = out.replace(trunk=None)
            if may_wait(config):
                run.data.answered(on_host.lengths.reshape(len(prompts), -1).mean(1))
            with clock("update"):
                state = state.replace(draft=remember(state.draft, batch, out))
                state, learned = learn(state, reference, batch, out, place(run.mesh, rewards, "batch"))
                learned |= jax.tree.map(lambda x: x.tolist(), jax.device_get(of_draft)) | draft_health(config, state)
        clock.seconds["checkpoint"] = saving  # by which saving the step before has held this one up
        run.metrics.write({"step": step + 1, **describe(on_host, rewards, config.data.group_size, clock), **failures,
                           **learned, "compilations": clock.compilations(), **clock.record()})
        rewardless = rewardless + 1 if no_rewards else 0
        last = step + 1 == config.steps
        found = troubles(config, state, learned, no_rewards, rewardless, last)
        for trouble in found:
            run.metrics.say(str(trouble), "bold red")
        if same := never_varied(run.metrics.records):
            run.metrics.say(f"WARNING: {same}", "bold red")
        code = exit_code(run, found, last) or (0 if last else prompt_trouble(run))
        saving = save(run, step + 1, state, plan, found, code)
        done = step + 1
        if code:
            break
    return Ending(code, done, run.checkpoints.newest(), found)


def as_it_ended(run: Run, state: TrainState) -> tuple[int, list[Trouble]]:
    """The exit code of a run that was over already, and what was wrong with its last step."""
    rows = run.config.data.prompts_per_step * run.config.data.group_size
    written = run.metrics.records[-1:]  # of the process that writes them
    failed = any_process(any(record.get("reward_failures") == rows for record in written))
    found = troubles(run.config, state, {name: int(getattr(state, name)) for name in COUNTERS},
                     all_failed(np.zeros(rows), rows) if failed else "", 1, last=True)
    return exit_code(run, found, last=True), found


def exit_code(run: Run, found: Sequence[Trouble], last: bool) -> int:
    """Why to stop after this step, or 0; the same on every process."""
    stopped = any_process(run.stop.number is not None)
    if any(trouble.final or (last and trouble.side != "draft") for trouble in found):
        return 1
    return 128 + (run.stop.number or signal.SIGTERM) if stopped else 0


def save(run: Run, step: int, state: TrainState, plan: Plan, found: Sequence[Trouble], code: int) -> float:
    """Save where it is time to. Returns the seconds for which the loop had to wait.

    Weights that ran away are finite at first: a checkpoint waits until the updates go through again. Where the run ends
    before that, its last sound weights are saved, if they are not in a checkpoint already.
    """
    lost = {trouble.side for trouble in found if trouble.lost}
    if "policy" in lost:
        withdraw(run, step - 1, state)
        return 0.0
    last = step == run.config.steps or code > 1
    if not last and any(trouble.side != "reward" for trouble in found):
        skipped = int(state.skipped_in_row) // run.config.grpo.updates_per_rollout
        if not code or run.checkpoints.newest() >= (1 if lost else step - skipped):
            return 0.0
    elif not (last or code or step % run.config.checkpoint.every == 0):
        return 0.0
    clock = Clock()
    with clock("checkpoint"):
        run.checkpoints.save(step, state, run.data.state(), plan)
    return clock.seconds["checkpoint"]


def withdraw(run: Run, step: int, state: TrainState) -> None:
    """Set the checkpoint of weights that ran away aside, where there is an earlier one to go on from."""
    skipped = int(state.skipped_in_row) >= run.config.grpo.updates_per_rollout  # else other weights began this step
    if skipped and run.checkpoints.newest() == step and len(run.checkpoints.manager.all_steps()) > 1:
        run.metrics.say(f"the checkpoint of step {step} holds the weights that have run away: set aside")
        run.checkpoints.set_aside(step)


def prompt_trouble(run: Run) -> int:
    """2, as of any input that is wrong, once a process has found a prompt that a later step could not use; else 0."""
    trouble = run.data.trouble
    if not any_process(trouble is not None):
        return 0
    run.metrics.say(f"{trouble or 'another process has found a prompt that cannot be used'}: stopping", "bold red")
    return 2


# --- what a step is made of ---


def make_prompt_batch(run: Run, prompts: Sequence[Prompt], key: jax.Array) -> PromptBatch:
    """The step's prompts on the mesh. Every process has them all and makes the rows that its devices hold."""
    longest, expected = run.config.data.max_prompt_tokens, None
    if may_wait(run.config):  # an answer of which nothing is known may become as long as any
        expected = [run.config.sampling.max_new_tokens if prompt.expected_length is None else prompt.expected_length
                    for prompt in prompts]
    batch = PromptBatch.from_tokens([prompt.tokens for prompt in prompts], group_size=run.config.data.group_size,
                                    seed=key, buckets=(*(b for b in BUCKETS if b < longest), longest),
                                    expected_lengths=expected)
    put = partial(place, run.mesh)
    return batch.replace(tokens=put(batch.tokens, "batch", None), lengths=put(batch.lengths, "batch"),
                         sequence_ids=put(batch.sequence_ids, "batch"),
                         expected_lengths=None if expected is None else put(batch.expected_lengths, "batch"))


def may_wait(config: Config) -> bool:
    """Whether answers of a step may have to wait for others to end: then those that will be long begin first."""
    return config.rollout.slots is not None or config.rollout.kv_tokens is not None


def place(mesh: Mesh, x: Any, *axes: str | None) -> jax.Array:
    """An array that every process has whole, sharded over the mesh by logical axes."""
    x = np.asarray(x)
    sharding = NamedSharding(mesh, partition(mesh, "rollout", x.shape, axes))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def grade(run: Run, prompts: Sequence[Prompt], out: Rollout) -> tuple[np.ndarray, dict[str, int], str]:
    """Rewards float32 [N] and counts of failures, of all rows, and why nothing can be learned from them, or ""; each
    process grades its own share of them."""
    rows = np.array_split(np.arange(len(out.lengths)), jax.process_count())[jax.process_index()]
    graded = run.pool.grade(reward_inputs(run.tokenizer, prompts, out, rows))
    rewards = np.zeros(len(out.lengths), np.float32)
    rewards[rows] = graded.rewards
    counts = np.array([graded.failures[kind] for kind in FAILURES], np.int32)
    if jax.process_count() > 1:
        rewards, counts = (multihost_utils.process_allgather(x).sum(0) for x in (rewards, counts))
    by_kind = {f"reward_failures/{kind}": int(n) for kind, n in zip(FAILURES, counts, strict=True)}
    nothing = all_failed(rewards, int(counts.sum()), next(iter(graded.messages.values()), ""))
    return rewards, {"reward_failures": int(counts.sum()), **by_kind}, nothing


def jit_update(config: Config, state: TrainState) -> jax.stages.Wrapped:
    """`(state, reference, prompts, rollout, rewards) -> (state, metrics)`, jitted, the state donated."""
    settings, shardings = UpdateSettings.of(config), jax.tree.map(lambda x: x.sharding, state)

    def one(state, reference, prompts, out, rewards):
        advantages = group_advantages(rewards, config.data.group_size, config.grpo.advantage)
        return update(state, reference, make_batch(prompts, out, advantages), settings)

    return jax.jit(one, donate_argnums=0, out_shardings=(shardings, None))


def jit_update_draft(config: Config, state: TrainState) -> jax.stages.Wrapped:
    """`(state, prompts, rollout) -> (state, metrics)`, jitted, the state donated: the draft learns from the rollout."""
    settings, shardings = UpdateSettings.of(config), jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(lambda state, prompts, out: update_draft(state, make_batch(prompts, out, None), settings),
                   donate_argnums=0, out_shardings=(shardings, None))


def draft_health(config: Config, state: TrainState) -> dict[str, bool]:
    """Whether the weights of a draft that is trained are finite, and what they compute can be."""
    trained = trains_draft(state.draft, UpdateSettings.of(config))
    return {"draft_finite": float(largest(state.draft.weights)) < RUN_AWAY} if trained else {}


def make_learn(config: Config, state: TrainState) -> Callable:
    """`learn(state, reference, prompts, rollout, rewards) -> (state, record)`: one update, done `updates_per_rollout`
    times. The record holds plain numbers."""
    settings = UpdateSettings.of(config)
    compiled, trained = jit_update(config, state), trains_draft(state.draft, settings)

    def learn(state, reference, prompts, out, rewards):
        due = trained and draft_due(settings, int(state.updates))
        records = []
        for _ in range(settings.updates_per_rollout):
            state, metrics = compiled(state, reference, prompts, out, rewards)
            records.append(metrics)
        records = jax.device_get(records)
        # counts are those of the last update; the gap to the verifier means something at the first one only
        record = {name: np.mean([r[name] for r in records], axis=0).tolist() for name in records[0]
                  if due or not name.startswith("draft/")}
        record |= {name: float(records[0][name]) for name in ("logprob_gap", "logprob_gap_mean")}
        return state, record | {name: int(value) for name, value in records[-1].items() if "skipped" in name}

    return learn


def make_learn_draft(config: Config, state: TrainState) -> Callable:
    """`learn_draft(state, prompts, rollout) -> (state, metrics on the device)`: with draft.features=rollout one update
    of the draft where it is due; otherwise nothing."""
    settings = UpdateSettings.of(config)
    if learned_from(state.draft, settings) is None:
        return lambda state, prompts, out: (state, {})
    compiled = jit_update_draft(config, state)

    def learn_draft(state, prompts, out):
        return compiled(state, prompts, out) if draft_due(settings, int(state.updates)) else (state, {})

    return learn_draft


def make_remember(draft: Draft | None) -> Callable:
    """`remember(draft, prompts, rollout) -> draft`: the drafter's own, jitted and donated; nothing if it has none."""
    if draft is None or not hasattr(draft.module, "remember"):
        return lambda draft, prompts, out: draft
    shardings = jax.tree.map(lambda x: x.sharding, draft)
    return jax.jit(draft.module.remember, donate_argnums=0, out_shardings=shardings)


def describe(out: Rollout, rewards: np.ndarray, group_size: int, clock: Clock) -> dict[str, Any]:
    """The rollout, and the rewards of its groups, in numbers."""
    stats, tokens = out.stats, int(out.lengths.sum())
    rewards = rewards.astype(np.float64)  # the squares of large ones are beyond float32
    record = {"reward": float(rewards.mean()), "reward_std": float(rewards.std()),
              "reward_differs": float((np.ptp(rewards.reshape(-1, group_size), axis=1) > 0).mean()),
              "length": float(out.lengths.mean()), "finished": float(out.finished.mean()), "tokens": tokens,
              # of a rollout that was compiled first it would be no rate
              "tokens_per_second": None if clock.compiling["rollout"] else round(tokens / clock.seconds["rollout"], 2),
              "acceptance_length": tokens / int(stats.cycles.sum()), "occupancy": float(stats.occupancy),
              "kv_blocks": int(stats.blocks.max()), "pauses": int(stats.pauses.sum()),
              "loop_rows": list(stats.slots), "loop_k": list(stats.ks),
              "loop_cycles": stats.loop_cycles.sum(0).tolist()}
    if stats.drafted.sum():
        record["drafted"] = int(stats.drafted.sum())
        record["acceptance"] = float(stats.accepted.sum() / stats.drafted.sum())
        record["acceptance_by_position"] = (stats.accepted / np.maximum(stats.drafted, 1)).tolist()
    return record


def traced(config: Config, step: int) -> AbstractContextManager:
    """The profiler, around the one step that the configuration asks for."""
    return trace(Path(config.output_dir) / "trace") if step + 1 == config.profile.trace_step else nullcontext()


def resume(config: Config, checkpoints: Checkpoints, data: PromptData, state: TrainState) -> tuple[int, TrainState]:
    """(steps done, state) of the latest checkpoint, with `data` set to its position; or (0, state)."""
    restored = checkpoints.restore(state)
    if restored is None:
        return 0, state
    done, state, position = restored
    data.restore(position)
    if data.trouble and done < config.steps:
        raise data.trouble
    return done, state


# --- around it ---


def opening(config: Config, mesh: Mesh, done: int, ends: str) -> str:
    """The first line of a run."""
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    draft = "no draft" if config.draft.name == "none" else f"{config.draft.name} drafts, k = {config.speculation.k}"
    start = f"going on after step {done}" if done else "the first step compiles"
    return (f"{config.model.name} on {mesh.size} {jax.default_backend()} device(s) ({shape}), {draft}, "
            f"{picked(config.speculation.kernels)}, {ends}; {start}")


def closing(config: Config, ending: Ending) -> str:
    """The last line of a run."""
    where = f"metrics and checkpoints are in {config.output_dir}"
    if ending.code > 1:
        return f"stopped after step {ending.steps} of {config.steps}; {where}; the same command goes on"
    if not ending.code:
        return f"all {config.steps} steps are done; {where}"
    begin = (f"stopped at step {ending.steps} of {config.steps}" if ending.steps < config.steps else
             f"all {config.steps} steps are done, but the last one taught nothing")
    why = next(trouble for trouble in ending.troubles if trouble.final or trouble.side != "draft")
    where = f"{where}, the newest of step {ending.newest}" if ending.newest else (
        f"metrics are in {config.output_dir}, and no checkpoint")
    return f"{begin}: {why.what}: {why.remedy}; {where}"
