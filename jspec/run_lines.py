"""The first and the last line of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from jspec.config import Config
from jspec.health import Trouble
from jspec.kernels import picked


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended: its exit code, steps done in all, the step of its newest checkpoint (0:
    none) and of its best one (0: none is kept), and what was wrong with its last step."""

    code: int
    steps: int
    newest: int
    troubles: Sequence[Trouble] = ()
    best: int = 0


def opening(config: Config, mesh: Mesh, done: int, ends: str) -> str:
    """The first line of a run."""
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    draft = ("no draft" if config.draft.name == "none"
             else f"{config.draft.name} drafts, k = {config.speculation.k}")
    start = f"going on after step {done}" if done else "the first step compiles"
    return (f"{config.model.name} on {mesh.size} {jax.default_backend()} device(s) ({shape}), "
            f"{draft}, {picked(config.speculation.kernels)}, {ends}; {start}")


def closing(config: Config, ending: Ending) -> str:
    """The last line of a run."""
    where = f"metrics and checkpoints are in {config.output_dir}"
    if ending.best:
        where += f", the best by {config.checkpoint.best} of step {ending.best}"
    if ending.code > 1:
        return (f"stopped after step {ending.steps} of {config.steps}; {where}; the same command "
                "goes on")
    if not ending.code:
        return f"all {config.steps} steps are done; {where}"
    begin = (f"stopped at step {ending.steps} of {config.steps}" if ending.steps < config.steps else
             f"all {config.steps} steps are done, but the last one taught nothing")
    why = next(trouble for trouble in ending.troubles if trouble.final or trouble.side != "draft")
    where = f"{where}, the newest of step {ending.newest}" if ending.newest else (
        f"metrics are in {config.output_dir}, and no checkpoint")
    return f"{begin}: {why.what}: {why.remedy}; {where}"
