"""What a command looks at: a run, a config's model or any model by name, of which no weights are read before its input
is known to be right."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jspec
from jspec import arguments
from jspec.checkpoint import load_draft, load_policy, policy_shape, run_config
from jspec.config import Config, load_config
from jspec.drafts import Draft
from jspec.drafts.base import check_finite
from jspec.errors import InputError
from jspec.heads import shipped
from jspec.model import Policy
from jspec.prepare import (
    DRAFT_KEY,
    check_fresh_draft,
    fresh_draft,
    make_policy,
    make_shape,
    make_tokenizer,
    purpose_key,
    with_tokenizer,
)
from jspec.progress import say
from jspec.settings import Override


@dataclasses.dataclass(frozen=True)
class Source:
    """A policy to look at.

    Attributes:
      name: as the user gave it.
      config: the configuration that goes with it.
      own: of a run, the configuration that it was trained with; None: it is no run.
      tokenizer: of `jspec.load_tokenizer`.
      shape: the policy with `jax.ShapeDtypeStruct`s for weights.
      draft: the trained draft of a run that has one, and whose overrides do not say draft.name=none. Whether it is
        finite is asked where it is used: an export needs none.
      load: reads the policy. `load_finite` is for what samples from it.
    """

    name: str
    config: Config
    own: Config | None
    tokenizer: Any
    shape: Policy
    draft: Draft | None
    load: Callable[[], Policy]

    def load_finite(self) -> Policy:
        """The policy. Raises InputError where it holds NaN or infinity: what it says would be tokens of id 0."""
        policy = self.load()
        check_finite(self.name, policy.weights, "take a checkpoint from before, or another model")
        return policy


def open_source(name: str, overrides: Sequence[Override], dtype: str | None = None) -> Source:
    """A run's output_dir (its last checkpoint), a config file, or any name that `jspec.load` takes.

    Raises InputError for what cannot be found or read.
    """
    path = arguments.path("model", name)
    if (path / "checkpoints").is_dir():
        config = run_config(path, overrides)
        tokenizer, shape = make_tokenizer(config), policy_shape(path, dtype)
        draft = None if config.draft.name == "none" else load_draft(path)
        return Source(name, config, run_config(path), tokenizer, with_tokenizer(shape, tokenizer), draft,
                      lambda: with_tokenizer(load_policy(path, dtype), tokenizer))
    if path.suffix in (".yaml", ".yml"):
        config = load_config(path, overrides)
        if config.model.name == "random":
            raise InputError(f"{name} trains a policy drawn at random: give the output_dir of its run instead")
    else:
        check_path(name)
        config = load_config(None, [("model.name", name), *overrides])
    if dtype is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    tokenizer = make_tokenizer(config)
    return Source(name, config, None, tokenizer, make_shape(config, tokenizer), None,
                  lambda: make_policy(config, tokenizer))


def check_path(name: str) -> None:
    """Raise InputError if `name` can only be meant as a path, and nothing is there."""
    path = arguments.path("model", name)
    looks_like_one = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or (
        len(path.parts) == 2 and path.parent.is_dir())
    if looks_like_one and not os.path.exists(path):
        raise InputError(f"there is nothing at {name} (looked in {Path.cwd()}); give the output_dir of a run, a "
                         "model's directory or .gguf file, or a model by name")


def choose_draft(source: Source, name: str | None) -> Callable[[Policy], Draft] | None:
    """What makes the draft asked for of the policy; None: without one. Where none is named: a run's own, the one that
    ships for the model, else n-gram look-up.

    Raises InputError, before any weights of the policy are read, if there is no such draft or it does not fit.
    """
    if name == "none":
        return None
    if source.draft is not None and name in (None, source.draft.config.name):
        source.draft.check_finite(source.name)
        return lambda policy: source.draft
    if shipped(source.name, name):
        draft = jspec.load_draft(source.shape, source.name)
        return lambda policy: draft
    kind = name or "ngram"
    if check_fresh_draft(source.shape, kind, {}, "--draft").module.loss is not None:
        say(f"this {kind} draft is fresh, not trained: few of its tokens will be accepted")
    return partial(fresh_draft, key=purpose_key(0, DRAFT_KEY), name=kind, options={}, label="--draft")
