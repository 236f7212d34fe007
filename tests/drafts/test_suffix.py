"""History drafts: against a plain search, what they may see, what they remember, and that they
change no token."""

import itertools
import json
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.drafts import base
from jspec.drafts.parts.lookup import NOTHING
from jspec.sharding import make_mesh
from tests.speculate import tiny
from tests.speculate.test_chi_square import PLANTED, REFUSE, p_value
from tests.speculate.ties import assert_same, generated
from tests.test_sharding import on_devices

POLICY = tiny.policy(5)
SMALL = dict(history_prompts=3, history_rows=2, history_tokens=6)
remember = jax.jit(jspec.drafts.suffix(POLICY).drafter.remember)


def occurrence(row, ends, suffix, max_match):
    """(tokens that match, end) of the longest, then latest, place in `row` where the suffix
    occurred."""
    def length(at):
        pairs = zip(reversed(row[:at + 1]), reversed(suffix[-max_match:]), strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

    return max(((length(at), at) for at in ends), default=(0, None))


def search(own, others, k, max_match):
    """The rule in words; `others` are (tokens, index of the first that may be drafted)."""
    length, at = occurrence(own, range(len(own) - 1), own, max_match)
    found = [(length, (own[at + 1:] * k)[:k])] if length else []
    for row, first in others:
        length, at = occurrence(row, range(max(first - 1, 0), len(row) - 1), own, max_match)
        found += [(length, row[at + 1:])] if length else []
    token, out = own[-1], []
    for j in range(k):
        found = [(length, going_on) for length, going_on in found if len(going_on) > j]
        votes = Counter()
        for length, going_on in found:
            votes[going_on[j]] += length**2
        if votes:
            token = votes.most_common(1)[0][0]  # of equals the first that was counted
        found = [x for x in found if x[1][j] == token]
        out.append(token)
    return out


def drafted(draft, rows, prompt_lengths, history=None, k=4, group_size=1):
    """What is drafted for rows of tokens, whose prompts are so long; history is [rows, H, W]."""
    width = max(map(len, rows)) + 2
    rng = np.random.default_rng(0)
    padded = jnp.array([r + rng.integers(0, 4, width - len(r)).tolist() for r in rows], jnp.int32)
    rows_state = ({"prompt_lengths": jnp.asarray(prompt_lengths)}
                  | ({} if history is None else {"history": history}))
    state = base.DraftState(rows_state)
    committed = base.Committed(padded, jnp.array([len(r) for r in rows]), group_size=group_size)
    sampler = base.Sampler(None, jnp.ones(len(rows)), None, 0, k)
    proposal, after = jax.jit(lambda *args: draft.drafter.propose(POLICY, draft,
                                                                  *args))(state, committed, sampler)
    # deterministic: judged as q = 1
    assert proposal.log_q is None and after.rows.keys() == rows_state.keys()
    return proposal.tokens.tolist()


@pytest.mark.parametrize("max_match, siblings", [(1, 8), (4, 1)])
def test_equals_a_plain_search(max_match, siblings):
    """Groups of three that share a prompt; each row with two histories, made of the prompt's end
    and an output."""
    rng = np.random.default_rng(max_match)
    rows, starts, others, history = [], [], [], []
    for _ in range(60):
        prompt = rng.integers(0, 3, rng.integers(1, 6)).tolist()
        group = [prompt + rng.integers(0, 3, rng.integers(0, 9)).tolist() for _ in range(3)]
        outputs = [rng.integers(0, 3, rng.integers(0, 7)).tolist() for _ in range(2)]
        tail = prompt[-max_match:]
        past = [[NOTHING] * (max_match - len(tail)) + tail + x for x in outputs]
        for i in range(3):
            near = [(group[(i + ahead) % 3], len(prompt)) for ahead in (1, 2)][:siblings]
            others.append(near + [(tail + x, len(tail)) for x in outputs])
        rows += group
        starts += [len(prompt)] * 3
        history += [[x + [NOTHING] * (max_match + 6 - len(x)) for x in past]] * 3
    draft = jspec.drafts.suffix(POLICY, max_match=max_match, siblings=siblings, **SMALL)
    got = drafted(draft, rows, starts, jnp.array(history, jnp.int32), group_size=3)
    assert got == [search(own, pool, 4, max_match) for own, pool in zip(rows, others, strict=True)]


def test_what_a_sibling_wrote_is_drafted_whole_and_what_another_prompt_wrote_is_not():
    draft = jspec.drafts.suffix(POLICY, history_prompts=0)
    rows = [[3, 4], [3, 4, 1, 2, 0, 1], [0, 4], [0, 4]]
    got = drafted(draft, rows, [2] * 4, group_size=2)
    assert got[0] == [1, 2, 0, 1] and got[2:] == [[4] * 4] * 2
    assert drafted(draft, rows, [2] * 4)[0] == [4] * 4  # no siblings are known of
    alone = jspec.drafts.suffix(POLICY, history_prompts=0, siblings=0)
    assert drafted(alone, rows, [2] * 4, group_size=2)[0] == [4] * 4


# --- what is remembered ---


def recalled(draft, prompt, seed=9, length=16):
    """The outputs that `start` finds for a prompt in a rollout with another key, newest first."""
    tokens = jnp.array([prompt + [3] * (length - len(prompt))], jnp.int32)
    prefill = base.Prefill(None, tokens, jnp.array([len(prompt)]),
                           jax.random.key_data(jax.random.key(seed)))
    state, key_values = draft.drafter.start(POLICY, draft, prefill)
    assert key_values == ()
    assert state["prompt_lengths"].tolist() == [len(prompt)]
    rows = [[t for t in row if t != NOTHING] for row in state["history"][0].tolist()]
    tail = prompt[-draft.config.max_match:]
    assert all(row[:len(tail)] == tail for row in rows if row)
    return [row[len(tail):] for row in rows if row]


def test_the_newest_outputs_of_a_prompt_are_kept_and_the_oldest_prompt_is_forgotten():
    draft = jspec.drafts.suffix(POLICY, **SMALL)
    a, b, c, d = [1, 2], [1], [2, 1, 1, 1, 1, 1, 1, 1, 1, 4], [4]
    assert recalled(draft, a) == []
    draft = remember(draft, *tiny.finished([a, b], [[[1]], [[2, 3]]]))
    draft = remember(draft, *tiny.finished([a], [[[4, 4]]]))  # one newer row
    assert recalled(draft, a) == [[4, 4], [1]] and recalled(draft, b) == [[2, 3]]
    assert recalled(draft, a, length=32) == [[4, 4], [1]]  # whatever it is padded to
    assert recalled(draft, [2, 1]) == recalled(draft, [1, 2, 0]) == recalled(draft, [1, 1]) == []
    # of three rows the first two, cut at six tokens
    draft = remember(draft, *tiny.finished([c], [[[1] * 8, [2], [3]]], buckets=(10,)))
    assert recalled(draft, c) == [[1] * 6, [2]]
    draft = remember(draft, *tiny.finished([d], [[[0]]]))  # b is the one remembered longest ago
    assert [len(recalled(draft, x)) for x in (a, b, c, d)] == [2, 0, 2, 1]
    # twice in a batch is one prompt, and a is the oldest now
    draft = remember(draft, *tiny.finished([b, b], [[[1]], [[2]]]))
    assert recalled(draft, b) == [[2], [1]]
    assert [len(recalled(draft, x)) for x in (a, c, d)] == [0, 2, 1]


def test_what_was_made_with_a_rollouts_own_key_is_passed_over():
    draft = remember(jspec.drafts.suffix(POLICY, **SMALL), *tiny.finished([[1]], [[[1]]], seed=1))
    draft = remember(draft, *tiny.finished([[1]], [[[2]]], seed=2))
    assert [recalled(draft, [1], seed=seed) for seed in (1, 2, 3)] == [[[2]], [[1]], [[2], [1]]]


def test_without_a_history_there_is_none():
    draft = jspec.drafts.suffix(POLICY, history_prompts=0)
    assert draft.state == {} and remember(draft, *tiny.finished([[1]], [[[1]]])).state == {}


@pytest.mark.parametrize("name, value, least",
                         [("max_match", 0, 1), ("siblings", -1, 0), ("history_prompts", -1, 0),
                          ("history_rows", 0, 1), ("history_tokens", 0, 1)])
def test_arguments_out_of_range(name, value, least):
    with pytest.raises(jspec.InputError) as error:
        jspec.drafts.suffix(POLICY, **{name: value})
    assert str(error.value) == f"suffix draft: {name} = {value} must be at least {least}"


# --- in rollouts ---

PROMPTS = [[1, 2, 1, 2, 1], [5], [7, 6, 7, 6, 7, 6], [4, 4, 4]]


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(11, layers=2, heads=4, kv_heads=2, hidden=32, scale=0.25)


def run(policy, draft, seed, temperature, rule="coupled"):
    batch = jspec.PromptBatch.from_tokens(PROMPTS, group_size=4, seed=seed, buckets=(8,))
    sampling = jspec.Sampling(max_new_tokens=16,
                              temperature=jnp.tile(jnp.asarray(temperature, jnp.float32), 8),
                              stop_tokens=(3,))
    out = jspec.rollout(policy, draft, batch, sampling=sampling,
                        speculation=jspec.Speculation(k=3, rule=rule))
    return out, batch, sampling


MIXED, GREEDY = (1.0, 0.0), (0.0, 0.0)  # of a group's rows in turn


def test_rollouts_are_autoregressive_token_for_token_and_a_second_one_is_drafted_from_the_first(
    policy):
    draft = jspec.drafts.suffix(policy)
    plain, batch, sampling = run(policy, None, 0, MIXED)
    first, *_ = run(policy, draft, 0, MIXED)
    assert_same(policy, batch, sampling, plain, first)
    # sampled and greedy rows of other noise, with a history of both
    draft = remember(draft, batch, first)
    plain, batch, sampling = run(policy, None, 1, MIXED)
    second, *_ = run(policy, draft, 1, MIXED)
    assert_same(policy, batch, sampling, plain, second)
    greedy = np.arange(16) % 2 == 1
    cycles = [np.asarray(out.stats.cycles)[greedy].sum() for out in (first, second)]
    tokens = np.asarray(second.lengths)[greedy]
    assert (tokens.sum() > 60 and cycles[1] < 0.8 * cycles[0] and cycles[1]
            <= 1.1 * np.ceil(tokens / 4).sum())
    # with the key of what is remembered it is as if nothing were
    again, *_ = run(policy, draft, 0, MIXED)
    assert (again.stats.cycles.tolist() == first.stats.cycles.tolist() and generated(again)
            == generated(first))


@pytest.mark.slow
def test_greedy_under_the_rejection_rule(policy):
    plain, batch, sampling = run(policy, None, 0, GREEDY)
    draft = remember(jspec.drafts.suffix(policy), batch, plain)
    fast, *_ = run(policy, draft, 1, GREEDY, "rejection")
    assert_same(policy, batch, sampling, plain, fast)
    assert float(fast.acceptance_length) > 3


def pairs(share_noise):
    """(Counter of both sequences of each group of two, their probabilities if they are
    independent)."""
    policy = tiny.policy(4, seed=2, scale=0.2, stop_tokens=(3,))
    prompt, count = [1, 0, 1, 0], 20_000
    draft = jspec.drafts.suffix(policy, **SMALL)
    draft = remember(draft, *tiny.finished([prompt], [[[1, 0, 2], [0, 0, 1]]], seed=7))
    batch = jspec.PromptBatch.from_tokens([prompt] * count, group_size=2, seed=0, buckets=(4,))
    if share_noise:
        batch = batch.replace(sequence_ids=batch.sequence_ids // 2)
    # in a jit, as a rollout that sees two equal ids refuses them
    rollout = jax.jit(partial(jspec.rollout, sampling=jspec.Sampling(max_new_tokens=3),
                              speculation=jspec.Speculation(k=1, rule="rejection")))
    out = tiny.sequences(rollout(policy, draft, batch))
    one = tiny.autoregressive(policy, prompt, max_new_tokens=3, stop_tokens=(3,))
    want = {(a, b): one[a] * one[b] for a in one for b in one}
    return Counter(zip(out[::2], out[1::2], strict=True)), want


@pytest.mark.slow
def test_siblings_that_draft_from_each_other_are_independent_samples_of_the_policy():
    assert p_value(*pairs(False)) > REFUSE


@pytest.mark.slow
def test_siblings_that_share_their_noise_are_not():
    assert p_value(*pairs(True)) < PLANTED


def twice(policy):
    """A second rollout, with the history of the first."""
    draft = jspec.drafts.suffix(policy)
    first, batch, _ = run(policy, draft, 0, MIXED)
    return run(policy, remember(draft, batch, first), 1, MIXED)


def worker():
    """On eight devices, whose rows cut the groups (a device sees the siblings it has): prints what
    came out."""
    with jax.set_mesh(make_mesh(8, 1, 1)):
        policy = tiny.policy(11, layers=2, heads=4, kv_heads=2, hidden=32, scale=0.25)
        out, *_ = twice(policy)
        print(json.dumps([generated(out), np.asarray(out.stats.loop_cycles).ravel().tolist()]))


@pytest.mark.slow
def test_eight_devices_give_the_tokens_of_one(policy):
    tokens, cycles = on_devices(8, "from tests.drafts.test_suffix import worker; worker()")
    one, batch, sampling = twice(policy)
    rows = [row + [0] * (16 - len(row)) for row in tokens]
    sharded = one.replace(tokens=np.array(rows), lengths=np.array(list(map(len, tokens))))
    assert_same(policy, batch, sampling, one, sharded)
    assert len(set(cycles)) > 2  # no device waits for the longest row of another
