"""`jspec profile`: a training step, compiled as `jspec train` compiles it, timed, traced and split into phases.

A draft that is trained at every n-th step has its n-th part in the figures: they are means over n steps.
"""

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

import jspec
from jspec.choosing import Chooser, Plan
from jspec.config import Config
from jspec.metrics import Clock
from jspec.model import to_rollout
from jspec.output import open_directory, screen
from jspec.prepare import (
    check,
    make_batching,
    make_draft,
    make_policy,
    make_reference,
    make_sampling,
    make_speculation,
    make_tokenizer,
)
from jspec.profiling import (
    PARTS,
    PHASES,
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
from jspec.rl.prompts import PromptData
from jspec.rl.state import TrainState
from jspec.rl.update import UpdateSettings, draft_due, init_state, learned_from, trains_draft
from jspec.session import session
from jspec.sharding import make_mesh
from jspec.train import Run, jit_update, jit_update_draft, make_prompt_batch, place
from pallas_kernels.noise import seed_key

WORDS = "what it is"

LEARNING = ("policy_loss", "draft_loss", "optimizer", "draft_optimizer", "update", "draft")
"""Phases, and programs whose rest is one, in which policy and draft learn."""


@dataclasses.dataclass(frozen=True)
class Step:
    """The compiled programs of a step, and what they start from. `draft` is one of them with draft.features=rollout."""

    settings: UpdateSettings
    programs: Mapping[str, Any]
    state: TrainState
    reference: Any
    prompts: Any
    rewards: jax.Array

    def run(self, clock: Clock) -> tuple["Step", Any]:
        """Runs the programs, each a phase of the clock. Returns (the step after it, its rollout)."""
        with clock("reshard"):
            policy = jax.block_until_ready(self.programs["reshard"](self.state.policy))
        with clock("rollout"):
            out = jax.block_until_ready(self.programs["rollout"](policy, self.state.draft, self.prompts))
        del policy  # as in training: the rollout's weights are gone before the update needs memory
        state = self.state
        if "draft" in self.programs and draft_due(self.settings, int(state.updates)):
            with clock("draft"):
                state, _ = jax.block_until_ready(self.programs["draft"](state, self.prompts, out))
        out = out.replace(trunk=None)
        with clock("update"):
            state, _ = jax.block_until_ready(
                self.programs["update"](state, self.reference, self.prompts, out, self.rewards))
        return dataclasses.replace(self, state=state), out


def compile_step(config: Config, mesh: Mesh) -> Step:
    """Compiles the step of a configuration, as the training loop does, for its first prompts.

    Rewards are the host's work and no part of it: here they are 1 and 0 in turn, so that every token is trained.
    """
    check(config, mesh)
    tokenizer, settings = make_tokenizer(config), UpdateSettings.of(config)
    data = PromptData(config.data, tokenizer, seed=config.seed)
    with telling(f"loading {config.model.name}"):
        policy = make_policy(config, tokenizer)
        reference = make_reference(config, policy)
        draft = make_draft(config, policy)
    run = Run(config, mesh, tokenizer, data, pool=None, checkpoints=None, metrics=None, stop=None)
    prompts = make_prompt_batch(run, next(data), seed_key(config.seed))
    rewards = place(mesh, np.resize(np.float32([1, 0]), prompts.sequence_ids.shape), "batch")
    state = init_state(policy, draft, settings, config.seed)
    layout = "rollout_wide" if config.mesh.rollout_tensor == "fsdp_tensor" else "rollout"
    states = learned_from(draft, settings)
    speculation, sampling, batching = make_speculation(config).replace(states=states), make_sampling(config), (
        make_batching(config))

    def compiled(name, program, *arguments):
        with telling(f"compiling {name}"):
            programs[name] = program.lower(*arguments).compile()
            return programs[name]

    programs: dict[str, Any] = {}
    resharded = compiled("reshard", jax.jit(partial(to_rollout, layout=layout)), policy)(policy)
    if config.speculation.k == "auto" and draft is not None:
        chooser = Chooser(sampling, speculation, batching, config.steps, say)
        speculation = speculation.replace(k=chooser.before(Plan(), 0, resharded, draft, prompts).k)
    rollout = jax.jit(partial(jspec.rollout, sampling=sampling, speculation=speculation, batching=batching))
    rollout = compiled("rollout", rollout, resharded, draft, prompts)
    with telling("decoding"):
        out = jax.block_until_ready(rollout(resharded, draft, prompts))
    if states is not None:
        compiled("draft", jit_update_draft(config, state), state, prompts, out)
        out = out.replace(trunk=None)
    compiled("update", jit_update(config, state), state, reference, prompts, out, rewards)
    return Step(settings, programs, state, reference, prompts, rewards)


def profile(config: Config, directory: Path) -> int:
    """`jspec profile`: prints the table, and writes trace and profile.json under `directory`."""
    directory = open_directory(directory, "--out")
    clock = Clock()
    with session(config.log_level) as opened:
        console = screen(width=None if sys.stdout.isatty() else 120)
        # else a program that was kept may come back with the scopes of the source that it was compiled from
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
        mesh = opened.use(make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor))
        step = compile_step(config, mesh)
        period = step.settings.draft_every if trains_draft(step.state.draft, step.settings) else 1
        with telling("timing steps", total=1 + config.profile.repeats * period) as advance:
            step, _ = step.run(Clock())
            for _ in range(config.profile.repeats * period):
                advance()
                step, out = step.run(clock)
        with telling("tracing"), trace(directory):
            for number in range(period):
                with jax.profiler.StepTraceAnnotation("step", step_num=number):
                    step, _ = step.run(Clock())
    seconds = {name: total / config.profile.repeats / period for name, total in clock.seconds.items()}
    with telling("reading the trace"):
        known = {}
        for name, compiled in step.programs.items():
            text = compiled.as_text()
            known[module_name(text)] = phases_of_program(text, name if name in PHASES else f"{name}, rest")
        spans = spans_by_phase(directory, known)
        perfetto = name_phases(directory, spans)
    phases = {phase: length(found) / 1e9 / period for phase, found in spans.items()}
    memory = {name: memory_of(compiled) for name, compiled in step.programs.items()}
    report(console, config, seconds, phases, memory, int(out.lengths.sum()), period)
    record = {"seconds": seconds, "memory_bytes": memory, "tokens": int(out.lengths.sum()),
              "draft_share_of_update": draft_share(phases),
              "phases": [dataclasses.asdict(phase) | {"seconds": spent} for phase, spent in phases.items()]}
    (directory / "profile.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"Perfetto (ui.perfetto.dev; the phases are its first tracks): {perfetto}\n"
                  f"XProf (pip install xprof): xprof {directory}", soft_wrap=True, markup=False)
    return 0


