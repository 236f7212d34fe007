"""Where trained drafts come from: the ones that ship with jspec, directories, and runs."""

from __future__ import annotations

from pathlib import Path

from jspec.checkpoint import load_draft as draft_of_run
from jspec.drafts import Draft
from jspec.errors import InputError
from jspec.heads import files
from jspec.model import Policy

SHIPPED = tuple(sorted(path.name for path in Path(__file__).parent.iterdir() if (path / files.CONFIG).is_file()))
"""Short names of models for which a trained head lies beside this file."""


def load_draft(policy: Policy, source: str | Path) -> Draft:
    """A trained draft for `policy`, float32 masters, on the mesh of `jax.set_mesh` if there is one.

    Args:
      source: the short name of a model whose head ships with jspec (`SHIPPED`), a directory that `jspec draft train`
        wrote, or a run's output_dir, whose last checkpoint is taken.

    Raises InputError if there is none, it cannot be read, or it was made for another policy.
    """
    if source in SHIPPED:
        return files.read(Path(__file__).parent / source, policy)
    path = Path(source).expanduser()
    if files.is_head(path):
        return files.read(path, policy)
    if (path / "checkpoints").is_dir():
        draft = draft_of_run(path)
        if draft is None:
            raise InputError(f"{source} is a run without a draft")
        draft.check(policy)
        return draft
    raise InputError(f"no draft at {source}: give the output_dir of a run, a directory that `jspec draft train` wrote, "
                     f"or one of {', '.join(SHIPPED) or '(none ships)'}")
