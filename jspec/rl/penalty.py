"""The KL to the reference in the reward: what an answer is worth less how far its tokens are from
what the reference would have said."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jspec.model import Policy
from jspec.model.lora import with_trained
from jspec.rl.batch import TrainBatch
from jspec.rl.losses import kl_estimate
from jspec.rl.micro_batches import MicroBatch, accumulate, shapes
from jspec.rl.objective import prompt_states, response_logprobs
from jspec.rl.state import TrainState
from jspec.rl.update_settings import UpdateSettings


def reference_of(state: TrainState, reference: Policy | None) -> Policy | None:
    """What the KL is taken against: the state's own reference where it moves, the base of adapters,
    or the first policy, which is given."""
    if state.reference is not None:
        return with_trained(state.policy, state.reference)
    return reference if state.policy.adapters is None else state.policy.replace(adapters=None)


def penalised(state: TrainState, reference: Policy | None, batch: TrainBatch, rewards: jax.Array,
              settings: UpdateSettings) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Rewards float32 [N] less `kl_weight` times the KL of the policy that sampled to the
    reference, estimated from each generated token and summed over the answer. Jittable.

    Of the advantage `whitened`, which is REINFORCE++'s, each token is worth the reward less the KL
    from it on: [N, T]. Returns (rewards, metrics `kl`, the mean over tokens).
    """
    reference = reference_of(state, reference)
    prompts, _ = prompt_states(reference, batch, settings)

    def of_rows(micro: MicroBatch) -> tuple[jax.Array, tuple]:
        rows = micro.rows
        _, anchored, *_ = response_logprobs(reference, prompts, micro, settings)
        kl = kl_estimate(rows.logprobs, anchored, rows.mask, settings.kl_estimate)
        return micro.back(kl, batch.mask.shape[1]), ()

    with jax.named_scope("policy_loss"):
        kl, _ = accumulate(of_rows, batch, shapes(batch, settings.micro_batch, settings.widths))
    count = jnp.maximum(batch.mask.sum(dtype=jnp.float32), 1.0)
    metrics = {"kl": kl.sum() / count}
    if settings.advantage == "whitened":
        from_here = jnp.cumsum(kl[:, ::-1], axis=1)[:, ::-1]
        return rewards[:, None] - settings.kl_weight * from_here, metrics
    return rewards - settings.kl_weight * kl.sum(axis=1), metrics
