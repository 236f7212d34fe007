"""What the kernels are given when they are compiled and timed, made from the shapes that each
kernel lists."""

from typing import Any

import jax
import jax.numpy as jnp

from jspec.model.pool import block_size, blocks_of
from jspec.speculate.types import NOISE
from pallas_kernels.rejection_sampling import shapes as sampling_shapes
from pallas_kernels.verify_attention import shapes as attention_shapes

CASES = ("rejection", "rejection, sampled drafts", "coupled")
"""What is compiled and timed. `judging` knows "block" and "block, sampled drafts" too, which run
rejection's pass."""
STOPS = (2, 5)  # end tokens that may be banned


def judging(shape: sampling_shapes.Shape, rule: str, key: jax.Array) -> dict[str, Any]:
    """Arguments of `rejection_sampling` for one device's part of the vocabulary. Half of the drafts
    are likely."""
    rows, k, vocab = shape.batch, shape.k, shape.vocab // shape.shards
    keys = jax.random.split(key, 4)
    logits = 3 * jax.random.normal(keys[0], (rows, k + 1, vocab), jnp.float32)
    drafts = jax.random.randint(keys[1], (rows, k), 0, vocab, jnp.int32)
    likely = jnp.arange(vocab) == jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=-1)[..., None]
    logits = jnp.where(likely, jnp.log(vocab) + 5.0, logits)
    log_q = None
    if rule.endswith("sampled drafts") and k:
        log_q = jax.nn.log_softmax(logits[:, :k] + jax.random.normal(keys[2], (rows, k, vocab)))
    make = NOISE[rule.partition(",")[0]]
    noise = make(jax.random.key_data(keys[3]), jnp.arange(rows), jnp.full(rows, 100, jnp.int32), k)
    return {"logits": logits.astype(shape.dtype), "draft_tokens": drafts, "draft_log_q": log_q,
            "noise": noise, "temperature": jnp.ones(rows, jnp.float32)}


def attending(shape: attention_shapes.Shape, lengths: jax.Array,
              key: jax.Array) -> tuple[jax.Array, ...]:
    """Arguments of `verify_attention`: q, k, v, both pools, the table and the lengths. Blocks lie
    anywhere."""
    *keys, order = jax.random.split(key, 6)
    size = block_size(shape.size)
    blocks = shape.batch * blocks_of(shape.size, size)
    new = shape.batch, shape.t, shape.kv_heads, shape.head_dim
    pool = blocks, shape.kv_heads, size, shape.head_dim
    sizes = (new[0], new[1], shape.heads, new[3]), new, new, pool, pool
    table = jax.random.permutation(order, blocks).astype(jnp.int32).reshape(shape.batch, -1)
    return (*(jax.random.normal(k, size, jnp.dtype(shape.dtype))
              for k, size in zip(keys, sizes, strict=True)), table, lengths.astype(jnp.int32))
