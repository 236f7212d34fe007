"""The GRPO update: policy loss and detached draft loss from one forward, each with an optimizer of its own.

One jitted, donated step. As in the rollout, a prompt is computed once for all the sequences of its group that a
micro-batch holds. The draft's gradient is taken of the draft's weights only, from hidden states behind `stop_gradient`,
so that nothing of it reaches the policy; a barrier on those states keeps XLA from compiling the policy's part
differently because somebody else reads them.

With `draft_features="rollout"` the draft learns in a step of its own (`update_draft`), from the states that the
verifier computed, before the policy's update or while rewards are computed.
"""

from __future__ import annotations

import dataclasses
import math
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
from jspec.model import Policy, Trunk, group_forward
from jspec.rl.losses import clipped_objective, k3, predicting_states, token_logprobs
from jspec.rl.state import TrainState
from jspec.sharding import batch_shards, constrain, current_mesh
from jspec.speculate import PromptBatch, Rollout
from pallas_kernels.noise import key_words, seed_key


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """What an update needs to know and what is fixed for a run; `jspec.config` says what each of them means."""

    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_weight: float = 0.0
    updates_per_rollout: int = 1
    micro_batch: int = 0
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
        same = ("clip_low", "clip_high", "kl_weight", "updates_per_rollout", "micro_batch", "learning_rate", "clip",
                "weight_decay", "warmup_steps")
        return cls(temperature=config.sampling.temperature, remat=config.model.remat, train_draft=draft.train,
                   draft_every=draft.every_n_steps, draft_features=draft.features, draft_loss=draft.loss,
                   draft_optimizer=draft.optimizer,
                   draft_learning_rate=draft.learning_rate, draft_clip=draft.clip,
                   **{name: getattr(grpo, name) for name in same})


@struct.dataclass
class TrainBatch:
    """P prompts and the N sequences that continue them, row i prompt i // (N // P).

    Attributes:
      prompts: int32 [P, L], right-padded. prompt_lengths: int32 [P].
      tokens: int32 [N, T], the responses.
      logprobs: float32 [N, T], of the responses' tokens, from the verifier.
      mask: bool [N, T], the responses' tokens that are trained.
      advantages: float32 [N]. None where nothing but the draft learns.
      trunk: the verifier's states (`Rollout.trunk`), or None.
    """

    prompts: jax.Array
    prompt_lengths: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    mask: jax.Array
    advantages: jax.Array | None
    trunk: Trunk | None = None

    @property
    def group_size(self) -> int:
        """Sequences of one prompt."""
        return self.tokens.shape[0] // self.prompts.shape[0]


def make_batch(prompts: PromptBatch, rollout: Rollout, advantages: jax.Array | None) -> TrainBatch:
    """What a rollout gives the update to learn from. Jittable."""
    return TrainBatch(prompts.tokens, prompts.lengths, rollout.tokens, rollout.logprobs, rollout.loss_mask, advantages,
                      rollout.trunk)


def join(prompts: jax.Array, lengths: jax.Array, responses: jax.Array) -> jax.Array:
    """Prompts [P, L, ...] and responses [N, T, ...] as rows [N, L + T, ...] without a gap, zeros after them."""
    group, length = responses.shape[0] // prompts.shape[0], prompts.shape[1]
    start, position = jnp.repeat(lengths, group)[:, None], jnp.arange(length + responses.shape[1])
    rows = jnp.concatenate([jnp.repeat(prompts, group, axis=0), responses], axis=1)
    rows = jnp.pad(rows, ((0, 0), (0, 1), *((0, 0),) * (rows.ndim - 2)))  # one column of padding, to read from
    source = jnp.where(position < start, position, jnp.minimum(length + position - start, rows.shape[1] - 1))
    rows = jnp.take_along_axis(rows, source.reshape(*source.shape, *(1,) * (rows.ndim - 2)), axis=1)
    return constrain(rows, "train", "batch", *(None,) * (rows.ndim - 1))


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
    return draft is not None and settings.train_draft and draft.module.loss is not None


def learned_from(draft: Draft | None, settings: UpdateSettings) -> tuple[int, ...] | None:
    """The features that a rollout keeps (`Speculation.states`) for `update_draft`; None: nothing learns from it."""
    if not trains_draft(draft, settings) or settings.draft_features == "update":
        return None
    return draft.module.features(draft.config)


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
    return TrainState(policy, draft, _init_optimizer(optimizer, policy.weights), draft_opt_state, *counts, key)


