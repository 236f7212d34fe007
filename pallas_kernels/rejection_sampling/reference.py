"""Plain JAX: the specification, and what the CPU runs. See `api` for shapes and meaning."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import noise as noise_lib
from pallas_kernels.noise import BlockNoise, CoupledNoise, CycleNoise, Noise
from pallas_kernels.rejection_sampling.processing import (
    flushed,
    is_cut,
    lowest_argmax,
    process_given,
    scaled_logprobs,
)

# the inverse transform picks a block by one uniform and a token inside it by another, so that
# neither the noise nor the cumulative sums span the vocabulary
VOCAB_BLOCK = 512


def first_above(mass: jax.Array, u: jax.Array, ids: jax.Array,
                axis: tuple[str, ...] | None = None) -> jax.Array:
    """The first id, int32 [B], whose cumulative mass exceeds u [B] times the total; never one
    without mass, if any has.

    mass: float32 [B, n], of ascending ids int32 [n] or [B, n]. `axis`: mesh axes over which both
    are split, in order; a sum and two ids a row cross them.
    """
    cumulative, positive = jnp.cumsum(mass, -1), mass > 0
    total = cumulative[:, -1]
    if axis is not None:
        before = jnp.zeros_like(total)
        sums = jax.lax.all_gather(total, axis)
        # one after the other: the last cumulative mass and the total must be the same float
        prefixes = [before := before + part for part in sums]
        prefix = jnp.stack([jnp.zeros_like(total), *prefixes])[jax.lax.axis_index(axis)]
        cumulative, total = prefix[:, None] + cumulative, prefixes[-1]
    ids = jnp.broadcast_to(ids, mass.shape)
    none = jnp.iinfo(jnp.int32).max
    # parallel sums are not quite monotone: an id without mass may be the first above, or none may
    # be
    first = jnp.where((cumulative > u[:, None] * total[:, None]) & positive, ids, none).min(-1)
    last = jnp.where(positive, ids, 0).max(-1)
    if axis is not None:
        first, last = jax.lax.pmin(first, axis), jax.lax.pmax(last, axis)
    return jnp.where(first == none, last, first).astype(jnp.int32)


def inverse_transform(mass: jax.Array, u: jax.Array) -> jax.Array:
    """Draw int32 [B] from unnormalised probabilities float32 [B, V] with two uniforms each,
    [B, 2]."""
    size = mass.shape[-1]
    padded = jnp.pad(mass,
                     ((0, 0), (0, -size % VOCAB_BLOCK))).reshape(mass.shape[0], -1, VOCAB_BLOCK)
    block = first_above(padded.sum(-1), u[:, 0], jnp.arange(padded.shape[1]))
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    return block * VOCAB_BLOCK + first_above(inside, u[:, 1], jnp.arange(VOCAB_BLOCK))


def _coupled_argmax(log_p: jax.Array, keys: jax.Array, ids: jax.Array | None = None) -> jax.Array:
    """Where log p + g is largest over the last axis, log_p [..., V], keys uint32 [..., 2], of ids
    int32 [V]."""
    ids = jnp.arange(log_p.shape[-1]) if ids is None else ids
    bits = noise_lib.random_bits(keys[..., None, :], ids)
    return lowest_argmax(log_p + noise_lib.gumbel(bits))


def draw(log_q: jax.Array, noise: Noise, offset: int,
         draft_vocab: jax.Array | None = None) -> jax.Array:
    """See `api.draw`: int32 [B] from log_q float32 [B, V]."""
    if isinstance(noise, CoupledNoise):
        at = _coupled_argmax(log_q, noise.keys[:, offset], draft_vocab)
    else:
        at = inverse_transform(jnp.exp(log_q), noise.draft[:, offset])
    return at if draft_vocab is None else draft_vocab[at]


def draft_logprobs(log_q: jax.Array, tokens: jax.Array, draft_vocab: jax.Array | None) -> jax.Array:
    """log q of tokens int32 [B, K], float32 [B, K], from log_q [B, K, Vd]; -inf outside the draft's
    vocabulary."""
    if draft_vocab is None:
        return _pick(log_q, tokens)
    return jnp.where(draft_vocab == tokens[..., None], log_q, -jnp.inf).max(-1)


def spread(log_q: jax.Array, draft_vocab: jax.Array, vocab: int,
           first: jax.Array | int = 0) -> jax.Array:
    """log_q [B, Vd] of a reduced vocabulary over the `vocab` ids from `first` on, [B, vocab]; -inf
    outside it."""
    column = draft_vocab - first
    column = jnp.where((column >= 0) & (column < vocab), column, vocab)
    return jnp.full((log_q.shape[0], vocab), -jnp.inf,
                    log_q.dtype).at[:, column].set(log_q, mode="drop")


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[..., index]: one element of the last axis for every leading position."""
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def leading(flags: jax.Array) -> jax.Array:
    """How many leading flags are true, int32 [B] from bool [B, K]."""
    return jnp.cumprod(flags, axis=-1, dtype=jnp.int32).sum(-1, dtype=jnp.int32)


