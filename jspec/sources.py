"""What a command looks at: a run, a config's model or any model by name, of which no weights are
read before its input is known to be right."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

import jspec
from jspec import arguments, user_code
from jspec.base_model import BaseModel, with_tokenizer
from jspec.choices import DRAFTERS, MIXED
from jspec.config import Config, load_config
from jspec.drafts import Draft, find
from jspec.drafts.base import check_finite
from jspec.errors import InputError
from jspec.heads import shipped
from jspec.heads.models import of_run
from jspec.model import Policy
from jspec.prepare import around, check_fresh_draft, fresh_draft, rollout_layout
from jspec.progress import say
from jspec.purposes import DRAFT_KEY, purpose_key
from jspec.run_dir import is_run, load_policy, policy_shape, run_config
from jspec.sections import MeshSection
from jspec.settings import Override
from jspec.sharding import configured_mesh, mesh_of_weights


@dataclasses.dataclass(frozen=True)
class Source:
    """A policy to look at.

    Attributes:
      name: as the user gave it.
      config: the configuration that goes with it.
      own: of a run, the configuration that it was trained with; None: it is no run.
      tokenizer: of `jspec.load_tokenizer`.
      shape: the policy with `jax.ShapeDtypeStruct`s for weights.
      load: reads the policy, onto the current mesh. `load_finite` is for what samples from it.
      read_draft: reads the trained draft of a run, None where there is none; see `draft`.
    """

    name: str
    config: Config
    own: Config | None
    tokenizer: Any
    shape: Policy
    load: Callable[[], Policy]
    read_draft: Callable[[], Draft | None] = lambda: None

    @functools.cached_property
    def draft(self) -> Draft | None:
        """The trained draft of a run that has one, where it is wanted and the overrides do not say
        draft.name=none, on the mesh that is current when it is first asked for. Whether it is
        finite is asked where it is used."""
        return self.read_draft()

    def holds(self, drafter: str | None) -> bool:
        """Whether it has a trained draft of the drafter that is named so (None: of any), or one
        that it is made around."""
        return self.draft is not None and (serves(self.draft.name, drafter) or (
            self.own is not None and serves(self.own.draft.name, drafter)))

    def load_finite(self) -> Policy:
        """The policy. Raises InputError where it holds NaN or infinity, of which come tokens of id
        0, or ran away."""
        policy = self.load()
        check_finite(self.name, policy.weights, "take a checkpoint from before, or another model")
        return policy


def serves(own: str, drafter: str | None) -> bool:
    """Whether a draft of the drafter `own` is one of the drafter that is named (None: any), or what
    that is made around."""
    return (drafter is None or user_code.same(own, drafter)
            or (drafter == MIXED and own in DRAFTERS and find(own).loss is not None))


def open_source(name: str, overrides: Sequence[Override], dtype: str | None = None,
                drafters: Collection[str] | None = None, run_code: bool = False) -> Source:
    """A run's output_dir (its last checkpoint, or RUN@best, RUN@STEP), a config file, or any name
    that `jspec.load` takes.

    Args:
      drafters: of a run, the draft is read if it is of one of these; None: whichever it is of.
      run_code: run a file that a run's own config names as its drafter. One that the command line
        names, as one of `drafters` or in an override, is run in any case.

    Raises InputError for what cannot be found or read, or would run a file that may not be run.
    """
    path = arguments.path("model", name)
    if is_run(path):
        config = run_config(path, overrides)
        own, tokenizer, shape = (run_config(path), BaseModel.of(config).tokenizer,
                                 policy_shape(path, dtype))
        wanted = drafters is None or any(serves(own.draft.name, x) for x in drafters)
        named = bool(drafters) or overridden("draft.name", overrides)
        return Source(name, config, own, tokenizer, with_tokenizer(shape, tokenizer),
                      lambda: with_tokenizer(load_policy(path, dtype), tokenizer),
                      lambda: draft_of_run(name, config, shape, run_code or named) if wanted
                      else None)
    if path.suffix in (".yaml", ".yml"):
        config = load_config(path, overrides)
        if config.model.name == "random":
            raise InputError(f"{name} trains a policy drawn at random: give the output_dir of its "
                             "run instead")
    else:
        check_path(name)
        config = load_config(None, [("model.name", name), *overrides])
    if dtype is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    base = BaseModel.of(config)
    return Source(name, config, None, base.tokenizer, base.shape, base.policy)


def mesh_of(source: Source) -> tuple[Mesh, str]:
    """(mesh, rollout layout) for all devices: what the configuration says, where it says anything
    that these devices fit; of a run that was trained on others `mesh_of_weights`, with a word about
    it.

    Raises InputError for a mesh that does not fit and is not the run's own.
    """
    section, model = source.config.mesh, source.shape.config
    if section == MeshSection():
        return mesh_of_weights(model), "rollout"
    try:
        return configured_mesh(section), rollout_layout(source.config)
    except InputError as error:
        if source.own is None or section != source.own.mesh:
            raise
        mesh = mesh_of_weights(model)
        say(f"{source.name} was trained on another mesh ({error}): here it is on fsdp "
            f"{mesh.shape['fsdp']} x data {mesh.shape['data']}")
        return mesh, "rollout"


def overridden(key: str, overrides: Sequence[Override]) -> bool:
    """Whether one of the overrides sets this key."""
    return any((text.partition("=")[0].strip() if isinstance(text, str) else text[0]) == key
               for text in overrides)


def draft_of_run(name: str, config: Config, shape: Policy, run_code: bool) -> Draft | None:
    """The trained draft of a run, for a policy of this shape. A folder that is opened for its
    weights runs no code: raises InputError if the drafter is in a file, unless that may be run."""
    drafter = config.draft.name
    if drafter == "none":
        return None
    if user_code.split(drafter) is None:
        return of_run(shape, arguments.path("model", name))
    if not run_code:
        raise InputError(f"the draft of {name} is of {drafter}, which would run that file: look at "
                         f"it, then give --run-code or name it (eval: draft.name={drafter}; else "
                         f"--draft {drafter}), or go without")
    return of_run(shape, arguments.path("model", name), find(drafter, f"draft.name={drafter!r}"))


def check_path(name: str) -> None:
    """Raise InputError if `name` can only be meant as a path, and nothing is there."""
    path = arguments.path("model", name)
    looks_like_one = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or (
        len(path.parts) == 2 and path.parent.is_dir())
    if looks_like_one and not os.path.exists(path):
        raise InputError(f"there is nothing at {name} (looked in {Path.cwd()}); give the "
                         "output_dir of a run, a model's directory or .gguf file, or a model by "
                         "name")


def choose_draft(source: Source, name: str | None,
                 path: str | None = None) -> Callable[[Policy], Draft] | None:
    """What makes the draft asked for of the policy; None: without one. Where none is named: a run's
    own, the one that ships for the model, else n-gram look-up. path: of a trained one, as
    `jspec.load_draft` takes it.

    Raises InputError, before any weights of the policy are read, if there is no such draft or it
    does not fit.
    """
    if name == "none":
        if path is not None:
            raise InputError(f"--draft none drafts nothing, and --draft-path {path} is a draft; "
                             "leave out one of them")
        return None
    drafter = None if name is None else find(name, f"--draft {name}")
    if path is not None:
        trained = jspec.load_draft(source.shape, path, drafter, source.tokenizer)
        if drafter is not None:
            trained = around(source.shape, trained, drafter, {}, "--draft", f"--draft-path {path}")
        return lambda policy: trained
    if source.holds(name):
        source.draft.check_finite(source.name)
        own = source.draft
        if drafter is not None:
            own = around(source.shape, own, drafter, {}, "--draft", source.name)
        return lambda policy: own
    if shipped(source.name, name):
        draft = jspec.load_draft(source.shape, source.name)
        if drafter is not None:
            draft = around(source.shape, draft, drafter, {}, "--draft", source.name)
        return lambda policy: draft
    drafter = drafter or find("ngram")
    check_fresh_draft(source.shape, drafter, {}, "--draft")
    if drafter.loss is not None:
        say(f"this {drafter.name} draft is fresh, not trained: few of its tokens will be accepted")
    return partial(fresh_draft, key=purpose_key(0, DRAFT_KEY), drafter=drafter, options={},
                   label="--draft")