def _init_optimizer(optimizer: optax.GradientTransformation, weights: Any) -> Any:
    if current_mesh() is None:
        return jax.jit(optimizer.init)(weights)
    # zeros depend on nothing, so XLA would not place them by itself
    shapes = jax.eval_shape(optimizer.init, weights)
    everywhere = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    shardings = optax.tree_map_params(optimizer, lambda _, weight: weight.sharding, shapes, weights,
                                      transform_non_params=lambda _: everywhere)
    return jax.jit(optimizer.init, out_shardings=shardings)(weights)


def policy_loss(weights: Any, policy: Policy, reference: Policy | None, batch: TrainBatch, count: jax.Array,
                settings: UpdateSettings,
                features: tuple[int, ...] = ()) -> tuple[jax.Array, tuple[dict, tuple[Trunk, Trunk], jax.Array]]:
    """The clipped objective of `batch`'s rows over the global `count` of trained tokens, plus the KL where asked for.

    Returns (loss, (metrics, trunks of prompts and responses with `features`, log-probabilities of the responses'
    tokens)). Metrics are this batch's share of token means over `count`, so that those of micro-batches add up;
    `logprob_gap` is a maximum.
    """
    trunks, logprobs, entropy = response_logprobs(policy.replace(weights=weights), batch, settings, features)
    surrogate, clipped = clipped_objective(logprobs, batch.logprobs, batch.advantages, batch.mask, settings.clip_low,
                                           settings.clip_high)
    gap = jnp.where(batch.mask, jnp.abs(logprobs - batch.logprobs), 0.0)

    def mean(x):
        return jnp.sum(x, where=batch.mask, dtype=jnp.float32) / count

    loss = -mean(surrogate)
    metrics = {"entropy": mean(entropy), "clip_fraction": mean(clipped), "logprob_gap_mean": mean(gap)}
    if settings.kl_weight:
        _, anchor, _ = response_logprobs(reference, batch, settings)
        metrics["kl"] = mean(k3(logprobs, jax.lax.stop_gradient(anchor), batch.mask))
        loss = loss + settings.kl_weight * metrics["kl"]
    return loss, ({**metrics, "loss": loss, "logprob_gap": gap.max()}, trunks, logprobs)


def response_logprobs(policy: Policy, batch: TrainBatch, settings: UpdateSettings,
                      features: tuple[int, ...] = ()) -> tuple[tuple[Trunk, Trunk], jax.Array, jax.Array]:
    """(trunks of prompts and responses, log-probabilities of the responses' tokens, entropy, both float32 [N, T])."""
    trunks = jax.lax.optimization_barrier(group_forward(policy, batch.prompts, batch.prompt_lengths, batch.tokens,
                                                        features=features, remat=settings.remat))
    hidden = predicting_states(*(trunk.hidden for trunk in trunks), batch.prompt_lengths)
    return trunks, *token_logprobs(policy, hidden, batch.tokens, settings.temperature)


def draft_loss(weights: Any, draft: Draft, policy: Policy, trunks: tuple[Trunk, Trunk] | None, logprobs: jax.Array,
               batch: TrainBatch, settings: UpdateSettings) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The drafter's own loss, a sum over trained tokens, with the policy and all that it computed detached.

    trunks: of prompts and responses; None: the states are those of the batch, whose rows have no gap already.
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
    loss, _, metrics = draft.module.loss(policy, draft.replace(weights=weights), rows, settings.draft_loss)
    return loss, {**metrics, "loss": loss}


def gradients(state: TrainState, reference: Policy | None, batch: TrainBatch, settings: UpdateSettings):
    """Gradients and metrics of all rows, micro-batch by micro-batch, accumulated in float32.

    Returns ((policy gradients, policy metrics), (draft gradients, draft metrics) or None). Gradients of the policy are
    of the token mean over all rows; the draft's too.
    """
    count = jnp.maximum(batch.mask.sum(dtype=jnp.float32), 1.0)
    with_draft = trains_draft(state.draft, settings) and learned_from(state.draft, settings) is None
    features = state.draft.module.features(state.draft.config) if with_draft else ()

    def one(rows: TrainBatch):
        with jax.named_scope("policy_loss"):
            of_policy = jax.value_and_grad(policy_loss, has_aux=True)
            (_, (metrics, *computed)), grads = of_policy(state.policy.weights, state.policy, reference, rows, count,
                                                      settings, features)
        gap = metrics.pop("logprob_gap")
        if not with_draft:
            return (grads, metrics, None, None), gap
        with jax.named_scope("draft_loss"):
            of_draft = jax.value_and_grad(draft_loss, has_aux=True)
            (_, draft_metrics), draft_grads = every(
                settings, state.updates, lambda: of_draft(state.draft.weights, state.draft, state.policy, *computed,
                                                          rows, settings))
        return (grads, metrics, draft_grads, draft_metrics), gap

    (grads, metrics, draft_grads, draft_metrics), gap = accumulate(one, batch, settings.micro_batch)
    metrics = {**metrics, "logprob_gap": gap}
    if not with_draft:
        return (grads, metrics), None
    return (grads, metrics), jax.tree.map(lambda x: x / count, (draft_grads, draft_metrics))


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

    def one(rows: TrainBatch):
        with jax.named_scope("draft_loss"):
            of_draft = jax.value_and_grad(draft_loss, has_aux=True)
            (_, metrics), grads = of_draft(state.draft.weights, state.draft, state.policy, None, rows.logprobs, rows,
                                           settings)
        return (grads, metrics), ()

    sums, _ = accumulate(one, batch, settings.micro_batch)
    return jax.tree.map(lambda x: x / count, sums)


