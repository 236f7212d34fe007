"""The GRPO update: policy loss and detached draft loss from one forward, each with an optimizer of
its own.

One jitted, donated step. Prompts are computed once, before the responses, which continue their keys
and values in micro-batches of like length (`jspec.rl.micro_batches`); what the responses' gradients
say of those keys and values then goes back through the prompts, once as well. The draft's gradient
is taken of the draft's weights only, from hidden states behind `stop_gradient`, so that nothing of
it reaches the policy; a barrier on those states keeps XLA from compiling the policy's part
differently because somebody else reads them.

With `draft_features="rollout"` the draft learns in a step of its own (`update_draft`), from the
states that the verifier computed, before the policy's update or while rewards are computed.

A loop of one's own finds all that it takes here: `UpdateSettings`, `init_state`, `make_batch`,
`update`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jspec.model import Policy, Trunk
from jspec.model.lora import trained, trained_specs, with_trained
from jspec.rl.aggregation import Totals, token_shares
from jspec.rl.batch import TrainBatch, part_of
from jspec.rl.batch import make_batch as make_batch
from jspec.rl.losses import quantiles
from jspec.rl.micro_batches import MicroBatch, accumulate, blocks_of, shapes
from jspec.rl.objective import PromptStates, draft_loss, policy_loss, prompt_states
from jspec.rl.optimizers import optimizers, rate
from jspec.rl.penalty import reference_of
from jspec.rl.state import TrainState
from jspec.rl.state import init_state as init_state
from jspec.rl.update_settings import UpdateSettings, draft_due, learned_from, trains_draft
from jspec.sharding import block_rows, constrain_tree

log = logging.getLogger(__name__)


def gradients(state: TrainState, reference: Policy | None, batch: TrainBatch,
              settings: UpdateSettings) -> tuple[Any, Any]:
    """Gradients and metrics of all rows, micro-batch by micro-batch, accumulated in float32.

    Returns ((policy gradients, policy metrics), (draft gradients, draft metrics) or None).
    The draft's are of the token mean. With mini-batches, all of it is of the part whose turn it is
    by `state.updates`.
    """
    batch, totals = with_shares(batch, settings, state.updates)
    log.info("compiling the update: %s", described(batch, settings))
    with_draft = trains_draft(state.draft, settings) and learned_from(state.draft, settings) is None
    features, config = (state.draft.drafter.features(state.draft.config) if with_draft else (),
                        state.policy.config)

    def of_prompts(weights) -> tuple[PromptStates, Trunk]:
        with jax.named_scope("policy_loss"):
            return prompt_states(with_trained(state.policy, weights), batch, settings, features)

    def as_weights(grads) -> Any:  # else XLA may well sum them up whole on every device
        return constrain_tree(in_float32(grads), trained_specs(state.policy), config,
                              state.policy.layout)

    prompts, pull, prompt_trunk = jax.vjp(of_prompts, trained(state.policy), has_aux=True)
    with jax.named_scope("policy_loss"):
        reference = reference_of(state, reference)
        anchor = ((reference, prompt_states(reference, batch, settings)[0])
                  if settings.kl_weight and not settings.kl_in_reward else None)

    def of_rows(micro: MicroBatch) -> tuple[tuple, Any]:
        with jax.named_scope("policy_loss"):
            of_policy = jax.value_and_grad(policy_loss, (0, 1), has_aux=True)
            (_, (metrics, trunk, logprobs)), grads = of_policy(trained(state.policy), prompts,
                                                               state.policy, anchor,
                                                               micro, totals, settings, features)
        grads, gap = (as_weights(grads[0]), in_float32(grads[1])), metrics.pop("logprob_gap")
        if not with_draft:
            return (grads, metrics, None, None), gap
        with jax.named_scope("draft_loss"):
            trunks = (jax.tree.map(lambda x: block_rows(x, micro.prompts),
                                   prompt_trunk.replace(routes=None)), trunk.replace(routes=None))
            of_draft = jax.value_and_grad(draft_loss, has_aux=True)
            (_, draft_metrics), draft_grads = every(
                settings, state.updates,
                lambda: of_draft(state.draft.weights, state.draft, state.policy, trunks,
                                 logprobs, micro.rows, settings))
        return (grads, metrics, draft_grads, draft_metrics), gap

    cut = shapes(batch, settings.micro_batch, settings.widths)
    ((grads, to_prompts), metrics, draft_grads,
     draft_metrics), gap = accumulate(of_rows, batch, cut)
    (through_prompts,) = pull(jax.tree.map(lambda x, like: x.astype(like.dtype), to_prompts,
                                           prompts))
    grads = jax.tree.map(jnp.add, grads, as_weights(through_prompts))
    metrics |= {"trained_tokens": batch.mask.sum(dtype=jnp.float32), "logprob_gap": gap,
                **gap_quantiles(metrics.pop("gap_counts"), gap)}
    if not with_draft:
        return (grads, metrics), None
    return ((grads, metrics),
            jax.tree.map(lambda x: x / totals.tokens, (draft_grads, draft_metrics)))


def with_shares(batch: TrainBatch, settings: UpdateSettings,
                updates: jax.Array | int = 0) -> tuple[TrainBatch, Totals]:
    """What an update learns from, after so many others: the mini-batch whose turn it is, with what
    its tokens count in the loss, and what that is divided by.

    They count what they count in the rollout's loss, which is the mean of its mini-batches'.
    """
    shares, whole = token_shares(batch.mask, batch.group_size, settings.aggregation,
                                 settings.constant_length or batch.mask.shape[1])
    parts = settings.mini_batches
    batch = part_of(batch.replace(shares=shares), updates % parts, parts)
    return batch, Totals(jnp.maximum(batch.mask.sum(dtype=jnp.float32), 1.0), whole / parts)


def moved(state: TrainState, weights: Any, settings: UpdateSettings) -> Any:
    """The state's reference after an update to `weights`: it moves with the last update of every
    `kl_reference_every`-th step."""
    if state.reference is None:
        return None
    done, of_step = jnp.divmod(state.updates + 1, settings.updates_per_step)
    due = (of_step == 0) & (done % settings.kl_reference_every == 0)
    mix = settings.kl_reference_mix
    return jax.tree.map(lambda old, new: jnp.where(due, mix * new + (1.0 - mix) * old, old),
                        state.reference, weights)


def gap_quantiles(counts: jax.Array, most: jax.Array) -> dict[str, jax.Array]:
    """Of the gaps that were counted (`losses.histogram`), of which `most` is the largest."""
    shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    values = quantiles(counts, most, tuple(shares.values()))
    return {f"logprob_gap_{name}": value for name, value in zip(shares, values, strict=True)}


def in_float32(tree: Any) -> Any:
    """Every array of a tree as float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def every(settings: UpdateSettings, updates: jax.Array, compute: Callable[[], Any]) -> Any:
    """`compute()` where the draft is due, zeros in the steps between."""
    if settings.draft_every == 1:
        return compute()
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return jax.lax.cond(draft_due(settings, updates), compute, lambda: zeros)


