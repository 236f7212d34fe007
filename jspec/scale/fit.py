"""Whether a step fits chips that are not here, and the least it can take there, from a config
alone.

The step's own programs go through the chip's own compiler. What is unrolled over the layers, the
reshard and the rollout, is compiled at two small depths, whose figures go on in a straight line;
what scans them, the update, at full depth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jspec.config import Config
from jspec.errors import InputError
from jspec.model import ModelConfig
from jspec.prepare import check_sizes, make_speculation
from jspec.progress import telling
from jspec.scale.depths import depths, extended, kinds
from jspec.scale.floors import Floor, total
from jspec.scale.largest import Largest, largest
from jspec.scale.memory import Pools, host_bytes, prepared_bytes, shard_bytes, state_bytes
from jspec.scale.programs import (
    Compiled,
    Declared,
    Floors,
    Subject,
    compile_one,
    compile_update,
    learned_of,
    micro_batches,
    once,
    pools_of,
    prefilled,
)
from jspec.scale.topologies import Topology
from jspec.sharding import batch_shards, configured_mesh
from jspec.speculate.schedule import WITH_MANY
from jspec.speculate.types import Schedule
from jspec.step import for_host

TEMPORARIES = "temporaries"


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of the step, at full depth, on one device.

    Attributes:
      resident: bytes of what lies beside it and is not its argument. bytes: its own.
      kinds: both of them by kind; the compiler's temporaries are what no other kind explains.
      floors: by (phase, rows of its decode loop); of those loops, of one cycle.
      layers: the depths that were compiled. refused: the compiler refused it for want of memory.
      seconds: of compiling.
    """

    name: str
    resident: int
    bytes: int
    kinds: dict[str, int]
    floors: Floors
    layers: tuple[int, ...]
    refused: bool
    seconds: float

    @property
    def needed(self) -> int:
        """Bytes on the device while it runs."""
        return self.resident + self.bytes


@dataclasses.dataclass(frozen=True)
class Fit:
    """The answer.

    Attributes:
      topology: the machine. mesh: its axes. model, config: what was asked about.
      k: what is drafted. cycles: of a rollout, where all answers are `length` tokens long, and
        those that wait for a slot begin when all have ended that had one.
      micro_batch: (its rows, how many an update computes).
      programs: in the order of a step.
      host_bytes: on a host, by kind, as `memory.host_bytes` has them.
      largest: what would still fit.
    """

    topology: Topology
    mesh: dict[str, int]
    model: ModelConfig
    config: Config
    k: int | Schedule
    length: int
    accepted: float
    cycles: int
    micro_batch: tuple[int, int]
    programs: tuple[Program, ...]
    host_bytes: dict[str, int]
    largest: Largest

    @property
    def tightest(self) -> Program:
        """The program that needs the most."""
        return max(self.programs, key=lambda program: program.needed)

    @property
    def left(self) -> int:
        """Bytes of a device that the tightest program leaves; below 0: that many too many."""
        return int(self.topology.chip.granted_bytes) - self.tightest.needed

    def floor(self, program: Program) -> Floor:
        """Of a whole program: of a rollout all its cycles, in the loop of the most rows."""
        loops = {loop for _, loop in program.floors}
        first = max(loops, default=0)
        return total(
            {
                key: floor * (self.cycles if first and key[1] == first else 1)
                for key, floor in program.floors.items()
                if key[1] in (0, first)
            }
        )

    @property
    def seconds(self) -> float | None:
        """The least that a step takes, its programs one after the other; None where one of them was
        not counted."""
        if not all(program.floors for program in self.programs):
            return None
        again = {"update": self.config.grpo.updates_per_step}
        return sum(self.floor(program).seconds * again.get(program.name, 1)
                   for program in self.programs)


