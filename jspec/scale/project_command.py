"""`jspec project`: what speculation is to bring to a config's rollouts and steps on machines that
are not here."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import AbstractMesh

from jspec.config import Config
from jspec.errors import InputError
from jspec.model import ModelConfig
from jspec.output import open_output, table_screen
from jspec.prepare import check_draft, check_sizes, rollout_layout
from jspec.scale import calibration, lengths
from jspec.scale.chips import CHIPS, Chip
from jspec.scale.cycle_cost import Decoding, Sizes, Split, draft_sizes, held_bytes
from jspec.scale.project import (
    Answers,
    Projection,
    by_acceptance,
    by_tokens,
    project,
    rest_of_share,
    update_seconds,
)
from jspec.scale.project_picture import picture
from jspec.scale.project_report import (
    Projected,
    as_data,
    cycle_table,
    machines_table,
    said,
    speedup_tables,
    summary,
)
from jspec.scale.published import subject
from jspec.scale.topologies import topology
from jspec.sharding import AXES, LAYOUTS, batch_shards, check_mesh, check_slices, mesh_sizes
from jspec.speculate.loops import FEWEST_ON_CHIPS, loops


@dataclasses.dataclass(frozen=True)
class Floor:
    """What nothing measured is needed for: a config's step on a machine. lengths: float [N], of its
    answers."""

    decoding: Decoding
    answers: Answers
    lengths: np.ndarray


def run(config: Config, arguments: argparse.Namespace) -> int:
    """`jspec project`, with what `cli` parsed. Raises InputError before anything is printed."""
    on_stdout = arguments.json == "-"
    written = open_output(None if on_stdout else arguments.json, "--json")
    drawn = open_output(arguments.plot, "--plot")
    if config.draft.name == "none" and arguments.draft_cost is arguments.costs is None:
        raise InputError("draft.name=none has no cost to project with; name a drafter, as in "
                         "draft.name=mtp, or say --draft-cost or --costs")
    if config.data.over_sampling > 1:
        raise InputError(f"data.over_sampling={config.data.over_sampling:g} ends rollouts early, "
                         "and a projection is of whole ones; set it to 1")
    config, model = subject(config, arguments.model)
    found = [projected(config, model, on, arguments) for on in arguments.on]
    console = table_screen(stderr=on_stdout)
    for one in found:
        for text in said(one):
            console.print(text, soft_wrap=True)
        for table in (cycle_table(one), *speedup_tables(one, "rollout"),
                      *speedup_tables(one, "step")):
            console.print(table)
        console.print(summary(one), soft_wrap=True)
    if len(found) > 1:
        console.print(machines_table(found))
    data = json.dumps([as_data(one) for one in found], indent=1) + "\n"
    if written:
        written.write(data)
    if on_stdout:
        print(data, end="")
    if drawn:
        drawn.write(picture(found[0]))
    return 0


def projected(config: Config, model: ModelConfig, on: str,
              arguments: argparse.Namespace) -> Projected:
    """The projection for one machine. Raises InputError where the config does not go on it."""
    floor, measured = floor_of(config, model, on, arguments), ""
    decoding = floor.decoding
    if arguments.costs is not None:
        table = calibration.read(arguments.costs, config.draft.name)
        there = floor
        if table.on:
            with naming(f"--costs {arguments.costs} is of another machine"):
                there = floor_of(config, model, table.on, arguments)
        overhead = calibration.overhead_of(table, there.decoding, there.answers)
        decoding = dataclasses.replace(calibration.without_draft(decoding), overhead=overhead)
        measured = table.source
    found = project(decoding, floor.answers, sorted(arguments.k))
    rest, rest_from = rest_of(found, config, floor, arguments)
    found = dataclasses.replace(found, rest=rest, lag=arguments.lag)
    by, levels = ((by_tokens, arguments.tokens) if arguments.tokens
                  else (by_acceptance, arguments.acceptance))
    levels = tuple(sorted(levels))
    rows = by(found, levels)
    if not any(cell for row in rows for cell in row):
        raise InputError(f"--tokens {levels[0]:g}: a cycle that drafts {max(arguments.k)} yields "
                         f"{max(arguments.k) + 1} at most; raise --k, or lower --tokens")
    return Projected(config.model.name, on, decoding, floor.answers, floor.lengths, found, levels,
                     rows, measured, rest_from, held(config, floor))


def held(config: Config, floor: Floor) -> float:
    """Bytes of a device that a rollout holds at the least when it is at its fullest, with the
    draft's layers and their keys and values: siblings share those of their prompt, which are left
    out."""
    spans, limit, decoding = floor.answers.spans, config.rollout.kv_tokens, floor.decoding
    answers = spans.tokens / 2 - config.data.max_prompt_tokens  # of each, to a span's end
    kept = float((spans.context + spans.live * answers).max())
    kept = kept if limit is None else min(kept, limit / decoding.split.batch)
    drafts = [part for part in decoding.draft if part.layers]
    if config.draft.name == "self":  # which reads the policy's
        drafts = [dataclasses.replace(part, kv_values=0) for part in drafts]
    return sum(held_bytes(part, decoding.split, kept) for part in (decoding.policy, *drafts))


def floor_of(config: Config, model: ModelConfig, on: str, arguments: argparse.Namespace) -> Floor:
    """Raises InputError where the config does not go on that machine."""
    chip, devices, slices = machine(on)
    with naming(on):
        split = split_of(config, model, devices, slices)
    server = arguments.engine == "server"
    policy = Sizes.of(model, arguments.precision)
    draft = draft_sizes(check_draft(config, model), policy, model)
    data, cap = config.data, config.sampling.max_new_tokens
    of_answers = lengths.parse(arguments.lengths, data.prompts_per_step * data.group_size, cap)
    answers = answers_of(config, split, of_answers)
    if server:
        split = dataclasses.replace(split, sparse=True)
        answers = dataclasses.replace(answers, chain=())
    decoding = Decoding(policy, chip, split, draft, arguments.draft_cost)
    return Floor(decoding, answers, of_answers)


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """What the InputErrors in it are about, before what they say."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from None


