"""Checkpoints: whole or not there, readable without the run, and clear about what is wrong with
them."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jspec
from jspec import checkpoint, formats
from jspec.best import unknown
from jspec.checkpoint import Checkpoints
from jspec.config import Config
from jspec.errors import InputError
from jspec.learning_sections import GrpoSection
from jspec.model import ModelConfig, init_policy
from jspec.rl.state import at_rest, at_work, init_state, state_specs
from jspec.rl.update_settings import OptimizerSettings, UpdateSettings
from jspec.run_dir import data_position, keep_config, load_draft, load_policy, load_run
from jspec.sections import DraftSection, TrainedModelSection
from jspec.settings import to_yaml
from jspec.sharding import make_mesh

MODEL = ModelConfig(vocab_size=11, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2,
                    num_kv_heads=1, head_dim=8, stop_tokens=(1, 2))
DATA = {"fingerprint": "abc", "iterator": {"next_index": 3}}


@functools.cache
def first_state(draft):
    policy = init_policy(MODEL, jax.random.key(0))
    made = draft and getattr(jspec.drafts, draft)(policy, jax.random.key(1))
    return init_state(policy, made, UpdateSettings(), seed=0)


def make_state(draft="mtp", seed=0):
    """A state of its own buffers, different for every seed, and nothing in it what a fresh state
    would have."""
    state = first_state(draft)
    key = jax.random.wrap_key_data(jax.random.key_data(state.key) + np.uint32(seed))
    moved = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + np.asarray(seed + 1, x.dtype)),
                         state.replace(key=None))
    return moved.replace(key=key)


def values(state):
    return jax.tree.map(np.asarray, state.replace(key=jax.random.key_data(state.key)))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def spoil(directory, item):
    """Cut every array file of an item short."""
    files = [path for path in (directory / item / "d").iterdir()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("draft", ["mtp", "ngram", "suffix", None])
def test_everything_comes_back_as_it_was(tmp_path, draft):
    state = make_state(draft)
    expected = values(state)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(make_state(draft, seed=5)) is None
        checkpoints.save(4, state, DATA)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        step, restored, data = checkpoints.restore(state_specs(state.policy, state.draft,
                                                               UpdateSettings()))
    assert step == 4 and data == DATA
    same(values(restored), expected)


@pytest.mark.parametrize("side, name", [("opt_state", "grpo"), ("draft_opt_state", "draft")])
def test_one_whose_optimizer_counts_its_schedules_steps_is_of_an_earlier_version(tmp_path, side,
                                                                                 name):
    state = make_state()
    weights = state.draft.weights if name == "draft" else state.policy.weights
    rule = optax.chain(optax.clip_by_global_norm(1.0),
                       optax.adamw(optax.linear_schedule(0.0, 1.0, 10)))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state.replace(**{side: rule.init(weights)}), DATA)
    with Checkpoints(tmp_path, keep=1) as checkpoints, pytest.raises(InputError) as error:
        checkpoints.restore(make_state(seed=5))
    assert (f"checkpoints/1 is of an earlier jspec, whose optimizers counted the steps of {name}."
            f"warmup_steps by themselves; go on with that one, or begin anew from its weights: "
            f"jspec export {tmp_path} DIR" in str(error.value))
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_what_happens_to_the_arrays_after_save_is_not_saved(tmp_path):
    expected = values(make_state())
    # NumPy must hold no view of it, or nothing would be donated
    state = jax.tree.map(jnp.copy, make_state())
    spend = jax.jit(lambda x: -x - 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, DATA)
        jax.block_until_ready(jax.tree.map(spend, (state.policy, state.opt_state)))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        same(values(checkpoints.restore(make_state(seed=5))[1]), expected)


def test_optimizers_states_in_host_memory_are_saved_and_restored_there(tmp_path):
    settings = UpdateSettings(state_memory="host", draft_optimizer=OptimizerSettings(
        state_memory="host"))
    expected = values(make_state())
    state = at_rest(jax.tree.map(jnp.copy, make_state()), settings)
    specs = state_specs(state.policy, state.draft, settings)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, DATA)
        work = at_work(state, settings)  # while it is being written
        spend = jax.jit(lambda x: x - 1, donate_argnums=0)
        jax.block_until_ready(jax.tree.map(spend, work.opt_state))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.opt_state, state.draft_opt_state)))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        _, restored, _ = checkpoints.restore(specs)
    same(values(restored), expected)
    for name in ("opt_state", "draft_opt_state", "policy"):
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(getattr(restored, name))}
        assert kinds == {"device" if name == "policy" else "pinned_host"}
    same(values(at_work(restored, settings)), expected)


def test_old_ones_are_removed_by_count(tmp_path):
    state = make_state(None)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state, DATA)
        checkpoints.wait()
        assert sorted(checkpoints.manager.all_steps()) == [3, 4]


@pytest.mark.parametrize("item", ["draft", "optimizer"])
def test_one_that_is_cut_short_is_set_aside_and_the_one_before_it_taken(tmp_path, item, caplog):
    first, second = make_state(), make_state(seed=3)
    expected = values(first)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, first, DATA)
        checkpoints.save(2, second, DATA)
    spoil(tmp_path / "checkpoints" / "2", item)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        step, restored, _ = checkpoints.restore(make_state(seed=5))
        assert step == 1
        same(values(restored), expected)
        checkpoints.save(2, restored, DATA)  # its place is free again
    assert "checkpoints/2 cannot be read" in caplog.text and "set aside" in caplog.text
    assert [path.name for path in (tmp_path / "broken_checkpoints").iterdir()] == ["2-0"]
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore(make_state(seed=5))[0] == 2


def test_when_none_can_be_read_it_says_which_and_what_to_do(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(6, make_state(), DATA)
    spoil(tmp_path / "checkpoints" / "6", "optimizer")
    with Checkpoints(tmp_path, keep=3) as checkpoints, pytest.raises(InputError) as error:
        checkpoints.restore(make_state(seed=5))
    assert ("checkpoints/6 cannot be read" in str(error.value)
            and "choose another output_dir" in str(error.value))
    assert "\n" not in str(error.value)


def make_run(directory, draft="mtp"):
    state = make_state(draft)
    config = Config(output_dir=str(directory), draft=DraftSection(name=draft or "none"))
    keep_config(config)
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(3, state, DATA)
    return state, config


@pytest.mark.parametrize("draft", ["mtp", "ngram", "suffix", None])
def test_policy_and_draft_are_read_from_a_run_without_it(tmp_path, draft):
    state, _ = make_run(tmp_path, draft)
    config, policy, trained = load_run(tmp_path, ["steps=99"])
    assert config.steps == 99 and policy.config == MODEL and policy.dtype == "float32"
    same(policy.weights, state.policy.weights)
    assert (trained is None) == (draft is None)
    if trained is not None:
        assert trained.config == state.draft.config
        same((trained.weights, trained.state), (state.draft.weights, state.draft.state))
    assert load_policy(tmp_path, "bfloat16").dtype == "bfloat16"


def test_a_draft_model_that_is_not_trained_is_in_no_checkpoint(tmp_path):
    """Its weights are read from where they were, by `heads.load_draft` too; one that was trained is
    kept, and is a model for other runs."""
    trained, lies = make_state("draft_model"), tmp_path / "trained"
    frozen, at = dataclasses.replace(trained, draft_opt_state=()), tmp_path / "frozen"
    fresh = DraftSection(name="draft_model", options={"model": {"num_layers": 1}})
    for path, state, section in ((lies, trained, fresh),
                                 (at, frozen, DraftSection(name="draft_model", path=str(lies)))):
        config = Config(output_dir=str(path), draft=section)
        keep_config(config)
        elsewhere = section.elsewhere is not None
        with Checkpoints(path, keep=1, draft_elsewhere=elsewhere) as checkpoints:
            checkpoints.save(3, state, DATA)
        assert elsewhere != (path / "checkpoints" / "3" / "draft").exists()
        with Checkpoints(path, keep=1, draft_elsewhere=elsewhere) as checkpoints:
            restored = checkpoints.restore(state)[1]
        same(restored.policy.weights, state.policy.weights)
        draft = jspec.load_draft(state.policy, path)
        assert draft.config == state.draft.config
        same(draft.weights, state.draft.weights)
    with pytest.raises(InputError, match="is the model .*trained as it is, .* jspec.load_draft"):
        load_draft(at)


@pytest.mark.parametrize("draft", ["mtp", "suffix"])
def test_a_run_is_read_onto_the_mesh(tmp_path, draft):
    make_run(tmp_path, draft)
    with jax.set_mesh(make_mesh(1, 1, 1)):
        policy, draft = load_policy(tmp_path), load_draft(tmp_path)
    assert all(isinstance(x.sharding, jax.sharding.NamedSharding)
               for x in jax.tree.leaves((policy, draft)))


def test_what_is_no_run_says_so(tmp_path):
    with pytest.raises(InputError, match="not the output_dir of a run"):
        load_policy(tmp_path)
    keep_config(Config(output_dir=str(tmp_path)))
    with pytest.raises(InputError, match="has no checkpoint yet"):
        load_policy(tmp_path)


def test_a_run_whose_checkpoint_is_cut_short_says_so(tmp_path):
    make_run(tmp_path)
    spoil(tmp_path / "checkpoints" / "3", "policy")
    with pytest.raises(InputError, match="checkpoints/3 cannot be read"):
        load_policy(tmp_path)


@pytest.mark.parametrize("change, key", [
    ({"seed": 1}, "seed=0, not 1"),
    ({"grpo": GrpoSection(objective="gspo")}, "grpo.objective=grpo, not gspo"),
    ({"draft": DraftSection(options={"depths": 3})}, "draft.options={}, not {'depths': 3}")])
def test_a_run_is_not_resumed_under_another_configuration(tmp_path, change, key):
    config = Config(output_dir=str(tmp_path))
    # a first try that never got to a checkpoint binds nobody
    keep_config(dataclasses.replace(config, **change))
    keep_config(config)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(InputError) as error:
        keep_config(dataclasses.replace(config, **change))
    assert key in str(error.value) and str(tmp_path) in str(error.value)
    assert (tmp_path / "config.yaml").read_text() == before


def test_more_steps_and_another_mesh_are_no_other_run(tmp_path):
    config = Config(output_dir=str(tmp_path))
    keep_config(config)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    longer = dataclasses.replace(config, steps=50, mesh=dataclasses.replace(config.mesh, fsdp=2),
                                 checkpoint=dataclasses.replace(config.checkpoint, keep=9))
    assert keep_config(longer) == ("changed after step 1: steps from 6 to 50, mesh.fsdp from 1 to "
                                   "2, checkpoint.keep from 2 to 9")
    assert (tmp_path / "config.yaml").read_text() == to_yaml(longer)


def test_other_hyper_parameters_are_recorded_each_time_that_they_change(tmp_path):
    config = Config(output_dir=str(tmp_path))
    assert keep_config(config) == ""
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    bolder = dataclasses.replace(config, grpo=GrpoSection(learning_rate=1e-5, clip_low=0.1,
                                                          kl_weight=0.01))
    keep_config(bolder)
    assert keep_config(bolder) == ""  # as the same command, once more
    (tmp_path / "checkpoints" / "9").mkdir()
    assert (keep_config(dataclasses.replace(bolder, model=TrainedModelSection(remat=True)))
            == "changed after step 9: model.remat from false to true")
    with pytest.raises(InputError, match="seed=0, not 1"):
        keep_config(dataclasses.replace(bolder, seed=1))
    lines = (tmp_path / "changes.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 7, "changed": {"grpo.clip_low": [0.2, 0.1], "grpo.kl_weight": [0.0, 0.01],
                                "grpo.learning_rate": [1e-6, 1e-5]}},
        {"step": 9, "changed": {"model.remat": [False, True]}}]


def test_the_data_position_is_json(tmp_path):
    json.dumps(DATA)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(None), DATA)
    assert data_position(tmp_path) == DATA


def flip(folder, item):
    """Change one byte of the item's largest file, whose size stays."""
    path = max((path for path in (folder / item).rglob("*") if path.is_file()),
               key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("item", ["policy", "optimizer", "meta"])
def test_changed_bytes_are_noticed(tmp_path, item, caplog):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, make_state(None), DATA)
        checkpoints.save(2, make_state(None, seed=3), DATA)
    keep_config(Config(output_dir=str(tmp_path), draft=DraftSection(name="none")))
    flip(tmp_path / "checkpoints" / "2", item)
    if item == "optimizer":  # of which a policy reads nothing
        load_policy(tmp_path)
    else:
        with pytest.raises(InputError, match=f"checkpoints/2 cannot be read .{item}/.* is not what "
                           "was written there"):
            load_policy(tmp_path)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore(make_state(None, seed=5))[0] == 1
    assert ("is not what was written there" in caplog.text
            and (tmp_path / "broken_checkpoints" / "2-0").is_dir())


