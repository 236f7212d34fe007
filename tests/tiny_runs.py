"""Runs of a tiny policy, which several test files start."""

from pathlib import Path

import pytest

from jspec import train
from jspec.config import Config, load_config
from jspec.errors import InputError
from jspec.metrics import read_records, untimed

ROOT = Path(__file__).resolve().parent.parent
# smaller than tiny.yaml, and learning with fewer answers; eight devices divide its vocabulary
SMALL = ["model.tokenizer=chars:0123456789abcd", "model.architecture.vocab_size=16",
         "model.architecture.hidden_size=32", "model.architecture.intermediate_size=32",
         "model.architecture.num_layers=1", "draft.every_n_steps=1", "data.prompts_per_step=4",
         "data.group_size=4", "grpo.learning_rate=6e-3", "reward.workers=1", "checkpoint.every=2"]


def tiny(directory, *overrides, small=True) -> Config:
    return load_config(ROOT / "configs/tiny.yaml", [
        f"data.source={ROOT}/configs/data/count_up.jsonl",
        f"reward.function={ROOT}/configs/rewards/count_up.py:count_up",
        f"output_dir={directory}", *(SMALL if small else []), *overrides])


def records(directory) -> list[dict]:
    return [untimed(record) for record in read_records(Path(directory) / "metrics.jsonl")]


def refused(config) -> str:
    with pytest.raises(InputError) as error:
        train.train(config)
    assert "\n" not in str(error.value)
    return str(error.value)
