"""Whether two checkouts compute the same is told by the first metric that differs."""

import pytest

from benchmarks import same
from jspec.errors import InputError


def test_the_first_difference_is_named():
    records = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "kl": None}]
    assert same.difference(records, [dict(record) for record in records]) == ""
    assert (same.difference(records, [records[0], {"step": 2, "loss": 0.125}])
            == "step 2: loss is 0.25, was 0.125")


def test_a_commit_that_is_none_is_one_line():
    with pytest.raises(InputError,
                       match="no checkout of no-such-commit: "), same.checkout("no-such-commit"):
        pass


def test_a_metric_that_only_one_has_hides_no_difference():
    ours = [{"step": 1, "gap": 0.5, "loss": 1.0}, {"step": 2, "gap": 0.5, "loss": 2.0}]
    theirs = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}]
    assert same.difference(ours, theirs) == "step 2: loss is 2.0, was 3.0"
    assert same.difference(ours[:1], theirs[:1]) == "step 1: gap is 0.5, was None"
