"""Checkpoints of a run: all that training carries, saved in the background, kept by count, whole or not there at all.

`output_dir/checkpoints/STEP` holds the items `policy`, `draft`, `optimizer` (with counters and key) and `meta` (model
config, position in the data), so that a policy can be read without the rest, and the checksums of their files, which
are compared before they are read; `output_dir/config.yaml` is the run's configuration.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jspec import checksums, formats
from jspec.choosing import Plan
from jspec.config import Config, load_config
from jspec.distributed import any_process, on_main
from jspec.drafts import Draft, Drafter, known
from jspec.drafts.base import config_from_fields, model_config, unlike
from jspec.errors import InputError
from jspec.model import ModelConfig, Policy, abstract_policy, param_specs
from jspec.model.params import is_spec
from jspec.output_dir import brief, checkpoints_written, is_checkpoint, written
from jspec.rl.state import TrainState
from jspec.settings import Override, refuse_changes, to_yaml
from jspec.sharding import spec_sharding
from pallas_kernels.noise import key_words

log = logging.getLogger(__name__)

COUNTERS = ("updates", "skipped", "skipped_in_row", "draft_skipped", "draft_skipped_in_row")
FREE_TO_CHANGE = ("steps", "output_dir", "log_level", "mesh", "checkpoint", "profile", "reward.workers",
                  "rollout", "speculation.kernels", "grpo.learning_rate", "grpo.clip", "grpo.max_skipped",
                  "draft.learning_rate", "draft.clip")
"""What a run may be resumed with another value of: what decides nothing that it computes, and what a run whose updates
are not finite has to be rescued with."""


def check_config(config: Config) -> None:
    """Refuse to go on from checkpoints under another configuration. Without any, this one is the run's from now on.

    Raises InputError naming the key, and what it was.
    """
    path = Path(config.output_dir) / "config.yaml"
    if path.exists() and has_checkpoints(config.output_dir):
        refuse_changes(config.output_dir, load_config(path), config, FREE_TO_CHANGE)

    def write() -> None:
        with written(config.output_dir):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_suffix(".tmp")
            whole.write_text(to_yaml(config))
            whole.replace(path)

    on_main(write)


def has_checkpoints(run_dir: str | Path) -> bool:
    """Whether there is a whole checkpoint: one that is still being written has a longer name."""
    return any(path.name.isdigit() for path in Path(run_dir).glob("checkpoints/*"))


def _items(state: TrainState) -> dict[str, Any]:
    """The arrays of a state, by item; those without any array are left out."""
    items = {
        "policy": state.policy.weights,
        "draft": None if state.draft is None else {"weights": state.draft.weights, "state": state.draft.state},
        "optimizer": {"policy": state.opt_state, "draft": state.draft_opt_state, "key": key_words(state.key),
                      **{name: getattr(state, name) for name in COUNTERS}},
    }
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _put_back(state: TrainState, items: dict[str, Any]) -> TrainState:
    optimizer = items["optimizer"]
    draft = state.draft.replace(**items["draft"]) if "draft" in items else state.draft
    return state.replace(policy=state.policy.replace(weights=items["policy"]), draft=draft,
                         opt_state=optimizer["policy"], draft_opt_state=optimizer["draft"],
                         key=jax.random.wrap_key_data(optimizer["key"], impl="threefry2x32"),
                         **{name: optimizer[name] for name in COUNTERS})


def _draft_meta(draft: Draft) -> dict:
    """What a draft is made again from, as JSON can hold it; its policy's config is the policy's."""
    fields = dataclasses.asdict(draft.config)
    del fields["policy"]
    state = jax.tree.map(lambda x: {"shape": list(x.shape), "dtype": str(x.dtype)}, draft.state)
    return {"drafter": draft.name, "config": fields, "state": state}


def _drafter_name(meta: dict) -> Any:
    """The name of a draft's drafter (of its `meta`, which may hold anything), which once was in its config."""
    return meta["drafter"] if "drafter" in meta else meta["config"]["name"]


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Checkpoints:
    """The checkpoints of one run.

        with Checkpoints(output_dir, keep=2) as checkpoints:
            restored = checkpoints.restore(state)           # (step, state, data position), or None
            checkpoints.save(step, state, data.state())     # copies now, writes in the background

    Saving, waiting and leaving raise InputError where a checkpoint, perhaps an earlier one, could not be written.
    """

    def __init__(self, output_dir: str | Path, keep: int):
        self.directory = Path(output_dir).absolute() / "checkpoints"
        self.keep = keep
        with checkpoints_written(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep, cleanup_tmp_directories=True, enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums))
        return ocp.CheckpointManager(self.directory, options=options)

    def _add_checksums(self) -> None:
        """Called when all processes have written their files, and before the folder gets its name: a checkpoint has
        checksums or is not there."""
        for folder in self.directory.iterdir():
            if folder.is_dir() and not folder.name.isdigit():
                checksums.write(folder)

    def newest(self) -> int:
        """The step of the newest checkpoint, once all are on disk; 0 if there is none."""
        self.wait()
        return self.manager.latest_step() or 0

    def save(self, step: int, state: TrainState, data: dict, plan: Plan | None = None) -> None:
        """Save the state after `step` steps. `data` is the position in the data, as JSON can hold it."""
        policy = state.policy
        meta = {"format": formats.CHECKPOINT, "step": step, "model": dataclasses.asdict(policy.config),
                "dtype": policy.dtype, "data": data,
                "draft": None if state.draft is None else _draft_meta(state.draft),
                "plan": plan and dataclasses.asdict(plan)}
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        self.check_room(state)
        with checkpoints_written(self.directory):
            self.manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items), force=True)

    def check_room(self, state: TrainState) -> None:
        """Raise InputError if the disk has no room for one more checkpoint: Orbax finds out halfway, with many a stack
        trace from its threads."""
        def check() -> None:
            needed = sum(x.nbytes for x in jax.tree.leaves(_items(state)))
            with checkpoints_written(self.directory):  # the folder may have been removed
                free = shutil.disk_usage(self.directory).free
            if free < needed:
                raise InputError(f"{self.directory}: a checkpoint takes up to {_mebibytes(needed)}, and "
                                 f"{_mebibytes(free)} are free; make room, and the same command goes on from the last "
                                 "one")

        on_main(check)

    def restore(self, state: TrainState) -> tuple[int, TrainState, dict] | None:
        """The latest checkpoint that is as it was written, placed as `state` is, whose own arrays are freed first.

        One that is damaged is set aside with a warning, and the one before it is tried. Returns None if there is none
        at all; raises InputError if all those there are are damaged, or the latest one is of another model or draft.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        wanted = {name: _abstract(tree) for name, tree in _items(state).items()}
        for leaf in jax.tree.leaves(_items(state)) if steps else ():
            leaf.delete()
        for step in steps:
            items, reason = self._read(step, state, wanted)
            if not any_process(items is None):
                return step, _put_back(state, items), items["meta"]["data"]
            if step == steps[-1]:
                raise InputError(f"the checkpoint {self.directory / str(step)} cannot be read ({reason}), and there is "
                                 f"no earlier one; remove it to start over, or choose another output_dir")
            log.warning("the checkpoint %s cannot be read (%s): set aside, going back to the one before it",
                        self.directory / str(step), reason)
            self.set_aside(step)
        return None

    def _read(self, step: int, state: TrainState, wanted: dict[str, Any]) -> tuple[dict | None, str]:
        """(items, "") of a checkpoint, or (None, what is damaged)."""
        folder = self.directory / str(step)
        if not is_checkpoint(folder):
            raise InputError(f"{folder} is no checkpoint of a run; move it away")
        verified = checksums.known(folder)
        if not verified:
            log.debug("the checkpoint %s has no checksums: it is of an earlier jspec", folder)
        # one process reads for all: each would read all files
        reason = on_main(lambda: checksums.damage(folder)) if verified else ""
        if any_process(bool(reason)):
            return None, reason or "process 0 says why"
        try:
            meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except Exception as error:  # what is cut short raises whatever its reader comes to trip over
            return None, brief(error)
        formats.refuse_newer(meta, formats.CHECKPOINT, f"the checkpoint {folder}")  # it is sound: never set aside
        try:
            _check_meta(meta, step)
        except InputError as error:
            return None, brief(error)
        _check_same(folder, meta, state)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        try:
            return {**self.manager.restore(step, args=ocp.args.Composite(**args)), "meta": meta}, ""
        except Exception as error:
            if verified:
                raise InputError(f"the checkpoint {folder} is whole, but not of this configuration ({brief(error)}); "
                                 "give the one it was made with, or choose another output_dir") from error
            return None, brief(error)

    def set_aside(self, step: int) -> None:
        """Move a checkpoint out of the way: its step can be saved again."""
        self.manager.close()
        folder, broken = self.directory / str(step), self.directory.parent / "broken_checkpoints"

        def move() -> None:
            with written(self.directory.parent):
                broken.mkdir(exist_ok=True)
                folder.rename(broken / f"{step}-{len(os.listdir(broken))}")

        on_main(move)
        self.manager = self._open()

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        with checkpoints_written(self.directory):
            self.manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *exception) -> None:
        try:
            with checkpoints_written(self.directory):
                self.manager.close()  # waits for what is being written
        except InputError:
            if kind is None:  # else the one that is on its way says more
                raise


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**20:.2g} MiB"


def _check_meta(meta: Any, step: int | None = None) -> None:
    """Raise InputError for what is not the `meta` of a checkpoint, of that step."""
    kinds: dict[str, Any] = {"step": int, "model": dict, "dtype": str, "data": dict, "draft": (dict, type(None))}
    if not isinstance(meta, dict):
        raise InputError(f"its meta is not an object, but {type(meta).__name__}")
    for name, kind in kinds.items():
        # what a draft was has not always been said
        if not isinstance(meta.get(name), kind) and (name, name in meta) != ("draft", False):
            raise InputError(f"its meta has no {name} that is one")
    if step is not None and meta["step"] != step:
        raise InputError(f"its meta is of step {meta['step']}")


def _check_same(folder: Path, meta: dict, state: TrainState) -> None:
    """Raise InputError if a checkpoint is of another model, or another drafter, than the state is."""
    with _meaning(folder.parent.parent):
        difference = unlike(model_config(meta["model"]), state.policy.config)
        theirs = None if "draft" not in meta else _drafter_name(meta["draft"]) if meta["draft"] else "none"
    ours = "none" if state.draft is None else state.draft.name
    if not difference and theirs not in (None, ours):
        difference = f"its draft is {theirs}, the configuration's is {ours}"
    if difference:
        raise InputError(f"the checkpoint {folder} is of another run: {difference}; give the configuration that it was "
                         "made with, or choose another output_dir")


def run_config(run_dir: str | Path, overrides: Sequence[Override] = ()) -> Config:
    """The configuration of a run, with overrides (`settings.read`). Raises InputError if the directory is not one."""
    path = Path(run_dir) / "config.yaml"
    if not path.exists():
        raise InputError(f"{run_dir} is not the output_dir of a run: it has no config.yaml")
    return load_config(path, overrides)


def _restore(run_dir: str | Path, **items: Any) -> dict[str, Any]:
    """Items of a run's latest checkpoint. Raises InputError if there is none, or it cannot be read."""
    directory = Path(run_dir).absolute() / "checkpoints"
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file, and a folder of checkpoints is needed there; give another run")
    if not has_checkpoints(run_dir):
        raise InputError(f"{run_dir} has no checkpoint yet; train with it first")
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        step = manager.latest_step()
        folder = directory / str(step)
        reason = checksums.damage(folder, tuple(items)) if checksums.known(folder) else ""
        try:
            restored = {} if reason else dict(manager.restore(step, args=ocp.args.Composite(**items)))
        except Exception as error:  # as above
            reason = brief(error)
    if reason:
        raise InputError(f"the checkpoint {folder} cannot be read ({reason}); move it away, and the one before it is "
                         "taken")
    return restored


