"""From samples to a trained draft: least squares, then steps on the next states, then steps on the
draft's loss."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp

from jspec import formats
from jspec.draft_config import DraftTrainingConfig
from jspec.draft_training.samples import read
from jspec.drafts import Draft, Drafter
from jspec.drafts.base import DraftBatch
from jspec.drafts.parts.vocabulary import most_frequent
from jspec.errors import InputError
from jspec.model import Policy, Trunk
from jspec.output_dir import checkpoints_written
from jspec.prepare import make_draft
from jspec.progress import telling
from jspec.rl import optimizers
from jspec.rl.collate import place_rows
from jspec.rl.state import moments
from jspec.rl.update_settings import OptimizerSettings, optimizer_settings
from jspec.sharding import batch_shards
from jspec.stopping import StopSignal

log = logging.getLogger(__name__)

Row = dict[str, np.ndarray]
UNIT = 32  # lengths of batches are multiples of it: each one is a compilation
WINDOW = 8  # batches whose rows are sorted by length together: little padding, and still a shuffle
LEAST_SQUARES_ROWS = 2048
SAY_EVERY = 20  # steps


@dataclasses.dataclass(frozen=True)
class Stage:
    """`steps` steps on one loss, after `before` steps of the stages before it."""

    kind: str
    steps: int
    before: int


def fit(config: DraftTrainingConfig, policy: Policy, directory: Path) -> Draft:
    """The trained draft, float32 masters. Goes on from the last checkpoint under `directory`.

    SIGINT and SIGTERM end it after the step, with a checkpoint, by SystemExit. Raises InputError if
    the loss or its gradient is not finite.
    """
    rows = read(directory / "samples")
    if config.training.rows % (shards := batch_shards("rollout")):
        log.warning("training.rows=%d are not divided by the mesh's %d shards of a batch: each "
                    "computes them all", config.training.rows, shards)
    draft = untrained(config, policy, rows)
    stages = (Stage("states", config.training.state_steps, before=0),
              Stage(config.draft.loss, config.training.steps, before=config.training.state_steps))
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    manager = ocp.CheckpointManager((directory / "checkpoints").absolute(), options=options)
    with manager as checkpoints, StopSignal() as stop:
        done, saved = restore(checkpoints, draft, config)
        if done:
            log.info("going on from step %d", done)
        for stage in stages:
            if done >= stage.before + stage.steps:
                continue
            optimizer = draft_optimizer(config, schedule(config, stage.steps))
            if saved is None:
                with telling("solving for what a fresh draft can start from"):
                    weights = solved(config, policy, draft, rows).weights
                # what was solved for is not yet where the draft was
                weights = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), weights,
                                       draft.weights)
                saved = {"weights": weights, "opt": begin_moments(optimizer, weights)}
            elif done == stage.before:  # the stage before ended here: the moments are its own
                saved["opt"] = begin_moments(optimizer, saved["weights"])
            with telling(f"training on {stage.kind} (the first step of each length compiles)"):
                saved = run_stage(stage, done, config, policy, draft, rows, checkpoints, saved,
                                  optimizer, stop)
            if stop.number is not None:
                break
            done = stage.before + stage.steps
        with checkpoints_written(checkpoints.directory):
            checkpoints.wait_until_finished()
    if stop.number is not None:
        raise SystemExit(128 + stop.number)
    return draft.replace(weights=saved["weights"])


def untrained(config: DraftTrainingConfig, policy: Policy, rows: list[Row]) -> Draft:
    """The draft at `draft.path`, with its own vocabulary, or a fresh one with the samples'."""
    if config.draft.path is not None:
        return make_draft(config, policy)
    options = dict(config.draft.options or {})
    if config.training.vocab_size:
        emitted = np.concatenate([row["tokens"][row["start"]:row["start"] + row["mask"].sum()]
                                  for row in rows])
        options["vocab"] = most_frequent(emitted, config.training.vocab_size,
                                         policy.config.vocab_size)
        log.info("vocabulary of %d tokens: %.1f%% of those sampled", len(options["vocab"]),
                 100 * np.isin(emitted, options["vocab"]).mean())
    section = dataclasses.replace(config.draft, options=options)
    return make_draft(dataclasses.replace(config, draft=section), policy)


