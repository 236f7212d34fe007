"""Where the model of a draft_model draft comes from: any model by name, a run, or files of a draft
that was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jspec import arguments, hub
from jspec.drafts.base import Draft, Drafter
from jspec.drafts.draft_model import DraftModelConfig, draft_model, of_weights
from jspec.errors import InputError
from jspec.heads import files
from jspec.model import ModelConfig, Policy
from jspec.run_dir import draft_shape, is_run, load_draft, load_policy, policy_shape, run_config

NAME = draft_model.name


@dataclasses.dataclass(frozen=True)
class DraftingModel:
    """What a name stands for, of which nothing is read before it is asked for.

    Attributes:
      name: as it was given.
      config: its shape.
      draft: the draft with its weights, float32 masters, for a policy, on the mesh of
        `jax.set_mesh` if there is one.
      tokenizer: its own; None: it is a draft already, whose tokenizer was compared when it was
        made.
    """

    name: str
    config: ModelConfig
    draft: Callable[[Policy], Draft]
    tokenizer: Callable[[], Any] | None = None


def open_model(source: str) -> DraftingModel:
    """The model of a name that `jspec.load` takes; of a run, its draft if that is a draft_model,
    else its policy; or the one of a draft in jspec's own files. Raises InputError where there is
    none."""
    path = arguments.path("draft", source)
    for head in (path, path / files.HEAD):
        if files.is_head(head) and (held := files.read_config(head, draft_model)).name == NAME:
            return DraftingModel(source, held.config.model, partial(files.read, head))
    if is_run(path):
        return _of_run(source)
    try:
        stored = hub.open(source)
    except InputError as error:
        raise InputError(f"no draft at {source}, and no model to draft with: {error}") from error
    return DraftingModel(source, stored.config, _reader(stored.config, stored.policy),
                         stored.tokenizer)


def _of_run(source: str) -> DraftingModel:
    path = arguments.path("draft", source)
    own = run_config(path)
    if own.draft.elsewhere is not None:
        return dataclasses.replace(open_model(own.draft.elsewhere), name=source, tokenizer=None)
    if own.draft.name == NAME:
        return DraftingModel(source, draft_shape(path).config.model, lambda policy:
                             load_draft(path))
    shape, section = policy_shape(path), own.model
    return DraftingModel(source, shape.config, _reader(shape.config, lambda: load_policy(path)),
                         lambda: hub.load_tokenizer(section.tokenizer or section.name))


def of_run(policy: Policy, run_dir: Path, drafter: Drafter | None = None) -> Draft | None:
    """`run_dir.load_draft`, and of a draft model that was not trained the model itself, for a
    policy."""
    elsewhere = run_config(run_dir).draft.elsewhere
    if elsewhere is None:
        return load_draft(run_dir, drafter)
    return open_model(elsewhere).draft(policy)


def _reader(config: ModelConfig, read: Callable[[], Policy]) -> Callable[[Policy], Draft]:
    def draft(policy: Policy) -> Draft:
        made = DraftModelConfig(policy.config, config)  # before any weights are read
        return of_weights(made, read().weights)

    return draft


def check_tokens(found: DraftingModel, policy: ModelConfig, tokenizer: Any | None) -> None:
    """Raise InputError, naming it, for the first id that is another token of the model's than of
    the policy's, whose tokenizer is given. (One that only one of them has a token for is never
    drafted, or always refused.)

    tokenizer: None: it is not known, and all that can be compared is which ids have a token.
    """
    if found.tokenizer is None:
        return
    if tokenizer is None:
        _check_ids(found, policy)
        return
    theirs, ours = ({i: token for token, i in one.get_vocab().items()}
                    for one in (found.tokenizer(), tokenizer))
    for i in sorted(theirs.keys() & ours.keys()):
        if theirs[i] != ours[i]:
            raise InputError(f"{found.name} has another tokenizer than the policy: its token {i} "
                             f"is {theirs[i]!r}, and the policy's is {ours[i]!r}; a draft model "
                             "must share the policy's, take one of its family")


def _check_ids(found: DraftingModel, policy: ModelConfig) -> None:
    size = max(found.config.vocab_size, policy.vocab_size)
    theirs, ours = (np.arange(size) < model.vocab_size for model in (found.config, policy))
    for known, model in ((theirs, found.config), (ours, policy)):
        for start, stop in model.tokenless:
            known[start:stop] = False
    if (theirs != ours).any():
        i = int(np.flatnonzero(theirs != ours)[0])
        whose = ("the policy has a token", found.name) if ours[i] else (f"{found.name} has a token",
                                                                        "the policy")
        raise InputError(f"{whose[0]} of id {i}, and {whose[1]} has none: their tokenizers differ; "
                         "if they are of one family, give the policy's, tokenizer="
                         "jspec.load_tokenizer(NAME), by which they are compared token by token")
