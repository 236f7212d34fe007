"""Counter-based noise: threefry-2x32, the same bits on every platform, device count and
implementation.

Keys are `uint32 [..., 2]`, folded from the batch's key; `fold` and `random_bits` equal
`jax.random.fold_in` and partitionable `jax.random.bits`
(https://www.thesalmons.org/john/random123/papers/random123sc11.pdf), so that any program can make
them again. A rule is which kind of noise it is given:

- `CoupledNoise`: a key for every position of the sequence, whose counter is the global vocabulary
  id.
- `RejectionNoise`, `BlockNoise`: a few uniforms for one cycle. They are keyed by what was committed
  when the cycle began: what comes after the accepted drafts has been looked at when a block is
  judged, and the next cycle would know.
"""

from __future__ import annotations

import operator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

TARGET, DRAFT, ACCEPT, RESIDUAL = range(4)

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def seed_key(seed: int) -> jax.Array:
    """A typed threefry key from a whole number 0 <= seed < 2**64, each of them another key.

    Below 2**32 it is what `jax.random.key(seed)` is by default, but whatever
    `jax_default_prng_impl` and `jax_enable_x64` say: noise that a setting of the process changes
    could not be made again.

    Raises ValueError for any other number, TypeError for what is no whole number.
    """
    seed = operator.index(seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed must be from 0 to 2**64 - 1, not {seed}")
    words = np.array([seed >> 32, seed & (2**32 - 1)], np.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def key_words(key: jax.Array) -> jax.Array:
    """uint32 [..., 2], for `fold`, of typed keys [...] of any implementation.

    Threefry's two words are as they are; of others (JAX's rbg has four) the words after the second
    are folded in, so that keys which differ in any of them have noise of their own.
    """
    words = jax.random.key_data(key)
    return fold(words[..., :2], *(words[..., i] for i in range(2, words.shape[-1])))


def threefry2x32(k0: jax.Array, k1: jax.Array, c0: jax.Array,
                 c1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The 20-round block function on uint32 [...] that broadcast; returns two uint32 [...]."""
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = c0 + keys[0], c1 + keys[1]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << r) | (x1 >> (32 - r))) ^ x0
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


def fold(key: jax.Array, *data: jax.Array | int) -> jax.Array:
    """Fold integers into a key, one after the other: uint32 [..., 2] -> uint32 [..., 2],
    broadcasting with the data."""
    k0, k1 = key[..., 0], key[..., 1]
    for d in data:
        k0, k1 = threefry2x32(k0, k1, jnp.uint32(0), jnp.asarray(d).astype(jnp.uint32))
    return jnp.stack([k0, k1], -1)


def random_bits(key: jax.Array, counter: jax.Array) -> jax.Array:
    """uint32 bits for every counter, uint32; key [..., 2] and counter broadcast ([..., 1] keys
    against [V])."""
    x0, x1 = threefry2x32(key[..., 0], key[..., 1], jnp.uint32(0), counter.astype(jnp.uint32))
    return x0 ^ x1


def uniform(bits: jax.Array) -> jax.Array:
    """float32 in [0, 1), 24 bits: every value is exact, and 1 cannot occur."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def gumbel(bits: jax.Array) -> jax.Array:
    """float32 g = -log(-log(u)) of bits uint32 [...], the standard Gumbel distribution; finite.

    Computed from w = 1 - u in (0, 1): the draws that win an argmax have u near 1, where float32
    holds u to 24 bits only but w to its full relative precision. -log(1 - w) of a small w is its
    series, since not every kernel has a log1p.
    """
    w = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2**-32)
    w = jnp.minimum(w, jnp.float32(1 - 2**-24))
    series = jnp.float32(1 / 8)
    for n in range(7, 0, -1):
        series = series * w + jnp.float32(1 / n)
    return -jnp.log(jnp.where(w < 1 / 8, w * series, -jnp.log(1 - w)))


@struct.dataclass
class CycleNoise:
    """Uniforms in [0, 1) of one cycle of N rows and K drafts, float32.

    Attributes:
      draft: [N, K, 2], two for each draft's inverse transform.
      accept: [N, K].
      residual: [N, 2], for the residual's or the bonus token's inverse transform.
    """

    draft: jax.Array
    accept: jax.Array
    residual: jax.Array


@struct.dataclass
class RejectionNoise(CycleNoise):
    """accept[:, j] judges draft j."""


@struct.dataclass
class BlockNoise(CycleNoise):
    """accept[:, j] judges the first j + 1 drafts together."""


@struct.dataclass
class CoupledNoise:
    """keys: uint32 [N, K + 1, 2], one for each position that the cycle may emit; [:, :K] are the
    drafts' too."""

    keys: jax.Array


Noise = CycleNoise | CoupledNoise


Kind = TypeVar("Kind", bound=CycleNoise)


def _cycle_noise(kind: type[Kind], key: jax.Array, sequence_ids: jax.Array, committed: jax.Array,
                 k: int) -> Kind:
    base = fold(key, sequence_ids, committed)[:, None]
    offsets = jnp.arange(max(k, 1))[None]
    pair = jnp.arange(2)

    def uniforms(offset, tag) -> jax.Array:
        return uniform(random_bits(fold(base, offset, tag)[..., None, :], pair))

    return kind(uniforms(offsets, DRAFT)[:, :k], uniforms(offsets, ACCEPT)[:, :k, 0],
                uniforms(jnp.zeros((1, 1), jnp.int32), RESIDUAL)[:, 0])


def rejection_noise(key: jax.Array, sequence_ids: jax.Array, committed: jax.Array,
                    k: int) -> RejectionNoise:
    """Noise of a cycle that begins with `committed` int32 [N] tokens (prompt included) in sequences
    `sequence_ids`."""
    return _cycle_noise(RejectionNoise, key, sequence_ids, committed, k)


def block_noise(key: jax.Array, sequence_ids: jax.Array, committed: jax.Array,
                k: int) -> BlockNoise:
    """The numbers of `rejection_noise`, [N, K, ...] as there."""
    return _cycle_noise(BlockNoise, key, sequence_ids, committed, k)


def coupled_noise(key: jax.Array, sequence_ids: jax.Array, committed: jax.Array,
                  k: int) -> CoupledNoise:
    """Noise of the K + 1 positions from `committed` int32 [N] on; position 0 is the prompt's first
    token."""
    positions = committed[:, None] + jnp.arange(k + 1)[None]
    return CoupledNoise(fold(key, sequence_ids[:, None], positions, TARGET))
