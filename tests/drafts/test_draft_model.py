"""A smaller policy drafts: what it has seen is right in every cycle, whatever was accepted and
however long nothing was drafted, and its vocabulary need not be padded as the policy's is."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from benchmarks import compiled_text
from jspec.drafts import base
from jspec.drafts.parts.losses import divergence
from jspec.errors import InputError
from jspec.heads import publish
from jspec.hlo import instructions
from jspec.model import abstract_policy, logits, policy_sharding, prefill, train_forward
from jspec.model.pool import rows_of
from jspec.sharding import make_mesh
from jspec.speculate.cycle import cycle
from jspec.speculate.rollout import start
from jspec.speculate.state import rows_in_slots
from jspec.speculate.types import NOISE
from tests.compiling import as_users_compile
from tests.drafts.recursive import lesson
from tests.speculate import drafters, tiny
from tests.speculate.ties import assert_same, generated
from tests.test_sharding import on_devices

MODULE = importlib.import_module("jspec.drafts.draft_model")
PROMPTS = [[1, 2, 1, 2, 1], [5], [7, 6, 7, 6], [4, 4, 4]]
SAMPLING = jspec.Sampling(max_new_tokens=12, temperature=jnp.tile(jnp.array([1.0, 0.0]), 8),
                          stop_tokens=(3,))
BATCH = jspec.PromptBatch.from_tokens(PROMPTS, group_size=4, seed=0, buckets=(8,))


def make_policy(vocab=11, **options):
    return tiny.policy(vocab, **{"layers": 1, "heads": 4, "kv_heads": 2, "hidden": 32,
                                 "scale": 0.25, **options})


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def run(policy, draft, k=3, rule="coupled", sampling=SAMPLING):
    return jspec.rollout(policy, draft, BATCH, sampling=sampling,
                         speculation=jspec.Speculation(k=k, rule=rule))


def of_policy(policy):
    return jspec.drafts.draft_model(policy, model=policy)


def small(policy, **fields):
    return drafters.make("draft_model", policy, seed=1, scale=0.05).replace(**fields)


# --- what it has seen ---

slow = pytest.mark.slow
FALLING = ((3, 1),)  # nothing is drafted before thirteen of sixteen rows are gone
FAR = ((3, 3),)
LATE = jspec.Sampling(max_new_tokens=24, stop_tokens=(), limit=jnp.array([24] * 3 + [9] * 13))


@pytest.mark.parametrize("k, rule", [
    (FALLING, "rejection"), *(pytest.param(*case, marks=slow) for case in (
        (3, "coupled"), (3, "rejection"), (1, "rejection"), (FAR, "rejection"), (FAR, "coupled")))])
def test_the_policy_itself_is_always_accepted(policy, k, rule):
    late = {FALLING: 3 * 8, FAR: 3 * 4}  # of the last fifteen tokens of three rows
    out = run(policy, of_policy(policy), k, rule, LATE if k in late else SAMPLING)
    assert out.stats.drafted[0] == late[k] if k in late else out.stats.drafted[0] > 30
    np.testing.assert_array_equal(out.stats.accepted, out.stats.drafted)
    if k == 3:  # every cycle but a row's last emits all k + 1
        np.testing.assert_array_equal(out.stats.cycles, [-(-len(row) // 4)
                                                         for row in generated(out)])


def _all_is_right(policy, draft, state, observation):
    """After K acceptances the last draft is taken for seen."""
    seen = observation.lengths + observation.count - 1
    return state.replace(rows={"seen": jnp.where(observation.count > 0, seen, state.rows["seen"])})


def _never_behind(small, cache, seen, committed, width):
    """What was committed while nothing was drafted is left out."""
    return cache, jnp.maximum(seen, committed.lengths - 2)


@pytest.mark.parametrize("k, name, wrong", [
    (FALLING, "observe", _all_is_right),
    pytest.param(FAR, "_caught_up", _never_behind, marks=slow)])
def test_a_position_that_is_left_out_is_seen(policy, k, name, wrong, monkeypatch):
    """Planted: the check above sees it by what is accepted."""
    draft = of_policy(policy)
    if name == "observe":
        draft = draft.replace(drafter=draft.drafter._replace(observe=wrong))
    else:  # a function of its own, so that no compiled rollout is taken for another
        monkeypatch.setattr(MODULE, name, wrong)
        propose = draft.drafter.propose
        draft = draft.replace(drafter=draft.drafter._replace(
            propose=lambda *arguments: propose(*arguments)))
    out = run(policy, draft, k, "rejection", LATE)
    assert int((out.stats.drafted - out.stats.accepted).sum()) > 2


@slow
@pytest.mark.parametrize("k", [1, 3])
def test_keys_and_values_are_those_of_the_committed_tokens(policy, k):
    """After several cycles, one of them without drafts, and of rows that have come to different
    lengths; siblings' shared blocks are never written."""
    sampling = jspec.Sampling(max_new_tokens=24, stop_tokens=())
    batch = jspec.PromptBatch.from_tokens([*PROMPTS, [*range(1, 9)] * 2 + [1]], group_size=2,
                                          seed=3, buckets=(24,))
    ready, draft = jspec.reshard(policy), small(policy)
    prepared = jax.jit(draft.drafter.prepare)(ready, draft)

    def advance(state, k):
        at = rows_in_slots(state)
        noise = NOISE["coupled"](jax.random.key_data(batch.key), at.ids, at.lengths, k)
        return cycle(ready, prepared, state, noise, sampling=sampling, stop_tokens=(), k=k)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jspec.model.pool.BLOCK", 16)
        state = jax.jit(lambda: start(ready, prepared, batch, sampling, k))()
    shared = np.asarray(state.draft.cache.table)[-1, 0]
    assert shared == np.asarray(state.draft.cache.table)[-2, 0]
    before = np.asarray(state.draft.cache.k[0])[shared]
    drafting, plain = (jax.jit(lambda state, k=k: advance(state, k)) for k in (k, 0))
    seen = []
    for step in (drafting, drafting, plain, plain, plain, drafting):
        state = step(state)
        seen.append(np.asarray(state.draft.rows["seen"]))
    lengths = np.asarray(state.sequences.lengths)
    assert len(set(lengths.tolist())) > 2 and np.all(lengths - seen[-1] <= 2)
    np.testing.assert_array_equal(seen[1], seen[4])  # nothing is seen where nothing is drafted
    np.testing.assert_array_equal(np.asarray(state.draft.cache.k[0])[shared], before)
    model = MODULE._model(ready, prepared, "rollout")
    of = jnp.where(jnp.arange(state.sequences.tokens.shape[1]) < lengths[:, None],
                   state.sequences.tokens, 0)
    want = jax.jit(lambda tokens: prefill(model, tokens)[1])(of)
    for layer, pair in enumerate(want):
        for pool, expected in zip((state.draft.cache.k, state.draft.cache.v), pair, strict=True):
            got = rows_of(pool[layer], state.draft.cache.table)
            for row, n in enumerate(seen[-1]):
                np.testing.assert_allclose(got[row].swapaxes(0, 1)[:n], expected[row, :n],
                                           atol=2e-5)


