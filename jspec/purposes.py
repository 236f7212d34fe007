"""What noise is for: one seed serves all of a run, and no two purposes share any of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.noise import seed_key

(POLICY_KEY, DRAFT_KEY, INSTRUCTIONS_KEY, EVAL_KEY, REPORT_KEY, SAMPLES_KEY, BENCH_KEY,
 LORA_KEY) = range(2**32 - 1, 2**32 - 9, -1)
"""What noise is for, folded into a seed's key before anything else is: training folds in its steps
there, and no step has these numbers. So no two purposes share noise, whatever their seeds."""


def purpose_key(seed: int, purpose: int) -> jax.Array:
    """The typed key of one of the purposes above, of `seed`'s noise."""
    return jax.random.fold_in(seed_key(seed), purpose)


def purpose_seed(seed: int, purpose: int) -> int:
    """A seed below 2**32 for what takes numbers, such as the order of prompts."""
    return int(jax.random.bits(purpose_key(seed, purpose), dtype=jnp.uint32))
