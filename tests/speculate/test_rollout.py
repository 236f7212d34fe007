"""What a rollout does besides drawing from the right distribution: where it stops, what it reports,
what it refuses."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.model import logits, train_forward
from jspec.rl.batch import join
from jspec.speculate import cycle
from tests.speculate import tiny
from tests.speculate.ties import generated

PROMPTS = [[1, 2, 1, 2, 1], [5], [7, 6, 7, 6, 7, 6], [4, 4, 4]]
PLAIN = jspec.Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, heads=4, kv_heads=2, hidden=32, scale=0.25, stop_tokens=(3,),
                       pad_token=9)


@pytest.fixture(scope="module")
def drafts(policy):
    return {"mtp": tiny.shaken(jspec.drafts.mtp(policy, jax.random.key(1)), scale=0.1),
            "ngram": jspec.drafts.ngram(policy), "table": tiny.table_draft(policy, sampled=False)}


def make_batch(group_size=4, seed=0, prompts=PROMPTS):
    return jspec.PromptBatch.from_tokens(prompts, group_size=group_size, seed=seed, buckets=(8,))


def forced(policy, successor):
    """A draft that follows a chain, and a policy that does: token t is followed by successor[t],
    for certain."""
    vocab = policy.config.vocab_size
    d = policy.config.hidden_size
    eye = jnp.eye(vocab, d) * 8
    layers = {k: v * 0 if k in ("o", "down") else v for k, v in policy.weights["layers"].items()}
    order = jnp.array([successor.get(t, 0) for t in range(vocab)])
    # head[v] answers to the embeddings of all tokens that v follows
    head = jnp.zeros((vocab, d)).at[order, jnp.arange(vocab)].set(8.0)
    draft = tiny.table_draft(policy, sampled=False)
    return (policy.replace(weights={"embed": eye, "layers": layers, "final_norm": jnp.ones(d),
                                    "head": head}),
            draft.replace(weights={"table": jax.nn.one_hot(order, vocab)}))


CHAIN = {1: 2, 2: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 1}


@pytest.fixture(scope="module")
def chained():
    return forced(tiny.policy(11, hidden=32, tie_embeddings=False, pad_token=9), CHAIN)


def chain(chained, *, rule="rejection", temperature=0.0, k=3, **sampling):
    policy, draft = chained
    batch = jspec.PromptBatch.from_tokens([[8]], group_size=2, seed=0, buckets=(1,))
    return jspec.rollout(policy, draft, batch,
                         sampling=jspec.Sampling(temperature=temperature, **sampling),
                         speculation=jspec.Speculation(k=k, rule=rule))


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
def test_an_end_token_inside_an_accepted_block(chained, rule):
    """1 2 4 5 is one accepted block; with 4 as the end token, 5 must not come out."""
    out = chain(chained, rule=rule, max_new_tokens=8, stop_tokens=(4,))
    assert generated(out) == [[1, 2, 4]] * 2
    assert out.finished.all() and out.stats.cycles.tolist() == [1, 1]
    np.testing.assert_array_equal(out.mask, [[True] * 3 + [False] * 5] * 2)
    np.testing.assert_array_equal(out.tokens[:, 3:], 9)
    for x in (out.logprobs, out.entropy):
        np.testing.assert_array_equal(x[:, 3:], 0)
    assert out.stats.accepted.tolist() == out.stats.drafted.tolist() == [2, 2, 2]


def test_an_end_token_exactly_at_the_cap_is_finished(chained):
    out = chain(chained, max_new_tokens=6, stop_tokens=(7,))
    assert generated(out) == [[1, 2, 4, 5, 6, 7]] * 2 and out.finished.all()
    assert float(out.acceptance_length) == 3


def test_the_cap_cuts_inside_a_block(chained):
    out = chain(chained, max_new_tokens=6, stop_tokens=(8,))
    assert generated(out) == [[1, 2, 4, 5, 6, 7]] * 2
    assert not out.finished.any() and out.lengths.tolist() == [6, 6]


def test_no_end_tokens_at_all(chained):
    assert (generated(chain(chained, max_new_tokens=9, stop_tokens=()))
            == [[1, 2, 4, 5, 6, 7, 8, 1, 2]] * 2)


def test_a_minimum_length_bans_end_tokens_inside_a_block(chained):
    """At position 3 of the first block 5 is due and banned; from the fourth on it is allowed."""
    out = chain(chained, max_new_tokens=12, min_new_tokens=4, stop_tokens=(5,))
    for row in generated(out):
        assert row[:3] == [1, 2, 4] and row[3] != 5 and 5 not in row[:4]
    # logprobs know no ban: the banned token's mass is still in the normaliser
    assert float(out.logprobs[0, 3]) < -3


def test_minimum_length_and_cap_hold_in_every_row(policy, drafts):
    sampling = jspec.Sampling(max_new_tokens=12, min_new_tokens=5, stop_tokens=(3, 1, 2))
    out = jspec.rollout(policy, drafts["ngram"], make_batch(16), sampling=sampling)
    lengths = np.asarray(out.lengths)
    # the first that may be an end token is the sixth
    assert lengths.min() >= 6 and lengths.max() <= 12
    for row, done in zip(generated(out), np.asarray(out.finished), strict=True):
        assert not set(row[:5]) & {1, 2, 3} and not set(row[:-1]) & {1, 2, 3}
        assert done == (row[-1] in (1, 2, 3))


def true_logprobs(policy, batch, out, temperature):
    """log-softmax(logits / T) and entropy by the training forward, over prompt + response without a
    gap."""
    rows, width = out.tokens.shape
    want, entropy = np.zeros((rows, width)), np.zeros((rows, width))
    for i, row in enumerate(generated(out)):
        prompt = i // batch.group_size
        before = np.asarray(batch.tokens[prompt, :int(batch.lengths[prompt])]).tolist()
        padded = jnp.array([before + row + [0] * (24 - len(before) - len(row))], jnp.int32)
        log_p = score(policy, padded)[0] / (temperature[i] or 1.0)
        log_p = np.asarray(jax.nn.log_softmax(log_p))[len(before) - 1:len(before) - 1 + len(row)]
        want[i, :len(row)] = log_p[np.arange(len(row)), row]
        entropy[i, :len(row)] = -(np.exp(log_p) * log_p).sum(-1)
    return want, entropy


score = jax.jit(lambda policy, tokens: logits(policy, train_forward(policy, tokens).hidden))


@pytest.mark.parametrize("draft", ["mtp", pytest.param("table", marks=pytest.mark.slow)])
def test_logprobs_and_entropy_are_those_of_the_training_forward(policy, drafts, draft):
    """Whatever the truncation; per-row temperature, 0 counting as 1."""
    temperature = np.tile([0.7, 1.0, 0.0, 1.6], 4).astype(np.float32)
    sampling = jspec.Sampling(max_new_tokens=10, min_new_tokens=2, top_k=6, top_p=0.95,
                              temperature=jnp.asarray(temperature))
    batch = make_batch()
    out = jspec.rollout(policy, drafts[draft], batch, sampling=sampling)
    want, entropy = true_logprobs(policy, batch, out, temperature)
    np.testing.assert_allclose(out.logprobs, want, atol=1e-4)
    np.testing.assert_allclose(out.entropy, entropy, atol=1e-4)
    np.testing.assert_array_equal(out.mask, np.arange(10) < np.asarray(out.lengths)[:, None])
    np.testing.assert_array_equal(out.loss_mask, out.mask)
    np.testing.assert_array_equal(np.asarray(out.tokens)[~np.asarray(out.mask)], 9)
    # the greedy rows of a group are one sequence
    greedy = [generated(out)[i] for i in range(16) if temperature[i] == 0]
    assert len({tuple(x) for x in greedy}) <= 4 and greedy[0][0] == int(jnp.argmax(
        score(policy, jnp.array([PROMPTS[0] + [0] * 19], jnp.int32))[0, 4].at[3].set(-jnp.inf)))


@pytest.mark.parametrize("cap, stop, counted", [
    (8, (4,), [2, 2, 2]),  # 1 2 4, and 4 is the end
    (8, (2,), [2, 2, 0]),  # 1 2, and a third draft that no verdict could have let out
    (6, (8,), [4, 4, 2]),  # 1 2 4 5, 6 7, and a third draft beyond the cap
    (3, (8,), [2, 2, 2]),  # 1 2 4: the fourth token would not have been a draft
])
def test_what_lies_beyond_an_end_or_the_cap_is_not_counted(chained, cap, stop, counted):
    out = chain(chained, max_new_tokens=cap, stop_tokens=stop)
    assert out.stats.accepted.tolist() == out.stats.drafted.tolist() == counted


def test_what_is_counted_is_known_before_the_verdict():
    """Drafts after a drafted end token do not count, also where the end token is then refused."""
    drafts = jnp.array([[5, 6, 7], [5, 3, 7], [3, 3, 7], [5, 6, 3], [5, 3, 7]])
    got = cycle._counted(drafts, jnp.array([True, True, True, True, False]),
                         jnp.array([9, 9, 9, 2, 9]), (3,))
    np.testing.assert_array_equal(got, [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]])


def test_statistics(policy, drafts):
    out = jspec.rollout(policy, drafts["ngram"], make_batch(), sampling=PLAIN)
    stats = out.stats
    drafted, accepted = stats.drafted.tolist(), stats.accepted.tolist()
    assert drafted[0] == int(stats.cycles.sum()) and drafted == sorted(drafted, reverse=True)
    assert accepted == sorted(accepted, reverse=True) and 0 < accepted[0] < drafted[0]
    # every cycle emits its accepted drafts and one token more, but for a row's last, which may end
    # in a draft
    assert (0 <= int(stats.cycles.sum()) + sum(accepted) - int(out.lengths.sum())
            <= out.lengths.shape[0])
    np.testing.assert_allclose(out.acceptance_length, out.lengths.sum() / stats.cycles.sum())


def test_without_a_draft_or_with_k_zero_it_is_autoregressive(policy, drafts):
    plain = jspec.rollout(policy, None, make_batch(), sampling=PLAIN)
    zero = jspec.rollout(policy, drafts["ngram"], make_batch(), sampling=PLAIN,
                         speculation=jspec.Speculation(k=0))
    assert generated(plain) == generated(zero)
    np.testing.assert_array_equal(plain.stats.cycles, plain.lengths)
    assert plain.stats.drafted.shape == (0,) and float(plain.acceptance_length) == 1


def test_inside_a_callers_jit(policy, drafts):
    @jax.jit
    def step(policy, draft, batch, temperature):
        return jspec.rollout(policy, draft, batch, sampling=PLAIN.replace(temperature=temperature))

    inside = step(policy, drafts["ngram"], make_batch(), 1.0)
    assert (generated(inside)
            == generated(jspec.rollout(policy, drafts["ngram"], make_batch(), sampling=PLAIN)))
    greedy = generated(step(policy, drafts["ngram"], make_batch(), 0.0))
    assert len({tuple(x) for x in greedy}) == 4 and step._cache_size() == 1


def test_a_policy_in_the_rollout_layout_is_taken_as_it_is(policy, drafts):
    a, b = (jspec.rollout(p, drafts["ngram"], make_batch(), sampling=PLAIN)
            for p in (policy, jspec.reshard(policy)))
    assert generated(a) == generated(b)


def test_a_new_prompt_length_is_no_new_compilation(policy):
    compiled = importlib.import_module("jspec.speculate.rollout")._rollout
    jspec.rollout(policy, None, make_batch(), sampling=PLAIN)
    before = compiled._cache_size()
    others = [[1], [2, 3], [4, 5, 6, 7, 8], [9] * 7]
    jspec.rollout(policy, None, make_batch(seed=5, prompts=others), sampling=PLAIN)
    assert compiled._cache_size() == before


def test_bfloat16(policy):
    """Computed in bfloat16; log-probabilities within its rounding of the float32 forward's."""
    half = policy.replace(dtype="bfloat16")
    batch = make_batch()
    out = jspec.rollout(half, None, batch, sampling=PLAIN)
    assert out.logprobs.dtype == jnp.float32
    want, _ = true_logprobs(policy, batch, out, np.ones(16))
    assert 1e-5 < np.abs(want - np.asarray(out.logprobs)).max() < 0.2


@pytest.mark.parametrize("name", ["mtp", *(pytest.param(name, marks=pytest.mark.slow)
                                           for name in ("none", "eagle3"))])
def test_the_states_it_returns_are_the_training_forwards(name):
    """Beside a drafter that asks for features of its own, and up to the token before the last:
    nothing came after."""
    policy = tiny.policy(11, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.25, stop_tokens=(3,))
    draft = (None if name == "none"
             else tiny.shaken(getattr(jspec.drafts, name)(policy, jax.random.key(1)), scale=0.1))
    batch = make_batch()
    out = jspec.rollout(policy, draft, batch, sampling=PLAIN,
                        speculation=jspec.Speculation(k=2, depths=(0, 2)))
    want = jax.jit(train_forward,
                   static_argnames="depths")(policy, join(batch.tokens, batch.lengths, out.tokens),
                                             depths=(0, 2))
    assert jspec.rollout(policy, draft, batch, sampling=PLAIN).trunk is None
    for got, expected in zip(jax.tree.leaves(out.trunk), jax.tree.leaves(want), strict=True):
        for row, n in enumerate(np.repeat(batch.lengths, 4) + out.lengths - 1):
            np.testing.assert_allclose(got[row, :n], expected[row, :n], atol=2e-5)
            assert not np.any(got[row, n:])
