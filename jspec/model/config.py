"""The static description of a decoder-only transformer: what Llama, Qwen2 and Qwen3 differ in, and nothing else."""

from __future__ import annotations

import dataclasses
import numbers

from jspec.errors import InputError

FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and its scaling, with the names of the published configs.

    `factor` is used by every scaling but `default`; `low_freq_factor`, `high_freq_factor` by `llama3`; the betas,
    `attention_factor`, the mscales and `truncate` by `yarn`. `original_max_position` is the length before scaling.
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

    def __post_init__(self):
        if self.scaling not in ROPE_SCALINGS:
            raise InputError(f"rope scaling {self.scaling!r} is not supported; supported: {', '.join(ROPE_SCALINGS)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Hashable, so that it can be the static part of a pytree.

    `stop_tokens` are the end tokens of the checkpoint (config, generation config and tokenizer united). `tokenless` are
    ranges [start, stop) of ids that the tokenizer has no token for, as vocabularies are padded to round sizes: they are
    no part of the policy's distribution, in sampling and in training alike.
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

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise InputError(f"model family {self.family!r} is not supported; supported: {', '.join(FAMILIES)}")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
        for token in self.stop_tokens:
            if not isinstance(token, numbers.Integral) or not 0 <= token < self.vocab_size:
                raise InputError(f"stop token {token!r} is not an id of the vocabulary of {self.vocab_size}")
        self._check_tokenless()
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even one")

    def _check_tokenless(self):
        try:
            ranges = tuple(tuple(r) for r in self.tokenless)  # JSON and YAML have lists, which cannot be hashed
        except TypeError:
            raise InputError(f"tokenless must be ranges [start, stop) of ids, not {self.tokenless!r}") from None
        object.__setattr__(self, "tokenless", ranges)
        before = 0
        for r in ranges:
            if len(r) != 2 or not all(isinstance(i, numbers.Integral) for i in r) or not before <= r[0] < r[1]:
                raise InputError(f"tokenless must be ascending ranges [start, stop) of ids that do not overlap, and "
                                 f"{list(r)} is none after {before}")
            before = r[1]
        if before > self.vocab_size:
            raise InputError(f"tokenless range {list(ranges[-1])} is outside the vocabulary of {self.vocab_size}")
        if sum(stop - start for start, stop in ranges) == self.vocab_size:
            raise InputError("tokenless leaves no id of the vocabulary; one id at least must have a token")

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads
