import dataclasses
import json

import jax
import pytest

from jspec.config import load_config
from jspec.drafts import find
from jspec.errors import InputError
from jspec.hlo import Instruction
from jspec.hub.names import SHORT_NAMES
from jspec.model import abstract_policy
from jspec.prepare import check_draft, check_fresh_draft, make_state_specs
from jspec.rl.state import state_specs
from jspec.rl.update_settings import UpdateSettings
from jspec.scale.memory import rollout_shape, shard_bytes, state_bytes
from jspec.scale.programs import once
from jspec.scale.published import published, shape_of, subject
from jspec.sections import ModelSection


def test_every_short_name_has_a_published_shape():
    assert {name for name in SHORT_NAMES.values() if isinstance(name, str)} <= published().keys()


def test_shapes_sum_up_to_the_parameters_that_are_published():
    for name, entry in published().items():
        policy = abstract_policy(shape_of(ModelSection(name=name)), "bfloat16")
        assert shard_bytes(policy) == 4 * entry["parameters"], name


@pytest.mark.parametrize(("name", "parameters"), [
    ("qwen3-8b", 8.19e9), ("qwen3-30b-a3b", 30.53e9), ("Qwen/Qwen3-235B-A22B", 235.09e9)])
def test_bytes_by_kind_are_those_of_the_published_shape(name, parameters):
    """14 bytes a parameter: a float32 master and two moments, and the rollout's bfloat16 copy."""
    policy = abstract_policy(shape_of(ModelSection(name=name)), "bfloat16")
    state = state_specs(policy, None, UpdateSettings())
    kinds = state_bytes(state, None) | {"copy": shard_bytes(rollout_shape(policy, "rollout"))}
    expected = {"master weights": 4, "optimizer": 8, "draft": 0, "copy": 2}
    assert kinds == pytest.approx({kind: n * parameters for kind, n in expected.items()}, rel=0.01)


def test_a_draft_is_its_masters_and_its_moments():
    policy = abstract_policy(shape_of(ModelSection(name="qwen3-8b")), "bfloat16")
    draft = check_fresh_draft(policy, find("mtp"), {}, "options")
    weights = sum(x.size for x in jax.tree.leaves(draft.weights))
    found = state_bytes(state_specs(policy, draft, UpdateSettings()), None)["draft"]
    assert found == pytest.approx(12 * weights, rel=1e-3)
    assert 0.2e9 < weights < 0.25e9  # a block of 193 million, and two inputs to one


def test_a_config_json_says_what_no_table_knows(tmp_path):
    fields = dict(published()["Qwen/Qwen3-8B"]["config"]) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert shape_of(ModelSection(name="my/own"), str(tmp_path)).num_layers == 3
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match="config.json cannot be read: it is not JSON"):
        shape_of(ModelSection(name="my/own"), str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json: architecture model_type None without"):
        shape_of(ModelSection(name="my/own"), str(tmp_path))
    with pytest.raises(InputError, match=r"--model path/to/config.json \(known without: Hugging"):
        shape_of(ModelSection(name=str(tmp_path / "nothing")))


QWEN25 = "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.mark.parametrize(("policy", "small"), [("qwen3-8b", "qwen3-0.6b"),
                                               ("Qwen/Qwen2.5-7B-Instruct", QWEN25)])
def test_a_draft_model_by_name_is_its_shape_and_learns_no_more_than_it_did(policy, small):
    """Nothing is fetched. Masters alone, as a run has them that does not train it; of 128 ids that
    only the policy has room for none is a token."""
    named = [f"model.name={policy}", "draft.name=draft_model", f"draft.path={small}"]
    weights = published()[SHORT_NAMES.get(small, small)]["parameters"]
    for more, bytes_each in ([], 4), (["draft.train=true"], 12):
        config, model = subject(load_config(None, [*named, *more]))
        draft = check_draft(config, model)
        assert sum(x.size for x in jax.tree.leaves(draft.weights)) == weights
        state = make_state_specs(config, abstract_policy(model, "bfloat16"))
        assert state_bytes(state, None)["draft"] == pytest.approx(bytes_each * weights, rel=1e-3)
    assert model.tokenless == (((151936, 152064),) if small == QWEN25 else ())


def test_a_draft_model_of_another_tokenizer_is_refused():
    config, model = subject(load_config(None, [
        "model.name=qwen3-8b", "draft.name=draft_model", "draft.path=smollm2-135m-instruct"]))
    with pytest.raises(InputError, match="the model only 49152 ids"):
        check_draft(config, model)


def test_catching_up_takes_no_turn():
    loop = Instruction("f32[]", "while", (), "jit(f)/decode/while/body/propose/catch_up/while", (),
                       "main", "")
    assert once(loop) == 0
    assert once(dataclasses.replace(loop, scope="jit(f)/decode/while")) == 1
