"""The static description of a decoder-only transformer: what Llama, Qwen2, Qwen3 and Qwen3-MoE
differ in, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

from jspec.arguments import (
    flag,
    instance,
    one_of,
    optional,
    real,
    settle,
    show,
    whole,
    whole_numbers,
)
from jspec.errors import InputError

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
MOST_EXPERTS = 256
ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and its scaling, with the names of the published configs.

    `factor` is used by every scaling but `default`; `low_freq_factor`, `high_freq_factor` by
    `llama3`; the betas, `attention_factor`, the mscales and `truncate` by `yarn`.
    `original_max_position` is the length before scaling.

    Raises InputError for a value of another type, and for numbers that would make angles which are
    none.
    """

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        ratio = real(low=1e-6, high=1e6)  # float32 has room for what is made of them
        settle(self, "rope ", scaling=one_of(ROPE_SCALINGS), theta=real(low=1), factor=real(low=1),
               original_max_position=whole(), attention_factor=optional(ratio),
               mscale=real(low=0, high=1e6), mscale_all_dim=real(low=0, high=1e6), truncate=flag,
               **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
                               ratio))
        if self.scaling in ("llama3", "yarn") and self.original_max_position < 1:
            raise InputError(f"rope scaling {self.scaling} needs original_max_position, the length "
                             "before scaling")
        if self.scaling == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise InputError(f"rope low_freq_factor = {self.low_freq_factor} must be below "
                             f"high_freq_factor = {self.high_freq_factor}")
        if self.scaling == "yarn" and self.beta_fast < self.beta_slow:
            raise InputError(f"rope beta_fast = {self.beta_fast} must be at least beta_slow "
                             f"= {self.beta_slow}")
        if self.scaling == "yarn" and self.theta == 1:
            raise InputError("rope theta = 1.0 must be above 1 for yarn, whose wavelengths are "
                             "powers of it")


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixture of experts that takes the place of a layer's feed-forward (Qwen3-MoE,
    https://arxiv.org/abs/2505.09388).

    Attributes:
      count: experts of a layer. top_k: how many of them compute each token.
      intermediate_size: of one expert.
      renormalize: whether the gates of a token's experts are scaled to sum to one.
      dense_layers: the layers that have a dense feed-forward instead, of the model's own
        intermediate_size.

    Raises InputError, naming the field, for a value of another type, and for more experts a token
    than there are.
    """

    count: int
    top_k: int
    intermediate_size: int
    renormalize: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        settle(self, "experts ", count=whole(1), top_k=whole(1), intermediate_size=whole(1),
               renormalize=flag, dense_layers=whole_numbers)
        if self.top_k > self.count:
            raise InputError(f"experts top_k = {self.top_k} is more than the {self.count} experts "
                             "of a layer")
        if self.count > MOST_EXPERTS:
            raise InputError(f"experts count = {self.count} is more than {MOST_EXPERTS}, and "
                             "routes are kept in bytes")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which of a policy's matrices have adapters; `jspec.config` says what each of them means."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base_dtype: str

    @classmethod
    def of(cls, fields: Any) -> Lora | None:
        """From its fields as JSON has them; None: there are no adapters."""
        return fields and cls(**{**fields, "targets": tuple(fields["targets"])})

    @property
    def scale(self) -> float:
        """What the product of an adapter's two matrices is multiplied with."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Hashable, so that it can be the static part of a pytree.

    `stop_tokens` are the end tokens of the checkpoint (config, generation config and tokenizer
    united). `tokenless` are ranges [start, stop) of ids that the tokenizer has no token for, as
    vocabularies are padded to round sizes: they are no part of the policy's distribution, in
    sampling and in training alike. `experts`: None where every layer's feed-forward is dense.

    Raises InputError, naming the field, for a value of another type and for one that no transformer
    has.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    family: str = "llama"
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    tokenless: tuple[tuple[int, int], ...] = ()
    experts: Experts | None = None

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_layers",
                               "num_heads", "num_kv_heads", "head_dim", "max_position_embeddings"),
                              whole(1))
        flags = dict.fromkeys(("tie_embeddings", "qkv_bias", "out_bias", "mlp_bias", "qk_norm"),
                              flag)
        settle(self, "", family=one_of(FAMILIES), **sizes, **flags,
               rms_norm_eps=real(low=1e-30, high=1),
               rope=instance(RopeConfig, "a jspec.RopeConfig"),
               initializer_range=real(low=0, high=100), stop_tokens=whole_numbers,
               pad_token=whole(), experts=optional(instance(Experts, "a jspec.Experts")))
        for token in self.stop_tokens:
            if token >= self.vocab_size:
                raise InputError(f"stop token {token} is not an id of the vocabulary of "
                                 f"{self.vocab_size}")
        if self.pad_token >= self.vocab_size:
            raise InputError(f"pad token {self.pad_token} is not an id of the vocabulary of "
                             f"{self.vocab_size}; name one that is")
        self._check_tokenless()
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even one")
        self._check_experts()

    def _check_experts(self) -> None:
        if (self.family == "qwen3_moe") != (self.experts is not None):
            raise InputError("family qwen3_moe has experts, and no other family has; set both or "
                             "neither")
        if self.experts is None:
            return
        if self.mlp_bias:
            raise InputError("mlp_bias is not supported beside experts")
        outside = [i for i in self.experts.dense_layers if i >= self.num_layers]
        if outside:
            raise InputError(f"experts dense_layers has {outside[0]}, and there are only "
                             f"{self.num_layers} layers")
        if len(set(self.experts.dense_layers)) == self.num_layers:
            raise InputError("experts dense_layers names every layer; leave experts out for "
                             "a dense model")

    def _check_tokenless(self) -> None:
        given = self.tokenless
        if (not isinstance(given, list | tuple)
            or not all(isinstance(r, list | tuple) for r in given)):
            shown = (f"[{', '.join(map(show, given[:4]))}]" if isinstance(given, list | tuple)
                     else show(given))
            raise InputError(f"tokenless must be ranges [start, stop) of ids, not {shown}")
        ranges = tuple(whole_numbers("a range of tokenless", r) for r in self.tokenless)
        object.__setattr__(self, "tokenless", ranges)
        before = 0
        for r in ranges:
            if len(r) != 2 or not before <= r[0] < r[1]:
                raise InputError("tokenless must be ascending ranges [start, stop) of ids that do "
                                 f"not overlap, and {list(r)} is none after {before}")
            before = r[1]
        if before > self.vocab_size:
            raise InputError(f"tokenless range {list(ranges[-1])} is outside the vocabulary of "
                             f"{self.vocab_size}")
        if sum(stop - start for start, stop in ranges) == self.vocab_size:
            raise InputError("tokenless leaves no id of the vocabulary; one id at least must have "
                             "a token")

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers whose feed-forward is a mixture of experts, ascending."""
        return () if self.experts is None else tuple(
            i for i in range(self.num_layers) if i not in self.experts.dense_layers)
