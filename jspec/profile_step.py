"""`jspec profile`: a training step, compiled as `jspec train` compiles it, timed, traced and split
into phases.

A draft that is trained at every n-th step has its n-th part in the figures: they are means over n
steps.
"""

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from jspec.base_model import BaseModel
from jspec.choosing import Chooser, Plan
from jspec.clock import PHASES, Clock
from jspec.config import Config
from jspec.model import Policy
from jspec.output import open_directory, screen
from jspec.prepare import check, make_draft, make_reference, make_state, make_state_specs
from jspec.profiling import (
    PARTS,
    SCOPES,
    Phase,
    in_order,
    length,
    loop_name,
    meaning,
    memory_of,
    module_name,
    name_phases,
    phases_of_program,
    spans_by_phase,
    trace,
)
from jspec.progress import say, telling
from jspec.rl.collate import collate
from jspec.rl.grading import Grades
from jspec.rl.groups import Drawn
from jspec.rl.prompts import PromptData
from jspec.rl.state import TrainState
from jspec.rl.update_settings import trains_draft
from jspec.session import session
from jspec.sharding import configured_mesh
from jspec.speculate import PromptBatch, Rollout
from jspec.speculate.types import Schedule
from jspec.step import Step, Taken, compiled, declared
from pallas_kernels.noise import seed_key

WORDS = "what it is"

LEARNING = ("policy_loss", "draft_loss", "optimizer", "draft_optimizer", "update", "draft")
"""Phases, and programs whose rest is one, in which policy and draft learn."""


@dataclasses.dataclass(frozen=True)
class Profiled:
    """A step that is taken again and again, on the same prompts.

    Attributes:
      step: compiled. programs: what of it was, by name.
      state, reference, prompts: what it is taken of. k: what its rollout drafts.
    """

    step: Step
    programs: Mapping[str, Any]
    state: TrainState
    reference: Policy | None
    prompts: PromptBatch
    k: int | Schedule

    def take(self, clock: Clock) -> tuple["Profiled", Taken]:
        """Returns (the step after it, what this one did)."""
        state, taken = self.step.take(self.state, self.reference, self.prompts, clock,
                                      choose=lambda *_: self.k, grade=in_turn)
        return dataclasses.replace(self, state=state), taken


def in_turn(out: Rollout, _: Drawn) -> Grades:
    """Rewards are the host's work and no part of a profile: here they are 1 and 0 in turn, so that
    every token is trained."""
    return Grades(np.resize(np.float32([1, 0]), out.lengths.shape), {}, "")


def compile_step(config: Config, mesh: Mesh) -> Profiled:
    """The step of a configuration, compiled as the training loop compiles it for its first prompts.
    Weights are read when all has compiled; but with k=auto what cycles cost is measured first."""
    base = BaseModel.of(config)
    check(config, mesh, base)
    prompts = collate(config, next(PromptData(config.data, base.tokenizer, seed=config.seed)),
                      seed_key(config.seed))
    specs = make_state_specs(config, base.shape)
    step = declared(config, specs)
    k, policy = step.speculation.k, None
    if config.speculation.k == "auto" and specs.draft is not None:
        policy = load(base)
        chooser = Chooser(step.sampling, step.speculation, step.batching, config.steps, say)
        k = chooser.before(Plan(), 0, step.reshard(policy), make_draft(config, policy), prompts).k

    def compile(name: str, program: jax.stages.Wrapped, arguments: tuple) -> jax.stages.Compiled:
        with telling(f"compiling {name}"):
            return program.lower(*arguments).compile()

    step, programs = compiled(step, specs, make_reference(config, specs.policy), prompts, k,
                              compile)
    policy = policy or load(base)
    reference = make_reference(config, policy)
    return Profiled(step, programs, make_state(config, policy), reference, prompts, k)


def load(base: BaseModel) -> Policy:
    """The policy before the first step."""
    with telling(f"loading {base.section.name}"):
        return base.policy()


