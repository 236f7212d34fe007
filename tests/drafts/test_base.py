"""What of a draft is kept in files comes back from them."""

import dataclasses
import json

import pytest

from jspec.drafts.base import model_config
from jspec.model import Experts, ModelConfig, RopeConfig

SIZES = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_layers=3, num_heads=2,
             num_kv_heads=1, head_dim=2)


@pytest.mark.parametrize("made", [
    ModelConfig(**SIZES, stop_tokens=(1, 2), tokenless=((3, 5),)),
    ModelConfig(**SIZES, rope=RopeConfig(scaling="linear", factor=2.0)),
    ModelConfig(**SIZES, family="qwen3_moe", experts=Experts(4, 2, 5, dense_layers=(0, 2)))])
def test_a_models_config_comes_back_from_json(made):
    assert model_config(json.loads(json.dumps(dataclasses.asdict(made)))) == made


def test_files_of_before_had_no_experts():
    made = ModelConfig(**SIZES)
    fields = dataclasses.asdict(made)
    del fields["experts"]
    assert model_config(fields) == made
