"""P-EAGLE checkpoints: the logits of the reference implementation, bit-exact round trips, one line
for every fault."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jspec
from jspec import hub
from jspec.errors import InputError
from jspec.heads import not_run_by_vllm, publish
from jspec.hub import eagle3
from tests.hub.checkpoints import GOLDEN, copy, edit_config, edit_tensors, largest_difference

HOME = GOLDEN / "drafters"
CASES = ["peagle", "peagle_qwen3_fc_norm_reduced", "peagle_two_layers_sliding"]


@pytest.fixture(scope="module")
def policy():
    return hub.load(str(GOLDEN / "eagle3_target"), dtype="float32")


@pytest.mark.parametrize("case", CASES)
def test_logits_match_the_reference_at_every_depth(policy, case):
    assert largest_difference(policy, jspec.load_draft(policy, HOME / case), HOME / case,
                              80) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case, changes", [
    (CASES[0], {"mask_token": 30}), (CASES[0], {"aux_depths": (1, 3, 5)}),
    (CASES[1], {"norm_before_residual": False}), (CASES[2], {"window": (6, 0)}),
    (CASES[2], {"norm_before_fc": False})])
def test_the_golden_files_would_show_what_is_not_honoured(policy, case, changes):
    draft = eagle3.read(HOME / case, policy)
    wrong = draft.replace(config=dataclasses.replace(draft.config, **changes))
    assert largest_difference(policy, wrong, HOME / case, 80) > 0.01


@pytest.mark.parametrize("case", CASES)
def test_read_write_read_is_bit_exact(policy, case, tmp_path):
    draft = eagle3.read(HOME / case, policy)
    config = draft.config
    assert (draft.name, config.mask_token, config.depths, config.own_embed) == ("peagle", 31, 3,
                                                                                True)
    publish(draft, tmp_path / "out", "speculators")
    read_back(policy, draft, tmp_path / "out")
    want, got = (load_file(HOME / case / "model.safetensors"),
                 load_file(tmp_path / "out" / "model.safetensors"))
    assert set(got) == set(want)
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].tobytes() == x.tobytes(), name
    want, got = (json.loads((path / "config.json").read_text())
                 for path in (HOME / case, tmp_path / "out"))
    full, of = ["full_attention"] * config.block.num_layers, "transformer_layer_config"
    same = set(want) - {"transformers_version", "target_hidden_size", "speculators_config",
                        of, "tie_word_embeddings"}
    assert {key: got[key] for key in same} == {key: want[key] for key in same}
    assert (got[of].get("layer_types") or full) == (want[of].get("layer_types") or full)


def read_back(policy, draft, directory):
    again = jspec.load_draft(policy, directory)
    assert (again.name, again.config) == (draft.name, draft.config)
    jax.tree.map(np.testing.assert_array_equal, (again.weights, again.state),
                 (draft.weights, draft.state))


@pytest.mark.parametrize("case", CASES)
def test_servers_take_it_for_eagle3_with_a_token_behind_the_first_draft(policy, case, tmp_path):
    draft = eagle3.read(HOME / case, policy)
    directory = publish(draft, tmp_path / "out")
    hf = json.loads((directory / "config.json").read_text())
    assert "eagle3" in hf["architectures"][0].lower() and "speculators_model_type" not in hf
    read_back(policy, draft, directory)
    edit_config(directory, mask_token_id=None, ptd_token_id=31)
    read_back(policy, draft, directory)
    assert not_run_by_vllm(draft) == []
    assert not_run_by_vllm(draft, "speculators") == (
        ["fc_norm of P-EAGLE in this layout"] if draft.config.fc_norm else [])


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


@pytest.mark.parametrize("config, tensors, message", [
    ({}, drop("mask_hidden"), "of a P-EAGLE draft these tensors are missing: mask_hidden"),
    ({}, drop("embed_tokens.weight"), "tensor embed_tokens.weight is missing, and "
     "embed_requires_grad in config.json says that it was trained"),
    ({"mask_token_id": None}, None, "has no mask_token_id"),
    ({"mask_token_id": 32}, None,
     "peagle draft: mask_token = 32 is outside the policy's vocabulary of 32"),
    ({"pard_token": 30}, None, "config.json has 31 as mask_token_id, and 30 as pard_token, which "
     "contradict each other; keep what is true"),
    ({"speculators_model_type": "eagle3", "architectures": ["Eagle3DraftModel"],
      "mask_token_id": None}, None,
     "no place in an EAGLE-3 draft of this config: mask_hidden")])
def test_one_line_for_every_fault(policy, tmp_path, config, tensors, message):
    directory = edit_config(copy("drafters/peagle", tmp_path / "x"), **config)
    if tensors is not None:
        edit_tensors(directory, tensors)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        jspec.load_draft(policy, directory)
    assert "\n" not in str(error.value)