def profile(config: Config, directory: Path) -> int:
    """`jspec profile`: prints the table, and writes trace and profile.json under `directory`."""
    directory = open_directory(directory, "--out")
    clock = Clock()
    with session(config.log_level) as opened:
        console = screen(width=None if sys.stdout.isatty() else 120)
        # else a program that was kept may come back with the scopes of the source that it was
        # compiled from
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
        mesh = opened.use(configured_mesh(config.mesh))
        profiled = compile_step(config, mesh)
        settings, programs = profiled.step.settings, profiled.programs
        period = settings.draft_every if trains_draft(profiled.state.draft, settings) else 1
        with telling("timing steps", total=1 + config.profile.repeats * period) as advance:
            profiled, _ = profiled.take(Clock())
            for _ in range(config.profile.repeats * period):
                advance()
                profiled, taken = profiled.take(clock)
        with telling("tracing"), trace(directory):
            for number in range(period):
                with jax.profiler.StepTraceAnnotation("step", step_num=number):
                    profiled, _ = profiled.take(Clock())
    # other programs are timed in the phase that they are part of
    phases = [name for name in programs if name in PHASES]
    seconds = {name: clock.seconds[name] / config.profile.repeats / period
               for name in (*phases, *("moments",) * settings.moves_state)}
    with telling("reading the trace"):
        known = {}
        for name, program in programs.items():
            text = program.as_text()
            known[module_name(text)] = phases_of_program(text, name if name in SCOPES
                                                         else f"{name}, rest")
        spans = spans_by_phase(directory, known)
        perfetto = name_phases(directory, spans)
    phases = {phase: length(found) / 1e9 / period for phase, found in spans.items()}
    memory = {name: memory_of(program) for name, program in programs.items()}
    tokens, updates = int(taken.rollout.lengths.sum()), len(taken.updates)
    report(console, config, seconds, phases, memory, tokens, updates, period)
    record = {"seconds": seconds, "memory_bytes": memory, "tokens": tokens, "updates": updates,
              "draft_share_of_update": draft_share(phases),
              "phases": [dataclasses.asdict(phase) | {"seconds": spent}
                         for phase, spent in phases.items()]}
    (directory / "profile.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"Perfetto (ui.perfetto.dev; the phases are its first tracks): {perfetto}\n"
                  f"XProf (pip install xprof): xprof {directory}", soft_wrap=True, markup=False)
    return 0


def report(console: Console, config: Config, seconds: Mapping[str, float],
           phases: Mapping[Phase, float],
           memory: Mapping[str, Mapping[str, int]], tokens: int, updates: int, period: int) -> None:
    """Prints seconds of the step's programs, of the phases in them, and their memory: means over
    `period` steps."""
    rows = config.data.prompts_per_step * config.data.group_size
    console.print(f"One step of {config.model.name}: {rows} rows, {tokens} new tokens, draft "
                  f"{config.draft.name}, k = {config.speculation.k}. Rewards are not part of it.",
                  highlight=False)
    if period > 1:
        console.print(f"Means over {period} steps: the draft learns at one.", highlight=False)
    step = sum(seconds.values())
    table = Table("program", "seconds", "share", title="timed, without the profiler")
    for name, spent in seconds.items():
        table.add_row(f"{updates} updates" if name == "update" and updates > 1 else name,
                      f"{spent:.3f}", f"{spent / step:.1%}")
    table.add_row("whole step", f"{step:.3f}", "", style="bold")
    console.print(right_justified(table))
    console.print(right_justified(phase_table(phases)))
    if any(phase.loop for phase in phases):
        console.print(right_justified(loop_table(phases)))
    if share := draft_share(phases):
        console.print(f"Training the draft takes {share:.1%} of the update.", highlight=False)
    table = Table("program", *next(iter(memory.values())), title="compiled memory, MiB a device")
    for name, sizes in memory.items():
        table.add_row(name, *(f"{size / 2**20:,.1f}" for size in sizes.values()))
    console.print(right_justified(table))


def summed(phases: Mapping[Phase, float], key: Callable[[Phase], Any]) -> dict[Any, float]:
    """The seconds of phases that `key` calls the same, as a step goes through them."""
    seconds: dict[Any, float] = defaultdict(float)
    for phase in sorted(phases, key=in_order):
        seconds[key(phase)] += phases[phase]
    return seconds


def phase_table(phases: Mapping[Phase, float]) -> Table:
    """Seconds by phase, and by part in it."""
    traced = sum(phases.values())
    table = Table("phase", "seconds", "share", WORDS, title="by phase, from the trace")
    by_part = summed(phases, lambda phase: (phase.name, phase.part))
    for name, spent in summed(phases, lambda phase: phase.name).items():
        table.add_row(name, f"{spent:.3f}", f"{spent / traced:.1%}", meaning(name))
        for part in (part for part in PARTS if (name, part) in by_part):
            spent = by_part[name, part]
            table.add_row(f"  {part}", f"{spent:.3f}", f"{spent / traced:.1%}", style="dim")
    table.add_row("operations, all", f"{traced:.3f}", "", style="bold")
    return table


def loop_table(phases: Mapping[Phase, float]) -> Table:
    """Seconds by loop of the chain, the one of the most rows first."""
    traced, seconds = sum(phases.values()), summed(phases, lambda phase: phase.loop)
    table = Table("loop", "seconds", "share", title="of it decoding, by loop of the chain")
    for rows in sorted(filter(None, seconds), reverse=True):
        table.add_row(loop_name(rows), f"{seconds[rows]:.3f}", f"{seconds[rows] / traced:.1%}")
    return table


def draft_share(phases: Mapping[Phase, float]) -> float:
    """The draft's part of the seconds in which policy and draft learn."""
    learning = {phase: spent
                for phase, spent in phases.items() if phase.name.split(",")[0] in LEARNING}
    of_draft = sum(spent for phase, spent in learning.items() if phase.name.startswith("draft"))
    return of_draft / sum(learning.values())


def right_justified(table: Table) -> Table:
    """Numbers, all columns but the first and what is said in words, to the right."""
    for column in table.columns[1:]:
        column.justify = "left" if column.header == WORDS else "right"
    return table
