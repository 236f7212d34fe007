"""The numbers of the formats that jspec writes. A reader takes every number up to its own, and
files from before there were any; whoever changes what a file holds, so that an older jspec would
read it wrongly, counts its number up."""

from __future__ import annotations

from typing import Any

from jspec import __version__
from jspec.errors import InputError

CHECKPOINT = 3
"""Of a run's checkpoints, in the item `meta`. 2: a draft's drafter stands beside its config, not in
it. 3: a policy may have adapters."""
HEAD = 1
"""Of a trained draft (jspec/heads/files.py), in its config.json."""
DRAFT_CHECKPOINT = 1
"""Of the checkpoints of `jspec draft train`, in Orbax's metadata of each."""
SAMPLES = 1
"""Of the files that `jspec draft train` samples, an array of their own."""


def refuse_newer(found: Any, known: int, where: object) -> None:
    """Raise InputError if what was read says under `format` that it is newer than `known`, which
    this jspec reads.

    What has no such number is of before there were any, or damaged, which is for its reader to
    find.
    """
    try:
        number = int(found["format"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return
    if number > known:
        raise InputError(f"{where} has format {number}, and this jspec ({__version__}) reads "
                         f"formats up to {known}: a newer jspec wrote it; use that one")
