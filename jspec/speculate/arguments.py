"""What `jspec.rollout` is given, judged before anything is compiled, and in the program what cannot
be seen before."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jspec.arguments import INT32, instance, is_whole, random_key, unmasked, wrong
from jspec.drafts.base import Draft
from jspec.errors import InputError
from jspec.kernels import choose
from jspec.model import ModelConfig, Policy, check_policy, check_weights
from jspec.sharding import batch_shards, check_rows
from jspec.speculate.blocks import Blocks, prompts_of_shards
from jspec.speculate.types import Batching, PromptBatch, Sampling, Speculation

MOST_DRAFTS = 64
_DRAFT = "a draft, such as jspec.drafts.ngram(params), or None"
_BATCH = "a batch, jspec.PromptBatch.from_tokens(prompts, group_size=..., seed=...)"


def check(policy: Policy, draft: Draft | None, batch: PromptBatch, sampling: Sampling,
          spec: Speculation, batching: Batching) -> None:
    """Raise InputError for what cannot work. Values that are traced, or lie partly on other hosts,
    are not judged (`answerable` is for those), their shapes and dtypes are."""
    check_policy("params", policy)
    if draft is not None:
        instance(Draft, _DRAFT)("draft_params", draft).check(policy)
        check_weights(f"this {draft.name} draft", draft.weights, draft.drafter.specs(draft.config))
    instance(PromptBatch, _BATCH)("batch", batch)
    instance(Sampling, "jspec.Sampling(...) or None")("sampling", sampling)
    instance(Speculation, "jspec.Speculation(...) or None")("speculation", spec)
    instance(Batching, "jspec.Batching(...) or None")("batching", batching)
    _check_batch(batch)
    rows, model = batch.tokens.shape[0] * batch.group_size, policy.config
    _check_leaf("temperature", sampling.temperature, rows, high=np.inf)
    for name in ("top_p", "min_p"):
        if (share := getattr(sampling, name)) is not None:
            _check_leaf(name, share, rows, high=1)
    if sampling.limit is not None:
        _check_leaf("limit", sampling.limit, rows, low=1, high=sampling.max_new_tokens)
        if (not is_whole((sampling.limit if hasattr(sampling.limit, "dtype")
                          else np.asarray(sampling.limit)).dtype)):
            raise wrong("sampling limit", sampling.limit, "whole numbers", traceable=True)
    choose(spec.kernels)
    _check_tokens(model, batch, sampling)
    positions = model.max_position_embeddings
    if spec.most >= positions:
        raise InputError(f"speculation k = {spec.most} must be below the model's {positions} "
                         "positions")
    if spec.most > MOST_DRAFTS:
        raise InputError(f"speculation k = {spec.most} must be at most {MOST_DRAFTS}: the passes "
                         "that draft are unrolled")
    for depth in spec.depths or ():
        if depth > model.num_layers:
            raise InputError(f"speculation depths holds {depth}; the model has {model.num_layers} "
                             "layers")
    layout = policy.layout if not policy.stacked else "rollout"
    check_rows(rows, layout=layout)
    check_batching("batching ", batching, batch_shards(layout), rows, batch.group_size,
                   batch.tokens.shape[1],
                   sampling.max_new_tokens, 0 if draft is None else spec.most)


def check_batching(label: str, batching: Batching, shards: int, rows: int, group_size: int,
                   length: int, cap: int, k: int) -> None:
    """Raise InputError, which begins with `label`, for slots or a pool that a batch cannot be
    generated with: `rows` sequences on so many batch shards, prompts padded to `length`, answers of
    at most `cap` tokens drafted by up to k.
    """
    if (batching.slots or 0) % shards:
        raise InputError(f"{label}slots = {batching.slots} are not divided by the mesh's {shards} "
                         "batch shards; change slots or the mesh")
    if batching.groups is not None:
        check_groups(f"{label}groups", batching.groups, rows // group_size, shards)
    prompts = prompts_of_shards(rows, group_size, shards).shape[1]
    Blocks.of(prompts, length, cap, k).check(f"{label}kv_tokens", batching.kv_tokens, shards)


def check_groups(label: str, groups: int, prompts: int, shards: int) -> None:
    """Raise InputError, which begins with `label`, for a rollout that cannot end when so many
    groups of its prompts are done."""
    if groups > prompts:
        raise InputError(f"{label} = {groups} is more than the {prompts} prompts there are; lower "
                         "it")
    if groups % shards or prompts % shards:
        raise InputError(f"{label} = {groups} of {prompts} prompts: each of the mesh's {shards} "
                         "batch shards ends when its share is done, so make both multiples of "
                         f"{shards}, or change the mesh")


def answerable(model: ModelConfig, batch: PromptBatch, sampling: Sampling) -> jax.Array:
    """bool [N]: whether a row's prompt and settings are such that it has an answer.

    `check` has refused the others where it could see them; where they are traced, nothing is to be
    generated in their place. Log-probabilities of a prompt of 0 tokens, or at a temperature of NaN,
    would be plausible or NaN, and learned from.
    """
    length = batch.tokens.shape[1]
    inside = (batch.tokens >= 0) & (batch.tokens < model.vocab_size)
    known = inside | (jnp.arange(length) >= batch.lengths[:, None])
    prompts = (batch.lengths >= 1) & (batch.lengths <= length) & known.all(1)
    temperature = jnp.asarray(sampling.temperature, jnp.float32)
    settings = (temperature >= 0) & jnp.isfinite(temperature)
    for share in (sampling.top_p, sampling.min_p):
        if share is not None:
            share = jnp.asarray(share, jnp.float32)
            settings &= (share >= 0) & (share <= 1)
    if sampling.limit is not None:
        limit = jnp.asarray(sampling.limit)
        settings &= (limit >= 1) & (limit <= sampling.max_new_tokens)
    return jnp.repeat(prompts, batch.group_size) & settings


def in_32_bits(batch: PromptBatch, sampling: Sampling) -> tuple[PromptBatch, Sampling]:
    """The leaves as the program has them, int32 and float32; NumPy's and Python's are wider, and
    JAX's with x64."""
    ids = {name: getattr(batch, name)
           for name in ("tokens", "lengths", "sequence_ids", "expected_lengths")}
    batch = batch.replace(**{name: jnp.asarray(x, jnp.int32) for name, x in ids.items()
                             if x is not None and x.dtype != jnp.int32})
    dtypes = {"temperature": np.float32, "top_p": np.float32, "min_p": np.float32,
              "limit": np.int32}
    leaves = {name: (getattr(sampling, name), dtype) for name, dtype in dtypes.items()}
    return batch, sampling.replace(**{name: np.asarray(x, dtype) for name, (
        x, dtype) in leaves.items() if isinstance(x, numbers.Real | list | tuple)})


