"""The comparison of a draft that learns with a frozen one, on a small run."""

import json
from pathlib import Path

import pytest

from benchmarks import online
from jspec.cli import guarded

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = [str(ROOT / "configs/tiny.yaml"), f"data.source={ROOT}/configs/data/count_up.jsonl",
         "reward.workers=1", f"reward.function={ROOT}/configs/rewards/count_up.py:count_up",
         "model.architecture.num_layers=1", "draft.options.depths=1", "draft.every_n_steps=1",
         "data.prompts_per_step=2", "data.group_size=4"]


@pytest.mark.slow
def test_both_drafts_are_measured_on_the_same_policies(tmp_path):
    out, picture = tmp_path / "online.json", tmp_path / "online.png"
    assert (online.main([*SMALL, "steps=3", "--every", "2", "--batches", "1", "--json", str(out),
                         "--plot", str(picture)]) == 0)
    first, last = json.loads(out.read_text())["rows"]
    assert (first["step"], last["step"]) == (2, 3)
    assert first["online"] == first["frozen"]  # where the frozen one is taken from
    assert last["online"] != last["frozen"] and all(0 <= r["reward"] <= 1 for r in (first, last))
    assert picture.stat().st_size > 5000


def test_mistakes_are_one_line(capsys):
    assert guarded(lambda: online.main([*SMALL, "steps=4", "--every", "5"])) == 2
    assert "no more than the 4 steps" in capsys.readouterr().err
    assert guarded(lambda: online.main(["--every"])) == 2
    assert guarded(lambda: online.main([*SMALL, "output_dir=here"])) == 2
    assert "output_dir=here: this benchmark sets it itself" in capsys.readouterr().err
    assert guarded(lambda: online.main([*SMALL, "draft.train=false"])) == 2
    assert f"nothing learns; give one of {', '.join(online.LEARNERS)}" in capsys.readouterr().err
