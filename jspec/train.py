"""The training loop: data, the step (`jspec.step`) and the rewards in it, metrics, checkpoint, and
again.

Everything that the user may have got wrong is looked for first, in the order of what it costs to
look.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jspec.base_model import BaseModel
from jspec.best import unknown
from jspec.checkpoint import Checkpoints
from jspec.choosing import Chooser, Plan
from jspec.clock import Clock
from jspec.config import Config
from jspec.console import PlainConsole
from jspec.distributed import any_process, is_main
from jspec.drafts import Draft
from jspec.evaluator import Evaluation
from jspec.health import Trouble, all_failed, never_taught, troubles
from jspec.metrics import Metrics, phase_table, table
from jspec.model import Policy
from jspec.output_dir import claimed
from jspec.prepare import check, ends, make_prompts, make_state_specs
from jspec.profiling import trace
from jspec.progress import telling
from jspec.refill import Refill

# what a run grades, for programs that ask it
from jspec.rl.answers import answer_text as answer_text
from jspec.rl.collate import collate, may_wait
from jspec.rl.curriculum import success_rates
from jspec.rl.grading import Grades, grade, ungraded
from jspec.rl.groups import Drawn
from jspec.rl.prompts import Prompt, PromptData
from jspec.rl.rewards import RewardPool
from jspec.rl.state import COUNTERS, TrainState
from jspec.run_dir import keep_config, run_plan
from jspec.run_lines import Ending, closing, opening
from jspec.saving import Saver, begin
from jspec.session import session
from jspec.settings import flat
from jspec.sharding import configured_mesh
from jspec.source_parts import in_short
from jspec.speculate import PromptBatch, Rollout
from jspec.speculate.types import Schedule
from jspec.step import Step, declared
from jspec.step_record import described, draft_health, dropped, learned, of_prompts, samples
from jspec.stopping import StopSignal


def train(config: Config) -> int:
    """Run or resume the training that `config` describes, with metrics and checkpoints in its
    output_dir.

    Returns the exit code: 0 when all steps are done, 1 when the last of them taught nothing
    (`jspec.health`), 2 when a prompt of a later step cannot be used, 128 + n after signal n, with a
    checkpoint of sound weights to go on from unless they ran away before the first one was due.
    Raises InputError for what the user can put right, before anything expensive is done, and where
    the output_dir can no longer be written to.
    """
    stop = StopSignal()

    def make_console() -> PlainConsole:
        return PlainConsole(stop.closed_output, quiet=not is_main(),
                            width=None if sys.stdout.isatty() else 120)

    with session(config.log_level, make_console) as opened:
        console, stack = opened.console, opened.stack
        mesh = opened.use(configured_mesh(config.mesh))
        base = BaseModel.of(config)
        check(config, mesh, base)
        stack.enter_context(stop)
        pool = stack.enter_context(RewardPool.of(config))
        with telling(f"reading {in_short(config.data.source)}"):
            tokenizer = base.tokenizer
            data = make_prompts(config, tokenizer)
        stack.enter_context(claimed(config.output_dir))
        changed = keep_config(config)
        checkpoints = stack.enter_context(Checkpoints(
            config.output_dir, config.checkpoint.keep, config.checkpoint.best,
            config.checkpoint.best_is, draft_elsewhere=config.draft.elsewhere is not None))
        specs = make_state_specs(config, base.shape)
        evaluation = Evaluation.of(config, tokenizer, pool, base.shape, specs.draft)
        done, state, reference = begin(config, base, checkpoints, data, specs)
        metrics = stack.enter_context(Metrics(config.output_dir, done, config.steps, console,
                                              is_main(), config.logging, flat(config)))
        metrics.say(opening(config, mesh, done, ends(config, state.policy.config, tokenizer)))
        if changed:
            metrics.say(changed)
        if data.left_out:
            metrics.say(data.records.said_of_left_out(config.data.max_prompt_tokens))
        run = Run(config, tokenizer, data, pool, Saver(config, checkpoints, data), metrics, stop,
                  evaluation)
        ending = loop(run, state, reference, done)
    console.print(table(metrics.records))
    console.print(phase_table(metrics.records))
    console.print(closing(config, ending), soft_wrap=True)
    return ending.code


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has besides its state: where prompts come from and where results go."""

    config: Config
    tokenizer: Any
    data: PromptData
    pool: RewardPool
    saver: Saver
    metrics: Metrics
    stop: StopSignal
    evaluation: Evaluation | None


