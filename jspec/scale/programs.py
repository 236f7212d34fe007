"""The programs of a step, compiled for a machine that is not here, one by one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jspec.config import Config
from jspec.drafts.draft_model import CATCH_UP
from jspec.errors import InputError
from jspec.hlo import Instruction
from jspec.model import ModelConfig, Policy, abstract_policy
from jspec.prepare import make_reference, make_state_specs, rollout_layout
from jspec.rl.batch import TrainBatch, part_of
from jspec.rl.collate import may_wait
from jspec.rl.micro_batches import blocks_of, shapes
from jspec.rl.state import TrainState, everywhere, shapes_at_work
from jspec.scale.counts import counted
from jspec.scale.floors import Floor, Places, by_phase
from jspec.scale.memory import Pools, needed, refused, rollout_shape, shard_bytes
from jspec.scale.topologies import Topology, lower_for
from jspec.scale.traffic import Pool
from jspec.sharding import placement
from jspec.speculate import PromptBatch
from jspec.speculate.rollout import prefill_prompts, ready
from jspec.speculate.types import BUCKETS, Schedule
from jspec.step import Step, declared

Floors = dict[tuple[str, int], Floor]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is asked about.

    Attributes:
      config, model: the run's, and its policy, whose layers may be fewer.
      topology, devices: the machine. k: what is drafted.
      length: tokens of an answer; accepted: tokens that a cycle yields. Both are taken of every
        row.
      layers: the depths to compile, () for the usual ones.
    """

    config: Config
    model: ModelConfig
    topology: Topology
    devices: Sequence[Any]
    k: int | Schedule
    length: int
    accepted: float
    layers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Declared:
    """A step of one depth: shapes with shardings on the current mesh. prompts: of its rollout;
    learned: those whose answers are learned from."""

    step: Step
    state: TrainState
    reference: Policy | None
    prompts: PromptBatch
    learned: PromptBatch
    layout: str

    @classmethod
    def of(cls, subject: Subject, model: ModelConfig) -> Declared:
        config = subject.config
        dtype = config.model.dtype if config.model.dtype != "auto" else "bfloat16"
        shape = abstract_policy(model, dtype)
        state = make_state_specs(config, shape)
        return cls(
            declared(config, state),
            state,
            make_reference(config, state.policy),
            prompts_of(config, config.data.prompts_drawn),
            prompts_of(config, config.data.prompts_per_step),
            rollout_layout(config),
        )

    @property
    def work(self) -> TrainState:
        """The state as updates take it."""
        return shapes_at_work(self.state, self.step.settings)

    @property
    def copy(self) -> Any:
        """The policy's weights in the rollout's layout."""
        return rollout_shape(self.state.policy, self.layout)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of one program at one depth.

    Attributes:
      bytes: of a device's memory. refused: whether it did not compile because they are too many.
      seconds: that compiling took. floors: {} where it did not compile. made: what it gives, with
        shardings.
    """

    bytes: int
    refused: bool
    seconds: float
    floors: Floors
    made: Any = None


def prompts_of(config: Config, count: int) -> PromptBatch:
    """So many prompts as `rl.collate` places them, all of the longest length."""
    data = config.data
    longest = data.max_prompt_tokens
    buckets = (*(b for b in BUCKETS if b < longest), longest)
    expected = [1] * count if may_wait(config) else None
    batch = jax.eval_shape(
        lambda: PromptBatch.from_tokens(
            [[1] * longest] * count,
            group_size=data.group_size,
            seed=0,
            buckets=buckets,
            expected_lengths=expected,
        )
    )

    def rows(x: Any) -> Any:
        axes = ("batch", *(None,) * (len(x.shape) - 1))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement(x.shape, "rollout", *axes))

    names = [
        name
        for name in ("tokens", "lengths", "sequence_ids", "expected_lengths")
        if getattr(batch, name) is not None
    ]
    return batch.replace(
        **{name: rows(getattr(batch, name)) for name in names}, key=everywhere((), batch.key.dtype)
    )


def compile_one(
    subject: Subject,
    name: str,
    program: Any,
    arguments: tuple,
    turns: Callable[[Instruction], float],
    pool: Pool = lambda shape: False,
) -> Compiled:
    """Compiles one program for the machine, and counts what it does. Raises InputError where it
    cannot be compiled for that chip at all."""
    chip, begin = subject.topology.chip, time.perf_counter()
    try:
        lowered = lower_for(chip.platform, program, arguments)
        compiled = lowered.compile()
    except InputError:
        raise
    except Exception as error:  # whatever the compiler raises
        took, size = time.perf_counter() - begin, refused(error, shard_bytes(arguments))
        if size is None:
            said = " ".join(str(error).split())[:300]
            raise InputError(
                f"the {name} of this configuration cannot be compiled for {subject.topology.name}: "
                f"{said}"
            ) from error
        return Compiled(size, True, took, {}, placed(lowered.out_info))
    took = time.perf_counter() - begin
    experts = 0 if subject.model.experts is None else subject.model.experts.count
    text = compiled.as_text()
    counts = counted(text, name, turns, len(subject.devices), pool, experts)
    places = Places.of(subject.topology, subject.devices)
    context = subject.config.data.max_prompt_tokens + subject.length / 2
    made = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding, weak_type=x.weak_type
        ),
        compiled.out_info,
    )
    return Compiled(
        needed(compiled, chip.platform), False, took, by_phase(counts, places, context), made
    )


def once(loop: Instruction) -> float:
    """Of loops whose turns are data: one turn of each is counted, but of a draft model's catching
    up none, for every cycle drafts."""
    return 0.0 if f"/{CATCH_UP}/" in loop.scope else 1.0


def placed(tree: Any) -> Any:
    """Shapes as a rollout gives them, their rows split over the mesh."""

    def place(x: Any) -> Any:
        axes = ("batch", *(None,) * (len(x.shape) - 1)) if x.shape else ()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement(x.shape, "rollout", *axes))

    return jax.tree.map(place, tree)


def learned_of(config: Config, out: Any) -> Any:
    """Of a rollout's shapes those of what is learned from."""
    data = config.data

    def part(x: Any) -> Any:
        rows = x.shape[0] * data.prompts_per_step // data.prompts_drawn
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding)

    return jax.tree.map(part, out)


