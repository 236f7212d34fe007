"""EAGLE-3 checkpoints: the logits of the reference implementation, bit-exact round trips, one line
for every fault."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import jspec
from jspec import hub
from jspec.errors import InputError
from jspec.heads import not_run_by_vllm, publish
from jspec.hub import eagle3
from jspec.hub.eagle3_config import FLAGS
from tests.hub.checkpoints import GOLDEN, copy, edit_config, edit_tensors, largest_difference
from tests.speculate import tiny

CASES = ["eagle3_specforge", "eagle3_vllm", "eagle3_speculators", "eagle3_speculators_qwen3",
         "eagle3_speculators_window", "eagle3_speculators_layers", "eagle3_vllm_layers"]
AUX = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def policy():
    return hub.load(str(GOLDEN / "eagle3_target"), dtype="float32")


def same(a, b):
    assert a.config == b.config
    jax.tree.map(np.testing.assert_array_equal, (a.weights, a.state), (b.weights, b.state))


@pytest.mark.parametrize("case", CASES)
def test_logits_match_the_reference_at_every_depth(policy, case):
    assert largest_difference(policy, eagle3.read(GOLDEN / case, policy), GOLDEN / case, 60) < 1e-4


def test_the_golden_files_cover_the_layouts_and_the_flags(policy):
    drafts = {case: eagle3.read(GOLDEN / case, policy) for case in CASES}
    configs = [draft.config for draft in drafts.values()]
    for flag in (*FLAGS, "own_embed"):
        assert {getattr(c, flag) for c in configs} == {False, True}
    assert {c.depths for c in configs} == {3}
    assert [c.vocab_size for c in configs] == [20, 0, 12, 25, 0, 20, 0]
    assert ([c.aux_depths for c in configs]
            == [(1, 4, 6), (0, 3, 5), (2, 3, 6), (2, 3, 4), (2, 3, 4), (0, 2, 5, 6), (3, 6)])
    assert [c.dtype == "float16" for c in configs] == [case == CASES[1] for case in CASES]
    assert {c.dtype for c in configs} == {"float16", "bfloat16"}
    assert [c.block.qk_norm for c in configs] == [False, False, False, True, True, True, False]
    assert [c.window for c in configs] == [(0,), (0,), (0,), (0,), (5,), (0, 4, 4), (0, 0)]
    assert {c.block.qkv_bias for c in configs} == {False, True}
    assert {c.block.rope.scaling for c in configs} == {"default", "linear", "llama3"}
    stored = {case: load_file(GOLDEN / case / "model.safetensors") for case in CASES}
    assert ("midlayer.mlp.up_proj.weight" in stored[CASES[0]]
            and "layers.0.mlp.up_proj.weight" in stored[CASES[1]])
    ids = np.arange(20) + stored[CASES[0]]["d2t"]
    np.testing.assert_array_equal(drafts[CASES[0]].state["vocab"], ids)
    assert not np.array_equal(ids, np.arange(20))


@pytest.mark.slow
@pytest.mark.parametrize("case, changes", [
    (CASES[0], {"norm_before_residual": True}), (CASES[0], {"norm_output": True}),
    (CASES[0], {"own_embed": False}),
    (CASES[0], {"aux_depths": (0, 3, 5)}), (CASES[2], {"norm_before_residual": False}),
    (CASES[2], {"norm_before_fc": False}), (CASES[1], {"norm_output": False}),
    (CASES[1], {"fc_norm": False}), (CASES[4], {"window": 0}), (CASES[4], {"window": 6}),
    (CASES[5], {"window": (4, 4, 4)}), (CASES[5], {"window": (0, 0, 4)}),
    (CASES[5], {"norm_before_residual": False}), (CASES[5], {"aux_depths": (0, 2, 6, 5)})])
def test_the_golden_files_would_show_a_flag_that_is_not_honoured(policy, case, changes):
    draft = eagle3.read(GOLDEN / case, policy)
    wrong = draft.replace(config=dataclasses.replace(draft.config, **changes))
    assert largest_difference(policy, wrong, GOLDEN / case, 60) > 0.01


@pytest.mark.parametrize("layout, block",
                         [("specforge", "midlayer."), ("speculators", "layers.0.")])
@pytest.mark.parametrize("case", CASES)
def test_read_write_read_is_bit_exact(policy, case, layout, block, tmp_path):
    draft = eagle3.read(GOLDEN / case, policy)
    assert eagle3.write(draft, tmp_path / "out", layout=layout) == tmp_path / "out"
    same(eagle3.read(tmp_path / "out", policy), draft)
    want, got = (load_file(GOLDEN / case / "model.safetensors"),
                 load_file(tmp_path / "out" / "model.safetensors"))
    block = "layers.0." if draft.config.block.num_layers > 1 else block
    want = {name.replace("layers.0.", block).replace("midlayer.", block): x
            for name, x in want.items()}
    assert set(got) == set(want)
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].tobytes() == x.tobytes(), name


def test_a_new_draft_is_written_as_both_servers_read_it(policy, tmp_path):
    draft = tiny.shaken(jspec.drafts.eagle3(policy, jax.random.key(0), vocab=[3, 5, 8, 30],
                                            own_embed=True, depths=2))
    eagle3.write(draft, tmp_path / "out")
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["architectures"] == ["LlamaForCausalLMEagle3"] and hf["model_type"] == "llama"
    assert hf[AUX] == [2, 3, 4] and hf["eagle_config"][AUX] == [1, 2, 3]
    assert (hf["draft_vocab_size"], hf["vocab_size"], hf["torch_dtype"]) == (4, 32, "bfloat16")
    assert hf["num_hidden_layers"] == 1 and hf["tie_word_embeddings"] is False
    # another user may serve it
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o044 == 0o044
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["d2t"].tolist() == [3, 4, 6, 27] and tensors["d2t"].dtype == np.int64
    assert np.flatnonzero(tensors["t2d"]).tolist() == [3, 5, 8, 30] and tensors["t2d"].dtype == bool
    assert (tensors["fc.weight"].dtype == ml_dtypes.bfloat16 and tensors["fc.weight"].shape
            == (16, 48))
    assert tensors["midlayer.self_attn.q_proj.weight"].shape[1] == 32
    again = eagle3.read(tmp_path / "out", policy)
    assert again.config == draft.config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(
        a, b.astype(jnp.bfloat16).astype(jnp.float32)), again.weights, draft.weights)
    eagle3.write(draft, tmp_path / "exact", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, eagle3.read(tmp_path / "exact", policy).weights,
                 draft.weights)


@pytest.mark.parametrize("depths, said", [([1, 2, 3], None), ([1, 4], 2)])
def test_a_server_is_told_how_many_layers_are_fused(policy, tmp_path, depths, said):
    """vLLM takes it to be three unless the block's config says otherwise."""
    made = jspec.drafts.eagle3(policy, jax.random.key(0), aux_depths=depths)
    eagle3.write(made, tmp_path / "out", layout="speculators")
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["transformer_layer_config"].get("num_aux_hidden_states") == said
    assert eagle3.read(tmp_path / "out", policy).config == made.config
    assert not not_run_by_vllm(made)
    made = jspec.drafts.eagle3(policy, jax.random.key(0), aux_depths=depths[::-1])
    assert "another order than the policy's" in not_run_by_vllm(made)[0]


