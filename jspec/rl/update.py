"""The GRPO update: policy loss and detached draft loss from one forward, each with an optimizer of its own.

One jitted, donated step. Prompts are computed once, before the responses, which continue their keys and values in
micro-batches of like length (`jspec.rl.micro_batches`); what the responses' gradients say of those keys and values then
goes back through the prompts, once as well. The draft's gradient is taken of the draft's weights only, from hidden
states behind `stop_gradient`, so that nothing of it reaches the policy; a barrier on those states keeps XLA from
compiling the policy's part differently because somebody else reads them.

With `draft_features="rollout"` the draft learns in a step of its own (`update_draft`), from the states that the
verifier computed, before the policy's update or while rewards are computed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from jspec.config import Config
from jspec.drafts import Draft
from jspec.drafts.base import DraftBatch
from jspec.model import Policy, Trunk, param_specs, prompt_forward, response_forward
from jspec.rl.batch import TrainBatch, join
from jspec.rl.losses import clipped_objective, k3, predicting_states, token_logprobs
from jspec.rl.micro_batches import MicroBatch, accumulate, blocks_of, least_tokens, shapes
from jspec.rl.state import TrainState
from jspec.sharding import block_rows, constrain, constrain_tree, current_mesh
from pallas_kernels.noise import key_words, seed_key

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """What an update needs to know and what is fixed for a run; `jspec.config` says what each of them means."""

    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_weight: float = 0.0
    updates_per_rollout: int = 1
    micro_batch: int = 0
    widths: tuple[int, ...] = ()
    remat: bool = False
    learning_rate: float = 1e-6
    clip: float = 1.0
    weight_decay: float = 0.0
    warmup_steps: int = 0
    train_draft: bool = True
    draft_every: int = 1
    draft_features: str = "update"
    draft_loss: str = "kl"
    draft_optimizer: str = "adamw"
    draft_learning_rate: float = 1e-3
    draft_clip: float = 1.0

    @classmethod
    def of(cls, config: Config) -> UpdateSettings:
        """The settings that a run's configuration gives."""
        grpo, draft = config.grpo, config.draft
        same = ("clip_low", "clip_high", "kl_weight", "updates_per_rollout", "micro_batch", "widths", "learning_rate",
                "clip", "weight_decay", "warmup_steps")
        return cls(temperature=config.sampling.temperature, remat=config.model.remat, train_draft=draft.train,
                   draft_every=draft.every_n_steps, draft_features=draft.features, draft_loss=draft.loss,
                   draft_optimizer=draft.optimizer,
                   draft_learning_rate=draft.learning_rate, draft_clip=draft.clip,
                   **{name: getattr(grpo, name) for name in same})


