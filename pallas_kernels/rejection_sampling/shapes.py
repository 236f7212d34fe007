"""The shapes that are run for real: tests, ahead-of-time compilation and benchmarks read this
list."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shape:
    """`batch` sequences with `k` drafts each, over `vocab` ids that `shards` devices share."""

    model: str
    vocab: int
    batch: int
    k: int
    dtype: str = "float32"
    shards: int = 1

    @property
    def name(self) -> str:
        return (f"{self.model}-b{self.batch}-k{self.k}-{self.dtype}"
                + (f"-{self.shards}way" if self.shards > 1 else ""))

    @property
    def rows(self) -> int:
        return self.batch * (self.k + 1)

    @property
    def logits_bytes(self) -> int:
        """Of one device's part of the target's logits."""
        return self.rows * self.vocab // self.shards * jnp.dtype(self.dtype).itemsize


SHAPES = (
    Shape("smollm2-135m", 49152, 1, 0),
    Shape("smollm2-135m", 49152, 1, 3),
    Shape("smollm2-135m", 49152, 8, 3),
    Shape("smollm2-135m", 49152, 32, 7, "bfloat16"),
    Shape("qwen3-8b", 151936, 1, 3),
    Shape("qwen3-8b", 151936, 8, 3),
    Shape("qwen3-8b", 151936, 64, 3),
    Shape("qwen3-8b", 151936, 64, 3, "bfloat16"),
    Shape("qwen3-8b", 151936, 64, 7),
    Shape("qwen3-8b", 151936, 16, 3, shards=4),
    Shape("qwen3-235b-a22b", 151936, 128, 3, shards=8),
    Shape("qwen3-235b-a22b", 151936, 128, 1, "bfloat16", shards=16),
)