# --- vocabularies ---

def padded(own, ids):
    """(policy, draft): the model has more ids, or fewer, than the policy, whose ids from 11 on have
    no token."""
    policy = make_policy(ids, tokenless=((11, ids),) if ids > 11 else ())
    model = dataclasses.replace(small(policy).config.model, vocab_size=own, tokenless=())
    return policy, jspec.drafts.draft_model(policy, 2, model=model)


PADDED = pytest.mark.parametrize("own, ids", [(11, 14), (14, 11)])


@slow
@PADDED
def test_with_padding_the_tokens_are_the_policys(own, ids):
    policy, draft = padded(own, ids)
    out = run(policy, draft)
    assert_same(policy, BATCH, SAMPLING, run(policy, None, 0), out)
    assert int(out.tokens.max()) < 11 and int(out.stats.accepted.sum()) > 8


@PADDED
def test_padding_is_never_drafted(own, ids):
    policy, draft = padded(own, ids)
    ready = jspec.reshard(policy)
    model = MODULE._model(policy, draft, "train")
    hidden = train_forward(model, jnp.array([[1, 2, 5]])).hidden
    scores = np.asarray(MODULE._logits(ready, model, hidden))
    assert scores.shape[-1] == ids and np.all(np.isneginf(scores[..., 11:]))
    np.testing.assert_array_equal(scores[..., :11], logits(model, hidden)[..., :11])


