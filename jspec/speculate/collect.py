"""What a rollout returns, of its sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jspec.model import ModelConfig
from jspec.speculate.results import Rollout, RolloutStats
from jspec.speculate.state import Sequences


def collect(sequences: Sequences, max_new_tokens: int, pad_token: int,
            stats: RolloutStats) -> Rollout:
    """The generated part of every sequence, with nothing but zeros and padding outside the mask."""
    lengths = sequences.lengths - sequences.prompt_lengths
    mask = jnp.arange(max_new_tokens) < lengths[:, None]
    width = sequences.tokens.shape[1]
    columns = jnp.minimum(sequences.prompt_lengths[:, None] + jnp.arange(max_new_tokens), width - 1)
    tokens = jnp.where(mask, jnp.take_along_axis(sequences.tokens, columns, axis=1), pad_token)
    logprobs, entropy, behaviour = (
        None if x is None else jnp.where(mask, x[:, :max_new_tokens], 0.0)
        for x in (sequences.logprobs, sequences.entropy, sequences.behaviour_logprobs))
    known = jnp.arange(width) < sequences.lengths[:, None] - 1
    trunk = jax.tree.map(lambda x: jnp.where(known[..., None], x, 0), sequences.trunk)
    return Rollout(tokens, mask, logprobs, mask, entropy, lengths, sequences.finished, stats, trunk,
                   behaviour_logprobs=behaviour, done=sequences.done)


def collect_routes(model: ModelConfig, of_prompts: jax.Array, sequences: Sequences,
                   lengths: jax.Array, max_new_tokens: int) -> dict[str, jax.Array]:
    """`prompt_routes` and `routes` of a Rollout. of_prompts: of the prefill; lengths: int32 [P],
    of the prompts."""
    experts, (prompts, _, layers, top_k) = model.experts, of_prompts.shape

    def known(routes, count) -> jax.Array:
        # elsewhere nothing depends on them; but when they are replayed, padding is computed too,
        # and no expert is to have more of it than another
        position = jnp.arange(routes.shape[1])[:, None, None]
        others = (position * top_k + jnp.arange(top_k)) % experts.count
        return jnp.where((position < count[:, None, None, None]), routes, others.astype(jnp.uint8))

    generated = sequences.lengths - sequences.prompt_lengths
    routes = sequences.routes.reshape(*sequences.routes.shape[:2], layers, top_k)
    # the verifier computes a prompt's last token again: once for each sibling, of which one is
    # taken
    first, row, last = (slice(None, None, len(generated) // prompts), jnp.arange(prompts),
                        lengths - 1)
    of_last = jnp.where(generated[first, None, None] > 0, routes[first, 0], of_prompts[row, last])
    return {"prompt_routes": known(of_prompts.at[row, last].set(of_last), lengths),
            "routes": known(routes[:, 1:1 + max_new_tokens], generated - 1)}
