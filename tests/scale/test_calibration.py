"""Overheads from tables that were measured."""

import dataclasses
import json

import numpy as np
import pytest

from jspec.errors import InputError
from jspec.scale.calibration import line, overhead_of, read
from jspec.scale.chips import CHIPS
from jspec.scale.cycle_cost import Decoding, Overhead, Sizes, Split, cycle
from jspec.scale.lengths import constant, spans
from jspec.scale.project import Answers
from tests.scale.models import QWEN3_8B

DECODING = Decoding(Sizes.of(QWEN3_8B), CHIPS["v5p"], Split(1))
ANSWERS = Answers(spans(constant(8, 100), 1, 1, 8, 100))


def bench(device="TPU v5p", drafting=True, draft="mtp:depths=1", **changed):
    """What `jspec bench cost` writes, of cycles that take 2 ms more than their floor, with drafts
    1 ms more and 0.5 for each drafted token."""
    over = dataclasses.replace(DECODING, overhead=Overhead(2e-3, 1e-3, 5e-4))

    def seconds(rows, k):
        return float(cycle(over, k, rows, rows * 256.0).seconds)

    table = {"rows": [32, 8], "shards": 1, "start": 0.0, "compiling": 1.0,
             "plain": [[rows, seconds(rows, 0)] for rows in (8, 32)],
             "drafting": [[rows, k, seconds(rows, k)] for rows in (8, 32) for k in (1, 3, 7)
                          if drafting]}
    return {"model": "m", "date": "2026-11-27", "max_new_tokens": 512,
            "machine": {"device": device, "devices": 1},
            "rows": [{"draft": draft, "costs": table, "acceptance": [0.5]}], **changed}


@pytest.fixture
def file(tmp_path):
    def written(found):
        path = tmp_path / "costs.json"
        path.write_text(found if isinstance(found, str) else json.dumps(found))
        return str(path)

    return written


def test_a_measured_table_is_its_floor_and_the_rest(file):
    measured = read(file(bench()), "mtp")
    assert measured.source == "m on TPU v5p, 2026-11-27" and measured.context == 256
    found = overhead_of(measured, DECODING, ANSWERS)
    assert dataclasses.astuple(found) == pytest.approx((2e-3, 1e-3, 5e-4, 1, False), abs=1e-8)
    elsewhere = dataclasses.replace(DECODING, chip=CHIPS["v5e"], split=Split(4, 2))
    assert overhead_of(measured, elsewhere, ANSWERS) == found  # it was measured where it was


def test_a_table_without_drafts(file):
    found = overhead_of(read(file(bench(drafting=False)), "mtp"), DECODING, ANSWERS)
    assert (found.cycle, found.of(3)) == pytest.approx((2e-3, 2e-3))


def test_speedups(file):
    rows = [{"k": k, "tokens": t, "speedup": t / c}
            for k, t, c in ((3, 3.0, 2.0), (5, 4.0, 3.0), (7, 5.0, 4.0))]
    measured = read(file({"source": "theirs", "measured": rows}), "mtp")
    found = overhead_of(measured, DECODING, ANSWERS)
    plain, drafting = (float(np.average(cycle(dataclasses.replace(DECODING, overhead=found), k, 8,
                                              8 * 150.0).seconds)) for k in (0, 5))
    assert (found.relative, found.least) == (True, 3)
    assert drafting / plain == pytest.approx(3.0, rel=0.01)
    single = dataclasses.replace(measured, speedups=measured.speedups[:1])
    one = overhead_of(single, DECODING, ANSWERS)
    assert one.drafting == 0.0 and one.token == pytest.approx(1 / 3, rel=0.01)


def test_the_line_errs_least_where_it_errs_most():
    ks, costs = [3, 5, 7], [1.81, 3.85, 4.90]
    intercept, slope = line(ks, costs, costs)
    error = [abs(intercept + slope * k - c) / c for k, c in zip(ks, costs, strict=True)]
    assert error == pytest.approx([0.0687] * 3, abs=1e-3)
    assert line([1, 2, 3], [3.0, 5.0, 7.0], [1, 1, 1]) == pytest.approx((1.0, 2.0))
    assert line([2, 4], [1.0, 2.0], [1, 1]) == pytest.approx((0.0, 0.5))


@pytest.mark.parametrize("found, says", [
    ("{", "is no table of costs"), ([], "is no table of costs"), ({}, "is no table of costs"),
    ({"source": "x", "measured": []}, "is no table of costs"),
    ({"source": "x", "measured": [{"k": 3, "tokens": 5, "speedup": 1}]}, "is no table of costs"),
    ({"source": "x", "measured": [{"k": 3.5, "tokens": 2, "speedup": 1}]}, "is no table of costs"),
    ({"source": "x", "measured": [{"k": 3, "tokens": 2, "speedup": 9}]}, "is no table of costs"),
    (bench(rows=[]), "is no table of costs"),
    (bench(device="cpu"), "measured on 'cpu', whose floor is not known"),
    (bench(draft="self"), "was measured with self, and the config's draft.name is mtp")])
def test_bad_tables(file, found, says):
    with pytest.raises(InputError, match=says):
        read(file(found), "mtp")


@pytest.mark.parametrize("changed", [
    {"plain": []}, {"plain": [[8, -1.0]]}, {"plain": [[8, float("nan")]]}, {"plain": [["8", 1.0]]},
    {"plain": [[8, 1, 1.0]]}, {"drafting": [[8, 1, 0.0]]}, {"shards": 0}])
def test_costs_that_no_cycle_has(file, changed):
    found = bench()
    found["rows"][0]["costs"] |= changed
    with pytest.raises(InputError, match="is no table of costs"):
        read(file(found), "mtp")


def test_no_cycle_with_a_draft_is_quicker_than_one_without():
    """Whatever a line through what was measured says of other ks."""
    falling = dataclasses.replace(DECODING, overhead=Overhead(0.0, 4.0, -2.0, relative=True))
    plain, *drafting = (float(cycle(falling, k, 8, 800).seconds) for k in (0, 1, 3, 9))
    assert drafting[0] > 2 * plain and drafting[1:] == pytest.approx([plain, plain])


def test_a_table_that_is_not_there():
    with pytest.raises(InputError, match="there is no such file"):
        read("nowhere.json", "mtp")
