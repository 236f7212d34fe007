"""Self-speculation: the policy drafts for itself with its own weights in 8 or 4 bits. Nothing is
trained.

The weights are quantised once per rollout, so that the draft is always of the policy as it is.
Committed tokens are read from the policy's own cache, which is exact; drafted ones leave the
draft's keys and values there, at the positions that the verifier writes next. (Sharing the cache:
https://arxiv.org/abs/2309.08168, there with layers left out; with quantised weights:
https://arxiv.org/abs/2502.10424.)
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jspec.arguments import settle, whole, wrong
from jspec.drafts.base import Committed, Draft, Drafter, DraftState, Proposal, Sampler
from jspec.drafts.parts.vocabulary import check_vocab, output_table, table_logits
from jspec.errors import InputError
from jspec.model import ModelConfig, Policy, verify
from jspec.model.quantized import BITS, quantize

MATRICES = {"qkv": None, "q": None, "k": None, "v": None, "o": "q_heads", "gate_up": None,
            "down": "mlp", "expert_gate_up": None, "expert_down": "expert_mlp"}
"""What is quantised of a layer in a rollout layout (norms, biases and routers are not), and the
logical axis of its inputs."""


@dataclasses.dataclass(frozen=True)
class SelfConfig:
    """bits: of the weights. vocab_size: of the reduced vocabulary, 0: the policy's."""

    policy: ModelConfig
    bits: int = 8
    vocab_size: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.bits, numbers.Integral) or self.bits not in BITS:
            raise wrong("self draft: bits", self.bits, f"one of {', '.join(map(str, BITS))}")
        settle(self, "self draft: ", bits=whole(), vocab_size=whole())


def init(policy: Policy, key: jax.Array | None = None, *, bits: int = 8,
         vocab: Sequence[int] | np.ndarray | None = None) -> Draft:
    """A draft without weights of its own. The key is not used: there is nothing random in it.

    Args:
      bits: 8; or 4, which comes to 5 a weight in all (`model.quantized`).
      vocab: the token ids that may be drafted (`parts.vocabulary.most_frequent` of the policy's own
        rollouts), or None for all of them.

    Raises InputError for other bits, or for a vocabulary that is none.
    """
    ids = None if vocab is None else check_vocab(vocab, policy.config.vocab_size, "self")
    return Draft(weights={}, state={} if ids is None else {"vocab": jnp.asarray(ids)},
                 config=SelfConfig(policy.config, bits, 0 if ids is None else len(ids)),
                 drafter=self)


def prepare(policy: Policy, draft: Draft) -> Draft:
    """Quantise the policy's layers, and the rows of its output head that are drafted from."""
    bits = draft.config.bits
    layers = tuple({name: quantize(x, bits, policy.layout, MATRICES[name]) if name in MATRICES
                    else x for name, x in w.items()} for w in policy.weights["layers"])
    table = quantize(output_table(policy, draft.state.get("vocab")), bits)
    return draft.replace(weights={"layers": layers, "table": table})


def propose(policy: Policy, draft: Draft, state: DraftState, committed: Committed,
            sampler: Sampler) -> tuple[Proposal, DraftState]:
    """K sampled tokens with the distributions they were drawn from, each by one pass over the
    quantised weights.

    Raises InputError if k is more than a row of the cache has room for.
    """
    size = committed.cache.capacity
    if sampler.k >= size:
        raise InputError(f"self draft: k = {sampler.k} drafts and the token before them do not fit "
                         f"the policy's cache of {size} positions; lower k")
    vocab, cache = draft.state.get("vocab"), committed.cache
    quantized = policy.replace(weights={**policy.weights, "layers": draft.weights["layers"]})
    token = jnp.take_along_axis(committed.tokens, committed.lengths[:, None] - 1, axis=1)[:, 0]
    tokens, log_qs = [], []
    for j in range(sampler.k):
        trunk, cache = verify(quantized, token[:, None], cache, committed.lengths - 1 + j)
        scores = table_logits(policy, draft.weights["table"], vocab, trunk.hidden[:, 0])
        token, log_q = sampler.draw(scores, j, vocab)
        tokens.append(token)
        log_qs.append(log_q)
    return Proposal(jnp.stack(tokens, axis=1), jnp.stack(log_qs, axis=1), vocab, cache), state


self = Drafter("self", SelfConfig, init, propose, prepare=prepare)
