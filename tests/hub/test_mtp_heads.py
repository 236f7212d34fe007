"""Native MTP heads: the published code's logits, bit-exact round trips, lossless rollouts, and what
breaks is named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jspec
from jspec import hub
from jspec.drafts import base
from jspec.errors import InputError
from jspec.heads import publish
from jspec.hub import mtp_heads
from jspec.hub.mtp_layouts import MTP_LAYOUTS, mtp_tensors
from jspec.model import prefill
from jspec.speculate import Sampling, Speculation
from pallas_kernels.noise import rejection_noise
from tests.hub.checkpoints import GOLDEN, copy, edit_config, edit_tensors

CASES = ["mimo", "mimo_bfloat16_sharded"]
STEPS = "mtp_speculators"  # for the policy qwen3
PREFIX = "model.mtp_layers.0."


def load(directory):
    return hub.load(str(directory), dtype="float32")


@pytest.fixture(scope="module")
def policy():
    return load(GOLDEN / "mimo")


@pytest.fixture(scope="module")
def draft(policy):
    return mtp_heads.read(GOLDEN / "mimo", policy)


def tensors(directory):
    return {name: value for file in sorted(directory.glob("*.safetensors"))
            for name, value in load_file(file).items()}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def drafted_logits(policy, draft, tokens, k=2):
    """Logits [S - 2, k, V] at k depths after the first 2 .. S - 1 tokens [S], the drafts being the
    next ones."""
    rows = jnp.broadcast_to(tokens, (len(tokens) - 2, len(tokens)))
    lengths = jnp.arange(2, len(tokens))

    class Forced(base.Sampler):
        def draw(self, logits, offset, vocab=None):
            return tokens[lengths + offset], logits

    @jax.jit
    def run(policy, draft):
        ready, module = jspec.reshard(policy), draft.drafter
        draft = module.prepare(ready, draft)
        trunk, _ = prefill(ready, rows, depths=module.features(draft.config))
        state = module.start(ready, draft, base.Prefill(trunk, rows, lengths))
        state = base.DraftState.of_prompts(*state, 2 * len(tokens))
        noise = rejection_noise(jnp.zeros(2, jnp.uint32), lengths, lengths, k)
        sampler = Forced(noise, jnp.ones(len(lengths)), None, 0, k)
        return module.propose(ready, draft, state, base.Committed(rows, lengths), sampler)[0].log_q

    return np.asarray(run(policy, draft))


def error_against_golden(case, policy, draft):
    with np.load(GOLDEN / case / "expected.npz") as data:
        got = drafted_logits(policy, draft, jnp.asarray(data["tokens"][0]))
        return [np.abs(got[:, 0] - data["depth1"][:-1]).max(),
                np.abs(got[:, 1] - data["depth2"]).max()]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_published_code_at_both_depths(case):
    policy = load(GOLDEN / case)
    assert max(error_against_golden(case, policy, mtp_heads.read(GOLDEN / case, policy))) < 1e-4


@pytest.mark.parametrize("change, error", [
    ({}, 0), ({"blocks": 1}, 1), *(pytest.param(change, 1, marks=pytest.mark.slow) for change in (
        {"hidden_first": True}, {"normed_trunk": True}, {"first": 0}))], ids=str)
def test_logits_are_those_of_speculators_at_every_step(change, error):
    """Drafted one after the other they are what its trainer computes of whole sequences."""
    policy = load(GOLDEN / "qwen3")
    draft = mtp_heads.read(GOLDEN / STEPS, policy)
    draft = draft.replace(config=dataclasses.replace(draft.config, **change))
    with np.load(GOLDEN / STEPS / "reference.npz") as data:
        want = data["logits"].swapaxes(0, 1)
        got = drafted_logits(policy, draft, jnp.asarray(data["tokens"][0]), k=want.shape[1])
    difference = np.abs(got[:len(want)] - want).max()
    assert difference > 0.01 if error else difference < 1e-4


@pytest.mark.parametrize("change", [{"hidden_first": False}, {"normed_trunk": True}, {"first": 0}],
                         ids=str)
def test_the_golden_files_would_show_another_convention(change, policy, draft):
    other = draft.replace(config=dataclasses.replace(draft.config, **change))
    assert min(error_against_golden("mimo", policy, other)) > 0.01


def test_the_trunk_is_a_qwen2_and_its_head_no_part_of_it(policy, tmp_path):
    assert (policy.config.family == "qwen2" and policy.config.qkv_bias
            and not policy.config.tie_embeddings)
    hub.export(policy, tmp_path / "out")
    assert (json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
            == ["Qwen2ForCausalLM"])
    assert not [name for name in tensors(tmp_path / "out") if "mtp" in name]
    directory = edit_config(copy("mimo", tmp_path / "m"), num_nextn_predict_layers=0)
    with pytest.raises(InputError,
                       match="tensor model.mtp_layers.0.* has no place in a qwen2 model"):
        load(directory)


@pytest.mark.parametrize("case, dtype", list(zip(CASES, ["float32", "bfloat16"], strict=True)))
def test_a_head_written_alone_is_read_back_bit_for_bit(case, dtype, tmp_path):
    policy = load(GOLDEN / case)
    draft = mtp_heads.read(GOLDEN / case, policy)
    assert mtp_heads.write(draft, tmp_path / "head") == tmp_path / "head"
    assert json.loads((tmp_path / "head" / "config.json").read_text())["torch_dtype"] == dtype
    want = {name: value
            for name, value in tensors(GOLDEN / case).items() if name.startswith(PREFIX)}
    got = tensors(tmp_path / "head")
    assert got.keys() == want.keys() and {str(x.dtype) for x in got.values()} == {dtype}
    same(got, want)
    again = mtp_heads.read(tmp_path / "head", policy)
    assert (again.config
            == draft.config and all(x.dtype == np.float32 for x in jax.tree.leaves(again.weights)))
    same(again.weights, draft.weights)


@pytest.mark.parametrize("shard", [hub.exporter.MAX_SHARD_BYTES, 10_000],
                         ids=["one file", "sharded"])
def test_a_head_joins_the_policy_that_was_exported(shard, policy, draft, tmp_path):
    hub.export(policy, tmp_path / "out", max_shard_bytes=shard)
    mtp_heads.write(draft, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["model_type"], config["num_nextn_predict_layers"]) == (
        ["MiMoForCausalLM"], "mimo", 1)
    same(tensors(tmp_path / "out"), tensors(GOLDEN / "mimo"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (index["metadata"]["total_size"]
            == sum(x.nbytes for x in tensors(GOLDEN / "mimo").values()))
    again = load(tmp_path / "out")
    assert again.config == policy.config
    same(again.weights, policy.weights)
    same(mtp_heads.read(tmp_path / "out", again).weights, draft.weights)


def test_a_head_of_speculators_is_written_as_it_was_read(tmp_path):
    policy = load(GOLDEN / "qwen3")
    draft = mtp_heads.read(GOLDEN / STEPS, policy)
    assert (draft.config.depths, draft.config.blocks, draft.config.dtype) == (3, 3, "float16")
    publish(draft, tmp_path / "head", verifier="org/policy")
    same(tensors(tmp_path / "head"), tensors(GOLDEN / STEPS))
    again = jspec.load_draft(policy, tmp_path / "head")
    assert again.config == draft.config
    same(again.weights, draft.weights)
    got, want = (json.loads((where / "config.json").read_text())
                 for where in (tmp_path / "head", GOLDEN / STEPS))
    assert got["speculators_config"].pop("verifier") == {
        "name_or_path": "org/policy", "architectures": ["Qwen3ForCausalLM"]}
    methods = want["speculators_config"]
    assert got.pop("speculators_config") == {
        "algorithm": methods["algorithm"], "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}]}
    layer = got.pop("transformer_layer_config")
    assert got == {key: x for key, x in want.items() if key in got}
    assert set(want) - set(got) == {"transformers_version", "speculators_config",
                                    "transformer_layer_config"}
    shared = set(layer) & set(want["transformer_layer_config"]) - {"bos_token_id", "pad_token_id"}
    assert all(layer[key] == want["transformer_layer_config"][key] for key in shared)
    short = mtp_heads.read(GOLDEN / STEPS, policy, depths=1)
    assert short.config.blocks == short.config.depths == 1
    with pytest.raises(InputError, match="exists and is neither empty nor a model's directory"):
        mtp_heads.write(draft, copy("qwen3", tmp_path / "trunk"))


@pytest.mark.parametrize("change, text", [
    ({"head_dim": 16}, "made for another policy: its head_dim is 16, the policy's is 8"),
    ({"model_type": "llama"},
     "made for another policy: its family is llama, the policy's is qwen3"),
    ({"model_type": "qwen3_5_text"}, "architecture Qwen3_5ForCausalLM is not supported: its layers "
     "have gated attention, linear attention and zero-centred norms, which jspec does not compute"),
    ({"model_type": "mixtral"}, "a block of model_type 'mixtral' is not supported; supported: "),
])
def test_heads_of_speculators_that_do_not_fit(change, text, tmp_path):
    directory = copy(STEPS, tmp_path / "m")
    layer = json.loads((directory / "config.json").read_text())["transformer_layer_config"]
    edit_config(directory, transformer_layer_config={**layer, **change})
    assert text in message(mtp_heads.read, directory, load(GOLDEN / "qwen3"))


def test_heads_of_any_trunk(policy, tmp_path):
    """DeepSeek-V3's and Qwen3-Next's names on a trunk that there is, with the copies of the trunk's
    tensors that some publish."""
    draft = jspec.drafts.mtp(policy, jax.random.key(0))
    draft = draft.replace(config=dataclasses.replace(draft.config, first=1))
    hub.export(policy, tmp_path / "out")
    mtp_heads.write(draft, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    names = {name for name in tensors(tmp_path / "out") if name.startswith("model.layers.2.")}
    assert ({"model.layers.2.eh_proj.weight", "model.layers.2.shared_head.norm.weight",
             "model.layers.2.self_attn.q_proj.bias"} < names and len(names) == 16)
    theirs, other = (mtp_tensors(MTP_LAYOUTS[name], policy.config)
                     for name in ("DeepseekV3ForCausalLM", "Qwen3NextForCausalLM"))
    held = tensors(tmp_path / "out")
    for number, stored in enumerate((theirs, other)):
        directory = tmp_path / str(number)
        directory.mkdir()
        renamed = dict(zip([t.name for t in theirs], [t.name for t in stored], strict=True))
        copies = {"model.layers.2.embed_tokens.weight": held["model.embed_tokens.weight"],
                  "model.layers.2.shared_head.head.weight": held["lm_head.weight"]}
        save_file({renamed.get(name, name): x for name, x in held.items()}
                  | ({} if number else copies), directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config))
        again = load(directory)
        same(again.weights, policy.weights)
        head = mtp_heads.read(directory, again)
        assert head.config == draft.config
        same(head.weights, draft.weights)
    assert {"mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"} < tensors(directory).keys()


@pytest.mark.parametrize("architecture, lacking", [
    ("DeepseekV3ForCausalLM", "multi-head latent attention, shared experts and sigmoid routing"),
    ("Glm4MoeForCausalLM", "shared experts, sigmoid routing and partial rotary embedding"),
    ("Qwen3NextForCausalLM",
     "gated attention, linear attention, shared experts and zero-centred norms"),
    ("Qwen3_5ForConditionalGeneration",
     "gated attention, linear attention and zero-centred norms")])
def test_a_trunk_that_is_not_supported_is_refused_before_anything_is_read(
        architecture, lacking, policy, tmp_path):
    """There are no tensors in the directory."""
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": [architecture], "num_nextn_predict_layers": 1}))
    reason = (f"architecture {architecture} is not supported: its layers have {lacking}, which "
              "jspec does not compute; supported: LlamaForCausalLM")
    assert (message(mtp_heads.read, tmp_path, policy).startswith(
        f"{tmp_path}: no MTP head of {architecture} can be read: {reason}"))
    assert reason in message(load, tmp_path)


def test_mixed_dtypes_lose_nothing(policy, tmp_path):
    half = edit_tensors(copy("mimo", tmp_path / "m"), lambda t: t.update(
        {PREFIX + "input_proj.weight": t[PREFIX + "input_proj.weight"].astype(np.float16)}))
    draft = mtp_heads.read(half, policy)
    mtp_heads.write(draft, tmp_path / "head")
    same(mtp_heads.read(tmp_path / "head", policy).weights, draft.weights)


@pytest.mark.parametrize("k", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_greedy_speculation_with_the_head_changes_nothing(k, policy, draft):
    batch = jspec.PromptBatch.from_tokens([[7, 3, 9, 11, 2, 30], [5], [4, 8]], group_size=2, seed=0,
                                          buckets=(8,))
    sampling = Sampling(max_new_tokens=20, temperature=0.0, stop_tokens=())
    plain = jspec.rollout(policy, None, batch, sampling=sampling)
    out = jspec.rollout(policy, draft, batch, sampling=sampling, speculation=Speculation(k=k))
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_allclose(out.logprobs, plain.logprobs, atol=1e-5)
    assert out.stats.drafted.shape == (k,) and int(out.stats.drafted.min()) > 0


def message(call, *args, **options):
    with pytest.raises(InputError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("change, text", [
    ({"hidden_size": 24},
     "made for another policy: its hidden_size is 24, the policy's is 16; take the head and"),
    ({"vocab_size": 50}, "made for another policy: its vocab_size is 50, the policy's is 48"),
    ({"rope_theta": 1e4}, "made for another policy: its rope.theta is 10000.0, the policy's is "),
    ({"num_nextn_predict_layers": 0},
     "the checkpoint has no MTP head (num_nextn_predict_layers in config.json is 0)"),
    ({"num_nextn_predict_layers": None},
     "has no MTP head (num_nextn_predict_layers in config.json is None)"),
    ({"num_nextn_predict_layers": None, "mtp_num_hidden_layers": 2},
     "has several MTP heads, and one is supported (mtp_num_hidden_layers in config.json is 2)"),
    ({"mtp_num_hidden_layers": 2}, "has 1 as num_nextn_predict_layers, and 2 as "
     "mtp_num_hidden_layers, which contradict each other"),
    ({"num_nextn_predict_layers": 2}, "has several MTP heads, and one is supported"),
    ({"num_nextn_predict_layers": "1"},
     "has '1' as num_nextn_predict_layers; expected a whole number"),
    ({"architectures": ["Qwen2ForCausalLM"]},
     "no MTP head of a known layout is there: of Qwen2ForCausalLM, tensor "
     "model.layers.2.eh_proj.weight or mtp.fc.weight is looked for"),
    ({"architectures": ["BambaForCausalLM"]}, "no MTP head of BambaForCausalLM can be read: "
     "architecture BambaForCausalLM is not supported; supported: "),
    ({"architectures": None}, "no MTP head of an unnamed architecture can be read: "),
])
def test_configs_that_do_not_fit(change, text, policy, tmp_path):
    assert (text in message(mtp_heads.read, edit_config(copy("mimo", tmp_path / "m"), **change),
                            policy))


def test_every_fault_of_a_config_names_its_folder(policy, tmp_path):
    for change in ({"vocab_size": None}, {"num_nextn_predict_layers": "1"}, {"hidden_size": 24}):
        directory = edit_config(copy("mimo", tmp_path / str(*change)), **change)
        assert message(mtp_heads.read, directory, policy).startswith(f"{directory}: ")


def _without_count(directory):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["num_nextn_predict_layers"]
    path.write_text(json.dumps(config))
    return directory


def test_a_config_without_the_count(policy, tmp_path):
    assert "the checkpoint has no MTP head" in message(
        mtp_heads.read, _without_count(copy("mimo", tmp_path / "m")), policy)


@pytest.mark.parametrize("change, text", [
    (lambda t: t.pop(PREFIX + "input_proj.weight"),
     "tensor model.mtp_layers.0.input_proj.weight is missing"),
    (lambda t: t.pop(PREFIX + "self_attn.q_proj.bias"),
     "tensor model.mtp_layers.0.self_attn.q_proj.bias is missing"),
    (lambda t: t.update({PREFIX + "enorm.weight": np.ones(16, np.float32)}),
     "tensor model.mtp_layers.0.enorm.weight has no place in the MTP head of MiMoForCausalLM"),
    (lambda t: t.update({"model.mtp_layers.1.input_proj.weight": np.ones(16, np.float32)}),
     "tensor model.mtp_layers.1.input_proj.weight has no place in"),
    (lambda t: t.update({PREFIX + "input_proj.weight": np.ones((16, 16), np.float32)}), "tensor "
     "model.mtp_layers.0.input_proj.weight has shape [16, 16], but the config says [16, 32]"),
], ids=["missing", "bias missing", "left over", "second layer", "shape"])
def test_tensors_that_do_not_fit(change, text, policy, tmp_path):
    assert (text in message(mtp_heads.read, edit_tensors(copy("mimo", tmp_path / "m"), change),
                            policy))


def test_other_things_that_cannot_be_read(policy, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json; a model directory has config.json and safetensors" in message(
        mtp_heads.read, tmp_path / "empty", policy)
    assert "depths = 0 must be at least 1" in message(
        mtp_heads.read, GOLDEN / "mimo", policy, depths=0)
    path = copy("mimo", tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "model.safetensors: cut short" in message(mtp_heads.read, tmp_path / "m", policy)


def test_what_cannot_be_written(policy, draft, tmp_path):
    other = jspec.drafts.mtp(policy, jax.random.key(0))
    assert ("no published mtp head has blocks=1, vocab_size=0, hidden_first=False, "
            "normed_trunk=True, first=0" in message(mtp_heads.write, other, tmp_path / "a"))
    reduced = draft.replace(config=dataclasses.replace(draft.config, vocab_size=4))
    assert "vocab_size=4" in message(mtp_heads.write, reduced, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert ("exists and is neither empty nor a model's directory" in message(mtp_heads.write, draft,
                                                                             tmp_path / "full"))
    assert "has an MTP head already; export the policy into a new directory first" in message(
        mtp_heads.write, draft, copy("mimo", tmp_path / "m"))
    assert ("is not of the policy that the head drafts for: its family is llama, the policy's is "
            "qwen2" in message(mtp_heads.write, draft, copy("llama", tmp_path / "l")))


def test_the_head_goes_where_the_mesh_has_it(policy):
    from jspec.sharding import make_mesh

    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        draft = mtp_heads.read(GOLDEN / "mimo", policy)
        assert ({type(x.sharding).__name__ for x in jax.tree.leaves(draft.weights)}
                == {"NamedSharding"})
