"""`jspec bench tail` counts the tokens of answers, and `versus.py` compares like with like."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import drafts, grpo_step, tail, versus
from jspec import cli


def bench(monkeypatch, tmp_path, model, *options):
    monkeypatch.setattr(sys, "argv", sys.argv)
    prompts, out = tmp_path / "sums.jsonl", tmp_path / "rows.json"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(3)))
    assert cli.main(["bench", "tail", model, "--prompts", str(prompts), "--count", "2", "--samples",
                     "4", "--max-new-tokens", "12", "--json", str(out), *options]) == 0
    return json.loads(out.read_text())


def test_useful_tokens_of_natural_lengths(monkeypatch, tmp_path, model):
    result = bench(monkeypatch, tmp_path, model, "--rounds", "2")
    rows = result["rows"]
    assert [(row["round"], row["draft"]) for row in rows] == [(1, "none"), (2, "none")]
    for row in rows:
        assert 1 <= row["median"] <= row["largest"] <= 12 and row["mean"] == row["tokens"] / 8
        assert row["mean"] < 12 and 0 <= row["cut"] < 8  # some ended by themselves
        assert row["tok_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert (row["acceptance_length"]
                == 1 and (row["occupancy"] is None or 0 < row["occupancy"] <= 1))
    assert rows[0]["tokens"] != rows[1]["tokens"]  # every round has noise of its own
    assert result["machine"]["cores"] and result["prompts"] == 2 and not result["grpo"]


def test_drafts_that_remember_have_seen_the_rounds_before(monkeypatch, tmp_path, model):
    rows = bench(monkeypatch, tmp_path, model, "--rounds", "2", "--drafts", "suffix",
                 "--temperature", "0")["rows"]
    first, second = (row["acceptance_length"] for row in rows if row["draft"] == "suffix")
    assert len({row["tokens"] for row in rows}) == 1  # greedy: the same answers again
    assert second > max(2, first)


def test_a_step_that_compiles_is_not_counted(monkeypatch):
    """Of made-up steps: seconds are those of the whole step, tokens those of the answers."""
    out = SimpleNamespace(lengths=np.array([3, 9]), finished=np.array([True, False]),
                          acceptance_length=1.0, stats=None)
    monkeypatch.setattr(tail, "init_state", lambda *_, **__: 0)
    monkeypatch.setattr(tail, "make_batch", lambda _, __, number: number)
    monkeypatch.setattr(tail, "declare", lambda *_, **__: None)
    monkeypatch.setattr(grpo_step, "take", lambda _, state, number: (
        state + 1,
        {"step": 2.0 if number else 60.0, "rollout": 1.0, "tok_per_s": 12.0, "state": state}, out))
    args = tail.parse(["m", "--grpo", "--rounds", "2"])
    rows = list(tail.time_steps(args, None, {"none": None},
                                [drafts.Variant("none", 0, "rejection", 1.0)], []))
    wanted = ("round", "state", "seconds", "tok_per_s")
    assert [tuple(row[name] for name in wanted) for row in rows] == [(1, 1, 2, 6), (2, 2, 2, 6)]
    assert (rows[0]["tokens"], rows[0]["mean"], rows[0]["largest"], rows[0]["cut"]) == (12, 6, 9, 1)


def test_slots_and_schedules(capsys):
    args = tail.parse(["m", "--drafts", "ngram", "--k", "3", "16:3/4:7", "--slots", "16"])
    assert args.k == [3, ((4, 7), (16, 3))] and tail.shown(args.k[1]) == "4:7/16:3"
    settings = tail.settings_of(args, drafts.make_variants(args)[-1])
    assert settings["batching"].slots == 16 and settings["speculation"].k == args.k[1]
    assert ("batching" not in tail.settings_of(tail.parse(["m"]),
                                               drafts.Variant("none", 0, "rejection", 1.0)))
    for wrong, words in (("4:7/4:3", "one k for each number of rows"),
                         ("4:x", "must be ROWS:K pairs"),
                         ("4:7:1", "must be ROWS:K pairs"), ("0:3", "at least 1")):
        assert cli.main(["bench", "tail", "m", "--k", wrong]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_whole_steps_are_counted_by_their_useful_tokens(monkeypatch, tmp_path, model):
    row, = bench(monkeypatch, tmp_path, model, "--grpo")["rows"]
    # what lies between the phases is a part of the step
    assert 0 < sum(row[phase] for phase in grpo_step.TIMED) <= row["seconds"] == row["step"]
    assert row["tok_per_s"] == pytest.approx(row["tokens"] / row["seconds"]) and row["mean"] < 12
    assert np.isfinite(row["grad_norm"])


def test_versus_compares_medians_with_the_targets():
    slow = {"mean": 9.0}
    figures = [*(versus.Figure("jspec", "heavy tail, tok/s", value, 2, {"mean": value})
                 for value in (30, 90, 60)),
               versus.Figure("vllm", "heavy tail, tok/s", 20, 1, slow),
               versus.Figure("jspec", "GRPO step, 8 rows, s", 5, 2),
               versus.Figure("tunix", "GRPO step, 8 rows, s", 9, 2),
               versus.Figure("vllm", "batch 1, tok/s", 3, 2)]
    tail, step = versus.rows_of(figures)
    assert ((tail["jspec"], tail["ratio"], tail["target"], tail["their_threads"])
            == (60, 3.0, 1.5, 1))
    assert (tail["jspec_answers"] == [{"mean": 30}, {"mean": 90}, {"mean": 60}]
            and tail["their_answers"] == [slow])
    assert step["ratio"] == 9 / 5 and "jspec_answers" not in step


def test_a_baseline_runs_its_own_benchmark_or_this_one(monkeypatch, tmp_path):
    script = """
import json, sys
from pathlib import Path
import benchmarks.measure, jspec
def main(arguments):
    found = [benchmarks.measure.__file__, jspec.__file__, __file__]
    Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps({"rows": found}))
if __name__ == "__main__":
    main(sys.argv[1:])
"""
    new, old, older = (tmp_path / name for name in ("new", "old", "older"))
    for checkout in (new, old, older):
        for name in ("benchmarks", "jspec", "pallas_kernels"):
            (checkout / name).mkdir(parents=True)
            (checkout / name / "__init__.py").touch()
        (checkout / "benchmarks" / "measure.py").touch()
    for checkout in (new, old):
        (checkout / "benchmarks" / "script.py").write_text(script)
    monkeypatch.setattr(versus, "HERE", new / "benchmarks")
    for checkout, packages, ran in ((None, new, new), (old, old, old), (older, older, new)):
        assert versus.ours("script", [], 60, checkout) == [str(path) for path in (
            packages / "benchmarks" / "measure.py", packages / "jspec" / "__init__.py",
            ran / "benchmarks" / "script.py")]


def test_a_baseline_must_be_one(capsys, tmp_path):
    for options in ([], ["--baseline", str(tmp_path)]):
        with pytest.raises(SystemExit):
            versus.main([str(tmp_path), "--only", "tail_baseline", *options])
        assert "tail_baseline needs --baseline, a checkout of jspec" in capsys.readouterr().err