def _concrete(x: Any) -> np.ndarray | None:
    """The value of x, or None while it is being traced (or lives partly on other hosts)."""
    if (isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        and not x.is_fully_addressable):
        return None
    return (None if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))
            else np.asarray(x))


def _check_leaf(name: str, value: Any, rows: int, high: float, low: float = 0) -> None:
    """A number in [low, high] or one for each row."""
    expected = f"a number, or one for each of the {rows} sequences"
    unmasked(f"sampling {name}", value)
    try:
        array = value if hasattr(value, "dtype") else np.asarray(value)
        shape, dtype = array.shape, array.dtype
    except Exception:  # JAX and NumPy raise several kinds for what is no array
        raise wrong(f"sampling {name}", value, expected, traceable=True) from None
    if not (jnp.issubdtype(dtype, jnp.floating) or is_whole(dtype)):
        raise wrong(f"sampling {name}", value, expected, traceable=True)
    if shape not in ((), (rows,)):
        raise InputError(f"sampling {name} has shape {shape}; give a scalar or one value for each "
                         f"of the {rows} sequences")
    known = _concrete(value)
    with np.errstate(over="ignore"):
        known = None if known is None else known.astype(np.float32)
    bad = None if known is None else ~((known >= low) & (known <= high) & np.isfinite(known))
    if bad is not None and bad.any():
        most = "" if high == np.inf else f" and at most {high}"
        raise InputError(f"sampling {name} must be finite and at least {low}{most}; got "
                         f"{known[bad].ravel()[0]}")


