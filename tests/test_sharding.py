"""The same tokens on one device and on eight, and the mesh's refusals. Eight virtual devices need
their own process."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jspec
from benchmarks import compiled_text
from benchmarks.shapes import SHAPES
from jspec.config import load_config
from jspec.model import abstract_policy, init_policy, layers, param_specs, policy_sharding
from jspec.model.quantized import GROUP, Quantized, dequantize
from jspec.rl import groups
from jspec.rl import update as up
from jspec.rl.batch import TrainBatch
from jspec.rl.state import init_state
from jspec.rl.update_settings import UpdateSettings
from jspec.sharding import check_rows, configured_mesh, make_mesh, partition
from jspec.speculate.arguments import check_groups
from jspec.step import for_host, to_learn_from
from pallas_kernels.noise import BlockNoise, RejectionNoise
from pallas_kernels.rejection_sampling import draw, rejection_sampling
from tests.compiling import as_users_compile
from tests.pallas_kernels.interpreters import PLAIN
from tests.pallas_kernels.test_rejection_sampling_kernels import assert_same as assert_same_verdicts
from tests.pallas_kernels.test_rejection_sampling_kernels import case, chilled, ruined, verdict
from tests.speculate import tiny
from tests.speculate.ties import assert_same

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
ALL = [(kv_heads, sizes) for kv_heads in (8, 2) for sizes in MESHES]
FEW = [(8, (2, 2, 2))]
SAMPLING = jspec.Sampling(max_new_tokens=8, stop_tokens=(3,))
K = 3
"""With 2, what attention and the MLP compute on a shard of two rows has as many elements as the
pool, and would be taken for a copy of it."""


def config(kv_heads):
    """Eight shards of the MLP's hidden layer have whole groups of 4-bit weights."""
    made = tiny.config(16, heads=8, kv_heads=kv_heads, hidden=64, scale=0.2)
    return dataclasses.replace(made, intermediate_size=8 * GROUP)


def make(kv_heads):
    return init_policy(config(kv_heads), jax.random.key(0))


def make_batch():
    prompts = [[1, 2, 1, 2], [5], [7, 6, 7, 6, 7], [4, 4, 4]]
    return jspec.PromptBatch.from_tokens(prompts, group_size=4, seed=0, buckets=(8,))


def run(policy, name, kernels="auto", rule="coupled"):
    draft = None if name is None else getattr(jspec.drafts, name)(policy, jax.random.key(1))
    return jspec.rollout(policy, draft, make_batch(), sampling=SAMPLING,
                         speculation=jspec.Speculation(k=K, rule=rule, kernels=kernels))


