"""Answers' log-probabilities as an update computes them, before the first one of a step."""

from __future__ import annotations

import jax

from jspec.rl.batch import TrainBatch
from jspec.rl.micro_batches import MicroBatch, accumulate, shapes
from jspec.rl.objective import prompt_states, response_logprobs
from jspec.rl.state import TrainState
from jspec.rl.update_settings import UpdateSettings


def own_logprobs(state: TrainState, batch: TrainBatch, settings: UpdateSettings) -> jax.Array:
    """Of every trained token, float32 [N, T], 0 elsewhere, under the distribution that the loss is
    of (`UpdateSettings.cut`). Jittable."""
    prompts, _ = prompt_states(state.policy, batch, settings)

    def of_rows(micro: MicroBatch) -> tuple[jax.Array, tuple]:
        _, logprobs, _, cut = response_logprobs(state.policy, prompts, micro, settings,
                                                cut=settings.cut)
        logprobs = jax.numpy.where(micro.rows.mask, logprobs if cut is None else cut, 0.0)
        return micro.back(logprobs, batch.mask.shape[1]), ()

    with jax.named_scope("policy_loss"):
        return accumulate(of_rows, batch, shapes(batch, settings.micro_batch,
                                                 settings.widths))[0]
