"""Checkpoints of a run: all that training carries, saved in the background, kept by count, whole or
not there at all.

`output_dir/checkpoints/STEP` holds the items `policy`, its `adapters`, `reference` (where it
moves), `draft`, `optimizer` (with counters and key) and `meta` (model config, position in the
data), so that a policy can be read without the rest, and the checksums of their files, which are
compared before they are read; `output_dir/config.yaml` is the run's configuration.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jspec import checksums, formats
from jspec.best import best_step, most, numbers, worth
from jspec.choosing import Plan
from jspec.distributed import any_process, on_main
from jspec.drafts import Draft
from jspec.drafts.base import model_config, unlike
from jspec.errors import InputError
from jspec.output_dir import brief, checkpoints_written, is_checkpoint, written
from jspec.rl.state import COUNTERS, TrainState
from pallas_kernels.noise import key_words

log = logging.getLogger(__name__)

def has_checkpoints(run_dir: str | Path) -> bool:
    """Whether there is a whole checkpoint: one that is still being written has a longer name."""
    return any(path.name.isdigit() for path in Path(run_dir).glob("checkpoints/*"))


def _words(key: Any) -> Any:
    """What is saved of a typed key, or the shape of that."""
    shape = jax.eval_shape(key_words, key)
    return key_words(key) if isinstance(key, jax.Array) else jax.ShapeDtypeStruct(
        shape.shape, shape.dtype, sharding=key.sharding)


def _put_back(state: TrainState, items: dict[str, Any]) -> TrainState:
    optimizer = items["optimizer"]
    draft = state.draft.replace(**items["draft"]) if "draft" in items else state.draft
    policy = state.policy.replace(weights=items["policy"], adapters=items.get("adapters"))
    return state.replace(policy=policy, draft=draft, reference=items.get("reference"),
                         opt_state=optimizer["policy"], draft_opt_state=optimizer["draft"],
                         key=jax.random.wrap_key_data(optimizer["key"], impl="threefry2x32"),
                         **{name: optimizer[name] for name in COUNTERS})


def _draft_meta(draft: Draft) -> dict:
    """What a draft is made again from, as JSON can hold it; its policy's config is the policy's."""
    fields = dataclasses.asdict(draft.config)
    del fields["policy"]
    state = jax.tree.map(lambda x: {"shape": list(x.shape), "dtype": str(x.dtype)}, draft.state)
    return {"drafter": draft.name, "config": fields, "state": state}


def drafter_name(meta: dict) -> Any:
    """The name of a draft's drafter (of its `meta`, which may hold anything), which once was in its
    config."""
    return meta["drafter"] if "drafter" in meta else meta["config"]["name"]


def to_restore(tree: Any) -> Any:
    """What Orbax is asked for. It has to be told where: the default device, of what nobody
    places."""
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                                       sharding=x.sharding or default), tree)


class Checkpoints:
    """The checkpoints of one run.

        with Checkpoints(output_dir, keep=2) as checkpoints:
            restored = checkpoints.restore(specs)           # (step, state, data position), or None
            checkpoints.save(step, state, data.state())     # copies now, writes in the background

    Saving, waiting and leaving raise InputError where a checkpoint, perhaps an earlier one, could
    not be written.
    """

    def __init__(self, output_dir: str | Path, keep: int, best: str | None = None,
                 best_is: str = "max", draft_elsewhere: bool = False) -> None:
        """
        Args:
          draft_elsewhere: the draft's weights never change and lie where they can be read from
            again: they are not saved, and are not restored.
          keep: how many of the newest are kept.
          best: a metric: beside them the one is kept that has the best value of it.
          best_is: "max" or "min".
        """
        self.directory = Path(output_dir).absolute() / "checkpoints"
        self.keep, self.worth, self.draft_elsewhere = keep, worth(best, best_is), draft_elsewhere
        with checkpoints_written(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policies: list[Any] = [checkpoint_managers.LatestN(n=self.keep)]
        if self.worth:
            policies.append(checkpoint_managers.BestN(get_metric_fn=self.worth, n=1,
                                               keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=self.worth, cleanup_tmp_directories=True, enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums))
        manager = ocp.CheckpointManager(self.directory, options=options)
        self.most = most(manager, self.worth)
        return manager

    def _add_checksums(self) -> None:
        """Called when all processes have written their files, and before the folder gets its name:
        a checkpoint has checksums or is not there."""
        for folder in self.directory.iterdir():
            if folder.is_dir() and not folder.name.isdigit():
                checksums.write(folder)

    def _items(self, state: TrainState) -> dict[str, Any]:
        """The arrays of a state, or their shapes, by item; those without any are left out."""
        draft = None if state.draft is None else {"weights": state.draft.weights,
                                                  "state": state.draft.state}
        if draft is not None and self.draft_elsewhere:
            del draft["weights"]
        items = {
            "policy": state.policy.weights,
            "adapters": state.policy.adapters,
            "reference": state.reference,
            "draft": draft,
            "optimizer": {"policy": state.opt_state, "draft": state.draft_opt_state,
                          "key": _words(state.key),
                          **{name: getattr(state, name) for name in COUNTERS}},
        }
        return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}

    def newest(self) -> int:
        """The step of the newest checkpoint, once all are on disk; 0 if there is none."""
        self.wait()
        return self.manager.latest_step() or 0

    def best(self) -> int:
        """The step of the best checkpoint, once all are on disk; 0 if none has the metric, or there
        is none."""
        self.wait()
        return best_step(self.manager, self.worth)

    def better(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a step with these metrics is better than every checkpoint there is."""
        return self.worth is not None and self.worth(metrics) > self.most

    def save(self, step: int, state: TrainState, data: dict, plan: Plan | None = None,
             metrics: Mapping[str, Any] | None = None) -> None:
        """Save the state after `step` steps. `data` is the position in the data, as JSON can hold
        it; metrics: of the step, one of which may be what the best checkpoint is chosen by."""
        policy = state.policy
        meta = {"format": formats.CHECKPOINT, "step": step,
                "model": dataclasses.asdict(policy.config), "dtype": policy.dtype, "data": data,
                "lora": policy.lora and dataclasses.asdict(policy.lora),
                "draft": None if state.draft is None else _draft_meta(state.draft),
                "plan": plan and dataclasses.asdict(plan)}
        items = {name: ocp.args.StandardSave(tree) for name, tree in self._items(state).items()}
        self.check_room(state)
        with checkpoints_written(self.directory):
            self.manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items),
                              metrics=numbers(metrics or {}), force=True)
        if self.worth:
            self.most = max(self.most, self.worth(metrics or {}))

    def check_room(self, state: TrainState) -> None:
        """Raise InputError if the disk has no room for one more checkpoint of a state, of which the
        shapes will do: Orbax finds out halfway, with many a stack trace from its threads."""
        def check() -> None:
            needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._items(state)))
            with checkpoints_written(self.directory):  # the folder may have been removed
                free = shutil.disk_usage(self.directory).free
            if free < needed:
                raise InputError(f"{self.directory}: a checkpoint takes up to "
                                 f"{_mebibytes(needed)}, and {_mebibytes(free)} are free; make "
                                 "room, and the same command goes on from the last one")

        on_main(check)

    def restore(self, specs: TrainState) -> tuple[int, TrainState, dict] | None:
        """The latest checkpoint that is as it was written, shaped and placed as `specs`
        (`rl.state.state_specs`) are.

        One that is damaged is set aside with a warning, and the one before it is tried. Returns
        None if there is none at all; raises InputError if all those there are are damaged, or the
        latest one is of another model or draft.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            items, reason = self._read(step, specs)
            if not any_process(items is None):
                return step, _put_back(specs, items), items["meta"]["data"]
            if step == steps[-1]:
                raise InputError(f"the checkpoint {self.directory / str(step)} cannot be read "
                                 f"({reason}), and there is no earlier one; remove it to start "
                                 "over, or choose another output_dir")
            log.warning("the checkpoint %s cannot be read (%s): set aside, going back to the one "
                        "before it", self.directory / str(step), reason)
            self.set_aside(step)
        return None

    def _read(self, step: int, specs: TrainState) -> tuple[dict | None, str]:
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
            meta = self.manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except Exception as error:
            # what is cut short raises whatever its reader comes to trip over
            return None, brief(error)
        # it is sound: never set aside
        formats.refuse_newer(meta, formats.CHECKPOINT, f"the checkpoint {folder}")
        try:
            check_meta(meta, step)
        except InputError as error:
            return None, brief(error)
        _check_same(folder, meta, specs)
        args = {name: ocp.args.StandardRestore(to_restore(tree))
                for name, tree in self._items(specs).items()}
        try:
            return {**self.manager.restore(step, args=ocp.args.Composite(**args)), "meta": meta}, ""
        except Exception as error:
            if verified:
                _check_counts(folder, specs)
                raise InputError(f"the checkpoint {folder} is whole, but not of this configuration "
                                 f"({brief(error)}); give the one it was made with, or choose "
                                 "another output_dir") from error
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


def check_meta(meta: Any, step: int | None = None) -> None:
    """Raise InputError for what is not the `meta` of a checkpoint, of that step."""
    kinds: dict[str, Any] = {"step": int, "model": dict, "dtype": str, "data": dict,
                             "draft": (dict, type(None))}
    if not isinstance(meta, dict):
        raise InputError(f"its meta is not an object, but {type(meta).__name__}")
    for name, kind in kinds.items():
        # what a draft was has not always been said
        if not isinstance(meta.get(name), kind) and (name, name in meta) != ("draft", False):
            raise InputError(f"its meta has no {name} that is one")
    if step is not None and meta["step"] != step:
        raise InputError(f"its meta is of step {meta['step']}")


def _check_same(folder: Path, meta: dict, state: TrainState) -> None:
    """Raise InputError if a checkpoint is of another model, or another drafter, than the state
    is."""
    with meaning(folder.parent.parent):
        difference = unlike(model_config(meta["model"]), state.policy.config)
        theirs = (None if "draft" not in meta else drafter_name(meta["draft"]) if meta["draft"]
                  else "none")
    ours = "none" if state.draft is None else state.draft.name
    if not difference and theirs not in (None, ours):
        difference = f"its draft is {theirs}, the configuration's is {ours}"
    if difference:
        raise InputError(f"the checkpoint {folder} is of another run: {difference}; give the "
                         "configuration that it was made with, or choose another output_dir")


def _check_counts(folder: Path, specs: TrainState) -> None:
    """Raise InputError for a checkpoint of which an optimizer counts the steps of its schedule, as
    those of an earlier jspec did (`jspec.rl.optimizers`)."""
    def counts(tree: Any) -> int:
        paths, _ = jax.tree_util.tree_flatten_with_path(tree)
        return sum(jax.tree_util.keystr(path[-1:], simple=True) == "count" for path, _ in paths)

    try:
        with ocp.StandardCheckpointer() as reader:
            theirs = reader.metadata(folder / "optimizer").item_metadata.tree
    except Exception:  # whatever it is, it could not be restored
        return
    for side, section, ours in (("policy", "grpo", specs.opt_state),
                                ("draft", "draft", specs.draft_opt_state)):
        if counts(theirs[side]) > counts(ours):
            run = folder.parent.parent
            raise InputError(f"the checkpoint {folder} is of an earlier jspec, whose optimizers "
                             f"counted the steps of {section}.warmup_steps by themselves; go on "
                             f"with that one, or begin anew from its weights: jspec export {run} "
                             "DIR, then model.name=DIR and another output_dir")


@contextmanager
def meaning(where: str | Path) -> Iterator[None]:
    """Says of a checkpoint's `meta` what cannot be made from it."""
    try:
        yield
    except Exception as error:  # it may hold anything
        raise InputError(f"the latest checkpoint of {where} cannot be used: {brief(error)}; move "
                         "it away, and the one before it is taken") from error