def run_and_read(policy, mesh, kv_heads):
    """`run` with the draft that learns, and what is in the loops of its compiled program."""
    draft, tensor = jspec.drafts.mtp(policy, jax.random.key(1)), mesh.shape["tensor"]
    rollout = jax.jit(partial(jspec.rollout, sampling=SAMPLING,
                              speculation=jspec.Speculation(k=K, rule="coupled")))
    compiled = rollout.lower(policy, draft, make_batch()).compile(as_users_compile())
    heads = max(1, kv_heads // tensor)  # one that several shards share is on each of them
    shards = [device // tensor for device in range(mesh.size)]
    return (compiled(policy, draft, make_batch()),
            compiled_text.read(compiled.as_text(), (heads, 32, 8), shards))


def loop_over(mesh, axis):
    """The text of a decode loop that sums over an axis of the mesh."""
    def decode(x):
        with jax.named_scope("loop_4"):
            return jax.lax.while_loop(lambda x: x[0] < 9, lambda x: x + jax.lax.psum(x, axis), x)

    split = jax.jit(jax.shard_map(decode, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"),
                                  check_vma=False))
    return split.lower(jnp.ones(8)).compile().as_text()


def crossing(mesh, axis):
    """The collectives in that loop that cross the shards of a batch."""
    shards = [device // mesh.shape["tensor"] for device in range(mesh.size)]
    return compiled_text.read(loop_over(mesh, axis), (1, 1, 1), shards)["crossing"]


def verdicts(mesh, axis, coupled, uniforms=RejectionNoise):
    """Whether kernels on a vocabulary in eight parts, whose blocks cross their edges, judge as the
    reference does."""
    args = case(7, 16, 2, 8 * 200, "sampled", coupled, uniforms=uniforms)
    names, reference = list(args), verdict(banned_tokens=(5, 17))

    def judge(*args):
        return rejection_sampling(**dict(zip(names, args, strict=True)), banned_tokens=(5, 17),
                                  implementation=PLAIN, axis=axis)

    specs = tuple(P(None, None, axis) if name in ("logits", "draft_log_q") else P()
                  for name in names)
    split = jax.jit(jax.shard_map(judge, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
    for some in (args, chilled(args), ruined(args)):
        assert_same_verdicts(jax.device_get(split(*some.values())), some, reference)


def draws(mesh, axis):
    """Whether a vocabulary in eight parts, whose blocks cross their edges, is drawn from as in
    one."""
    rng = np.random.default_rng(0)
    scores = jnp.asarray(4 * rng.standard_normal((64, 8 * 200)), jnp.float32)
    log_q = jax.nn.log_softmax(scores.at[:, ::3].set(-jnp.inf))
    uniforms = jnp.asarray(rng.random((64, 1, 2)), jnp.float32)
    noise = RejectionNoise(uniforms, None, None)
    split = jax.shard_map(lambda log_q: draw(log_q, noise, 0, axis=axis), mesh=mesh,
                          in_specs=P(None, axis), out_specs=P(), check_vma=False)
    split = jax.jit(split)
    for some in (log_q, log_q.at[::2].set(jnp.nan)):
        np.testing.assert_array_equal(split(some), draw(some, noise, 0))


def learned(policy, **options):
    """The gradients and metrics of policy and draft, of answers of 1 to 6 tokens."""
    rng, prompts, n = np.random.default_rng(0), 4, 16
    settings = UpdateSettings(**options)
    state = init_state(policy, jspec.drafts.mtp(policy, jax.random.key(1), depths=1), settings, 0)
    batch = TrainBatch(
        prompts=rng.integers(0, 16, (prompts, 8), np.int32),
        prompt_lengths=rng.integers(1, 9, prompts, np.int32),
        tokens=rng.integers(0, 16, (n, 6), np.int32),
        logprobs=rng.normal(-3, 0.3, (n, 6)).astype(np.float32),
        mask=np.arange(6) < rng.integers(1, 7, (n, 1)),
        advantages=rng.normal(0, 1, n).astype(np.float32))
    if (mesh := jax.sharding.get_mesh()).size > 1:
        batch = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, partition(
            mesh, "rollout", x.shape, ("batch", *(None,) * (x.ndim - 1))))), batch)
    found = jax.jit(lambda state, batch: up.gradients(state, None, batch, settings))(state, batch)
    return {jax.tree_util.keystr(path): x
            for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(found))}


def shard_shapes(*arrays):
    return [list(x.sharding.shard_shape(x.shape)) for x in arrays]


def by_rejection(kv_heads, cases):
    """Whether a rollout by rejection is compared as well; in the small version drafts and verdicts
    are, in other programs."""
    return kv_heads == 8 and cases != FEW


def worker(folder, cases):
    """One npz of tokens and log-probabilities for each policy and mesh; prints how weights were
    placed, as JSON."""
    placed = {}
    for kv_heads, sizes in cases:
        policy, mesh = make(kv_heads), make_mesh(*sizes)
        with jax.set_mesh(mesh):
            sharded = policy.replace(weights=jax.device_put(policy.weights,
                                                            policy_sharding(policy.config, mesh)))
            out, placed["loops"] = run_and_read(sharded, mesh, kv_heads)
            assert not placed["loops"]["crossing"] + placed["loops"]["copied"], placed["loops"]
            own, ready = run(sharded, "self", "pallas"), jspec.reshard(sharded)
            prepare = jspec.drafts.self(sharded).drafter.prepare
            rounded = [jax.jit(prepare)(ready, jspec.drafts.self(sharded, bits=bits))
                       for bits in (8, 4)]
            mlps = "".join(jax.jit(layers.mlp).lower(x.weights["layers"][0], jnp.ones((1, 2, 64)))
                           .compile().as_text() for x in (ready, *rounded))
            for x in rounded:  # a shard's own digits are nearer than the whole row's
                layer = x.weights["layers"][0]
                hidden = jax.random.normal(jax.random.key(2), (8, 2, 64))
                exact = {name: dequantize(w) if isinstance(w, Quantized) else w
                         for name, w in layer.items()}
                np.testing.assert_allclose(jax.jit(layers.mlp)(layer, hidden),
                                           layers.mlp(exact, hidden), atol=1e-2)
            judged = by_rejection(kv_heads, cases)
            sampled = run(sharded, "mtp", rule="rejection") if judged else out
            # of the meshes, some split four prompts as they split rows, and some do not
            if kv_heads == 8:
                np.savez(Path(folder) / f"learned-{'x'.join(map(str, sizes))}.npz",
                         **learned(sharded, micro_batch=8, widths=(3,)))
        name = f"{kv_heads}-{'x'.join(map(str, sizes))}"
        np.savez(Path(folder) / f"{name}.npz", tokens=out.tokens, lengths=out.lengths,
                 logprobs=out.logprobs, sampled_tokens=sampled.tokens,
                 sampled_accepted=sampled.stats.accepted, self_tokens=own.tokens,
                 self_lengths=own.lengths, self_accepted=own.stats.accepted)
        stacked = sharded.weights["layers"]
        placed[name] = shard_shapes(stacked["q"], stacked["k"], ready.weights["layers"][0]["o"])
        placed["gathers"] = placed.get("gathers", 0) + mlps.count("all-gather(")
    with jax.set_mesh(make_mesh(8, 1, 1)):
        try:
            jspec.rollout(make(8), None, jspec.PromptBatch.from_tokens([[1]], group_size=4, seed=0),
                          sampling=SAMPLING)
        except jspec.InputError as error:
            placed["refused"] = str(error)
    placed["planted"] = {axis: crossing(make_mesh(2, 2, 2), axis)
                         for axis in ("data", "fsdp", "tensor")}
    draws(make_mesh(1, 4, -1), ("fsdp", "tensor"))
    verdicts(make_mesh(1, 1, -1), ("tensor",), True)
    for kind in (RejectionNoise, BlockNoise):
        verdicts(make_mesh(1, 4, -1), ("fsdp", "tensor"), False, kind)
    if cases != FEW:
        draws(make_mesh(1, 1, -1), ("tensor",))
    print(json.dumps(placed))


def on_devices(count, code):
    """What a process with so many devices printed, as JSON on its last line, when it ran `code`."""
    root = Path(__file__).parents[1]
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={count}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True,
                          text=True, timeout=5500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("cases", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def test_eight_devices_give_the_tokens_of_one(cases, tmp_path):
    placed = on_devices(8, f"from tests.test_sharding import worker; worker({str(tmp_path)!r}, "
                        f"{cases!r})")
    for kv_heads in sorted({n for n, _ in cases}):
        policy = make(kv_heads)
        one, plain, own = run(policy, "mtp"), run(policy, None), run(policy, "self")
        drawn = run(policy, "mtp", rule="rejection") if by_rejection(kv_heads, cases) else one
        assert_same(policy, make_batch(), SAMPLING, plain, one)
        for sizes in [sizes for n, sizes in cases if n == kv_heads]:
            with np.load(tmp_path / f"{kv_heads}-{'x'.join(map(str, sizes))}.npz") as data:
                sharded = one.replace(tokens=data["tokens"], lengths=data["lengths"])
                assert_same(policy, make_batch(), SAMPLING, one, sharded)
                # the policy's own layers drafting, and the kernels
                other = one.replace(tokens=data["self_tokens"], lengths=data["self_lengths"])
                assert_same(policy, make_batch(), SAMPLING, one, other)
                # a tie or two
                np.testing.assert_allclose(data["self_accepted"], own.stats.accepted, atol=2)
                np.testing.assert_allclose(data["sampled_accepted"], drawn.stats.accepted, atol=2)
                assert (data["sampled_tokens"] == np.asarray(drawn.tokens)).mean() > 0.9
                same = data["tokens"] == np.asarray(one.tokens)
                np.testing.assert_allclose(np.where(same, data["logprobs"] - one.logprobs, 0), 0,
                                           atol=1e-5)
    whole = learned(make(8), widths=(6,))
    for sizes in [sizes for n, sizes in cases if n == 8]:
        with np.load(tmp_path / f"learned-{'x'.join(map(str, sizes))}.npz") as data:
            assert data.keys() == whole.keys()
            for name, x in whole.items():
                np.testing.assert_allclose(data[name], x, rtol=0,
                                           atol=1e-5 * (1e-3 + np.abs(x).max()), err_msg=name)
    # q and k [1, heads x 8, 64] in training, o [64, 64] in the rollout: (tensor, fsdp), then tensor
    # alone
    assert placed["8-2x2x2"] == [[1, 32, 32], [1, 32, 32], [64, 32]]
    if (2, (1, 1, 8)) in cases:  # KV heads on several shards each
        assert placed["2-1x1x8"] == [[1, 8, 64], [1, 16, 64], [64, 8]]
    assert placed["gathers"] == 0  # of weights, in a layer
    # something was looked at, and nothing found
    assert placed["loops"]["pools"] and placed["loops"]["loops"]
    assert ({axis: len(found) for axis, found in placed["planted"].items()}
            == {"data": 1, "fsdp": 1, "tensor": 0})
    assert "4 sequences" in placed["refused"] and "8 batch shards" in placed["refused"]


def pod_rollout():
    """Prints what is in the decode loops of configs/qwen3-8b-pod.yaml's rollout, of two layers,
    with the kernels."""
    mesh_section = load_config(Path(__file__).parents[1] / "configs" / "qwen3-8b-pod.yaml").mesh
    mesh = configured_mesh(mesh_section)
    model = dataclasses.replace(SHAPES["qwen3-8b"], num_layers=2)
    with jax.set_mesh(mesh):
        policy = abstract_policy(model, "bfloat16")
        batch = jax.eval_shape(lambda: jspec.PromptBatch.from_tokens([[1] * 8] * 8, group_size=1,
                                                                     seed=0, buckets=(8,)))
        everywhere = jax.NamedSharding(mesh, P())
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
                             batch)
        rollout = jax.jit(partial(jspec.rollout, sampling=jspec.Sampling(max_new_tokens=8),
                                  speculation=jspec.Speculation(kernels="pallas")))
        compiled = rollout.lower(policy, None, batch).compile()
    shards = [device // mesh.shape["tensor"] for device in range(mesh.size)]
    print(json.dumps(compiled_text.read(compiled.as_text(), (2, 16, 128), shards)))


@pytest.mark.slow
def test_attention_of_the_pod_config_is_tensor_parallel():
    """8 KV heads on fsdp 8 x tensor 4: a device has 2 of them in its pool, and nothing is gathered
    to attend."""
    found = on_devices(32, "from tests.test_sharding import pod_rollout; pod_rollout()")
    assert found["loops"] == [1] and len(found["pools"]) == 1
    assert not found["gathered"] + found["crossing"], found


def abstract(data, fsdp, tensor):
    return jax.sharding.AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def message(call):
    with pytest.raises(jspec.InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
def test_one_device_is_a_mesh():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor") and mesh.size == 1
    with jax.set_mesh(mesh):
        inside = run(make(2), None)
    assert inside.tokens.tolist() == run(make(2), None).tokens.tolist()


@pytest.mark.parametrize("sizes, words", [((2, 2, 2), ("2 x 2 x 1 x 2", "1 devices", "mesh.data")),
                                          ((-1, -1, 1), ("at most one",)),
                                          ((0, 1, 1), ("positive",)),
                                          ((-1, 3, 1), ("-1 x 3 x 1 x 1",))])
def test_a_mesh_that_the_devices_do_not_fill(sizes, words):
    text = message(lambda: make_mesh(*sizes, devices=jax.devices()[:1]))
    assert all(w in text for w in words), text


def test_every_parameter_has_a_row_in_the_table():
    shardings = policy_sharding(config(8), abstract(2, 2, 2))
    specs = {jax.tree_util.keystr(p): s.spec
             for p, s in jax.tree_util.tree_leaves_with_path(shardings)}
    assert specs["['embed']"] == P(("tensor",), ("fsdp",))
    assert specs["['layers']['down']"] == P(None, ("fsdp",), ("tensor",))
    assert specs["['layers']['attn_norm']"] == P(None, None)
    assert (len(specs)
            == len(jax.tree.leaves(param_specs(config(8)), is_leaf=lambda s: hasattr(s, "axes"))))


def test_key_value_heads_beyond_the_tensor_axis_are_replicated():
    specs = policy_sharding(config(2), abstract(1, 1, 8))
    assert specs["layers"]["k"].spec == P(None, None, ("fsdp",))
    assert specs["layers"]["q"].spec == P(None, ("tensor",), ("fsdp",))


def test_a_model_that_the_mesh_does_not_divide():
    odd = tiny.config(15, heads=8, kv_heads=2, hidden=64)
    assert "vocab = 15" in message(lambda: policy_sharding(odd, abstract(1, 1, 2)))
    six = tiny.config(16, heads=6, kv_heads=6, hidden=48)
    assert "q_heads = 6" in message(lambda: policy_sharding(six, abstract(1, 1, 4)))


def test_rows_that_the_mesh_does_not_divide():
    check_rows(8, abstract(2, 4, 1))
    assert "6 sequences" in message(lambda: check_rows(6, abstract(2, 4, 1)))
    check_rows(6, abstract(2, 4, 1), "rollout_wide")  # rows over data only


def test_shares_of_groups_that_the_mesh_does_not_divide():
    check_groups("batching groups", 4, 6, 2)
    for few, prompts in ((3, 6), (2, 3)):
        assert (f"batching groups = {few} of {prompts} prompts: each of the mesh's 2 batch"
                in message(lambda of=(few, prompts): check_groups("batching groups", *of, 2)))


def over_sampled():
    """Prints what is left of a rollout that each of four shards ends when one of its two groups is
    done, two shards of experts at a time."""
    with jax.set_mesh(make_mesh(1, 2, 1, expert=2)):
        batch, out = over_sampling_rollout(groups=4)
        drawn = groups.Drawn.of(jax.device_get(for_host(out)), 8, 4, 4)
        prompts, kept = jax.jit(partial(groups.picked, shards=4))(batch, to_learn_from(out),
                                                                  drawn.kept)
        assert len(kept.tokens.addressable_shards[0].data) == 2
        print(json.dumps({name: np.asarray(x).tolist() for name, x in (
            ("tokens", out.tokens), ("lengths", out.lengths), ("done", out.done),
            ("groups", drawn.kept), ("prompts", prompts.tokens), ("kept", kept.tokens))}))


def over_sampling_rollout(**batching):
    policy = tiny.policy(16, heads=2, kv_heads=2, hidden=16, scale=0.4, **tiny.SPARSE)
    batch = jspec.PromptBatch.from_tokens([[i + 1, 2] for i in range(8)], group_size=2, seed=0,
                                          buckets=(4,))
    sampling = jspec.Sampling(max_new_tokens=12, stop_tokens=(3, 5, 9))
    return batch, jspec.rollout(policy, None, batch, sampling=sampling,
                                speculation=jspec.Speculation(k=0, rule="coupled"),
                                batching=jspec.Batching(**batching))


@pytest.mark.slow
def test_every_shard_ends_with_its_own_share_of_groups():
    found = {name: np.array(x) for name, x in on_devices(
        4, "from tests.test_sharding import over_sampled; over_sampled()").items()}
    batch, whole = over_sampling_rollout()
    lengths, done = found["lengths"], found["done"]
    assert np.all(done.reshape(4, 2, 2).all(2).any(1)) and not done.all()
    np.testing.assert_array_equal(lengths[done], whole.lengths[done])
    assert np.all(lengths <= whole.lengths)
    mask = np.arange(12) < lengths[:, None]
    assert (found["tokens"] == whole.tokens)[mask].mean() > 0.95  # a tie or two
    assert np.array_equal(found["groups"] // 2, np.arange(4))
    np.testing.assert_array_equal(found["prompts"], batch.tokens[found["groups"]])
    np.testing.assert_array_equal(found["kept"], found["tokens"].reshape(8, 2, 12)[
        found["groups"]].reshape(8, 12))


def test_partition_leaves_out_axes_that_do_not_divide():
    assert partition(abstract(2, 2, 2), "train", (6, 5), ("batch", None)) == P(("data",), None)
    assert (partition(abstract(2, 2, 2), "rollout_wide", (8, 5), ("q_heads", "embed"))
            == P(("fsdp", "tensor"), None))
