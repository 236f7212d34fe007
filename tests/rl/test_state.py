"""The state's shape is known before any weights are: what begins, is restored and compiled for is
as it says."""

import dataclasses

import jax
import pytest

import jspec
from jspec.model import ModelConfig, abstract_policy, init_policy
from jspec.rl.state import draft_specs, init_state, state_specs
from jspec.rl.update_settings import OptimizerSettings, UpdateSettings
from jspec.sharding import AXES, make_mesh, place, spec_sharding

MODEL = ModelConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=2,
                    num_kv_heads=1, head_dim=8)


def shapes(tree, with_sharding=True):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding if with_sharding else None), tree)


@pytest.mark.parametrize("mesh, name, options, settings", [
    (True, "mtp", {"vocab": [3, 1, 2]}, UpdateSettings()), (False, "mtp", {}, UpdateSettings()),
    (True, "eagle3", {}, UpdateSettings(draft_optimizer=OptimizerSettings("muon"))),
    (True, "suffix", {"history_prompts": 4}, UpdateSettings()),
    (True, None, {}, UpdateSettings(warmup_steps=3))])
def test_a_state_begins_as_its_specs_say(mesh, name, options, settings):
    def make() -> tuple:
        policy = init_policy(MODEL, 0)
        draft = name and getattr(jspec.drafts, name)(policy, jax.random.key(1), **options)
        return init_state(policy, draft, settings, seed=0), state_specs(
            abstract_policy(MODEL), draft and draft.replace(weights=None), settings)

    if mesh:
        with jax.set_mesh(make_mesh(1, 1, 1)):
            state, specs = make()
    else:
        state, specs = make()
        assert all(spec.sharding is None for spec in jax.tree.leaves(specs))
    assert shapes(state, mesh) == shapes(specs, mesh)


def test_a_draft_is_split_by_the_heads_that_its_drafter_says():
    """An eagle3 block's own: three of them do not lie on two shards, as the policy's two do."""
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 2), AXES)
    draft = jax.eval_shape(lambda key: jspec.drafts.eagle3(init_policy(MODEL, 0), key),
                           jax.random.key(1))
    block = dataclasses.replace(draft.config.block, num_heads=3, num_kv_heads=3)
    drafter, own = draft.drafter, dataclasses.replace(draft.config, block=block)
    spec_sharding(drafter.specs(draft.config), drafter.model(draft.config), mesh=mesh)
    with pytest.raises(jspec.InputError, match="q_heads = 3"):
        spec_sharding(drafter.specs(own), drafter.model(own), mesh=mesh)
    assert jspec.drafts.find("mtp", "draft.name").model(draft.config) is MODEL


def test_without_a_mesh_nothing_is_placed_anywhere():
    specs = jspec.model.param_specs(MODEL)
    assert not jax.tree.leaves(spec_sharding(specs, MODEL))
    assert not place([1.0, 2.0], "rollout", "batch").committed
    draft = jspec.drafts.ngram(init_policy(MODEL, 0))
    assert draft_specs(draft) == draft and draft_specs(None) is None