def fit(
    config: Config,
    model: ModelConfig,
    topology: Topology,
    devices: Sequence[Any],
    *,
    length: int | None = None,
    accepted: float = 1.0,
    layers: Sequence[int] = (),
) -> Fit:
    """Answers for a configuration and its model on a machine.

    Args:
      devices: those of the topology. length: tokens of every answer; None: as many as may be.
      accepted: tokens that a cycle yields. layers: the depths to compile, where all are alike.

    Raises InputError for what jspec.prepare refuses, and for what the chip's compiler does.
    """
    longest = config.sampling.max_new_tokens
    config = only_widest(config)
    k = 0 if config.draft.name == "none" else make_speculation(config, WITH_MANY).k
    subject = Subject(
        config, model, topology, devices, k, length or longest, accepted, tuple(layers)
    )
    mesh = configured_mesh(config.mesh, list(devices))
    with jax.set_mesh(mesh):
        check_sizes(config, mesh, model)
        programs, pools, whole, out = of_rollout(subject)
        programs += of_learning(subject, whole, out)
        micro = micro_batches(whole, out)
        chip = topology.chip
        host = host_bytes(whole.state, pools, for_host(out), chip.devices_a_host)
        fixed = 2 * shard_bytes(whole.state.policy)  # sums of gradients, and those of a micro-batch
        most = largest(
            {program.name: program for program in programs},
            pools,
            micro[0],
            out.tokens.shape[0],
            batch_shards("train"),
            fixed,
            int(chip.granted_bytes),
        )
    return Fit(
        topology,
        dict(mesh.shape),
        model,
        config,
        k,
        subject.length,
        accepted,
        math.ceil(subject.length / accepted) * math.ceil(out.tokens.shape[0] / pools.slots),
        micro,
        tuple(programs),
        host,
        most,
    )


def only_widest(config: Config) -> Config:
    """The configuration with micro-batches of one width, the widest: it takes the most memory, and
    each width is compiled by itself. A draft that is in files is taken as a fresh one of its
    kind."""
    grpo = dataclasses.replace(config.grpo, widths=(config.sampling.max_new_tokens,))
    draft = dataclasses.replace(config.draft, path=None)
    return dataclasses.replace(config, grpo=grpo, draft=draft)


@dataclasses.dataclass(frozen=True)
class Shallow:
    """The reshard and the rollout at one depth, with the step that they are of; drafted: bytes of
    the draft as cycles use it; of_draft: its keys and values of the prompts, as shapes."""

    made: Declared
    reshard: Compiled
    rollout: Compiled
    drafted: int
    of_draft: Any

    @classmethod
    def of(cls, subject: Subject, model: ModelConfig) -> Shallow:
        made = Declared.of(subject, model)
        prepared, of_draft = prefilled(made, subject.k)
        with telling(f"compiling reshard and rollout, {model.num_layers} layers"):
            reshard = compile_one(subject, "reshard", made.step.reshard, (made.state.policy,), once)
            if reshard.refused:
                raise InputError(f"not even {model.num_layers} layers of this model fit "
                                 f"{subject.topology.name}: their reshard takes "
                                 f"{reshard.bytes / 2**30:.1f} GiB a device")
            arguments = (reshard.made, made.state.draft, made.prompts, made.step.sampling,
                         subject.k)
            rollout = compile_one(subject, "rollout", made.step.rollout, arguments, once,
                                  pools_of(subject, made, of_draft).is_pool)
        drafted = prepared_bytes(reshard.made, prepared, made.layout)
        return cls(made, reshard, rollout, drafted, of_draft)


def known(subject: Subject, made: Declared, drafted: int, of_draft: Any,
          out: Any) -> dict[str, tuple[int, dict[str, int]]]:
    """Of reshard and rollout at one depth, (bytes of what lies beside it, all of it by kind)."""
    state, copy = state_bytes(made.state, made.reference), shard_bytes(made.copy)
    leaving = state_bytes(made.work, made.reference)  # what goes to the host may not be there yet
    in_pool, in_draft_pool, _ = pools_of(subject, made, of_draft).bytes()
    own = 0 if made.state.draft is None else shard_bytes(made.state.draft)
    kinds = state | {"rollout copy": copy, "KV pool": in_pool,
                     "draft": state["draft"] + in_draft_pool + drafted,
                     "prompts and answers": shard_bytes((made.prompts, out))}
    return {"reshard": (sum(leaving.values()) - state["master weights"],
                        leaving | {"rollout copy": copy}),
            "rollout": (sum(state.values()) - own, kinds)}


