"""Multi-token-prediction heads: decoder blocks of their own on the policy's trunk, embedding and
output head.

At position p a block reads the trunk's hidden state of position p - 1 and the embedding of token p,
and predicts token p + 1. The next depth reads the state of the depth before in the trunk's place:
with a block of its own (https://arxiv.org/abs/2404.19737, https://arxiv.org/abs/2412.19437), or,
where there are fewer blocks than depths, with the last block once more (unrolled in training as at
inference, https://arxiv.org/abs/2503.01840). After each cycle the keys and values of committed
positions are rewritten from the verifier's states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jspec.arguments import flag, settle, whole
from jspec.drafts.base import (
    Committed,
    Draft,
    DraftBatch,
    Drafter,
    DraftState,
    Metrics,
    Observation,
    Prefill,
    Proposal,
    Sampler,
)
from jspec.drafts.parts import recursion
from jspec.drafts.parts.losses import loss_over_depths, state_loss, unit
from jspec.drafts.parts.unroll import shift
from jspec.drafts.parts.vocabulary import check_vocab, output_table, table_logits
from jspec.errors import InputError
from jspec.model import (
    KeyValues,
    ModelConfig,
    ParamSpec,
    Policy,
    Trunk,
    check_policy,
    embed,
    init_weights,
    layer_specs,
    place_on_mesh,
)
from jspec.model.layers import decoder_layer, fuse, rms_norm
from jspec.model.linear import linear


@dataclasses.dataclass(frozen=True)
class MtpConfig:
    """A head's shape, and the conventions by which published heads differ (`jspec.hub.mtp_heads`).

    Raises InputError if not 1 <= blocks <= depths.

    Attributes:
      policy: of the policy that it drafts for.
      depths: how many are unrolled in training; at inference k may be larger.
      blocks: how many depths have a block of their own, whose attention sees the entries of its
        depth alone.
      vocab_size: of the reduced vocabulary, 0: the policy's.
      hidden_first: the order in which hidden state and embedding are concatenated.
      normed_trunk: the first depth reads the trunk's state after its final norm; False: before it.
      first: the first position that later ones attend to; 1: position 0, which has no state before
        it, is left out, as in a head that was trained on pairs of a state and the next token (and
        in a further block every position that has no state of the block before).
      shared: the blocks have one set of weights.
      dtype: in which a published layout stores the weights; here they are float32 masters.
    """

    policy: ModelConfig
    depths: int = 2
    blocks: int = 1
    vocab_size: int = 0
    hidden_first: bool = False
    normed_trunk: bool = True
    first: int = 0
    shared: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        settle(self, "mtp draft: ", depths=whole(1, 32), blocks=whole(1), vocab_size=whole(),
               hidden_first=flag, normed_trunk=flag, first=whole(0, 1), shared=flag)
        if self.blocks > self.depths:
            raise InputError(f"mtp draft: blocks = {self.blocks} must be at least 1 and at most "
                             f"depths = {self.depths}")

    @property
    def late(self) -> bool:
        """See `parts.recursion`."""
        return self.first > 0


def init(policy: Policy, key: jax.Array, *, depths: int = 2, blocks: int = 1,
         vocab: Sequence[int] | np.ndarray | None = None) -> Draft:
    """A head from random initialisation, float32 masters, on the mesh of `jax.set_mesh` if there is
    one.

    A block starts as the identity (its two output projections are zero, its other weights those of
    the policy's last layer) on an even mix of both inputs; `least_squares` finds a better one.

    Args:
      policy: in the training layout.
      depths: how many are unrolled in training.
      blocks: the first depths that have a block of their own; the last one serves the depths after
        it too.
      vocab: the token ids that may be drafted (`parts.vocabulary.most_frequent` of the policy's own
        rollouts), or None for all of them.

    Raises InputError if not 1 <= blocks <= depths, for a vocabulary that is none, or a policy in a
    rollout layout.
    """
    check_policy("the policy of an mtp draft", policy, stacked=True)
    ids = None if vocab is None else check_vocab(vocab, policy.config.vocab_size, "mtp")
    config = MtpConfig(policy.config, depths, blocks, 0 if ids is None else len(ids))
    d = policy.config.hidden_size

    def fresh(key: jax.Array, layers: dict, final_norm: jax.Array) -> dict:
        weights = init_weights(specs(config), key, policy.config.initializer_range)
        for block in weights["blocks"]:
            block["proj"] = block["proj"] + 0.5 * jnp.tile(jnp.eye(d, dtype=jnp.float32), (1, 2))
            # of a sparse layer there is no dense feed-forward to begin with
            last = {name: x[-1] for name, x in layers.items()
                    if name in block["layer"] and name not in ("o", "down")}
            block["layer"] = block["layer"] | last
            block["final_norm"] = jnp.copy(final_norm)
        return weights

    weights = place_on_mesh(fresh, specs(config), policy.config)(key, policy.weights["layers"],
                                                                policy.weights["final_norm"])
    return Draft(weights=weights, config=config, drafter=mtp,
                 state={} if ids is None else {"vocab": jnp.asarray(ids)})


def features(config: MtpConfig) -> tuple[int, ...]:
    return () if config.normed_trunk else (config.policy.num_layers,)


def _trunk_states(config: MtpConfig, trunk: Trunk) -> jax.Array:
    """What the first depth reads, [B, T, D]."""
    return trunk.hidden if config.normed_trunk else trunk.features[0]


def _inputs(config: MtpConfig, trunk: Trunk, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first block's entries: hidden states [B, S, D] and the tokens [B, S] after them."""
    hidden = _trunk_states(config, trunk)
    return (hidden, recursion.next_tokens(tokens)) if config.first else (shift(hidden), tokens)


def specs(config: MtpConfig) -> dict:
    """The head's parameters; embedding and output head are the policy's."""
    d = config.policy.hidden_size
    layer = layer_specs(config.policy)
    for name in ("o", "down"):
        layer[name] = dataclasses.replace(layer[name], init="zeros")
    block = {"embed_norm": ParamSpec((d,), ("norm",), "ones"),
             "hidden_norm": ParamSpec((d,), ("norm",), "ones"),
             "proj": ParamSpec((d, 2 * d), ("embed", None)), "layer": layer,
             "final_norm": ParamSpec((d,), ("norm",), "ones")}
    return {"blocks": (block,) * (1 if config.shared else config.blocks)}


def prepare(policy: Policy, draft: Draft) -> Draft:
    """Cast to the policy's compute dtype, shard as the policy is, fuse the blocks' projections, and
    gather the rows of the output head that are drafted from."""
    weights = recursion.cast_and_split(policy, draft)
    blocks = tuple({**w, "layer": fuse(policy.config, w["layer"], policy.layout)}
                   for w in weights["blocks"])
    return draft.replace(weights={"blocks": blocks,
                                  "table": output_table(policy, draft.state.get("vocab"))})


def _blocks(policy: Policy, config: MtpConfig, weights: Sequence[dict]) -> list[recursion.Block]:
    """The blocks, as `parts.recursion` takes them: states are normed."""
    eps = policy.config.rms_norm_eps

    def run(w, hidden, tokens, rope, attends) -> tuple[jax.Array, list]:
        inputs = [rms_norm(embed(policy, tokens), w["embed_norm"], eps),
                  rms_norm(hidden, w["hidden_norm"], eps)]
        x = jnp.concatenate(inputs[::-1] if config.hidden_first else inputs, axis=-1)
        x, cache, _ = decoder_layer(policy.config, w["layer"], linear(x, w["proj"]), rope,
                                    *attends)
        return rms_norm(x, w["final_norm"], eps), [cache]

    blocks = [recursion.Block(partial(run, w)) for w in weights]
    return blocks * config.blocks if config.shared else blocks


def start(policy: Policy, draft: Draft, prefill: Prefill) -> tuple[recursion.Rows, KeyValues]:
    """Of every block, its state at each prompt's last token, and its keys and values over the
    prompts."""
    config = draft.config
    return recursion.start(policy, _blocks(policy, config, draft.weights["blocks"]),
                           *_inputs(config, prefill.trunk, prefill.tokens),
                           prefill.lengths - config.first, late=config.late)


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """K sampled tokens with the distributions they were drawn from (`parts.recursion.propose`)."""
    config, vocab = draft.config, draft.state.get("vocab")
    head = partial(table_logits, policy, draft.weights["table"], vocab)
    return recursion.propose(policy, _blocks(policy, config, draft.weights["blocks"]), state,
                             committed.lengths - config.first, sampler, head, vocab, config.late)


def observe(policy: Policy, draft: Draft, state: DraftState,
            observation: Observation) -> DraftState:
    """Rewrite the caches of the committed positions from the verifier's states; keep the states at
    the last one."""
    config = draft.config
    return recursion.observe(policy, _blocks(policy, config, draft.weights["blocks"]), state,
                             observation.lengths - config.first,
                             _trunk_states(config, observation.trunk), observation, config.late)


def unroll(policy: Policy, draft: Draft, trunk: Trunk, tokens: jax.Array,
           depths: int) -> list[jax.Array]:
    """The states [B, S, D] of each of the depths, of a trunk with this draft's features over tokens
    int32 [B, S]; those at position p predict token p + 1."""
    config = draft.config
    weights = jax.tree.map(lambda x: x.astype(policy.dtype), draft.weights["blocks"])
    states = recursion.unroll(policy, _blocks(policy, config, weights),
                              *_inputs(config, trunk, tokens), depths, config.late)
    return [shift(x) for x in states] if config.first else states


def loss(policy: Policy, draft: Draft, batch: DraftBatch,
         kind: str) -> tuple[jax.Array, jax.Array, Metrics]:
    """`parts.losses.loss_over_depths` of this head, its depths unrolled as at inference.

    policy: any layout; only its embedding and output head are read. Detach it before the call.
    draft: unprepared, float32 masters. kind: one of `choices.DRAFT_LOSSES`, or "states":
    `parts.losses.state_loss` of every block's first depth (what comes near the policy's states
    serves the depths after it too, and they would cost as much again).
    """
    depths = draft.config.blocks if kind == "states" else draft.config.depths
    states = [batch.predicting(x)
              for x in unroll(policy, draft, batch.trunk, batch.tokens, depths)]
    if kind == "states":
        return state_loss(policy, batch, states)
    vocab = draft.state.get("vocab")
    head = partial(table_logits, policy, output_table(policy, vocab), vocab)
    return loss_over_depths(policy, batch, states, head, vocab, kind)


def least_squares(policy: Policy, draft: Draft, batches: Iterable[DraftBatch],
                  ridge: float = 1e-3) -> Draft:
    """The draft with every block's projection solved for: the linear map of its two inputs to the
    policy's next state.

    Ridge regression over all positions of the batches, `ridge` relative to the inputs' mean square.
    Where a gradient needs a hundred thousand tokens to come, this starts.
    """
    d = policy.config.hidden_size

    @jax.jit
    def sums(policy, batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden, target = (x.astype(jnp.float32)
                          for x in (_trunk_states(draft.config, batch.trunk), batch.trunk.hidden))
        embedded = embed(policy, batch.tokens).astype(jnp.float32)
        x = jnp.concatenate([unit(embedded[:, 1:]), unit(hidden[:, :-1])], axis=-1)
        y = unit(target[:, 1:] / policy.weights["final_norm"])
        known = (jnp.arange(1, hidden.shape[1])
                 < (batch.response_start + batch.mask.sum(1) - 1)[:, None])
        x = jnp.where(known[..., None], x, 0.0).reshape(-1, 2 * d)
        return x.T @ x, x.T @ y.reshape(-1, d), known.sum()

    gram, cross, count = (sum(parts) for parts in zip(*(sums(policy, batch) for batch in batches),
                                                      strict=True))
    solution = np.linalg.solve(np.asarray(gram, np.float64) + ridge * float(count) * np.eye(2 * d),
                               np.asarray(cross, np.float64))
    ones, proj = np.ones(d, np.float32), solution.T.astype(np.float32)
    if draft.config.hidden_first:
        proj = np.concatenate([proj[:, d:], proj[:, :d]], axis=1)
    fitted = {"proj": proj, "embed_norm": ones, "hidden_norm": ones}
    blocks = tuple({**w, **{name: jnp.asarray(x) for name, x in fitted.items()}}
                   for w in draft.weights["blocks"])
    return draft.replace(weights={"blocks": blocks})


mtp = Drafter("mtp", MtpConfig, init, propose, features, specs, prepare, start, observe, loss,
              least_squares=least_squares)
