"""Lossless speculative decoding inside one jitted program."""

from jspec.speculate.rollout import rollout
from jspec.speculate.types import PromptBatch, Rollout, RolloutStats, Sampling, Speculation

__all__ = ["PromptBatch", "Rollout", "RolloutStats", "Sampling", "Speculation", "rollout"]