def of_rollout(subject: Subject) -> tuple[list[Program], Pools, Declared, Any]:
    """(the reshard and the rollout, the pools, the step at full depth, what its rollout gives)."""
    models = depths(subject.model, subject.layers)
    whole = Declared.of(subject, subject.model)
    found = [Shallow.of(subject, model) for model in models]
    last = found[-1]
    out = at_depth(last.rollout.made, subject.model).replace(stats=None)
    drafted = int(extended(subject.model, models, [one.drafted for one in found]))
    here = known(subject, whole, drafted, last.of_draft, out)
    there = [known(subject, one.made, one.drafted, one.of_draft,
                   one.rollout.made.replace(stats=None)) for one in found]
    programs = []
    for name in here:
        resident, kinds = here[name]
        explained = [sum(kinds.values()) - resident
                     for resident, kinds in (of_depth[name] for of_depth in there)]
        programs.append(assembled(subject, name, models, [getattr(one, name) for one in found],
                                  resident, kinds, explained))
    pools = pools_of(subject, whole, last.of_draft)
    return programs, pools, whole, learned_of(subject.config, out)


def of_learning(subject: Subject, whole: Declared, out: Any) -> list[Program]:
    """What comes after the rollout, at full depth; where the update is refused for want of memory,
    what it does is counted at small depths."""
    state = state_bytes(whole.work, whole.reference)
    step, programs, everything = whole.step, [], [subject.model]
    if step.draft is not None:
        with telling("compiling the draft's update"):
            made = compile_one(
                subject, "draft", step.draft, (whole.work, whole.learned, out), once
            )
        kinds = state | {"prompts and answers": shard_bytes((whole.learned, out))}
        programs.append(
            assembled(subject, "draft", everything, [made], state.get("reference", 0), kinds)
        )
    out = out.replace(trunk=None)
    kinds = state | {"prompts and answers": shard_bytes((whole.learned, out))}
    if step.remember is not None:
        with telling("compiling what the draft remembers"):
            made = compile_one(
                subject, "remember", step.remember, (whole.state.draft, whole.learned, out), once
            )
        beside = sum(state.values()) - shard_bytes(whole.state.draft)
        programs.append(assembled(subject, "remember", everything, [made], beside, kinds))
    with telling(f"compiling the update, {subject.model.num_layers} layers"):
        update = compile_update(subject, whole, out)
    program = assembled(subject, "update", everything, [update], 0, kinds)
    models = depths(subject.model, subject.layers)
    if update.refused and len(models) > 1:
        with telling("compiling the update of a few layers, to count what it does"):
            few = [compile_update(subject, Declared.of(subject, model), at_depth(out, model))
                   for model in models]
        if not any(one.refused for one in few):
            program = dataclasses.replace(program, floors=lined_up(subject.model, models, few))
    return [*programs, program]


def at_depth(out: Any, model: ModelConfig) -> Any:
    """A rollout's shapes with the routes of as many layers as the model has."""
    def cut(routes: Any) -> Any:
        if routes is None:
            return None
        shape = (*routes.shape[:2], kinds(model)[1], *routes.shape[3:])
        return jax.ShapeDtypeStruct(shape, routes.dtype, sharding=routes.sharding)

    return out.replace(routes=cut(out.routes), prompt_routes=cut(out.prompt_routes))


def assembled(subject: Subject, name: str, models: Sequence[ModelConfig],
              found: Sequence[Compiled], resident: int, kinds: dict[str, int],
              explained: Sequence[int] | None = None) -> Program:
    """A program of which some depths are known. resident, kinds: see `Program`. explained: bytes of
    the program at each depth that have a kind; None: all depths are the model's own.

    What goes on in a straight line is what has none, the temporaries: a few layers may need the
    most while there is no pool yet, and many when there is."""
    own = sum(kinds.values()) - resident
    explained = [own] * len(found) if explained is None else explained
    rest = [one.bytes - part for one, part in zip(found, explained, strict=True)]
    temporaries = max(0, int(extended(subject.model, models, rest)))
    return Program(name, resident, own + temporaries, kinds | {TEMPORARIES: temporaries},
                   lined_up(subject.model, models, found), tuple(m.num_layers for m in models),
                   any(one.refused for one in found), sum(one.seconds for one in found))


def lined_up(
    model: ModelConfig, models: Sequence[ModelConfig], found: Sequence[Compiled]
) -> Floors:
    """The floors of the model from those of shallower ones, part by part; {} where one is
    unknown."""
    if any(one.refused for one in found):
        return {}
    keys = dict.fromkeys(key for one in found for key in one.floors)
    parts = {
        key: [dataclasses.astuple(one.floors.get(key, Floor())) for one in found] for key in keys
    }
    return {
        key: Floor(*(extended(model, models, values) for values in zip(*of_key, strict=True)))
        for key, of_key in parts.items()
    }
