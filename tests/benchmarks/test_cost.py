"""`jspec bench cost` stores what was measured, and what follows from it."""

import json
import sys

import pytest

from jspec import cli
from jspec.speculate.schedule import Costs


@pytest.mark.slow
def test_what_a_cycle_costs_is_stored(monkeypatch, tmp_path, model, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("JSPEC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    out = tmp_path / "costs.json"
    assert (cli.main(["bench", "cost", model, "--prompts", str(tmp_path / "sums.jsonl"), "--drafts",
                      "ngram", "--rows",
                     "2", "--k", "3", "--max-new-tokens", "12", "--json", str(out)]) == 0)
    (row,) = json.loads(out.read_text())["rows"]
    costs = Costs.from_json(row["costs"])
    assert ([rows for rows, _ in costs.plain] == [2] and [at[:2] for at in costs.drafting]
            == [(2, 3)])
    assert row["draft"] == "ngram" and len(row["acceptance"]) == 3 and row["expected_speedup"] >= 1
    assert row["reason"] in capsys.readouterr().out.replace("\n", "")