def loop(run: Run, state: TrainState, reference: Policy | None, done: int) -> Ending:
    """The steps from `done` on, with every checkpoint on disk in the end."""
    config, step = run.config, declared(run.config, state)
    auto = config.speculation.k == "auto" and state.draft is not None
    plan = run_plan(config.output_dir) if auto else Plan()
    chooser = Chooser(step.sampling, step.speculation, step.batching, config.steps, run.metrics.say)
    code, found = as_it_ended(run, state) if done >= config.steps else (0, [])
    first, saving, rewardless = done, 0.0, 0
    if not done:
        before_the_first(run, step, state, plan)

    def choose(policy: Policy, draft: Draft | None, batch: PromptBatch) -> int | Schedule:
        nonlocal plan
        if auto:
            plan = chooser.before(plan, done, policy, draft, batch)
        if done == first:
            run.metrics.say("compiling the rollout")
        return plan.k if auto else step.speculation.k

    while done < config.steps and not code:
        clock = run.metrics.clock()
        with traced(config, done + 1):
            with clock("data"):
                prompts, key = next(run.data), jax.random.fold_in(state.key, done)
                batch = collate(config, prompts, key)
            refill = Refill(config, run.data, key, prompts, partial(graded, run))
            state, taken = step.take(state, reference, batch, clock, choose=choose,
                                     grade=refill.first, further=refill.asked)
            record = learned(taken) | draft_health(state.draft, step.settings) | refill.record()
            record |= of_prompts(run.data, refill.prompts, taken) | dropped(taken.drawn)
        done += 1
        out, grades = taken.rollout, taken.graded
        if auto:
            plan = plan.after(out.stats, taken.drawn[0].lengths)
        record |= evaluated(run, step, state, plan, done, clock)
        clock.seconds["checkpoint"] = saving  # by which saving the step before has held this one up
        run.metrics.write_samples(done, samples(done, config.logging.samples, run.tokenizer,
                                                refill.prompts, out, grades))
        record = {"step": done, **described(out, grades.rewards, config.data.group_size, clock),
                  **grades.record(), **record, "compilations": clock.compilations(),
                  **clock.record()}
        run.metrics.write(record)
        useless = all_failed(grades.rewards, grades.ungraded, grades.message)
        rewardless = rewardless + 1 if useless else 0
        last = done == config.steps
        found = troubles(config, state, record, useless, rewardless)
        say(run, found, record, done == first + 1)
        code = exit_code(run, found, last) or (0 if last else prompt_trouble(run))
        saving = run.saver.save(done, state, plan, found, code, record)
    checkpoints = run.saver.checkpoints
    return Ending(code, done, checkpoints.newest(), found, checkpoints.best())


def graded(run: Run, prompts: Sequence[Prompt], out: Rollout, drawn: Drawn) -> Grades:
    """Grades of a rollout of these of the prompts that were drawn last; how long their answers are,
    and how good, is remembered."""
    which = drawn.kept.tolist()
    if may_wait(run.config):
        run.data.answered(which, drawn.lengths[which].mean(1))
    grades = grade(run.pool, run.tokenizer, prompts, out)
    run.data.solved(which, success_rates(grades.rewards, grades.failed_rows, len(prompts)))
    return grades


def before_the_first(run: Run, step: Step, state: TrainState, plan: Plan) -> None:
    """Writes what the policy that a run begins with scores, as a record of step 0."""
    clock = run.metrics.clock()
    if record := evaluated(run, step, state, plan, 0, clock):
        run.metrics.write({"step": 0, **record, **clock.record()})


def evaluated(run: Run, step: Step, state: TrainState, plan: Plan, done: int,
              clock: Clock) -> dict[str, float | int | None]:
    """The fields of an evaluation after `done` steps; none where there is none."""
    if run.evaluation is None or not run.evaluation.due(done):
        return {}
    with clock("evaluation"):
        jax.block_until_ready(state)  # as before a rollout
        return run.evaluation.record(step.reshard(state.policy), state.draft, plan.k or 0)


def traced(config: Config, step: int) -> AbstractContextManager:
    """The profiler, around the one step that the configuration asks for."""
    return (trace(Path(config.output_dir) / "trace") if step == config.profile.trace_step
            else nullcontext())


def say(run: Run, found: Sequence[Trouble], record: Mapping[str, Any],
        first: bool) -> None:
    """Say whether the step that was just written is the best one, what is wrong with it, and with
    the run's first steps together. first: of this start."""
    if run.saver.checkpoints.better(record):
        best = run.config.checkpoint.best
        run.metrics.say(f"the best {best} so far: {record[best]:.4g}")
    for trouble in found:
        run.metrics.say(str(trouble), "bold red")
    if same := never_taught(run.metrics.records):
        run.metrics.say(f"WARNING: {same}", "bold red")
    if first and (said := unknown(run.config.checkpoint.best, record)):
        run.metrics.say(f"WARNING: {said}", "bold red")


def as_it_ended(run: Run, state: TrainState) -> tuple[int, list[Trouble]]:
    """The exit code of a run that was over already, and what was wrong with its last step."""
    rows = run.config.data.prompts_per_step * run.config.data.group_size
    written = run.metrics.records[-1:]  # of the process that writes them
    failed = any_process(any(ungraded(record) == rows for record in written))
    found = troubles(run.config, state, {name: int(getattr(state, name)) for name in COUNTERS},
                     all_failed(np.zeros(rows), rows) if failed else "", 1)
    return exit_code(run, found, last=True), found


def exit_code(run: Run, found: Sequence[Trouble], last: bool) -> int:
    """Why to stop after this step, or 0; the same on every process."""
    stopped = any_process(run.stop.number is not None)
    if any(trouble.final or (last and trouble.side != "draft") for trouble in found):
        return 1
    return 128 + (run.stop.number or signal.SIGTERM) if stopped else 0


def prompt_trouble(run: Run) -> int:
    """2, as of any input that is wrong, once a process has found a prompt that a later step could
    not use; else 0."""
    trouble = run.data.trouble
    if not any_process(trouble is not None):
        return 0
    run.metrics.say(f"{trouble or 'another process has found a prompt that cannot be used'}: "
                    "stopping", "bold red")
    return 2