def test_the_configs_that_are_written_name_what_servers_look_for(policy, tmp_path):
    drafts = {case: eagle3.read(GOLDEN / case, policy) for case in CASES[2:]}
    for case, served_as in zip(CASES[2:5], ["LlamaForCausalLMEagle3",
                                            *["Eagle3Qwen3ForCausalLM"] * 2], strict=True):
        eagle3.write(drafts[case], tmp_path / case)
        hf = json.loads((tmp_path / case / "config.json").read_text())
        assert hf["architectures"] == [served_as] and "window" not in hf
        assert (hf.get("layer_types"), hf.get("sliding_window")) == (
            (["sliding_attention"], 5) if any(drafts[case].config.window) else (None, None))
    publish(drafts[CASES[2]], tmp_path / "speculators", "speculators", "org/policy")
    hf = json.loads((tmp_path / "speculators" / "config.json").read_text())
    golden = json.loads((GOLDEN / CASES[2] / "config.json").read_text())
    same_keys = set(golden) - {"transformers_version", "target_hidden_size", "speculators_config"}
    layer, want = hf["transformer_layer_config"], golden.pop("transformer_layer_config")
    assert {key: hf[key] for key in same_keys - {"transformer_layer_config"}} == {
        key: golden[key] for key in same_keys - {"transformer_layer_config"}}
    assert ({key: layer[key] for key in want
             if key in layer and key not in ("bos_token_id", "pad_token_id")}
            == {key: x for key, x in want.items()
                if key in layer and key not in ("bos_token_id", "pad_token_id")})
    assert (hf["speculators_config"]["verifier"]
            == {"name_or_path": "org/policy", "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(InputError, match="layout 'vllm' is unknown; known: specforge, speculators"):
        eagle3.write(drafts[CASES[2]], tmp_path / "x", layout="vllm")
    with pytest.raises(InputError,
                       match="a block of the kind qwen2 has no name in published drafts"):
        block = dataclasses.replace(drafts[CASES[2]].config.block, family="qwen2", out_bias=False)
        eagle3.write(drafts[CASES[2]].replace(
            config=dataclasses.replace(drafts[CASES[2]].config, block=block)), tmp_path / "x")


@pytest.mark.parametrize("config, window", [
    ({"layer_types": ["sliding_attention"], "sliding_window": 8}, 8),
    # as long as the policy's context
    ({"layer_types": ["sliding_attention"], "sliding_window": 64}, 0),
    ({"sliding_window": 8}, 0), ({"sliding_window": 8, "use_sliding_window": True}, 0),
    ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8)])
def test_which_window_a_config_asks_for(policy, tmp_path, config, window):
    read = eagle3.read(edit_config(copy(CASES[0], tmp_path / "x"), **config), policy)
    assert read.config.window == (window,)


@pytest.mark.slow
def test_a_draft_that_was_read_rolls_out(policy):
    draft = eagle3.read(GOLDEN / CASES[4], policy)
    batch = jspec.PromptBatch.from_tokens([[1, 5, 9], [7]], group_size=1, seed=0, buckets=(4,))
    out = jspec.rollout(policy, draft, batch,
                        sampling=jspec.Sampling(max_new_tokens=6, stop_tokens=()))
    assert out.lengths.tolist() == [6, 6]


def test_two_conventions_of_auxiliary_layers(policy, tmp_path):
    directory = copy(CASES[1], tmp_path / "x")

    def depths(**options):
        return eagle3.read(directory, policy, **options).config.aux_depths

    assert depths() == (0, 3, 5) and depths(aux_convention="output") == (1, 4, 6)
    edit_config(directory, **{AUX: None, "eagle_config": {AUX: [0, 3, 5]}})
    assert depths() == (1, 4, 6) and depths(aux_convention="input") == (0, 3, 5)
    edit_config(directory, **{AUX: [1, 4, 6]})
    assert depths() == (1, 4, 6)
    edit_config(directory, **{AUX: None, "eagle_config": None})
    assert depths() == (2, 3, 4)


def test_other_spellings_are_read(policy, tmp_path):
    """Weights in several files and under a model's prefix, the older name of fc_norm, what trainers
    leave behind."""
    directory = copy(CASES[1], tmp_path / "x")
    old = {"fc_norm.0": "aux_norm_low", "fc_norm.1": "aux_norm_mid", "fc_norm.2": "aux_norm_high",
           "layers.0": "model.layers.0"}

    def change(tensors):
        for name in list(tensors):
            for new, before in old.items():
                if name.startswith(new):
                    tensors[before + name.removeprefix(new)] = tensors.pop(name)
        tensors["verifier_norm.weight"] = np.ones(16, np.float16)
        tensors["d2t"], tensors["t2d"] = np.zeros(32, np.int64), np.ones(32, bool)

    edit_tensors(directory, change)
    edit_config(directory, fc_norm=False, use_aux_norm=True)
    same(eagle3.read(directory, policy), eagle3.read(GOLDEN / CASES[1], policy))


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(**values):
    return lambda tensors: tensors.update({name.replace("__", "."): x
                                           for name, x in values.items()})


def moved(name, at, by):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][at] += by
    return change


