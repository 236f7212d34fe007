"""Loading a directory: what breaks is named, memory stays bounded, and a mesh gets exactly its
shards."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jspec import hub
from jspec.errors import InputError
from jspec.hub.exporter import write_checkpoint
from jspec.model.config import ModelConfig
from tests.hub.checkpoints import GOLDEN, copy, edit_config, edit_tensors, message

ROOT = Path(__file__).parents[2]
NORM = "model.layers.1.input_layernorm.weight"


def test_a_file_cut_short(tmp_path):
    path = copy("llama", tmp_path / "m") / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert "model.safetensors: cut short" in message(tmp_path / "m")
    path.write_bytes(whole[:40])
    assert "cut short in its header" in message(tmp_path / "m")
    path.write_bytes(b"")
    assert "not a safetensors file" in message(tmp_path / "m")


def test_a_corrupt_header(tmp_path):
    path = copy("llama", tmp_path / "m") / "model.safetensors"
    whole = path.read_bytes()
    replaced = [whole.replace(b'"data_offsets":[', b'"data_offsets":{', 1),
                whole.replace(b"[48,16]", b"[49,16]", 1), whole.replace(b"[48,16]", b"[48,1.]", 1),
                whole.replace(b'"dtype":"F32"', b'"dtype":["F2"]', 1),
                whole.replace(b"[48,16]", b'["",16]', 1),
                whole.replace(b"[3072,6144]", b"[0000,3072]", 1),
                whole.replace(b"[3072,6144]", b"[0,3072]   ", 1)]
    for broken in (whole[:8] + b"{{" + whole[10:], whole[:8] + b"[]" + b" " * 5000, *replaced):
        path.write_bytes(broken)
        assert "header is corrupt" in message(tmp_path / "m")


def test_a_dtype_that_is_not_read(tmp_path):
    directory = edit_tensors(copy("llama", tmp_path / "m"),
                             lambda t: t.update({NORM: np.ones(16, np.int8)}))
    assert f"tensor {NORM} is stored as I8; supported: F32, F16, BF16, F64" in message(directory)


def test_tensors_missing_left_over_or_misshapen(tmp_path):
    missing = edit_tensors(copy("llama", tmp_path / "a"), lambda t: t.pop(NORM))
    assert f"tensor {NORM} is missing" in message(missing)
    left = edit_tensors(copy("llama", tmp_path / "b"),
                        lambda t: t.update({"model.extra": np.ones(1, np.float32)}))
    assert "tensor model.extra has no place in a llama model" in message(left)
    shape = edit_tensors(copy("llama", tmp_path / "c"),
                         lambda t: t.update({NORM: np.ones(15, np.float32)}))
    assert f"tensor {NORM} has shape [15], but the config says [16]" in message(shape)


def test_more_layers_than_tensors_are_not_even_listed(tmp_path):
    directory = edit_config(copy("llama", tmp_path / "m"), num_hidden_layers=10**4)
    assert "the config says 10000 layers, and there are only 21 tensors" in message(directory)
    directory = edit_config(directory, num_hidden_layers=10**9)
    assert "1000000000 as num_hidden_layers; expected at most 10000" in message(directory)
    directory = edit_config(copy("mimo", tmp_path / "n"), num_nextn_predict_layers=10**9)
    assert "1000000000 as num_nextn_predict_layers; expected at most 64" in message(directory)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json",
                                  "model.safetensors"])
def test_a_folder_where_a_file_is_expected(tmp_path, name):
    directory = copy("llama", tmp_path / "m")
    (directory / name).unlink(missing_ok=True)
    (directory / name).mkdir()
    assert f"{name}: not a file" in message(directory)


def test_a_tied_head_may_be_stored_twice_but_must_agree(tmp_path):
    def head(change):
        return lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]
                                   + np.float32(change)})

    same = edit_tensors(copy("llama_linear_tied", tmp_path / "a"), head(0))
    assert "head" not in hub.load(str(same)).weights
    assert "lm_head.weight differs from the embedding" in message(
        edit_tensors(copy("llama_linear_tied", tmp_path / "b"), head(1)))


def test_old_rotary_buffers_are_ignored(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    hub.load(str(edit_tensors(copy("llama", tmp_path / "m"),
                              lambda t: t.update({name: np.ones(4, np.float32)}))))


def test_directories_that_are_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in message(tmp_path / "empty")
    directory = copy("llama", tmp_path / "m")
    (directory / "model.safetensors").rename(directory / "elsewhere")
    assert "no model.safetensors and no model.safetensors.index.json" in message(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    pickled = ("only pickled weights (pytorch_model.bin), which are never loaded; convert the "
               "model to safetensors")
    assert pickled in message(directory)
    (directory / "config.json").write_text("{")
    assert "config.json: not valid JSON" in message(directory)


def test_an_index_that_does_not_hold(tmp_path):
    directory = copy("qwen2_tied_sharded", tmp_path / "m")
    index = directory / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shard = good["weight_map"]["model.norm.weight"]
    moved = next(s for s in good["weight_map"].values() if s != shard)
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "model.lost.weight": moved}}))
    assert "tensor model.lost.weight is missing, though" in message(directory)
    index.write_text(json.dumps(good))
    (directory / shard).unlink()
    assert f"{shard}, which model.safetensors.index.json names, is missing" in message(directory)
    index.write_text("[]")
    assert "the index is corrupt" in message(directory)


@pytest.mark.parametrize("file, text", [
    (7, "is in 7, which is not the name"), ("", "is in '', which is not the name"),
    ("../other.safetensors", "which is not the name of a file beside it"),
    ("..", "not the name of a file beside it"), ("/etc/passwd", "not the name of a file beside it"),
    ("gone\0", "not the name of a file beside it"), ("sub", "sub: not a file"),
    ("config.json", "config.json: not a safetensors file"), ("pipe", "pipe: not a file")])
def test_an_index_names_files_beside_it(tmp_path, file, text):
    directory = copy("qwen2_tied_sharded", tmp_path / "m")
    (tmp_path / "other.safetensors").write_bytes((directory / "config.json").read_bytes())
    (directory / "sub").mkdir()
    os.mkfifo(directory / "pipe")
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "model.norm.weight": file}}))
    assert text in message(directory)


def test_the_index_says_which_of_two_shards_holds_a_tensor(tmp_path):
    want = hub.load(str(GOLDEN / "qwen2_tied_sharded")).weights["final_norm"]
    directory = copy("qwen2_tied_sharded", tmp_path / "m")
    index = directory / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    own = good["model.norm.weight"]
    for shard in set(good.values()) - {own}:
        tensors = load_file(directory / shard)
        save_file({**tensors, "model.norm.weight": np.full(16, 7, np.float32)}, directory / shard)
    np.testing.assert_array_equal(hub.load(str(directory)).weights["final_norm"], want)
    del good["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": good}))
    assert ("model.norm.weight is in " in message(directory)
            and "does not say which" in message(directory))


def test_the_hubs_cache_links_to_its_files(tmp_path):
    directory = copy("qwen2_tied_sharded", tmp_path / "m")
    (tmp_path / "blobs").mkdir()
    for path in directory.glob("*.safetensors"):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    hub.load(str(directory))


def test_dtype_and_architecture(tmp_path):
    policy = hub.load(str(GOLDEN / "llama"), dtype="bfloat16")
    assert policy.dtype == "bfloat16" and policy.weights["embed"].dtype == np.float32
    assert hub.load(str(GOLDEN / "llama")).dtype == "float32"  # the tests run on the CPU
    with pytest.raises(InputError,
                       match="dtype 'float16' is not supported; supported: float32, bfloat16"):
        hub.load(str(GOLDEN / "llama"), dtype="float16")
    other = edit_config(copy("llama", tmp_path / "m"), architectures=["GPT2LMHeadModel"])
    assert ("architecture GPT2LMHeadModel is not supported; supported: LlamaForCausalLM"
            in message(other))


def run(code, *args, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], cwd=ROOT,
                         text=True, capture_output=True, timeout=300,
                         env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "JAX_PLATFORMS": "cpu",
                              "XLA_FLAGS": flags})
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


PEAK = """
    import json, sys, threading, time
    import jax, psutil
    from jspec import hub
    from jspec.sharding import make_mesh

    def peak_ratio(directory, mesh):
        process, stop = psutil.Process(), threading.Event()
        before = process.memory_info().rss
        peak = [before]
        def watch():
            while not stop.is_set():
                peak[0] = max(peak[0], process.memory_info().rss)
                time.sleep(0.001)
        thread = threading.Thread(target=watch)
        thread.start()
        policy = jax.block_until_ready(hub.load(directory, mesh=mesh))
        alive.append(policy)  # memory that is freed and taken again would not be seen to grow
        stop.set()
        thread.join()
        arrays = sum(s.data.nbytes for x in jax.tree.leaves(policy) for s in x.addressable_shards)
        assert arrays > 100e6
        return (peak[0] - before) / arrays

    alive = []
    mesh = make_mesh(1, 2, 2)
    for m in (None, mesh):  # everything that is imported or set up once
        hub.load("tests/golden/llama", mesh=m)
    print(json.dumps([peak_ratio(sys.argv[1], m) for m in (None, mesh)]))
