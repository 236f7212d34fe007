"""Multi-token-prediction heads: decoder blocks of their own on the policy's trunk, embedding and output head.

At position p a block reads the trunk's normed hidden state of position p - 1 and the embedding of token p, and predicts
token p + 1. The next depth reads the state of the depth before in the trunk's place: with a block of its own
(https://arxiv.org/abs/2404.19737, https://arxiv.org/abs/2412.19437), or, where there are fewer blocks than depths, with
the last block once more (unrolled in training as at inference, https://arxiv.org/abs/2503.01840). After each cycle the
keys and values of committed positions are rewritten from the verifier's states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jspec.drafts.base import Committed, Draft, Observation, Prefill, Sampler
from jspec.drafts.parts import recursion
from jspec.drafts.parts.losses import loss_over_depths, predicting
from jspec.drafts.parts.unroll import shift
from jspec.drafts.parts.vocabulary import check_vocab, output_table, table_logits
from jspec.errors import InputError
from jspec.model import ModelConfig, ParamSpec, Policy, Trunk, embed, init_weights, layer_specs, place_on_mesh
from jspec.model.layers import decoder_layer, fuse, linear, rms_norm
from jspec.sharding import constrain_tree


@dataclasses.dataclass(frozen=True)
class MtpConfig:
    """depths: how many are unrolled in training; at inference k may be larger. blocks: how many depths have a block of
    their own. vocab_size: of the reduced vocabulary, 0: the policy's. hidden_first: the order in which hidden state and
    embedding are concatenated."""

    policy: ModelConfig
    depths: int = 2
    blocks: int = 1
    vocab_size: int = 0
    hidden_first: bool = False
    name: str = "mtp"


def init(policy: Policy, key: jax.Array, *, depths: int = 2, blocks: int = 1,
         vocab: Sequence[int] | np.ndarray | None = None) -> Draft:
    """A head from random initialisation, float32 masters, on the mesh of `jax.set_mesh` if there is one.

    A block starts as the identity (its two output projections are zero) on an even mix of both inputs.

    Args:
      policy: in the training layout.
      depths: how many are unrolled in training.
      blocks: the first depths that have a block of their own; the last one serves the depths after it too.
      vocab: the token ids that may be drafted (`parts.vocabulary.most_frequent` of the policy's own rollouts), or None
        for all of them.

    Raises InputError if not 1 <= blocks <= depths, or for a vocabulary that is none.
    """
    if not 1 <= blocks <= depths:
        raise InputError(f"mtp draft: blocks = {blocks} must be at least 1 and at most depths = {depths}")
    ids = None if vocab is None else check_vocab(vocab, policy.config.vocab_size, "mtp")
    config = MtpConfig(policy.config, depths, blocks, 0 if ids is None else len(ids))
    d = policy.config.hidden_size

    def make(key):
        weights = init_weights(specs(config), key, policy.config.initializer_range)
        for block in weights["blocks"]:
            block["proj"] = block["proj"] + 0.5 * jnp.concatenate([jnp.eye(d), jnp.eye(d)], axis=1)
        return weights

    return Draft(weights=place_on_mesh(make, specs(config), policy.config)(key), config=config,
                 state={} if ids is None else {"vocab": jnp.asarray(ids)})


def features(config: MtpConfig) -> tuple[int, ...]:
    return ()


def specs(config: MtpConfig) -> dict:
    """The head's parameters; embedding and output head are the policy's."""
    d = config.policy.hidden_size
    layer = layer_specs(config.policy)
    for name in ("o", "down"):
        layer[name] = dataclasses.replace(layer[name], init="zeros")
    block = {"embed_norm": ParamSpec((d,), ("norm",), "ones"), "hidden_norm": ParamSpec((d,), ("norm",), "ones"),
             "proj": ParamSpec((d, 2 * d), ("embed", None)), "layer": layer,
             "final_norm": ParamSpec((d,), ("norm",), "ones")}
    return {"blocks": (block,) * config.blocks}


def prepare(policy: Policy, draft: Draft) -> Draft:
    """Cast to the policy's compute dtype, shard as the policy is, fuse the blocks' projections, and gather the rows of
    the output head that are drafted from."""
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    weights = constrain_tree(weights, specs(draft.config), policy.config, policy.layout)
    blocks = tuple({**w, "layer": fuse(policy.config, w["layer"])} for w in weights["blocks"])
    return draft.replace(weights={"blocks": blocks, "table": output_table(policy, draft.state.get("vocab"))})


def _runs(policy: Policy, config: MtpConfig, weights: Sequence[dict]) -> list[recursion.Run]:
    """The blocks, as `parts.recursion` runs them: states are normed."""
    eps = policy.config.rms_norm_eps

    def run(w, hidden, tokens, rope, attend):
        inputs = [rms_norm(embed(policy, tokens), w["embed_norm"], eps), rms_norm(hidden, w["hidden_norm"], eps)]
        x = jnp.concatenate(inputs[::-1] if config.hidden_first else inputs, axis=-1)
        x, cache = decoder_layer(policy.config, w["layer"], linear(x, w["proj"]), rope, attend)
        return rms_norm(x, w["final_norm"], eps), cache

    return [partial(run, w) for w in weights]


def start(policy: Policy, draft: Draft, prefill: Prefill, cache_size: int) -> recursion.State:
    """Of every block, its cache over the prompts and its state at each prompt's last token."""
    return recursion.start(policy, _runs(policy, draft.config, draft.weights["blocks"]), shift(prefill.trunk.hidden),
                           prefill.tokens, prefill.lengths, cache_size)


def propose(policy: Policy, draft: Draft, state: recursion.State, committed: Committed, sampler: Sampler):
    """K sampled tokens with the distributions they were drawn from (`parts.recursion.propose`)."""
    vocab = draft.state.get("vocab")
    return recursion.propose(policy, _runs(policy, draft.config, draft.weights["blocks"]), state, committed.lengths,
                             sampler, lambda x: table_logits(policy, draft.weights["table"], x, whole=vocab is None),
                             vocab)


def observe(policy: Policy, draft: Draft, state: recursion.State, observation: Observation) -> recursion.State:
    """Rewrite the caches of the committed positions from the verifier's states; keep the states at the last one."""
    return recursion.observe(policy, _runs(policy, draft.config, draft.weights["blocks"]), state, observation.lengths,
                             observation.trunk.hidden, observation)


def loss(policy: Policy, draft: Draft, trunk: Trunk, tokens: jax.Array, response_start: jax.Array, mask: jax.Array,
         temperature: jax.Array, kind: str):
    """`parts.losses.loss_over_depths` of this head, its depths unrolled as at inference.

    Args:
      policy: any layout; only its embedding and output head are read. Detach it (and `trunk`) before the call.
      draft: unprepared, float32 masters.
      trunk: over contiguous prompt + response rows [B, S, D], tokens int32 [B, S].
      response_start: int32 [B], position of the first response token, at least 1. mask: bool [B, T], tokens trained.
      temperature: float32 scalar or [B]; 0 counts as 1. kind: one of `parts.losses.LOSSES`.
    """
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights)
    runs = _runs(policy, draft.config, weights["blocks"])
    states = recursion.unroll(policy, runs, shift(trunk.hidden), tokens, draft.config.depths)
    at = partial(predicting, response_start=response_start, length=mask.shape[1])
    vocab = draft.state.get("vocab")
    table = output_table(policy, vocab)
    return loss_over_depths(policy, at(trunk.hidden), [at(x) for x in states],
                            lambda x: table_logits(policy, table, x, whole=vocab is None), vocab, mask, temperature,
                            kind)
