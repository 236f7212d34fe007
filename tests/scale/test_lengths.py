"""Answers' lengths, and rows that shrink, against a rollout that is played cycle by cycle."""

import os
import threading

import numpy as np
import pytest

from jspec.errors import InputError
from jspec.scale.lengths import constant, parse, shuffled, spans, tail


def test_the_tail_is_lognormal_cut_and_the_same_every_time():
    found = tail(1001, 10_000, 1000, 1.0)
    assert np.median(found) == pytest.approx(1000)
    assert found.mean() == pytest.approx(1000 * np.exp(0.5), rel=0.05)
    assert found.max() == 10_000 and found.min() >= 1
    assert np.array_equal(shuffled(found), shuffled(found))
    assert not np.array_equal(shuffled(found), found)


def test_what_an_option_says(tmp_path):
    assert parse("constant", 3, 8).tolist() == [8, 8, 8]
    assert parse("constant:5", 2, 8).tolist() == [5, 5]
    assert np.array_equal(parse("tail:100:0.5", 9, 400), shuffled(tail(9, 400, 100, 0.5)))
    for name, text in (("a", "[10, 20, 30]"), ("b", "10\n20\n30\n")):
        (tmp_path / name).write_text(text)
        found = parse(str(tmp_path / name), 3, 30)
        assert sorted(found) == pytest.approx([10 + 10 / 3, 20, 30 - 10 / 3])


@pytest.mark.parametrize("text, says", [
    ("constant:0", "numbers above 0"), ("constant:1:2", "up to 1 numbers"),
    ("tail:x", "up to 2 numbers above 0"), ("tail:9", "at most sampling.max_new_tokens = 8"),
    ("tail:4:11", "the deviation 11 is of the lengths' logarithm; at most 10"),
    ("nowhere.txt", "there is no such file")])
def test_bad_lengths(text, says):
    with pytest.raises(InputError, match=says):
        parse(text, 4, 8)


def test_lengths_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writing = threading.Thread(target=(tmp_path / "pipe").write_text, args=("4 4",))
    writing.start()
    assert parse(str(tmp_path / "pipe"), 2, 8).tolist() == [4, 4]
    writing.join()


def test_lengths_beyond_the_cap_are_refused(tmp_path):
    (tmp_path / "lengths").write_text("3 9")
    with pytest.raises(InputError, match="an answer of 9 tokens, more than sampling.max_new_t"):
        parse(str(tmp_path / "lengths"), 4, 8)


@pytest.mark.parametrize("text", ["", "[]", "a b", "[1, 0]", "{", '[[1]]', "1 nan"])
def test_files_that_hold_none(tmp_path, text):
    (tmp_path / "lengths").write_text(text)
    with pytest.raises(InputError, match="lengths"):
        parse(str(tmp_path / "lengths"), 4, 8)


def played(lengths, slots, prompt):
    """By token: (live rows, positions of them in the token's middle)."""
    waiting, rows, found = list(lengths), [], []
    while waiting or rows:
        while waiting and len(rows) < slots:
            rows.append([waiting.pop(0), 0])
        found.append((len(rows), sum(prompt + done + 0.5 for _, done in rows)))
        rows = [[length, done + 1] for length, done in rows if done + 1 < length]
    return np.array(found)


@pytest.mark.parametrize("slots", [1, 3, 8, 20])
def test_rows_shrink_and_are_refilled(slots):
    lengths = np.random.default_rng(1).integers(1, 30, 20).astype(float)
    found, wanted = spans(lengths, 1, 1, slots, 7), played(lengths, slots, 7)
    assert found.tokens.sum() == len(wanted)
    assert np.repeat(found.live, found.tokens.astype(int)).tolist() == wanted[:, 0].tolist()
    assert (found.tokens * found.live).sum() == lengths.sum()
    assert (found.tokens * found.context).sum() == pytest.approx(wanted[:, 1].sum())


def test_shards_of_a_group_wait_for_one_another():
    lengths = np.array([4.0, 1, 2, 2])
    apart, together = spans(lengths, 2, 1, 2, 0), spans(lengths, 1, 2, 2, 0)
    assert np.bincount(apart.group, apart.tokens).tolist() == [4, 2]
    assert together.tokens.sum() == 4
    assert together.live.tolist() == [2, 1.5, 0.5]  # of a shard, on average


def test_constant_lengths_never_shrink():
    found = spans(constant(8, 100), 2, 2, 2, 10)
    assert found.live.tolist() == [2, 2] and found.tokens.tolist() == [100, 100]
    assert found.context.tolist() == [120, 120]