def edit_meta(folder, change):
    path = folder / "meta" / "metadata"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    (folder / checkpoint.checksums.NAME).unlink()  # as earlier versions left it


@pytest.mark.parametrize("change", [
    lambda meta: [], lambda meta: {}, lambda meta: None, lambda meta: meta | {"step": 9},
    lambda meta: meta | {"model": []}, lambda meta: meta | {"data": 7},
    lambda meta: meta | {"draft": "mtp"}])
def test_a_checkpoint_that_says_nothing_of_itself_is_set_aside(tmp_path, change):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, make_state(None), DATA)
        checkpoints.save(2, make_state(None), DATA)
    keep_config(Config(output_dir=str(tmp_path), draft=DraftSection(name="none")))
    edit_meta(tmp_path / "checkpoints" / "2", change)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore(make_state(None, seed=5))[0] == 1


@pytest.mark.parametrize("change, message", [
    (lambda meta: [], "its meta is not an object"), (lambda meta: {}, "its meta has no step"),
    (lambda meta: meta | {"model": {}}, "checkpoint of .* cannot be used"),
    (lambda meta: meta | {"draft": {"config": {"name": "../../evil"}, "state": {}}},
     "drafter '../../evil' is unknown"),
    (lambda meta: meta | {"draft": {"config": {"name": ["mtp"]}, "state": {}}}, "is unknown; "
     "known: "), (lambda meta: meta | {"draft": {"config": {"name": "mtp", "x": 1}, "state": {}}},
                  "cannot be used")])
def test_readers_say_what_they_cannot_use(tmp_path, change, message):
    make_run(tmp_path)
    edit_meta(tmp_path / "checkpoints" / "3", change)
    with pytest.raises(InputError, match=message) as error:
        load_draft(tmp_path)
        load_policy(tmp_path)
    assert "\n" not in str(error.value)


def test_a_newer_checkpoint_is_named_and_stays(tmp_path):
    make_run(tmp_path)
    folder = tmp_path / "checkpoints" / "3"
    assert json.loads((folder / "meta" / "metadata").read_text())["format"] == formats.CHECKPOINT
    edit_meta(folder, lambda meta: {"format": 99, "elsewhere": meta})
    said = (r"checkpoint .* has format 99, and this jspec \(.*\) reads formats up to 3: a newer "
            r"jspec wrote it")
    with pytest.raises(InputError, match=said):
        load_policy(tmp_path)
    with Checkpoints(tmp_path, keep=3) as checkpoints, pytest.raises(InputError, match=said):
        checkpoints.restore(make_state(None))
    assert folder.is_dir()


def test_a_checkpoint_whose_drafter_is_named_in_its_config_is_read(tmp_path):
    state, _ = make_run(tmp_path)

    def older(meta):
        draft = dict(meta["draft"])
        return (meta | {"format": 1, "draft": draft
                        | {"config": draft["config"] | {"name": draft.pop("drafter")}}})

    edit_meta(tmp_path / "checkpoints" / "3", older)
    assert load_draft(tmp_path).config == state.draft.config
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore(make_state())[0] == 3