def flip(tensors):
    tensors["t2d"] = np.roll(tensors["t2d"], 1)


@pytest.mark.parametrize("config, tensors, message", [
    ({"hidden_size": 32}, None,
     "its hidden size is 32, the policy's is 16; take one made for this policy"),
    ({"target_hidden_size": 64}, None, "its hidden size is 64, the policy's is 16"),
    ({"vocab_size": 40}, None, "its vocabulary size is 40, the policy's is 32"),
    ({}, drop("fc.weight", "midlayer.hidden_norm.weight"),
     "these tensors are missing: fc.weight, midlayer.hidden_norm.weight"),
    ({"norm_before_fc": True}, None, "these tensors are missing: input_norm.weight"),
    ({"norm_before_fc": True, "fc_norm": True}, None,
     "norm_before_fc and fc_norm exclude each other"),
    ({}, put(midlayer__extra__weight=np.ones(2, np.float32), fc__bias=np.ones(16, np.float32)),
     "no place in an EAGLE-3 draft of this config: fc.bias, midlayer.extra.weight"),
    ({}, put(layers__0__hidden_norm__weight=np.ones(16, np.float32)),
     "tensor midlayer.hidden_norm.weight is there twice, as layers.0.hidden_norm.weight in "
     "model.safetensors and as midlayer.hidden_norm.weight in model.safetensors; remove one"),
    ({"intermediate_size": 12}, None,
     "tensor midlayer.mlp.down_proj.weight has shape [16, 20], but the config says [16, 12]"),
    ({"eagle_config": {AUX: [1, 3, 7]}}, None,
     "auxiliary layers at depths [2, 4, 8] of a policy of 7 layers"),
    ({"eagle_config": {AUX: [1, 3, 3]}}, None, "auxiliary layers at depths [2, 4, 4]"),
    ({"eagle_config": {AUX: [1, 2, 3]}, AUX: [1, 2, 3]}, None,
     "names two sets of auxiliary layers"),
    ({"eagle_config": {AUX: "1,2,3"}}, None, "must be a list of integers, not '1,2,3'"),
    ({"eagle_config": {"use_aux_hidden_state": False}}, None, "without auxiliary hidden states"),
    ({}, drop("d2t"),
     "tensor d2t is missing, and the draft's vocabulary is of 20 tokens, the policy's of 32"),
    ({}, moved("d2t", 19, 32), "d2t makes draft token 19 token"),
    ({}, moved("d2t", 0, -9), "outside the policy's 32; it holds offsets: token i is i + d2t[i]"),
    ({}, put(d2t=np.array([1, 0] * 10)), "d2t makes two draft tokens one token"),
    ({}, put(d2t=np.zeros(5, np.int64)),
     "d2t must hold 20 integers (draft_vocab_size), not int64 of shape [5]"),
    ({}, flip, "t2d does not agree with d2t"),
    ({"num_hidden_layers": 2}, None, "these tensors are missing: layers.1.input_layernorm.weight"),
    ({"num_hidden_layers": 65}, None, "a draft of 65 layers is not supported; supported: up to 64"),
    ({"num_hidden_layers": 2, "layer_types": ["full_attention"]}, None,
     "config.json has 1 layer_types, and 2 as num_hidden_layers; give one for each layer"),
    ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, None,
     "config.json has 2 layer_types, and 1 as num_hidden_layers"),
    ({"layer_types": ["sliding_attention"], "sliding_window": 0}, None,
     "config.json has sliding_attention in layer_types, and 0 as sliding_window"),
    ({"layer_types": ["chunked_attention"]}, None,
     "'chunked_attention' is not supported; supported: full_attention"),
    ({"layer_types": "sliding_attention"}, None, "as layer_types; expected a list of texts"),
    ({"sliding_window": "8"}, None, "has '8' as sliding_window"),
    ({"norm_before_residual": "false"}, None,
     "has 'false' as norm_before_residual; expected true or false"),
    ({"eagle_config": [1]}, None, "has [1] as eagle_config; expected an object"),
    ({"eagle_config": {"use_aux_hidden_state": "no"}}, None, "has 'no' as use_aux_hidden_state"),
    ({"norm_output": True, "eagle_config": {"norm_output": False}}, None,
     "config.json has True as norm_output, and False as eagle_config.norm_output, which contradict "
     "each other; keep what is true"),
    ({"use_aux_hidden_state": False}, None,
     "has False as use_aux_hidden_state, and True as eagle_config.use_aux_hidden_state"),
    ({"num_aux_hidden_states": 4}, None, "config.json has 4 as num_aux_hidden_states, and "
     "[0, 3, 5] as eagle_aux_hidden_state_layer_ids"),
    ({"speculators_model_type": "peagle"}, None, "has ['LlamaForCausalLMEagle3'] as architectures, "
     "and 'peagle' as speculators_model_type"),
    ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16}}, None,
     "config.json has 'yarn' as the rope_type of this draft, and no factor"),
    ({"jspec": 3}, None, "has 3 as jspec; expected an object"),
    ({"jspec": {"depths": "3"}}, None, "has '3' as depths"),
    ({"draft_vocab_size": "20"}, None, "x: config.json has '20' as draft_vocab_size"),
    ({"target_hidden_size": [16]}, None, "has [16] as target_hidden_size"),
    ({"transformer_layer_config": "llama"}, None,
     "has 'llama' as transformer_layer_config; expected an object"),
    ({"transformer_layer_config": {"hidden_size": "many"}}, None, "is refused by transformers"),
    ({"transformer_layer_config": {"model_type": "qwen3_next"}}, None,
     "architecture Qwen3NextForCausalLM is not supported: its layers have gated attention"),
    ({"architectures": "LlamaForCausalLMEagle3"}, None,
     "as architectures; expected a list of texts"),
    ({"architectures": ["LlamaForCausalLM"]}, None, "LlamaForCausalLM is not an EAGLE-3 draft"),
    ({"model_type": "mistral"}, None,
     "a block of model_type 'mistral' is not supported; supported: llama, qwen3"),
    ({}, put(fc__weight=np.ones((16, 48), np.int8)),
     "tensor fc.weight is stored as int8; supported: float32"),
])
def test_one_line_for_every_fault(policy, tmp_path, config, tensors, message):
    directory = edit_config(copy(CASES[0], tmp_path / "x"), **config)
    if tensors is not None:
        edit_tensors(directory, tensors)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        eagle3.read(directory, policy)
    assert "\n" not in str(error.value)