def machine(name: str) -> tuple[Chip, int, int]:
    """(chip, devices, slices) of a machine: what `topology` knows, and any number of GPUs, as in
    gb200-512."""
    gpus = [chip.name for chip in CHIPS.values() if chip.platform == "gpu"]
    kind, _, count = name.lower().rpartition("-")
    if kind in gpus and re.fullmatch("[1-9][0-9]{0,6}", count):
        return CHIPS[kind], int(count), 1
    try:
        found = topology(name)
    except InputError as error:
        raise InputError(f"{error}; or GPUs, as in {gpus[-1]}-512") from None
    return found.chip, found.count, found.slices


def split_of(config: Config, model: ModelConfig, devices: int, slices: int) -> Split:
    """How the config's rollouts lie on so many devices. Raises InputError where they do not; the
    update's micro-batches, which differ from machine to machine, may be any."""
    sizes = mesh_sizes([getattr(config.mesh, axis) for axis in AXES], devices)
    mesh = AbstractMesh(sizes, AXES)
    check_slices(sizes, slices)
    grpo, layout = dataclasses.replace(config.grpo, micro_batch=0), rollout_layout(config)
    check_mesh(model, mesh, layout)
    check_sizes(dataclasses.replace(config, grpo=grpo), mesh, model)
    tensor = np.prod([mesh.shape[axis] for axis in LAYOUTS[layout]["mlp"]])
    return Split(batch_shards(layout, mesh), int(tensor), mesh.shape.get("expert", 1))


def answers_of(config: Config, split: Split, of_answers: np.ndarray) -> Answers:
    """A step's answers in the engine's slots and loops."""
    data = config.data
    slots = min(config.rollout.slots or len(of_answers), len(of_answers)) // split.batch
    chain = loops(slots, 0, config.sampling.max_new_tokens, FEWEST_ON_CHIPS)
    return Answers(
        lengths.spans(of_answers, split.groups, split.expert, slots, data.max_prompt_tokens),
        tuple(rows for rows, _ in chain),
        data.prompts_per_step * data.max_prompt_tokens / split.batch)


def rest_of(found: Projection, config: Config, floor: Floor,
            arguments: argparse.Namespace) -> tuple[float, str]:
    """(seconds of all of a step but generation, where they are from)."""
    if arguments.generation_share is not None:
        return rest_of_share(found.generation, arguments.generation_share), "--generation-share"
    if arguments.rest is not None:
        return arguments.rest, "--rest"
    grpo, data = config.grpo, config.data
    tokens = float(floor.lengths.sum()) + data.prompts_per_step * data.max_prompt_tokens
    forward_twice = config.model.remat in (True, "full")
    passes = grpo.updates_per_rollout * (3 + forward_twice) + (grpo.kl_weight > 0)
    return update_seconds(floor.decoding, tokens, passes), "the update's operations alone"
