"""From logits to what is sampled from: end-token ban, temperature, top-k, top-p, min-p. See `api`
for shapes and meaning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# below it is what chips flush to 0, and what has no reciprocal
SMALLEST = float(np.finfo(np.float32).tiny)


def is_cut(top_k: int, top_p: jax.Array | None, min_p: jax.Array | None) -> bool:
    """Whether unlikely tokens are cut off before one is drawn: known when tracing."""
    return bool(top_k) or top_p is not None or min_p is not None


def flushed(temperature: jax.Array) -> jax.Array:
    """The temperature [...] as it counts, float32: 0 where it is below float32's smallest normal
    number, 1.2e-38."""
    temperature = jnp.asarray(temperature, jnp.float32)
    return jnp.where(temperature < SMALLEST, 0.0, temperature)


def divisor(temperature: jax.Array) -> jax.Array:
    """What logits are divided by, float32 [...]: the temperature, and 1 where it counts as 0."""
    temperature = flushed(temperature)
    return jnp.where(temperature > 0, temperature, 1.0)


def _top_k(log_p: jax.Array, k: int) -> jax.Array:
    """Keep the k largest, -inf elsewhere; ties go to the lowest id (as `lax.top_k` orders them)."""
    values, ids = jax.lax.top_k(log_p, min(k, log_p.shape[-1]))
    return jnp.put_along_axis(jnp.full_like(log_p, -jnp.inf), ids, values, axis=-1, inplace=False)


def _top_p(log_p: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keep the smallest set of most likely tokens whose mass reaches top_p; the one that crosses is
    kept."""
    order = jnp.argsort(-log_p, axis=-1, stable=True)
    ranked = jnp.take_along_axis(log_p, order, axis=-1)
    mass = jnp.exp(ranked)
    # rank 0 by name: at top_p = 0 no mass is below it; top_p >= 1 keeps all, whatever the sums
    # round to
    keep = ((jnp.cumsum(mass, axis=-1) - mass < top_p) | (jnp.arange(mass.shape[-1]) == 0)
            | (top_p >= 1))
    kept = jnp.where(keep, ranked, -jnp.inf)
    return jnp.put_along_axis(jnp.full_like(log_p, -jnp.inf), order, kept, axis=-1, inplace=False)


def _min_p(log_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Keep what is at least min_p times as likely as the likeliest token."""
    least = jnp.max(log_p, axis=-1, keepdims=True) + jnp.log(min_p)
    # the likeliest by name: rounding must not lose it at min_p = 1
    return jnp.where((log_p >= least) | (log_p == log_p.max(-1, keepdims=True)), log_p, -jnp.inf)


def lowest_argmax(x: jax.Array) -> jax.Array:
    """The lowest index of the largest value, int32 [...] from [..., V]: a quarter of `jnp.argmax`'s
    time on a CPU."""
    largest = x == jnp.max(x, -1, keepdims=True)
    last = jnp.int32(x.shape[-1] - 1)
    return jnp.min(jnp.where(largest, jnp.arange(x.shape[-1], dtype=jnp.int32), last), -1)


def scaled(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """(logits - the largest) / T, float32 [..., V], at most 0; temperature broadcasts to [...], and
    0 counts as 1.

    In this order: the difference of near logits is exact, and rounding the quotients of a small T
    by themselves would outweigh it.
    """
    logits = logits.astype(jnp.float32)
    largest = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    return (logits - largest) / divisor(temperature)[..., None]


def scaled_logprobs(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """log-softmax(logits / T), float32 [..., V], over the whole vocabulary; as `scaled`, and
    differentiable."""
    z = scaled(logits, temperature)
    return z - jnp.log(jnp.sum(jnp.exp(z), -1, keepdims=True))


def process_given(logits: jax.Array, raw: jax.Array, temperature: jax.Array,
                  top_p: jax.Array | None, top_k: int, min_p: jax.Array | None,
                  ban: jax.Array | None, banned_tokens: tuple[int, ...]) -> jax.Array:
    """`process_logits`, float32 [..., V], given `raw = scaled_logprobs(logits, temperature)`, which
    callers need for itself too. temperature, top_p, min_p: float32 [...]."""
    scores, log_p = logits.astype(jnp.float32), raw
    if ban is not None and banned_tokens:
        banned = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(banned_tokens)) & ban[..., None]
        scores = jnp.where(banned, -jnp.inf, scores)
        log_p = scaled_logprobs(scores, temperature)
    ids = jnp.arange(logits.shape[-1])
    greedy = jnp.where(ids == lowest_argmax(scores)[..., None], jnp.float32(0), -jnp.inf)
    log_p = jnp.where(temperature[..., None] > 0, log_p, greedy)
    if top_k:
        log_p = jax.nn.log_softmax(_top_k(log_p, top_k))
    if top_p is not None:
        log_p = jax.nn.log_softmax(_top_p(log_p, top_p[..., None]))
    if min_p is not None:
        log_p = jax.nn.log_softmax(_min_p(log_p, min_p[..., None]))
    return log_p


def process_logits(logits: jax.Array, temperature: jax.Array, top_p: jax.Array | None = None, *,
                   top_k: int = 0, min_p: jax.Array | None = None,
                   ban: jax.Array | None = None, banned_tokens: tuple[int, ...] = ()) -> jax.Array:
    """See `api.process_logits`: float32 [..., V] from logits [..., V]."""
    temperature = jnp.broadcast_to(flushed(temperature), logits.shape[:-1])
    top_p, min_p = (None if x is None else jnp.broadcast_to(x, logits.shape[:-1])
                    for x in (top_p, min_p))
    return process_given(logits, scaled_logprobs(logits, temperature), temperature, top_p, top_k,
                         min_p, ban, banned_tokens)
