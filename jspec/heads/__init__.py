"""Where trained drafts come from: the ones that ship with jspec, directories, and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jspec import arguments
from jspec.arguments import instance, optional
from jspec.choices import MIXED
from jspec.drafts import Draft, Drafter
from jspec.drafts.mixed import trained_of
from jspec.errors import InputError
from jspec.heads import files
from jspec.heads.models import NAME as MODEL
from jspec.heads.models import DraftingModel, check_tokens, of_run, open_model
from jspec.hub import block_drafts, block_drafts_config, eagle3, eagle3_config, mtp_heads
from jspec.hub.architectures import ARCHITECTURES
from jspec.hub.draft_configs import LAYOUTS
from jspec.hub.exporter import export
from jspec.hub.fields import texts, told_of
from jspec.hub.json_io import read_json
from jspec.hub.mtp_layouts import MTP_LAYOUTS, mtp_count
from jspec.hub.names import hub_id
from jspec.model import Policy, check_policy
from jspec.run_dir import is_run
from jspec.run_files import METRICS

_HOME = Path(__file__).parent
SHIPPED = tuple(sorted(path.name for path in _HOME.iterdir() if (path / files.CONFIG).is_file()))
"""Short names of models for which a trained head lies beside this file."""


def shipped(model: str, drafter: str | None = None) -> bool:
    """Whether a trained head for the model of this name ships with jspec, and is of `drafter` where
    one is named, or what that is made around."""
    return model in SHIPPED and drafter in (None, MIXED, files.read_config(_HOME / model).name)


def load_draft(policy: Policy, source: str | Path, drafter: Drafter | None = None,
               tokenizer: Any = None) -> Draft:
    """A trained draft for `policy`, float32 masters, on the mesh of `jax.set_mesh` if there is one.

    Args:
      source: the short name of a model whose head ships with jspec (`SHIPPED`), the output_dir of
        `jspec draft train` (or its `head`), a directory with a published EAGLE-3, P-EAGLE, DFlash
        or DSpark draft (SpecForge's, vLLM's, DeepSpec's or speculators' layout) or an MTP head
        (`jspec.hub.mtp_layouts.MTP_LAYOUTS`), a run's output_dir, whose last checkpoint is
        taken, or a model to draft with, by any name that `jspec.load` takes.
      drafter: whose it is, if that is none of jspec's own (`jspec.drafts.find`), or where a name
        has a draft and is a model too: with that of draft_model it is the model, of a run its
        policy.
      tokenizer: the policy's, which that of a model to draft with is compared with token by token;
        None: all that is compared is which ids have a token.

    Raises InputError if there is none, it cannot be read or is not finite, or it was made for
    another policy, or it is
    a model with another tokenizer than the policy.
    """
    check_policy("policy", policy)
    optional(instance(Drafter, "jspec.drafts.find(NAME)"))("drafter", drafter)
    source = arguments.name("draft", source)
    if drafter is not None and drafter.name == MODEL:
        draft = _of_model(policy, open_model(source), tokenizer)
    else:
        draft = _find(policy, source, drafter, tokenizer)
    draft.check_finite(source)
    return draft


def _of_model(policy: Policy, found: DraftingModel, tokenizer: Any) -> Draft:
    check_tokens(found, policy.config, tokenizer)
    draft = found.draft(policy)
    draft.check(policy)
    return draft


def _find(policy: Policy, source: str, drafter: Drafter | None, tokenizer: Any) -> Draft:
    if source in SHIPPED:
        return files.read(_HOME / source, policy)
    path = arguments.path("draft", source)
    for head in (path, path / files.HEAD):
        if files.is_head(head):
            return files.read(head, policy, drafter)
    if (path / "samples").is_dir() and not (path / METRICS).exists():  # a run has samples too
        raise InputError(f"{source}: `jspec draft train` has not come to its end there; the same "
                         "command again goes on")
    if (path / files.CONFIG).is_file() and not is_model(path):
        return read_published(path, policy)
    if is_run(path):
        draft = of_run(policy, path, drafter)
        if draft is None:
            raise InputError(f"{source} is a run without a draft")
        draft.check(policy)
        return draft
    if (path / files.CONFIG).is_file() or path.suffix == ".gguf" or hub_id(source):
        return _of_model(policy, open_model(source), tokenizer)
    raise InputError(f"no draft at {source}: give the output_dir of `jspec train` or `jspec draft "
                     "train`, a published draft or MTP head, a model to draft with"
                     + "".join(f", or {name}" for name in SHIPPED))


def publish(draft: Draft, directory: str | Path, layout: str | None = None,
            verifier: str | None = None, policy: Callable[[], Policy] | None = None,
            tokenizer: Any = None) -> Path:
    """Write a draft in the layout that others publish (`jspec.hub.eagle3.write`,
    `jspec.hub.block_drafts.write`, `jspec.hub.mtp_heads.write`; the model of a draft_model as
    `jspec.export` writes one).

    layout: of a draft that has some, one of `hub.draft_configs.LAYOUTS`; None: the first.
    verifier: the hub id of its policy. policy: reads it, where its rows are needed. tokenizer: the
    policy's, which a model has too, and is written beside it. Raises InputError for a drafter that
    nobody publishes, and where those raise it.
    """
    if draft.name == MIXED:
        draft = trained_of(draft)
    chosen = layout or LAYOUTS[0]
    if draft.name in eagle3.DRAFTERS:
        return eagle3.write(draft, directory, layout=chosen, verifier=verifier)
    if draft.name in block_drafts.DRAFTERS:
        return block_drafts.write(draft, directory, layout=chosen, verifier=verifier, policy=policy)
    if draft.name not in ("mtp", MODEL):
        known = ", ".join([*eagle3.DRAFTERS, *block_drafts.DRAFTERS, "mtp"])
        raise InputError(f"nobody publishes {draft.name} drafts; those of {known} and {MODEL} can "
                         "be exported")
    if layout is not None:
        raise InputError(f"layout {layout} is for the other drafts; an mtp head and a model are "
                         "written as their architecture has it")
    if draft.name == MODEL:
        return export(Policy(draft.weights, draft.config.model), directory, tokenizer)
    return mtp_heads.write(draft, directory, verifier)


def not_run_by_vllm(draft: Draft, layout: str | None = None) -> list[str]:
    """What vLLM would not run, or not as the draft was trained, of one that is published so."""
    if draft.name == MIXED:
        draft = trained_of(draft)
    missing, chosen = [], layout or LAYOUTS[0]
    if draft.name in eagle3.DRAFTERS:
        missing += eagle3_config.not_served(draft.config, chosen)
    if draft.name in block_drafts.DRAFTERS:
        missing += block_drafts_config.not_served(draft.config, chosen)
    depths = list(getattr(draft.config, "aux_depths", ()))
    if depths != sorted(depths):
        missing.append("auxiliary layers in another order than the policy's, which it sorts "
                       "without a word")
    return missing


def is_model(path: Path) -> bool:
    """Whether a directory with a config.json holds a model alone, without a draft for it."""
    hf = read_json(path / files.CONFIG)
    with told_of(path):
        named = set(texts(hf, "architectures"))
    return (bool(named) and named <= ARCHITECTURES.keys() - MTP_LAYOUTS.keys()
            and "draft_vocab_size" not in hf and not mtp_count(hf))


def read_published(path: Path, policy: Policy) -> Draft:
    """The draft or native MTP head in a directory of the layouts that others publish."""
    hf = read_json(path / files.CONFIG)
    with told_of(path):
        names = [*texts(hf, "architectures"), str(hf.get("speculators_model_type", ""))]
    if block_drafts_config.is_block_draft(hf):
        return block_drafts.read(path, policy)
    named = " ".join(names).lower()
    return (eagle3.read(path, policy) if "eagle" in named or "draft_vocab_size" in hf
            else mtp_heads.read(path, policy))