def micro_batches(made: Declared, out: Any) -> tuple[int, int]:
    """(rows of a micro-batch, how many of them an update computes) where all answers are of full
    length."""
    batch = TrainBatch(
        made.learned.tokens, made.learned.lengths, out.tokens, out.logprobs, out.mask, None
    )
    settings = made.step.settings
    batch = jax.eval_shape(partial(part_of, index=0, parts=settings.mini_batches), batch)
    blocks = blocks_of(batch)
    rows, _ = shapes(batch, settings.micro_batch, settings.widths)[0]
    return rows * blocks, -(-batch.tokens.shape[0] // blocks // rows)


def compile_update(subject: Subject, made: Declared, out: Any) -> Compiled:
    """The update, from what a rollout gives."""
    _, count = micro_batches(made, out)

    def turns(loop: Instruction) -> float:
        return count if "/while/" not in loop.scope else 1.0

    rows = out.lengths.shape
    rewards = jax.ShapeDtypeStruct(rows, np.float32, sharding=placement(rows, "rollout", "batch"))
    return compile_one(
        subject,
        "update",
        made.step.update,
        (made.work, made.reference, made.learned, out, rewards),
        turns,
    )


def prefilled(made: Declared, k: int | Schedule) -> Any:
    """(the draft as cycles use it, its keys and values of the prompts) as shapes, None and ()
    without one."""
    speculation = made.step.speculation.replace(k=k)
    if made.state.draft is None or speculation.most == 0:
        return None, ()

    def start(policy: Policy, draft: Any, prompts: PromptBatch) -> tuple[Any, Any]:
        policy, draft = ready(policy, draft, speculation)
        return draft, prefill_prompts(policy, draft, prompts, speculation.depths).draft_key_values

    return jax.eval_shape(start, made.state.policy, made.state.draft, made.prompts)


def pools_of(subject: Subject, made: Declared, of_draft: Any) -> Pools:
    """The rollout's pools. of_draft: the draft's keys and values of the prompts."""
    most = made.step.speculation.replace(k=subject.k).most if made.state.draft is not None else 0
    return Pools.of(
        made.state.policy,
        made.layout,
        of_draft,
        made.prompts,
        made.step.sampling.max_new_tokens,
        most,
        made.step.batching,
    )
