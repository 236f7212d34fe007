"""The optimizers of policy and draft, and their learning rates: optax's, by its names.

A rate is that of the run's step, which the state counts, and not of a count of the optimizer's own:
so its state has one shape whatever the schedule, and a run may go on with another one.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jspec.choices import OPTIMIZERS
from jspec.errors import InputError
from jspec.rl.update_settings import OptimizerSettings, UpdateSettings

Rate: TypeAlias = float | jax.Array | optax.Schedule


def optimizers(settings: UpdateSettings, updates: jax.Array | None = None) -> tuple[
        optax.GradientTransformation, optax.GradientTransformation]:
    """The policy's and the draft's.

    updates: optimizer updates so far, `TrainState.updates`, which the rates depend on; None: as if
    there were no schedules, which is enough for the optimizers' states.
    """
    step = None if updates is None else updates // settings.updates_per_step
    policy, draft = (optimizer(each, rate(each, step))
                     for each in (settings, settings.draft_optimizer))
    return policy, draft


def rate(settings: OptimizerSettings, step: jax.Array | int | None) -> float | jax.Array:
    """The learning rate of step 0, 1, ...; None: the highest."""
    if step is None or (settings.schedule == "constant" and not settings.warmup_steps):
        return settings.learning_rate
    return jnp.asarray(schedule(settings)(jnp.asarray(step, jnp.float32)), jnp.float32)


def schedule(settings: OptimizerSettings) -> optax.Schedule:
    """Learning rates by step: over `warmup_steps` peak / steps, 2 peak / steps, ..., so that the
    first step already moves, then constant or down to `end_learning_rate` at `decay_steps`, the
    warm-up among them, so that the last step still moves.

    Raises InputError for one that falls without `decay_steps`.
    """
    peak, end, rising = settings.learning_rate, settings.end_learning_rate, settings.warmup_steps
    if settings.schedule == "constant":
        falling = optax.constant_schedule(peak)
    elif settings.decay_steps is None:
        raise InputError(f"schedule={settings.schedule} needs decay_steps")
    elif settings.schedule == "cosine":
        falling = optax.cosine_decay_schedule(peak, settings.decay_steps - rising,
                                              alpha=end / peak if peak else 0.0)
    else:
        falling = optax.linear_schedule(peak, end, settings.decay_steps - rising)
    if not rising:
        return falling
    return optax.join_schedules([optax.linear_schedule(peak / rising, peak, rising - 1), falling],
                                [rising])


def optimizer(settings: OptimizerSettings, rate: Rate) -> optax.GradientTransformation:
    """A global-norm clip, then an update rule of `jspec.choices.OPTIMIZERS` with that rate."""
    return optax.chain(optax.clip_by_global_norm(settings.clip), _rule(settings, rate))


def _rule(settings: OptimizerSettings, rate: Rate) -> optax.GradientTransformation:
    given = {key: getattr(settings, key) for key in OPTIMIZERS[settings.optimizer]
             if getattr(settings, key) is not None}
    decay = settings.weight_decay
    dtype = None if settings.state_dtype == "float32" else settings.state_dtype
    match settings.optimizer:
        case "adamw":
            return optax.adamw(rate, weight_decay=decay, mu_dtype=dtype, **given)
        case "lion":
            return optax.lion(rate, weight_decay=decay, mu_dtype=dtype, **given)
        case "sgd":
            return optax.chain(optax.add_decayed_weights(decay),
                               optax.sgd(rate, accumulator_dtype=dtype, **given))
    # https://kellerjordan.github.io/posts/muon/, its updates scaled to AdamW's size
    # (https://arxiv.org/abs/2502.16982), so that the same learning rates suit both
    names = {"b1": "adam_b1", "b2": "adam_b2", "momentum": "beta"}
    return optax.contrib.muon(rate, weight_decay=decay, adam_weight_decay=decay, mu_dtype=dtype,
                              consistent_rms=0.2, muon_weight_dimension_numbers=inside_blocks,
                              **{names.get(key, key): value for key, value in given.items()})


def inside_blocks(weights: Any) -> Any:
    """For each of the weights what `optax.contrib.muon` asks of a matrix inside a decoder block: in
    a draft (under the name `layer`) [out, in], in a policy (`layers`) stacked. As muon's author has
    it, what leads into the blocks and out of them (projections, embeddings, the output head) and
    all vectors are AdamW's: None."""
    def dimensions(path, x) -> Any:
        names = [getattr(entry, "key", None) for entry in path]
        matrix = ("layer" in names and x.ndim == 2) or ("layers" in names and x.ndim > 2)
        return optax.contrib.MuonDimensionNumbers(x.ndim - 1, x.ndim - 2) if matrix else None

    return jax.tree_util.tree_map_with_path(dimensions, weights)
