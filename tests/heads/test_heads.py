"""Trained drafts from directories, runs and what ships; and what is said of those that do not
fit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jspec
from jspec.heads import SHIPPED, files
from tests.speculate import tiny


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, layers=2, heads=4, kv_heads=2, hidden=32, scale=0.2)


@pytest.fixture
def directory(policy, tmp_path):
    draft = tiny.shaken(jspec.drafts.mtp(policy, jax.random.key(1), blocks=2, vocab=[1, 2, 5, 9]))
    files.write(draft, tmp_path)
    return tmp_path


def test_a_round_trip_is_bit_exact(policy, directory, tmp_path_factory):
    first = jspec.load_draft(policy, directory)
    assert first.state["vocab"].tolist() == [1, 2, 5, 9] and first.state["vocab"].dtype == jnp.int32
    assert {x.dtype for x in jax.tree.leaves(first.weights)} == {np.dtype(np.float32)}
    second = tmp_path_factory.mktemp("again")
    files.write(first, second)
    for name in (files.WEIGHTS, files.CONFIG):
        assert (directory / name).read_bytes() == (second / name).read_bytes()
    exact = tmp_path_factory.mktemp("exact")
    files.write(first, exact, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, first.weights,
                 jspec.load_draft(policy, exact).weights)


def test_a_newer_head_is_named_and_an_older_one_read(policy, directory):
    path = directory / files.CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"format": config["format"] + 1, "drafter": "of tomorrow"}))
    with pytest.raises(jspec.InputError,
                       match=r"config.json has format 2, and this jspec .* reads formats up to 1"):
        jspec.load_draft(policy, directory)
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "format"}))
    assert jspec.load_draft(policy, directory).name == config["drafter"]


def change(directory, edit):
    tensors = load_file(directory / files.WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / files.WEIGHTS)


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.pop("weights.blocks.1.proj"), "tensor weights.blocks.1.proj is missing"),
    (lambda t: t.update({"weights.more": np.zeros(2, np.float32)}),
     "tensor weights.more has no place in a mtp draft"),
    (lambda t: t.update({"weights.blocks.0.proj": np.zeros((2, 2), np.float32)}),
     "tensor weights.blocks.0.proj has shape [2, 2], but the config says [32, 64]"),
    (lambda t: t.pop("state.vocab"),
     "the config says vocab_size 4, and tensor state.vocab is missing"),
    (lambda t: t.update({"state.vocab": np.int32([1, 2, 5])}),
     "vocab_size 4, and tensor state.vocab has 3 tokens"),
    (lambda t: t.update({"state.vocab": np.int32([1, 2, 5, 11])}),
     "vocab holds token 11, outside the policy's 11"),
    (lambda t: t.update({"state.vocab": np.int32([1, 2, 5, 5])}), "vocab holds a token twice"),
])
def test_tensors_that_do_not_fit_are_named(policy, directory, edit, message):
    change(directory, edit)
    with pytest.raises(jspec.InputError, match=message.replace("[", r"\[").replace("]", r"\]")):
        jspec.load_draft(policy, directory)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_draft_that_is_not_finite_is_refused(policy, directory, value):
    def spoil(tensors):
        tensors["weights.blocks.1.proj"][3, 4] = value

    change(directory, spoil)
    with pytest.raises(jspec.InputError,
                       match=r"is not finite: its weight blocks\.1\.proj holds NaN or infinity"):
        jspec.load_draft(policy, directory)


@pytest.mark.parametrize("edit, message", [
    ({"drafter": "../../x"}, "drafter '../../x' is unknown"),
    ({"drafter": ["mtp"]}, "is unknown; known: "),
    ({"drafter": "base"}, "drafter 'base' is unknown"),
    ({"options": "many"}, "has 'many' as options; expected an"),
    ({"options": {"depths": "many"}}, "is not the config of a draft"),
    ({"options": {"wide": 1}}, "unexpected keyword"),
    ({"policy": 3}, "is not the config of a draft"),
    ({"policy": {"vocab_size": 11}}, "is not the config of a draft"),
])
def test_a_config_that_is_none_of_a_draft(policy, directory, edit, message):
    config = json.loads((directory / files.CONFIG).read_text())
    (directory / files.CONFIG).write_text(json.dumps({**config, **edit}))
    with pytest.raises(jspec.InputError, match=message) as e:
        jspec.load_draft(policy, directory)
    assert "\n" not in str(e.value)


def test_the_drafter_is_the_one_that_is_named_and_no_option(policy, directory):
    config = json.loads((directory / files.CONFIG).read_text())
    config["options"]["name"] = "os"  # nothing of this name is imported
    (directory / files.CONFIG).write_text(json.dumps(config))
    assert jspec.load_draft(policy, directory).name == "mtp"


@pytest.mark.parametrize("source", [3, None, "x" * 300, "~nobody-of-this-name/x", "a\0b"])
def test_what_cannot_be_a_place(policy, source):
    with pytest.raises(jspec.InputError) as e:
        jspec.load_draft(policy, source)
    assert "\n" not in str(e.value)


def test_files_that_are_broken_or_of_another_policy(policy, directory):
    other = tiny.policy(12, layers=2, heads=4, kv_heads=2, hidden=32)
    with pytest.raises(jspec.InputError, match="its vocab_size is 11, the policy's is 12"):
        jspec.load_draft(other, directory)
    path = directory / files.WEIGHTS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(jspec.InputError, match="cut short: [0-9]+ bytes where tensor"):
        jspec.load_draft(policy, directory)
    config = json.loads((directory / files.CONFIG).read_text())
    (directory / files.CONFIG).write_text(json.dumps({**config, "drafter": "oracle"}))
    with pytest.raises(jspec.InputError, match="drafter 'oracle' is unknown; known: .*mtp"):
        jspec.load_draft(policy, directory)
    (directory / files.CONFIG).write_text(json.dumps({"drafter": "mtp"}))
    with pytest.raises(jspec.InputError, match="is not the config of a draft"):
        jspec.load_draft(policy, directory)
    shutil.rmtree(directory)
    with pytest.raises(jspec.InputError, match="no draft at"):
        jspec.load_draft(policy, directory)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_small_and_loads(name):
    home = jspec.heads.files.Path(jspec.heads.__file__).parent / name
    assert sum(path.stat().st_size for path in home.iterdir()) < 10e6
    assert (home / "README.md").is_file()
    draft = jspec.load_draft(jspec.load(name, dtype="float32"), name)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(draft.weights))