def accumulate(one: Callable[[TrainBatch], tuple[Any, Any]], batch: TrainBatch, micro_batch: int) -> tuple[Any, Any]:
    """`one` gives (sums, maxima) of rows: those of all rows, in chunks of `micro_batch`, gradients in float32."""
    if not micro_batch or micro_batch == batch.tokens.shape[0]:
        return one(batch)

    def body(total, rows):
        sums, maxima = one(rows)
        return (jax.tree.map(jnp.add, total[0], sums), jax.tree.map(jnp.maximum, total[1], maxima)), None

    chunks = micro_batches(batch, micro_batch)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], chunks))
    return jax.lax.scan(body, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), chunks)[0]


def micro_batches(batch: TrainBatch, rows: int) -> TrainBatch:
    """The batch cut into chunks of `rows` sequences along a new leading axis, with as many siblings together as fit.

    A chunk takes every n-th prompt and every m-th sibling: where the prompts are sharded, of every device's contiguous
    block its share.
    """
    prompts, group = batch.prompts.shape[0], batch.group_size
    shards = batch_shards("train")
    siblings = math.gcd(rows // shards if prompts % shards == 0 else rows, group)
    together = rows // siblings  # prompts of a chunk
    n, m = prompts // together, group // siblings

    def by_row(x):
        return jnp.moveaxis(x.reshape(together, n, siblings, m, *x.shape[1:]), (1, 3), (0, 1))

    def by_prompt(x):
        x = x.reshape(together, n, 1, *x.shape[1:]).swapaxes(0, 1)[:, None]
        return jnp.broadcast_to(x, (n, m, *x.shape[2:]))

    def split(x):
        x = by_prompt(x) if x.shape[0] == prompts else by_row(x)
        x = x.reshape(n * m, -1, *x.shape[4:])
        return constrain(x, "train", None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)


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
    (grads, metrics), of_draft = gradients(state, reference, batch, settings)
    optimizer, draft_optimizer = optimizers(settings)
    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(grads)
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        weights, opt_state = apply_gradients(optimizer, state.policy.weights, state.opt_state, grads, sound)
    metrics = {**metrics, "grad_norm": norm, "trained_tokens": batch.mask.sum(dtype=jnp.float32)}
    new = state.replace(policy=state.policy.replace(weights=weights), opt_state=opt_state, updates=state.updates + 1,
                        skipped=state.skipped + ~sound, skipped_in_row=jnp.where(sound, 0, state.skipped_in_row + 1))
    if of_draft is not None:
        new, draft_metrics = step_draft(new, draft_optimizer, *of_draft, draft_due(settings, state.updates))
        metrics |= draft_metrics
    counts = ("skipped", "skipped_in_row", "draft_skipped", "draft_skipped_in_row")
    return new, {**metrics, **{name: getattr(new, name) for name in counts}}


def update_draft(state: TrainState, batch: TrainBatch, settings: UpdateSettings):
    """One update of the draft alone, from the verifier's states in `batch.trunk`. Jittable; the loop donates `state`.

    The states are those of `state.policy`: call it before `update`. Returns (state, metrics `draft/...`).
    """
    _, optimizer = optimizers(settings)
    return step_draft(state, optimizer, *draft_gradients(state, batch, settings), jnp.array(True))


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
                          draft_skipped=state.draft_skipped + failed, draft_skipped_in_row=in_row)
    return state, {f"draft/{name}": value for name, value in {**metrics, "grad_norm": norm}.items()}
