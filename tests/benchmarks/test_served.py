"""What vLLM counts is brought to what jspec counts, or is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jspec
from benchmarks import served, served_answers
from benchmarks.served_answers import answer_of, replay, theirs
from benchmarks.shapes import SHAPES
from jspec.drafts.parts import lookup, one_pass
from jspec.errors import InputError


def line(tokens, accepted, drafted=None):
    return {"tokens": list(range(tokens)), "accepted": accepted,
            "drafted": drafted or [3] * len(accepted)}


def test_what_is_accepted_behind_the_end_is_not_counted():
    # of the last cycle, the end token was the second draft
    assert theirs(line(7, [1, 1, 3]), 3) == answer_of(range(7), [1, 1, 2], 3, behind=1)
    assert theirs(line(7, [1, 1, 3]), 3).positions == [3, 1, 0]
    assert theirs(line(7, [3, 1]), 3) == answer_of(range(7), [3, 1], 3)  # the end was no draft
    assert theirs(line(1, []), 3) == answer_of([0], [], 3)
    for tokens, accepted in ((7, [3]), (7, [3, 1, 0]), (5, [3, 0])):
        with pytest.raises(served_answers.Impossible, match="do not make its answer"):
            theirs(line(tokens, accepted), 3)


def test_passes_without_a_draft_are_those_that_were_foretold():
    passes = [(0, 0), (3, 2), (2, 1)]
    assert (theirs(line(7, [2, 2], [3, 2]), 3, passes)
            == answer_of(range(7), [0, 2, 1], 3, behind=1))
    for accepted, drafted in (([2, 0], [3, 2]), ([1, 1], [3, 2]), ([2, 1], [3, 3]), ([2], [3])):
        with pytest.raises(served_answers.Impossible):
            theirs(line(7, accepted, drafted), 3, passes)


def test_the_last_match_is_what_the_drafter_takes():
    rng, k = np.random.default_rng(0), 4
    for length in (1, 2, 5, 20, 20, 20):
        text = rng.integers(0, 3, length).tolist()
        padded = jnp.array([text + [7] * (20 - length)], jnp.int32)
        _, found = lookup.look_up(padded, jnp.array([length]), served_answers.NGRAM, k)
        assert served_answers.look_up(text, k, first=False) == found[0].tolist(), text


def test_the_first_match_ends_with_the_text():
    text = [1, 2, 3, 9, 1, 2, 3, 8, 2, 3]
    assert served_answers.look_up(text, 3, first=True) == [9, 1, 2]
    assert served_answers.look_up(text, 3, first=False) == [8, 2, 3]
    assert served_answers.look_up([5, 5], 3, first=True) == [5]
    assert served_answers.look_up([5, 6], 3, first=True) == []
    # at its end one of two drafts has room
    assert (replay([1, 2], [3, 1, 4, 1, 4, 1], 2, first=True)
            == [(0, 0), (2, 0), (0, 0), (2, 0), (2, 1)])


def test_rows_that_differ_are_counted():
    one = [answer_of([1, 2, 3], [1], 2), answer_of([1, 2, 3, 4], [0, 1], 2, behind=1)]
    other = [one[0], answer_of([1, 2, 3, 4], [1, 0], 2)]
    assert served_answers.same_cycles(one, one) == 2
    assert served_answers.same_cycles(one, [one[0], one[1]._replace(behind=0)]) == 2
    assert served_answers.same_cycles(one, other) == 2  # by position they are the same
    assert served_answers.same_cycles(one, [one[0], answer_of([1, 2, 3, 4], [2], 2)]) == 1
    total = served_answers.counts(one)
    assert (total["tokens"], total["cycles"], total["behind"]) == (5, 3, 1)
    assert total["acceptance_by_position"] == [2 / 3, 0] and total["standard_error"] > 0


@pytest.mark.parametrize("text", ["dspark=runs/draft", "ngram=runs/draft", "eagle3", "eagle3="])
def test_a_kind_that_is_not_trained_and_served_is_refused(text):
    with pytest.raises(InputError, match=f"must be KIND=PATH, of .*eagle3.*not '{text}'"):
        served.parse(["peers", "--draft", text])


def test_keys_of_the_context_have_the_first_layers_norm(monkeypatch):
    policy = jspec.init_policy(SHAPES["tiny"], jax.random.key(0))
    draft = jspec.drafts.dflash(policy, jax.random.key(0), layers=2)
    own = [{**layer, "k_norm": layer["k_norm"] + i}
           for i, layer in enumerate(draft.weights["layers"])]
    draft = served.with_first_norm(draft.replace(weights={**draft.weights, "layers": own}))
    for name in ("start", "observe"):
        seen = []
        monkeypatch.setattr(one_pass, name, lambda policy, draft, *rest, seen=seen:
                            seen.append(draft.weights["layers"]))
        getattr(draft.drafter, name)(None, draft, *[None] * (2 if name == "observe" else 1))
        (first, second), = seen
        assert second["k_norm"] is own[0]["k_norm"] and second["q"] is own[1]["q"]
    assert draft.weights["layers"][1]["k_norm"] is own[1]["k_norm"]  # which the slots have


def test_records_of_other_kinds_stay_in_the_file(tmp_path):
    path = tmp_path / "served.json"
    path.write_text(json.dumps([{"draft": "eagle3"}, {"draft": "ngram"}]))
    args = served.parse(["peers", "--only", "ngram", "--json", str(path)])
    assert args.others == [{"draft": "eagle3"}]
    assert ([row["draft"] for row in served.in_order([*args.others, {"draft": "ngram"}])]
            == ["ngram", "eagle3"])
    assert served.parse(["peers", "--only", "ngram"]).others == []
