"""Equality token for token, up to what float32 leaves open.

Matrix products of different shapes round differently, so a token may differ where the margin that
decided it is below a tolerance. Sequences are compared up to the first difference; it must be such
a tie; and ties must be few.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jspec.model import logits, train_forward
from pallas_kernels import noise
from pallas_kernels.rejection_sampling import process_logits

TIE = 1e-4  # in log-probability plus noise, float32


def _row(x, i):
    return None if x is None else jnp.broadcast_to(x, jnp.shape(x) or (i + 1,))[i]


def deciding_margin(policy, batch, sampling, row, prefix, tokens):
    """By how much the best token of row `row` after `prefix` beats the worst of `tokens`, under
    coupled noise."""
    prompt = row // batch.group_size
    before = [*np.asarray(batch.tokens[prompt, :int(batch.lengths[prompt])]), *prefix]
    score = logits(policy, train_forward(policy, jnp.array([before], jnp.int32)).hidden[0, -1])
    temperature = _row(jnp.asarray(sampling.temperature, jnp.float32), row)
    log_p = process_logits(score, temperature, _row(sampling.top_p, row), top_k=sampling.top_k)
    key = noise.fold(jax.random.key_data(batch.key), batch.sequence_ids[row], len(before),
                     noise.TARGET)
    bits = noise.random_bits(key, jnp.arange(log_p.shape[-1]))
    # at temperature 0 the largest logit decides, and there is no noise
    score = jnp.where(temperature > 0, log_p + noise.gumbel(bits), score)
    return float(score.max() - score[jnp.array(tokens)].min())


def assert_same(policy, batch, sampling, a, b, *, at_most=1):
    """Rollouts a and b have the same tokens in every row, but for at most so many ties."""
    ties = 0
    for i, (x, y) in enumerate(zip(generated(a), generated(b), strict=True)):
        if x == y:
            continue
        at = next((j for j, (s, t) in enumerate(zip(x, y, strict=False)) if s != t), None)
        assert at is not None, f"row {i}: one sequence ends where the other goes on: {x} {y}"
        margin = deciding_margin(policy, batch, sampling, i, x[:at], (x[at], y[at]))
        assert margin < TIE, (f"row {i} differs at token {at}, {x[at]} and {y[at]}, decided by "
                              f"a margin of {margin}")
        ties += 1
    assert ties <= at_most


def generated(out):
    """The tokens of every row, as lists."""
    return [row[:n].tolist()
            for row, n in zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)]
