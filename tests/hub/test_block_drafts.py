"""DFlash and DSpark checkpoints: the logits of the reference implementation, bit-exact round trips,
one line for every fault."""

import dataclasses
import json
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import jspec
from jspec import hub
from jspec.drafts.dflash import table
from jspec.drafts.dspark import teacher_forced, tokens_before
from jspec.drafts.parts import anchored
from jspec.drafts.parts.vocabulary import table_logits
from jspec.errors import InputError
from jspec.heads import not_run_by_vllm, publish
from jspec.hub import block_drafts
from jspec.hub.draft_configs import LAYOUTS
from jspec.model import train_forward
from jspec.model.linear import linear
from tests.hub.checkpoints import GOLDEN, copy, edit_config, edit_tensors
from tests.speculate import tiny

HOME = GOLDEN / "drafters"
SPECULATORS = ["dflash", "dflash_sliding", "dflash_sliding_both_ways_reduced", "dspark",
               "dspark_sliding", "dspark_bonus_anchor", "dspark_gated_reduced", "dspark_rnn",
               "dspark_rnn_bonus_anchor", "dspark_no_heads"]
SPECFORGE = ["specforge_dflash", "specforge_dflash_sliding", "specforge_dspark",
             "specforge_dspark_reduced"]
CASES = SPECULATORS + SPECFORGE
AUX = "aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def policy():
    return hub.load(str(GOLDEN / "eagle3_target"), dtype="float32")


@pytest.fixture(scope="module")
def streams(policy):
    """The trunk's streams at every depth, by case."""
    forward = jax.jit(partial(train_forward, depths=tuple(range(7))))
    return {case: forward(policy, jnp.asarray(reference(case)["tokens"])) for case in CASES}


def reference(case):
    with np.load(HOME / case / "reference.npz") as data:
        return dict(data)


@jax.jit
def scored(policy, draft, streams, tokens, at):
    """Logits before and after the Markov bias, and confidence, of every slot behind anchors at
    these positions."""
    config, w = draft.config, draft.weights
    trunk = streams.replace(features=tuple(streams.features[i] for i in config.aux_depths))
    states = anchored.slot_states(policy, config, w, SimpleNamespace(trunk=trunk, tokens=tokens),
                                  at)
    base = table_logits(policy, table(policy, draft), draft.state.get("vocab"), states)
    if draft.name == "dflash":
        return {"base": base[0]}
    found, confidence = teacher_forced(config, w, states, tokens_before(config, tokens, at))
    bias = linear(found, w["markov"]["w2"]) if config.markov_rank else 0
    out = {"base": base[0], "logits": (base + bias)[0]}
    return out if confidence is None else {**out, "confidence": confidence[0]}


def largest_difference(policy, draft, case, streams):
    """Between what the reference implementation gives for slots that predict, and ours."""
    want = reference(case)
    config = draft.config  # one program for those that differ in how they are stored alone
    draft = draft.replace(config=dataclasses.replace(config, dtype="float32"))
    got = scored(policy, draft, streams[case], jnp.asarray(want.pop("tokens")),
                 jnp.asarray(want.pop("anchors"))[None])
    assert set(got) == set(want)
    return max(np.abs(np.asarray(x) - want[name])[:, config.idle:].max()
               for name, x in got.items())


def same(a, b):
    assert a.config == b.config and a.name == b.name
    jax.tree.map(np.testing.assert_array_equal, (a.weights, a.state), (b.weights, b.state))


@pytest.mark.parametrize("case", CASES)
def test_logits_match_the_reference_in_every_slot(policy, case, streams):
    assert largest_difference(policy, block_drafts.read(HOME / case, policy), case, streams) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case, changes", [
    ("dflash", {"aux_depths": (1, 3, 5)}), ("dflash", {"mask_token": 30}),
    ("dflash_sliding", {"windows": (5, 0)}), ("dflash_sliding", {"windows": (4, 4)}),
    ("dflash_sliding", {"windows_causal": False}), ("dspark_sliding", {"windows": ()}),
    ("dflash_sliding_both_ways_reduced", {"windows_causal": True}),
    ("dspark_gated_reduced", {"markov_head": "vanilla"})])
