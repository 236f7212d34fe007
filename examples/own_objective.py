"""An objective of one's own: REINFORCE on what was sampled, with the ratio as a weight up to 2 and
no clip.

    jspec train configs/tiny.yaml grpo.objective=examples/own_objective.py:weighted

It is given `jspec.rl.objectives.Tokens` (log-probabilities, log-ratios, advantages, mask) and the
run's limits, and returns the loss of each token; advantages and aggregation stay settings.
"""

import jax
import jax.numpy as jnp

from jspec.rl.objectives import Limits, Tokens


def weighted(tokens: Tokens, limits: Limits) -> jax.Array:
    weight = jax.lax.stop_gradient(jnp.exp(tokens.log_ratio))
    return -jnp.minimum(weight, 2.0) * tokens.advantages * tokens.logprobs