def test_checksums_of_nothing_vouch_for_nothing(tmp_path):
    (tmp_path / checkpoint.checksums.NAME).write_text("{}")
    assert checkpoint.checksums.damage(tmp_path) == "jspec_checksums.json names no file"


def test_a_checkpoint_of_an_earlier_version_has_no_checksums_and_is_read(tmp_path):
    state, _ = make_run(tmp_path)
    edit_meta(tmp_path / "checkpoints" / "3",
              lambda meta: {k: x for k, x in meta.items() if k != "format"})
    same(load_policy(tmp_path).weights, state.policy.weights)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(make_state(seed=5))[0] == 3


def test_a_good_checkpoint_of_another_configuration_is_never_set_aside(tmp_path):
    """As when config.yaml was lost and another one is started in its place."""
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(3, make_state(), DATA)
    wider = init_policy(dataclasses.replace(MODEL, hidden_size=32), jax.random.key(0))
    other = init_state(wider, None, UpdateSettings(), seed=0)
    muon = init_state(first_state("mtp").policy,
                      jspec.drafts.mtp(first_state("mtp").policy, jax.random.key(1)),
                      UpdateSettings(draft_optimizer=OptimizerSettings("muon")), seed=0)
    for state, message in ((other, "of another run: its hidden_size is 16, the policy's is 32"),
                           (make_state("ngram"), "its draft is mtp, the configuration's is ngram"),
                           (jax.tree.map(jnp.copy, muon),
                            "is whole, but not of this configuration")):
        with Checkpoints(tmp_path, keep=3) as checkpoints, pytest.raises(InputError, match=message):
            checkpoints.restore(state)
    assert ((tmp_path / "checkpoints" / "3").is_dir()
            and not (tmp_path / "broken_checkpoints").exists())