def _meta(run_dir: str | Path) -> dict:
    meta = _restore(run_dir, meta=ocp.args.JsonRestore())["meta"]
    formats.refuse_newer(meta, formats.CHECKPOINT, f"the latest checkpoint of {run_dir}")
    with _meaning(run_dir):
        _check_meta(meta)
    return meta


@contextmanager
def _meaning(where: str | Path) -> Iterator[None]:
    """Says of a checkpoint's `meta` what cannot be made from it."""
    try:
        yield
    except Exception as error:  # it may hold anything
        raise InputError(f"the latest checkpoint of {where} cannot be used: {brief(error)}; move it away, and the one "
                         "before it is taken") from error


def _everywhere() -> Any:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _placed(specs: Any, config: ModelConfig) -> Any:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        shardings = jax.tree.map(lambda _: _everywhere(), specs, is_leaf=is_spec)
    else:
        shardings = spec_sharding(specs, config, mesh)
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), specs, shardings,
                        is_leaf=is_spec)


def data_position(run_dir: str | Path) -> dict:
    """Where a run's latest checkpoint stands in its data, as `PromptData.restore` takes it. Raises as `load_policy`
    does."""
    return _meta(run_dir)["data"]


def run_plan(run_dir: str | Path) -> Plan:
    """What a run with speculation.k=auto drafts, as of its latest checkpoint; without one, or in another run, nothing
    is chosen. Raises InputError if it cannot be read."""
    fields = _meta(run_dir).get("plan") if has_checkpoints(run_dir) else None
    with _meaning(run_dir):
        return Plan.from_json(fields) if fields else Plan()