def _coupled(log_p: jax.Array, draft_tokens: jax.Array,
             noise: CoupledNoise) -> tuple[jax.Array, jax.Array]:
    """Accepted int32 [B] and tokens int32 [B, K + 1], from log p float32 [B, K + 1, V] and drafts
    int32 [B, K]."""
    target = _coupled_argmax(log_p, noise.keys)
    return leading(target[:, :-1] == draft_tokens), target


def draft_mass(log_q: jax.Array) -> jax.Array:
    """q, float32 [..., V], of log q; 0 where that is no number: nothing can be said to have been
    drawn from it."""
    q = jnp.exp(log_q)
    return jnp.where(jnp.isfinite(q), q, 0.0)


def residual(log_p: jax.Array, log_q: jax.Array, weight: jax.Array | float = 1.0) -> jax.Array:
    """(weight p - q)+, unnormalised, float32 [B, V]; p itself where rounding leaves nothing.
    weight: [B, 1]."""
    p = jnp.exp(log_p)
    mass = jnp.maximum(weight * p - draft_mass(log_q), 0.0)
    return jnp.where(mass.sum(-1, keepdims=True) > 0, mass, p)


def log_ratio(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """log p(y) - log q(y) of every draft, float32 [B, K]; -inf, which no test passes, where log
    q(y) is not finite."""
    return jnp.where(jnp.isfinite(log_q), log_p - log_q, -jnp.inf)


def _log_ratio(log_p: jax.Array, draft_tokens: jax.Array, draft_log_q: jax.Array | None,
               draft_vocab: jax.Array | None) -> jax.Array:
    """`log_ratio`, float32 [B, K], of the drafts in rows [B, K, V]; of certain ones log p(y)."""
    drafted = _pick(log_p[:, :draft_tokens.shape[1]], draft_tokens)
    if draft_log_q is None:
        return drafted
    return log_ratio(drafted, draft_logprobs(draft_log_q, draft_tokens, draft_vocab))


def _emit(log_p: jax.Array, draft_tokens: jax.Array, draft_log_q: jax.Array | None,
          draft_vocab: jax.Array | None,
          accepted: jax.Array, noise: CycleNoise, weight: jax.Array | float) -> jax.Array:
    """Tokens int32 [B, K + 1]: the drafts, with one drawn after those that are accepted int32 [B],
    from (weight p - q)+ or, if all are, from p. weight: float32 [B, 1]."""
    k = draft_tokens.shape[1]
    last = jnp.take_along_axis(log_p, accepted[:, None, None], axis=1)[:, 0]
    if k:
        at = jnp.minimum(accepted, k - 1)
        if draft_log_q is None:
            refused = jnp.arange(last.shape[-1]) == _pick(draft_tokens, at)[:, None]
            log_q = jnp.where(refused, jnp.float32(0), -jnp.inf)
        else:
            log_q = jnp.take_along_axis(draft_log_q, at[:, None, None], axis=1)[:, 0]
            log_q = log_q if draft_vocab is None else spread(log_q, draft_vocab, last.shape[-1])
        mass = jnp.where((accepted < k)[:, None], residual(last, log_q, weight), jnp.exp(last))
    else:
        mass = jnp.exp(last)
    drawn = inverse_transform(mass, noise.residual)
    padded = jnp.pad(draft_tokens, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(k + 1) == accepted[:, None], drawn[:, None], padded)


def _rejection(log_p: jax.Array, draft_tokens: jax.Array, draft_log_q: jax.Array | None,
               noise: CycleNoise, draft_vocab: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """As `_coupled`, with draft_log_q float32 [B, K, Vd]."""
    ratio = _log_ratio(log_p, draft_tokens, draft_log_q, draft_vocab)
    accepted = leading(jnp.log(noise.accept) < ratio)
    return accepted, _emit(log_p, draft_tokens, draft_log_q, draft_vocab, accepted, noise, 1.0)


def block_weights(ratio: jax.Array) -> jax.Array:
    """w_0 = 1, w_i = min(1, w_{i - 1} p(y_i) / q(y_i)), float32 [B, K + 1] from log p(y) - log q(y)
    [B, K]."""
    log_w = [jnp.zeros(ratio.shape[0], jnp.float32)]
    for column in ratio.T:
        log_w.append(jnp.minimum(log_w[-1] + column, 0.0))  # logarithms: a ratio may overflow
    return jnp.exp(jnp.stack(log_w, 1))


def block_left(log_p: jax.Array, draft_tokens: jax.Array, draft_log_q: jax.Array | None,
               draft_vocab: jax.Array | None, weights: jax.Array) -> jax.Array:
    """r_i, the mass of (w_i p - q)+ of the draft after the first i, float32 [B, K] of i = 0 .. K -
    1. weights: `block_weights`, [B, K + 1]."""
    b, k = draft_tokens.shape
    log_p, w = log_p[:, :k], weights[:, :k]
    if draft_log_q is None:  # q is all on the draft, and w p no more than that
        return w * (1.0 - jnp.exp(_pick(log_p, draft_tokens)))
    if draft_vocab is not None:
        flat = draft_log_q.reshape(b * k, draft_log_q.shape[-1])
        draft_log_q = spread(flat, draft_vocab, log_p.shape[-1]).reshape(log_p.shape)
    return jnp.maximum(w[..., None] * jnp.exp(log_p) - draft_mass(draft_log_q), 0.0).sum(-1)


def block_chances(weights: jax.Array, left: jax.Array) -> jax.Array:
    """h_i = r_i / (r_i + 1 - w_i), and h_K = w_K, float32 [B, K] of i = 1 .. K; weights [B, K + 1],
    left [B, K].

    Where r_i = 1 - w_i = 0 the next draft's q is p: more than i are accepted for certain, and what
    test i says is of no account but for rounding.
    """
    k = left.shape[1]
    left, whole = left[:, 1:], left[:, 1:] + (1.0 - weights[:, 1:k])
    # of NaN it is NaN, which is refused
    h = jnp.where(whole == 0, 1.0, left / jnp.where(whole == 0, 1.0, whole))
    return jnp.concatenate([h, weights[:, k:]], axis=1)[:, :k]


def last_true(flags: jax.Array) -> jax.Array:
    """The number, from 1, of the last flag that is true, and 0 if none is; int32 [B] from bool
    [B, K]."""
    return jnp.where(flags, jnp.arange(1, flags.shape[1] + 1),
                     0).max(-1, initial=0).astype(jnp.int32)


def _block(log_p: jax.Array, draft_tokens: jax.Array, draft_log_q: jax.Array | None,
           noise: CycleNoise, draft_vocab: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """As `_rejection`.

    Why it is exact: given y_1 .. y_i, the chance that i drafts or more are accepted is w_i, by
    induction from K down. It is h_i + (1 - h_i) E[w_{i+1}] over y_{i+1} ~ q, where E[w_{i+1}] =
    sum(min(q, w_i p)) = w_i - r_i, and h_i makes it w_i. So exactly i are accepted with r_i, and x
    is the next token with min(q, w_i p)(x) as a draft, and with r_i (w_i p - q)+(x) / r_i as the
    one drawn after i: together w_i p(x).
    """
    weights = block_weights(_log_ratio(log_p, draft_tokens, draft_log_q, draft_vocab))
    left = block_left(log_p, draft_tokens, draft_log_q, draft_vocab, weights)
    accepted = last_true(noise.accept < block_chances(weights, left))
    weight = jnp.take_along_axis(weights, accepted[:, None], axis=1)
    return accepted, _emit(log_p, draft_tokens, draft_log_q, draft_vocab, accepted, noise, weight)


def rejection_sampling(logits: jax.Array, draft_tokens: jax.Array, draft_log_q: jax.Array | None,
                       noise: Noise, temperature: jax.Array, top_p: jax.Array | None = None, *,
                       draft_vocab: jax.Array | None = None, top_k: int = 0,
                       min_p: jax.Array | None = None,
                       ban: jax.Array | None = None, banned_tokens: tuple[int, ...] = ()
                       ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """See `api.rejection_sampling`; returns the fields of `api.Verdict`: accepted int32 [B], and of
    [B, K + 1] tokens int32, logprobs, entropy and, where p is cut, behaviour_logprobs float32."""
    temperature = jnp.broadcast_to(flushed(temperature)[:, None], logits.shape[:-1])
    top_p, min_p = (None if x is None else jnp.broadcast_to(x[:, None], logits.shape[:-1])
                    for x in (top_p, min_p))
    raw = scaled_logprobs(logits, temperature)
    log_p = process_given(logits, raw, temperature, top_p, top_k, min_p, ban, banned_tokens)
    if isinstance(noise, CoupledNoise):
        accepted, tokens = _coupled(log_p, draft_tokens, noise)
    else:
        rule = _block if isinstance(noise, BlockNoise) else _rejection
        accepted, tokens = rule(log_p, draft_tokens, draft_log_q, noise, draft_vocab)
    entropy = -jnp.sum(jnp.where(raw > -jnp.inf, jnp.exp(raw) * raw, 0.0), -1)
    behaviour = _pick(log_p, tokens) if is_cut(top_k, top_p, min_p) else None
    return accepted, tokens, _pick(raw, tokens), entropy, behaviour
