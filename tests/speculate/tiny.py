"""Policies small enough to be enumerated, a drafter whose q is a table, and the autoregressive
distribution."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jspec.drafts.base import Draft, Drafter, Proposal
from jspec.model import Experts, ModelConfig, ParamSpec, init_policy, logits, train_forward
from jspec.speculate import PromptBatch, Rollout
from tests.compiling import quickly
from tests.pallas_kernels.oracle import process


def config(vocab=4, *, layers=1, heads=2, kv_heads=1, hidden=16, scale=0.5, **options):
    """A transformer with spread-out logits and room for 64 positions."""
    return ModelConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden,
                       num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
                       head_dim=hidden // heads, initializer_range=scale,
                       max_position_embeddings=64, **options)


SPARSE = {"family": "qwen3_moe", "qk_norm": True,
          "experts": Experts(count=4, top_k=2, intermediate_size=16)}
"""Options that make it one of experts."""


@quickly()
def policy(*args, seed=0, **options):
    """A policy of `config(...)`."""
    return init_policy(config(*args, **options), jax.random.key(seed))


@quickly()
def shaken(draft, seed=0, scale=0.4):
    """The draft with noise on every weight, so that nothing in it is zero or the identity."""
    leaves, tree = jax.tree.flatten(draft.weights)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + scale * jax.random.normal(k, x.shape,
                                            x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
              for k, x in zip(keys, leaves, strict=True)]
    return draft.replace(weights=tree.unflatten(leaves))


@dataclasses.dataclass(frozen=True)
class TableConfig:
    policy: ModelConfig
    sampled: bool = True


def _init(policy, key=None, *, sampled=True, seed=0, spread=1.0):
    vocab = policy.config.vocab_size
    return Draft({"table": spread * jax.random.normal(jax.random.key(seed), (vocab, vocab))}, {},
                 TableConfig(policy.config, sampled), table)


def _propose(policy, draft, state, committed, sampler):
    token = jnp.take_along_axis(committed.tokens, committed.lengths[:, None] - 1, axis=1)[:, 0]
    tokens, log_qs = [], []
    for j in range(sampler.k):
        row = draft.weights["table"][token]
        token, log_q = (sampler.draw(row, j) if draft.config.sampled
                        else (jnp.argmax(row, -1).astype(jnp.int32), None))
        tokens.append(token)
        log_qs.append(log_q)
    return Proposal(jnp.stack(tokens, 1),
                    jnp.stack(log_qs, 1) if draft.config.sampled else None), state


def _specs(config):
    return {"table": ParamSpec((config.policy.vocab_size, config.policy.vocab_size), (None, None))}


table = Drafter("table", TableConfig, _init, _propose, specs=_specs)
"""One that knows the last token only: q is a row of a table; not `sampled`: its largest entry, as
one-hot."""


def table_draft(policy, **options):
    """A draft of `table`; options are those of its init: sampled, seed, spread."""
    return table.init(policy, **options)


@jax.jit
def _score(policy, tokens):
    return logits(policy, train_forward(policy, tokens).hidden)


def prefix_logits(policy, prompt, depth):
    """{prefix of generated tokens: logits float64 [V]} for every prefix shorter than depth."""
    vocab = policy.config.vocab_size
    rows = list(itertools.product(range(vocab), repeat=depth - 1))
    tokens = jnp.array([[*prompt, *r] for r in rows], jnp.int32)
    scores = np.asarray(_score(policy, tokens), np.float64)[:, len(prompt) - 1:]
    return {r[:i]: scores[n, i] for n, r in enumerate(rows) for i in range(depth)}


def autoregressive(policy, prompt, *, max_new_tokens, min_new_tokens=0, stop_tokens=(),
                   temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """{(tokens, stopped): probability} of sampling one token at a time, in float64."""
    scores = prefix_logits(policy, prompt, max_new_tokens)
    out = {}

    def walk(prefix, mass):
        banned = stop_tokens if len(prefix) < min_new_tokens else ()
        p = process(scores[prefix], temperature, top_k, top_p, banned, min_p)
        for token in np.flatnonzero(p):
            tokens, stopped = (*prefix, int(token)), int(token) in stop_tokens
            if stopped or len(tokens) == max_new_tokens:
                out[tokens, stopped] = mass * p[token]
            else:
                walk(tokens, mass * p[token])

    walk((), 1.0)
    return out


def sequences(out):
    """[(generated tokens, finished)] of a Rollout's rows."""
    tokens, lengths, finished = (np.asarray(x) for x in (out.tokens, out.lengths, out.finished))
    return [(tuple(map(int, t[:n])), bool(f))
            for t, n, f in zip(tokens, lengths, finished, strict=True)]


def finished(prompts, outputs, seed=1, width=8, buckets=(8,)):
    """A batch, and the Rollout of it whose outputs are these: a list of rows for each prompt."""
    batch = PromptBatch.from_tokens(prompts, group_size=len(outputs[0]), seed=seed, buckets=buckets)
    rows = [row for group in outputs for row in group]
    tokens = jnp.array([row + [0] * (width - len(row)) for row in rows], jnp.int32)
    lengths = jnp.array(list(map(len, rows)))
    mask = jnp.arange(width) < lengths[:, None]
    return batch, Rollout(tokens, mask, None, mask, None, lengths, None, None)


def distance(a, b):
    """The largest difference between two distributions given as dictionaries."""
    return max(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in a.keys() | b.keys())


