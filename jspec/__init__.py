"""Reinforcement-learning post-training for language models in JAX, with lossless speculative
rollouts.

The names below are imported when first used: command-line help and reward workers need no JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_SURFACE = {
    "load": "jspec.hub", "load_tokenizer": "jspec.hub", "fetch": "jspec.hub", "export": "jspec.hub",
    "rollout": "jspec.speculate", "PromptBatch": "jspec.speculate", "Rollout": "jspec.speculate",
    "Batching": "jspec.speculate", "Sampling": "jspec.speculate", "Speculation": "jspec.speculate",
    "Policy": "jspec.model", "ModelConfig": "jspec.model", "RopeConfig": "jspec.model",
    "Experts": "jspec.model", "init_policy": "jspec.model", "reshard": "jspec.model",
    "Draft": "jspec.drafts", "load_draft": "jspec.heads", "TrainState": "jspec.rl.state",
    "choose_k": "jspec.choosing", "make_mesh": "jspec.sharding", "InputError": "jspec.errors",
}

__all__ = [*_SURFACE, "drafts", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "drafts":
        return importlib.import_module("jspec.drafts")
    if name not in _SURFACE:
        raise AttributeError(f"module 'jspec' has no attribute {name!r}")
    return getattr(importlib.import_module(_SURFACE[name]), name)


def __dir__() -> list[str]:
    return __all__