def report(console: Console, config: Config, seconds: Mapping[str, float], phases: Mapping[Phase, float],
           memory: Mapping[str, Mapping[str, int]], tokens: int, period: int) -> None:
    """Prints seconds of the step's programs, of the phases in them, and their memory: means over `period` steps."""
    rows = config.data.prompts_per_step * config.data.group_size
    console.print(f"One step of {config.model.name}: {rows} rows, {tokens} new tokens, draft {config.draft.name}, "
                  f"k = {config.speculation.k}. Rewards are not part of it.", highlight=False)
    if period > 1:
        console.print(f"Means over {period} steps: the draft learns at one.", highlight=False)
    step = sum(seconds.values())
    table = Table("program", "seconds", "share", title="timed, without the profiler")
    for name, spent in seconds.items():
        table.add_row(name, f"{spent:.3f}", f"{spent / step:.1%}")
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
    learning = {phase: spent for phase, spent in phases.items() if phase.name.split(",")[0] in LEARNING}
    of_draft = sum(spent for phase, spent in learning.items() if phase.name.startswith("draft"))
    return of_draft / sum(learning.values())


def right_justified(table: Table) -> Table:
    """Numbers, all columns but the first and what is said in words, to the right."""
    for column in table.columns[1:]:
        column.justify = "left" if column.header == WORDS else "right"
    return table