def optimizers(settings: UpdateSettings) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The policy's AdamW and the draft's own, each behind a global-norm clip of its own."""
    rate = settings.learning_rate
    if settings.warmup_steps:
        by_step = warmup(rate, settings.warmup_steps)
        rate = lambda updates: by_step(updates // settings.updates_per_rollout)  # noqa: E731
    policy = optax.chain(optax.clip_by_global_norm(settings.clip),
                         optax.adamw(rate, weight_decay=settings.weight_decay))
    return policy, draft_optimizer(settings.draft_optimizer, settings.draft_learning_rate, settings.draft_clip)


def warmup(rate: float, steps: int) -> optax.Schedule:
    """The learning rate of step 0, 1, ...: rate / steps, 2 rate / steps, ..., and `rate` from the `steps`-th step on.
    The first step already moves."""
    return optax.linear_schedule(rate / steps, rate, steps - 1)


def draft_optimizer(name: str, rate: optax.ScalarOrSchedule, clip: float) -> optax.GradientTransformation:
    """The draft's own: "adamw", or "muon" (https://kellerjordan.github.io/posts/muon/), whose updates of the matrices
    inside decoder blocks are scaled to AdamW's size, so that the same learning rates suit both; as in the post, what
    leads into the blocks and out of them (projections, embeddings, the output head) and all vectors stay on AdamW."""
    if name == "adamw":
        rule = optax.adamw(rate, weight_decay=0.0)
    else:
        rule = optax.contrib.muon(rate, consistent_rms=0.2, muon_weight_dimension_numbers=inside_blocks)
    return optax.chain(optax.clip_by_global_norm(clip), rule)


def inside_blocks(weights: Any) -> Any:
    """For each of a draft's weights what `optax.contrib.muon` asks of a matrix inside a decoder block (`layer_specs`,
    under the name `layer`), and None for all else."""
    def dimensions(path, x):
        within = any(getattr(entry, "key", None) == "layer" for entry in path)
        return optax.contrib.MuonDimensionNumbers(1, 0) if within and x.ndim == 2 else None  # [out, in]

    return jax.tree_util.tree_map_with_path(dimensions, weights)


def trains_draft(draft: Draft | None, settings: UpdateSettings) -> bool:
    """Whether there is a draft with a loss, and it is to be trained."""
    return draft is not None and settings.train_draft and draft.drafter.loss is not None


def learned_from(draft: Draft | None, settings: UpdateSettings) -> tuple[int, ...] | None:
    """The features that a rollout keeps (`Speculation.depths`) for `update_draft`; None: nothing learns from it."""
    if not trains_draft(draft, settings) or settings.draft_features == "update":
        return None
    return draft.drafter.features(draft.config)


def init_state(policy: Policy, draft: Draft | None, settings: UpdateSettings, seed: int) -> TrainState:
    """The state before the first update; moments are placed as the weights they belong to."""
    optimizer, draft_optimizer = optimizers(settings)
    draft_opt_state = _init_optimizer(draft_optimizer, draft.weights) if trains_draft(draft, settings) else ()
    mesh = current_mesh()
    everywhere = None if mesh is None else NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    # one buffer each, since the update donates them all
    counts = [jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=everywhere)() for _ in range(5)]
    data = np.asarray(key_words(seed_key(seed)))
    words = jax.jit(lambda: jnp.asarray(data), out_shardings=everywhere)()
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    return TrainState(policy, draft, _init_optimizer(optimizer, policy.weights), draft_opt_state, *counts, key=key)


def _init_optimizer(optimizer: optax.GradientTransformation, weights: Any) -> Any:
    if current_mesh() is None:
        return jax.jit(optimizer.init)(weights)
    # zeros depend on nothing, so XLA would not place them by itself
    shapes = jax.eval_shape(optimizer.init, weights)
    everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())

    def masked(x):  # of muon: the weights that the other rule has
        return isinstance(x, optax.MaskedNode)

    shardings = optax.tree_map_params(optimizer, lambda x, weight: x if masked(x) else weight.sharding, shapes, weights,
                                      transform_non_params=lambda _: everywhere, is_leaf=masked)
    return jax.jit(optimizer.init, out_shardings=shardings)(weights)


@struct.dataclass
class PromptStates:
    """What responses continue, of P prompts.

    Attributes:
      last: [P, D], final-normed, at each prompt's last token.
      keys_values: of all layers, [layers, P, L, kv_heads, head_dim] each.
    """

    last: jax.Array
    keys_values: tuple[jax.Array, jax.Array]


def prompt_states(policy: Policy, batch: TrainBatch, settings: UpdateSettings,
                  features: tuple[int, ...] = ()) -> tuple[PromptStates, Trunk]:
    """What responses continue, and the prompts' Trunk with `features`.

    As many prompts at a time as hold no more tokens than a micro-batch. Where that is not all of them, the backward
    pass computes them anew.
    """
    def one(prompts, lengths):
        trunk, keys_values = jax.lax.optimization_barrier(
            prompt_forward(policy, prompts, features=features, remat=settings.remat))
        last = jnp.take_along_axis(trunk.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        return PromptStates(last, keys_values), trunk

    blocks, (count, length) = blocks_of(batch), batch.prompts.shape
    each, (rows, width) = count // blocks, shapes(batch, settings.micro_batch, settings.widths)[0]
    fitting = max(1, max(rows * width, least_tokens()) // length)
    together = next(n for n in range(min(each, fitting), 0, -1) if each % n == 0)
    if together == each:
        return one(batch.prompts, batch.prompt_lengths)

    def split(x):
        return x.reshape(blocks, -1, together, *x.shape[1:]).swapaxes(0, 1).reshape(-1, blocks * together, *x.shape[1:])

    def merged(x, axis):  # [chunks, ..., blocks x together, ...] -> [..., P, ...]
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], -1, blocks, together, *x.shape[axis + 2:]).swapaxes(axis, axis + 1)
        return x.reshape(*x.shape[:axis], count, *x.shape[axis + 3:])

    states, trunk = jax.lax.map(lambda chunk: jax.checkpoint(one)(*chunk),
                                (split(batch.prompts), split(batch.prompt_lengths)))
    keys_values = jax.tree.map(lambda x: merged(x, 1), states.keys_values)
    return PromptStates(merged(states.last, 0), keys_values), jax.tree.map(lambda x: merged(x, 0), trunk)


def policy_loss(weights: Any, prompts: PromptStates, policy: Policy, anchor: tuple[Policy, PromptStates] | None,
                micro: MicroBatch, count: jax.Array, settings: UpdateSettings,
                features: tuple[int, ...] = ()) -> tuple[jax.Array, tuple[dict, Trunk, jax.Array]]:
    """The clipped objective of a micro-batch's rows over the global `count` of trained tokens, plus the KL where asked
    for. prompts: of the policy; anchor: the reference with its own.

    Returns (loss, (metrics, the responses' trunk with `features`, log-probabilities of their tokens)). Metrics are the
    rows' share of token means over `count`, so that those of micro-batches add up; `logprob_gap` is a maximum.
    """
    rows = micro.rows
    trunk, logprobs, entropy = response_logprobs(policy.replace(weights=weights), prompts, micro, settings, features)
    surrogate, clipped = clipped_objective(logprobs, rows.logprobs, rows.advantages, rows.mask, settings.clip_low,
                                           settings.clip_high)
    gap = jnp.where(rows.mask, jnp.abs(logprobs - rows.logprobs), 0.0)

    def mean(x):
        return jnp.sum(x, where=rows.mask, dtype=jnp.float32) / count

    loss = -mean(surrogate)
    metrics = {"entropy": mean(entropy), "clip_fraction": mean(clipped), "logprob_gap_mean": mean(gap)}
    if anchor is not None:
        _, anchored, _ = response_logprobs(*anchor, micro, settings)
        metrics["kl"] = mean(k3(logprobs, jax.lax.stop_gradient(anchored), rows.mask))
        loss = loss + settings.kl_weight * metrics["kl"]
    return loss, ({**metrics, "loss": loss, "logprob_gap": gap.max()}, trunk, logprobs)


def response_logprobs(policy: Policy, prompts: PromptStates, micro: MicroBatch, settings: UpdateSettings,
                      features: tuple[int, ...] = ()) -> tuple[Trunk, jax.Array, jax.Array]:
    """(trunk of the responses, log-probabilities of their tokens, entropy, both float32 [N, T])."""
    tokens = micro.rows.tokens
    trunk = jax.lax.optimization_barrier(response_forward(
        policy, tokens, micro.rows.prompt_lengths, prompts.keys_values, micro.prompts, features=features,
        remat=settings.remat))
    hidden = predicting_states(block_rows(prompts.last, micro.prompts), trunk.hidden)
    return trunk, *token_logprobs(policy, hidden, tokens, settings.temperature)


def draft_loss(weights: Any, draft: Draft, policy: Policy, trunks: tuple[Trunk, Trunk] | None, logprobs: jax.Array,
               batch: TrainBatch, settings: UpdateSettings) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The drafter's own loss, a sum over trained tokens, with the policy and all that it computed detached.

    trunks: of the rows' prompts and of their responses; None: the states are those of the batch, whose rows have no
    gap already.
    Returns (loss, metrics), all of them sums over trained tokens.
    """
    # The barrier is what keeps the policy's gradients the same bits with and without a draft: XLA must not share or
    # fuse anything of the two.
    policy, trunks, logprobs = jax.lax.optimization_barrier(jax.lax.stop_gradient((policy, trunks, logprobs)))
    tokens = join(batch.prompts, batch.prompt_lengths, batch.tokens)
    if trunks is None:
        trunk = jax.tree.map(lambda x: constrain(x[:, :tokens.shape[1]], "train", "batch", None, None), batch.trunk)
    else:
        trunk = jax.tree.map(lambda prompt, response: join(prompt, batch.prompt_lengths, response), *trunks)
    start = jnp.repeat(batch.prompt_lengths, batch.group_size)
    rows = DraftBatch(trunk, tokens, start, batch.mask, logprobs, jnp.asarray(settings.temperature))
    loss, _, metrics = draft.drafter.loss(policy, draft.replace(weights=weights), rows, settings.draft_loss)
    return loss, {**metrics, "loss": loss}


def gradients(state: TrainState, reference: Policy | None, batch: TrainBatch, settings: UpdateSettings):
    """Gradients and metrics of all rows, micro-batch by micro-batch, accumulated in float32.

    Returns ((policy gradients, policy metrics), (draft gradients, draft metrics) or None). Gradients of the policy are
    of the token mean over all rows; the draft's too.
    """
    count = jnp.maximum(batch.mask.sum(dtype=jnp.float32), 1.0)
    with_draft = trains_draft(state.draft, settings) and learned_from(state.draft, settings) is None
    features, config = state.draft.drafter.features(state.draft.config) if with_draft else (), state.policy.config

    def of_prompts(weights):
        with jax.named_scope("policy_loss"):
            return prompt_states(state.policy.replace(weights=weights), batch, settings, features)

    def as_weights(grads):  # else XLA may well sum them up whole on every device
        return constrain_tree(in_float32(grads), param_specs(config), config, state.policy.layout)

    prompts, pull, prompt_trunk = jax.vjp(of_prompts, state.policy.weights, has_aux=True)
    with jax.named_scope("policy_loss"):
        anchor = (reference, prompt_states(reference, batch, settings)[0]) if settings.kl_weight else None

    def one(micro: MicroBatch):
        with jax.named_scope("policy_loss"):
            of_policy = jax.value_and_grad(policy_loss, (0, 1), has_aux=True)
            (_, (metrics, trunk, logprobs)), grads = of_policy(state.policy.weights, prompts, state.policy, anchor,
                                                               micro, count, settings, features)
        grads, gap = (as_weights(grads[0]), in_float32(grads[1])), metrics.pop("logprob_gap")
        if not with_draft:
            return (grads, metrics, None, None), gap
        with jax.named_scope("draft_loss"):
            trunks = jax.tree.map(lambda x: block_rows(x, micro.prompts), prompt_trunk), trunk
            of_draft = jax.value_and_grad(draft_loss, has_aux=True)
            (_, draft_metrics), draft_grads = every(
                settings, state.updates, lambda: of_draft(state.draft.weights, state.draft, state.policy, trunks,
                                                          logprobs, micro.rows, settings))
        return (grads, metrics, draft_grads, draft_metrics), gap

    cut = shapes(batch, settings.micro_batch, settings.widths)
    ((grads, to_prompts), metrics, draft_grads, draft_metrics), gap = accumulate(one, batch, cut)
    (through_prompts,) = pull(jax.tree.map(lambda x, like: x.astype(like.dtype), to_prompts, prompts))
    grads, metrics = jax.tree.map(jnp.add, grads, as_weights(through_prompts)), {**metrics, "logprob_gap": gap}
    if not with_draft:
        return (grads, metrics), None
    return (grads, metrics), jax.tree.map(lambda x: x / count, (draft_grads, draft_metrics))


def in_float32(tree: Any) -> Any:
    """Every array of a tree as float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def every(settings: UpdateSettings, updates: jax.Array, compute: Callable[[], Any]) -> Any:
    """`compute()` where the draft is due, zeros in the steps between."""
    if settings.draft_every == 1:
        return compute()
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return jax.lax.cond(draft_due(settings, updates), compute, lambda: zeros)


def draft_due(settings: UpdateSettings, updates: jax.Array | int) -> jax.Array | bool:
    """Whether this update is of a step that trains the draft: the first, and every `draft_every`-th after it."""
    return updates // settings.updates_per_rollout % settings.draft_every == 0


def draft_gradients(state: TrainState, batch: TrainBatch, settings: UpdateSettings):
    """Gradients and metrics of the draft alone, from the batch's own states: means over trained tokens."""
    count = jnp.maximum(batch.mask.sum(dtype=jnp.float32), 1.0)

    def one(micro: MicroBatch):
        with jax.named_scope("draft_loss"):
            of_draft = jax.value_and_grad(draft_loss, has_aux=True)
            (_, metrics), grads = of_draft(state.draft.weights, state.draft, state.policy, None, micro.rows.logprobs,
                                           micro.rows, settings)
        return (grads, metrics), ()

    sums, _ = accumulate(one, batch, shapes(batch, settings.micro_batch, settings.widths))
    return jax.tree.map(lambda x: x / count, sums)


def described(batch: TrainBatch, settings: UpdateSettings) -> str:
    """How a batch's update goes about it, in words."""
    blocks, cut = blocks_of(batch), shapes(batch, settings.micro_batch, settings.widths)
    prompts, length = batch.prompts.shape
    return (f"{prompts} prompts of {length} tokens, then by length "
            + ", ".join(f"{blocks * rows} x {width}" for rows, width in cut) + " rows x tokens at a time")


def apply_gradients(optimizer: optax.GradientTransformation, weights: Any, opt_state: Any, grads: Any,
                    sound: jax.Array) -> tuple[Any, Any]:
    """One optimizer step where `sound`, nothing at all where not. Returns (weights, opt_state)."""
    changes, new_state = optimizer.update(grads, opt_state, weights)
    new = (optax.apply_updates(weights, changes), new_state)
    return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, (weights, opt_state))


def update(state: TrainState, reference: Policy | None, batch: TrainBatch, settings: UpdateSettings):
    """One update of the policy and, where it is due, of the draft. Jittable; the loop donates `state`.

    A non-finite loss or gradient leaves its own side as it was, optimizer state included, and is counted.

    Returns (state, metrics): float32 scalars `loss`, `entropy`, `clip_fraction`, `kl` (with a reference),
    `logprob_gap` and `logprob_gap_mean` (|verifier's - own log-probability|, nats), `grad_norm` (before the clip),
    `trained_tokens`, and `draft/...` the same of the draft; and int32 counts of skipped updates.
    """
    log.info("compiling the update: %s", described(batch, settings))
    (grads, metrics), of_draft = gradients(state, reference, batch, settings)
    optimizer, draft_optimizer = optimizers(settings)
    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(grads)
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        weights, opt_state = apply_gradients(optimizer, state.policy.weights, state.opt_state, grads, sound)
    metrics = {**metrics, "grad_norm": norm, "trained_tokens": batch.mask.sum(dtype=jnp.float32)}
    new = state.replace(policy=state.policy.replace(weights=weights), opt_state=opt_state, updates=state.updates + 1,
                        skipped=state.skipped + (~sound).astype(jnp.int32),
                        skipped_in_row=jnp.where(sound, 0, state.skipped_in_row + 1))
    if of_draft is not None:
        new, draft_metrics = step_draft(new, draft_optimizer, *of_draft, due=draft_due(settings, state.updates))
        metrics |= draft_metrics
    counts = ("skipped", "skipped_in_row", "draft_skipped", "draft_skipped_in_row")
    return new, {**metrics, **{name: getattr(new, name) for name in counts}}


def update_draft(state: TrainState, batch: TrainBatch, settings: UpdateSettings):
    """One update of the draft alone, from the verifier's states in `batch.trunk`. Jittable; the loop donates `state`.

    The states are those of `state.policy`: call it before `update`. Returns (state, metrics `draft/...`).
    """
    _, optimizer = optimizers(settings)
    return step_draft(state, optimizer, *draft_gradients(state, batch, settings), due=jnp.array(True))


def step_draft(state: TrainState, optimizer: optax.GradientTransformation, grads: Any, metrics: dict[str, jax.Array],
               due: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of the draft's optimizer; nothing changes where it is not due."""
    with jax.named_scope("draft_optimizer"):
        norm = optax.tree.norm(grads)
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        weights, opt_state = apply_gradients(optimizer, state.draft.weights, state.draft_opt_state, grads, sound & due)
    failed = ~sound & due
    in_row = jnp.where(due, jnp.where(sound, 0, state.draft_skipped_in_row + 1), state.draft_skipped_in_row)
    state = state.replace(draft=state.draft.replace(weights=weights), draft_opt_state=opt_state,
                          draft_skipped=state.draft_skipped + failed.astype(jnp.int32), draft_skipped_in_row=in_row)
    return state, {f"draft/{name}": value for name, value in {**metrics, "grad_norm": norm}.items()}