def draft_gradients(state: TrainState, batch: TrainBatch,
                    settings: UpdateSettings) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients and metrics of the draft alone, from the batch's own states: means over trained
    tokens."""
    count = jnp.maximum(batch.mask.sum(dtype=jnp.float32), 1.0)

    def of_rows(micro: MicroBatch) -> tuple[tuple, Any]:
        with jax.named_scope("draft_loss"):
            of_draft = jax.value_and_grad(draft_loss, has_aux=True)
            (_, metrics), grads = of_draft(state.draft.weights, state.draft, state.policy, None,
                                           micro.rows.logprobs, micro.rows, settings)
        return (grads, metrics), ()

    sums, _ = accumulate(of_rows, batch, shapes(batch, settings.micro_batch, settings.widths))
    return jax.tree.map(lambda x: x / count, sums)


def described(batch: TrainBatch, settings: UpdateSettings) -> str:
    """How a batch's update goes about it, in words."""
    blocks, cut = blocks_of(batch), shapes(batch, settings.micro_batch, settings.widths)
    prompts, length = batch.prompts.shape
    return (f"{prompts} prompts of {length} tokens, then by length "
            + ", ".join(f"{blocks * rows} x {width}" for rows, width in cut)
            + " rows x tokens at a time")


def apply_gradients(optimizer: optax.GradientTransformation, weights: Any, opt_state: Any,
                    grads: Any, sound: jax.Array) -> tuple[Any, Any]:
    """One optimizer step where `sound`, nothing at all where not. Returns (weights, opt_state)."""
    # not optax.apply_if_finite: after some failures in a row that lets one through, and it sees
    # gradients, not the loss
    changes, new_state = optimizer.update(grads, opt_state, weights)
    new = (optax.apply_updates(weights, changes), new_state)
    return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, (weights, opt_state))


