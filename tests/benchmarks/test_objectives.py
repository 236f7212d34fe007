"""What is made of finished runs under several objectives."""

import json
from pathlib import Path

from benchmarks import objectives
from jspec.cli import guarded

TINY = str(Path(__file__).resolve().parent.parent.parent / "configs/tiny.yaml")


def test_finished_runs_are_read_and_drawn(tmp_path, capsys):
    runs, out, picture = tmp_path / "runs", tmp_path / "o.json", tmp_path / "o.png"
    for name, last in (("grpo", 1.0), ("rloo", 0.5)):
        (runs / name).mkdir(parents=True)
        lines = [{"step": i + 1, "reward": last * min(1, i / 20), "seconds/step": 0.5}
                 for i in range(40)]
        (runs / name / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    chosen = ["--only", "grpo", "rloo", "--runs", str(runs)]
    assert objectives.main([TINY, "steps=40", *chosen, "--json", str(out), "--plot",
                            str(picture)]) == 0
    grpo, rloo = json.loads(out.read_text())["rows"]
    assert (grpo["last"], grpo["above_four_fifths"], grpo["seconds"]) == (1.0, 22, 20.0)
    assert (rloo["last"], rloo["above_four_fifths"]) == (0.5, None)
    assert picture.stat().st_size > 5000 and len(grpo["reward"]) == 40
    assert guarded(lambda: objectives.main([TINY, "grpo.objective=rloo", *chosen])) == 2
    assert "this benchmark sets it itself" in capsys.readouterr().err
