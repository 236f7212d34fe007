"""How many blocks of keys and values a rollout takes, in numbers that are known before anything is
traced."""

from __future__ import annotations

import dataclasses

import numpy as np

from jspec.errors import InputError
from jspec.model.pool import block_size, blocks_of


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one shard of the batch axes needs at most.

    Attributes:
      size: positions of a block. columns: of a row's line of the block table. prompt: blocks of one
        prompt, of the length that all are padded to. prompts: of all prompts. row: that a row at
        its cap has beside its prompt's.
    """

    size: int
    columns: int
    prompt: int
    prompts: int
    row: int

    @classmethod
    def of(cls, prompts: int, length: int, cap: int, k: int) -> Blocks:
        """Of so many prompts that are padded to `length`, and answers of at most `cap` tokens,
        drafted by up to k."""
        positions = length + cap + k  # the last cycle writes up to k tokens beyond the cap
        size = block_size(positions)
        columns, prompt = blocks_of(positions, size), blocks_of(length, size)
        return cls(size, columns, prompt, prompts * prompt,
                   min(columns, blocks_of(size + cap + k, size)))

    def pool(self, slots: int, kv_tokens: int | None, shards: int) -> tuple[int, int]:
        """(blocks of the pool, blocks that paused rows take in host memory at most); the latter 0:
        none is ever paused.

        kv_tokens: positions over all shards, None: what the slots need at worst.
        """
        worst = self.prompts + slots * self.row
        blocks = worst if kv_tokens is None else min(worst, self._held(kv_tokens, shards))
        # rows are paused when those in flight do not fit, the last of them among it, and the oldest
        # never is
        return (blocks,
                min(worst - blocks + self.row, (slots - 1) * self.row) if blocks < worst else 0)

    def check(self, label: str, kv_tokens: int | None, shards: int) -> None:
        """Raise InputError, which begins with `label`, for a pool in which not even one row could
        go on to its cap."""
        least = self.prompts + self.row
        if kv_tokens is not None and self._held(kv_tokens, shards) < least:
            where = f" on each of the mesh's {shards} batch shards" if shards > 1 else ""
            raise InputError(f"{label} = {kv_tokens} are {self._held(kv_tokens, shards)} blocks of "
                             f"{self.size} positions{where}, and the prompts take {self.prompts} "
                             f"and one sequence at its cap {self.row}: give at least "
                             f"{least * self.size * shards}")

    def _held(self, kv_tokens: int, shards: int) -> int:
        return kv_tokens // shards // self.size


def prompts_of_shards(rows: int, group_size: int, shards: int) -> np.ndarray:
    """int [shards, n]: the prompts that the sequences of each shard continue, the last one again
    where they are fewer. A prompt whose group lies on several shards is there several times."""
    mine = rows // shards
    first, last = (np.arange(shards) * mine // group_size,
                   ((np.arange(shards) + 1) * mine - 1) // group_size)
    return np.minimum(first[:, None] + np.arange(np.max(last - first) + 1), last[:, None])
