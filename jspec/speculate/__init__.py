"""Lossless speculative decoding inside one jitted program."""

from jspec.speculate.results import Rollout, RolloutStats
from jspec.speculate.rollout import rollout
from jspec.speculate.types import Batching, PromptBatch, Sampling, Speculation

__all__ = ["Batching", "PromptBatch", "Rollout", "RolloutStats", "Sampling", "Speculation",
           "rollout"]