def _check_batch(batch: PromptBatch) -> None:
    """Shapes, dtypes and values of a batch that may have been put together by hand."""
    shape = getattr(batch.tokens, "shape", None)
    if shape is None or len(shape) != 2 or 0 in shape:
        raise wrong("batch.tokens", batch.tokens, "int32 [prompts, length], at least one of each",
                    traceable=True)
    wanted = {"tokens": shape, "lengths": shape[:1], "sequence_ids": (shape[0] * batch.group_size,)}
    if batch.expected_lengths is not None:
        wanted["expected_lengths"] = shape[:1]
    for name, shape in wanted.items():
        value = unmasked(f"batch.{name}", getattr(batch, name))
        dtype = getattr(value, "dtype", None)
        if dtype is None or not is_whole(dtype) or value.shape != shape:
            raise wrong(f"batch.{name}", value, f"int32 {list(shape)}: whole numbers",
                        traceable=True)
    lengths, ids = _concrete(batch.lengths), _concrete(batch.sequence_ids)
    longest = wanted["tokens"][1]
    if lengths is not None and not (lengths.min() >= 1 and lengths.max() <= longest):
        bad = lengths[(lengths < 1) | (lengths > longest)][0]
        raise InputError(f"batch.lengths holds {bad}; a prompt has at least one token, and at most "
                         f"the {longest} that batch.tokens has room for")
    if ids is not None and not (ids.min() >= 0 and ids.max() <= INT32):
        bad = ids[(ids < 0) | (ids > INT32)][0]
        raise InputError(f"batch.sequence_ids holds {bad}; they must be whole numbers from 0 to "
                         f"{INT32}")
    if ids is not None and len(np.unique(ids)) != len(ids):
        raise InputError("batch.sequence_ids holds a number twice; two sequences would get the "
                         "same noise")
    if not hasattr(batch.key, "dtype"):
        raise wrong("batch.key", batch.key, "a typed key, jax.random.key(seed)")
    random_key("batch.key", batch.key)


def _check_tokens(model: ModelConfig, batch: PromptBatch, sampling: Sampling) -> None:
    lengths, tokens = _concrete(batch.lengths), _concrete(batch.tokens)
    longest = batch.tokens.shape[1] if lengths is None else int(lengths.max())
    if longest + sampling.max_new_tokens > model.max_position_embeddings:
        raise InputError(f"a prompt of {longest} tokens and max_new_tokens "
                         f"= {sampling.max_new_tokens} do not fit the model's "
                         f"{model.max_position_embeddings} positions; shorten one of them")
    if tokens is not None and (tokens.min() < 0 or tokens.max() >= model.vocab_size):
        raise InputError(f"prompt token {int(tokens.max() if tokens.min() >= 0 else tokens.min())} "
                         f"is outside the model's vocabulary of {model.vocab_size}; was it made "
                         "with another tokenizer?")
    check_stops(model, sampling)


def check_stops(model: ModelConfig, sampling: Sampling) -> None:
    """Raise InputError for stop tokens that the model has not, or that leave nothing to sample."""
    for token in sampling.stop_tokens or ():
        if token >= model.vocab_size:
            raise InputError(f"stop token {token} is outside the model's vocabulary of "
                             f"{model.vocab_size}")
    if sampling.min_new_tokens:
        stops = set(model.stop_tokens if sampling.stop_tokens is None else sampling.stop_tokens)
        if len(stops.union(*(range(*ids) for ids in model.tokenless))) == model.vocab_size:
            raise InputError(f"sampling min_new_tokens = {sampling.min_new_tokens} forbids every "
                             "token, since all of them are stop tokens; set it to 0, or name "
                             "fewer stop tokens")