def test_the_golden_files_would_show_what_is_not_honoured(policy, case, changes, streams):
    draft = block_drafts.read(HOME / case, policy)
    wrong = draft.replace(config=dataclasses.replace(draft.config, **changes))
    assert largest_difference(policy, wrong, case, streams) > 0.01


def test_the_golden_files_cover_the_conventions(policy):
    drafts = {case: block_drafts.read(HOME / case, policy) for case in CASES}
    configs = [draft.config for draft in drafts.values()]
    assert [c.kind for c in configs] == [case.removeprefix("specforge_").split("_")[0]
                                         for case in CASES]
    for flag in ("sample_from_anchor", "windows_causal", "own_head"):
        assert {getattr(c, flag) for c in configs} == {False, True}
    spark = [c for c in configs if c.kind == "dspark"]
    assert {c.markov_head for c in spark} == {"vanilla", "gated", "rnn"}
    assert ({(c.confidence, c.confidence_with_markov) for c in spark}
            == {(True, True), (True, False), (False, True), (False, False)})
    assert {c.windows for c in configs} == {(), (4, 0), (4, 4)}
    assert {c.vocab_size for c in configs} == {0, 12} and {c.markov_rank for c in spark} == {0, 6}
    assert {c.aux_depths for c in configs} == {(1, 3, 6), (2, 5), (4,), (0, 3)}
    assert {c.block.qkv_bias for c in configs} == {False, True}
    assert [c.dtype for c in configs] == ["bfloat16"] * 10 + ["float16"] * 4
    # the same drafts in both layouts
    for case in SPECFORGE:
        other = case.removeprefix("specforge_").replace("spark_reduced", "spark_gated_reduced")
        assert (dataclasses.replace(drafts[case].config, dtype="bfloat16")
                == drafts[other].config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_read_write_read_is_bit_exact(policy, case, layout, tmp_path):
    draft = block_drafts.read(HOME / case, policy)
    assert publish(draft, tmp_path / "out", layout) == tmp_path / "out"
    same(jspec.load_draft(policy, tmp_path / "out"), draft)
    want, got = (load_file(HOME / case / "model.safetensors"),
                 load_file(tmp_path / "out" / "model.safetensors"))
    assert set(got) == set(want)
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_the_configs_that_are_written_are_those_that_were_read(policy, case, tmp_path):
    """Key by key, but for what is there for one reader alone, and the flag that makes vLLM run
    layers without a window as they are trained."""
    own = {"transformers_version", "target_hidden_size", "sliding_window_non_causal",
           "speculators_config", "architectures", "auto_map", "max_window_layers", "chunk_size",
           "bos_token_id", "eos_token_id", "pad_token_id", "confidence_head_alpha"}
    layout = LAYOUTS[case in SPECULATORS]
    draft = block_drafts.read(HOME / case, policy)
    publish(draft, tmp_path / "out", layout, "org/policy")
    want = json.loads((HOME / case / "config.json").read_text())
    got = json.loads((tmp_path / "out" / "config.json").read_text())
    layer = got.get("transformer_layer_config", got)
    rope = {"rope_theta": layer.pop("rope_theta"), "rope_type": "default"}
    assert layer.pop("rope_scaling") is None
    if layout == "speculators":
        layer["rope_parameters"] = rope
        assert (got["speculators_config"]["verifier"]
                == {"name_or_path": "org/policy", "architectures": ["LlamaForCausalLM"]})
        assert (got["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
                == draft.config.predicted)
        # windows as the golden files have them, all layers of the others see all
        full = not draft.config.windows
        assert got["sliding_window_non_causal"] == (want["sliding_window_non_causal"] or full)
        assert got["architectures"] == want["architectures"]
    else:
        assert want.pop("rope_theta") == rope["rope_theta"]
        assert got["architectures"] == [{"dflash": "DFlashDraftModel",
                                         "dspark": "Qwen3DSparkModel"}[draft.name]]
    compared = 0
    for section in ("transformer_layer_config", "dflash_config", None):
        written, read = (x.get(section, {}) if section else x for x in (got, want))
        for key in read.keys() & written.keys() - own - {"transformer_layer_config",
                                                         "dflash_config"}:
            assert written[key] == read[key], key
            compared += 1
    assert compared > 20


def test_a_new_draft_is_written_with_the_policys_rows(policy, tmp_path):
    vocab = [3, 5, 8, 30]
    draft = tiny.shaken(jspec.drafts.dspark(policy, 0, vocab=vocab, markov_rank=4, mask_token=31))
    with pytest.raises(InputError, match="is written with the policy's rows; give policy="):
        publish(draft, tmp_path / "out")
    publish(draft, tmp_path / "out", policy=lambda: policy)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    rows = np.asarray(policy.weights["embed"])[vocab]
    np.testing.assert_array_equal(tensors["lm_head.weight"].astype(np.float32), rows)
    assert tensors["d2t"].tolist() == [3, 4, 6, 27] and tensors["d2t"].dtype == np.int64
    assert np.flatnonzero(tensors["t2d"]).tolist() == vocab and tensors["t2d"].dtype == bool
    assert tensors["fc.weight"].dtype == ml_dtypes.bfloat16
    read = jspec.load_draft(policy, tmp_path / "out")
    assert read.config == dataclasses.replace(draft.config, own_head=True)
    block_drafts.write(draft, tmp_path / "exact", dtype="float32", layout="speculators",
                       policy=lambda: policy)
    exact = block_drafts.read(tmp_path / "exact", policy).weights
    jax.tree.map(np.testing.assert_array_equal, exact, {**draft.weights, "head": rows})


FIRST_NORM = ("the context's key norms of DFlash's layers behind the first, in whose place its CPU "
              "build takes the first one's")


@pytest.mark.parametrize("name, options, layout, missing", [
    ("dflash", {"layers": 1}, None, []), ("dflash", {"layers": 1, "window": 4}, "speculators", []),
    ("dflash", {"layers": 1, "sample_from_anchor": True}, None,
     ["sample_from_anchor of DFlash, which its CPU build ignores without a word"]),
    ("dflash", {}, None, [FIRST_NORM]),
    ("dspark", {}, "speculators", ["DSpark on a CPU"]),
    ("dspark", {"markov_head": "rnn"}, None, ["DSpark on a CPU", "a Markov head that is rnn"]),
    ("dspark", {"markov_rank": 0}, None, ["DSpark on a CPU", "DSpark without a Markov head"]),
    ("dspark", {"window": 4, "windows_causal": False}, "speculators",
     ["DSpark on a CPU", "a window that is not causal, of DSpark in this layout"]),
    ("eagle3", {}, None, [])])
def test_what_vllm_does_not_run_is_said(policy, name, options, layout, missing):
    draft = getattr(jspec.drafts, name)(policy, 0, **options)
    assert not_run_by_vllm(draft, layout) == missing
    if name == "dflash" and not options:
        mixed = dataclasses.replace(draft.config, windows=(4, 0))
        assert (not_run_by_vllm(draft.replace(config=mixed))
                == ["layers with and without a window in one draft", FIRST_NORM])


@pytest.mark.slow
def test_a_draft_that_was_read_rolls_out(policy):
    draft = block_drafts.read(HOME / "dspark_gated_reduced", policy)
    batch = jspec.PromptBatch.from_tokens([[1, 5, 9], [7]], group_size=1, seed=0, buckets=(4,))
    out = jspec.rollout(policy, draft, batch,
                        sampling=jspec.Sampling(max_new_tokens=6, stop_tokens=()))
    assert out.lengths.tolist() == [6, 6]


def read_with(policy, tmp_path, case, **changes):
    return block_drafts.read(edit_config(copy(f"drafters/{case}", tmp_path / case), **changes),
                             policy).config


def test_which_slot_is_the_first_where_the_config_does_not_say(policy, tmp_path):
    def first(case, **changes):
        shape = tmp_path / str(len(list(tmp_path.iterdir())))
        shape.mkdir()
        return read_with(policy, shape, case, **changes).sample_from_anchor

    assert first("dspark_bonus_anchor", sample_from_anchor=None)
    assert not first("dflash", sample_from_anchor=None)
    inside = {"mask_token_id": 31, "target_layer_ids": [0, 2, 5]}
    assert not first("specforge_dflash")
    assert first("specforge_dflash", dflash_config={**inside, "sample_from_anchor": True})
    assert first("specforge_dflash", dflash_config={**inside, "shift_label": True})
    assert first("specforge_dspark") and not first("specforge_dspark", sample_from_anchor=False)


def test_other_spellings_are_read(policy, tmp_path):
    """DeepSpec's names, what is the draft's own at the top, copies of the policy's tensors, and
    where SpecForge once had the heads."""
    want = block_drafts.read(HOME / "specforge_dspark", policy)
    directory = copy("drafters/specforge_dspark", tmp_path / "x")
    own = json.loads((directory / "config.json").read_text())["dflash_config"]
    for key in ("projector_type", "confidence_head_alpha"):
        del own[key]
    edit_config(directory, dflash_config=None, architectures=["Qwen3DSparkModel"], **own)

    def change(tensors):
        for name in list(tensors):
            if name.startswith(("markov_head.", "confidence_head.")):
                tensors[f"logit_head.{name}"] = tensors.pop(name)
        tensors["model.embed_tokens.weight"] = np.asarray(policy.weights["embed"])
        tensors["lm_head.weight"] = np.asarray(policy.weights["embed"])

    edit_tensors(directory, change)
    same(block_drafts.read(directory, policy), want)
    # a draft of this family that is called DFlash's
    edit_config(directory, architectures=["DFlashDraftModel"])
    same(block_drafts.read(directory, policy), want)
    edit_tensors(directory, lambda tensors: tensors["lm_head.weight"].__imul__(1.5))
    with pytest.raises(InputError, match="tensor lm_head.weight is not the policy's"):
        block_drafts.read(directory, policy)
    # nothing to compare with
    shape = policy.replace(weights=jax.eval_shape(lambda: policy.weights))
    same(block_drafts.read(directory, shape), want)


LAYER = json.loads((HOME / "dspark" / "config.json").read_text())["transformer_layer_config"]
SLIDES = {**{key: x for key, x in LAYER.items() if key != "sliding_window"},
          "layer_types": ["sliding_attention"] * 2}


@pytest.mark.parametrize("case, changes, windows, causal", [
    ("specforge_dflash_sliding", {}, (4, 0), True),
    ("specforge_dflash_sliding", {"is_causal": False}, (4, 0), False),
    ("specforge_dflash", {"is_causal": False}, (), True),
    ("specforge_dflash", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 6,
                          "is_causal": True}, (6, 6), True),
    ("dflash_sliding", {"sliding_window_non_causal": True}, (4, 0), False),
    ("dflash", {"sliding_window_non_causal": True}, (), True),
    # as transformers completes it
    ("dflash", {"transformer_layer_config": SLIDES | {"use_sliding_window": True}},
     (4096, 4096), True),
    ("dflash", {"transformer_layer_config": SLIDES | {"use_sliding_window": False,
                                                      "sliding_window": 8}}, (), True)])
def test_which_windows_a_config_asks_for(policy, tmp_path, case, changes, windows, causal):
    config = read_with(policy, tmp_path, case, **changes)
    assert (config.windows, config.windows_causal) == (windows, causal)


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(**values):
    return lambda tensors: tensors.update({name.replace("__", "."): x
                                           for name, x in values.items()})


@pytest.mark.parametrize("case, config, tensors, message", [
    ("dspark", {"transformer_layer_config": {**LAYER, "hidden_size": 32}}, None,
     "this DSpark draft was made for another policy: its hidden size is 32, the policy's is 16"),
    ("dflash", {"target_hidden_size": 64}, None,
     "this DFlash draft was made for another policy: its hidden size is 64, the policy's is 16"),
    ("specforge_dflash", {"vocab_size": 40}, None,
     "its vocabulary size is 40, the policy's is 32"),
    ("dspark", {}, drop("fc.weight", "markov_head.markov_w1.weight"),
     "of a DSpark draft these tensors are missing: fc.weight, markov_head.markov_w1.weight"),
    ("dspark_gated_reduced", {}, drop("lm_head.weight"), "tensors are missing: lm_head.weight"),
    ("dspark_gated_reduced", {}, drop("d2t"), "tensor d2t is missing, and the draft's vocabulary "
     "is of 12 tokens, the policy's of 32"),
    ("dspark", {"markov_head_type": "rnn"}, None, "missing: markov_head.joint_proj.bias"),
    ("dspark", {"enable_confidence_head": False}, None,
     "no place in a DSpark draft of this config: confidence_head.proj.bias, confidence_head."),
    ("dflash", {}, put(layers__0__conv__weight=np.ones((2, 2), np.float32)),
     "no place in a DFlash draft of this config: layers.0.conv.weight"),
    ("dspark", {"markov_rank": 8}, None,
     "tensor confidence_head.proj.weight has shape [1, 22], but the config says [1, 24]"),
    ("dflash", {}, put(embed_tokens__weight=np.ones((32, 16), np.float32)),
     "tensor embed_tokens.weight is not the policy's, and a draft of one pass with its own is not "
     "supported"),
    ("dflash", {AUX: [1, 3, 9]}, None,
     "dflash draft: auxiliary layers at depths [1, 3, 9] of a policy of 7 layers"),
    ("dflash", {AUX: None}, None, f"{AUX} in config.json must be a list of integers, not None"),
    ("specforge_dflash", {"dflash_config": {"mask_token_id": 31, "target_layer_ids": "1"}}, None,
     "target_layer_ids in config.json must be a list of integers, not '1'"),
    ("dflash", {"mask_token_id": None}, None, "has no mask_token_id"),
    ("dspark", {"mask_token_id": 32}, None,
     "mask_token = 32 is outside the policy's vocabulary of 32"),
    ("dflash", {"block_size": 1}, None, "block_size"),
    ("dspark", {"markov_head_type": "fir"}, None, "markov_head"),
    ("dspark", {"sample_from_anchor": "no"}, None, "has 'no' as sample_from_anchor"),
    ("dflash", {"speculators_model_type": "dflash2"}, None,
     "'dflash2' is not supported; of drafts of one pass these are: dflash, dspark"),
    ("specforge_dflash", {"architectures": ["DFlash2DraftModel"]}, None,
     "'DFlash2DraftModel' is not supported"),
    ("specforge_dflash", {"dflash_config": {"projector_type": "domino"}}, None,
     "'domino' is not supported"),
    ("dflash", {"projector_type": "dflash2"}, None,
     "projector_type 'dflash2' is not supported; of drafts of one pass these are: dflash, dspark"),
    ("specforge_dflash", {"architectures": None}, None,
     "config.json has no architectures, which name the kind of draft; of drafts of one pass"),
    ("specforge_dflash", {"architectures": "text"}, None,
     "x: config.json has 'text' as architectures"),
    ("specforge_dflash", {"draft_vocab_size": 0}, None, "x: config.json has 0 as draft_vocab_size"),
    ("specforge_dflash", {"num_attention_heads": 3}, None, "x: config.json has 3 as "
     "num_attention_heads, and 2 as num_key_value_heads; give a multiple of the second"),
    ("specforge_dflash", {"model_type": "gemma3"}, None,
     "a block of model_type 'gemma3' is not supported; supported: llama, qwen3"),
    ("specforge_dflash", {"layer_types": ["full_attention"]}, None,
     "config.json has 1 layer_types, and 2 as num_hidden_layers; give one for each layer"),
    ("specforge_dspark", {"layer_types": ["full_attention"] * 3}, None,
     "config.json has 3 layer_types, and 2 as num_hidden_layers"),
    ("specforge_dflash", {"layer_types": ["full_attention", "sliding_attention"]}, None,
     "config.json has sliding_attention in layer_types, and None as sliding_window; say how long "
     "the window is (speculators: and use_sliding_window), or full_attention"),
    ("specforge_dflash", {"num_target_layers": 9}, None,
     "this DFlash draft was made for another policy: its num_target_layers is 9, the policy's is "
     "7"),
    ("specforge_dflash", {"layer_types": ["linear_attention"] * 2}, None,
     "'linear_attention' is not supported; supported: full_attention, sliding_attention"),
    ("specforge_dflash", {"is_causal": True}, None,
     "causal layers without a window are not supported"),
    *[("specforge_dspark", {key: value}, None,
       f"config.json has {value} as {key}, and {inside} as dflash_config.{key}, which contradict "
       "each other; keep what is true")
      for key, value, inside in [("target_layer_ids", [1, 2, 5], [0, 2, 5]),
                                 ("mask_token_id", 30, 31), ("markov_rank", 4, 6),
                                 ("enable_confidence_head", False, True)]],
    ("specforge_dflash", {"dflash_config": {"block_size": 8}}, None,
     "config.json has 4 as block_size, and 8 as dflash_config.block_size"),
    ("dflash", {"architectures": ["DSparkDraftModel"]}, None,
     "config.json has ['DSparkDraftModel'] as architectures, and 'dflash' as "
     "speculators_model_type"),
    ("dflash", {"speculators_model_type": "eagle3"}, None,
     "has ['DFlashDraftModel'] as architectures, and 'eagle3' as speculators_model_type"),
    ("dflash", {"architectures": ["DFlash2DraftModel"]}, None,
     "has ['DFlash2DraftModel'] as architectures, and 'dflash' as speculators_model_type"),
    ("specforge_dflash_sliding", {"is_causal": False, "causal": True}, None,
     "config.json has False as is_causal, and True as causal"),
    ("specforge_dflash", {"sample_from_anchor": False, "shift_label": True}, None,
     "config.json has False as sample_from_anchor, and True as shift_label"),
    ("specforge_dspark", {"rope_scaling": {"rope_type": "yarn"}}, None,
     "config.json has 'yarn' as the rope_type of this draft, and no factor"),
    ("specforge_dflash", {"use_swa": True}, None, "use_swa is not supported"),
])
def test_one_line_for_every_fault(policy, tmp_path, case, config, tensors, message):
    directory = edit_config(copy(f"drafters/{case}", tmp_path / "x"), **config)
    if tensors is not None:
        edit_tensors(directory, tensors)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        jspec.load_draft(policy, directory)
    assert "\n" not in str(error.value)


def test_writing_refuses(policy, tmp_path):
    draft = block_drafts.read(HOME / "dflash_sliding", policy)

    def refused(message, draft=draft, **options):
        with pytest.raises(InputError, match=re.escape(message)):
            block_drafts.write(draft, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused("a ngram draft cannot be written as one of one pass; take one of dflash, dspark",
            jspec.drafts.ngram(policy))
    refused("dtype 'int8' is not supported", dtype="int8")
    refused("layout 'vllm' is unknown; known: specforge, speculators", layout="vllm")
    config = draft.config
    refused("windows of [4, 6] positions in one draft have no name in published drafts",
            draft.replace(config=dataclasses.replace(config, windows=(4, 6))))
    llama = dataclasses.replace(config.block, family="llama", qk_norm=False)
    refused("layers of the kind llama have no name in published drafts of one pass; known: qwen3",
            draft.replace(config=dataclasses.replace(config, block=llama)))
