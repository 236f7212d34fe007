"""What one pass over the logits leaves of each row, and the verdict that follows from it.

The pass is the kernels' (`tpu.summarize`, `gpu.summarize`); it is all that reads the whole of the logits. A chunk is
CHUNK neighbouring columns, which one program can summarise without knowing the rest of its row, so the grid is split
as the chip likes; putting the chunks together is arithmetic on a few numbers a chunk. Where the vocabulary is sharded
every shard does this with its part, and a few numbers a row cross the mesh (`axis`), never logits.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.noise import BlockNoise, CoupledNoise, CycleNoise, Noise
from pallas_kernels.rejection_sampling.reference import (
    VOCAB_BLOCK,
    block_chances,
    block_weights,
    divisor,
    draft_logprobs,
    draft_mass,
    first_above,
    last_true,
    leading,
    log_ratio,
    spread,
)

CHUNK = VOCAB_BLOCK

Axis = tuple[str, ...] | None
"""The mesh axes that share the vocabulary, in order; None: it is whole."""


@struct.dataclass
class Summary:
    """Of R rows of logits [R, V] in C = ceil(V / CHUNK) chunks. All arrays are [R, C].

    With x the logits in float32, T = 0 counting as 1, and id = column + offset the global vocabulary id. Only
    differences are divided by T: see `reference.scaled`.

    Attributes:
      top: float32, the largest x; -inf if all are.
      total: float32, sum of exp((x - top) / T); 0 where top is -inf.
      weighted: float32, sum of exp((x - top) / T) * (x - top) / T, a term of x = -inf counting 0.
      best: float32, x of the largest score over the chunk's ids that are not banned: x / T, plus the Gumbel noise of
        (key, id) where keys are given and T > 0. -inf if there is none.
      best_id: int32, its global id; ties go to the lowest. Anything where best is -inf.
      best_noise: float32, the noise in that score, 0 where T = 0 or best is -inf; None where no keys are given.
      drafted: float32, x of the row's drafted token where the chunk has it, else -inf; None where keys are given.
      mass: float32, sum of exp((x - best) / T) over the ids below the first multiple of CHUNK that is greater than the
        chunk's first id, without the row's drafted token and banned ids; None where keys are given. (Against `top`,
        what is left beside a banned id of large x would be 0.)
      spill: float32, the same over the chunk's other ids (none, if offset is a multiple of CHUNK); None where keys are
        given, and where the whole vocabulary is here (offset None).
    """

    top: jax.Array
    total: jax.Array
    weighted: jax.Array
    best: jax.Array
    best_id: jax.Array
    best_noise: jax.Array | None = None
    drafted: jax.Array | None = None
    mass: jax.Array | None = None
    spill: jax.Array | None = None


@struct.dataclass
class _Rows:
    """Of whole rows, float32 [R]: the largest logit, the logarithm of sum(exp((x - top) / T)), and the policy's
    entropy."""

    top: jax.Array
    log_total: jax.Array
    entropy: jax.Array


def _sum(x: jax.Array, axis: Axis) -> jax.Array:
    return x if axis is None else jax.lax.psum(x, axis)


def _max(x: jax.Array, axis: Axis) -> jax.Array:
    return x if axis is None else jax.lax.pmax(x, axis)


def _finite(x: jax.Array) -> jax.Array:
    """x, or 0 where it is -inf: what is measured from it is -inf itself, and -inf - -inf would be NaN."""
    return jnp.where(x > -jnp.inf, x, 0.0)


def _rows(s: Summary, scale: jax.Array, axis: Axis) -> _Rows:
    """scale: 1 / T, float32 [R]."""
    top = _finite(_max(s.top.max(-1), axis))
    shift = jnp.where(s.top > -jnp.inf, (s.top - top[:, None]) * scale[:, None], 0.0)
    share = jnp.exp(shift)
    total = _sum((share * s.total).sum(-1), axis)
    # a chunk so far below that it counts nothing may have a product that overflows
    weighted = _sum(jnp.where(share > 0, share * (s.weighted + s.total * shift), 0.0).sum(-1), axis)
    return _Rows(top, jnp.log(total), jnp.log(total) - weighted / total)


def _best(s: Summary, scale: jax.Array, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Id int32 [R] and logit float32 [R] of each row's largest score."""
    def pick(scores, *values) -> tuple[jax.Array, ...]:
        at = jnp.argmax(scores, 0)[None]
        return tuple(jnp.take_along_axis(x, at, axis=0)[0] for x in (scores, *values))

    scores = s.best
    if s.best_noise is not None:
        largest = _finite(_max(s.best.max(-1), axis))
        scores = (s.best - largest[:, None]) * scale[:, None] + s.best_noise
    best = pick(scores.T, s.best_id.T, s.best.T)
    if axis is not None:
        best = pick(*(jax.lax.all_gather(x, axis) for x in best))
    return best[1:]


