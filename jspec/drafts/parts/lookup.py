"""Where the end of a sequence occurred before: the search of drafters that have no weights, on the
device.

Each call compares every token of the pool with each of the n last tokens, and keeps one number a
pool row: XLA fuses the comparisons into that maximum, and nothing of the pool's size is written to
memory.
"""

import jax
import jax.numpy as jnp

NOTHING = -1
"""Where a row holds no token: it matches nothing, and nothing is drafted from it."""


def shift(pool: jax.Array, by: int) -> jax.Array:
    """pool [..., W] moved `by` positions to the right (left if negative), with NOTHING where it
    was."""
    edges = [(0, 0, 0)] * (pool.ndim - 1) + [(by, -by, 0)]
    return jax.lax.pad(pool, jnp.asarray(NOTHING, pool.dtype), edges)


def last_tokens(tokens: jax.Array, lengths: jax.Array, n: int) -> jax.Array:
    """The last n of each row's tokens, latest first, int32 [N, n]; NOTHING before a row's first."""
    at = lengths[:, None] - 1 - jnp.arange(n)
    return jnp.where(at >= 0, jnp.take_along_axis(tokens, jnp.maximum(at, 0), axis=1), NOTHING)


def longest_match(pool: jax.Array, suffix: jax.Array,
                  allowed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The longest, then latest, occurrence of a suffix in each row of a pool.

    Args:
      pool: int32 [..., W]. suffix: int32 [..., n], latest token first; leading axes are broadcast.
      allowed: bool [..., W], the positions at which an occurrence may end.

    Returns (tokens that match, int32 [...], 0: none; the position of the last of them, int32
    [...]).
    """
    width = pool.shape[-1]
    run, matched = allowed, jnp.zeros(pool.shape, jnp.int32)
    for n in range(suffix.shape[-1]):
        wanted = suffix[..., n, None]
        run = run & (shift(pool, n) == wanted) & (wanted != NOTHING)
        matched = matched + run.astype(jnp.int32)
    return jnp.divmod(jnp.max(matched * width + jnp.arange(width), axis=-1), width)


def look_up(tokens: jax.Array, lengths: jax.Array, n: int, k: int) -> tuple[jax.Array, jax.Array]:
    """How each row went on when it last ended like this, judged by its last n tokens at most.

    Args:
      tokens: int32 [N, S], garbage from lengths int32 [N] on.

    Returns (tokens that match, int32 [N]; the k tokens after them, int32 [N, k]: past the row's end
    they repeat with the period, and without a match the last token does).
    """
    end = lengths[:, None] - 1
    matched, at = longest_match(tokens, last_tokens(tokens, lengths, n),
                                jnp.arange(tokens.shape[1]) < end)
    period = jnp.where(matched > 0, end[:, 0] - at, 1)[:, None]
    return matched, jnp.take_along_axis(tokens, end - period + 1 + jnp.arange(k) % period, axis=1)


def look_up_elsewhere(pool: jax.Array, suffix: jax.Array, first: jax.Array | int,
                      k: int) -> tuple[jax.Array, jax.Array]:
    """How other rows went on where a row's suffix occurred in them.

    Args:
      pool: int32 [N, M, W], M other rows for each row. suffix: int32 [N, n], latest token first.
      first: int32 [N] or a number, the position of the first token that may be drafted.

    Returns (tokens that match, int32 [N, M]; the k tokens after them, int32 [N, M, k], NOTHING past
    a row's end).
    """
    first = jnp.reshape(first, (-1, 1, 1))
    goes_on = (shift(pool, -1) != NOTHING) & (jnp.arange(pool.shape[-1]) >= first - 1)
    matched, at = longest_match(pool, suffix[:, None], goes_on)
    ahead = at[..., None] + 1 + jnp.arange(k)
    return matched, jnp.take_along_axis(pool, ahead, axis=-1, mode="fill", fill_value=NOTHING)


def vote(matched: jax.Array, going_on: jax.Array,
         last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draft what most votes are for, token by token; rows that go on otherwise drop out.

    A row has the square of the tokens that match in it as votes: the longest match leads, and some
    shorter ones that agree outvote it.

    Args:
      matched: int32 [N, M], tokens that match in each of M rows.
      going_on: int32 [N, M, k], the tokens after them, NOTHING past the end. Of equals the first
        row wins.
      last: int32 [N], each row's last token.

    Returns (int32 [N, k], where no match has a token left, the token before it is drafted again;
    certainty float32 [N], of the votes for a first token the share that it has, with one more vote
    for none: about how often it is accepted).
    """
    alive, token, drafted, shares = matched > 0, last, [], []
    for j in range(going_on.shape[2]):
        ahead = going_on[:, :, j]
        alive = alive & (ahead != NOTHING)
        count = jnp.where(alive, matched * matched, 0)
        agree = jnp.sum(jnp.where(ahead[:, :, None] == ahead[:, None], count[:, None], 0), axis=2)
        votes = jnp.where(alive, agree, 0)
        winner = jnp.argmax(votes, axis=1)[:, None]
        token = jnp.where(alive.any(1), jnp.take_along_axis(ahead, winner, axis=1)[:, 0], token)
        shares.append(votes.max(1).astype(jnp.float32)
                      / (1 + count.sum(1)).astype(jnp.float32))
        alive = alive & (ahead == token[:, None])
        drafted.append(token)
    return jnp.stack(drafted, axis=1), shares[0]
