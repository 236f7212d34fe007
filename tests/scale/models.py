"""Shapes of published models, and how much of them is known from elsewhere."""

from jspec.model import ModelConfig
from jspec.model.config import Experts

WIDE = {"num_kv_heads": 4, "head_dim": 128, "tie_embeddings": False, "qk_norm": True,
        "max_position_embeddings": 40960}
QWEN3_8B = ModelConfig(151936, 4096, 12288, 36, 32, family="qwen3", **WIDE | {"num_kv_heads": 8})
QWEN3_30B = ModelConfig(151936, 2048, 6144, 48, 32, family="qwen3_moe",
                        experts=Experts(128, 8, 768), **WIDE)
QWEN3_235B = ModelConfig(151936, 4096, 12288, 94, 64, family="qwen3_moe",
                         experts=Experts(128, 8, 1536), **WIDE)
