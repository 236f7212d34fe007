"""What the update minimises, of one forward: the policy's loss (`losses.answer_loss`), and the
draft's own.

Prompts are computed once, before the responses, which continue their keys and values in
micro-batches.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jspec.drafts import Draft
from jspec.drafts.base import DraftBatch, maximum
from jspec.model import Policy, Trunk, prompt_forward, response_forward
from jspec.model.lora import with_trained
from jspec.rl.aggregation import Totals
from jspec.rl.batch import TrainBatch, join
from jspec.rl.losses import answer_loss, histogram, outside, predicting, token_logprobs
from jspec.rl.micro_batches import MicroBatch, blocks_of, least_tokens, shapes
from jspec.rl.update_settings import Cut, UpdateSettings
from jspec.sharding import block_rows, constrain


@struct.dataclass
class PromptStates:
    """What responses continue, of P prompts.

    Attributes:
      last: [P, D], final-normed, at each prompt's last token.
      keys_values: of all layers, [layers, P, L, kv_heads, head_dim] each.
      flips: float32 [P], `flipped` of their last tokens; None of a dense policy.
    """

    last: jax.Array
    keys_values: tuple[jax.Array, jax.Array]
    flips: jax.Array | None


def prompt_states(policy: Policy, batch: TrainBatch, settings: UpdateSettings,
                  features: tuple[int, ...] = ()) -> tuple[PromptStates, Trunk]:
    """What responses continue, and the prompts' Trunk with `features`.

    As many prompts at a time as hold no more tokens than a micro-batch. Where that is not all of
    them, the backward pass computes them anew.
    """
    def of_some(prompts, lengths, routes) -> tuple[PromptStates, Trunk]:
        trunk, keys_values = jax.lax.optimization_barrier(
            prompt_forward(policy, prompts, depths=features, remat=settings.remat,
                           routes=routes if settings.replay_routes else None))

        def at_last(x) -> jax.Array:
            index = (lengths - 1).reshape(-1, *(1,) * (x.ndim - 1))
            return jnp.take_along_axis(x, index, axis=1)[:, 0]

        flips = None if routes is None else flipped(at_last(trunk.routes), at_last(routes))
        return PromptStates(at_last(trunk.hidden), keys_values, flips), trunk

    blocks, (count, length) = blocks_of(batch), batch.prompts.shape
    each, (rows, width) = count // blocks, shapes(batch, settings.micro_batch, settings.widths)[0]
    fitting = max(1, max(rows * width, least_tokens()) // length)
    together = next(n for n in range(min(each, fitting), 0, -1) if each % n == 0)
    if together == each:
        return of_some(batch.prompts, batch.prompt_lengths, batch.prompt_routes)

    def split(x) -> jax.Array:
        return x.reshape(blocks, -1, together,
                         *x.shape[1:]).swapaxes(0, 1).reshape(-1, blocks * together, *x.shape[1:])

    def merged(x, axis) -> jax.Array:  # [chunks, ..., blocks x together, ...] -> [..., P, ...]
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], -1, blocks, together,
                      *x.shape[axis + 2:]).swapaxes(axis, axis + 1)
        return x.reshape(*x.shape[:axis], count, *x.shape[axis + 3:])

    states, trunk = jax.lax.map(lambda chunk: jax.checkpoint(of_some)(*chunk),
                                jax.tree.map(split, (batch.prompts, batch.prompt_lengths,
                                                     batch.prompt_routes)))
    keys_values = jax.tree.map(lambda x: merged(x, 1), states.keys_values)
    flips = None if states.flips is None else merged(states.flips, 0)
    return (PromptStates(merged(states.last, 0), keys_values, flips),
            jax.tree.map(lambda x: merged(x, 0), trunk))


def flipped(chosen: jax.Array, routes: jax.Array) -> jax.Array:
    """The share of the sparse layers that would have a token computed by other experts than
    `routes`, both uint8 [..., sparse layers, top_k]: float32 [...]. The order of the experts does
    not count."""
    among = (chosen[..., :, None] == routes[..., None, :]).any(-1).all(-1)
    return jnp.mean(~among, axis=-1, dtype=jnp.float32)


def policy_loss(weights: Any, prompts: PromptStates, policy: Policy,
                anchor: tuple[Policy, PromptStates] | None,
                micro: MicroBatch, totals: Totals, settings: UpdateSettings,
                features: tuple[int, ...] = ()) -> tuple[jax.Array, tuple[dict, Trunk, jax.Array]]:
    """The share that a micro-batch's rows have in the loss (`losses.answer_loss`). prompts: of the
    policy; anchor: the reference with its own, where the KL to it is in the loss.

    Returns (loss, (metrics, the responses' trunk with `features`, log-probabilities of their
    tokens)). Metrics are the rows' share of token means over all that are trained, so that those of
    micro-batches add up; `gap_counts` are the `losses.histogram` of the gaps, and `logprob_gap` is
    their maximum.
    """
    rows = micro.rows
    trunk, logprobs, entropy, behaviour = response_logprobs(
        with_trained(policy, weights), prompts, micro, settings, features, settings.cut)
    anchored = None if anchor is None else response_logprobs(*anchor, micro, settings)[1]
    loss, metrics = answer_loss(logprobs, entropy, anchored, rows, totals, settings, behaviour)
    gap = jnp.where(rows.mask, jnp.abs(logprobs - rows.logprobs), 0.0)

    def mean(x) -> jax.Array:
        return jnp.sum(x, where=rows.mask, dtype=jnp.float32) / totals.tokens

    metrics |= {"entropy": mean(entropy), "logprob_gap_mean": mean(gap),
                "gap_counts": histogram(gap, rows.mask), "logprob_gap": maximum(gap),
                "logprob_gap_flip_rate": mean(outside(logprobs, rows.logprobs, settings.clip_low,
                                                      settings.clip_high))}
    if rows.routes is not None:
        flips = flipped(trunk.routes, rows.routes)
        metrics["route_flip_rate"] = mean(predicting(block_rows(prompts.flips, micro.prompts),
                                                     flips))
    return loss, (metrics, trunk, logprobs)


def response_logprobs(policy: Policy, prompts: PromptStates, micro: MicroBatch,
                      settings: UpdateSettings, features: tuple[int, ...] = (),
                      cut: Cut | None = None) -> tuple[Trunk, jax.Array, jax.Array,
                                                       jax.Array | None]:
    """(trunk of the responses, and `token_logprobs` of their tokens)."""
    tokens = micro.rows.tokens
    trunk = jax.lax.optimization_barrier(response_forward(
        policy, tokens, micro.rows.prompt_lengths, prompts.keys_values, micro.prompts,
        depths=features,
        remat=settings.remat, routes=micro.rows.routes if settings.replay_routes else None))
    hidden = predicting(block_rows(prompts.last, micro.prompts), trunk.hidden)
    return trunk, *token_logprobs(policy, hidden, tokens, settings.temperature,
                                  through_entropy=bool(settings.entropy_weight), cut=cut)


def draft_loss(weights: Any, draft: Draft, policy: Policy, trunks: tuple[Trunk, Trunk] | None,
               logprobs: jax.Array, batch: TrainBatch,
               settings: UpdateSettings) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The drafter's own loss, a sum over trained tokens, with the policy and all that it computed
    detached.

    trunks: of the rows' prompts and of their responses, routes left out; None: the states are those
    of the batch, whose rows have no gap already.
    Returns (loss, metrics), all of them sums over trained tokens.
    """
    # The barrier is what keeps the policy's gradients the same bits with and without a draft: XLA
    # must not share or fuse anything of the two.
    policy, trunks, logprobs = jax.lax.optimization_barrier(jax.lax.stop_gradient((policy, trunks,
                                                                                   logprobs)))
    tokens = join(batch.prompts, batch.prompt_lengths, batch.tokens)
    if trunks is None:
        trunk = jax.tree.map(lambda x: constrain(x[:, :tokens.shape[1]], "train", "batch", None,
                                                 None), batch.trunk)
    else:
        trunk = jax.tree.map(lambda prompt, response: join(prompt, batch.prompt_lengths, response),
                             *trunks)
    start = jnp.repeat(batch.prompt_lengths, batch.group_size)
    rows = DraftBatch(trunk, tokens, start, batch.mask, logprobs, jnp.asarray(settings.temperature))
    loss, _, metrics = draft.drafter.loss(policy, draft.replace(weights=weights), rows,
                                          settings.draft_loss)
    return loss, {**metrics, "loss": loss}
