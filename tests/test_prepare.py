"""What a run is made from: noise by purpose, and what is refused before anything is computed."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.shapes import SHAPES
from jspec import prepare, purposes
from jspec.base_model import BaseModel
from jspec.config import Config, load_config
from jspec.errors import InputError
from jspec.rl.update_settings import UpdateSettings
from jspec.sharding import make_mesh
from pallas_kernels.noise import seed_key
from tests.tiny_runs import refused, tiny

PURPOSES = [name for name in vars(purposes) if name.endswith("_KEY")]


def check(config):
    prepare.check(config, make_mesh(), BaseModel.of(config))


@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_no_two_purposes_share_noise_and_none_is_a_step_s(seed):
    assert {"EVAL_KEY", "REPORT_KEY", "SAMPLES_KEY", "BENCH_KEY"} <= set(PURPOSES)
    numbers = [getattr(purposes, name) for name in PURPOSES]
    assert min(numbers) > 2**31 - 1  # the highest number of a step
    steps = [jax.random.fold_in(seed_key(seed), step) for step in range(8)]
    keys = [seed_key(seed), *steps, *(purposes.purpose_key(seed, number) for number in numbers)]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == len(keys)
    seeds = {purposes.purpose_seed(seed, number) for number in numbers}
    assert (len(seeds)
            == len(numbers) and all(0 <= value < 2**32 and value != seed for value in seeds))


CUTS = ("top_k=2", "top_p=0.99999999", "top_p=0.6", "min_p=0.1")


@pytest.mark.parametrize("cut", [*CUTS, "min_new_tokens=2", "temperature=0"])
def test_training_on_answers_of_another_distribution_has_to_be_asked_for(cut):
    whole = [f"sampling.{cut}", f"grpo.truncated_ratio={str(cut not in CUTS).lower()}"]
    with pytest.raises(InputError,
                       match=f"sampling.{cut}: .* biases it; .* grpo.biased_sampling=true"):
        prepare.check_unbiased(load_config(None, whole))
    prepare.check_unbiased(load_config(None, [*whole, "grpo.biased_sampling=true"]))


@pytest.mark.parametrize("cut", CUTS)
def test_tokens_that_are_cut_off_bias_nothing(cut):
    prepare.check_unbiased(load_config(None, [f"sampling.{cut}"]))


def test_a_temperature_is_no_bias_for_the_update_divides_by_it_too():
    prepare.check_unbiased(load_config(None, ["sampling.temperature=0.5", "sampling.top_p=1"]))


@pytest.mark.parametrize(("override", "message"), [
    ("sampling.stop_tokens=[1, 12]", "stop token 12 is outside the model's vocabulary of 12"),
    ("speculation.k=64", "speculation.k = 64 must be below the model's 64 positions"),
])
def test_what_the_model_has_not_is_refused_without_weights(override, message):
    with pytest.raises(InputError, match=message):
        check(load_config("configs/tiny.yaml", [override]))


def test_a_pool_too_small_is_refused_without_weights():
    config = load_config("configs/tiny.yaml", ["rollout.kv_tokens=16"])
    with pytest.raises(InputError,
                       match="rollout.kv_tokens = 16 are .* blocks of .* give at least ") as caught:
        check(config)
    least = int(str(caught.value).split()[-1])
    check(load_config("configs/tiny.yaml", [f"rollout.kv_tokens={least}"]))
    with pytest.raises(InputError, match="give at least"):
        check(load_config("configs/tiny.yaml", [f"rollout.kv_tokens={least - 1}"]))


@pytest.mark.parametrize(("override", "message"), [
    ("draft.options={first: 1}", "draft.options.first: mtp has no such option"),
    ("draft.options={name: x}", "draft.options.name: mtp has no such option"),
    ("draft.options={blocks: x}", "draft.options: .*blocks"),
    ("draft={name: ngram, options: {max_ngram: 0}}", "draft.options: .*max_ngram"),
    ("draft={path: nowhere}", "no draft at nowhere"),
])
def test_drafts_that_cannot_be_are_refused_without_weights(override, message):
    with pytest.raises(InputError, match=message):
        prepare.check_draft(load_config(None, [override]), SHAPES["tiny"])


@pytest.mark.parametrize(("wrong", "name"), [
    ({"hidden_size": "x"}, "hidden_size"), ({"rope": "text"}, "rope"),
    ({"rope": {"theta": -1}}, "theta"),
    ({"rope": {"thet": 1}}, "unknown key 'model.architecture.rope.thet'; did you mean 'theta'"),
    ({"experts": {"num_experts": 8}}, "unknown key 'model.architecture.experts.num_experts'; "
     "known: count, top_k, intermediate_size, renormalize, dense_layers"),
    ({"num_layers": 10**30}, "num_layers"), ({"stop_tokens": 5}, "stop_tokens"),
    ({"hidden": 1}, "hidden"), ({"stop_tokens": ["a"]}, "stop_tokens"),
    ({"num_heads": True}, "num_heads"), ({"family": []}, "family"),
])
def test_an_architecture_that_is_none_is_named(wrong, name):
    right = load_config("configs/tiny.yaml").model.architecture
    config = load_config("configs/tiny.yaml", [("model.architecture", right | wrong)])
    with pytest.raises(InputError, match=name) as caught:
        BaseModel.of(config).config  # noqa: B018
    assert "model.architecture" in str(caught.value) and "\n" not in str(caught.value)


def test_a_batch_that_the_mesh_does_not_divide(tmp_path):
    def check(config, sizes):
        mesh = jax.sharding.AbstractMesh(sizes, ("data", "fsdp", "tensor"))
        prepare.check(config, mesh, BaseModel.of(config))

    with pytest.raises(InputError,
                       match="16 sequences is not divided by the mesh's 3 batch shards"):
        check(tiny(tmp_path), (3, 1, 1))
    with pytest.raises(InputError,
                       match="a batch of 1 sequences is not divided by the mesh's 2 batch shards"):
        check(tiny(tmp_path, "grpo.micro_batch=1"), (2, 1, 1))


@pytest.mark.parametrize("override, message", [
    ("mesh.tensor=3", "does not fit 1 devices"),
    ("reward.function=nowhere.py:f", "there is no file nowhere.py"),
    ("data.max_prompt_tokens=60", "more than the model's 64 positions"),
    ("data.max_prompt_tokens=2", "has 3 tokens, over data.max_prompt_tokens=2"),
    ("data.source=nowhere.jsonl", "cannot read the prompts nowhere.jsonl"),
    ("model.architecture.hiden_size=3", "did you mean 'hidden_size'?"),
    ("model.architecture.vocab_size=8", "has 16 tokens, the model random only 8"),
    ("model.architecture.num_kv_heads=3", "not a multiple of num_kv_heads"),
    ("draft.options.depth=3", "draft.options.depth: mtp has no such option"),
    ("draft.path=nowhere", "no draft at nowhere"),
    ("lora.rank=33", "lora.rank=33 is above 32, the highest rank that a matrix with adapters has"),
])
def test_what_the_user_can_put_right_is_one_line(tmp_path, override, message):
    assert message in refused(tiny(tmp_path, override))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_reference_is_a_frozen_copy_in_the_compute_dtype(tmp_path):
    config = tiny(tmp_path, "grpo.kl_weight=0.1", "model.dtype=bfloat16")
    policy = BaseModel.of(config).policy()
    reference = prepare.make_reference(config, policy)
    jax.tree.map(lambda x: x.delete(), policy.weights)  # as the update does, by donation
    assert {str(x.dtype) for x in jax.tree.leaves(reference)} == {"bfloat16"}
    assert np.isfinite(np.asarray(reference.weights["embed"], np.float32)).all()
    assert prepare.make_reference(tiny(tmp_path), policy) is None


def test_config_sections_reach_the_update():
    config = Config()
    settings = UpdateSettings.of(dataclasses.replace(
        config, draft=dataclasses.replace(config.draft, clip=7.0, every_n_steps=3),
        grpo=dataclasses.replace(config.grpo, clip=5.0, clip_high=0.5, micro_batch=2)))
    assert (settings.draft_optimizer.clip, settings.draft_every, settings.clip, settings.clip_high,
            settings.micro_batch) == (7.0, 3, 5.0, 0.5, 2)
