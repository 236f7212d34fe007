"""The verdict that follows from the summaries of the rows (`summary.py`)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.noise import BlockNoise, CoupledNoise, CycleNoise, Noise
from pallas_kernels.rejection_sampling.processing import divisor
from pallas_kernels.rejection_sampling.reference import (
    block_chances,
    block_weights,
    draft_logprobs,
    draft_mass,
    first_above,
    last_true,
    leading,
    log_ratio,
    spread,
)
from pallas_kernels.rejection_sampling.summary import (
    CHUNK,
    Axis,
    Rows,
    Summary,
    best_of,
    by_block,
    cut,
    entry,
    finite,
    pmax,
    psum,
    rows_of,
)


@struct.dataclass
class _Candidates:
    """Rows, such as the one of each sequence that yields its last token, and how their candidates
    are weighed.

    Attributes:
      logits: [R, V], this shard's of all rows. row: int32 [B], which of them it is.
      scale, top, log_total: float32 [B]; p = exp((logits - top) * scale - log_total).
      banned: bool [B] or None.
      refused: int32 [B], global id of the refused draft; -1 where all were accepted. refused_x:
        float32 [B], its logit.
      log_q: float32 [B, V], this shard's part of what the refused draft was drawn from; None if
        that is certain.
      weight: float32 [B], of p in the residual; the block rule's w, else 1.
    """

    logits: jax.Array
    row: jax.Array
    scale: jax.Array
    top: jax.Array
    log_total: jax.Array
    banned: jax.Array | None
    refused: jax.Array
    refused_x: jax.Array
    log_q: jax.Array | None
    weight: jax.Array

    def weigh(self, logits: jax.Array, log_q: jax.Array | None, ids: jax.Array,
              banned_tokens: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x, p and the residual (weight p - q)+, in some unit, of ids [B or 1, n], float32
        [B, n]."""
        x = logits.astype(jnp.float32)
        p = jnp.exp((x - self.top[:, None]) * self.scale[:, None] - self.log_total[:, None])
        if self.banned is not None:
            p = jnp.where(self.banned[:, None] & jnp.isin(ids, jnp.array(banned_tokens)), 0.0, p)
        if log_q is None:
            return x, p, jnp.where(ids == self.refused[:, None], 0.0, p)
        residual = jnp.maximum(self.weight[:, None] * p - draft_mass(log_q), 0.0)
        return x, p, jnp.where(self.refused[:, None] < 0, p, residual)