def _pieces(summary: jax.Array, spill: jax.Array | None) -> jax.Array:
    """What lies in each block of the vocabulary, [..., C + 1], from the chunks' two parts [..., C]."""
    if spill is None:
        return jnp.pad(summary, [(0, 0)] * (summary.ndim - 1) + [(0, 1)])
    last = [(0, 0)] * (summary.ndim - 1)
    return jnp.pad(summary, [*last, (0, 1)]) + jnp.pad(spill, [*last, (1, 0)])


def _slice(x: jax.Array, row: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """x[row[b], start[b] : start[b] + width], [B, width] from [R, n]."""
    return jax.vmap(lambda r, at: jax.lax.dynamic_slice(x, (r, at), (1, width))[0])(row, start)


def _at(x: jax.Array, position: jax.Array) -> jax.Array:
    """x[b, position[b]] of every row, [B, ...] from [B, n, ...]."""
    index = position.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1)[:, 0]


@struct.dataclass
class _Candidates:
    """Rows, such as the one of each sequence that yields its last token, and how their candidates are weighed.

    Attributes:
      logits: [R, V], this shard's of all rows. row: int32 [B], which of them it is.
      scale, top, log_total: float32 [B]; p = exp((logits - top) * scale - log_total).
      banned: bool [B] or None.
      refused: int32 [B], global id of the refused draft; -1 where all were accepted. refused_x: float32 [B], its logit.
      log_q: float32 [B, V], this shard's part of what the refused draft was drawn from; None if that is certain.
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
        """x, p and the residual (weight p - q)+, in some unit, of ids [B or 1, n], float32 [B, n]."""
        x = logits.astype(jnp.float32)
        p = jnp.exp((x - self.top[:, None]) * self.scale[:, None] - self.log_total[:, None])
        if self.banned is not None:
            p = jnp.where(self.banned[:, None] & jnp.isin(ids, jnp.array(banned_tokens)), 0.0, p)
        if log_q is None:
            return x, p, jnp.where(ids == self.refused[:, None], 0.0, p)
        residual = jnp.maximum(self.weight[:, None] * p - draft_mass(log_q), 0.0)
        return x, p, jnp.where(self.refused[:, None] < 0, p, residual)


def _row_pieces(mass: jax.Array, ids: jax.Array) -> jax.Array:
    """mass [B, V] of ids [V] summed over the blocks of the vocabulary, [B, C + 1], as `_pieces` has them."""
    pad = -mass.shape[1] % CHUNK
    chunks = jnp.pad(mass, ((0, 0), (0, pad))).reshape(mass.shape[0], -1, CHUNK)
    ids = ids[0] + jnp.arange(mass.shape[1] + pad).reshape(-1, CHUNK)
    first = ids < (ids[:, :1] // CHUNK + 1) * CHUNK
    return _pieces(jnp.where(first, chunks, 0.0).sum(-1), jnp.where(first, 0.0, chunks).sum(-1))


def _window(block: jax.Array, first: jax.Array | int, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Where this shard's part of each row's block begins, int32 [B], and the ids from there on, [B, n]."""
    width = min(CHUNK, vocab)
    start = jnp.clip(block * CHUNK - first, 0, vocab - width)
    return start, first + start[:, None] + jnp.arange(width)


