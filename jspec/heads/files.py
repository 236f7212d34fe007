"""jspec's own files of a trained draft: a directory with `model.safetensors`, `config.json` and a
card, `README.md`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jspec import formats
from jspec.drafts import Draft, Drafter, known
from jspec.drafts.base import config_from_fields
from jspec.drafts.parts.vocabulary import check_vocab
from jspec.errors import InputError
from jspec.hub.fields import section
from jspec.hub.json_io import read_json, write_json
from jspec.hub.safetensors_io import read_tensors, write_tensors
from jspec.model import Policy, place_on_mesh
from jspec.model.params import is_spec

WEIGHTS, CONFIG = "model.safetensors", "config.json"
HEAD = "head"
"""Where in its output_dir `jspec draft train` writes one."""
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def is_head(directory: Path) -> bool:
    """Whether a directory holds a draft as `write` leaves it."""
    return (directory / CONFIG).is_file() and "drafter" in read_json(directory / CONFIG)


def write(draft: Draft, directory: Path, dtype: str = "bfloat16") -> None:
    """Write a draft's weights (in `dtype`), state and config into a directory that is there."""
    tensors = {f"weights.{name}": np.asarray(x).astype(DTYPES[dtype])
               for name, x in _named(draft.weights).items()}
    tensors |= {f"state.{name}": np.asarray(x) for name, x in _named(draft.state).items()}
    fields = dataclasses.asdict(draft.config)
    config = {"format": formats.HEAD, "drafter": draft.name, "policy": fields.pop("policy"),
              "options": fields}
    work = directory / f".{WEIGHTS}"
    write_tensors(work, tensors)
    work.replace(directory / WEIGHTS)
    write_json(directory / CONFIG, config)


def read(directory: Path, policy: Policy, drafter: Drafter | None = None) -> Draft:
    """The draft of a directory that `write` made, for `policy`, with float32 masters placed on the
    current mesh.

    drafter: whose it may be, if it is none of jspec's own. Raises InputError if it was made for
    another policy, or a tensor is missing, left over or of the wrong shape.
    """
    draft = read_config(directory, drafter)
    draft.check(policy)
    draft = draft.replace(config=dataclasses.replace(draft.config, policy=policy.config))
    tensors = read_tensors(directory / WEIGHTS)
    specs = draft.drafter.specs(draft.config)
    weights = {name: tensors.pop(f"weights.{name}", None) for name in _named(specs)}
    state = {name: tensors.pop(name) for name in list(tensors) if name.startswith("state.")}
    for name, spec in _named(specs).items():
        if weights[name] is None:
            raise InputError(f"{directory}: tensor weights.{name} is missing")
        if weights[name].dtype.name not in DTYPES:
            raise InputError(f"{directory}: tensor weights.{name} is stored as "
                             f"{weights[name].dtype}; supported: {', '.join(DTYPES)}")
        if weights[name].shape != spec.shape:
            raise InputError(f"{directory}: tensor weights.{name} has shape "
                             f"{list(weights[name].shape)}, but the config says {list(spec.shape)}")
    _check_vocab(directory, draft, state.get("state.vocab"))
    if tensors:
        raise InputError(f"{directory}: tensor {min(tensors)} has no place in a {draft.name} draft")
    leaves = [weights[name].astype(np.float32) for name in _named(specs)]
    tree = jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), leaves)
    placed = place_on_mesh(lambda x: x, specs, draft.drafter.model(draft.config))(tree)
    return draft.replace(weights=placed,
                         state=_nested({n.removeprefix("state."): x for n, x in state.items()}))


def _check_vocab(directory: Path, draft: Draft, vocab: np.ndarray | None) -> None:
    size, said = 0 if vocab is None else len(vocab), getattr(draft.config, "vocab_size", 0)
    if size != said:
        raise InputError(f"{directory}: the config says vocab_size {said}, and tensor state.vocab "
                         + ("is missing" if vocab is None else f"has {size} tokens"))
    if vocab is not None:
        try:
            check_vocab(vocab, draft.config.policy.vocab_size, draft.name)
        except InputError as error:
            raise InputError(f"{directory}: {error}") from None


def read_config(directory: Path, drafter: Drafter | None = None) -> Draft:
    """A draft without its arrays. Raises InputError if it is not one, or of no drafter that is
    known (see `read`)."""
    where = directory / CONFIG
    found = read_json(where)
    formats.refuse_newer(found, formats.HEAD, where)
    try:
        drafter = known(found.get("drafter"), drafter)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None
    options = section(found, "options", str(where))
    try:
        config = config_from_fields(drafter, {**options, "policy": found["policy"]})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = error if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{where} is not the config of a draft: {reason}") from None
    return Draft(weights={}, state={}, config=config, drafter=drafter)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, such as "blocks.0.layer.q"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)
    return {".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): leaf
            for path, leaf in flat}


def _nested(named: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in named.items():
        *path, last = name.split(".")
        at = out
        for key in path:
            at = at.setdefault(key, {})
        at[last] = jax.numpy.asarray(value)
    return out