def _row_pieces(mass: jax.Array, ids: jax.Array) -> jax.Array:
    """mass [B, V] of ids [V] summed over the blocks of the vocabulary, [B, C + 1], as `by_block`
    has them."""
    pad = -mass.shape[1] % CHUNK
    chunks = jnp.pad(mass, ((0, 0), (0, pad))).reshape(mass.shape[0], -1, CHUNK)
    ids = ids[0] + jnp.arange(mass.shape[1] + pad).reshape(-1, CHUNK)
    first = ids < (ids[:, :1] // CHUNK + 1) * CHUNK
    return by_block(jnp.where(first, chunks, 0.0).sum(-1), jnp.where(first, 0.0, chunks).sum(-1))


def _window(block: jax.Array, first: jax.Array | int, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Where this shard's part of each row's block begins, int32 [B], and the ids from there on,
    [B, n]."""
    width = min(CHUNK, vocab)
    start = jnp.clip(block * CHUNK - first, 0, vocab - width)
    return start, first + start[:, None] + jnp.arange(width)


def inverse_transform(mass: jax.Array, u: jax.Array, axis: tuple[str, ...]) -> jax.Array:
    """`reference.inverse_transform` where mass float32 [B, V] is a shard's part of the vocabulary:
    global ids [B]."""
    rows, vocab = mass.shape
    first = jax.lax.axis_index(axis) * vocab
    pieces = _row_pieces(mass, first + jnp.arange(vocab))
    block = first_above(pieces, u[:, 0], first // CHUNK + jnp.arange(pieces.shape[1]), axis)
    start, ids = _window(block, first, vocab)
    inside = cut(mass, jnp.arange(rows, dtype=jnp.int32), start, ids.shape[1])
    return first_above(jnp.where(ids // CHUNK == block[:, None], inside, 0.0), u[:, 1], ids, axis)


def _draw_last(last: _Candidates, pieces: jax.Array, u: jax.Array, first: jax.Array | int,
               banned_tokens: tuple[int, ...], axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Inverse transform of each sequence's residual (of p, where nothing was refused): its id int32
    [B] and logit.

    pieces: float32 [B, C + 1], the residual's mass by block of the vocabulary; computed here where
    drafts were sampled.
    """
    vocab = last.logits.shape[1]
    if last.log_q is not None:
        ids = first + jnp.arange(vocab)
        _, p, residual = last.weigh(last.logits[last.row], last.log_q, ids[None], banned_tokens)
        pieces, whole = _row_pieces(residual, ids), _row_pieces(p, ids)
    empty = ~(psum(pieces.sum(-1), axis) > 0)  # by rounding: then p itself
    if last.log_q is not None:
        pieces = jnp.where(empty[:, None], whole, pieces)
    block = first_above(pieces, u[:, 0], first // CHUNK + jnp.arange(pieces.shape[1]), axis)
    start, ids = _window(block, first, vocab)
    width = ids.shape[1]
    log_q = (None if last.log_q is None
             else cut(last.log_q, jnp.arange(len(start), dtype=jnp.int32), start, width))
    x, p, residual = last.weigh(cut(last.logits, last.row, start, width), log_q, ids,
                                banned_tokens)
    mass = jnp.where(empty[:, None], p, residual)
    token = first_above(jnp.where(ids // CHUNK == block[:, None], mass, 0.0), u[:, 1], ids, axis)
    x = pmax(jnp.where(ids == token[:, None], x, -jnp.inf).max(-1), axis)
    if last.log_q is None:  # all of p is the refused draft's
        alone = empty & (last.refused >= 0)
        token, x = jnp.where(alone, last.refused, token), jnp.where(alone, last.refused_x, x)
    return token, x


def _local(x: jax.Array, ids: jax.Array, first: jax.Array | int) -> jax.Array:
    """x[..., id] of global ids, where x [B, K, V] is this shard's part; -inf for ids of others."""
    column = ids - first
    inside = (column >= 0) & (column < x.shape[-1])
    value = jnp.take_along_axis(x, jnp.clip(column, 0, x.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    return jnp.where(inside, value, -jnp.inf)


def _left(rows: _Candidates, first: jax.Array | int, banned_tokens: tuple[int, ...],
          axis: Axis) -> jax.Array:
    """The residual's mass of every row whose draft was sampled, float32 [B]."""
    ids = first + jnp.arange(rows.logits.shape[1])
    return psum(rows.weigh(rows.logits[rows.row], rows.log_q, ids[None], banned_tokens)[2].sum(-1),
                axis)


def _among_candidates(s: Summary, rows: Rows, best: jax.Array, drafted: jax.Array,
                      draft_tokens: jax.Array, scale: jax.Array, ban: jax.Array | None,
                      banned_tokens: tuple[int, ...], axis: Axis
                      ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Mass by block of the vocabulary [B, K + 1, C + 1] in some unit, and what p is measured from:
    top and log_total, float32 [B, K + 1], and log p of the drafts, whose logits are `drafted`,
    float32 [B, K]."""
    b, k = draft_tokens.shape
    top = finite(best)
    share = jnp.exp((s.best - top.reshape(-1, 1)) * scale.reshape(-1, 1))
    pieces = by_block(s.mass * share,
                      None if s.spill is None else s.spill * share).reshape(b, k + 1, -1)
    if ban is None:
        return (pieces, rows.top, rows.log_total,
                (drafted - rows.top[:, :k]) * scale[:, :k] - rows.log_total[:, :k])
    drafted = jnp.where(ban[:, :k] & jnp.isin(draft_tokens, jnp.array(banned_tokens)), -jnp.inf,
                        drafted)
    log_mass = (drafted - top[:, :k]) * scale[:, :k]
    log_total = jnp.log(psum(pieces.sum(-1), axis) + jnp.pad(jnp.exp(log_mass), ((0, 0), (0, 1))))
    return pieces, top, log_total, log_mass - log_total[:, :k]


def _by_uniforms(s: Summary, rows: Rows, best: tuple[jax.Array, jax.Array], logits: jax.Array,
                 draft_tokens: jax.Array, draft_log_q: jax.Array | None, noise: CycleNoise,
                 temperature: jax.Array, scale: jax.Array, draft_vocab: jax.Array | None,
                 ban: jax.Array | None, banned_tokens: tuple[int, ...], first: jax.Array | int,
                 axis: Axis) -> tuple[jax.Array, ...]:
    """Accepted int32 [B], and tokens and their logits [B, K + 1]. logits: [B * (K + 1), V]; scale
    [B, K + 1]."""
    b, k = draft_tokens.shape
    row = (k + 1) * jnp.arange(b, dtype=jnp.int32)
    drafted = pmax(s.drafted.max(-1), axis).reshape(b, k + 1)[:, :k]
    pieces, top, log_total, log_p = _among_candidates(s, rows, best[1], drafted, draft_tokens,
                                                      scale, ban, banned_tokens, axis)
    log_q, ratio = None, log_p
    if draft_log_q is not None:
        if draft_vocab is None:
            drawn = pmax(_local(draft_log_q, draft_tokens, first), axis)
        else:
            drawn = draft_logprobs(draft_log_q, draft_tokens, draft_vocab)
        ratio = log_ratio(log_p, drawn)
    accepted, weight = leading(jnp.log(noise.accept) < ratio), jnp.ones(b, jnp.float32)
    if isinstance(noise, BlockNoise):
        weights = block_weights(ratio)
        # where q is all on the draft
        left = weights[:, :k] * jnp.maximum(1.0 - jnp.exp(log_p), 0.0)
        if draft_log_q is not None and k:
            log_q = draft_log_q.reshape(b * k, -1)
            log_q = (log_q if draft_vocab is None
                     else spread(log_q, draft_vocab, logits.shape[-1], first))
            each, scales, tops, totals = (
                x[:, :k].reshape(-1)
                for x in (row[:, None] + jnp.arange(k + 1), scale, top, log_total))
            drafts = _Candidates(logits, each, scales, tops, totals, None if ban is None
                                 else ban[:, :k].reshape(-1), draft_tokens.reshape(-1),
                                 drafted.reshape(-1), log_q, weights[:, :k].reshape(-1))
            left = _left(drafts, first, banned_tokens, axis).reshape(b, k)
        accepted = last_true(noise.accept < block_chances(weights, left))
        weight = entry(weights, accepted)
    greedy = temperature == 0
    likeliest = leading((draft_tokens == best[0][:, :k]) & (ratio > -jnp.inf))
    accepted = jnp.where(greedy, likeliest, accepted)
    refused = entry(jnp.pad(draft_tokens, ((0, 0), (0, 1)), constant_values=-1), accepted)
    refused_x = entry(jnp.pad(drafted, ((0, 0), (0, 1))), accepted)
    if draft_log_q is not None and k:
        log_q = entry(draft_log_q, jnp.minimum(accepted, k - 1))
        log_q = (log_q if draft_vocab is None
                 else spread(log_q, draft_vocab, logits.shape[-1], first))
    last = _Candidates(logits, row + accepted, entry(scale, accepted), entry(top, accepted),
                       entry(log_total, accepted), None if ban is None else entry(ban, accepted),
                       refused, refused_x, log_q, weight)
    token, token_x = _draw_last(last, entry(pieces, accepted), noise.residual, first, banned_tokens,
                                axis)
    token, token_x = (jnp.where(greedy, entry(x, accepted), y)
                      for x, y in zip(best, (token, token_x), strict=True))
    at = jnp.arange(k + 1) == accepted[:, None]
    return accepted, *(jnp.where(at, x[:, None], jnp.pad(y, ((0, 0), (0, 1))))
                       for x, y in ((token, draft_tokens), (token_x, drafted)))


def judge(summarize: Callable[..., Summary], logits: jax.Array, draft_tokens: jax.Array,
          draft_log_q: jax.Array | None, noise: Noise, temperature: jax.Array,
          draft_vocab: jax.Array | None, ban: jax.Array | None, banned_tokens: tuple[int, ...],
          axis: Axis) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `api.rejection_sampling`; returns the fields of `api.Verdict`, as
    `reference.rejection_sampling` does.

    summarize: a kernel's, of logits [B x (K + 1), V].
    """
    b, width, vocab = logits.shape
    # rows and vocabulary, from here on: K + 1 rows a sequence do not fill a tile of a TPU's memory
    logits = logits.reshape(b * width, vocab)
    offset = None if axis is None else jax.lax.axis_index(axis) * vocab
    ban = None if not banned_tokens else ban
    drafted = keys = None
    if isinstance(noise, CoupledNoise):
        keys = noise.keys.reshape(b * width, 2)
    else:
        drafted = jnp.pad(draft_tokens, ((0, 0), (0, 1)), constant_values=-1).reshape(-1)
    by_row = jnp.repeat(temperature, width)
    s = summarize(logits, by_row, drafted, keys, None if ban is None else ban.reshape(-1), offset,
                  banned_tokens=banned_tokens)
    # also of NaN
    s = s.replace(best_id=jnp.minimum(s.best_id, (0 if offset is None else offset) + vocab - 1))
    scale = 1 / divisor(by_row)  # by which the kernels multiply too
    rows, best = jax.tree.map(lambda x: x.reshape(b, width),
                              (rows_of(s, scale, axis), best_of(s, scale, axis)))
    scale = scale.reshape(b, width)
    if isinstance(noise, CoupledNoise):
        tokens, x = best
        accepted = leading(tokens[:, :-1] == draft_tokens)
    else:
        accepted, tokens, x = _by_uniforms(s, rows, best, logits, draft_tokens, draft_log_q, noise,
                                           temperature, scale, draft_vocab, ban, banned_tokens,
                                           0 if offset is None else offset, axis)
    return accepted, tokens, (x - rows.top) * scale - rows.log_total, rows.entropy