# --- sparse models, meshes ---

@slow
def test_a_sparse_model_drafts_for_a_dense_policy(policy):
    sparse = tiny.policy(11, layers=2, heads=2, kv_heads=2, hidden=16, scale=0.2, **tiny.SPARSE)
    out = run(policy, jspec.drafts.draft_model(policy, model=sparse))
    assert_same(policy, BATCH, SAMPLING, run(policy, None, 0), out)
    assert int(out.stats.accepted.sum()) > 8


OF_MESH = {"heads": 8, "kv_heads": 4, "hidden": 64, "scale": 0.2}
MESHES = [((2, 2, 2), 3), ((1, 1, 8), 3)]


def of_mesh(policy):
    """A model with two KV heads, which no eight shards can have each its own of, and more ids."""
    model = tiny.config(24, layers=1, heads=8, kv_heads=2, hidden=32, scale=0.1)
    return jspec.drafts.draft_model(policy, jax.random.key(2), model=model)


def worker():
    """Prints tokens and acceptance on every mesh, and what in the loops crosses the shards of the
    batch, as JSON."""
    found = []
    for sizes, k in MESHES:
        policy, mesh = make_policy(16, **OF_MESH), make_mesh(*sizes)
        with jax.set_mesh(mesh):
            policy = policy.replace(weights=jax.device_put(policy.weights, policy_sharding(
                policy.config, mesh)))
            draft = of_mesh(policy)
            compiled = jax.jit(lambda policy, draft, k=k: run(policy, draft, k)).lower(
                policy, draft).compile(as_users_compile())
            loops = compiled_text.in_loops(instructions(compiled.as_text()))
            # a CPU waits for all devices in a permutation of some
            passed = [x.scope for x in loops.values() if x.opcode.startswith("collective-permute")]
            crossing = compiled_text.crossing(loops, [device // sizes[2] for device in range(8)])
            out, q = compiled(policy, draft), draft.weights["layers"]["q"]
            found.append([out.tokens.tolist(), out.stats.accepted.tolist(),
                          list(q.sharding.shard_shape(q.shape)), crossing + passed])
    print(json.dumps(found))


@slow
def test_eight_devices_give_the_tokens_of_one():
    policy = make_policy(16, **OF_MESH)
    found = on_devices(8, "from tests.drafts.test_draft_model import worker; worker()")
    for (tokens, accepted, shard, crossing), (sizes, k) in zip(found, MESHES, strict=True):
        one = run(policy, of_mesh(policy), k)
        assert not crossing
        assert_same(policy, BATCH, SAMPLING, one, one.replace(tokens=np.array(tokens)))
        np.testing.assert_allclose(accepted, one.stats.accepted, atol=2)
        assert shard == [1, 32 // sizes[2], 32 // sizes[1]]  # of the model's own sizes


# --- learning ---

@pytest.mark.parametrize("kind", ["kl", *(pytest.param(x, marks=slow) for x in ("tv", "overlap"))])
def test_its_loss_is_the_divergence_from_the_policy(policy, kind):
    tokens = jnp.array([[1, 2, 5, 7, 4, 6, 0, 0], [5, 4, 4, 9, 10, 2, 2, 1]], jnp.int32)
    begin, mask = jnp.array([3, 1]), jnp.arange(5) < jnp.array([3, 5])[:, None]
    draft = small(policy)
    batch = lesson(policy, draft, tokens, begin, mask, temperature=0.7)
    of_model = MODULE._model(policy, draft, "train")

    def log_probs(policy):
        hidden = batch.predicting(train_forward(policy, tokens).hidden)
        return jax.nn.log_softmax(logits(policy, hidden)[..., :11] / 0.7)

    total, count, metrics = jax.jit(draft.drafter.loss, static_argnums=3)(policy, draft, batch,
                                                                          kind)
    losses, overlaps = divergence(log_probs(policy), log_probs(of_model), kind)
    np.testing.assert_allclose(total, jnp.sum(losses, where=mask), rtol=1e-4)
    np.testing.assert_allclose(metrics["overlap"], [jnp.sum(overlaps, where=mask)], rtol=1e-4)
    assert count == 8


@slow
def test_it_learns(policy):
    """Thirty steps on a few sequences bring it nearer to the policy, and every weight moves."""
    tokens = jax.random.randint(jax.random.key(3), (8, 8), 0, 11)
    draft = small(policy)
    batch = lesson(policy, draft, tokens, jnp.full(8, 1), jnp.ones((8, 7), bool))

    def mean(weights):
        total, count, _ = draft.drafter.loss(policy, draft.replace(weights=weights), batch, "kl")
        return total / count

    @jax.jit
    def step(weights):
        value, grads = jax.value_and_grad(mean)(weights)
        return value, jax.tree.map(lambda x, g: x - 0.05 * g, weights, grads), grads

    weights, values = draft.weights, []
    for _ in range(30):
        value, weights, grads = step(weights)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


# --- what is refused ---

def message(call):
    with pytest.raises(jspec.InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_models(policy):
    def make(model=None, key=0, policy=policy):
        return message(lambda: jspec.drafts.draft_model(policy, key, model=model))

    assert "model=jspec.load(NAME)" in make(key=None) and "a seed" in make(key=None)
    assert ("the policy has a token of id 10, and the model only 8 ids"
            in make(tiny.config(8)))
    assert "no 'num_layer'; did you mean num_layers?" in make({"num_layer": 1})
    assert "num_layers = 0 must be at least 1" in make({"num_layers": 0})
    assert "model = 'smollm2' must be a policy, a ModelConfig, or fields" in make("smollm2")
    assert "training layout" in make(jspec.reshard(policy))
    other = make_policy(layers=3)
    assert "num_layers is 1, the policy's is 3" in message(lambda: run(other, of_policy(policy)))


def test_a_model_by_its_fields(policy):
    made = jspec.drafts.draft_model(policy, 0, model={"num_layers": 2, "num_kv_heads": 4})
    assert made.config.model == dataclasses.replace(policy.config, num_layers=2, num_kv_heads=4)
    shape = jax.eval_shape(lambda policy: jspec.drafts.draft_model(policy, 0),
                           abstract_policy(make_policy(layers=8).config))
    assert shape.config.model.num_layers == 2  # where nothing is said, a quarter
    assert base.config_from_fields(made.drafter, json.loads(json.dumps(
        dataclasses.asdict(made.config)))) == made.config


def test_it_is_published_as_a_model_and_read_back_as_one(policy, tmp_path):
    made = jspec.drafts.draft_model(policy, 1)
    publish(made, tmp_path / "model")
    again = jspec.load_draft(policy, tmp_path / "model")
    assert again.config == made.config
    jax.tree.map(np.testing.assert_array_equal, again.weights, made.weights)
    with pytest.raises(InputError, match="layout specforge is for the other drafts; .* a model"):
        publish(made, tmp_path / "other", "specforge")
    publish(small(policy), tmp_path / "wider")  # ids that the policy lacks: which, only names tell
    with pytest.raises(InputError, match="has a token of id 11, and the policy has none: .* give "
                                         "the policy's, tokenizer="):
        jspec.load_draft(policy, tmp_path / "wider")