def test_what_a_config_leaves_out_and_must_say(policy, tmp_path):
    """A missing norm_before_residual is no false one, and the default auxiliary layers are there
    or named."""
    directory = edit_config(copy(CASES[3], tmp_path / "x"), norm_before_residual=None)
    with pytest.raises(InputError, match="config.json does not say norm_before_residual.*: with "
                       "the wrong one hardly a token is accepted; say it, true or false"):
        eagle3.read(directory, policy)
    edit_config(directory, eagle_config={"norm_before_residual": False})
    same(eagle3.read(directory, policy), eagle3.read(GOLDEN / CASES[3], policy))
    shallow = policy.replace(config=dataclasses.replace(policy.config, num_layers=5))
    with pytest.raises(InputError, match="names no auxiliary layers, and a policy of 5 layers has "
                       "not those that this stands for, 2, 2 and 2; name them in eagle_aux"):
        eagle3.read(directory, shallow)


def test_windows_of_two_lengths_have_no_name(policy, tmp_path):
    draft = jspec.drafts.eagle3(policy, jax.random.key(0), layers=2, window=(3, 4))
    with pytest.raises(InputError, match=r"a draft with windows of \(3, 4\) positions has no name"):
        eagle3.write(draft, tmp_path / "out")


def test_files_that_are_not_there_or_not_whole(policy, tmp_path):
    directory = copy(CASES[0], tmp_path / "x")
    with pytest.raises(InputError, match="aux_convention 'vllm' is unknown; known: input, output"):
        eagle3.read(directory, policy, aux_convention="vllm")
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:-3])
    with pytest.raises(InputError, match="cut short: [0-9]+ bytes where tensor"):
        eagle3.read(directory, policy)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(InputError, match="no safetensors; pickled weights are never loaded"):
        eagle3.read(directory, policy)
    (directory / "config.json").write_text('{"architectures": null}')
    with pytest.raises(InputError, match="names no kind of draft, such as eagle3 or "
                       "dflash, and no MTP head of an unnamed architecture can be read"):
        jspec.load_draft(policy, directory)
    (directory / "config.json").unlink()
    with pytest.raises(InputError, match="no config.json"):
        eagle3.read(directory, policy)


def test_writing_refuses(policy, tmp_path):
    draft = eagle3.read(GOLDEN / CASES[0], policy)
    with pytest.raises(InputError, match="a ngram draft cannot be written as EAGLE-3"):
        eagle3.write(jspec.drafts.ngram(policy), tmp_path / "out")
    with pytest.raises(InputError, match="dtype 'int8' is not supported; supported: float32, "
                       "float16, bfloat16"):
        eagle3.write(draft, tmp_path / "out", dtype="int8")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not an empty directory"):
        eagle3.write(draft, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]
