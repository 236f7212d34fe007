"""The shapes that are run for real: tests, ahead-of-time compilation and benchmarks read this
list."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shape:
    """One device's heads: `batch` rows with `t` new positions each, a cache of `size` positions a
    row."""

    model: str
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    t: int
    size: int
    dtype: str = "bfloat16"
    window: int | None = None
    together: str | None = None

    @property
    def name(self) -> str:
        window = f"-w{self.window}" if self.window else ""
        together = f"-{self.together}" if self.together else ""
        return (f"{self.model}-h{self.heads}:{self.kv_heads}-b{self.batch}-t{self.t}-s{self.size}"
                f"-{self.dtype}{window}{together}")

    @property
    def reach(self) -> dict[str, Any]:
        """What a new position sees, as arguments."""
        return {"window": self.window, "together": self.together}

    def kv_bytes(self, length: int) -> int:
        """Keys and values of `length` cached positions in every row."""
        return (2 * self.batch * self.kv_heads * length * self.head_dim * jnp.dtype(self.dtype)
                .itemsize)


SHAPES = (
    Shape("smollm2-135m", 9, 3, 64, 1, 1, 256, "float32"),
    Shape("smollm2-135m", 9, 3, 64, 8, 4, 512, "float32"),
    Shape("smollm2-135m", 9, 3, 64, 32, 8, 1024),
    Shape("qwen3-8b", 32, 8, 128, 1, 4, 4096),
    Shape("qwen3-8b", 32, 8, 128, 8, 8, 4096),
    Shape("qwen3-8b", 32, 8, 128, 64, 1, 4224),
    Shape("qwen3-8b", 32, 8, 128, 64, 4, 4224),
    Shape("qwen3-8b", 32, 8, 128, 8, 4, 40960),
    Shape("qwen3-8b", 32, 8, 128, 16, 4, 4224, "float32"),
    Shape("qwen3-8b", 32, 8, 128, 16, 4, 8320, window=4096),
    Shape("qwen3-8b", 32, 8, 128, 32, 8, 4224, together="whole"),
    Shape("qwen3-8b", 32, 8, 128, 32, 8, 4224, window=2048, together="causal"),
    Shape("qwen3-8b-4way", 8, 2, 128, 64, 4, 4224),
    Shape("qwen3-235b-a22b-4way", 16, 1, 128, 128, 4, 8320),
    Shape("qwen3-235b-a22b-4way", 16, 1, 128, 128, 8, 8320),
)
