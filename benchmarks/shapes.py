"""The model shapes that are timed. Decode cost depends on shapes, not on values, so weights are
random."""

from jspec import ModelConfig, RopeConfig

SHAPES = {
    "smollm2-135m": ModelConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536,
                                num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
                                rope=RopeConfig(theta=100_000.0), max_position_embeddings=8192),
    "llama-3.2-1b": ModelConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                                num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64,
                                rope=RopeConfig(theta=500_000.0), max_position_embeddings=131072),
    "qwen3-8b": ModelConfig(family="qwen3", vocab_size=151936, hidden_size=4096,
                            intermediate_size=12288, num_layers=36, num_heads=32, num_kv_heads=8,
                            head_dim=128, rms_norm_eps=1e-6, rope=RopeConfig(theta=1_000_000.0),
                            tie_embeddings=False, qk_norm=True, max_position_embeddings=40960),
    "tiny": ModelConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2,
                        num_heads=4, num_kv_heads=2, head_dim=16),
}
