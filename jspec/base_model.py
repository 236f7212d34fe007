"""The model that a configuration starts from: shape, tokenizer and weights, each read when it is
asked for."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax

from jspec import hub
from jspec.config import Config
from jspec.draft_config import DraftTrainingConfig
from jspec.errors import InputError
from jspec.hub.vocabulary import of_tokenizer, with_vocabulary
from jspec.model import Experts, ModelConfig, Policy, RopeConfig, abstract_policy, init_policy
from jspec.purposes import POLICY_KEY, purpose_key
from jspec.sections import ModelSection


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """Of section `model` of a configuration; `seed` is the configuration's. A hub is asked once for
    all of it."""

    section: ModelSection
    seed: int

    @classmethod
    def of(cls, config: Config | DraftTrainingConfig) -> BaseModel:
        return cls(config.model, config.seed)

    @functools.cached_property
    def _stored(self) -> hub.StoredModel:
        return hub.open(self.section.name)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Its shape. Raises InputError for an architecture that is none."""
        return architecture(self.section) if self.section.name == "random" else self._stored.config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that the section names."""
        name = self.section.tokenizer
        return (self._stored.tokenizer() if name in (None, self.section.name)
                else hub.load_tokenizer(name))

    @functools.cached_property
    def shape(self) -> Policy:
        """What `policy` gives, with `jax.ShapeDtypeStruct`s for weights: none are read. Raises
        InputError if the tokenizer has ids that the policy has not."""
        dtype = self.section.dtype
        if dtype == "auto":
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        # there may be holes, so more than it has
        count = max(self.tokenizer.get_vocab().values()) + 1
        if count > self.config.vocab_size:
            name = self.section.tokenizer or self.section.name
            raise InputError(f"the tokenizer {name} has {count} tokens, the model "
                             f"{self.section.name} only {self.config.vocab_size}; give the model "
                             "its own, or a larger vocab_size")
        return with_tokenizer(abstract_policy(self.config, dtype), self.tokenizer)

    def policy(self) -> Policy:
        """The policy before the first step, on the current mesh, in the training layout. Raises as
        `shape` does."""
        dtype = self.shape.dtype
        if self.section.name == "random":
            policy = init_policy(self.config, purpose_key(self.seed, POLICY_KEY), dtype)
        else:
            policy = self._stored.policy(dtype)
        return with_tokenizer(policy, self.tokenizer)


def with_tokenizer(policy: Policy, tokenizer: Any) -> Policy:
    """The policy of a run: its end tokens and those of the tokenizer united, the ids that have no
    token left out."""
    return policy.replace(config=with_vocabulary(policy.config, of_tokenizer(tokenizer)))


def architecture(section: ModelSection) -> ModelConfig:
    """The shape of a policy drawn at random, as `model.architecture` has it. Raises InputError if
    it is none."""
    fields = dict(section.architecture or {})
    # the tokenizer says which
    known = {f.name: f for f in dataclasses.fields(ModelConfig) if f.name != "tokenless"}
    _check_names("model.architecture", fields, known)
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
    if missing:
        raise InputError(f"model.architecture needs {', '.join(missing)} too")
    stops = fields.get("stop_tokens", [])
    if not isinstance(stops, list | tuple):
        raise InputError(f"model.architecture.stop_tokens must be a list, not {stops!r}")
    parts = {name: _part(f"model.architecture.{name}", kind, fields[name])
             for name, kind in (("rope", RopeConfig), ("experts", Experts))
             if fields.get(name) is not None}
    try:
        return ModelConfig(**fields | parts | {"stop_tokens": tuple(stops)})
    except (TypeError, ValueError) as error:
        raise InputError(f"model.architecture: {error}") from None


def _part(label: str, kind: type, given: Any) -> Any:
    """A part of ModelConfig that is a dataclass of its own."""
    if not isinstance(given, dict):
        raise InputError(f"{label} must be a mapping, not {given!r}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    _check_names(label, given, known)
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in given]
    if missing:
        raise InputError(f"{label} needs {', '.join(missing)} too")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise InputError(f"model.architecture: {error}") from None


def _check_names(label: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise InputError(f"unknown key '{label}.{name}'; {hint}")
