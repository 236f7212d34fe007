"""What a cycle of decoding takes at least on chips that are not here: the larger of its bytes over
the bandwidth and its operations over the rate, then its collectives and its draft. What an engine
takes beyond that is measured (`calibration.py`), never derived.

All of it is of one device, and works on NumPy arrays of (rows, positions) as on numbers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from jspec.choices import MIXED, PRECISIONS
from jspec.drafts import Draft
from jspec.drafts.mixed import trained_of
from jspec.drafts.parts.one_pass import OnePassConfig
from jspec.drafts.peagle import PeagleConfig
from jspec.model import ModelConfig, param_specs
from jspec.model.params import is_spec
from jspec.scale.chips import HOP, Chip

Numbers = Any
"""A float, or float [...]: all arguments of a call are broadcast together."""

RACK = {"gb200": 72}
"""GPUs behind one NVLink switch, where these are more than a host's."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a forward pass reads and computes.

    Attributes:
      dense: parameters that every token is multiplied by: all but experts and an untied embedding,
        of which a token reads a row.
      expert: parameters of one expert of one layer; `experts` of them lie in each of
        `sparse_layers` layers, and `top_k` of those compute each token.
      layers, hidden: layers, and the width of their states.
      kv_values: numbers that one position keeps as keys and values, in all layers.
      kv_heads: over more shards than these, keys and values are replicated.
      score_operations: of one token on one position of its context, in all layers.
      weight_bytes: of a parameter; kv_bytes: of a key's or value's number.
      rate: what matrices are multiplied in, as `Chip.rate` takes it.
      passes: of a part of a draft, how many all tokens come of at most; 0: each of one of its own.
    """

    dense: float
    layers: int
    hidden: int
    kv_values: float
    kv_heads: int
    score_operations: float
    expert: float = 0.0
    experts: int = 0
    top_k: int = 0
    sparse_layers: int = 0
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    rate: str = "bfloat16"
    passes: int = 0

    @classmethod
    def of(cls, model: ModelConfig, precision: str = "bfloat16") -> Sizes:
        """Of a policy whose rollout copy is in `precision`, one of `PRECISIONS`."""
        specs = jax.tree.leaves(param_specs(model), is_leaf=is_spec)
        in_experts = sum(math.prod(spec.shape) for spec in specs if "expert" in spec.axes
                         and "expert_mlp" in spec.axes)
        looked_up = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
        dense = sum(math.prod(spec.shape) for spec in specs) - in_experts - looked_up
        shape = cls(dense, model.num_layers, model.hidden_size,
                    2 * model.num_layers * model.num_kv_heads * model.head_dim, model.num_kv_heads,
                    4 * model.num_layers * model.num_heads * model.head_dim,
                    weight_bytes=WEIGHT_BYTES[precision], rate=precision)
        if model.experts is None:
            return shape
        sparse = len(model.sparse_layers)
        return dataclasses.replace(
            shape, expert=in_experts / model.experts.count / sparse, experts=model.experts.count,
            top_k=model.experts.top_k, sparse_layers=sparse)

    @property
    def active(self) -> float:
        """Parameters that one token is multiplied by."""
        return self.dense + self.expert * self.top_k * self.sparse_layers

    def experts_hit(self, tokens: Numbers) -> Numbers:
        """Distinct experts of a layer that so many tokens are expected to reach, if each chooses
        evenly and by itself."""
        if not self.experts:
            return 0.0 * np.asarray(tokens)
        return self.experts * (1 - (1 - self.top_k / self.experts) ** np.asarray(tokens))


WEIGHT_BYTES = dict(zip(PRECISIONS, (2.0, 1.0, 1.0), strict=True))


def draft_sizes(draft: Draft | None, policy: Sizes, model: ModelConfig) -> tuple[Sizes, ...]:
    """What drafting reads and computes, part by part, each with its passes: the draft's blocks, its
    output head (the policy's where the draft has none), and of DSpark the Markov head. (): nothing
    is read (`ngram`, `suffix`).

    draft: `jax.ShapeDtypeStruct`s do.
    """
    if draft is None:
        return ()
    if draft.name == MIXED:
        draft = trained_of(draft)
    if draft.name == "self":  # the policy itself, in fewer bits
        return (dataclasses.replace(policy, weight_bytes=draft.config.bits / 8),)
    if draft.name == "draft_model":
        return (Sizes.of(draft.config.model),)
    config = draft.config
    specs = jax.tree.leaves(draft.drafter.specs(config), is_leaf=is_spec)
    if not specs:
        return ()
    weights, block = draft.weights, draft.drafter.model(config)
    shared = getattr(config, "shared", False)
    blocks = 1 if shared else getattr(config, "blocks", 1)  # each drafts a depth of its own
    head = (getattr(config, "vocab_size", 0) or model.vocab_size) * model.hidden_size
    markov = _count({name: x for name, x in weights.get("markov", {}).items() if name != "w1"})
    apart = _count([weights.get(name, ()) for name in ("embed", "head", "markov", "confidence")])
    dense = (sum(math.prod(spec.shape) for spec in specs) - apart) / blocks
    layers = 1 if block is config.policy else block.num_layers
    # of P-EAGLE the first token comes of the pass over what was committed
    of_blocks, of_head = next((passes for kind, passes in PASSES.items()
                               if isinstance(config, kind)), (0, 0))
    no_layers = Sizes(0.0, 0, model.hidden_size, 0.0, block.num_kv_heads, 0.0)
    return (Sizes(dense, layers, model.hidden_size,
                  2 * layers * block.num_kv_heads * block.head_dim, block.num_kv_heads,
                  4 * layers * block.num_heads * block.head_dim, passes=of_blocks),
            dataclasses.replace(no_layers, dense=head, passes=of_head),
            *[dataclasses.replace(no_layers, dense=markov)] * bool(markov))


PASSES = {OnePassConfig: (1, 1), PeagleConfig: (2, 1)}
"""By the kind of config, the passes over blocks and over the output head that a draft's tokens come
of at most."""


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Split:
    """How a rollout lies on its devices: rows over `batch` shards, and every shard's weights over
    `tensor` devices. `expert` shards at a time share the experts out between them: these go
    through a cycle together. A token goes to all of them, or (`sparse`) to those that hold an
    expert of its own."""

    batch: int
    tensor: int = 1
    expert: int = 1
    sparse: bool = False

    @property
    def devices(self) -> int:
        return self.batch * self.tensor

    @property
    def groups(self) -> int:
        """Of shards that wait for one another in every cycle."""
        return self.batch // self.expert


@dataclasses.dataclass(frozen=True)
class Pass:
    """Seconds of a forward pass, by what they are spent on."""

    weights: Numbers
    key_values: Numbers
    operations: Numbers
    collectives: Numbers

    @property
    def seconds(self) -> Numbers:
        """Bytes and operations overlap; what is sent between devices waits for both."""
        return np.maximum(self.weights + self.key_values, self.operations) + self.collectives


def forward(sizes: Sizes, chip: Chip, split: Split, rows: Numbers, context: Numbers,
            tokens: Numbers = 1) -> Pass:
    """A pass over `rows` rows of a shard with `tokens` new tokens each.

    rows: as compiled, empty ones included. context: positions of all rows of the shard that are
    live, together.
    """
    rows, context, tokens = map(np.asarray, (rows, context, tokens))
    computed = rows * tokens
    hit = sizes.experts_hit(computed * split.expert) / split.expert
    weights = sizes.dense + sizes.expert * hit * sizes.sparse_layers
    heads = min(split.tensor, sizes.kv_heads)
    multiplied = 2 * sizes.active * computed / split.tensor
    scored = sizes.score_operations * tokens * context / split.tensor
    states = 2.0 * sizes.hidden * computed  # bytes, in bfloat16
    # two sums over the shards of a layer, after attention and after the feed-forward (each a
    # reduce-scatter and an all-gather); and the way to the experts and back
    sent = (4 * sizes.layers * ring(states, split.tensor, chip, split.devices)
            + 2 * sizes.sparse_layers * to_experts(sizes, states, chip, split))
    return Pass(sizes.weight_bytes * weights / split.tensor / chip.hbm_bandwidth,
                sizes.kv_bytes * sizes.kv_values * context / heads / chip.hbm_bandwidth,
                multiplied / chip.rate(sizes.rate) + scored / chip.bf16, sent)


def held_bytes(sizes: Sizes, split: Split, context: float) -> float:
    """Of a device's memory, weights and keys and values alone. context: positions that its shard's
    rows keep."""
    experts = sizes.expert * sizes.experts * sizes.sparse_layers / split.expert
    kept = sizes.kv_bytes * sizes.kv_values * context / min(split.tensor, sizes.kv_heads)
    return sizes.weight_bytes * (sizes.dense + experts) / split.tensor + kept


def to_experts(sizes: Sizes, states: Numbers, chip: Chip, split: Split) -> Numbers:
    """Seconds in which `states`, bytes of a shard, reach the shards of their experts; the way back
    takes as long."""
    members = split.expert
    if not split.sparse or members == 1:
        return ring(states * members, members, chip, split.devices, split.tensor)
    reached = shards_reached(sizes, members)
    if chip.platform == "gpu":
        sent = states * reached * (members - 1) / members
        return sent / switch(chip, members * split.tensor) + HOP
    side, axes = torus(members, chip, split.devices)
    return states * reached * side / 8 / chip.link_bandwidth + hops(side, axes) * HOP


def shards_reached(sizes: Sizes, members: int) -> float:
    """Of `members` shards those that hold an expert of a token, which chooses evenly."""
    others = sizes.experts - sizes.experts // members
    return members * (1 - math.comb(others, sizes.top_k) / math.comb(sizes.experts, sizes.top_k))


def switch(chip: Chip, span: int) -> float:
    """Bytes a second from a GPU to others within so many: NVLink's, or the network's beyond it."""
    near = span <= RACK.get(chip.name, chip.devices_a_host)
    return chip.link_bandwidth if near else chip.dcn_bandwidth


def ring(volume: Numbers, members: int, chip: Chip, devices: int, apart: int = 1) -> Numbers:
    """Seconds of an all-gather, or a reduce-scatter, of `volume` bytes over `members` of all
    `devices`, each `apart` from the next: along as many axes of the torus as they fill, or through
    a switch."""
    if members == 1:
        return 0.0 * np.asarray(volume)
    sent = volume * (members - 1) / members
    if chip.platform == "gpu":
        return sent / switch(chip, members * apart) + HOP
    side, axes = torus(members, chip, devices)
    return sent / (2 * chip.link_bandwidth * axes) + hops(side, axes) * HOP


def torus(members: int, chip: Chip, devices: int) -> tuple[int, int]:
    """(members along an axis, axes) of `members` neighbours in a torus, as even as it can be, of
    all `devices`."""
    most = max(1, chip.links // 2)
    whole = max(2, math.ceil(devices ** (1 / most) - 1e-9))
    axes = min(most, math.ceil(math.log(members) / math.log(whole) - 1e-9))
    return math.ceil(members ** (1 / axes) - 1e-9), axes


def hops(side: int, axes: int) -> float:
    """To the farthest of them, each axis being a ring."""
    return axes * side / 2


@dataclasses.dataclass(frozen=True)
class Overhead:
    """What was measured of a cycle beyond its floor: `cycle` always, and with a draft further
    `drafting` and `token` for each drafted token. In seconds; `relative`: in plain cycles' floors,
    of the same rows. A straight line through what was measured: below `least` drafted tokens, which
    nobody measured, it goes from no draft to there."""

    cycle: float = 0.0
    drafting: float = 0.0
    token: float = 0.0
    least: int = 1
    relative: bool = False

    def of(self, k: int) -> float:
        if not k:
            return self.cycle
        share = min(1.0, k / self.least)
        return self.cycle + share * (self.drafting + self.token * max(k, self.least))


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What decodes, where: all that the seconds of a cycle follow from.

    Attributes:
      draft: by part; (): drafts cost nothing. draft_share: of a plain cycle's floor that a drafted
        token takes, in place of what `draft` says; None: what that says.
    """

    policy: Sizes
    chip: Chip
    split: Split
    draft: tuple[Sizes, ...] = ()
    draft_share: float | None = None
    overhead: Overhead = Overhead()


@dataclasses.dataclass(frozen=True)
class Cycle:
    """Seconds of a cycle, by what they are spent on."""

    verify: Pass
    draft: Numbers
    overhead: Numbers

    @property
    def seconds(self) -> Numbers:
        return self.verify.seconds + self.draft + self.overhead


def cycle(decoding: Decoding, k: int, rows: Numbers, context: Numbers) -> Cycle:
    """A cycle that drafts k tokens; k = 0: without a draft. rows, context: see `forward`."""
    of = (decoding.chip, decoding.split, rows, context)
    verify = forward(decoding.policy, *of, tokens=k + 1)
    plain = forward(decoding.policy, *of).seconds
    draft = 0.0 * plain
    if decoding.draft_share is not None:
        draft = k * decoding.draft_share * plain
    for part in decoding.draft if decoding.draft_share is None and k else ():
        passes = min(k, part.passes or k)
        draft = draft + passes * forward(part, *of, tokens=k / passes).seconds
    unit = plain if decoding.overhead.relative else 1.0 + 0.0 * plain
    always, over = (decoding.overhead.of(of) * unit for of in (0, k))
    least = plain + always  # a line beyond what was measured may fall below it
    return Cycle(verify, draft, np.maximum(over, least - verify.seconds - draft))
