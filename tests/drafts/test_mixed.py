"""A trained draft with history in its place where that is surer: which row takes which, that the
trained draft's state is right all the same, and that a choice which looks at what was drawn is
seen."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from jspec.drafts import base, find
from jspec.drafts.mixed import trained_of
from jspec.drafts.parts.certain import with_certain
from jspec.heads import files, publish
from jspec.prepare import around
from jspec.speculate.cycle import propose
from jspec.speculate.rollout import start
from jspec.speculate.state import rows_in_slots
from jspec.speculate.types import NOISE
from tests.drafts import recursive
from tests.speculate import drafters, enumeration, test_chi_square, tiny
from tests.speculate.test_enumeration import PROMPT, TOLERANCE

KEY = jax.random.key(0)
NO_HISTORY = {"history_prompts": 0}


def proposal(vocab=None, rows=4, k=3):
    """Of a sampled draft: tokens of its vocabulary with the q they were drawn from."""
    size = 5 if vocab is None else len(vocab)
    log_q = jax.nn.log_softmax(jax.random.normal(KEY, (rows, k, size)))
    drawn = jax.random.randint(KEY, (rows, k), 0, size)
    ids = jnp.arange(5) if vocab is None else jnp.array(vocab, jnp.int32)
    return base.Proposal(ids[drawn], log_q, None if vocab is None else ids)


def over_all(made, size=5):
    """q of every id, [B, K, V], whatever vocabulary it is said of."""
    q = np.zeros((*made.log_q.shape[:2], size + 1))
    ids = np.arange(size) if made.vocab is None else np.asarray(made.vocab)
    for column, token in enumerate(ids):
        q[..., token] += np.exp(np.asarray(made.log_q[..., column]))
    return q


@pytest.mark.parametrize("vocab", [None, [0, 3], [0, 1, 2, 3, 4]])
def test_certain_rows_are_one_hot_and_the_others_as_they_were(vocab):
    sampled = proposal(vocab)
    tokens = jnp.array([[4, 4, 0], [1, 1, 1], [3, 0, 3], [2, 4, 1]])
    made = with_certain(sampled, tokens, jnp.array([True, False, True, True]), 5)
    assert made.tokens.tolist() == [[4, 4, 0], sampled.tokens[1].tolist(), [3, 0, 3], [2, 4, 1]]
    q = over_all(made)
    assert not q[..., 5].any()  # what stands for no token
    np.testing.assert_array_equal(q[1], over_all(sampled)[1])
    np.testing.assert_array_equal(q[[0, 2, 3], :, :5], np.eye(5)[np.asarray(tokens)[[0, 2, 3]]])
    if vocab is not None:  # each id once, or the rule would take it from another column
        ids = np.asarray(made.vocab)
        assert sorted(ids[ids < 5].tolist()) == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def policy():
    return tiny.policy(5)


@pytest.fixture(scope="module")
def deep():
    return tiny.policy(11, layers=3, heads=4, kv_heads=2, hidden=32, scale=0.25)


@pytest.mark.parametrize("certainty, certain", [
    (0.5, [1, 1, 1, 0]), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (0.0, [1, 1, 1, 1]), (0.6, [1, 0, 1, 0]), (1.0, [0, 0, 0, 0])))])
def test_a_row_drafts_from_history_where_that_is_certain(deep, certainty, certain):
    """Rows of which five, one and two tokens match, and none: 25/26, 1/2 and 4/5 of the votes."""
    made = tiny.shaken(jspec.drafts.mixed(deep, KEY, suffix=NO_HISTORY, certainty=certainty))
    rows = [[1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5], [7, 1, 2, 7], [1, 2, 9, 1, 2], [8, 1, 2, 3, 4]]
    batch = jspec.PromptBatch.from_tokens(rows, group_size=1, seed=0, buckets=(12,))
    policy, sampling = jspec.reshard(deep), jspec.Sampling(max_new_tokens=4)

    @jax.jit
    def proposed(draft):
        draft = draft.drafter.prepare(policy, draft)
        state = start(policy, draft, batch, sampling, 3)
        at = rows_in_slots(state)
        noise = NOISE["rejection"](jax.random.key_data(KEY), at.ids, at.lengths, 3)
        return propose(policy, draft, state, at, noise, 0, 3)[0]

    got, own = proposed(made), proposed(trained_of(made))
    past = [[6, 1, 2], [1, 2, 7], [9, 1, 2], [4, 4, 4]]
    for i, yes in enumerate(certain):
        assert got.tokens[i].tolist() == (past[i] if yes else own.tokens[i].tolist())
        q = np.log(np.eye(11)[past[i]], where=np.eye(11)[past[i]] > 0,
                   out=np.full((3, 11), -np.inf)) if yes else own.log_q[i]
        np.testing.assert_array_equal(got.log_q[i], q)


def test_the_trained_drafts_state_is_right_whosever_drafts_were_accepted(deep):
    made = jspec.drafts.mixed(deep, KEY, suffix=NO_HISTORY, certainty=0.4, options={"blocks": 2})
    recursive.check_state_depends_on_committed_tokens_only(
        deep, tiny.shaken(made, scale=0.05), of_rows=lambda rows: rows["draft"])


def kept_where_it_agrees(proposal, tokens, rows, vocab_size):
    """A bug: history takes a row where the trained draft has drawn the same first token."""
    return with_certain(proposal, tokens, rows & (proposal.tokens[:, 0] == tokens[:, 0]),
                        vocab_size)


@pytest.mark.optimized
@pytest.mark.parametrize("choice, exact", [(with_certain, True), (kept_where_it_agrees, False)])
def test_a_choice_that_looks_at_what_was_drawn_is_seen(choice, exact, monkeypatch):
    monkeypatch.setattr(sys.modules["jspec.drafts.mixed"], "with_certain", choice)
    monkeypatch.setattr(enumeration, "ROWS", 128)
    policy = drafters.policy("mixed", 3, seed=0)
    sampling = dict(max_new_tokens=2, stop_tokens=(2,))
    got, _ = enumeration.enumerate_sequences(policy, drafters.make("mixed", policy, seed=2), PROMPT,
                                             k=1, **sampling)
    off = tiny.distance(got, tiny.autoregressive(policy, PROMPT, **sampling))
    assert off < TOLERANCE if exact else off > 1000 * TOLERANCE


@pytest.mark.slow
@pytest.mark.optimized
def test_chi_square_sees_such_a_choice(monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(sys.modules["jspec.drafts.mixed"], "with_certain", kept_where_it_agrees)
    with pytest.raises(AssertionError):
        test_chi_square.check("mixed", "rejection", samples=test_chi_square.FEW, max_new_tokens=3)
    jax.clear_caches()


def test_one_is_made_around_a_draft_that_is_there_and_is_written_and_read(policy, tmp_path):
    own = jspec.drafts.mtp(policy, KEY, vocab=[0, 2, 3])
    made = around(policy, own, find("mixed"), {"certainty": 0.6, "suffix": NO_HISTORY},
                  "draft.options", "here")
    assert made.name == "mixed" and made.config.certainty == 0.6
    assert around(policy, made, find("mixed"), {}, "", "here") is made
    assert around(policy, own, find("mtp"), {}, "", "here") is own
    with pytest.raises(jspec.InputError) as error:
        around(policy, made, find("mixed"), {"certainty": 0.5}, "draft.options", "here")
    assert str(error.value) == ("draft.options are a fresh draft's, and the one that is there has "
                                "its own; leave them out")
    with pytest.raises(jspec.InputError) as error:
        around(policy, own, find("mixed"), {"draft": "dflash"}, "draft.options", "here")
    assert str(error.value) == ("draft.options: draft = 'dflash', and the one that is there is a "
                                "mtp draft; leave it out")
    wider = dataclasses.replace(own.config, policy=dataclasses.replace(policy.config, vocab_size=6))
    with pytest.raises(jspec.InputError, match="was made for another policy: its vocab_size"):
        jspec.drafts.mixed(policy, draft=own.replace(config=wider))
    back = trained_of(made)
    assert back.config == own.config and back.drafter == own.drafter and back.state is own.state
    files.write(made, tmp_path, dtype="float32")
    read = jspec.load_draft(policy, tmp_path)
    assert read.config == made.config and read.drafter == made.drafter
    jax.tree.map(np.testing.assert_array_equal, (read.weights, read.state),
                 (made.weights, made.state))
    # a stop token more in the policy: of the parts' configs too
    other = policy.replace(config=dataclasses.replace(policy.config, stop_tokens=(1,)))
    config = jspec.load_draft(other, tmp_path).config
    assert config.draft.policy == config.suffix.policy == other.config
    assert jspec.load_draft(policy, tmp_path, find("mixed")).config == made.config


def test_what_is_published_is_the_trained_draft(tmp_path):
    policy = tiny.policy(5, layers=4, qk_norm=False)
    own = jspec.drafts.eagle3(policy, KEY)
    publish(jspec.drafts.mixed(policy, draft=own), tmp_path)
    read = jspec.load_draft(policy, tmp_path)
    assert read.name == "eagle3"
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-8), read.weights,
                 own.weights)  # written in bfloat16


@pytest.mark.parametrize("options, message", [
    ({"draft": "ngram"}, "mixed draft: draft = 'ngram' is not trained; take one that is, such as "
     "'mtp'"),
    ({"draft": "mixed"}, "mixed draft: draft 'mixed' is unknown; known: "),
    ({"draft": "mtp", "key": None}, "mtp draft: its weights are drawn at random; give a seed or a "
     "key, such as jspec.drafts.mtp(policy, 0)"),
    ({"options": {"depth": 2}}, "mtp draft: it has no option 'depth'; did you mean depths?"),
    ({"suffix": {"siblings": -1}}, "suffix draft: siblings = -1 must be at least 0"),
    ({"certainty": 1.5}, "mixed draft: certainty = 1.5 must be a finite number and at least 0.0 "
     "and at most 1.0"),
    ({"draft": lambda policy: jspec.drafts.mtp(policy, 0), "options": {"depths": 2}}, "mixed "
     "draft: options are a fresh draft's, and the given one has its own; leave them out"),
    ({"draft": lambda policy: jspec.drafts.ngram(policy)}, "mixed draft: draft = 'ngram' is not "
     "trained"),
    ({"options": 3}, "mixed draft: options is a int: give options by name, such as {max_match: 8}"),
    ({"suffix": [8]}, "mixed draft: suffix is a list: give options by name")])
def test_what_is_refused(policy, options, message):
    if callable(options.get("draft")):  # made here, not where tests are collected
        options = {**options, "draft": options["draft"](policy)}
    with pytest.raises(jspec.InputError) as error:
        jspec.drafts.mixed(policy, **{"key": KEY, **options})
    assert str(error.value).startswith(message)