def solved(config: DraftTrainingConfig, policy: Policy, draft: Draft, rows: list[Row]) -> Draft:
    """A fresh draft with what its drafter can solve for by least squares; one from `draft.path` as
    it is."""
    if config.draft.path is not None or draft.drafter.least_squares is None:
        return draft
    some = rows[:LEAST_SQUARES_ROWS]
    batches = (on_mesh(some[i:i + config.training.rows])
               for i in range(0, len(some), config.training.rows))
    return draft.drafter.least_squares(policy, draft, batches)


def draft_optimizer(config: DraftTrainingConfig,
                    rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """The optimizer that a configuration asks for."""
    return optimizers.optimizer(OptimizerSettings(**optimizer_settings(config.draft)), rate)


def schedule(config: DraftTrainingConfig, steps: int) -> optax.Schedule:
    """Up over half of the steps at most, then a cosine down to a tenth."""
    rate, rising = config.draft.learning_rate, min(config.training.warmup_steps, steps // 2)
    return optimizers.schedule(OptimizerSettings(
        learning_rate=rate, schedule="cosine", warmup_steps=rising, decay_steps=steps,
        end_learning_rate=rate / 10))


def begin_moments(optimizer: optax.GradientTransformation, weights: Any) -> Any:
    """An optimizer's state before its first step; moments lie where their weights do."""
    shardings = jax.tree.map(lambda x: x.sharding, moments(optimizer, weights))
    return jax.jit(optimizer.init, out_shardings=shardings)(weights)


def restore(checkpoints: ocp.CheckpointManager, draft: Draft,
            config: DraftTrainingConfig) -> tuple[int, Any]:
    """(steps done, weights and moments) of the last checkpoint, or (0, None)."""
    step = checkpoints.latest_step()
    if step is None:
        return 0, None
    folder = checkpoints.directory / str(step)
    formats.refuse_newer(checkpoints.metadata(step).custom_metadata, formats.DRAFT_CHECKPOINT,
                         f"the checkpoint {folder}")
    # a schedule, for a constant rate has no counter among its state
    optimizer = draft_optimizer(config, lambda count: 1.0)
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                           draft.weights)
    shapes = {"weights": weights, "opt": moments(optimizer, weights)}
    try:
        return step, checkpoints.restore(step, args=ocp.args.StandardRestore(shapes))
    except Exception as error:  # what is cut short raises whatever its reader trips over
        raise InputError(f"the checkpoint {folder} cannot be read ({type(error).__name__}); remove "
                         "it, and the one before it is taken") from error


def run_stage(stage: Stage, done: int, config: DraftTrainingConfig, policy: Policy, draft: Draft,
              rows: list[Row], checkpoints: ocp.CheckpointManager, saved: dict[str, Any],
              optimizer: optax.GradientTransformation, stop: StopSignal) -> dict[str, Any]:
    """The steps of one stage from `done` on (of all stages), with a checkpoint every so often and
    at its end, which a signal brings nearer."""
    shardings = jax.tree.map(lambda x: x.sharding, saved)
    learn = jax.jit(partial(step_of, draft.drafter, draft.config, optimizer, stage.kind),
                    donate_argnums=0, out_shardings=(shardings, None))
    begin, tokens = time.perf_counter(), 0
    for index, chosen in enumerate(order(rows, config.training.rows, config.seed + stage.before)):
        if index >= stage.steps:
            break
        if stage.before + index < done:
            continue
        batch = on_mesh([rows[i] for i in chosen], stage.before + index)
        saved, metrics = learn(saved, policy, draft.state, batch)
        tokens += int(batch.mask.sum())
        step = stage.before + index + 1
        due = (index + 1 == stage.steps or step % config.training.checkpoint_every == 0
               or stop.number is not None)
        if due or step % SAY_EVERY == 0:
            if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
                raise InputError(f"the draft's loss or gradient is not finite at step {step}; "
                                 "lower draft.learning_rate or draft.clip, and the same command "
                                 "goes on from the last checkpoint")
            overlap = " ".join(f"{x:.3f}" for x in np.asarray(metrics.get("overlap", ())))
            log.info("%s  step %d/%d  loss %.4f  %s%.0f tok/s", stage.kind, index + 1, stage.steps,
                     metrics["loss"],
                     overlap and f"overlap {overlap}  ", tokens / (time.perf_counter() - begin))
        if due:
            with checkpoints_written(checkpoints.directory):
                checkpoints.save(step, args=ocp.args.StandardSave(saved), force=True,
                                 custom_metadata={"format": formats.DRAFT_CHECKPOINT})
        if stop.number is not None:
            break
    return saved


def step_of(drafter: Drafter, config: Any, optimizer: optax.GradientTransformation, kind: str,
            saved: dict[str, Any], policy: Policy, state: Any,
            batch: DraftBatch) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """One optimizer step on the mean loss of a batch. Jittable."""
    batch = batch.replace(trunk=jax.tree.map(lambda x: x.astype(policy.dtype), batch.trunk))

    def mean(weights) -> tuple[jax.Array, dict]:
        total, count, metrics = drafter.loss(policy, Draft(weights, state, config, drafter), batch,
                                             kind)
        count = jnp.maximum(count, 1.0)
        return total / count, jax.tree.map(lambda x: x / count, metrics)

    (loss, metrics), grads = jax.value_and_grad(mean, has_aux=True)(saved["weights"])
    changes, opt = optimizer.update(grads, saved["opt"], saved["weights"])
    metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return {"weights": optax.apply_updates(saved["weights"], changes), "opt": opt}, metrics


def order(rows: list[Row], size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers, every row once an epoch, rows of like length together."""
    length = [int(row["start"] + row["mask"].sum()) for row in rows]
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, epoch])
        shuffled, batches = rng.permutation(len(rows)), []
        for at in range(0, len(rows), size * WINDOW):
            window = sorted(shuffled[at:at + size * WINDOW], key=length.__getitem__)
            batches += [window[i:i + size] for i in range(0, len(window), size)]
        batches = [batch for batch in batches if len(batch) == size] or batches
        rng.shuffle(batches)
        yield from batches


def on_mesh(rows: list[Row], turn: int = 0) -> DraftBatch:
    """Rows as one batch, split over the current mesh where it divides them; else every device
    computes them all."""
    batch = jax.tree.map(place_rows, pack(rows).replace(turn=None))
    return batch.replace(turn=np.int32(turn))


def pack(rows: list[Row]) -> DraftBatch:
    """Rows as one batch, cut and padded to a length that is a multiple of UNIT."""
    answers = [int(row["mask"].sum()) for row in rows]
    size = max(int(row["start"]) + n for row, n in zip(rows, answers, strict=True))
    size, answer = (-(-n // UNIT) * UNIT for n in (size, max(answers)))

    def stack(name: str, length: int) -> np.ndarray:
        cut = [row[name][:length] for row in rows]
        return np.stack([np.pad(x, ((0, length - len(x)), *((0, 0),) * (x.ndim - 1))) for x in cut])

    states = [stack(name, size).view(ml_dtypes.bfloat16) for name in sorted(rows[0])
              if name.startswith("state")]
    return DraftBatch(Trunk(states[0], tuple(states[1:])), stack("tokens", size),
                      np.array([row["start"] for row in rows], np.int32), stack("mask", answer),
                      stack("logprobs", answer),
                      np.array([row["temperature"] for row in rows], np.float32))
