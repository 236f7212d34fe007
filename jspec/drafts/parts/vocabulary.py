"""A reduced draft vocabulary: at small models the output head is most of what a draft costs."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jspec.arguments import whole_numbers
from jspec.errors import InputError
from jspec.model import Policy
from jspec.model.forward import without_tokenless
from jspec.model.linear import linear
from jspec.sharding import constrain


def most_frequent(tokens: np.ndarray, size: int, vocab_size: int) -> np.ndarray:
    """The `size` most frequent ids of `tokens` int [any shape], ascending, int32 [size]; ties go to
    the lowest id."""
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=vocab_size)
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def check_vocab(vocab: Sequence[int] | np.ndarray, vocab_size: int, name: str) -> np.ndarray:
    """int32 [Vd], ascending. Raises InputError for an empty vocabulary, ids out of range and
    repeated ones."""
    ids = np.asarray(whole_numbers(f"{name} draft: vocab", vocab), np.int32)
    if not len(ids):
        raise InputError(f"{name} draft: vocab must be a list of token ids, and is empty")
    if ids.max() >= vocab_size:
        raise InputError(f"{name} draft: vocab holds token {ids.max()}, outside the policy's "
                         f"{vocab_size}")
    if len(np.unique(ids)) != len(ids):
        raise InputError(f"{name} draft: vocab holds a token twice")
    return np.sort(ids)


def output_table(policy: Policy, vocab: jax.Array | None) -> jax.Array:
    """The rows of the policy's output head that a draft uses, [Vd, D], in the compute dtype.

    The rows of a reduced vocabulary lie on every device: they are few, and every device draws from
    all of them.
    """
    table = _head(policy)
    if vocab is not None:
        table = constrain(table[vocab], policy.layout, None, None)
    return table.astype(policy.dtype)


def head_rows(policy: Policy, tokens: jax.Array) -> jax.Array:
    """The rows of the policy's output head of `tokens` int32 [B, T], [B, T, D], in the compute
    dtype."""
    return constrain(_head(policy)[tokens], policy.layout, "batch", None, None).astype(policy.dtype)


def _head(policy: Policy) -> jax.Array:
    return policy.weights["embed" if policy.config.tie_embeddings else "head"]


def table_logits(policy: Policy, table: jax.Array, vocab: jax.Array | None,
                 states: jax.Array) -> jax.Array:
    """Logits float32 [..., Vd] of states [..., D], -inf for ids without a token, as the policy's
    are.

    vocab: int32 [Vd], the ids of a reduced vocabulary; None: the table is the whole vocabulary's,
    sharded as it is.
    """
    with jax.named_scope("head"):
        out = without_tokenless(policy.config, linear(states, table, out_dtype=jnp.float32), vocab)
        return constrain(out, policy.layout, "batch", *(None,) * (out.ndim - 2),
                         "vocab" if vocab is None else None)