"""


def test_peak_memory_is_the_arrays_and_little_more(tmp_path):
    # a large untied vocabulary: the embedding and the head are a third of the model each
    config = ModelConfig(vocab_size=20000, hidden_size=512, intermediate_size=1024, num_layers=4,
                         num_heads=8, num_kv_heads=4, head_dim=64, tie_embeddings=False)
    random = np.random.default_rng(0)
    write_checkpoint(tmp_path, config, lambda t: random.random(t.shape, np.float32),
                     max_shard_bytes=10**8)
    plain, sharded = run(PEAK, tmp_path, devices=4)
    assert 0.5 < plain < 1.3
    assert 0.5 < sharded < 1.3


SHARDED = """
    import json
    import jax, numpy as np
    from jspec import hub
    from jspec.errors import InputError
    from jspec.hub import assemble, exporter
    from jspec.hub.tensors import stored_tensors
    from jspec.model.params import policy_sharding
    from jspec.sharding import make_mesh
    plain = hub.load("tests/golden/qwen2_tied_sharded")
    assemble._CHUNK_BYTES = 200  # many chunks, cut anywhere
    shards = []
    for shape in ((1, 2, 4), (2, 2, 2), (8, 1, 1), (1, 8, 1)):
        mesh = make_mesh(*shape)
        policy = hub.load("tests/golden/qwen2_tied_sharded", mesh=mesh)
        with jax.set_mesh(mesh):
            found = hub.load("tests/golden/qwen2_tied_sharded")
        for got in (policy, found):
            shardings = jax.tree.map(lambda x: x.sharding, got.weights)
            assert shardings == policy_sharding(policy.config, mesh)
            jax.tree.map(np.testing.assert_array_equal, got.weights, plain.weights)
        shards.append(policy.weights["layers"]["gate"].addressable_shards[0].data.shape)
    moe = hub.load("tests/golden/qwen3_moe", mesh=make_mesh(1, 2, 2, expert=2))
    jax.tree.map(np.testing.assert_array_equal, moe.weights,
                 hub.load("tests/golden/qwen3_moe").weights)
    experts = moe.weights["layers"]["expert_gate_up"]
    shards.append(experts.addressable_shards[0].data.shape)
    one = exporter._at.lower(experts, np.array([1, 3, 0], np.int32)).compile().as_text()
    assert "all-reduce" in one and "all-gather" not in one  # an export collects one at a time
    for tensor in stored_tensors(moe.config)[-3:]:
        exporter.host_value(moe.weights, tensor)
    try:
        hub.load("tests/golden/llama", mesh=make_mesh(1, 1, 8, devices=jax.devices()))
    except InputError as e:
        print(json.dumps([shards, str(e)]))
"""


def test_a_mesh_gets_its_shards():
    shards, message = run(SHARDED, devices=8)
    assert shards == [[2, 6, 8], [2, 12, 8], [2, 24, 16], [2, 24, 2], [2, 4, 2, 6, 8]]
    assert "do not divide the model's q_heads = 4" in message
