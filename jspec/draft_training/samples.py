"""The policy's answers as files: tokens, log-probabilities, and the states that the verifier
computed."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

import jspec
from jspec import formats
from jspec.answering import batch_on_mesh, decoded
from jspec.draft_config import DraftTrainingConfig
from jspec.errors import InputError
from jspec.model import Policy
from jspec.output_dir import written
from jspec.prepare import check_draft, make_sampling, rollout_layout
from jspec.purposes import SAMPLES_KEY, purpose_key
from jspec.speculate.types import BUCKETS

log = logging.getLogger(__name__)


def trunk_features(config: DraftTrainingConfig, policy: Policy) -> tuple[int, ...]:
    """The trunk depths that the configured drafter asks for."""
    draft = check_draft(config, policy.config)
    return draft.drafter.features(draft.config)


def files_of(prompts: list[list[int]], rows: int) -> Iterator[tuple[int, list[list[int]]]]:
    """(bucket, prompts) of one file after the other: `rows` prompts of one bucket each, the last of
    a bucket perhaps filled up with its own prompts again."""
    waiting: dict[int, list[list[int]]] = {}
    for tokens in prompts:
        bucket = next((b for b in BUCKETS if b >= len(tokens)), None)
        group = waiting.setdefault(bucket, [])
        group.append(tokens)
        if len(group) == rows:
            yield bucket, waiting.pop(bucket)
    for bucket, group in sorted(waiting.items()):
        yield bucket, list(itertools.islice(itertools.cycle(group), rows))


def sample(config: DraftTrainingConfig, policy: Policy, prompts: list[list[int]],
           directory: Path, depths: tuple[int, ...] | None = None) -> None:
    """One answer to every prompt, in files of `samples.batch` rows; those that are there already
    stay. depths: of the trunk, whose states are kept; None: those that the drafter asks for."""
    directory.mkdir(exist_ok=True)
    layout, sampling = rollout_layout(config), make_sampling(config)
    weights = jspec.reshard(policy, layout)
    temperatures = config.samples.temperatures or (config.sampling.temperature,)
    depths = trunk_features(config, policy) if depths is None else depths
    speculation = jspec.Speculation(depths=depths)
    key = purpose_key(config.seed, SAMPLES_KEY)
    jobs = list(files_of(prompts, min(config.samples.batch, len(prompts))))
    for index, (bucket, group) in enumerate(jobs):
        path = directory / f"{index:05d}.npz"
        if path.exists():
            continue
        begin = time.perf_counter()
        batch = batch_on_mesh(group, layout, group_size=1, seed=jax.random.fold_in(key, index),
                              buckets=(bucket,))
        temperature = temperatures[index % len(temperatures)]
        out = decoded(weights, None, batch, len(group), speculation=speculation,
                      sampling=sampling.replace(temperature=temperature))
        write(path, group, out, temperature)
        log.info("samples %d/%d  %d tokens  %.0f tok/s", index + 1, len(jobs), out.lengths.sum(),
                 out.lengths.sum() / (time.perf_counter() - begin))


def write(path: Path, prompts: list[list[int]], out: Any, temperature: float) -> None:
    """One file of rows, whole or not there at all. States are kept in bfloat16."""
    lengths = np.array([len(tokens) for tokens in prompts], np.int32)
    size, answer = int((lengths + out.lengths).max()), int(out.lengths.max())
    tokens = np.zeros((len(prompts), size), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, :lengths[row]] = prompt
        tokens[row,
               lengths[row]:lengths[row] + out.lengths[row]] = out.tokens[row, :out.lengths[row]]
    states = {f"state{i}": x[:, :size].astype(ml_dtypes.bfloat16).view(np.uint16)
              for i, x in enumerate((out.trunk.hidden, *out.trunk.features))}
    work = path.with_suffix(".tmp")
    with written(path.parent), work.open("wb") as file:
        np.savez(file, format=formats.SAMPLES, tokens=tokens, start=lengths,
                 mask=out.mask[:, :answer], logprobs=out.logprobs[:, :answer],
                 temperature=np.full(len(prompts), temperature, np.float32), **states)
    work.replace(path)


COLUMNS = {"tokens", "start", "mask", "logprobs", "temperature", "state0"}
"""Of every file; state1, state2, ... where the draft asks for more of the trunk."""


def read(directory: Path) -> list[dict[str, np.ndarray]]:
    """The rows of all files, answers of one token left out: nothing is drafted after them.

    Raises InputError for a file that cannot be read, and if there is nothing to learn from.
    """
    rows = []
    for path in sorted(directory.glob("*.npz")):
        try:
            with np.load(path) as file:
                columns = {name: file[name] for name in file.files}
        except Exception as error:  # what is cut short raises whatever its reader trips over
            raise InputError(f"{path} cannot be read ({type(error).__name__}); remove it, and it "
                             "is sampled again") from None
        formats.refuse_newer(columns, formats.SAMPLES, path)
        columns.pop("format", None)
        if missing := COLUMNS - columns.keys():
            raise InputError(f"{path} has no {', '.join(sorted(missing))}: it is of an earlier "
                             "jspec, or no file of samples; remove it, and it is sampled again")
        rows += [{name: x[i] for name, x in columns.items()} for i in range(len(columns["start"]))]
    rows = [row for row in rows if row["mask"].sum() > 1]
    if not rows:
        raise InputError(f"{directory} has no answer of two tokens or more: `jspec draft train` "
                         "has sampled none there yet, or the policy ends its answers at once")
    return rows