def test_a_folder_of_somebody_elses_is_not_moved(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, make_state(None), DATA)
    (tmp_path / "checkpoints" / "200").mkdir()
    (tmp_path / "checkpoints" / "200" / "model.pt").write_text("theirs")
    with (Checkpoints(tmp_path, keep=3) as checkpoints,
          pytest.raises(InputError, match="200 is no checkpoint of a run")):
        checkpoints.restore(make_state(None, seed=5))
    assert (tmp_path / "checkpoints" / "200" / "model.pt").exists()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.checksums, "write", full)  # in Orbax's thread, after all else
    with pytest.raises(InputError,
                       match="cannot be written to .*No space left on device.*make room") as error:
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(1, make_state(None), DATA)
    assert "\n" not in str(error.value)
    assert not checkpoint.has_checkpoints(tmp_path)


def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path, monkeypatch):
    needed = sum(x.nbytes for x in jax.tree.leaves(make_state(None)))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage",
                            lambda path: types.SimpleNamespace(free=needed // 2))
        with pytest.raises(InputError,
                           match="a checkpoint takes up to .* MiB, and .* MiB are free; make room"):
            checkpoints.save(1, make_state(None), DATA)
        assert not list((tmp_path / "checkpoints").iterdir())
        monkeypatch.undo()
        (tmp_path / "checkpoints").rmdir()  # while the run goes on
        with pytest.raises(InputError, match="cannot be written to .*No such file or directory"):
            checkpoints.save(1, make_state(None), DATA)


def test_a_file_where_checkpoints_should_be(tmp_path):
    keep_config(Config(output_dir=str(tmp_path)))
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(InputError, match="checkpoints is a file"):
        load_policy(tmp_path)


def test_a_metric_that_no_step_has_is_named_with_one_like_it():
    first = {"step": 7, "reward": 0.5, "reward_std": 0.1, "loop_k": [1], "kl": None}
    assert unknown(None, first) == unknown("reward", first) == unknown("eval/pass@1", first) == ""
    assert "checkpoint.best=rewrad is no number of the record of step 7" in unknown("rewrad", first)
    assert "did you mean reward?" in unknown("rewrad", first) and "kl is no" in unknown("kl", first)


@pytest.mark.parametrize("best_is, best", [("max", 2), ("min", 4)])
def test_the_best_is_kept_beside_the_newest_and_found_again(tmp_path, best_is, best):
    state = make_state(None)
    with Checkpoints(tmp_path, 1, "eval/pass@1", best_is) as checkpoints:
        assert checkpoints.best() == 0
        values = (0.5, 0.75, 0.75, 0.25, None, float("nan"))
        for step, value in enumerate(values, start=1):
            metrics = {"reward": 1.0, "eval/pass@1": value, "list": [1], "step": step}
            better = checkpoints.better(metrics)
            assert better == (step in {"max": (1, 2), "min": (1, 4)}[best_is])
            if step != 3:  # as good as the one before it, and not due
                checkpoints.save(step, state, DATA, metrics=metrics)
        assert checkpoints.best() == best and checkpoints.newest() == 6
    with Checkpoints(tmp_path, 1, "eval/pass@1", best_is) as checkpoints:
        assert sorted(checkpoints.manager.all_steps()) == [best, 6] and checkpoints.best() == best
        assert not checkpoints.better({"eval/pass@1": {"max": 0.75, "min": 0.25}[best_is]})
        assert checkpoints.restore(make_state(None))[0] == 6  # it goes on from the newest
    with Checkpoints(tmp_path, 1, "reward") as checkpoints:  # of which both have as much
        assert checkpoints.best() == 6
    with Checkpoints(tmp_path, 1, "loss") as checkpoints:
        assert checkpoints.best() == 0 and checkpoints.better({"loss": 3})
