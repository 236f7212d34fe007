"""A run's output_dir, read without training: its configuration, and policy, draft and plan of its
latest checkpoint, or of another one (`RUN@best`, `RUN@120`)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jspec import checksums, formats
from jspec.best import best_step, worth
from jspec.checkpoint import check_meta, drafter_name, has_checkpoints, meaning, to_restore
from jspec.choosing import Plan
from jspec.config import Config, load_config
from jspec.distributed import on_main
from jspec.drafts import Draft, Drafter, known
from jspec.drafts.base import config_from_fields, model_config
from jspec.errors import InputError
from jspec.hub.names import located
from jspec.model import Lora, Policy, abstract_policy
from jspec.model.lora import abstract_adapted, merge
from jspec.optimizer_sections import ScheduleSection, StateMemorySection
from jspec.output_dir import brief, written
from jspec.rl.state import draft_specs
from jspec.setting_values import shown
from jspec.settings import Override, refuse_changes, to_yaml

FREE_TO_CHANGE = (
    "steps", "output_dir", "log_level", "logging", "mesh", "checkpoint", "profile", "evaluation",
    "rollout", "reward.workers", "reward.concurrency", "reward.timeout_s", "speculation.kernels",
    *(f"{side}.{key}" for side in ("grpo", "draft") for key in (
        "learning_rate", "clip", "weight_decay", "b1", "b2", "eps",
        *(field.name for part in (ScheduleSection, StateMemorySection)
          for field in dataclasses.fields(part)))),
    *(f"grpo.{key}" for key in (
        "clip_low", "clip_high", "dual_clip", "kl_weight", "kl_reference_mix", "entropy_weight",
        "micro_batch", "widths", "max_skipped")),
    "draft.every_n_steps", "model.remat")
"""What a run may be resumed with another value of: how it is carried out, and by how much it
learns. What it learns, and from what, and whatever gives its state another shape, stays."""
CHANGES = "changes.jsonl"
"""The file that says with which other values a run went on, a line each time."""


def keep_config(config: Config) -> str:
    """Makes this configuration the run's from now on. From checkpoints a run goes on under another
    one only in what is `FREE_TO_CHANGE`, and its folder keeps a record of that.

    Returns what has changed, in a line, or "". Raises InputError naming the key, and what it was.
    """
    path, changed, step = Path(config.output_dir) / "config.yaml", {}, 0
    if path.exists() and has_checkpoints(config.output_dir):
        changed = refuse_changes(config.output_dir, load_config(path).chosen(), config.chosen(),
                                 FREE_TO_CHANGE)
        step = max(int(folder.name) for folder in path.parent.glob("checkpoints/*")
                   if folder.name.isdigit())

    def write() -> None:
        with written(config.output_dir):
            path.parent.mkdir(parents=True, exist_ok=True)
            if changed:  # before the configuration: a change that was made is never left out
                with open(path.with_name(CHANGES), "a") as file:
                    file.write(json.dumps({"step": step, "changed": changed}) + "\n")
            whole = path.with_suffix(".tmp")
            whole.write_text(to_yaml(config))
            whole.replace(path)

    on_main(write)
    return f"changed after step {step}: " * bool(changed) + ", ".join(
        f"{key} from {shown(was)} to {shown(now)}" for key, (was, now) in changed.items())


def is_run(path: str | Path) -> bool:
    """Whether this is the output_dir of a run, or of one with a checkpoint that is meant."""
    return (located(path)[0] / "checkpoints").is_dir()


def run_config(run_dir: str | Path, overrides: Sequence[Override] = ()) -> Config:
    """The configuration of a run, with overrides (`settings.read`). Raises InputError if the
    directory is not one."""
    run_dir, _ = located(run_dir)
    path = run_dir / "config.yaml"
    if not path.exists():
        raise InputError(f"{run_dir} is not the output_dir of a run: it has no config.yaml")
    return load_config(path, overrides)


def _restore(run_dir: str | Path, **items: Any) -> dict[str, Any]:
    """Items of a run's latest checkpoint, or the one that is meant. Raises InputError if there is
    none, or it cannot be read."""
    run_dir, which = located(run_dir)
    directory = run_dir.absolute() / "checkpoints"
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file, and a folder of checkpoints is needed there; "
                         "give another run")
    if not has_checkpoints(run_dir):
        raise InputError(f"{run_dir} has no checkpoint yet; train with it first")
    # what goes with read_only is said as well: else Orbax sets it with a warning
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    with ocp.CheckpointManager(directory, options=options) as manager:
        step = _meant(manager, run_dir, which)
        folder = directory / str(step)
        reason = checksums.damage(folder, tuple(items)) if checksums.known(folder) else ""
        try:
            restored = ({} if reason
                        else dict(manager.restore(step, args=ocp.args.Composite(**items))))
        except Exception as error:  # as above
            reason = brief(error)
    if reason:
        raise InputError(f"the checkpoint {folder} cannot be read ({reason}); move it away, and "
                         "the one before it is taken")
    return restored


def _meant(manager: ocp.CheckpointManager, run_dir: Path, which: str) -> int:
    """The step of the checkpoint that `which` names. Raises InputError where there is none."""
    steps = sorted(manager.all_steps())
    there = f"its checkpoints are of {', '.join(map(str, steps))}"
    if not which:
        return steps[-1]
    if which == "best":
        section = run_config(run_dir).checkpoint
        if step := best_step(manager, worth(section.best, section.best_is)):
            return step
        raise InputError(f"{run_dir} has no best checkpoint: train with checkpoint.best=METRIC, "
                         f"or name a step; {there}")
    if not which.isdecimal() or int(which) not in steps:
        raise InputError(f"{run_dir} has no checkpoint {which!r}: after the @ comes best, or a "
                         f"step; {there}")
    return int(which)


def _meta(run_dir: str | Path) -> dict:
    meta = _restore(run_dir, meta=ocp.args.JsonRestore())["meta"]
    formats.refuse_newer(meta, formats.CHECKPOINT, f"the latest checkpoint of {run_dir}")
    with meaning(run_dir):
        check_meta(meta)
    return meta


def data_position(run_dir: str | Path) -> dict:
    """Where a run's latest checkpoint stands in its data, as `PromptData.restore` takes it. Raises
    as `load_policy` does."""
    return _meta(run_dir)["data"]


def run_plan(run_dir: str | Path) -> Plan:
    """What a run with speculation.k=auto drafts, as of its latest checkpoint; without one, or in
    another run, nothing is chosen. Raises InputError if it cannot be read."""
    fields = _meta(run_dir).get("plan") if has_checkpoints(located(run_dir)[0]) else None
    with meaning(run_dir):
        return Plan.from_json(fields) if fields else Plan()


def policy_shape(run_dir: str | Path, dtype: str | None = None) -> Policy:
    """The policy of a run's latest checkpoint with `jax.ShapeDtypeStruct`s for weights. Arguments
    and errors are those of `load_policy`."""
    run_config(run_dir)
    meta = _meta(run_dir)
    with meaning(run_dir):
        return abstract_policy(model_config(meta["model"]), dtype or meta["dtype"])


def load_policy(run_dir: str | Path, dtype: str | None = None) -> Policy:
    """The policy of a run's latest checkpoint, in the training layout, on the mesh of
    `jax.set_mesh` if there is one; adapters are added to its weights.

    Args:
      run_dir: a run's output_dir; with @best or @STEP behind it, that checkpoint instead of the
        latest.
      dtype: what is computed in; default what the run computed in.

    Raises InputError if there is no such run or checkpoint, or it cannot be read.
    """
    policy = adapted_policy(run_dir, dtype)
    return policy if policy.adapters is None else jax.jit(merge)(policy)


def adapted_policy(run_dir: str | Path, dtype: str | None = None) -> Policy:
    """`load_policy`, its adapters, if it has any, apart from its weights."""
    policy, meta = policy_shape(run_dir, dtype), _meta(run_dir)
    with meaning(run_dir):
        lora = Lora.of(meta.get("lora"))
    if lora is None:
        wanted = ocp.args.StandardRestore(to_restore(policy.weights))
        return policy.replace(weights=_restore(run_dir, policy=wanted)["policy"])
    policy = abstract_adapted(policy, lora)
    items = _restore(run_dir, policy=ocp.args.StandardRestore(to_restore(policy.weights)),
                     adapters=ocp.args.StandardRestore(to_restore(policy.adapters)))
    return policy.replace(weights=items["policy"], adapters=items["adapters"])


def draft_shape(run_dir: str | Path, drafter: Drafter | None = None) -> Draft:
    """The draft of a run that has one with `jax.ShapeDtypeStruct`s for arrays. Arguments and errors
    are those of `load_draft`."""
    meta = _meta(run_dir)
    if "draft" not in meta:
        raise InputError(f"the draft of {run_dir} was saved by an earlier jspec, which did not say "
                         "what it was; train it anew")
    with meaning(run_dir):
        fields, name = dict(meta["draft"]["config"]), drafter_name(meta["draft"])
    try:
        drafter = known(name, drafter)
    except InputError as error:
        raise InputError(f"the draft of {run_dir}: {error}") from None
    with meaning(run_dir):
        config = config_from_fields(drafter, {**fields, "policy": meta["model"]})
        state = jax.tree.map(lambda s: jax.ShapeDtypeStruct(tuple(s["shape"]), s["dtype"]),
                             meta["draft"]["state"],
                             is_leaf=lambda s: isinstance(s, dict) and "shape" in s)
    return draft_specs(Draft(weights={}, state=state, config=config, drafter=drafter))


def load_draft(run_dir: str | Path, drafter: Drafter | None = None) -> Draft | None:
    """The draft of a run's latest checkpoint, or None if the run had none.

    drafter: whose it is, if that is none of jspec's own (`jspec.drafts.find`). Raises as
    `load_policy` does, and InputError for a draft of another drafter: no file is run because a
    checkpoint names it. (One whose weights no checkpoint has is for `heads.models.of_run`.)
    """
    section = run_config(run_dir).draft
    if section.name == "none":
        return None
    if section.elsewhere is not None:
        raise InputError(f"the draft of {run_dir} is the model {section.path} as it is, of which "
                         f"checkpoints have no copy; read that one, jspec.load_draft(policy, "
                         f"{section.path!r})")
    draft = draft_shape(run_dir, drafter)
    arrays = {"weights": draft.weights, "state": draft.state}
    if not jax.tree.leaves(arrays):
        return draft
    wanted = ocp.args.StandardRestore(to_restore(arrays))
    return draft.replace(**_restore(run_dir, draft=wanted)["draft"])


def load_run(run_dir: str | Path, overrides: Sequence[Override] = (), dtype: str | None = None,
             drafter: Drafter | None = None) -> tuple:
    """(Config, Policy, Draft or None) of a run's latest checkpoint; see `load_policy`, `load_draft`
    and `run_config`.

    Raises InputError for a draft that is not finite, too.
    """
    config, policy, draft = (run_config(run_dir, overrides), load_policy(run_dir, dtype),
                             load_draft(run_dir, drafter))
    if draft is not None:
        draft.check_finite(run_dir)
    return config, policy, draft
