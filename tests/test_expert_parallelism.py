"""A sparse policy's tokens and gradients are the same on one device and on eight, however experts,
rows and matrices are split."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.model import Experts, init_policy, logits, policy_sharding, train_forward
from jspec.model.experts import EXPERT_AXES, mixture
from jspec.model.quantized import dequantize, quantize
from jspec.sharding import check_mesh, make_mesh
from tests.speculate import tiny
from tests.speculate.ties import assert_same
from tests.test_sharding import learned, message, on_devices

FEW = [dict(fsdp=2, expert=2, tensor=2)], (None,)
ALL = [dict(expert=8), dict(fsdp=2, expert=4), dict(data=2, expert=2, tensor=2),
       dict(data=2, fsdp=2, expert=2), dict(data=2, fsdp=2, tensor=2), *FEW[0]], (None, "mtp",
                                                                                  "self")
SAMPLING = jspec.Sampling(max_new_tokens=8, stop_tokens=(3, 5, 9))
"""Some shards are done long before others."""
SCHEDULE = ((1, 1), (4, 2))


def make():
    """Two layers, the first of them dense; 8 experts, 2 a token."""
    config = tiny.config(16, heads=8, kv_heads=4, hidden=32, layers=2, scale=0.4)
    config = dataclasses.replace(config, family="qwen3_moe", qk_norm=True, experts=Experts(
        count=8, top_k=2, intermediate_size=16, dense_layers=(0,)))
    return init_policy(config, jax.random.key(0))


def make_batch():
    prompts = [[1, 2, 1, 2], [5], [7, 6, 7, 6, 7], [4, 4, 4]]
    return jspec.PromptBatch.from_tokens(prompts, group_size=8, seed=0, buckets=(8,))


def run(policy, name):
    draft = None if name is None else getattr(jspec.drafts, name)(policy, jax.random.key(1))
    return jspec.rollout(policy, draft, make_batch(), sampling=SAMPLING,
                         speculation=jspec.Speculation(k=SCHEDULE if draft else 0, rule="coupled"),
                         batching=jspec.Batching(slots=16))


def gradient(policy):
    """Of a number that is made of all logits, by name."""
    tokens = make_batch().tokens[jnp.arange(16) % 4]

    def number(weights):
        made = policy.replace(weights=weights)
        return jnp.square(logits(made, train_forward(made, tokens).hidden)).mean()

    value, found = jax.jit(jax.value_and_grad(number))(policy.weights)
    return {jax.tree_util.keystr(path): x
            for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get((value, found)))}


def learn(policy, drafters, **options):
    """What is learned, of a whole update where the policy decodes with drafts."""
    return learned(policy, **options) if "mtp" in drafters else gradient(policy)


def worker(folder, meshes, drafters):
    """An npz of tokens, and one of gradients, for each mesh."""
    policy, placed = make(), []
    for i, sizes in enumerate(meshes):
        mesh = make_mesh(**{"data": 1, **sizes})
        with jax.set_mesh(mesh):
            sharding = policy_sharding(policy.config, mesh)
            sharded = policy.replace(weights=jax.device_put(policy.weights, sharding))
            outs = {name: run(sharded, name) for name in drafters}
            np.savez(Path(folder) / f"{i}.npz", **{
                f"{name} {field}": getattr(out, field) for name, out in outs.items()
                for field in ("tokens", "lengths", "logprobs")})
            np.savez(Path(folder) / f"learned-{i}.npz",
                     **learn(sharded, drafters, micro_batch=8, widths=(3,)))
        placed.append(list(sharded.weights["layers"]["expert_down"].sharding.shard_shape(
            (1, 8, 32, 16))))
    print(json.dumps(placed))


@pytest.mark.parametrize("meshes, drafters", [FEW, pytest.param(*ALL, marks=pytest.mark.slow)])
def test_eight_devices_give_what_one_gives(meshes, drafters, tmp_path):
    placed = on_devices(8, "from tests.test_expert_parallelism import worker; "
                        f"worker({str(tmp_path)!r}, {meshes!r}, {drafters!r})")
    policy = make()
    one, whole = run(policy, None), learn(policy, drafters, widths=(6,))
    for i, sizes in enumerate(meshes):
        with np.load(tmp_path / f"{i}.npz") as data:
            for name in drafters:
                other = one.replace(tokens=data[f"{name} tokens"], lengths=data[f"{name} lengths"])
                assert_same(policy, make_batch(), SAMPLING, one, other)
                same = other.tokens == np.asarray(one.tokens)
                gap = np.where(same, data[f"{name} logprobs"] - one.logprobs, 0)
                np.testing.assert_allclose(gap, 0, atol=1e-5)
        with np.load(tmp_path / f"learned-{i}.npz") as data:
            assert data.keys() == whole.keys()
            for name, x in whole.items():
                np.testing.assert_allclose(data[name], x, rtol=0, err_msg=f"{sizes} {name}",
                                           atol=1e-5 * (1e-3 + np.abs(x).max()))
        expert, fsdp, tensor = (sizes.get(name, 1) for name in ("expert", "fsdp", "tensor"))
        assert placed[i] == [1, 8 // expert, 32 // fsdp, 16 // tensor]


@pytest.mark.parametrize("layout, bits", [("train", None), ("rollout", None), ("rollout", 4)])
def test_one_device_may_have_a_mesh(layout, bits):
    """As every command has: all of its axes are of one device."""
    policy = make()
    w = {name: x[-1] for name, x in policy.weights["layers"].items()}
    exact = {name: quantize(w[name], bits) if bits else w[name] for name in EXPERT_AXES}
    w, exact = w | exact, w | {name: dequantize(x) if bits else x for name, x in exact.items()}
    x = jax.random.normal(jax.random.key(0), (1, 4, 32))
    want, routes = mixture(policy.config, layout, exact, x)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        got, same = mixture(policy.config, layout, w, x)
    np.testing.assert_array_equal(same, routes)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * float(jnp.abs(want).max()))


def test_what_a_mesh_must_divide():
    config = make().config
    mesh = jax.sharding.AbstractMesh((1, 1, 3, 1), ("data", "fsdp", "expert", "tensor"))
    text = message(lambda: policy_sharding(config, mesh))
    assert "expert" in text and "3" in text and "8" in text
    dense = dataclasses.replace(config, family="qwen3", experts=None)
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 1), ("data", "fsdp", "expert", "tensor"))
    assert "mesh.expert = 2" in message(lambda: check_mesh(dense, mesh))
