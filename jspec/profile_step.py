"""`jspec profile`: one training step, compiled as `jspec train` compiles it, timed, traced and split into phases."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jspec
from jspec.config import Config
from jspec.model import to_rollout
from jspec.profiling import PARTS, PHASES, Phase, memory_of, module_name, phases_of_program, seconds_by_phase, trace
from jspec.rl.prompts import PromptData
from jspec.rl.state import TrainState
from jspec.rl.update import UpdateSettings, init_state, make_batch, update
from jspec.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Step:
    """The three compiled programs of a step, and what they start from."""

    programs: Mapping[str, Any]
    state: TrainState
    reference: Any
    prompts: Any
    advantages: jax.Array

    def run(self, clock: Callable[[str, float], None] = lambda name, seconds: None) -> tuple["Step", Any]:
        """Runs reshard, rollout and update, telling `clock` the seconds of each. Returns (next step, rollout)."""
        def timed(name, *arguments):
            start = time.perf_counter()
            out = jax.block_until_ready(self.programs[name](*arguments))
            clock(name, time.perf_counter() - start)
            return out

        policy = timed("reshard", self.state.policy)
        out = timed("rollout", policy, self.state.draft, self.prompts)
        del policy  # as in training: the rollout's weights are gone before the update needs memory
        state, _ = timed("update", self.state, self.reference, self.prompts, out, self.advantages)
        return dataclasses.replace(self, state=state), out


def compile_step(config: Config) -> Step:
    """Compiles the step of a configuration, on the mesh of `jax.set_mesh`. Rewards are left out: they are the host's.

    Advantages are +1 and -1 in turn, so that every token is trained.
    """
    from jspec.train import make_draft, make_policy, make_sampling, make_tokenizer

    tokenizer = make_tokenizer(config)
    policy = make_policy(config, tokenizer)
    draft = make_draft(config, policy)
    settings = UpdateSettings.of(config)
    reference = jax.tree.map(jnp.copy, policy) if config.grpo.kl_weight else None
    state = init_state(policy, draft, settings, config.seed)
    chosen = next(PromptData(config.data, tokenizer, seed=config.seed))
    prompts = jspec.PromptBatch.from_tokens([p.tokens for p in chosen], group_size=config.data.group_size,
                                            seed=config.seed)
    advantages = jnp.asarray(np.resize([1.0, -1.0], prompts.sequence_ids.shape), jnp.float32)
    speculation = jspec.Speculation(k=config.speculation.k, rule=config.speculation.rule)

    def learn(state, reference, prompts, out, advantages):
        return update(state, reference, make_batch(prompts, out, advantages), settings)

    layout = "rollout_wide" if config.mesh.rollout_tensor == "fsdp_tensor" else "rollout"
    reshard = jax.jit(partial(to_rollout, layout=layout)).lower(policy).compile()
    resharded = reshard(policy)
    rollout = jax.jit(partial(jspec.rollout, sampling=make_sampling(config), speculation=speculation))
    rollout = rollout.lower(resharded, draft, prompts).compile()
    out = rollout(resharded, draft, prompts)
    learn = jax.jit(learn, donate_argnums=0).lower(state, reference, prompts, out, advantages).compile()
    return Step({"reshard": reshard, "rollout": rollout, "update": learn}, state, reference, prompts, advantages)


def profile(config: Config, directory: Path) -> int:
    """`jspec profile`: prints the table, and writes trace and profile.json under `directory`."""
    console = Console()
    mesh = config.mesh
    with jax.set_mesh(make_mesh(mesh.data, mesh.fsdp, mesh.tensor)):
        with console.status("compiling"):
            step = compile_step(config)
        with console.status("timing"):
            step, _ = step.run()
            seconds: dict[str, float] = dict.fromkeys(step.programs, 0.0)

            def clock(name: str, spent: float) -> None:
                seconds[name] += spent / config.profile.repeats

            for _ in range(config.profile.repeats):
                step, out = step.run(clock)
        with console.status("tracing"), trace(directory):
            step.run()
    with console.status("reading the trace"):
        known = {}
        for name, compiled in step.programs.items():
            text = compiled.as_text()
            known[module_name(text)] = phases_of_program(text, name if name in PHASES else f"{name}, rest")
        phases = seconds_by_phase(directory, known)
    memory = {name: memory_of(compiled) for name, compiled in step.programs.items()}
    report(console, config, seconds, phases, memory, int(out.lengths.sum()))
    record = {"seconds": seconds, "memory_bytes": memory, "tokens": int(out.lengths.sum()),
              "phases": [dataclasses.asdict(phase) | {"seconds": spent} for phase, spent in phases.items()]}
    (directory / "profile.json").write_text(json.dumps(record, indent=2) + "\n")
    newest = max(directory.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    console.print(f"Perfetto (ui.perfetto.dev): {newest}\nXProf (pip install xprof): xprof {directory}", soft_wrap=True)
    return 0


def report(console: Console, config: Config, seconds: Mapping[str, float], phases: Mapping[Phase, float],
           memory: Mapping[str, Mapping[str, int]], tokens: int) -> None:
    """Prints seconds of the step's programs, of the phases in them, and their memory."""
    rows = config.data.prompts_per_step * config.data.group_size
    console.print(f"One step of {config.model.name}: {rows} rows, {tokens} new tokens, draft {config.draft.name}, "
                  f"k = {config.speculation.k}. Rewards are not part of it.", highlight=False)
    step, traced = sum(seconds.values()), sum(phases.values())
    table = Table("program", "seconds", "share", title="timed, without the profiler")
    for name, spent in seconds.items():
        table.add_row(name, f"{spent:.3f}", f"{spent / step:.1%}")
    table.add_row("whole step", f"{step:.3f}", "", style="bold")
    console.print(right_justified(table))
    table = Table("phase", "seconds", "share", title="by phase (named scope), from the trace")
    for name in dict.fromkeys(phase.name for phase in sorted(phases, key=in_order)):
        parts = {phase.part: spent for phase, spent in phases.items() if phase.name == name}
        table.add_row(name, f"{sum(parts.values()):.3f}", f"{sum(parts.values()) / traced:.1%}")
        for part in (part for part in PARTS if part in parts):
            table.add_row(f"  {part}", f"{parts[part]:.3f}", f"{parts[part] / traced:.1%}", style="dim")
    table.add_row("operations, all", f"{traced:.3f}", "", style="bold")
    console.print(right_justified(table))
    table = Table("program", *next(iter(memory.values())), title="compiled memory, MiB a device")
    for name, sizes in memory.items():
        table.add_row(name, *(f"{size / 2**20:,.1f}" for size in sizes.values()))
    console.print(right_justified(table))


def right_justified(table: Table) -> Table:
    """Numbers, all columns but the first, to the right."""
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def in_order(phase: Phase) -> tuple[int, bool, str]:
    """Phases as a step goes through them."""
    name = phase.name.split(",")[0]
    return (PHASES.index(name) if name in PHASES else len(PHASES)), "backward" in phase.name, phase.name
