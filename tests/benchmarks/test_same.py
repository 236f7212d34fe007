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