def update(state: TrainState, reference: Policy | None, batch: TrainBatch,
           settings: UpdateSettings) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the policy and, where it is due, of the draft. Jittable; the loop donates
    `state`.

    A non-finite loss or gradient leaves its own side as it was, optimizer state included, and is
    counted.

    Returns (state, metrics): float32 scalars `loss`, `entropy`, `clip_fraction` (and of it
    `clip_fraction/low` and `/high`), `kl` (with a reference), `logprob_gap`, `logprob_gap_mean` and
    `logprob_gap_p50/p99/p999` (|verifier's - own log-probability|, nats), `logprob_gap_flip_rate`
    (of tokens, out of the clip's range), `route_flip_rate` (of a sparse policy: of tokens and
    sparse layers, to other experts than the verifier's), `grad_norm` (before the clip),
    `learning_rate`, `trained_tokens`, and `draft/...` the same of the draft; and int32 counts of
    skipped updates.
    """
    (grads, metrics), of_draft = gradients(state, reference, batch, settings)
    optimizer, draft_optimizer = optimizers(settings, state.updates)
    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(grads)
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        weights, opt_state = apply_gradients(optimizer, trained(state.policy), state.opt_state,
                                             grads, sound)
    step = state.updates // settings.updates_per_step
    metrics = {**metrics, "grad_norm": norm,
               "learning_rate": jnp.asarray(rate(settings, step), jnp.float32)}
    new = state.replace(policy=with_trained(state.policy, weights), opt_state=opt_state,
                        reference=moved(state, weights, settings), updates=state.updates + 1,
                        skipped=state.skipped + (~sound).astype(jnp.int32),
                        skipped_in_row=jnp.where(sound, 0, state.skipped_in_row + 1))
    if of_draft is not None:
        new, draft_metrics = step_draft(new, draft_optimizer, *of_draft,
                                        due=draft_due(settings, state.updates))
        metrics |= draft_metrics
    counts = ("skipped", "skipped_in_row", "draft_skipped", "draft_skipped_in_row")
    return new, {**metrics, **{name: getattr(new, name) for name in counts}}


def update_draft(state: TrainState, batch: TrainBatch,
                 settings: UpdateSettings) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the draft alone, from the verifier's states in `batch.trunk`. Jittable; the
    loop donates `state`.

    The states are those of `state.policy`: call it before `update`. Returns (state, metrics
    `draft/...`).
    """
    _, optimizer = optimizers(settings, state.updates)
    return step_draft(state, optimizer, *draft_gradients(state, batch, settings),
                      due=jnp.array(True))


def step_draft(state: TrainState, optimizer: optax.GradientTransformation, grads: Any,
               metrics: dict[str, jax.Array],
               due: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of the draft's optimizer; nothing changes where it is not due."""
    with jax.named_scope("draft_optimizer"):
        norm = optax.tree.norm(grads)
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        weights, opt_state = apply_gradients(optimizer, state.draft.weights, state.draft_opt_state,
                                             grads, sound & due)
    failed = ~sound & due
    in_row = jnp.where(due, jnp.where(sound, 0, state.draft_skipped_in_row + 1),
                       state.draft_skipped_in_row)
    state = state.replace(draft=state.draft.replace(weights=weights), draft_opt_state=opt_state,
                          draft_skipped=state.draft_skipped + failed.astype(jnp.int32),
                          draft_skipped_in_row=in_row)
    return state, {f"draft/{name}": value for name, value in {**metrics, "grad_norm": norm}.items()}