def inverse_transform(mass: jax.Array, u: jax.Array, axis: tuple[str, ...]) -> jax.Array:
    """`reference.inverse_transform` where mass float32 [B, V] is a shard's part of the vocabulary: global ids [B]."""
    rows, vocab = mass.shape
    first = jax.lax.axis_index(axis) * vocab
    pieces = _row_pieces(mass, first + jnp.arange(vocab))
    block = first_above(pieces, u[:, 0], first // CHUNK + jnp.arange(pieces.shape[1]), axis)
    start, ids = _window(block, first, vocab)
    inside = _slice(mass, jnp.arange(rows, dtype=jnp.int32), start, ids.shape[1])
    return first_above(jnp.where(ids // CHUNK == block[:, None], inside, 0.0), u[:, 1], ids, axis)


def _draw_last(last: _Candidates, pieces: jax.Array, u: jax.Array, first: jax.Array | int,
               banned_tokens: tuple[int, ...], axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Inverse transform of each sequence's residual (of p, where nothing was refused): its id int32 [B] and logit.

    pieces: float32 [B, C + 1], the residual's mass by block of the vocabulary; computed here where drafts were sampled.
    """
    vocab = last.logits.shape[1]
    if last.log_q is not None:
        ids = first + jnp.arange(vocab)
        _, p, residual = last.weigh(last.logits[last.row], last.log_q, ids[None], banned_tokens)
        pieces, whole = _row_pieces(residual, ids), _row_pieces(p, ids)
    empty = ~(_sum(pieces.sum(-1), axis) > 0)  # by rounding: then p itself
    if last.log_q is not None:
        pieces = jnp.where(empty[:, None], whole, pieces)
    block = first_above(pieces, u[:, 0], first // CHUNK + jnp.arange(pieces.shape[1]), axis)
    start, ids = _window(block, first, vocab)
    width = ids.shape[1]
    log_q = None if last.log_q is None else _slice(last.log_q, jnp.arange(len(start), dtype=jnp.int32), start, width)
    x, p, residual = last.weigh(_slice(last.logits, last.row, start, width), log_q, ids, banned_tokens)
    mass = jnp.where(empty[:, None], p, residual)
    token = first_above(jnp.where(ids // CHUNK == block[:, None], mass, 0.0), u[:, 1], ids, axis)
    x = _max(jnp.where(ids == token[:, None], x, -jnp.inf).max(-1), axis)
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


def _left(rows: _Candidates, first: jax.Array | int, banned_tokens: tuple[int, ...], axis: Axis) -> jax.Array:
    """The residual's mass of every row whose draft was sampled, float32 [B]."""
    ids = first + jnp.arange(rows.logits.shape[1])
    return _sum(rows.weigh(rows.logits[rows.row], rows.log_q, ids[None], banned_tokens)[2].sum(-1), axis)


def _among_candidates(s: Summary, rows: _Rows, best: jax.Array, drafted: jax.Array, draft_tokens: jax.Array,
                      scale: jax.Array, ban: jax.Array | None, banned_tokens: tuple[int, ...], axis: Axis
                      ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Mass by block of the vocabulary [B, K + 1, C + 1] in some unit, and what p is measured from: top and log_total,
    float32 [B, K + 1], and log p of the drafts, whose logits are `drafted`, float32 [B, K]."""
    b, k = draft_tokens.shape
    top = _finite(best)
    share = jnp.exp((s.best - top.reshape(-1, 1)) * scale.reshape(-1, 1))
    pieces = _pieces(s.mass * share, None if s.spill is None else s.spill * share).reshape(b, k + 1, -1)
    if ban is None:
        return pieces, rows.top, rows.log_total, (drafted - rows.top[:, :k]) * scale[:, :k] - rows.log_total[:, :k]
    drafted = jnp.where(ban[:, :k] & jnp.isin(draft_tokens, jnp.array(banned_tokens)), -jnp.inf, drafted)
    log_mass = (drafted - top[:, :k]) * scale[:, :k]
    log_total = jnp.log(_sum(pieces.sum(-1), axis) + jnp.pad(jnp.exp(log_mass), ((0, 0), (0, 1))))
    return pieces, top, log_total, log_mass - log_total[:, :k]


def _by_uniforms(s: Summary, rows: _Rows, best: tuple[jax.Array, jax.Array], logits: jax.Array,
                 draft_tokens: jax.Array, draft_log_q: jax.Array | None, noise: CycleNoise, temperature: jax.Array,
                 scale: jax.Array, draft_vocab: jax.Array | None, ban: jax.Array | None,
                 banned_tokens: tuple[int, ...], first: jax.Array | int, axis: Axis) -> tuple[jax.Array, ...]:
    """Accepted int32 [B], and tokens and their logits [B, K + 1]. logits: [B * (K + 1), V]; scale [B, K + 1]."""
    b, k = draft_tokens.shape
    row = (k + 1) * jnp.arange(b, dtype=jnp.int32)
    drafted = _max(s.drafted.max(-1), axis).reshape(b, k + 1)[:, :k]
    pieces, top, log_total, log_p = _among_candidates(s, rows, best[1], drafted, draft_tokens, scale, ban,
                                                      banned_tokens, axis)
    log_q, ratio = None, log_p
    if draft_log_q is not None:
        if draft_vocab is None:
            drawn = _max(_local(draft_log_q, draft_tokens, first), axis)
        else:
            drawn = draft_logprobs(draft_log_q, draft_tokens, draft_vocab)
        ratio = log_ratio(log_p, drawn)
    accepted, weight = leading(jnp.log(noise.accept) < ratio), jnp.ones(b, jnp.float32)
    if isinstance(noise, BlockNoise):
        weights = block_weights(ratio)
        left = weights[:, :k] * jnp.maximum(1.0 - jnp.exp(log_p), 0.0)  # where q is all on the draft
        if draft_log_q is not None and k:
            log_q = draft_log_q.reshape(b * k, -1)
            log_q = log_q if draft_vocab is None else spread(log_q, draft_vocab, logits.shape[-1], first)
            each, scales, tops, totals = (
                x[:, :k].reshape(-1) for x in (row[:, None] + jnp.arange(k + 1), scale, top, log_total))
            drafts = _Candidates(logits, each, scales, tops, totals, None if ban is None else ban[:, :k].reshape(-1),
                                 draft_tokens.reshape(-1), drafted.reshape(-1), log_q, weights[:, :k].reshape(-1))
            left = _left(drafts, first, banned_tokens, axis).reshape(b, k)
        accepted = last_true(noise.accept < block_chances(weights, left))
        weight = _at(weights, accepted)
    greedy = temperature == 0
    likeliest = leading((draft_tokens == best[0][:, :k]) & (ratio > -jnp.inf))
    accepted = jnp.where(greedy, likeliest, accepted)
    refused = _at(jnp.pad(draft_tokens, ((0, 0), (0, 1)), constant_values=-1), accepted)
    refused_x = _at(jnp.pad(drafted, ((0, 0), (0, 1))), accepted)
    if draft_log_q is not None and k:
        log_q = _at(draft_log_q, jnp.minimum(accepted, k - 1))
        log_q = log_q if draft_vocab is None else spread(log_q, draft_vocab, logits.shape[-1], first)
    last = _Candidates(logits, row + accepted, _at(scale, accepted), _at(top, accepted), _at(log_total, accepted),
                       None if ban is None else _at(ban, accepted), refused, refused_x, log_q, weight)
    token, token_x = _draw_last(last, _at(pieces, accepted), noise.residual, first, banned_tokens, axis)
    token, token_x = (jnp.where(greedy, _at(x, accepted), y) for x, y in zip(best, (token, token_x), strict=True))
    at = jnp.arange(k + 1) == accepted[:, None]
    return accepted, *(jnp.where(at, x[:, None], jnp.pad(y, ((0, 0), (0, 1))))
                       for x, y in ((token, draft_tokens), (token_x, drafted)))


def judge(summarize: Callable[..., Summary], logits: jax.Array, draft_tokens: jax.Array,
          draft_log_q: jax.Array | None, noise: Noise, temperature: jax.Array, draft_vocab: jax.Array | None,
          ban: jax.Array | None, banned_tokens: tuple[int, ...], axis: Axis
          ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `api.rejection_sampling`; returns the fields of `api.Verdict`, as `reference.rejection_sampling` does.

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
    s = s.replace(best_id=jnp.minimum(s.best_id, (0 if offset is None else offset) + vocab - 1))  # also of NaN
    scale = 1 / divisor(by_row)  # by which the kernels multiply too
    rows, best = jax.tree.map(lambda x: x.reshape(b, width), (_rows(s, scale, axis), _best(s, scale, axis)))
    scale = scale.reshape(b, width)
    if isinstance(noise, CoupledNoise):
        tokens, x = best
        accepted = leading(tokens[:, :-1] == draft_tokens)
    else:
        accepted, tokens, x = _by_uniforms(s, rows, best, logits, draft_tokens, draft_log_q, noise, temperature, scale,
                                           draft_vocab, ban, banned_tokens, 0 if offset is None else offset, axis)
    return accepted, tokens, (x - rows.top) * scale - rows.log_total, rows.entropy