def policy_shape(run_dir: str | Path, dtype: str | None = None) -> Policy:
    """The policy of a run's latest checkpoint with `jax.ShapeDtypeStruct`s for weights. Arguments and errors are those
    of `load_policy`."""
    run_config(run_dir)
    meta = _meta(run_dir)
    with _meaning(run_dir):
        return abstract_policy(model_config(meta["model"]), dtype or meta["dtype"])


def load_policy(run_dir: str | Path, dtype: str | None = None) -> Policy:
    """The policy of a run's latest checkpoint, in the training layout, on the mesh of `jax.set_mesh` if there is one.

    Args:
      run_dir: a run's output_dir.
      dtype: what is computed in; default what the run computed in.

    Raises InputError if there is no such run or checkpoint, or it cannot be read.
    """
    policy = policy_shape(run_dir, dtype)
    wanted = _placed(param_specs(policy.config), policy.config)
    return policy.replace(weights=_restore(run_dir, policy=ocp.args.StandardRestore(wanted))["policy"])


def load_draft(run_dir: str | Path, drafter: Drafter | None = None) -> Draft | None:
    """The draft of a run's latest checkpoint, or None if the run had none.

    drafter: whose it is, if that is none of jspec's own (`jspec.drafts.find`). Raises as `load_policy` does, and
    InputError for a draft of another drafter: no file is run because a checkpoint names it.
    """
    if run_config(run_dir).draft.name == "none":
        return None
    meta = _meta(run_dir)
    if "draft" not in meta:
        raise InputError(f"the draft of {run_dir} was saved by an earlier jspec, which did not say what it was; train "
                         "it anew")
    with _meaning(run_dir):
        fields, name = dict(meta["draft"]["config"]), _drafter_name(meta["draft"])
    try:
        drafter = known(name, drafter)
    except InputError as error:
        raise InputError(f"the draft of {run_dir}: {error}") from None
    with _meaning(run_dir):
        config = config_from_fields(drafter, {**fields, "policy": meta["model"]})
        draft = Draft(weights={}, state={}, config=config, drafter=drafter)
        state = jax.tree.map(lambda s: jax.ShapeDtypeStruct(tuple(s["shape"]), s["dtype"], sharding=_everywhere()),
                             meta["draft"]["state"], is_leaf=lambda s: isinstance(s, dict) and "shape" in s)
    weights = _placed(draft.drafter.specs(draft.config), draft.config.policy)
    if not jax.tree.leaves((weights, state)):
        return draft
    items = _restore(run_dir, draft=ocp.args.StandardRestore({"weights": weights, "state": state}))
    return draft.replace(**items["draft"])


def load_run(run_dir: str | Path, overrides: Sequence[Override] = (), dtype: str | None = None,
             drafter: Drafter | None = None) -> tuple:
    """(Config, Policy, Draft or None) of a run's latest checkpoint; see `load_policy`, `load_draft` and `run_config`.

    Raises InputError for a draft that is not finite, too.
    """
    config, policy, draft = run_config(run_dir, overrides), load_policy(run_dir, dtype), load_draft(run_dir, drafter)
    if draft is not None:
        draft.check_finite(run_dir)
    return config, policy, draft
